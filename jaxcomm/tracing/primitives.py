"""A schedule's buckets as JAX primitives, and how they are run.

Each bucket of a schedule is one equation. There are two primitives, because the
calls of a program need one total order and must all be made, whatever happens to
their results:

- `bucket_p` carries an ordered JAX effect, one for all communicators. It is what is
  bound while a program is traced that is not ours: a bare collective in a user's own
  `jit`, and a decorated function that is called inside another. JAX then keeps the
  order of all of them and never prunes one, through `scan`, `cond`, `grad` and the
  rest, at the price of Python dispatch (docs/performance.md says what that costs).
- `chained_p` takes and returns a token, a uint32 scalar, and has no effect: order and
  liveness follow from the data alone and dispatch stays on JAX's fast path. Only a
  pass that owns the whole program can thread the token: see `rewrite`. It finds the
  equations of `bucket_p` in what it has traced, and strings them on its token too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxcomm import compat
from jaxcomm.errors import InvalidOptionError, TransportUnavailableError
from jaxcomm.planning.schedule import Bucket, Schedule
from jaxcomm.ranks import agreement, threads
from jaxcomm.ranks.communicator import Communicator
from jaxcomm.transports.base import Call, local_result

TOKEN_DTYPE = np.dtype("uint32")


def run_schedule(
    leaves: Sequence[Any], comm: Communicator, schedule: Schedule
) -> list[Any]:
    """Reduce leaves bucket by bucket: traced where they are tracers, else now."""
    if comm.alone or not schedule.buckets:
        out = list(leaves)
        for bucket in schedule.buckets:
            for i in bucket.leaves:
                out[i] = local_result(bucket, out[i])
                if bucket.makes_equal and isinstance(out[i], compat.Tracer):
                    # A program that one rank may trace, several may, and vice versa.
                    out[i] = checkpoint_name(out[i], mark_of(comm))
        return out
    every = range(len(schedule.buckets))
    if not compat.outside_trace():
        # Constants too: their calls have a place in the program's order.
        return _bind_buckets(leaves, None, comm, schedule, every)[0]
    return _run_now(leaves, comm, schedule, every)


def mark_of(comm: Communicator) -> str:
    """Return the name of what is equal on all ranks, where no call says so."""
    return f"jaxcomm: equal on all ranks of {comm.lineage}"


def _run_now(
    leaves: Sequence[Any],
    comm: Communicator,
    schedule: Schedule,
    buckets: Sequence[int],
) -> list[Any]:
    comm.check_usable()
    threads.enter(comm, leaves)
    first = schedule.fingerprint not in comm.checked
    try:
        out, token = _compiled(tuple(leaves), comm, schedule, tuple(buckets))
        if first:
            jax.block_until_ready(token)
            comm.checked.add(schedule.fingerprint)
    except compat.CALL_ERRORS as error:
        agreement.raise_failure(error)
        raise
    return out


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _compiled(
    leaves: tuple[Any, ...],
    comm: Communicator,
    schedule: Schedule,
    buckets: tuple[int, ...],
) -> tuple[list[Any], Any]:
    return _bind_buckets(leaves, new_token(), comm, schedule, buckets)


def _bind_buckets(
    leaves: Sequence[Any],
    token: Any,
    comm: Communicator,
    schedule: Schedule,
    buckets: Sequence[int],
) -> tuple[list[Any], Any]:
    out = list(leaves)
    for k in buckets:
        members = schedule.buckets[k].leaves
        reduced, token = bind_bucket(
            [out[i] for i in members], token, comm, schedule, k
        )
        for i, leaf in zip(members, reduced, strict=True):
            out[i] = leaf
    return out, token


def cache_clear() -> None:
    """Forget the programs of collectives that were called outside `jit`."""
    _compiled.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]


def bind_bucket(
    values: Sequence[Any],
    token: Any,
    comm: Communicator,
    schedule: Schedule,
    index: int,
) -> tuple[list[Any], Any]:
    """Bind one bucket's equation; return its results and the next token.

    With None for a token it is `bucket_p`, which has the effect, and None is returned.
    """
    params = {"comm": comm, "schedule": schedule, "index": index}
    with jax.named_scope(f"jaxcomm/bucket_{index:02d}"):
        if token is None:
            return bucket_p.bind(*values, **params), None
        *results, token = chained_p.bind(*values, token, **params)
    return results, token


def new_token() -> Any:
    """Return the start of a token chain."""
    return jnp.zeros((), TOKEN_DTYPE)


# Primitives: abstract evaluation, lowering, JVP, transpose, batching.


class _CollectiveOrder(compat.Effect):
    """Orders the collectives of a program that is not ours.

    One for all communicators: calls of two that share ranks would wait for each other
    if the ranks made them in another order.
    """

    def __str__(self) -> str:
        return "jaxcomm order"

    # Equal in every process, so that programs are.
    def __hash__(self) -> int:
        return 0x6A617863

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _CollectiveOrder)


class BoundBucket(NamedTuple):
    """The parameters of a bucket's equation."""

    comm: Communicator
    schedule: Schedule
    index: int

    @property
    def bucket(self) -> Bucket:
        return self.schedule.buckets[self.index]


