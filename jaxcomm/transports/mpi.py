"""Transport `mpi`: one variadic custom call per bucket, in the native library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcomm import native
from jaxcomm.transports.base import Call, call_attributes, check_dtype, emit, numbers


class Mpi:
    """MPI through jaxcomm's own custom call."""

    name = "mpi"

    def check(self, op: str, dtype: str, path: str) -> None:
        """Raise UnsupportedDtypeError for a reduction that has no meaning."""
        check_dtype(self.name, op, dtype, path)

    def lower(self, ctx: Any, call: Call, values: Sequence[Any]) -> Sequence[Any]:
        """Emit one custom call; where shapes allow, results alias operands."""
        attributes = call_attributes(call)
        if call.op in native.MOVES:
            # No aliases but the token's: what is received has another shape or order.
            attributes["move"] = np.int64(native.MOVES.index(call.op))
            attributes["divisor"] = np.int64(1)
            attributes["permutation"] = numbers(call.permutation)
            last = len(values) - 1
            return emit("jaxcomm_mpi_move", ctx, values, attributes, [last])
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


def in_place_call(
    target: str, ctx: Any, values: Sequence[Any], attributes: dict[str, Any]
) -> Sequence[Any]:
    """Emit a custom call on `values` with every result aliased to its operand."""
    return emit(target, ctx, values, attributes, range(len(values)))
