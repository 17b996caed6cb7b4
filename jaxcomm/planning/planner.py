"""Leaves in, schedule out: pure functions that import neither JAX nor a transport."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeAlias

from jaxcomm.errors import InvalidOptionError
from jaxcomm.planning import costs as costmodel
from jaxcomm.planning.costs import CostModel
from jaxcomm.planning.schedule import REDUCTIONS, Bucket, LeafSpec, Schedule, item_bytes


@dataclasses.dataclass(frozen=True)
class Terms:
    """What a collective is besides its op: see `schedule.Bucket`."""

    label: str = ""
    root: int = -1
    permutation: tuple[tuple[int, int], ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()


Groups: TypeAlias = int | Callable[[str], Hashable] | Sequence[str] | None

OPS = REDUCTIONS
_CACHE_SIZE = 4096
_MAX_CALLS = 1024  # a program has few trees, and each is traced few times
_by_call: dict[Hashable, Schedule] = {}


def make_schedule(
    leaves: tuple[LeafSpec, ...],
    *,
    op: str | tuple[str, ...],
    size: int,
    stages: tuple[int, ...] | None = None,
    urgent: tuple[bool, ...] | None = None,
    groups: Groups = None,
    bucket_bytes: int | None = None,
    terms: Terms | tuple[Terms, ...] = Terms(),
    wire_dtype: str | None = None,
    costs: CostModel = costmodel.DEFAULT,
    hosts: int = 1,
) -> Schedule:
    """Plan a tree, or all reductions of a program.

    Args:
      leaves: the leaves with their ready order.
      op: one of `schedule.Bucket.op`, or one per leaf.
      size: number of ranks.
      stages: for each leaf, how many collectives it depends on; leaves of different
        stages never share a bucket if either is urgent. None: the leaves do not depend
        on each other.
      urgent: for each leaf, whether another collective waits for it; None: all are.
      groups: None, a number of buckets per dtype, a function from leaf path to
        label, or regular expressions (a leaf belongs to the first that matches).
      bucket_bytes: fill buckets up to this size; None asks the cost model.
      terms: what else there is to say of the collective; or one per leaf.
      wire_dtype: "bfloat16" or "float16": what float32 leaves travel as.
      costs: decides what is packed, how large buckets are and how they move between
        hosts.
      hosts: between how many hosts buckets move whose ranks share memory; 1 where the
        transport has one way only.

    Returns:
      The schedule; equal inputs give the same object from a cache.

    Raises:
      InvalidOptionError: an option cannot be used; names it and the leaf.
    """
    check_options(groups=groups, bucket_bytes=bucket_bytes)
    labels = None
    if groups is not None and not isinstance(groups, int):
        labels = tuple(label_of(leaf.path, groups) for leaf in leaves)
    count = groups if isinstance(groups, int) else None
    wire = _wire_dtype(wire_dtype, leaves)
    return _plan(
        leaves,
        op,
        size,
        stages,
        urgent,
        labels,
        count,
        bucket_bytes,
        terms,
        wire,
        costs,
        hosts,
    )


class CacheInfo(NamedTuple):
    """How a cache was used: as `functools.lru_cache` says."""

    hits: int
    misses: int
    maxsize: int | None
    currsize: int


def cache_info() -> CacheInfo:
    """Return hits, misses, maximum and current size of the schedule cache.

    An `all_reduce` of a tree like one before finds its schedule without this cache and
    is not counted.

    Returns:
      A named tuple (hits, misses, maxsize, currsize), as of `functools.lru_cache`.

    Example:
      >>> jaxcomm.cache_clear()
      >>> tree = {"w": jax.ShapeDtypeStruct((3,), "float32")}
      >>> jaxcomm.plan(tree) is jaxcomm.plan(tree)
      True
      >>> info = jaxcomm.cache_info()
      >>> info.hits, info.misses
      (1, 1)
    """
    return CacheInfo(*_plan.cache_info())


def cache_clear() -> None:
    """Forget all cached schedules.

    Equal calls plan equal schedules again. Compiled functions keep theirs.
    """
    _plan.cache_clear()
    _by_call.clear()


def find(call: Hashable) -> Schedule | None:
    """Return what was kept for a call, or None."""
    return _by_call.get(call)


def keep(call: Hashable, schedule: Schedule) -> None:
    """Keep the schedule of a call, so that an equal one need not describe its leaves.

    Args:
      call: everything that the plan depends on.
      schedule: the plan.
    """
    if len(_by_call) >= _MAX_CALLS:
        _by_call.clear()
    _by_call[call] = schedule


def check_options(
    *,
    groups: Groups = None,
    bucket_bytes: int | None = None,
    op: str = "sum",
) -> None:
    """Raise InvalidOptionError for a value that no plan can be made with."""
    if op not in OPS:
        raise InvalidOptionError(f"op={op!r}; use one of {', '.join(OPS)}")
    if bucket_bytes is not None and (
        isinstance(bucket_bytes, bool)
        # Users' code is not checked.
        or not isinstance(bucket_bytes, int)  # pyright: ignore[reportUnnecessaryIsInstance]
        or bucket_bytes <= 0
    ):
        raise InvalidOptionError(
            f"bucket_bytes={bucket_bytes!r}; give a positive number of bytes, or None "
            "to let the planner decide"
        )
    if groups is None or callable(groups):
        return
    if isinstance(groups, int) and not isinstance(groups, bool):
        if groups <= 0:
            raise InvalidOptionError(f"groups={groups}; give at least one group")
        return
    if isinstance(groups, Sequence) and not isinstance(groups, str):
        for pattern in groups:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise InvalidOptionError(
                    f"groups: {pattern!r} is not a regular expression: {error}"
                ) from error
        return
    raise InvalidOptionError(
        f"groups={groups!r}; use None, an int, a function from leaf path to label, or "
        "a list of regular expressions"
    )


def label_of(
    path: str, groups: Callable[[str], Hashable] | Sequence[str]
) -> str | None:
    """The user's group of one leaf; None leaves it to the planner."""
    if not callable(groups):
        return next((p for p in groups if re.search(p, path)), None)
    try:
        label = groups(path)
        hash(label)
    except Exception as error:
        raise InvalidOptionError(
            f"groups: the function failed on leaf {path}: "
            f"{type(error).__name__}: {error}; it must return a hashable label or None"
        ) from error
    return None if label is None else str(label)


