"""The compiler pass: named-axis reductions in a jaxpr become scheduled buckets.

`program` plans a whole traced function, `Program.run` evaluates it again under the
current trace with every reduction replaced. In between stands one idea, the *stage*
of an equation: the largest number of collectives on any path that leads to it. Two
reductions of the same stage cannot depend on each other, not even transitively, so
they may share a bucket, and ordering buckets by stage can never make a cycle. (What has
effects counts as depending on all such equations before it.) Mind
synchronised batch normalisation: its sums lie between the gradients, and stages keep
them apart. Nor can reductions that no collective waits for depend on each other:
gradients of different stages may share a bucket, and go after its stage's others.

All collectives of the function are strung on one token, in the order of the plan.
The token goes in and out of `scan`, `while_loop`, `cond` and `checkpoint` bodies that
contain collectives, so the order is total and fixed by data. Returned as a hidden
output, it keeps every call alive whatever outputs a rank uses. A function that is
called inside another program has no token of its own: there its calls have an effect,
and whoever owns that program, this pass or JAX, puts them into its order.

Calls of other communicators (subgroups', mostly) take their place on the token and are
otherwise left as they were planned: they belong to schedules of their own, which other
ranks than ours compare. They do not count as stages, and of what is ready when, only
the order among this function's own calls counts: ranks may differ in the rest. They and
jaxcomm's own collectives, which have an effect, keep the order in which the program
calls them, whatever a rank does with their results.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax

from jaxcomm import compat
from jaxcomm.planning import planner
from jaxcomm.planning.planner import Groups
from jaxcomm.planning.schedule import Bucket, LeafSpec, Schedule
from jaxcomm.ranks.communicator import Communicator
from jaxcomm.tracing.evaluate import Evaluator
from jaxcomm.tracing.leaf_names import Reduction, name_leaves
from jaxcomm.tracing.predicates import Checked, check_predicates
from jaxcomm.tracing.primitives import (
    BoundBucket,
    bucket_p,
    moved_shape,
    order_effect,
    rank_p,
)
from jaxcomm.tracing.reading import (
    EFFECT,
    Body,
    Equation,
    Meaning,
    Reader,
    Unit,
    Var,
    bodies_of,
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user chose for a decorated function."""

    axis_name: str
    comm: Communicator
    groups: Groups = None
    bucket_bytes: int | None = None
    wire_dtype: str | None = None
    allow_divergent: bool = False


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced function with its collectives planned."""

    schedule: Schedule
    comm: Communicator
    body: Body
    # Arguments that must be the same on all ranks, because predicates are made of them.
    equal_inputs: frozenset[int] = frozenset()

    def run(self, args: Sequence[Any], token: Any = None) -> tuple[list[Any], Any]:
        """Evaluate under the current trace; returns (flat outputs, last token).

        Without a token (None) the calls have the effect that orders those of the
        program around them.
        """
        return Evaluator(self.schedule, self.comm).body(self.body, token, args)


def program(
    closed_jaxpr: Any,
    options: Options,
    inputs: Sequence[tuple[str, Any]],
    equal_inputs: Callable[[Reader], Collection[int]] | None = None,
) -> Program:
    """Plan all collectives of a traced function.

    Args:
      closed_jaxpr: the function, traced with the axis in scope.
      options: axis, communicator and planner options.
      inputs: (path, aval) of the function's array arguments; reductions whose shapes
        run parallel to a stretch of them are named after them.
      equal_inputs: says which of these are the same on all ranks; asked where a
        predicate decides about a collective. None: none is.

    Raises:
      UnsupportedCollectiveError: a collective that cannot be scheduled; names the
        primitive, the axis and the source line.
      InvalidOptionError: the pairs of a `ppermute` are no partial permutation.
    """
    planned = _Planner(options, inputs)
    predicates = Checked()
    if not options.allow_divergent and planned.reader.branches_communicate(
        closed_jaxpr.jaxpr
    ):
        equal = equal_inputs(planned.reader) if equal_inputs else ()
        predicates = check_predicates(closed_jaxpr, planned.reader, equal)
    body = planned.body(closed_jaxpr)
    buckets = _number(body, planned.buckets, [])
    schedule = Schedule(
        tuple(planned.leaves),
        tuple(buckets),
        options.comm.size,
        (
            ("axis_name", options.axis_name),
            ("bucket_bytes", str(options.bucket_bytes)),
            ("costs", options.comm.costs.source),
            ("groups", _name(options.groups)),
            ("predicates", predicates.digest),
            ("wire_dtype", str(options.wire_dtype)),
        ),
    )
    return Program(schedule, options.comm, body, predicates.inputs)


class _Planner:
    """Collects the leaves and buckets of a program, body by body."""

    def __init__(self, options: Options, inputs: Sequence[tuple[str, Any]]):
        self.options = options
        self.reader = Reader(options.axis_name, options.comm)
        self.inputs = [(p, tuple(a.shape), str(a.dtype)) for p, a in inputs]
        # Of all bodies planned so far; numbered in the order of calls at the end.
        self.leaves: list[LeafSpec] = []
        self.buckets: list[Bucket] = []

    def body(self, closed: Any) -> Body:
        """Plan one jaxpr, open or closed, and the bodies inside it."""
        read, returned = self.reader.read(closed)
        stage: dict[Any, int] = {}
        ready: dict[Any, int] = {}
        # The least stage and moment of the next ordered call, and those of the last.
        following, preceding = (0, 0), (0, 0)
        last: Any = None
        units: list[Unit] = []
        reductions: list[Reduction] = []
        chain: list[Unit] = []  # with calls of this function's communicator
        foreign: list[Unit] = []  # with calls of others alone

        for position, equation in enumerate(read):
            eqn, own = equation.eqn, equation.own
            operands = [v for v in equation.operands if compat.is_var(v)]
            level = max([stage.get(v, 0) for v in operands], default=0)
            when = max([ready.get(v, 0) for v in operands], default=0)
            if own and order_effect in eqn.effects:
                if not _is_same_call(last, eqn):
                    preceding = following
                level, when = max(level, preceding[0]), max(when, preceding[1])
                following = max(following[0], level + 1), max(following[1], when)
                last = eqn
            if equation.placed:
                level = max(level, stage.get(EFFECT, 0))
                stage[EFFECT] = level + own
            for var in equation.results:
                stage[var] = level + own
                ready[var] = position + 1
            if equation.folded:
                ready[equation.results[0]] = when
                continue
            if equation.meaning is not None:
                for mean in equation.means.values():
                    stage[mean] = level + 1
                for found, around in self._reductions(equation, position, level, ready):
                    reductions.append(found)
                    units += around
                continue
            if equation.kind == "rank":
                (number,) = equation.results
                units.append(_function(self._rank, [], number, level, position))
                continue
            unit = Unit("equation", eqn, equation.operands, equation.results)
            unit.stage, unit.ready = level, position
            unit.urgent, unit.placed = equation.awaited, equation.placed
            unit.first = unit.last = position
            if equation.kind is not None:
                unit.kind, unit.ready = equation.kind, when
                (chain if own else foreign).append(unit)
            if equation.kind == "bucket":
                unit.index = self._adopt(eqn, level)
            units.append(unit)

        buckets, chain = self._chain(reductions, chain, foreign)
        for unit in chain:
            if unit.kind == "body":
                unit.bodies = [self.body(j) for j in bodies_of(unit.eqn)]
        order = _in_order([*units, *buckets], chain)
        jaxpr, consts = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
        return Body(jaxpr.constvars, consts, jaxpr.invars, returned, order)

    def _reductions(
        self, equation: Equation, position: int, level: int, ready: dict[Any, int]
    ) -> Iterator[tuple[Reduction, list[Unit]]]:
        """Make one reduction for each operand, and the units before and after it."""
        meaning = equation.meaning
        assert meaning is not None
        pairs = zip(equation.operands, equation.results, strict=True)
        for operand, result in pairs:
            at = ready.get(operand, 0) if compat.is_var(operand) else 0
            mean = equation.means.get(result)
            around = []
            fed, given = operand, result if mean is None else mean
            if meaning.before is not None:
                fed = _derived(meaning.before, operand)
                around.append(_function(meaning.before, [operand], fed, level, at))
            if meaning.after is not None:
                moved = Var(self._moved(meaning, fed))
                around.append(_function(meaning.after, [moved], given, level + 1, at))
                given = moved
            reduction = Reduction(
                meaning.op if mean is None else "mean",
                fed,
                given,
                at,
                level,
                equation.awaited,
                compat.source_line(equation.eqn),
                meaning.terms,
                position,
            )
            yield reduction, around

    def _rank(self) -> Any:
        return rank_p.bind(comm=self.options.comm)

    def _moved(self, meaning: Meaning, operand: Any) -> Any:
        """What the bucket of a collective gives for an operand."""
        shape = moved_shape(
            Bucket(meaning.op, "", (), 0, groups=meaning.terms.groups),
            operand.aval.shape,
            self.options.comm.size,
        )
        return compat.shaped_array(shape, operand.aval.dtype)

    def _adopt(self, eqn: Any, stage: int) -> int:
        """Take over a bucket that a jaxcomm collective has planned itself."""
        call = BoundBucket(**eqn.params)
        start = len(self.leaves)
        self.leaves += [call.schedule.leaves[i] for i in call.bucket.leaves]
        indices = tuple(range(start, len(self.leaves)))
        self.buckets.append(
            dataclasses.replace(call.bucket, leaves=indices, stage=stage)
        )
        return len(self.buckets) - 1

    def _chain(
        self, reductions: list[Reduction], adopted: list[Unit], foreign: list[Unit]
    ) -> tuple[list[Unit], list[Unit]]:
        """Plan the reductions, and order all that has calls.

        Calls of other communicators are made where the program makes them: after this
        function's calls that come before, and before those that come after. This is the
        same on all ranks, even where some of them make no such call, or do not use what
        it gives. Only where the plan would have it otherwise is it divided there.

        Returns:
          The planned buckets, and the chain: them and all others in their order.
        """
        # When each call can be made, counted in these moments.
        moments = sorted({*(r.ready for r in reductions), *(u.ready for u in adopted)})
        # Where synchronised batch statistics wait behind gradients, the computation
        # waits with them, while gradients can travel as it goes on: those that were
        # not ready long before let them pass.
        patience = len(moments) // 20
        name_leaves(reductions, self.inputs)
        cuts: list[int] = []

        def turn(unit: Unit) -> tuple[int, int, float]:
            at = bisect.bisect_left(moments, unit.ready)
            late = 0 if unit.urgent else patience
            return bisect.bisect_left(cuts, unit.first), unit.stage, at + late

        while True:
            parts: list[list[Reduction]] = [[] for _ in range(len(cuts) + 1)]
            for r in reductions:
                parts[bisect.bisect_left(cuts, r.position)].append(r)
            plans = [self._plan(part, moments) for part in parts]
            buckets = [unit for plan in plans for unit, _ in plan]
            chain = sorted([*adopted, *buckets], key=turn)
            wrong = [u.first for u in foreign if not _divides(u.first, chain)]
            if not wrong:
                break
            cuts = sorted({*cuts, *wrong})
        for part, plan in zip(parts, plans, strict=True):
            self._register(part, plan, moments)
        for unit in foreign:
            chain.insert(sum(u.last < unit.first for u in chain), unit)
        return buckets, chain

    def _plan(
        self, reductions: list[Reduction], moments: list[float]
    ) -> list[tuple[Unit, Bucket]]:
        """Plan some reductions; their buckets' leaves are counted among these."""
        if not reductions:
            return []
        schedule = planner.make_schedule(
            _specs(reductions, moments),
            op=tuple(r.op for r in reductions),
            terms=tuple(r.terms for r in reductions),
            stages=tuple(r.stage for r in reductions),
            urgent=tuple(r.urgent for r in reductions),
            size=self.options.comm.size,
            groups=self.options.groups,
            bucket_bytes=self.options.bucket_bytes,
            wire_dtype=self.options.wire_dtype,
            costs=self.options.comm.costs,
            hosts=self.options.comm.tier_hosts,
        )
        planned = []
        for bucket in schedule.buckets:
            members = [reductions[i] for i in bucket.leaves]
            unit = Unit(
                "bucket",
                None,
                [m.operand for m in members],
                [m.result for m in members],
                bucket.stage,
                max(m.ready for m in members),
                urgent=any(m.urgent for m in members),
                first=min(m.position for m in members),
                last=max(m.position for m in members),
            )
            planned.append((unit, bucket))
        return planned

    def _register(
        self,
        reductions: list[Reduction],
        plan: list[tuple[Unit, Bucket]],
        moments: list[float],
    ) -> None:
        """Make planned buckets part of the program's schedule."""
        start = len(self.leaves)
        self.leaves += _specs(reductions, moments)
        for unit, bucket in plan:
            unit.index = len(self.buckets)
            leaves = tuple(start + i for i in bucket.leaves)
            self.buckets.append(dataclasses.replace(bucket, leaves=leaves))