order_effect = _CollectiveOrder()
compat.register_ordered_effect(order_effect)

bucket_p = compat.Primitive("jaxcomm_bucket")
bucket_p.multiple_results = True
chained_p = compat.Primitive("jaxcomm_chained_bucket")
chained_p.multiple_results = True


def _bucket_abstract_eval(
    *avals: Any, comm: Communicator, schedule: Schedule, index: int
) -> tuple[list[Any], set[Any]]:
    bucket = schedule.buckets[index]
    return [
        compat.shaped_array(moved_shape(bucket, a.shape, comm.size), a.dtype)
        for a in avals
    ], {order_effect}


def _chained_abstract_eval(*avals: Any, **params: Any) -> list[Any]:
    *leaves, token = avals
    out, _ = _bucket_abstract_eval(*leaves, **params)
    return [*out, compat.shaped_array(token.shape, token.dtype)]


def moved_shape(bucket: Bucket, shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Return a leaf's shape after its collective."""
    if bucket.op == "all_gather":
        return (len(bucket.groups[0]) if bucket.groups else size, *shape)
    return shape[1:] if bucket.op == "reduce_scatter" else shape


def _call(ctx: Any, comm: Communicator, schedule: Schedule, index: int) -> Call:
    if strange := set(ctx.module_context.platforms) - comm.backend.platforms:
        raise TransportUnavailableError(
            f"transport {comm.transport!r} moves arrays of "
            f"{', '.join(sorted(comm.backend.platforms))}, and this program is for "
            f"{', '.join(sorted(strange))}: over GPUs use jaxcomm.init('nccl'), or set "
            "JAX_PLATFORMS=cpu"
        )
    threads.enter(comm)
    bucket = schedule.buckets[index]
    groups = bucket.groups
    return Call(
        comm=comm.key,
        size=len(groups[0]) if groups else comm.size,
        op=bucket.op,
        digest=comm.agreement.register(schedule),
        bucket=index,
        site=compat.count_in_module(ctx, f"jaxcomm calls of {comm.key}"),
        pack_bytes=bucket.pack_bytes,
        root=bucket.root,
        wire=bucket.wire,
        permutation=bucket.permutation,
        partition=comm.partition(groups) if groups else 0,
        groups=groups,
        algorithm=bucket.algorithm,
    )


def _chained_lowering(
    ctx: Any, *values: Any, comm: Communicator, schedule: Schedule, index: int
) -> Sequence[Any]:
    return comm.backend.lower(ctx, _call(ctx, comm, schedule, index), values)


def _bucket_lowering(
    ctx: Any, *values: Any, comm: Communicator, schedule: Schedule, index: int
) -> Sequence[Any]:
    token = ctx.tokens_in.get(order_effect)
    avals_in = (*ctx.avals_in, compat.abstract_token)
    avals_out = (*ctx.avals_out, compat.abstract_token)
    *out, token = comm.backend.lower(
        ctx.replace(avals_in=avals_in, avals_out=avals_out),
        _call(ctx, comm, schedule, index),
        (*values, token),
    )
    ctx.set_tokens_out(compat.mlir.TokenSet({order_effect: token}))
    return out


def _bucket_impl(
    *values: Any, comm: Communicator, schedule: Schedule, index: int
) -> list[Any]:
    """Run one bucket outside jit, as `jax.grad` of a bare collective does."""
    bucket = schedule.buckets[index]
    leaves: list[Any] = [jnp.zeros(())] * len(schedule.leaves)
    for i, value in zip(bucket.leaves, values, strict=True):
        leaves[i] = value
    out = _run_now(leaves, comm, schedule, (index,))
    return [out[i] for i in bucket.leaves]


def _check_linear(schedule: Schedule, index: int) -> None:
    op = schedule.buckets[index].op
    if op in ("min", "max", "prod", "broadcast"):
        raise InvalidOptionError(
            f"op={op!r} is not differentiable; use mean or sum, or stop the gradient "
            "with jax.lax.stop_gradient"
        )


def _bucket_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], **params: Any
) -> tuple[Any, Any]:
    _check_linear(params["schedule"], params["index"])
    out = bucket_p.bind(*primals, **params)
    return out, bucket_p.bind(*map(compat.instantiate_zeros, tangents), **params)


