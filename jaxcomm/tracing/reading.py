"""What a jaxpr says: which equations are collectives, and what each of them means.

A `Reader` knows the axis and the communicator of one decorated function. It tells the
kinds of equations apart, refuses what cannot be scheduled, and says what a named-axis
collective is to a schedule. What it reads, `rewrite` plans; nothing is evaluated here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm import compat
from jaxcomm.errors import InvalidOptionError, UnsupportedCollectiveError
from jaxcomm.planning.planner import Terms
from jaxcomm.ranks.communicator import Communicator
from jaxcomm.tracing import layout
from jaxcomm.tracing.primitives import BoundBucket, bucket_p, rank_p
from jaxcomm.transports.base import MOVES

_SUMS = {
    "psum": ("sum", jnp.sum),
    "pmax": ("max", jnp.max),
    "pmin": ("min", jnp.min),
}
# axis_index is none, but is answered here as well.
COLLECTIVES = (
    *_SUMS,
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "ppermute",
    "pbroadcast",
)
# Their results are the same on all ranks, whatever the ranks put in.
EQUAL_RESULTS = (*_SUMS, "all_gather", "pbroadcast")
_WITH_BODIES = {compat.SCAN, compat.WHILE, compat.COND, *compat.CHECKPOINTS}


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads the equations of one decorated function.

    Attributes:
      axis_name: the axis of the ranks.
      comm: the ranks that take part.
    """

    axis_name: str
    comm: Communicator

    def read(self, closed: Any) -> tuple[list[Equation], list[Any]]:
        """Read one jaxpr, open or closed, but not the bodies of its loops.

        Returns:
          Its equations, those of called bodies that communicate in place of the calls,
          and the variables that it returns.
        """
        jaxpr = getattr(closed, "jaxpr", closed)
        read, names = _flatten(jaxpr, self.has_collective)
        returned = [names.get(v, v) if compat.is_var(v) else v for v in jaxpr.outvars]
        for equation in read:
            eqn = equation.eqn
            equation.kind = kind = self.kind(eqn)
            equation.own = self._is_own_call(kind, eqn)
            equation.placed = kind in (None, "body") and compat.keeps_its_place(eqn)
            if kind == "collective":
                equation.meaning = meaning_of(eqn, self.comm.size)
        self._find_means(read, returned)
        _find_awaited(read)
        return read, returned

    def kind(self, eqn: Any) -> str | None:
        """Say what an equation is: see `Unit.kind`; "collective" and "rank" besides.

        None is an equation that has nothing to do with ranks.

        Raises:
          UnsupportedCollectiveError: it communicates, and cannot be scheduled.
        """
        name = eqn.primitive.name
        if eqn.primitive is bucket_p:
            return "bucket" if self._is_own(eqn) else "foreign"
        if self.uses_axis(eqn):
            if name == compat.AXIS_INDEX:
                return "rank"
            if name in COLLECTIVES:
                self._check(eqn)
                return "collective"
            raise self._unsupported(eqn, "is not scheduled")
        if self.has_collective(eqn):
            if name in _WITH_BODIES:
                return "body"
            raise self._unsupported(eqn, "contains a collective and is not supported")
        return None

    def _is_own(self, eqn: Any) -> bool:
        """Tell whether a jaxcomm collective is one of this function's communicator."""
        return BoundBucket(**eqn.params).comm == self.comm

    def _is_own_call(self, kind: str | None, eqn: Any) -> bool:
        return kind in ("bucket", "collective") or (
            kind == "body" and any(map(self._has_own, compat.inner_eqns(eqn)))
        )

    def _has_own(self, eqn: Any) -> bool:
        if eqn.primitive is bucket_p:
            return self._is_own(eqn)
        return self.uses_axis(eqn) or any(map(self._has_own, compat.inner_eqns(eqn)))

    def uses_axis(self, eqn: Any) -> bool:
        return self.axis_name in compat.axes(eqn)

    def has_collective(self, eqn: Any) -> bool:
        if eqn.primitive is bucket_p or self.uses_axis(eqn):
            return True
        return any(map(self.has_collective, compat.inner_eqns(eqn)))

    def asks_rank(self, eqn: Any) -> bool:
        """Tell whether an equation, or one inside it, gives this rank's number."""
        if eqn.primitive is rank_p:
            return True
        if self.uses_axis(eqn) and eqn.primitive.name == compat.AXIS_INDEX:
            return True
        return any(map(self.asks_rank, compat.inner_eqns(eqn)))

    def _check(self, eqn: Any) -> None:
        names = [a for a in compat.axes(eqn) if not isinstance(a, int)]
        if names != [self.axis_name]:
            raise self._unsupported(eqn, f"over axes {names} at once is not scheduled")
        if groups := compat.axis_groups(eqn):
            ranks = sorted(rank for group in groups for rank in group)
            if ranks != list(range(self.comm.size)):
                shown = list(map(list, groups))
                raise self._unsupported(
                    eqn, f"has axis_index_groups {shown}, which do not divide the ranks"
                )
        if eqn.primitive.name == "ppermute":
            self._check_pairs(eqn)
        op = meaning_of(eqn, self.comm.size).op
        where = f"({compat.source_line(eqn)})"
        for var in eqn.invars:
            if op in MOVES and jnp.issubdtype(var.aval.dtype, jax.dtypes.prng_key):
                continue  # its words travel
            self.comm.backend.check(op, str(var.aval.dtype), where)

    def _check_pairs(self, eqn: Any) -> None:
        """Refuse pairs that are no partial permutation: no rank would know of it."""
        size, sources, targets = self.comm.size, set(), set()
        for source, target in compat.permutation(eqn):
            if not (0 <= source < size and 0 <= target < size):
                why = f"ranks go from 0 to {size - 1}"
            elif source in sources:
                why = f"rank {source} sends to two ranks"
            elif target in targets:
                why = f"rank {target} receives from two ranks"
            else:
                sources.add(source)
                targets.add(target)
                continue
            raise InvalidOptionError(
                f"ppermute over axis {self.axis_name!r} at "
                f"{compat.source_line(eqn) or 'an unknown line'}: in the pair "
                f"({source}, {target}) of (source, target), {why}. Each rank may be "
                "the source of one pair and the target of one."
            )

    def branches_communicate(self, jaxpr: Any) -> bool:
        """Tell whether a collective lies inside a cond or while_loop."""
        return any(
            (
                eqn.primitive.name in (compat.COND, compat.WHILE)
                and self.communicates(eqn)
            )
            or any(map(self.branches_communicate, compat.sub_jaxprs(eqn)))
            for eqn in jaxpr.eqns
        )

    def communicates(self, eqn: Any) -> bool:
        """As `has_collective`, but axis_index, which sends nothing, is none."""
        if eqn.primitive is bucket_p:
            return True
        if self.uses_axis(eqn):
            return eqn.primitive.name != compat.AXIS_INDEX
        return any(map(self.communicates, compat.inner_eqns(eqn)))

    def _find_means(self, read: Sequence[Equation], returned: Sequence[Any]) -> None:
        """Mark sums whose only use is a division by the axis size: lax.pmean."""
        uses: dict[Any, list[Equation | None]] = {}
        for equation in read:
            for var in equation.operands:
                if compat.is_var(var):
                    uses.setdefault(var, []).append(equation)
        for var in returned:
            if compat.is_var(var):
                uses.setdefault(var, []).append(None)
        for equation in read:
            eqn = equation.eqn
            if eqn.primitive.name != "psum":
                continue
            if compat.axis_groups(eqn) or compat.axes(eqn) != (self.axis_name,):
                continue
            for var in equation.results:
                users = uses.get(var, [])
                if len(users) != 1 or (division := users[0]) is None:
                    continue
                if (
                    division.eqn.primitive.name != "div"
                    or division.operands[0] is not var
                ):
                    continue
                divisor = division.operands[1]
                scalar = not compat.is_var(divisor) and np.ndim(divisor.val) == 0
                if scalar and divisor.val == self.comm.size:
                    equation.means[var] = division.results[0]
                    division.folded = True

    def _unsupported(self, eqn: Any, why: str) -> UnsupportedCollectiveError:
        return UnsupportedCollectiveError(
            f"{eqn.primitive.name} over axis {self.axis_name!r} at "
            f"{compat.source_line(eqn) or 'an unknown line'} {why}. Scheduled are "
            "psum, pmean, pmax, pmin, all_gather, psum_scatter, all_to_all, ppermute, "
            "pbroadcast and axis_index, also inside jit, scan, while_loop, cond and "
            "checkpoint, and jaxcomm's own collectives."
        )