def _specs(reductions: list[Reduction], moments: list[float]) -> tuple[LeafSpec, ...]:
    return tuple(
        LeafSpec(
            r.path,
            tuple(r.operand.aval.shape),
            str(r.operand.aval.dtype),
            bisect.bisect_left(moments, r.ready),
        )
        for r in reductions
    )


def _divides(position: int, chain: list[Unit]) -> bool:
    """Tell whether all before a position of the program come before all after it."""
    after = [unit.first > position for unit in chain]
    whole = all(u.last < position or u.first > position for u in chain)
    return whole and after == sorted(after)


def _is_same_call(last: Any, eqn: Any) -> bool:
    """Tell whether two ordered calls are consecutive buckets of one tree.

    Those do not depend on each other, and go as they become ready.
    """
    if last is None or not last.primitive is eqn.primitive is bucket_p:
        return False
    call = BoundBucket(**last.params)
    return BoundBucket(**eqn.params) == call._replace(index=call.index + 1)


def _function(
    function: Callable[..., Any], inputs: list[Any], output: Any, stage: int, ready: int
) -> Unit:
    return Unit("function", None, inputs, [output], stage, ready, function=function)


def _derived(function: Callable[[Any], Any], operand: Any) -> Var:
    """A variable for a function's result."""
    aval = operand.aval
    shape = jax.eval_shape(function, jax.ShapeDtypeStruct(aval.shape, aval.dtype))
    return Var(compat.shaped_array(shape.shape, shape.dtype))


