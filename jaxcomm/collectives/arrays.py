"""Collectives of arrays: `all_gather`, `reduce_scatter`, `all_to_all`, `barrier`.

Axes are counted as in `jax.lax`, whose functions of these names they agree with. Each
takes a tree, whose leaves it treats alike in one schedule.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxcomm import compat
from jaxcomm.collectives.reductions import (
    all_reduce,
    flatten,
    leaf_specs,
    like_key,
    words_of,
)
from jaxcomm.errors import InvalidOptionError
from jaxcomm.planning import planner
from jaxcomm.ranks.communicator import Communicator
from jaxcomm.startup import world
from jaxcomm.tracing import layout
from jaxcomm.tracing.primitives import run_schedule
from jaxcomm.transports.base import MOVES

Tree = TypeVar("Tree")


def all_gather(
    tree: Tree, *, axis: int = 0, tiled: bool = False, comm: Communicator | None = None
) -> Tree:
    """Give every rank all ranks' arrays, in rank order.

    Args:
      tree: arrays of any dtype, typed PRNG keys included; structure, shapes and dtypes
        equal on all ranks.
      axis: where the ranks' arrays are stacked, counted in the result.
      tiled: whether they are concatenated along `axis` instead of stacked.
      comm: the ranks that take part; all by default.

    Returns:
      For leaves (d0, d1, ...): (ranks, d0, d1, ...), or (ranks * d0, d1, ...) if tiled
      (for `axis` 0). Its derivative is that of `lax.all_gather`.

    Raises:
      InvalidTreeError, InvalidOptionError, ScheduleMismatchError: as `all_reduce`.

    Example:
      >>> every = jaxcomm.all_gather(jnp.full(3, jaxcomm.rank()))
      >>> every.shape == (jaxcomm.size(), 3)
      True
      >>> every[0].tolist()
      [0, 0, 0]
    """
    return _move(
        "all_gather",
        tree,
        comm,
        before=lambda x, where, n: x,
        after=lambda y, x: layout.gathered(
            y, _axis("axis", axis, x.ndim + (not tiled)), tiled=tiled
        ),
        check=lambda x, where, n: _axis("axis", axis, x.ndim + (not tiled), where),
    )


def reduce_scatter(
    tree: Tree,
    *,
    op: str = "mean",
    axis: int = 0,
    tiled: bool = False,
    comm: Communicator | None = None,
) -> Tree:
    """Reduce arrays over all ranks; every rank gets its own part of the result.

    Args:
      tree: arrays of numbers; structure, shapes and dtypes equal on all ranks.
      op: "mean" or "sum"; a mean is that of `all_reduce`, rounded toward zero for
        integers.
      axis: the axis that is divided among the ranks.
      tiled: whether each rank keeps a slice of `axis` (whose length the number of
        ranks divides) or, if not, one element of it (whose length is that number).
      comm: the ranks that take part; all by default.

    Returns:
      For leaves (ranks, d1, ...): (d1, ...), or for (ranks * d0, d1, ...) if tiled:
      (d0, d1, ...) (for `axis` 0). A sum is that of `lax.psum_scatter`.

    Raises:
      UnsupportedDtypeError: a dtype that cannot be added up.
      InvalidTreeError, InvalidOptionError, ScheduleMismatchError: as `all_reduce`.

    Example:
      >>> parts = jnp.ones((jaxcomm.size(), 3))  # the r-th row is for rank r
      >>> jaxcomm.reduce_scatter(parts)
      Array([1., 1., 1.], dtype=float32)
    """
    if op not in ("mean", "sum"):
        raise InvalidOptionError(f"op={op!r}; reduce_scatter takes 'mean' or 'sum'")
    size = (comm or world()).size

    def before(x: Any, where: str, n: int) -> Any:
        at = _axis("axis", axis, x.ndim, where)
        return layout.to_scatter(x, at, n, tiled=tiled)

    def mean(y: Any, x: Any) -> Any:
        if op == "sum":
            return y
        if jnp.issubdtype(y.dtype, jnp.integer):
            # Rounded toward zero, as all_reduce does; 8 bits may not hold the size.
            wide = y.astype(jnp.promote_types(y.dtype, jnp.int32))
            return jax.lax.div(wide, jnp.full_like(wide, size)).astype(y.dtype)
        return y / jnp.asarray(size, y.dtype)

    return _move(
        "reduce_scatter",
        tree,
        comm,
        before=before,
        after=mean,
        check=lambda x, where, n: _check_split(x, axis, n, where, tiled),
        label=op,
    )


def all_to_all(
    tree: Tree,
    *,
    split_axis: int = 0,
    concat_axis: int = 0,
    tiled: bool = False,
    comm: Communicator | None = None,
) -> Tree:
    """Send the r-th part of every array to rank r, and put together what arrives.

    Args:
      tree: arrays of any dtype, typed PRNG keys included; structure, shapes and dtypes
        equal on all ranks.
      split_axis: the axis that is divided among the ranks: of their number, or if
        tiled of a multiple of it.
      concat_axis: where the parts are stacked, or if tiled concatenated, in rank order.
      tiled: whether axes stay and change their lengths, or are taken out and put in.
      comm: the ranks that take part; all by default.

    Returns:
      Arrays as `lax.all_to_all` gives: for leaves (ranks, d1, ...) the same shape,
      whose s-th element came from rank s (for both axes 0).

    Raises:
      InvalidTreeError, InvalidOptionError, ScheduleMismatchError: as `all_reduce`.

    Example:
      >>> sent = jnp.full(jaxcomm.size(), jaxcomm.rank())
      >>> jaxcomm.all_to_all(sent).tolist() == list(range(jaxcomm.size()))
      True
    """

    def before(x: Any, where: str, n: int) -> Any:
        at = _axis("split_axis", split_axis, x.ndim, where)
        return layout.to_exchange(x, at, n) if tiled else jnp.moveaxis(x, at, 0)

    def after(y: Any, x: Any) -> Any:
        at = _axis("concat_axis", concat_axis, x.ndim)
        return layout.exchanged(y, at) if tiled else jnp.moveaxis(y, 0, at)

    def check(x: Any, where: str, n: int) -> None:
        _check_split(x, split_axis, n, where, tiled)
        _axis("concat_axis", concat_axis, x.ndim, where)

    return _move("all_to_all", tree, comm, before=before, after=after, check=check)


def barrier(*, comm: Communicator | None = None) -> None:
    """Wait until every rank is here.

    Called while JAX traces, it becomes part of the program: it takes its place among
    the bare collectives of that program, in their order. Elsewhere it blocks.

    Args:
      comm: the ranks that take part; all by default.

    Raises:
      BrokenCommunicatorError: there was a StallError before.

    Example:
      >>> path = Path("table.txt")
      >>> if jaxcomm.rank() == 0:
      ...     _ = path.write_text("made once")
      >>> jaxcomm.barrier()  # now the file is there for all ranks of this host
      >>> path.read_text()
      'made once'
    """
    comm = comm or world()
    if compat.outside_trace():
        comm.barrier()
    else:
        all_reduce(jnp.zeros((), jnp.int8) + 0, op="max", comm=comm)


def _move(
    op: str,
    tree: Any,
    comm: Communicator | None,
    *,
    before: Callable[[Any, str, int], Any],
    after: Callable[[Any, Any], Any],
    check: Callable[[Any, str, int], Any],
    label: str = "",
) -> Any:
    comm = comm or world()
    paths, leaves, treedef = flatten(tree)
    for path, leaf in zip(paths, leaves, strict=True):
        moved = words_of(leaf) if op in MOVES else leaf
        comm.backend.check(op, str(moved.dtype), path)
        check(leaf, f"leaf {path}: ", comm.size)
    sent = [before(x, "", comm.size) for x in leaves]
    if op in MOVES:
        sent = [words_of(x) for x in sent]
    schedule = planner.make_schedule(
        leaf_specs(paths, sent),
        op=op,
        size=comm.size,
        terms=planner.Terms(label=label),
        costs=comm.costs,
    )
    out = run_schedule(sent, comm, schedule)
    shaped = [after(like_key(y, x), x) for y, x in zip(out, leaves, strict=True)]
    return jax.tree.unflatten(treedef, shaped)


def _axis(name: str, axis: int, ndim: int, where: str = "") -> int:
    try:
        number = operator.index(axis)
    except TypeError:
        raise InvalidOptionError(f"{name}={axis!r}; give an integer") from None
    if not -ndim <= number < ndim:
        raise InvalidOptionError(f"{where}{name}={axis} is not an axis of {ndim}")
    return number % ndim


def _check_split(x: Any, axis: int, ranks: int, where: str, tiled: bool) -> None:
    length = x.shape[_axis("axis", axis, x.ndim, where)]
    if tiled and length % ranks:
        raise InvalidOptionError(
            f"{where}axis {axis} of length {length} cannot be divided among {ranks} "
            "ranks; pad it to a multiple"
        )
    if not tiled and length != ranks:
        raise InvalidOptionError(
            f"{where}axis {axis} has length {length}, and there are {ranks} ranks; "
            "give each rank one element, or use tiled=True"
        )
