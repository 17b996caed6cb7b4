"""Arguments of a step that should be the same on all ranks, and whether they are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm import settings
from jaxcomm.collectives.replication import Described, describe, difference, is_key
from jaxcomm.errors import ReplicationError
from jaxcomm.ranks.communicator import Communicator
from jaxcomm.tracing.reading import Reader

log = logging.getLogger(__name__)


class Check:
    """Compares a function's arguments across ranks, in every so many calls."""

    def __init__(self, given: bool | int | None):
        # After how many calls arguments are compared again; 0 for never.
        self._every = settings.check_replicas(given)
        self._calls = 0
        # Of the last trace: the paths of arguments that should be equal, of batches,
        # and of keys that ranks should not share.
        self._equal: frozenset[str] = frozenset()
        self._batches: frozenset[str] = frozenset()
        self._keys: frozenset[str] = frozenset()

    def before(self, comm: Communicator, arguments: Any) -> dict[str, Described] | None:
        """Describe the arguments if this call is to be checked; they may be donated."""
        if not self._every or comm.size == 1:
            return None
        number, self._calls = self._calls, self._calls + 1
        if number % self._every:
            return None
        paths = jax.tree_util.tree_leaves_with_path(arguments)
        return {
            jax.tree_util.keystr(path[1:]): describe(leaf)
            for path, leaf in paths
            if hasattr(leaf, "dtype") or isinstance(leaf, int | float | complex)
        }

    def traced(
        self,
        closed: Any,
        inputs: Sequence[tuple[str, Any]],
        equal: Callable[[Reader], frozenset[int]],
        reader: Reader,
    ) -> None:
        """Find out what should be equal, when the function has been traced."""
        if not self._every:
            return
        keys = {path for path, leaf in inputs if _may_be_key(leaf)}
        found = {inputs[k][0] for k in equal(reader)}
        self._equal = frozenset(found - keys)
        self._batches = frozenset(
            path
            for path, leaf in inputs
            if path not in found | keys and np.ndim(leaf) > 0
        )
        # Where the function asks for its rank, it may well make keys of its own of it.
        asks = any(map(reader.asks_rank, closed.jaxpr.eqns))
        self._keys = frozenset() if asks else frozenset(keys - found)

    def compare(
        self, comm: Communicator, before: dict[str, Described], name: str
    ) -> None:
        """Compare; all ranks come here in the same call."""
        every: list[Mapping[str, Described]] = comm.all_gather_object(before)
        chosen = [{p: d for p, d in one.items() if p in self._equal} for one in every]
        if found := difference(chosen, f"{name}: argument"):
            raise ReplicationError(
                f"{found}. The function gives it back equal on all ranks if it is "
                "given it equal, so ranks that began with different values go on with "
                "different ones for ever. Send rank 0's with jaxcomm.broadcast before "
                "the first step."
            )
        for paths, what, why in (
            (self._batches, "batch", "each rank should be given its own part of it"),
            (
                self._keys,
                "PRNG key",
                "all draw the same dropout masks and noise; fold jaxcomm.rank() in",
            ),
        ):
            same = [p for p in sorted(paths) if len({one.get(p) for one in every}) == 1]
            # Of batches all: masks and lengths are often equal.
            if same and comm.rank == 0 and (what != "batch" or len(same) == len(paths)):
                log.warning(
                    "%s: all ranks were given the same %s (argument %s): %s",
                    name,
                    what,
                    ", ".join(same),
                    why,
                )


def carried(
    arguments: Any, numbers: Sequence[int], shapes: Any, *, arrays: bool
) -> dict[int, int]:
    """Match arguments with the results that the next call is given for them.

    An argument is carried where the function gives back an array of the same shape and
    dtype at the same place of its structure.

    Args:
      arguments: (args, kwargs).
      numbers: which of their leaves are meant.
      shapes: of the results.
      arrays: whether a first argument that is an array by itself may be one; else it
        must be part of a structure, or a counter.

    Returns:
      For the number of an argument among `numbers`, the number of the result.
    """
    results: dict[Any, list[tuple[int, str | None]]] = {}
    for number, (keys, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(shapes)):
        path, kind = tuple(map(str, keys)), (leaf.shape, leaf.dtype)
        # The whole result is the state, or an element of it is.
        results.setdefault((path, kind), []).append((number, None))
        if path:
            results.setdefault((path[1:], kind), []).append((number, path[0]))
    found: dict[int, int] = {}
    leaves = jax.tree_util.tree_leaves_with_path(arguments)
    for k, number in enumerate(numbers):
        keys, leaf = leaves[number]
        place, *rest = map(str, keys[1:])
        matches = results.get((tuple(rest), (leaf.shape, leaf.dtype)), [])
        if not rest:
            # An array by itself: only the first argument, or a counter, and only at
            # the same position.
            first = place == str(jax.tree_util.SequenceKey(0))
            counter = not leaf.shape and jnp.issubdtype(leaf.dtype, jnp.integer)
            if not counter and not (first and arrays):
                continue
            matches = [m for m in matches if m[1] == place or (first and m[1] is None)]
        best = sorted(matches, key=lambda m: m[1] != place)
        if best:
            found[k] = best[0][0]
    return found


def _may_be_key(leaf: Any) -> bool:
    return is_key(leaf) or (leaf.dtype == np.uint32 and np.shape(leaf)[-1:] == (2,))