def _in_order(units: list[Unit], chain: list[Unit]) -> list[Unit]:
    """Sort units so that operands and the chain come first; else keep their order."""
    producer = {id(v): k for k, unit in enumerate(units) for v in unit.outputs}
    number = {id(unit): k for k, unit in enumerate(units)}
    before: list[set[int]] = []
    for unit in units:
        before.append(
            {
                producer[id(v)]
                for v in unit.inputs
                if compat.is_var(v) and id(v) in producer
            }
        )
    # What has effects keeps its order: it may be tied by nothing else.
    placed = [unit for unit in units if unit.placed]
    for first, second in [*itertools.pairwise(chain), *itertools.pairwise(placed)]:
        before[number[id(second)]].add(number[id(first)])
    after: list[list[int]] = [[] for _ in units]
    for k, needed in enumerate(before):
        for j in needed:
            after[j].append(k)
    waiting = [len(needed) for needed in before]
    heap = [(unit.ready, k) for k, unit in enumerate(units) if waiting[k] == 0]
    heapq.heapify(heap)
    out = []
    while heap:
        _, k = heapq.heappop(heap)
        out.append(units[k])
        for j in after[k]:
            waiting[j] -= 1
            if waiting[j] == 0:
                heapq.heappush(heap, (units[j].ready, j))
    if len(out) != len(units):
        raise AssertionError("the plan has a cycle; please report this as a bug")
    return out


def _number(body: Body, planned: Sequence[Bucket], out: list[Bucket]) -> list[Bucket]:
    """Renumber the buckets, those of inner bodies too, in the order of their calls."""
    for unit in body.units:
        if unit.kind == "bucket":
            out.append(planned[unit.index])
            unit.index = len(out) - 1
        for inner in unit.bodies:
            _number(inner, planned, out)
    return out


def _name(groups: Groups) -> str:
    return "by label" if callable(groups) else str(groups)
