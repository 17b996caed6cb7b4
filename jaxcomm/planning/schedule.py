"""The static schedule: which leaves travel together, in which order.

The life of a bucket. A gradient pytree is flattened into leaves; each leaf is
described by a `LeafSpec` (path, shape, dtype and the position at which it becomes
ready). The planner puts leaves of one dtype and op into `Bucket`s and the buckets
into one total order: that is the `Schedule`. It is pure data, a pure function of
its inputs, and its JSON is the same byte for byte on every rank and in every run.
Before a schedule is first used, the ranks compare its `fingerprint` once
(`agreement`); from then on each bucket is one custom call inside the compiled
step, and no rank asks another anything.

Inside a bucket, a leaf larger than `pack_bytes` is reduced where it lies, in
segments. Smaller ones are copied into the communicator's staging buffer, reduced
together and copied back: packing costs a pass over memory, so only leaves whose
latency would cost more are packed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import html
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxcomm.errors import InvalidOptionError
from jaxcomm.planning.costs import CostModel

FORMAT = 4

# What adds up or compares; all else moves data as it is.
REDUCTIONS = ("mean", "sum", "min", "max", "prod")

# So many buckets from either end are shown where a schedule shows itself.
_ENDS = 10


@dataclasses.dataclass(frozen=True)
class LeafSpec:
    """One leaf of a tree.

    Attributes:
      path: where it is, as `jax.tree_util.keystr` writes it.
      shape: its shape.
      dtype: its dtype's name, such as "float32".
      order: its place in ready order: the smaller, the sooner it can be sent.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    order: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.count * item_bytes(self.dtype)


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Leaves that travel in one custom call.

    Attributes:
      op: "mean", "sum", "min", "max", "prod", "broadcast", "all_gather",
        "reduce_scatter" (of a sum), "all_to_all" or "permute". Gathered leaves gain a
        leading axis of the number of ranks, scattered ones lose theirs.
      dtype: the leaves' common dtype.
      leaves: indices into `Schedule.leaves`, in the order of the call's operands.
      pack_bytes: leaves of at most this many bytes share the staging buffer.
      label: the user's group, or "".
      stage: how many collectives must come before: buckets of one stage do not
        depend on each other.
      root: the sending rank of a broadcast; -1 otherwise.
      wire: the 16-bit dtype in which the leaves travel, or "" for their own.
      permutation: (source, target) ranks of a permutation.
      groups: the subgroups of ranks among which the collective takes place; empty for
        all ranks together.
      algorithm: "doubling" or "pairwise", between hosts whose ranks share memory; ""
        where the transport has one way only.
    """

    op: str
    dtype: str
    leaves: tuple[int, ...]
    pack_bytes: int
    label: str = ""
    stage: int = 0
    root: int = -1
    wire: str = ""
    permutation: tuple[tuple[int, int], ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    algorithm: str = ""

    @property
    def makes_equal(self) -> bool:
        """Whether all ranks get the same results, whatever they put in."""
        equal = self.op in (*REDUCTIONS, "broadcast", "all_gather")
        return equal and not self.groups


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The buckets of a tree or of a whole program, in their total order.

    `jaxcomm.plan` returns one, and so does `.schedule` of a decorated function.
    It shows itself as a table; `explain()` shows all of a long one.

    Attributes:
      leaves: every leaf that travels.
      buckets: in the order in which every rank calls them.
      size: number of ranks planned for.
      options: (name, value) pairs the plan was made with, sorted by name.

    Example:
      >>> tree = {"w": jax.ShapeDtypeStruct((256,), "float32")}
      >>> schedule = jaxcomm.plan(tree, wire_dtype="bfloat16")
      >>> schedule.nbytes, schedule.wire_nbytes
      (1024, 512)
      >>> [(leaf.path, leaf.shape) for leaf in schedule.leaves]
      [("['w']", (256,))]
      >>> jaxcomm.Schedule.from_json(schedule.to_json()) == schedule
      True
    """

    leaves: tuple[LeafSpec, ...]
    buckets: tuple[Bucket, ...]
    size: int
    options: tuple[tuple[str, str], ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves of all buckets, for one rank and one step."""
        return sum(self.bucket_nbytes(bucket) for bucket in self.buckets)

    @property
    def wire_nbytes(self) -> int:
        """Bytes that travel: as `nbytes`, in the dtypes of the wire."""
        return sum(
            self.bucket_nbytes(b) * item_bytes(b.wire or b.dtype) // item_bytes(b.dtype)
            for b in self.buckets
        )

    def bucket_nbytes(self, bucket: Bucket) -> int:
        """Bytes of one bucket's leaves."""
        return sum(self.leaves[i].nbytes for i in bucket.leaves)

    def bucket_seconds(self, bucket: Bucket, costs: CostModel) -> float:
        """Time that a cost model predicts for a bucket."""
        packed = set(bucket.leaves if bucket.wire else self.packed(bucket))
        small = sum(self.leaves[i].nbytes for i in packed)
        large = [self.leaves[i].nbytes for i in bucket.leaves if i not in packed]
        if not bucket.wire:
            return costs.bucket_seconds(large, small)
        half = item_bytes(bucket.wire) * small // item_bytes(bucket.dtype)
        return costs.bucket_seconds([half], 0) + small / costs.copy_bandwidth

    def packed(self, bucket: Bucket) -> tuple[int, ...]:
        """Those leaves of a bucket that share the staging buffer."""
        return tuple(
            i for i in bucket.leaves if self.leaves[i].nbytes <= bucket.pack_bytes
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the JSON, in hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def __hash__(self) -> int:
        return int(self.fingerprint[:15], 16)

    def to_json(self) -> str:
        """Return canonical JSON: sorted keys, no white space, one spelling."""
        tree = {
            "format": FORMAT,
            "size": self.size,
            "options": dict(self.options),
            "leaves": [[x.path, list(x.shape), x.dtype, x.order] for x in self.leaves],
            "buckets": [
                [
                    b.op,
                    b.dtype,
                    list(b.leaves),
                    b.pack_bytes,
                    b.label,
                    b.stage,
                    b.root,
                    b.wire,
                    b.permutation,
                    b.groups,
                    b.algorithm,
                ]
                for b in self.buckets
            ],
        }
        return json.dumps(tree, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Read what `to_json` wrote.

        Raises:
          InvalidOptionError: the text is not a schedule of this format.
        """
        try:
            tree = json.loads(text)
            if tree["format"] != FORMAT:
                raise InvalidOptionError(
                    f"schedule format {tree['format']}, expected {FORMAT}; "
                    "write it again with this version of jaxcomm"
                )
            leaves = tuple(
                LeafSpec(str(path), tuple(map(int, shape)), str(dtype), int(order))
                for path, shape, dtype, order in tree["leaves"]
            )
            buckets = tuple(
                Bucket(
                    str(op),
                    str(dtype),
                    tuple(map(int, ix)),
                    int(pack),
                    str(label),
                    int(stage),
                    int(root),
                    str(wire),
                    _pairs(permutation),
                    _pairs(groups),
                    str(algorithm),
                )
                for (
                    op,
                    dtype,
                    ix,
                    pack,
                    label,
                    stage,
                    root,
                    wire,
                    permutation,
                    groups,
                    algorithm,
                ) in tree["buckets"]
            )
            if any(not 0 <= i < len(leaves) for b in buckets for i in b.leaves):
                raise ValueError("a bucket names a leaf that does not exist")
            options = tuple(sorted(tree["options"].items()))
            return cls(leaves, buckets, int(tree["size"]), options)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, InvalidOptionError):
                raise
            raise InvalidOptionError(f"not a jaxcomm schedule: {error}") from error

    def explain(self, costs: CostModel | None = None) -> str:
        """Return the schedule as a table for people: one line a bucket.

        At the prompt and in notebooks a schedule shows itself so, a long one in part.

        Args:
          costs: a model whose predicted time is shown for every bucket.
        """
        rows = self._rows(range(len(self.buckets)), costs)
        return "\n".join([self._title, *_aligned([self._head(costs), *rows])])

    def __repr__(self) -> str:
        first, last = self._shown()
        try:
            rows = [*self._rows(first), *self._rows(last)]
            lines = [self._title, *_aligned([self._head(), *rows])]
        except (IndexError, TypeError):
            # Also debuggers and failing tests show one, of leaves that do not exist.
            return f"<schedule of {self.leaves!r} in {self.buckets!r}>"
        if left_out := self._left_out():
            lines.insert(2 + len(first), f"({left_out})")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return the same for notebooks."""
        first, last = self._shown()
        head = "".join(f"<th>{name}</th>" for name in self._head())
        parts = [*map(_html_row, self._rows(first))]
        if left_out := self._left_out():
            parts.append(f'<tr><td colspan="{len(self._head())}">{left_out}</td></tr>')
        parts += map(_html_row, self._rows(last))
        return (
            f"<table><caption>{self._title}</caption>"
            f"<thead><tr>{head}</tr></thead><tbody>{''.join(parts)}</tbody></table>"
        )

    @property
    def _title(self) -> str:
        return (
            f"schedule {self.fingerprint[:12]}: {len(self.leaves)} leaves, "
            f"{self.nbytes:,} bytes, {len(self.buckets)} buckets, {self.size} ranks"
        )

    def _shown(self) -> tuple[range, range]:
        """Which buckets a repr shows: the first of them, and the last."""
        count = len(self.buckets)
        if count <= 2 * _ENDS + 1:
            return range(count), range(0)
        return range(_ENDS), range(count - _ENDS, count)

    def _left_out(self) -> str:
        first, last = self._shown()
        count = len(self.buckets) - len(first) - len(last)
        return f"{count} buckets left out; explain() shows all" if count else ""

    def _rows(
        self, shown: Iterable[int], costs: CostModel | None = None
    ) -> Iterator[tuple[str, ...]]:
        for k in shown:
            bucket = self.buckets[k]
            first = self.leaves[bucket.leaves[0]].path if bucket.leaves else ""
            more = len(bucket.leaves) - 1
            what = bucket.label or first + (f" +{more} more" if more > 0 else "")
            seconds = [self.bucket_seconds(bucket, costs)] if costs else []
            yield (
                str(k),
                str(bucket.stage),
                bucket.op,
                f"{bucket.dtype}>{bucket.wire}" if bucket.wire else bucket.dtype,
                str(len(bucket.leaves)),
                str(len(self.packed(bucket))),
                f"{self.bucket_nbytes(bucket) / 1024:.1f}",
                *(f"{1e6 * x:.0f}" for x in seconds),
                *([bucket.algorithm or "-"] if self._between_hosts else []),
                what,
            )

    @property
    def _between_hosts(self) -> bool:
        return any(bucket.algorithm for bucket in self.buckets)

    def _head(self, costs: CostModel | None = None) -> tuple[str, ...]:
        names = ("bucket", "stage", "op", "dtype", "leaves", "packed", "KiB")
        hosts = ["algorithm"] if self._between_hosts else []
        return (*names, *(["us"] if costs else []), *hosts, "what")

    def summary(self) -> str:
        """Return one line: how many leaves, from which on."""
        first = f", first leaf {_show(self.leaves[0])}" if self.leaves else ""
        return f"{len(self.leaves)} leaves, {len(self.buckets)} buckets{first}"

    def diff(self, other: Schedule) -> str:
        """Say in one line where `other` first differs from this schedule, or ""."""
        if self.size != other.size:
            return f"planned for {self.size} ranks against {other.size}"
        mine = {leaf.path: leaf for leaf in self.leaves}
        theirs = {leaf.path: leaf for leaf in other.leaves}
        for path in [*mine, *theirs]:
            if path not in theirs:
                return f"leaf {_show(mine[path])} only here"
            if path not in mine:
                return f"leaf {_show(theirs[path])} only there"
            if _show(mine[path]) != _show(theirs[path]):
                return f"leaf {_show(mine[path])} against {_show(theirs[path])}"
        for a, b in zip(self.leaves, other.leaves, strict=False):
            if a.path != b.path:
                return f"leaf {a.path} where the other has {b.path}: another order"
            if a.order != b.order:
                return f"leaf {a.path} is ready at place {a.order} against {b.order}"
        for k, (p, q) in enumerate(zip(self.buckets, other.buckets, strict=False)):
            for field in dataclasses.fields(Bucket):
                here, there = getattr(p, field.name), getattr(q, field.name)
                if here != there:
                    where = self.leaves[p.leaves[0]].path if p.leaves else "(empty)"
                    return (
                        f"bucket {k} (first leaf {where}): "
                        f"{field.name} {here} against {there}"
                    )
        if len(self.buckets) != len(other.buckets):
            return f"{len(self.buckets)} buckets against {len(other.buckets)}"
        if self.options != other.options:
            return f"options {dict(self.options)} against {dict(other.options)}"
        return ""


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    return [
        "  ".join([*(f"{x:>{w}}" for x, w in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    ]


def _html_row(row: tuple[str, ...]) -> str:
    return f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"


def _pairs(rows: list[list[int]]) -> tuple[Any, ...]:
    return tuple(tuple(map(int, row)) for row in rows)


def _show(leaf: LeafSpec) -> str:
    return f"{leaf.path} {leaf.dtype}{list(leaf.shape)}"


# NumPy knows these names only where JAX has been imported: ml_dtypes registers them.
_ITEM_BYTES = {
    "bfloat16": 2,
    **dict.fromkeys(
        (
            "int2",
            "int4",
            "uint2",
            "uint4",
            "float4_e2m1fn",
            "float6_e2m3fn",
            "float6_e3m2fn",
            "float8_e3m4",
            "float8_e4m3",
            "float8_e4m3b11fnuz",
            "float8_e4m3fn",
            "float8_e4m3fnuz",
            "float8_e5m2",
            "float8_e5m2fnuz",
            "float8_e8m0fnu",
        ),
        1,
    ),
}


@functools.cache
def item_bytes(dtype: str) -> int:
    """Size in bytes of one element.

    Raises:
      TypeError: the name is no dtype's.
    """
    return _ITEM_BYTES.get(dtype) or np.dtype(dtype).itemsize


def leaf_bytes(leaf: Any) -> int:
    """Size in bytes of an array or ShapeDtypeStruct."""
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