def _bucket_transpose(
    cotangents: Sequence[Any], *_: Any, comm: Communicator, **params: Any
) -> Sequence[Any]:
    cotangents = [compat.instantiate_zeros(ct) for ct in cotangents]
    schedule = _transposed(cotangents, comm.size, **params)
    return bucket_p.bind(
        *cotangents, comm=comm, schedule=schedule, index=params["index"]
    )


def _transposed(
    cotangents: Sequence[Any], size: int, schedule: Schedule, index: int
) -> Schedule:
    """The schedule whose bucket `index` takes cotangents back where they came from."""
    bucket = schedule.buckets[index]
    if bucket.op in ("mean", "sum", "all_to_all"):
        return schedule
    op = {"all_gather": "reduce_scatter", "reduce_scatter": "all_gather"}.get(bucket.op)
    back = tuple((target, source) for source, target in bucket.permutation)
    bucket = dataclasses.replace(bucket, op=op or bucket.op, permutation=back)
    return _replaced(schedule, index, bucket, [ct.shape for ct in cotangents])


def _replaced(
    schedule: Schedule, index: int, bucket: Bucket, shapes: Sequence[tuple[int, ...]]
) -> Schedule:
    """Return a schedule with one bucket, and the shapes of its leaves, replaced."""
    specs = list(schedule.leaves)
    for i, shape in zip(bucket.leaves, shapes, strict=True):
        specs[i] = dataclasses.replace(specs[i], shape=tuple(shape))
    buckets = list(schedule.buckets)
    buckets[index] = bucket
    return dataclasses.replace(schedule, leaves=tuple(specs), buckets=tuple(buckets))


def _chained_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], **params: Any
) -> tuple[Any, Any]:
    # Whoever differentiates a decorated function from outside breaks the chain: the
    # transposed calls would hang on no token. The effect orders all of them instead.
    *leaves, token = primals
    out, d_out = _bucket_jvp(leaves, tangents[:-1], **params)
    return [*out, token], [*d_out, compat.zero_tangent(token)]


def _batching(
    primitive: Any, leaves: int | None, args: Any, dims: Any, params: Any
) -> Any:
    """Let the batched axis travel with its leaf, under a schedule that says so."""
    schedule, index = params["schedule"], params["index"]
    bucket = schedule.buckets[index]
    args, dims = list(args), list(dims)
    # An axis that the collective itself makes, takes or reorders stays in front.
    leading = bucket.op in ("reduce_scatter", "all_to_all")
    for k in range(len(args[:leaves])):
        if leading and dims[k] is not None:
            args[k], dims[k] = jnp.moveaxis(args[k], dims[k], 1), 1
    shapes = [leaf.shape for leaf in args[:leaves]]
    batched = _replaced(schedule, index, bucket, shapes)
    out = primitive.bind(*args, **{**params, "schedule": batched})
    shift = {"all_gather": 1, "reduce_scatter": -1}.get(bucket.op, 0)
    for k in range(len(args[:leaves])):
        if dims[k] is not None:
            dims[k] += shift
    return out, dims


