"""A pytree as named NumPy arrays, and back. Internal to `checkpoint`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm.errors import CheckpointError

# Kind, shape and dtype of a leaf; of PRNG keys also the name of their implementation,
# which is not compared: it follows from the dtype. JSON holds it unchanged.
Spec = list[Any]

_NUMBERS = {"bool": bool, "int": int, "float": float, "complex": complex}


def take(tree: Any) -> tuple[dict[str, Spec], dict[str, np.ndarray]]:
    """Return every leaf's spec, and the values; waits for them.

    Leaves without elements have a spec only: orbax does not store them.

    Raises:
      CheckpointError: a leaf is neither an array nor a number; names it.
    """
    described = specs(tree)
    values = dict(_values(tree, described))
    return described, {path: value for path, value in values.items() if value.size}


def digests(tree: Any) -> dict[str, str]:
    """Return the SHA-256 of every leaf's bits; waits for them.

    Raises:
      CheckpointError: as `take`.
    """
    found = {}
    for path, value in _values(tree, specs(tree)):
        data = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
        found[path] = hashlib.sha256(data).hexdigest()
    return found


def specs(tree: Any) -> dict[str, Spec]:
    """Describe every leaf, values or `jax.ShapeDtypeStruct`s, by its path."""
    return {path: _spec(path, leaf) for path, leaf in _leaves(tree)}


def put_back(like: Any, found: dict[str, Spec], arrays: dict[str, np.ndarray]) -> Any:
    """Return the tree that `take` took; arrays of JAX where they lie in `like`."""
    leaves = [
        _leaf(leaf, found[path], arrays.get(path)) for path, leaf in _leaves(like)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def difference(wanted: dict[str, Spec], found: dict[str, Spec]) -> str:
    """Say which leaf differs first, and how; "" if none does."""
    for path in {**wanted, **found}:
        ours, theirs = wanted.get(path), found.get(path)
        if ours is None or theirs is None:
            where = "in the checkpoint" if ours is None else "in the state asked for"
            return f"leaf {path} is only {where}. Restore the structure that was saved"
        if ours[:3] != theirs[:3]:
            return (
                f"leaf {path} is {words(ours)} and was {words(theirs)}. Restore the "
                "shapes and dtypes that were saved, or use another directory"
            )
    return ""


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    found = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path) or "(root)", leaf) for path, leaf in found]


def _values(tree: Any, described: dict[str, Spec]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every leaf's value; adds what `described` lacks of PRNG keys."""
    for path, leaf in _leaves(tree):
        spec = described[path]
        if spec[0] == "key":
            spec.append(str(jax.random.key_impl(leaf)))
            leaf = jax.random.key_data(leaf)
        value = np.asarray(leaf)
        if spec[0] == "number" and value.dtype.kind not in "bifc":
            raise CheckpointError(
                f"leaf {path} is {leaf}, which no 64-bit integer holds; store it as an "
                "array of smaller ones"
            )
        yield path, value


def _spec(path: str, leaf: Any) -> Spec:
    # NumPy's float64 is a float of Python too, and comes back as NumPy's.
    if isinstance(leaf, bool | int | float | complex) and not isinstance(
        leaf, np.generic
    ):
        return ["number", [], type(leaf).__name__]
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and jnp.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    ):
        return ["key", list(leaf.shape), str(leaf.dtype)]
    arrays = jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic
    if isinstance(leaf, arrays) and (
        jnp.issubdtype(leaf.dtype, np.number) or jnp.issubdtype(leaf.dtype, np.bool_)
    ):
        return ["array", list(leaf.shape), np.dtype(leaf.dtype).name]
    raise CheckpointError(
        f"leaf {path} is {type(leaf).__name__} {leaf!r:.80}, which a checkpoint does "
        "not hold; give arrays, typed PRNG keys and numbers, the rest in settings"
    )


def _leaf(like: Any, spec: Spec, value: np.ndarray | None) -> Any:
    kind, shape, dtype = spec[:3]
    if kind == "number":
        assert value is not None
        return _NUMBERS[dtype](value.item())
    if value is None and kind == "key":  # it has no elements
        data = jax.eval_shape(jax.random.key_data, like)
        shape, dtype = data.shape, data.dtype
    array = np.zeros(shape, jnp.dtype(dtype)) if value is None else value
    if isinstance(like, np.ndarray):
        return np.require(array, requirements=["W", "C"])
    if isinstance(like, np.generic):
        return array[()]
    if kind == "key":
        return jax.random.wrap_key_data(jnp.asarray(array), impl=spec[3])
    return jax.device_put(array, getattr(like, "sharding", None))


def words(spec: Spec) -> str:
    """Describe a leaf: "float32[2, 3]", or "the number int"."""
    kind, shape, dtype = spec[:3]
    return f"the number {dtype}" if kind == "number" else f"{dtype}{shape}"
