"""Transport `mpi4jax`: the same schedules through mpi4jax's custom calls.

mpi4jax orders its calls by a JAX effect, which costs the C++ dispatch path and
forbids `jax.checkpoint`. Here its custom call is emitted without the effect,
between two of our `gate` calls that tie its buffer to the token.

What mpi4jax is remains: one call per array (small leaves of a bucket are
concatenated first), counts cast to C int, MPI handles written into the HLO, and
`MPI_Abort` as its answer to an MPI error. Only reductions of all ranks and broadcasts
go through it.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# JAX types its own functions in part.
from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcomm import compat, native
from jaxcomm.errors import InvalidOptionError, TransportUnavailableError
from jaxcomm.planning.planner import WIRE_DTYPES
from jaxcomm.planning.schedule import leaf_bytes
from jaxcomm.transports.base import Call, Group, map_values
from jaxcomm.transports.mpi import Mpi, in_place_call

if TYPE_CHECKING:
    from jaxcomm.ranks.fabric import Fabric

_MAX_COUNT = 2**31 - 1


class Mpi4jax(Mpi):
    """MPI through mpi4jax."""

    name = "mpi4jax"
    concurrent_mpi_calls = True  # they cannot take turns
    waits_in_pool = False
    one_thread = "whose calls hold XLA's threads. Use transport 'mpi'."

    def open(self, fabric: Fabric, abort_after: float) -> None:
        """Import mpi4jax.

        Raises:
          TransportUnavailableError: it cannot be imported, or is a version whose
            custom calls this module does not know.
        """
        super().open(fabric, abort_after)
        try:
            # Imported for its side effect: it registers the custom call targets.
            importlib.import_module("mpi4jax")
        except Exception as error:  # its own checks raise several kinds
            raise TransportUnavailableError(
                f"transport 'mpi4jax': importing mpi4jax failed: {error}. Install it "
                "against the same MPI as mpi4py, or use transport='mpi'."
            ) from error

    def connect(self, group: Group) -> None:
        """Connect the ranks; mpi4jax has one way between hosts."""
        super().connect(group)
        self.two_tiers = False

    def lower(self, ctx: Any, call: Call, values: Sequence[Any]) -> Sequence[Any]:
        """Emit gate, mpi4jax's call, gate, for every array of the bucket."""
        if call.op in native.MOVES or call.partition:
            # mpi4jax writes MPI handles into the program, and a subgroup's does not
            # exist while tracing. Gathers and the like are our own calls as well.
            return super().lower(ctx, call, values)
        *leaves, token = values
        *avals, token_aval = ctx.avals_in
        small = [
            i for i, aval in enumerate(avals) if leaf_bytes(aval) <= call.pack_bytes
        ]
        single = [[i] for i in range(len(avals)) if i not in small]
        out: list[Any] = [None] * len(leaves)
        for part in [*single, *([small] if small else [])]:
            shapes = [avals[i].shape for i in part]
            before = functools.partial(_encode, call=call, rank=self.fabric.rank)
            after = functools.partial(_decode, call=call, like=[avals[i] for i in part])
            dtype = avals[part[0]].dtype
            count = sum(math.prod(shape) for shape in shapes) * _pieces(call, dtype)
            whole = compat.shaped_array((count,), _carrier(call, dtype))
            (flat,) = map_values(
                before,
                ctx,
                [avals[i] for i in part],
                [whole],
                [leaves[i] for i in part],
            )
            meaning = call.wire or str(dtype)
            flat, token = self._in_order(
                ctx, call, meaning, flat, token, whole, token_aval
            )
            results = map_values(after, ctx, [whole], [avals[i] for i in part], [flat])
            for i, result in zip(part, results, strict=True):
                out[i] = result
        return [*out, token]

    def _in_order(
        self,
        ctx: Any,
        call: Call,
        dtype: str,
        value: Any,
        token: Any,
        aval: Any,
        token_aval: Any,
    ) -> tuple[Any, Any]:
        pair = ctx.replace(avals_in=(aval, token_aval), avals_out=(aval, token_aval))
        gate = {"comm": np.int64(call.comm), "schedule": np.int64(call.digest)}
        value, token = in_place_call(
            "jaxcomm_gate",
            pair,
            (value, token),
            gate | {"bucket": np.int64(call.place)},
        )
        value = self._reduce(ctx, call, dtype, value, aval)
        value, token = in_place_call(
            "jaxcomm_gate", pair, (value, token), gate | {"bucket": np.int64(-1)}
        )
        return value, token

    def _reduce(self, ctx: Any, call: Call, dtype: str, value: Any, aval: Any) -> Any:
        from mpi4py import MPI

        count = math.prod(aval.shape)
        if count > _MAX_COUNT:
            raise InvalidOptionError(
                f"transport 'mpi4jax' counts in a C int: {count:,} elements in one "
                f"call exceed {_MAX_COUNT:,}. Use transport='mpi', or split the leaf."
            )
        # The operations are those of our own calls: mpi4jax knows no 16-bit floats.
        op = {"mean": "sum", "broadcast": "sum"}.get(call.op, call.op)
        if call.op == "broadcast":
            dtype = str(aval.dtype)
        handle = np.uint64(native.op_handle(dtype, op)).view(np.int64)
        avals = (aval, compat.abstract_token)
        rule: Any = jax.ffi.ffi_lowering("mpi_allreduce_ffi", has_side_effect=True)
        out, _ = rule(
            ctx.replace(avals_in=avals, avals_out=avals),
            value,
            compat.create_token(),
            nitems=np.int64(count),
            op=handle,
            comm=_handle(self.fabric.data),
            dtype=_handle(getattr(MPI, native.MPI_TYPES[dtype])),
        )
        return out