@dataclasses.dataclass(slots=True, eq=False)
class Equation:
    """An equation, and what it is to the function that is planned."""

    eqn: Any
    operands: list[Any]
    results: list[Any]
    kind: str | None = None  # see `Reader.kind`
    meaning: Meaning | None = None  # of a named-axis collective
    own: bool = False  # it has calls of the function's communicator
    placed: bool = False  # it keeps its place among others with effects
    awaited: bool = False  # a collective waits for it
    folded: bool = False  # the division of a mean, which the collective makes
    means: dict[Any, Any] = dataclasses.field(default_factory=dict)  # sum -> mean


@dataclasses.dataclass(frozen=True)
class Meaning:
    """One operand's collective.

    Attributes:
      op: as in `schedule.Bucket`.
      terms: what else the bucket must know.
      before: from the operand to what the bucket takes; None where it is the same.
      after: from what the bucket gives to the equation's result; likewise.
    """

    op: str
    terms: Terms
    before: Callable[[Any], Any] | None = None
    after: Callable[[Any], Any] | None = None


def meaning_of(eqn: Any, size: int) -> Meaning:
    """Say what a collective over one named axis of `size` ranks does."""
    meaning = _meaning(eqn, size)
    if meaning.op not in MOVES or not eqn.invars:
        return meaning
    dtype = eqn.invars[0].aval.dtype
    if not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return meaning
    # Of typed keys their words travel.
    before, after = meaning.before or _same, meaning.after or _same
    impl = compat.key_impl(dtype)
    return dataclasses.replace(
        meaning,
        before=lambda x: jax.random.key_data(before(x)),
        after=lambda y: after(jax.random.wrap_key_data(y, impl=impl)),
    )


