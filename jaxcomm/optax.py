"""Adapter for Optax: an optimizer that reduces gradients before it uses them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxcomm.collectives import reductions, weighted
from jaxcomm.errors import InvalidOptionError
from jaxcomm.planning import planner
from jaxcomm.planning.planner import Groups
from jaxcomm.ranks.communicator import Communicator

if TYPE_CHECKING:
    import optax


def distribute(
    tx: optax.GradientTransformation,
    *,
    op: str = "mean",
    comm: Communicator | None = None,
    groups: Groups = None,
    bucket_bytes: int | None = None,
    wire_dtype: str | None = None,
    weight: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that every update sees all ranks' gradients.

    The reduction comes first, so clipping and moments act on reduced gradients and
    the optimizer's state stays equal on all ranks.

    Args:
      tx: any Optax transformation.
      op: this and the others as in `jaxcomm.all_reduce`.
      comm: the ranks that take part; all by default.
      groups: None, a number of buckets per dtype, a function from leaf path to label,
        or regular expressions.
      bucket_bytes: fill buckets up to this size; None leaves it to the cost model.
      wire_dtype: "bfloat16" or "float16": what float32 leaves travel as.
      weight: a number, each rank its own and the same in every update.

    Returns:
      A transformation with the same state as `tx`.

    Raises:
      InvalidOptionError: an option has an unusable value; `update` raises what
        `all_reduce` raises.
      TypeError: there is no option of that name.

    Example:
      >>> import optax
      >>> tx = jaxcomm.optax.distribute(optax.sgd(0.5))
      >>> params = {"w": jnp.ones(3)}
      >>> grads = {"w": jnp.ones(3)}  # each rank's own
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> optax.apply_updates(params, updates)
      {'w': Array([0.5, 0.5, 0.5], dtype=float32)}
    """
    import optax

    planner.check_options(groups=groups, bucket_bytes=bucket_bytes, op=op)
    if wire_dtype is not None:
        planner.check_wire_dtype(wire_dtype)
    if comm is not None and not isinstance(comm, Communicator):
        raise InvalidOptionError(
            f"comm={comm!r:.80}; give a communicator, such as jaxcomm.world() or a "
            "subgroup of it"
        )
    if weight is not None:
        weighted.check(weight, op)
    inner = optax.with_extra_args_support(tx)

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        reduced = reductions.all_reduce(
            updates,
            op=op,
            comm=comm,
            groups=groups,
            bucket_bytes=bucket_bytes,
            wire_dtype=wire_dtype,
            weight=weight,
        )
        return inner.update(reduced, state, params, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)