def _handle(thing: Any) -> np.int64:
    from mpi4py import MPI

    # The same function in all versions of mpi4py from 4.0.
    handle: int = MPI._handleof(thing)  # pyright: ignore[reportPrivateUsage]
    return np.uint64(handle & (2**64 - 1)).view(np.int64)


def _carrier(call: Call, dtype: Any) -> np.dtype:
    """The array type that mpi4jax sees.

    16-bit floats, booleans and all that is broadcast travel as bits.
    """
    dtype = np.dtype(call.wire or dtype)
    if call.op == "broadcast":
        return _words(dtype)[0]
    if dtype == np.bool_:
        return np.dtype("uint8")
    return np.dtype("uint16") if str(dtype) in WIRE_DTYPES else dtype


def _words(dtype: np.dtype) -> tuple[np.dtype, int]:
    """Unsigned integers that hold the bits of one element, and how many."""
    size = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
    return np.dtype(f"uint{8 * size}"), dtype.itemsize // size


def _encode(*leaves: Any, call: Call, rank: int) -> list[Any]:
    """Flatten the leaves into one array.

    mpi4jax's own broadcast has another result shape on the root, so that the ranks'
    programs would differ. A sum to which all ranks but the root add zero bits gives
    the root's values exactly.
    """
    flat = [jnp.ravel(x) for x in leaves]
    if call.op == "broadcast":
        flat = [_to_bits(x) for x in flat]
        if rank != call.root:
            flat = [jnp.zeros_like(x) for x in flat]
    whole = flat[0] if len(flat) == 1 else jnp.concatenate(flat)
    if call.op == "broadcast":
        return [whole]
    dtype = call.wire or str(leaves[0].dtype)
    if dtype == "float16" and call.op == "mean":
        whole = whole * np.asarray(1 / _reserve(call), whole.dtype)
    if call.wire:
        whole = whole.astype(dtype)
    return [_to_bits(whole) if _carrier(call, whole.dtype) != whole.dtype else whole]


def _decode(flat: Any, *, call: Call, like: list[Any]) -> list[Any]:
    if call.op != "broadcast":
        flat = _scaled(flat, call, like[0].dtype)
    out: list[Any] = []
    start = 0
    for aval in like:
        stop = start + math.prod(aval.shape) * _pieces(call, aval.dtype)
        part = lax.slice(flat, (start,), (stop,))
        start = stop
        if call.op == "broadcast":
            part = _from_bits(part, aval.dtype)
        out.append(jnp.reshape(part, aval.shape))
    return out


def _scaled(flat: Any, call: Call, dtype: Any) -> Any:
    """Undo `_encode`, and divide for a mean."""
    wire = np.dtype(call.wire or dtype)
    if flat.dtype != wire:
        flat = _from_bits(flat, wire)
    # The quotient of 16-bit floats is rounded once, as in the native call.
    narrow = str(wire) in WIRE_DTYPES
    if narrow:
        flat = flat.astype(jnp.float32)
    if call.op == "mean":
        if wire == np.float16:
            flat = flat * np.float32(_reserve(call))
        # 8-bit integers hold no large number of ranks.
        wide = flat.astype(jnp.int32) if np.dtype(dtype).itemsize == 1 else flat
        size = jnp.asarray(call.size, wide.dtype)
        # Integer means round toward zero.
        flat = lax.div(wide, lax.broadcast(size, wide.shape))
    return flat.astype(dtype)


def _reserve(call: Call) -> int:
    return 1 << (call.size - 1).bit_length()


def _pieces(call: Call, dtype: Any) -> int:
    return _words(np.dtype(dtype))[1] if call.op == "broadcast" else 1


def _to_bits(flat: Any) -> Any:
    if flat.dtype == np.bool_:
        return flat.astype(np.uint8)
    if jnp.issubdtype(flat.dtype, jnp.complexfloating):
        flat = jnp.ravel(jnp.stack([flat.real, flat.imag], axis=-1))
    words, _ = _words(np.dtype(flat.dtype))
    return lax.bitcast_convert_type(flat, words)


def _from_bits(flat: Any, dtype: Any) -> Any:
    dtype = np.dtype(dtype)
    if dtype == np.bool_:
        return flat != 0
    if dtype.kind == "c":
        part = np.dtype(f"float{4 * dtype.itemsize}")
        pairs = lax.bitcast_convert_type(flat, part).reshape(-1, 2)
        return lax.complex(pairs[:, 0], pairs[:, 1])
    return lax.bitcast_convert_type(flat, dtype)
