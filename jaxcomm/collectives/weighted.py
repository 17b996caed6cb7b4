"""Means over ranks that do not count alike: uneven batches, loaders that run dry."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxcomm.collectives import reductions
from jaxcomm.errors import InvalidOptionError, InvalidTreeError
from jaxcomm.ranks.communicator import Communicator

_REMEDY = "give one real number per rank, such as how many samples its batch has"


def mean(tree: Any, weight: Any, *, op: str, comm: Communicator, **options: Any) -> Any:
    """Return sum(weight * leaf) / sum(weight) over ranks; see `all_reduce`."""
    w = check(weight, op)
    paths, leaves, treedef = reductions.flatten(tree)
    for path, leaf in zip(paths, leaves, strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise InvalidTreeError(
                f"leaf {path} has dtype {leaf.dtype}, and a weighted mean is no "
                "integer; cast it to float32 first"
            )
    # Shares, because a sum of weighted leaves may be infinite where their mean is not.
    # The weight is no leaf of the user's: it is in none of the user's groups.
    total = reductions.all_reduce({"weight": w}, op="sum", comm=comm)["weight"]
    share = jnp.where(total == 0, 0, w / jnp.where(total == 0, 1, total))
    # What a rank without data has computed may be NaN; times zero it still would be.
    parts = [
        jnp.where(w == 0, 0, _wide(leaf) * share.astype(_wide(leaf).dtype))
        for leaf in leaves
    ]
    sums = reductions.all_reduce(
        jax.tree.unflatten(treedef, parts), op="sum", comm=comm, **options
    )
    narrow = [
        y.astype(x.dtype) for y, x in zip(jax.tree.leaves(sums), leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, narrow)


def check(weight: Any, op: str) -> Any:
    """Return a weight as a scalar of one dtype on all ranks, whatever each gives.

    Raises:
      InvalidOptionError: it is not one real number, or `op` has no weights.
    """
    if op != "mean":
        raise InvalidOptionError(
            f"op={op!r} with weight=...: only a mean has weights; multiply the leaves "
            "yourself, or use op='mean'"
        )
    plain = isinstance(weight, int | float) and not isinstance(weight, bool)
    try:
        w = jnp.asarray(float(weight) if plain else weight)
    except (TypeError, ValueError) as error:
        raise InvalidOptionError(f"weight={weight!r:.80}; {_REMEDY}") from error
    if w.shape != () or not jnp.issubdtype(w.dtype, jnp.number) or _complex(w):
        raise InvalidOptionError(
            f"weight has shape {w.shape} and dtype {w.dtype}; {_REMEDY}"
        )
    return w.astype(jnp.result_type(float))


def _wide(leaf: Any) -> Any:
    """16-bit floats are weighted and added in float32."""
    half = leaf.dtype in (jnp.bfloat16, jnp.float16)
    return leaf.astype(jnp.float32) if half else leaf


def _complex(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.complexfloating)
