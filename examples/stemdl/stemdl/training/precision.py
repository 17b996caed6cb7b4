"""Loss scaling for float16: back off at an overflow, grow after a while without.

Gradients below 6e-8 are zero in float16 and those above 65,504 infinite, so the loss is
multiplied by a scale before the backward pass and the float32 gradients are divided by
it (Micikevicius et al., arXiv:1710.03740). The scale is halved, and the step left out,
when gradients overflow, and doubled after so many steps that did not: "Backoff" of
nlaanait/stemdl, which starts at 2^24 and waits 2,000 steps. No more than 1 is asked of
it: an overflow without a scale is the network's own.

All ranks agree without a message of their own. An infinity or NaN on one rank makes the
mean over ranks infinite or NaN on all of them, and the mean is bitwise equal there; so
is what is decided by it.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from stemdl.config import Precision

Tree = TypeVar("Tree")


class LossScale(NamedTuple):
    """State of the loss scale, in every rank's train state.

    Attributes:
      scale: () float32, by which the loss is multiplied.
      clean: () int32, steps since the scale changed.
      skipped: () int32, steps left out so far.
    """

    scale: jax.Array
    clean: jax.Array
    skipped: jax.Array

    def after(self, finite: jax.Array, growth_interval: int) -> LossScale:
        """Return the state after a step.

        Args:
          finite: () bool, whether all reduced gradients were.
          growth_interval: clean steps after which the scale doubles.
        """
        clean = jnp.where(finite, self.clean + 1, 0)
        grown = clean >= growth_interval
        factor = jnp.where(finite, jnp.where(grown, 2.0, 1.0), 0.5)
        return LossScale(
            jnp.clip(self.scale * factor, 1.0, 2.0**60),
            jnp.where(grown, 0, clean),
            self.skipped + ~finite,
        )


def initial(precision: Precision) -> LossScale | None:
    """The first loss scale; None but in float16, whose range alone is small."""
    if precision.compute != "float16":
        return None
    zero = jnp.zeros((), jnp.int32)
    # Each a buffer of its own, since the step is given them to reuse.
    return LossScale(jnp.float32(precision.loss_scale), zero, zero + 0)


def dtype_of(precision: Precision) -> Any:
    """What the network computes in; None leaves it to its inputs and parameters."""
    return None if precision.compute == "float32" else jnp.dtype(precision.compute)


def all_finite(tree: Any) -> jax.Array:
    """Whether no number of a tree is infinite or NaN; () bool."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def where(chosen: jax.Array, new: Tree, old: Tree) -> Tree:
    """One of two trees, by a () bool."""
    return jax.tree.map(lambda a, b: jnp.where(chosen, a, b), new, old)
