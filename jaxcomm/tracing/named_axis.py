"""What each named-axis collective of a jaxpr is to a schedule.

Internal to `rewrite`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomm import compat
from jaxcomm.planning.planner import Terms
from jaxcomm.tracing import layout
from jaxcomm.transports.base import MOVES

_SUMS = {
    "psum": ("sum", jnp.sum),
    "pmax": ("max", jnp.max),
    "pmin": ("min", jnp.min),
}
# axis_index is none, but is answered here as well.
COLLECTIVES = (
    *_SUMS,
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "ppermute",
    "pbroadcast",
)
# Their results are the same on all ranks, whatever the ranks put in.
EQUAL_RESULTS = (*_SUMS, "all_gather", "pbroadcast")


@dataclasses.dataclass(frozen=True)
class Meaning:
    """One operand's collective.

    Attributes:
      op: as in `schedule.Bucket`.
      terms: what else the bucket must know.
      before: from the operand to what the bucket takes; None where it is the same.
      after: from what the bucket gives to the equation's result; likewise.
    """

    op: str
    terms: Terms
    before: Callable[[Any], Any] | None = None
    after: Callable[[Any], Any] | None = None


def meaning_of(eqn: Any, size: int) -> Meaning:
    """Say what a collective over one named axis of `size` ranks does."""
    meaning = _meaning(eqn, size)
    if meaning.op not in MOVES or not eqn.invars:
        return meaning
    dtype = eqn.invars[0].aval.dtype
    if not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return meaning
    # Of typed keys their words travel.
    before, after = meaning.before or _same, meaning.after or _same
    impl = compat.key_impl(dtype)
    return dataclasses.replace(
        meaning,
        before=lambda x: jax.random.key_data(before(x)),
        after=lambda y: after(jax.random.wrap_key_data(y, impl=impl)),
    )


def _same(x: Any) -> Any:
    return x


def _meaning(eqn: Any, size: int) -> Meaning:
    name, groups = eqn.primitive.name, compat.axis_groups(eqn)
    ranks = len(groups[0]) if groups else size
    terms = Terms(groups=groups)
    if name in _SUMS:
        op, local = _SUMS[name]
        numbers = tuple(a for a in compat.axes(eqn) if isinstance(a, int))
        before = functools.partial(local, axis=numbers) if numbers else None
        return Meaning(op, terms, before)
    if name == "all_gather":
        axis, tiled = compat.gather_layout(eqn)
        after = functools.partial(layout.gathered, axis=axis, tiled=tiled)
        return Meaning("all_gather", terms, after=after)
    if name == "reduce_scatter":
        axis, tiled = compat.scatter_layout(eqn)
        before = functools.partial(
            layout.to_scatter, axis=axis, ranks=ranks, tiled=tiled
        )
        return Meaning("reduce_scatter", terms, before)
    if name == "all_to_all":
        split, concat = compat.exchange_layout(eqn)
        before = functools.partial(layout.to_exchange, split_axis=split, ranks=ranks)
        after = functools.partial(layout.exchanged, concat_axis=concat)
        return Meaning("all_to_all", terms, before, after)
    if name == "pbroadcast":
        root = compat.broadcast_root(eqn)
        return Meaning("broadcast", dataclasses.replace(terms, root=root))
    return Meaning("permute", Terms(permutation=compat.permutation(eqn)))
