"""What stands in the program for a bucket over NCCL."""

# pyright: strict, reportUnknownMemberType=false
# JAX types its own functions in part.
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcomm import compat, native
from jaxcomm.native import nccl
from jaxcomm.transports.base import Call, call_attributes, emit, map_values, numbers

_NARROW = {"int16": "int32", "uint16": "uint32"}


def lower(
    ctx: Any, call: Call, values: Sequence[Any], *, graphs: bool
) -> Sequence[Any]:
    """Emit the custom call, between conversions to and from what NCCL knows.

    Args:
      ctx: JAX's lowering context.
      call: the bucket's.
      values: IR values of the leaves and of the token.
      graphs: whether XLA may record the call into a CUDA graph.
    """
    # Groups of ranks are divided when they first reduce, which cannot be recorded.
    recorded = "graph_" if graphs and not call.partition else ""
    attributes = call_attributes(call)
    if call.op == "broadcast":
        attributes["root"] = np.int64(call.root)
        target = f"jaxcomm_nccl_{recorded}broadcast"
        return emit(target, ctx, values, attributes, range(len(values)))
    if call.op in native.MOVES:
        attributes["move"] = np.int64(native.MOVES.index(call.op))
        attributes["ranks"] = np.int64(call.size)
        attributes["permutation"] = numbers(call.permutation)
        emitted = _Emitted("jaxcomm_nccl_move", attributes, in_place=False)
        if call.op != "reduce_scatter":
            return emitted(ctx, values)
        return _reduce(ctx, call, values, emitted, pack_bytes=0, divide=False)
    average = call.op == "mean" and _averages(_travelling(ctx, call), call.size)
    op = "avg" if average else {"mean": "sum"}.get(call.op, call.op)
    attributes["op"] = np.int64(nccl.OPS[op])
    emitted = _Emitted(f"jaxcomm_nccl_{recorded}all_reduce", attributes, in_place=True)
    divide = call.op == "mean" and not average
    return _reduce(
        ctx, call, values, emitted, pack_bytes=call.pack_bytes, divide=divide
    )


@dataclasses.dataclass(frozen=True)
class _Emitted:
    """A custom call: its target and attributes, and where its results lie."""

    target: str
    attributes: dict[str, Any]
    in_place: bool

    def __call__(self, ctx: Any, values: Sequence[Any]) -> Sequence[Any]:
        last = len(values) - 1
        aliased = range(len(values)) if self.in_place else [last]
        return emit(self.target, ctx, values, self.attributes, aliased)


def _reduce(
    ctx: Any,
    call: Call,
    values: Sequence[Any],
    emitted: _Emitted,
    *,
    pack_bytes: int,
    divide: bool,
) -> Sequence[Any]:
    """Emit a reduction between what XLA does before and after it.

    Small leaves are written one after the other, all are converted to what travels,
    and back again; the mean's division is XLA's where it is not NCCL's.
    """
    *leaves, token = ctx.avals_in
    *results, _ = ctx.avals_out
    travels = _travelling(ctx, call)
    kind = np.dtype(travels) if travels != "bfloat16" else np.dtype(jnp.bfloat16)
    small = [
        i
        for i, leaf in enumerate(leaves)
        if leaf.size and leaf.size * kind.itemsize <= pack_bytes
    ]
    small = small if len(small) > 1 else []
    alone = [i for i in range(len(leaves)) if i not in small]
    if not small and not divide and leaves and leaves[0].dtype == kind:
        return emitted(ctx, values)

    def before(*xs: Any) -> list[Any]:
        xs = tuple(x.astype(kind) for x in xs)
        packed = [jnp.concatenate([xs[i].ravel() for i in small])] if small else []
        return [*packed, *(xs[i] for i in alone)]

    def finish(x: Any, like: Any) -> Any:
        x = x.reshape(like.shape).astype(like.dtype)
        if not divide:
            return x
        by = jnp.asarray(call.size, like.dtype)
        # Integers are rounded toward zero.
        return lax.div(x, by) if jnp.issubdtype(x.dtype, jnp.integer) else x / by

    def after(*xs: Any) -> list[Any]:
        parts: dict[int, Any] = {}
        if small:
            ends = np.cumsum([leaves[i].size for i in small])[:-1]
            parts = dict(zip(small, jnp.split(xs[0], ends), strict=True))
            xs = xs[1:]
        parts |= dict(zip(alone, xs, strict=True))
        return [finish(parts[i], like) for i, like in enumerate(results)]

    arrays = _abstract(before, leaves)
    reduced = (
        [compat.shaped_array(leaf.shape, kind) for leaf in results]
        if not small
        else arrays
    )
    operands = map_values(before, ctx, leaves, arrays, values[:-1])
    inner = ctx.replace(avals_in=[*arrays, token], avals_out=[*reduced, token])
    *out, ordered = emitted(inner, [*operands, values[-1]])
    return [*map_values(after, ctx, reduced, results, out), ordered]


def _travelling(ctx: Any, call: Call) -> str:
    """The dtype that NCCL gets of a bucket's leaves, which have one dtype."""
    leaves = ctx.avals_in[:-1]
    dtype = str(leaves[0].dtype) if leaves else "float32"
    return call.wire or _NARROW.get(dtype, dtype)


def _abstract(function: Callable[..., Any], avals: Sequence[Any]) -> list[Any]:
    kinds = jax.eval_shape(
        function, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals)
    )
    return [compat.shaped_array(kind.shape, kind.dtype) for kind in kinds]


def _averages(dtype: str, ranks: int) -> bool:
    """Tell whether NCCL's own average is the sum divided by the number of ranks.

    It multiplies by the inverse, rounded to the dtype: exact for powers of two. Sums of
    float16 might be infinite where their mean is not, so there it is taken anyway.
    """
    if dtype == "float16":
        return True
    power = ranks & (ranks - 1) == 0
    return power and dtype in ("bfloat16", "float32", "float64")