WIRE_DTYPES = ("bfloat16", "float16")


def _wire_dtype(wire_dtype: str | None, leaves: Sequence[LeafSpec]) -> str:
    """Return what float32 leaves travel as, or ""; refuse what would lose or gain bits.

    Integers, booleans and complex numbers travel as they are.
    """
    if wire_dtype is None:
        return ""
    name = wire_name(wire_dtype)
    for leaf in leaves:
        inexact = leaf.dtype.startswith(("float", "bfloat"))
        if not inexact or leaf.dtype in ("float32", name):
            continue
        if leaf.dtype == "float64":
            why = "only float32 leaves are sent in 16 bits; cast it to float32 first"
        else:
            why = "it is no narrower than the leaf; leave it out for this tree"
        raise InvalidOptionError(
            f"wire_dtype={name!r}: leaf {leaf.path} has dtype {leaf.dtype}, and {why}"
        )
    return name if name in WIRE_DTYPES else _wider(name, leaves)


def _wider(name: str, leaves: Sequence[LeafSpec]) -> str:
    where = ""
    for leaf in leaves:
        if item_bytes(name) >= item_bytes(leaf.dtype):
            where = f"; it is no narrower than leaf {leaf.path} ({leaf.dtype})"
            break
    raise InvalidOptionError(
        f"wire_dtype={name!r}{where}: use one of {', '.join(WIRE_DTYPES)}, or None"
    )


def check_wire_dtype(wire_dtype: object) -> None:
    """Raise InvalidOptionError unless leaves can travel as a dtype."""
    name = wire_name(wire_dtype)
    if name not in WIRE_DTYPES:
        _wider(name, ())


def wire_name(wire_dtype: object) -> str:
    """Return the name of a wire dtype given as text, dtype or scalar type.

    Raises:
      InvalidOptionError: it names no dtype.
    """
    name = wire_dtype if isinstance(wire_dtype, str) else None
    if name is None:
        name = getattr(wire_dtype, "__name__", None) or str(wire_dtype)
    try:
        item_bytes(name)
    except (TypeError, ValueError):
        raise InvalidOptionError(
            f"wire_dtype={wire_dtype!r}: use one of {', '.join(WIRE_DTYPES)}, or None"
        ) from None
    return name


