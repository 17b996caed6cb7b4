"""Trees of arrays on disk, one entry per leaf, named by its path."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import jax
import numpy as np

Tree = TypeVar("Tree")


def save(path: Path, tree: object) -> None:
    """Write a tree to an .npz file with `jax.tree_util.keystr` names."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in leaves}
    np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]


def load(path: Path, like: Tree) -> Tree:
    """Read a tree that `save` wrote.

    Args:
      path: the file.
      like: a tree of the same structure and shapes (arrays or ShapeDtypeStructs).

    Raises:
      ValueError: the file holds other leaves, or leaves of other shapes.
    """
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
    wanted = {jax.tree_util.keystr(key): leaf.shape for key, leaf in leaves}
    found = {key: array.shape for key, array in arrays.items()}
    if wanted != found:
        differing = sorted(
            key for key in wanted | found if wanted.get(key) != found.get(key)
        )
        raise ValueError(f"{path} does not fit the network: {', '.join(differing)}")
    return jax.tree_util.tree_unflatten(treedef, [arrays[key] for key in wanted])


def max_relative_difference(a: Path, b: Path) -> float:
    """Largest over all leaves of max|a - b| / max|a|, between two files of `save`."""
    with np.load(a) as first, np.load(b) as second:
        differences = [
            np.abs(first[key] - second[key]).max() / np.abs(first[key]).max()
            for key in first.files
            if np.any(first[key])
        ]
        # NumPy's maximum, unlike Python's, is NaN where one of them is.
        return float(np.max(differences))