def _bucket_batching(args: Any, dims: Any, **params: Any) -> Any:
    return _batching(bucket_p, None, args, dims, params)


def _chained_batching(args: Any, dims: Any, **params: Any) -> Any:
    return _batching(chained_p, -1, args, dims, params)


# This rank's number, which a program must not hold: it is the same on every rank.
rank_p = compat.Primitive("jaxcomm_rank")


def _rank_lowering(ctx: Any, *, comm: Communicator) -> Sequence[Any]:
    if comm.alone:
        rule = compat.mlir.lower_fun(lambda: jnp.int32(0), multiple_results=False)
        return rule(ctx)
    rule = jax.ffi.ffi_lowering(comm.backend.rank_target)
    return rule(ctx, comm=np.int64(comm.key))


# Records when a bucket's operands are there; only where a timeline is asked for.
mark_p = compat.Primitive("jaxcomm_mark")


def mark(
    values: Sequence[Any],
    token: Any,
    comm: Communicator,
    schedule: Schedule,
    index: int,
) -> Any:
    """Return the token, made to wait for `values`, and record when they came."""
    return token + mark_p.bind(*values, comm=comm, schedule=schedule, index=index)


def _mark_lowering(
    ctx: Any, *values: Any, comm: Communicator, schedule: Schedule, index: int
) -> Sequence[Any]:
    rule = jax.ffi.ffi_lowering("jaxcomm_mark", has_side_effect=True)
    digest = comm.agreement.register(schedule)
    numbers = {"comm": comm.key, "schedule": digest, "bucket": index}
    return rule(ctx, *values, **{k: np.int64(v) for k, v in numbers.items()})


def _printed(
    comm: Communicator, schedule: Schedule, index: int
) -> dict[str, str | int]:
    """What jaxprs show of a bucket: a line, where a schedule shows itself as a table.

    Nothing of it differs between ranks.
    """
    bucket = schedule.buckets[index]
    return {
        "bucket": f"{index}/{len(schedule.buckets)}",
        "comm": comm.lineage,
        "op": bucket.op,
        "schedule": schedule.fingerprint[:12],
    }


mark_p.def_abstract_eval(lambda *_, **__: compat.shaped_array((), TOKEN_DTYPE))
compat.mlir.register_lowering(mark_p, _mark_lowering, platform="cpu")

rank_p.def_abstract_eval(lambda *, comm: compat.shaped_array((), np.dtype("int32")))
rank_p.def_impl(lambda *, comm: jnp.int32(comm.rank))
bucket_p.def_impl(_bucket_impl)
bucket_p.def_effectful_abstract_eval(_bucket_abstract_eval)
chained_p.def_abstract_eval(_chained_abstract_eval)
for _platform in ("cpu", "cuda"):
    for _primitive, _rule in (
        (rank_p, _rank_lowering),
        (bucket_p, _bucket_lowering),
        (chained_p, _chained_lowering),
    ):
        # Each call is lowered by itself: equal ones have sites of their own.
        compat.mlir.register_lowering(
            _primitive, _rule, platform=_platform, cacheable=False
        )
for _primitive in (bucket_p, chained_p, mark_p):
    compat.print_parameters(_primitive, _printed)
compat.ad.primitive_jvps[bucket_p] = _bucket_jvp
compat.ad.primitive_jvps[chained_p] = _chained_jvp
compat.ad.primitive_transposes[bucket_p] = _bucket_transpose
compat.batching.primitive_batchers[bucket_p] = _bucket_batching
compat.batching.primitive_batchers[chained_p] = _chained_batching