def _same(x: Any) -> Any:
    return x


def _meaning(eqn: Any, size: int) -> Meaning:
    name, groups = eqn.primitive.name, compat.axis_groups(eqn)
    ranks = len(groups[0]) if groups else size
    terms = Terms(groups=groups)
    if name in _SUMS:
        op, local = _SUMS[name]
        numbers = tuple(a for a in compat.axes(eqn) if isinstance(a, int))
        before = functools.partial(local, axis=numbers) if numbers else None
        return Meaning(op, terms, before)
    if name == "all_gather":
        axis, tiled = compat.gather_layout(eqn)
        after = functools.partial(layout.gathered, axis=axis, tiled=tiled)
        return Meaning("all_gather", terms, after=after)
    if name == "reduce_scatter":
        axis, tiled = compat.scatter_layout(eqn)
        before = functools.partial(
            layout.to_scatter, axis=axis, ranks=ranks, tiled=tiled
        )
        return Meaning("reduce_scatter", terms, before)
    if name == "all_to_all":
        split, concat = compat.exchange_layout(eqn)
        before = functools.partial(layout.to_exchange, split_axis=split, ranks=ranks)
        after = functools.partial(layout.exchanged, concat_axis=concat)
        return Meaning("all_to_all", terms, before, after)
    if name == "pbroadcast":
        root = compat.broadcast_root(eqn)
        return Meaning("broadcast", dataclasses.replace(terms, root=root))
    return Meaning("permute", Terms(permutation=compat.permutation(eqn)))


