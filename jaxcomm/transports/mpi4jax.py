"""Transport `mpi4jax`: the same schedules through mpi4jax's custom calls.

mpi4jax orders its calls by a JAX effect, which costs the C++ dispatch path and
forbids `jax.checkpoint`. Here its custom call is emitted without the effect,
between two of our `gate` calls that tie its buffer to the token.

What mpi4jax is remains: one call per array (small leaves of a bucket are
concatenated first), counts cast to C int, MPI handles written into the HLO, and
`MPI_Abort` as its answer to an MPI error.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcomm import _compat
from jaxcomm.errors import TransportUnavailableError
from jaxcomm.schedule import leaf_bytes
from jaxcomm.transports.base import Call, check_dtype
from jaxcomm.transports.mpi import in_place_call

_MPI_OPS = {
    "mean": "SUM",
    "sum": "SUM",
    "broadcast": "SUM",
    "min": "MIN",
    "max": "MAX",
    "prod": "PROD",
}
_DTYPES = {
    "float32": "FLOAT",
    "float64": "DOUBLE",
    **{
        f"{kind}{bits}": f"{kind.upper()}{bits}_T"
        for kind in ("int", "uint")
        for bits in (8, 16, 32, 64)
    },
}


class Mpi4jax:
    """MPI through mpi4jax.

    Raises:
      TransportUnavailableError: mpi4jax cannot be imported, or is a version whose
        custom calls this module does not know.
    """

    name = "mpi4jax"

    def __init__(self, comm: Any):
        try:
            # Imported for its side effect: it registers the custom call targets.
            importlib.import_module("mpi4jax")
        except Exception as error:  # its own checks raise several kinds
            raise TransportUnavailableError(
                f"transport 'mpi4jax': importing mpi4jax failed: {error}. Install it "
                "against the same MPI as mpi4py, or use transport='mpi'."
            ) from error
        self._comm = comm

    def check(self, op: str, dtype: str, path: str) -> None:
        """Raise UnsupportedDtypeError unless mpi4jax can reduce the dtype."""
        check_dtype(self.name, tuple(_DTYPES), op, dtype, path)

    def lower(self, ctx: Any, call: Call, values: Sequence[Any]) -> Sequence[Any]:
        """Emit gate, mpi4jax's call, gate, for every array of the bucket."""
        *leaves, token = values
        *avals, token_aval = ctx.avals_in
        small = [
            i for i, aval in enumerate(avals) if leaf_bytes(aval) <= call.pack_bytes
        ]
        single = [[i] for i in range(len(avals)) if i not in small]
        out: list[Any] = [None] * len(leaves)
        for part in [*single, *([small] if small else [])]:
            shapes = [avals[i].shape for i in part]
            before = functools.partial(_encode, call=call, rank=self._comm.Get_rank())
            after = functools.partial(_decode, call=call, like=[avals[i] for i in part])
            count = sum(math.prod(shape) for shape in shapes)
            whole = _compat.shaped_array((count,), _wire(call, avals[part[0]].dtype))
            (flat,) = self._map(
                before,
                ctx,
                [avals[i] for i in part],
                [whole],
                [leaves[i] for i in part],
            )
            flat, token = self._in_order(ctx, call, flat, token, whole, token_aval)
            results = self._map(after, ctx, [whole], [avals[i] for i in part], [flat])
            for i, result in zip(part, results, strict=True):
                out[i] = result
        return [*out, token]

    def _in_order(
        self, ctx: Any, call: Call, value: Any, token: Any, aval: Any, token_aval: Any
    ) -> tuple[Any, Any]:
        pair = ctx.replace(avals_in=(aval, token_aval), avals_out=(aval, token_aval))
        gate = {"comm": np.int64(call.comm)}
        value, token = in_place_call(
            "jaxcomm_gate",
            pair,
            (value, token),
            gate | {"schedule": np.int64(call.digest)},
        )
        value = self._reduce(ctx, call, value, aval)
        value, token = in_place_call(
            "jaxcomm_gate", pair, (value, token), gate | {"schedule": np.int64(0)}
        )
        return value, token

    def _reduce(self, ctx: Any, call: Call, value: Any, aval: Any) -> Any:
        from mpi4py import MPI

        avals = (aval, _compat.abstract_token)
        rule = jax.ffi.ffi_lowering("mpi_allreduce_ffi", has_side_effect=True)
        out, _ = rule(
            ctx.replace(avals_in=avals, avals_out=avals),
            value,
            _compat.create_token(),
            nitems=np.int64(math.prod(aval.shape)),
            op=_handle(getattr(MPI, _MPI_OPS[call.op])),
            comm=_handle(self._comm),
            dtype=_handle(getattr(MPI, _DTYPES[str(aval.dtype)])),
        )
        return out

    @staticmethod
    def _map(
        fun: Any, ctx: Any, avals_in: list[Any], avals_out: list[Any], values: list[Any]
    ) -> Sequence[Any]:
        rule = _compat.mlir.lower_fun(fun, multiple_results=True)
        return rule(ctx.replace(avals_in=avals_in, avals_out=avals_out), *values)


def _handle(thing: Any) -> np.int64:
    from mpi4py import MPI

    return np.uint64(MPI._handleof(thing) & (2**64 - 1)).view(np.int64)


def _wire(call: Call, dtype: Any) -> np.dtype:
    """What travels: the leaf's dtype, or a broadcast's bits as unsigned integers."""
    dtype = np.dtype(dtype)
    if call.op != "broadcast":
        return dtype
    return (
        np.dtype("uint8")
        if dtype == np.bool_
        else np.dtype(f"uint{8 * dtype.itemsize}")
    )


def _encode(*leaves: Any, call: Call, rank: int) -> list[Any]:
    """Flatten the leaves into one array.

    mpi4jax's own broadcast has another result shape on the root, so that the ranks'
    programs would differ. A sum to which all ranks but the root add zero bits gives
    the root's values exactly.
    """
    flat = [jnp.ravel(x) for x in leaves]
    if call.op == "broadcast":
        wire = _wire(call, leaves[0].dtype)
        flat = [
            x.astype(wire) if x.dtype == np.bool_ else lax.bitcast_convert_type(x, wire)
            for x in flat
        ]
        if rank != call.root:
            flat = [jnp.zeros_like(x) for x in flat]
    return [flat[0] if len(flat) == 1 else jnp.concatenate(flat)]


def _decode(flat: Any, *, call: Call, like: list[Any]) -> list[Any]:
    if call.op == "mean":
        size = np.asarray(call.size, flat.dtype)
        # Integer means round toward zero, as in the native call.
        flat = lax.div(flat, lax.broadcast(size, flat.shape))
    out, start = [], 0
    for aval in like:
        stop = start + math.prod(aval.shape)
        part = lax.slice(flat, (start,), (stop,))
        start = stop
        if call.op == "broadcast":
            bits = part != 0 if aval.dtype == np.bool_ else None
            part = lax.bitcast_convert_type(part, aval.dtype) if bits is None else bits
        out.append(jnp.reshape(part, aval.shape))
    return out
