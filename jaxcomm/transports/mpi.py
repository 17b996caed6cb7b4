"""Transport `mpi`: one variadic custom call per bucket, in the native library."""

from __future__ import annotations

from collections.abc import Sequence
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
        """Emit one custom call whose results alias its operands."""
        attributes = {
            "comm": np.int64(call.comm),
            "schedule": np.int64(call.digest),
            "bucket": np.int64(call.bucket),
        }
        if call.op == "broadcast":
            target = "jaxcomm_mpi_broadcast"
            attributes["root"] = np.int64(call.root)
        else:
            target = "jaxcomm_mpi_all_reduce"
            op = "sum" if call.op == "mean" else call.op
            attributes["op"] = np.int64(native.OPS.index(op))
            attributes["divisor"] = np.int64(call.size if call.op == "mean" else 1)
            attributes["pack_bytes"] = np.int64(call.pack_bytes)
            wire = native.DTYPES.index(call.wire) if call.wire else -1
            attributes["wire"] = np.int64(wire)
        return in_place_call(target, ctx, values, attributes)


def in_place_call(
    target: str, ctx: Any, values: Sequence[Any], attributes: dict[str, Any]
) -> Sequence[Any]:
    """Emit a custom call on `values` with every result aliased to its operand."""
    # A token has no buffer to alias.
    arrays = [i for i, aval in enumerate(ctx.avals_in) if hasattr(aval, "shape")]
    rule = jax.ffi.ffi_lowering(
        target, has_side_effect=True, operand_output_aliases={i: i for i in arrays}
    )
    return rule(ctx, *values, **attributes)
