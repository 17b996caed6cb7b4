"""Adapter for Optax: an optimizer that reduces gradients before it uses them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxcomm import collectives, planner

if TYPE_CHECKING:
    import optax


def distribute(
    tx: optax.GradientTransformation, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that every update sees all ranks' gradients.

    The reduction comes first, so clipping and moments act on reduced gradients and
    the optimizer's state stays equal on all ranks.

    Args:
      tx: any Optax transformation.
      **options: passed on to `jaxcomm.all_reduce`: op, comm, groups, bucket_bytes,
        wire_dtype.

    Returns:
      A transformation with the same state as `tx`.

    Raises:
      InvalidOptionError: an option has an unusable value; `update` raises what
        `all_reduce` raises.
    """
    import optax

    planner.check_options(
        groups=options.get("groups"),
        bucket_bytes=options.get("bucket_bytes"),
        op=options.get("op", "mean"),
    )
    inner = optax.with_extra_args_support(tx)

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        reduced = collectives.all_reduce(updates, **options)
        return inner.update(reduced, state, params, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)
