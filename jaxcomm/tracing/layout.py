"""Where the axis of the ranks stands, before and after a collective.

The native calls see it in front: gathered is (leaf) -> (ranks, leaf), scattered is
(ranks, leaf) -> (leaf), exchanged (ranks, leaf) -> (ranks, leaf). These functions bring
an array there and back, as `jax.lax` defines `all_gather`, `psum_scatter` and
`all_to_all`.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def gathered(x: Any, axis: int, *, tiled: bool) -> Any:
    """(ranks, ...) to the ranks' axis at `axis`, or merged into what stands there."""
    x = jnp.moveaxis(x, 0, axis)
    return _merged(x, axis) if tiled else x


def to_scatter(x: Any, axis: int, ranks: int, *, tiled: bool) -> Any:
    """Bring the axis that is divided among the ranks to the front."""
    return jnp.moveaxis(_divided(x, axis, ranks) if tiled else x, axis, 0)


def to_exchange(x: Any, split_axis: int, ranks: int) -> Any:
    """Divide an axis into one block a rank, (ranks, block)."""
    return jnp.moveaxis(_divided(x, split_axis, ranks), split_axis, 0)


def exchanged(x: Any, concat_axis: int) -> Any:
    """Concatenate the ranks' blocks along an axis."""
    return _merged(jnp.moveaxis(x, 0, concat_axis), concat_axis)


def _divided(x: Any, axis: int, ranks: int) -> Any:
    shape = x.shape
    whole = (*shape[:axis], ranks, shape[axis] // ranks, *shape[axis + 1 :])
    return jnp.reshape(x, whole)


def _merged(x: Any, axis: int) -> Any:
    shape = x.shape
    length = shape[axis] * shape[axis + 1]
    return jnp.reshape(x, (*shape[:axis], length, *shape[axis + 2 :]))