@functools.lru_cache(maxsize=_CACHE_SIZE)
def _plan(
    leaves: tuple[LeafSpec, ...],
    op: str | tuple[str, ...],
    size: int,
    stages: tuple[int, ...] | None,
    urgent: tuple[bool, ...] | None,
    labels: tuple[str | None, ...] | None,
    count: int | None,
    bucket_bytes: int | None,
    terms: Terms | tuple[Terms, ...],
    wire: str,
    costs: CostModel,
    hosts: int,
) -> Schedule:
    ops = (op,) * len(leaves) if isinstance(op, str) else op
    each = (terms,) * len(leaves) if isinstance(terms, Terms) else terms
    stages = stages or (0,) * len(leaves)
    urgent = urgent or (True,) * len(leaves)
    ready = sorted(range(len(leaves)), key=lambda i: (leaves[i].order, i))
    # Only leaves of one kind may share a bucket.
    kinds: dict[tuple[int | None, str, str, Terms], list[int]] = {}
    for i in ready:
        kind = (stages[i] if urgent[i] else None, ops[i], leaves[i].dtype, each[i])
        kinds.setdefault(kind, []).append(i)

    pack = costs.pack_bytes
    buckets: list[Bucket] = []
    for (_, kind_op, dtype, term), members in kinds.items():
        encoded = wire if dtype == "float32" and kind_op in REDUCTIONS else ""
        rest = (term.root, encoded, term.permutation, term.groups)
        for label, part in _split(leaves, members, labels, count, bucket_bytes, costs):
            name = label or term.label
            stage = max(stages[i] for i in part)
            algorithm = ""
            if hosts > 1 and kind_op in REDUCTIONS:
                nbytes = sum(leaves[i].count for i in part) * item_bytes(
                    encoded or dtype
                )
                algorithm = costs.algorithm(nbytes, hosts)
            buckets.append(
                Bucket(kind_op, dtype, tuple(part), pack, name, stage, *rest, algorithm)
            )
    # A bucket can go when its last leaf is ready.
    buckets.sort(
        key=lambda b: (b.stage, max(leaves[i].order for i in b.leaves), b.leaves)
    )
    options = {
        "bucket_bytes": str(bucket_bytes),
        "costs": costs.source,
        "groups": "by label" if labels is not None else str(count),
        "wire_dtype": wire or "None",
    }
    return Schedule(leaves, tuple(buckets), size, tuple(sorted(options.items())))


def _split(
    leaves: tuple[LeafSpec, ...],
    members: list[int],
    labels: tuple[str | None, ...] | None,
    count: int | None,
    bucket_bytes: int | None,
    costs: CostModel,
) -> list[tuple[str, list[int]]]:
    """Divide members (one kind, in ready order) into labelled buckets."""
    if count is not None:
        count = min(count, len(members))
        parts: dict[str, list[int]] = {}
        for k, i in enumerate(members):
            parts.setdefault(f"group {k * count // len(members)}", []).append(i)
        return list(parts.items())
    named: dict[str, list[int]] = {}
    rest: list[int] = []
    for i in members:
        label = labels[i] if labels is not None else None
        if label is None:
            rest.append(i)
        else:
            named.setdefault(label, []).append(i)
    filled = _fill(leaves, rest, bucket_bytes, costs)
    return [*named.items(), *(("", part) for part in filled)]


def _fill(
    leaves: tuple[LeafSpec, ...],
    members: list[int],
    bucket_bytes: int | None,
    costs: CostModel,
) -> list[list[int]]:
    """Fill buckets in ready order; the planner keeps the first one small.

    A small first bucket lets communication start early, unless it is so small that
    latency takes most of its time. A leaf larger than the limit travels alone or closes
    its bucket: leaves are never split.
    """
    total = sum(leaves[i].nbytes for i in members)
    limit = bucket_bytes or costs.bucket_bytes_of(total)
    alone = bucket_bytes or total <= limit
    room = limit if alone else max(limit // 8, costs.latency_bytes)
    parts: list[list[int]] = []
    used = 0
    for i in members:
        nbytes = leaves[i].nbytes
        if not parts or used + nbytes > room:
            room = limit if parts else room
            parts.append([])
            used = 0
        parts[-1].append(i)
        used += nbytes
    return parts
