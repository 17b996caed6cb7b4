"""Host-side check that ranks hold the same values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm.collectives import reductions
from jaxcomm.errors import ReplicationError
from jaxcomm.ranks.communicator import Communicator
from jaxcomm.startup import world

Described = tuple[str, str]


def assert_replicated(tree: Any, *, comm: Communicator | None = None) -> None:
    """Check that every leaf is bitwise equal on all ranks.

    Host side: all ranks call it together; it waits for the tree's values.

    Args:
      tree: arrays; PRNG keys too.
      comm: the ranks that take part; all by default.

    Raises:
      ReplicationError: on every rank, naming the first leaf that differs, the ranks,
        and how many leaves differ in all. It is an AssertionError too.
      InvalidTreeError: a leaf is not an array.

    Example:
      >>> params = jaxcomm.broadcast({"w": jnp.arange(3.0) + jaxcomm.rank()})
      >>> jaxcomm.assert_replicated(params)
    """
    comm = comm or world()
    paths, leaves, _ = reductions.flatten(tree)
    mine = {path: describe(leaf) for path, leaf in zip(paths, leaves, strict=True)}
    if found := difference(comm.all_gather_object(mine), "leaf"):
        raise ReplicationError(
            f"{found}. Send one rank's values with jaxcomm.broadcast, and reduce "
            "gradients and batch statistics before they are used."
        )


def difference(every: Sequence[Mapping[str, Described]], what: str) -> str:
    """Say which leaf first differs between ranks, and how; "" where none does.

    Args:
      every: for each rank its leaves, by their paths.
      what: they are called.
    """
    names = list(dict.fromkeys(path for one in every for path in one))
    different = [p for p in names if len({one.get(p) for one in every}) > 1]
    if not different:
        return ""
    path = different[0]
    groups: dict[Any, list[int]] = {}
    for rank, one in enumerate(every):
        groups.setdefault(one.get(path), []).append(rank)
    shown = "; ".join(
        f"ranks {ranks}: " + (f"{key[0]} {key[1][:8]}" if key else "no such leaf")
        for key, ranks in groups.items()
    )
    return (
        f"{what} {path} is not the same on all ranks ({shown}); {len(different)} of "
        f"{len(names)} leaves differ"
    )


def describe(leaf: Any) -> Described:
    """Return dtype and shape, and a digest of the values; waits for them."""
    if is_key(leaf):
        leaf = jax.random.key_data(leaf)
    values = np.ascontiguousarray(np.asarray(leaf))
    digest = hashlib.sha256(values.tobytes()).hexdigest()
    return f"{values.dtype}{list(values.shape)}", digest


def is_key(leaf: Any) -> bool:
    """Tell whether a leaf is typed PRNG keys."""
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
