"""Transport `mpi`: one variadic custom call per bucket, in the native library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from jaxcomm import native
from jaxcomm.transports.base import Call, check_dtype


class Mpi:
    """MPI through jaxcomm's own custom call."""

    name = "mpi"

    def check(self, op: str, dtype: str, path: str) -> None:
        """Raise UnsupportedDtypeError for a reduction that has no meaning."""
        check_dtype(self.name, op, dtype, path)

    def lower(self, ctx: Any, call: Call, values: Sequence[Any]) -> Sequence[Any]:
        """Emit one custom call; where shapes allow, results alias operands."""
        attributes: dict[str, Any] = {
            "comm": np.int64(call.comm),
            "schedule": np.int64(call.digest),
            "bucket": np.int64(call.bucket),
            "partition": np.int64(call.partition),
            "groups": _numbers((len(group), *group) for group in call.groups),
        }
        if call.op in native.MOVES:
            # No aliases but the token's: what is received has another shape or order.
            attributes["move"] = np.int64(native.MOVES.index(call.op))
            attributes["divisor"] = np.int64(1)
            attributes["permutation"] = _numbers(call.permutation)
            last = len(values) - 1
            return _emit("jaxcomm_mpi_move", ctx, values, attributes, [last])
        if call.op == "broadcast":
            attributes["root"] = np.int64(call.root)
            return in_place_call("jaxcomm_mpi_broadcast", ctx, values, attributes)
        op = "sum" if call.op == "mean" else call.op
        attributes["op"] = np.int64(native.OPS.index(op))
        attributes["divisor"] = np.int64(call.size if call.op == "mean" else 1)
        attributes["pack_bytes"] = np.int64(call.pack_bytes)
        wire = native.DTYPES.index(call.wire) if call.wire else -1
        attributes["wire"] = np.int64(wire)
        return in_place_call("jaxcomm_mpi_all_reduce", ctx, values, attributes)


def _numbers(rows: Iterable[Iterable[int]]) -> np.ndarray:
    return np.array([number for row in rows for number in row], np.int64)


def in_place_call(
    target: str, ctx: Any, values: Sequence[Any], attributes: dict[str, Any]
) -> Sequence[Any]:
    """Emit a custom call on `values` with every result aliased to its operand."""
    return _emit(target, ctx, values, attributes, range(len(values)))


def _emit(
    target: str,
    ctx: Any,
    values: Sequence[Any],
    attributes: dict[str, Any],
    aliased: Iterable[int],
) -> Sequence[Any]:
    # A token has no buffer to alias.
    arrays = [i for i in aliased if hasattr(ctx.avals_in[i], "shape")]
    rule = jax.ffi.ffi_lowering(
        target, has_side_effect=True, operand_output_aliases={i: i for i in arrays}
    )
    return rule(ctx, *values, **attributes)