@dataclasses.dataclass(slots=True)
class Unit:
    """What is evaluated at once: an equation, a bucket, or a body with collectives."""

    # "equation", "function", "bucket", "body" (with collectives), or "foreign": a call
    # of another communicator than the function's
    kind: str
    eqn: Any = None
    inputs: Sequence[Any] = ()
    outputs: Sequence[Any] = ()
    stage: int = 0
    ready: float = 0.0
    index: int = -1  # number of the bucket in the program's schedule
    function: Callable[..., Any] | None = None  # of the inputs, to the only output
    bodies: Sequence[Body] = ()
    urgent: bool = True  # whether other collectives wait for it
    placed: bool = False  # whether it keeps its place among others with effects
    first: int = -1  # of what has calls: the positions of their equations
    last: int = -1


@dataclasses.dataclass
class Body:
    """A planned jaxpr: its units in an order that can be evaluated."""

    constvars: Sequence[Any]
    consts: Sequence[Any]
    invars: Sequence[Any]
    outvars: Sequence[Any]
    units: list[Unit]


def bodies_of(eqn: Any) -> list[Any]:
    name = eqn.primitive.name
    if name == compat.WHILE:
        return list(compat.while_loop(eqn)[:2])
    if name == compat.COND:
        return compat.branches(eqn)
    return [_called(eqn)]


def _flatten(
    jaxpr: Any, has_collective: Callable[[Any], bool]
) -> tuple[list[Equation], dict[Any, Any]]:
    """Put the equations of called bodies with collectives in place of the calls.

    Returns:
      The equations, and what outer variables stand for.
    """
    out: list[Equation] = []

    def visit(jaxpr: Any, names: dict[Any, Any]) -> None:
        for eqn in jaxpr.eqns:
            invars = [names.get(v, v) if compat.is_var(v) else v for v in eqn.invars]
            if eqn.primitive.name in compat.CALLS and has_collective(eqn):
                closed = _called(eqn)
                inner = getattr(closed, "jaxpr", closed)
                local: dict[Any, Any] = dict(zip(inner.invars, invars, strict=True))
                for var, const in zip(
                    inner.constvars, getattr(closed, "consts", ()), strict=True
                ):
                    local[var] = compat.literal(const, var.aval)
                visit(_Scoped(inner, local), local)
                for outer, var in zip(eqn.outvars, inner.outvars, strict=True):
                    names[outer] = local.get(var, var) if compat.is_var(var) else var
            else:
                outvars = []
                for var in eqn.outvars:
                    fresh = Var(var.aval) if isinstance(jaxpr, _Scoped) else var
                    if fresh is not var:
                        names[var] = fresh
                    outvars.append(fresh)
                out.append(Equation(eqn, invars, outvars))

    names: dict[Any, Any] = {}
    visit(jaxpr, names)
    return out, names


@dataclasses.dataclass(frozen=True)
class _Scoped:
    """An inlined body: its variables are renamed, as it may be called twice."""

    jaxpr: Any
    names: dict[Any, Any]

    @property
    def eqns(self) -> Sequence[Any]:
        return self.jaxpr.eqns


class Var:
    """A variable that no jaxpr has: for one of an inlined body's, or of ours."""

    def __init__(self, aval: Any):
        self.aval = aval


# Stands for what equations with effects read and write besides their variables.
EFFECT = Var(None)


def _called(eqn: Any) -> Any:
    if (body := compat.called(eqn)) is not None:
        return body
    raise UnsupportedCollectiveError(
        f"{eqn.primitive.name} at {compat.source_line(eqn)} contains a collective and "
        "its body cannot be read"
    )


def _find_awaited(read: Sequence[Equation]) -> None:
    """Mark the equations from whose results a way leads to a collective's operand."""
    wanted: set[Any] = set()
    for equation in reversed(read):
        operands, results = equation.operands, equation.results
        if equation.placed:
            operands, results = [*operands, EFFECT], [*results, EFFECT]
        equation.awaited = not wanted.isdisjoint(results)
        if equation.awaited or equation.own:
            wanted.update(v for v in operands if compat.is_var(v))
