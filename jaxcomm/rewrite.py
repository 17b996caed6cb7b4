"""The compiler pass: named-axis reductions in a jaxpr become scheduled buckets.

`program` plans a whole traced function, `Program.run` evaluates it again under the
current trace with every reduction replaced. In between stands one idea, the *stage*
of an equation: the largest number of collectives on any path that leads to it. Two
reductions of the same stage cannot depend on each other, not even transitively, so
they may share a bucket, and ordering buckets by stage can never make a cycle. Mind
synchronised batch normalisation: its sums lie between the gradients, and stages keep
them apart.

All collectives of the function are strung on one token, in the order of the plan.
The token goes in and out of `scan`, `while_loop`, `cond` and `checkpoint` bodies that
contain collectives, so the order is total and fixed by data. Returned as a hidden
output, it keeps every call alive whatever outputs a rank uses.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from jaxcomm import _compat, planner
from jaxcomm.collectives import bucket_p, chained_p, new_token
from jaxcomm.communicator import Communicator
from jaxcomm.errors import UnsupportedCollectiveError
from jaxcomm.planner import Groups
from jaxcomm.schedule import Bucket, LeafSpec, Schedule

_REDUCTIONS = {"psum": "sum", "pmax": "max", "pmin": "min"}
# Bodies whose equations may simply stand in place of the call.
_INLINED = {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call"}
_INLINED |= {"custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin"}
_THREADED = {"scan", "while", "cond", "checkpoint", "remat", "remat2"}


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user chose for a decorated function."""

    axis_name: str
    comm: Communicator
    groups: Groups = None
    bucket_bytes: int | None = None


@dataclasses.dataclass
class _Reduction:
    """One operand of a psum-like equation."""

    op: str
    operand: Any
    result: Any
    ready: int
    stage: int
    where: str
    path: str = ""


@dataclasses.dataclass
class _Unit:
    """What is evaluated at once: an equation, a bucket, or a body with collectives."""

    kind: str  # "equation", "bucket" or "body"
    eqn: Any = None
    inputs: Sequence[Any] = ()
    outputs: Sequence[Any] = ()
    stage: int = 0
    ready: float = 0.0
    index: int = -1  # number of the bucket in the program's schedule
    bodies: list[_Body] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Body:
    """A planned jaxpr: its units in an order that can be evaluated."""

    constvars: Sequence[Any]
    consts: Sequence[Any]
    invars: Sequence[Any]
    outvars: Sequence[Any]
    units: list[_Unit]


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced function with its collectives planned."""

    schedule: Schedule
    comm: Communicator
    body: _Body

    def run(self, args: Sequence[Any]) -> tuple[list[Any], Any]:
        """Evaluate under the current trace; returns (flat outputs, last token)."""
        return _Evaluator(self).body(self.body, new_token(), args)


def program(
    closed_jaxpr: Any, options: Options, inputs: Sequence[tuple[str, Any]]
) -> Program:
    """Plan all collectives of a traced function.

    Args:
      closed_jaxpr: the function, traced with the axis in scope.
      options: axis, communicator and planner options.
      inputs: (path, aval) of the function's array arguments; reductions whose shapes
        run parallel to a stretch of them are named after them.

    Raises:
      UnsupportedCollectiveError: a collective that cannot be scheduled; names the
        primitive, the axis and the source line.
    """
    planned = _Planner(options, inputs)
    body = planned.body(closed_jaxpr)
    buckets = _number(body, planned.buckets, [])
    schedule = Schedule(
        tuple(planned.leaves),
        tuple(buckets),
        options.comm.size,
        (
            ("axis_name", options.axis_name),
            ("bucket_bytes", str(options.bucket_bytes)),
            ("groups", _name(options.groups)),
        ),
    )
    return Program(schedule, options.comm, body)


class _Planner:
    """Collects the leaves and buckets of a program, body by body."""

    def __init__(self, options: Options, inputs: Sequence[tuple[str, Any]]):
        self.options = options
        self.inputs = [(p, tuple(a.shape), str(a.dtype)) for p, a in inputs]
        self.leaves: list[LeafSpec] = []
        self.buckets: list[Bucket] = []

    def body(self, closed: Any) -> _Body:
        """Plan one jaxpr, open or closed, and the bodies inside it."""
        jaxpr = getattr(closed, "jaxpr", closed)
        eqns, rename = _flatten(jaxpr, self._has_collective)
        means = _means(eqns, jaxpr, rename, self.options)
        stage: dict[Any, int] = {}
        ready: dict[Any, int] = {}
        units: list[_Unit] = []
        reductions: list[_Reduction] = []
        chain: list[_Unit] = []

        for position, (eqn, invars, outvars) in enumerate(eqns):
            level = max([stage.get(v, 0) for v in invars if _is_var(v)], default=0)
            when = max([ready.get(v, 0) for v in invars if _is_var(v)], default=0)
            collective = self._kind(eqn)
            for var in outvars:
                stage[var] = level + (collective is not None)
                ready[var] = position + 1
            if position in means.skipped:
                ready[outvars[0]] = when
                continue
            if collective == "reduction":
                op = _REDUCTIONS[eqn.primitive.name]
                for operand, result in zip(invars, outvars, strict=True):
                    at = ready.get(operand, 0) if _is_var(operand) else 0
                    mean = means.result.get(result)
                    reductions.append(
                        _Reduction(
                            "mean" if mean is not None else op,
                            operand,
                            result if mean is None else mean,
                            at,
                            level,
                            _compat.source_line(eqn),
                        )
                    )
                    if mean is not None:
                        stage[mean] = level + 1
                continue
            unit = _Unit("equation", eqn, invars, outvars, level, position)
            if collective == "bucket":
                unit.kind, unit.ready = "bucket", when
                unit.index = self._adopt(eqn, level)
                chain.append(unit)
            elif collective == "body":
                unit.kind, unit.ready = "body", when
                chain.append(unit)
            units.append(unit)

        buckets = self._plan(reductions)
        chain = sorted([*chain, *buckets], key=lambda u: (u.stage, u.ready))
        for unit in chain:
            if unit.kind == "body":
                unit.bodies = [self.body(j) for j in _bodies(unit.eqn)]
        outs = [rename.get(v, v) if _is_var(v) else v for v in jaxpr.outvars]
        order = _in_order([*units, *buckets], chain)
        consts = getattr(closed, "consts", ())
        return _Body(jaxpr.constvars, consts, jaxpr.invars, outs, order)

    def _kind(self, eqn: Any) -> str | None:
        name = eqn.primitive.name
        if eqn.primitive is bucket_p:
            return "bucket"
        if self._uses_axis(eqn):
            if name in _REDUCTIONS:
                self._check(eqn)
                return "reduction"
            raise self._unsupported(eqn, "is not scheduled yet")
        if self._has_collective(eqn):
            if name in _THREADED:
                return "body"
            raise self._unsupported(eqn, "contains a collective and is not supported")
        return None

    def _uses_axis(self, eqn: Any) -> bool:
        for key in ("axes", "axis_name"):
            value = eqn.params.get(key, ())
            names = value if isinstance(value, tuple | list) else (value,)
            if self.options.axis_name in names:
                return True
        return False

    def _has_collective(self, eqn: Any) -> bool:
        if eqn.primitive is bucket_p or self._uses_axis(eqn):
            return True
        return any(
            self._has_collective(inner)
            for sub in _compat.sub_jaxprs(eqn)
            for inner in sub.eqns
        )

    def _check(self, eqn: Any) -> None:
        if eqn.params.get("axis_index_groups") is not None:
            raise self._unsupported(eqn, "with axis_index_groups is not scheduled yet")
        if tuple(eqn.params["axes"]) != (self.options.axis_name,):
            raise self._unsupported(
                eqn, f"over axes {eqn.params['axes']} at once is not scheduled yet"
            )
        op = _REDUCTIONS[eqn.primitive.name]
        where = f"({_compat.source_line(eqn)})"
        for var in eqn.invars:
            self.options.comm.lowering.check(op, str(var.aval.dtype), where)

    def _unsupported(self, eqn: Any, why: str) -> UnsupportedCollectiveError:
        return UnsupportedCollectiveError(
            f"{eqn.primitive.name} over axis {self.options.axis_name!r} at "
            f"{_compat.source_line(eqn) or 'an unknown line'} {why}. Scheduled are psum, "
            "pmean, pmax and pmin, also inside jit, scan, while_loop, cond and "
            "checkpoint, and jaxcomm's own collectives."
        )

    def _adopt(self, eqn: Any, stage: int) -> int:
        """Take over a bucket that a jaxcomm collective has planned itself."""
        theirs: Schedule = eqn.params["schedule"]
        bucket = theirs.buckets[eqn.params["index"]]
        start = len(self.leaves)
        self.leaves += [theirs.leaves[i] for i in bucket.leaves]
        indices = tuple(range(start, len(self.leaves)))
        self.buckets.append(dataclasses.replace(bucket, leaves=indices, stage=stage))
        return len(self.buckets) - 1

    def _plan(self, reductions: list[_Reduction]) -> list[_Unit]:
        if not reductions:
            return []
        _name_leaves(reductions, self.inputs)
        specs = tuple(
            LeafSpec(r.path, tuple(r.operand.aval.shape), str(r.operand.aval.dtype), r.ready)
            for r in reductions
        )
        schedule = planner.make_schedule(
            specs,
            op=tuple(r.op for r in reductions),
            stages=tuple(r.stage for r in reductions),
            size=self.options.comm.size,
            groups=self.options.groups,
            bucket_bytes=self.options.bucket_bytes,
        )
        start = len(self.leaves)
        self.leaves += specs
        units = []
        for bucket in schedule.buckets:
            members = [reductions[i] for i in bucket.leaves]
            shifted = tuple(start + i for i in bucket.leaves)
            self.buckets.append(dataclasses.replace(bucket, leaves=shifted))
            units.append(
                _Unit(
                    "bucket",
                    None,
                    [m.operand for m in members],
                    [m.result for m in members],
                    bucket.stage,
                    max(m.ready for m in members),
                    len(self.buckets) - 1,
                )
            )
        return units


class _Evaluator:
    """Evaluates planned bodies under the current trace, threading the token."""

    def __init__(self, program: Program):
        self.program = program

    def body(
        self, body: _Body, token: Any, args: Sequence[Any]
    ) -> tuple[list[Any], Any]:
        env: dict[Any, Any] = {}
        env.update(zip(body.constvars, body.consts, strict=True))
        env.update(zip(body.invars, args, strict=True))

        def read(var: Any) -> Any:
            return env[var] if _is_var(var) else var.val

        for unit in body.units:
            values = [read(v) for v in unit.inputs]
            if unit.kind == "equation":
                results = _compat.eval_eqn(unit.eqn, values)
            elif unit.kind == "bucket":
                results, token = self._bucket(unit.index, values, token)
            else:
                results, token = self._threaded(unit, values, token)
            env.update(zip(unit.outputs, results, strict=True))
        return [read(v) for v in body.outvars], token

    def _bucket(
        self, index: int, values: Sequence[Any], token: Any
    ) -> tuple[list[Any], Any]:
        if self.program.comm.transport == "local":
            return list(values), token
        with jax.named_scope(f"jaxcomm/bucket_{index:02d}"):
            *results, token = chained_p.bind(
                *values,
                token,
                comm=self.program.comm,
                schedule=self.program.schedule,
                index=index,
            )
        return results, token

    def _threaded(
        self, unit: _Unit, values: Sequence[Any], token: Any
    ) -> tuple[list[Any], Any]:
        name, params = unit.eqn.primitive.name, unit.eqn.params
        if name == "scan":
            return self._scan(unit.bodies[0], params, values, token)
        if name == "while":
            return self._while(unit.bodies, params, values, token)
        if name == "cond":
            index, *operands = values
            branches = [self._caller(body) for body in unit.bodies]
            token, results = lax.switch(index, branches, token, operands)
            return list(results), token
        run = jax.checkpoint(
            self._caller(unit.bodies[0]),
            prevent_cse=params["prevent_cse"],
            policy=params["policy"],
        )
        token, results = run(token, list(values))
        return list(results), token

    def _caller(self, body: _Body) -> Callable[..., Any]:
        def call(token: Any, args: Sequence[Any]) -> tuple[Any, list[Any]]:
            results, token = self.body(body, token, args)
            return token, results

        return call

    def _scan(
        self, body: _Body, params: Any, values: Sequence[Any], token: Any
    ) -> tuple[list[Any], Any]:
        n_consts, n_carry = _compat.scan_counts(params)
        consts = list(values[:n_consts])
        init = list(values[n_consts : n_consts + n_carry])

        def step(state: Any, xs: Any) -> Any:
            token, carry = state
            results, token = self.body(body, token, [*consts, *carry, *xs])
            return (token, results[:n_carry]), results[n_carry:]

        (token, carry), ys = lax.scan(
            step,
            (token, init),
            list(values[n_consts + n_carry :]),
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*carry, *ys], token

    def _while(
        self, bodies: list[_Body], params: Any, values: Sequence[Any], token: Any
    ) -> tuple[list[Any], Any]:
        n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
        cond_consts = list(values[:n_cond])
        body_consts = list(values[n_cond : n_cond + n_body])
        init = list(values[n_cond + n_body :])
        test, step = bodies
        if any(unit.kind != "equation" for unit in test.units):
            raise UnsupportedCollectiveError(
                "a collective in the condition of a while_loop is not scheduled; "
                "compute it in the body and carry the result"
            )

        def go_on(state: Any) -> Any:
            args = [*cond_consts, *state[1]]
            return self.body(test, state[0], args)[0][0]

        def body(state: Any) -> Any:
            args = [*body_consts, *state[1]]
            results, token = self.body(step, state[0], args)
            return token, results

        token, carry = lax.while_loop(go_on, body, (token, init))
        return list(carry), token


def _bodies(eqn: Any) -> list[Any]:
    params = eqn.params
    name = eqn.primitive.name
    if name == "scan":
        return [params["jaxpr"]]
    if name == "while":
        return [params["cond_jaxpr"], params["body_jaxpr"]]
    if name == "cond":
        return list(params["branches"])
    return [_called(eqn)]


def _flatten(
    jaxpr: Any, has_collective: Callable[[Any], bool]
) -> tuple[list[tuple[Any, list[Any], list[Any]]], dict[Any, Any]]:
    """Put the equations of called bodies with collectives in place of the calls.

    Returns:
      (equation, operands, results) triples, and what outer variables stand for.
    """
    out: list[tuple[Any, list[Any], list[Any]]] = []

    def visit(jaxpr: Any, names: dict[Any, Any]) -> None:
        for eqn in jaxpr.eqns:
            invars = [names.get(v, v) if _is_var(v) else v for v in eqn.invars]
            if eqn.primitive.name in _INLINED and has_collective(eqn):
                closed = _called(eqn)
                inner = getattr(closed, "jaxpr", closed)
                local: dict[Any, Any] = dict(zip(inner.invars, invars, strict=True))
                for var, const in zip(
                    inner.constvars, getattr(closed, "consts", ()), strict=True
                ):
                    local[var] = _compat.literal(const, var.aval)
                visit(_Scoped(inner, local), local)
                for outer, var in zip(eqn.outvars, inner.outvars, strict=True):
                    names[outer] = local.get(var, var) if _is_var(var) else var
            else:
                outvars = []
                for var in eqn.outvars:
                    fresh = _Var(var.aval) if isinstance(jaxpr, _Scoped) else var
                    if fresh is not var:
                        names[var] = fresh
                    outvars.append(fresh)
                out.append((eqn, invars, outvars))

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


class _Var:
    """A variable that stands for one of an inlined body's."""

    def __init__(self, aval: Any):
        self.aval = aval


def _called(eqn: Any) -> Any:
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in eqn.params:
            return eqn.params[key]
    raise UnsupportedCollectiveError(
        f"{eqn.primitive.name} at {_compat.source_line(eqn)} contains a collective and "
        "its body cannot be read"
    )


@dataclasses.dataclass(frozen=True)
class _Means:
    result: dict[Any, Any]  # psum's result -> the mean's
    skipped: set[int]  # positions of the divisions that are folded in


def _means(
    eqns: Sequence[Any], jaxpr: Any, rename: dict[Any, Any], options: Options
) -> _Means:
    """Find sums whose only use is a division by the axis size: lax.pmean."""
    uses: dict[Any, list[int]] = {}
    for position, (_, invars, _) in enumerate(eqns):
        for var in invars:
            if _is_var(var):
                uses.setdefault(var, []).append(position)
    for var in jaxpr.outvars:
        if _is_var(var):
            uses.setdefault(rename.get(var, var), []).append(-1)
    found = _Means({}, set())
    for eqn, _, outvars in eqns:
        if eqn.primitive.name != "psum":
            continue
        if tuple(eqn.params.get("axes", ())) != (options.axis_name,):
            continue
        for var in outvars:
            users = uses.get(var, [])
            if len(users) != 1 or users[0] < 0:
                continue
            division, operands, results = eqns[users[0]]
            if division.primitive.name == "div" and operands[0] is var:
                divisor = operands[1]
                if not _is_var(divisor) and np.ndim(divisor.val) == 0:
                    if divisor.val == options.comm.size:
                        found.result[var] = results[0]
                        found.skipped.add(users[0])
    return found


def _in_order(units: list[_Unit], chain: list[_Unit]) -> list[_Unit]:
    """Sort units so that operands and the chain come first; else keep their order."""
    producer = {id(v): k for k, unit in enumerate(units) for v in unit.outputs}
    number = {id(unit): k for k, unit in enumerate(units)}
    before: list[set[int]] = []
    for unit in units:
        before.append(
            {producer[id(v)] for v in unit.inputs if _is_var(v) and id(v) in producer}
        )
    for first, second in zip(chain, chain[1:], strict=False):
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


def _number(body: _Body, planned: Sequence[Bucket], out: list[Bucket]) -> list[Bucket]:
    """Renumber the buckets, those of inner bodies too, in the order of their calls."""
    for unit in body.units:
        if unit.kind == "bucket":
            out.append(planned[unit.index])
            unit.index = len(out) - 1
        for inner in unit.bodies:
            _number(inner, planned, out)
    return out


def _name_leaves(
    reductions: list[_Reduction], inputs: Sequence[tuple[str, tuple[int, ...], str]]
) -> None:
    """Name reductions after the inputs they run parallel to, else after their line.

    lax.pmean(grads) gives one reduction per leaf and no path. Gradients have the
    shapes of parameters, in the same order: a run of reductions from one source line
    that matches a stretch of the inputs takes its names.
    """
    runs: list[list[_Reduction]] = []
    for r in reductions:
        if runs and runs[-1][-1].where == r.where:
            runs[-1].append(r)
        else:
            runs.append([r])
    starts: dict[Any, list[int]] = {}
    for k, (_, shape, dtype) in enumerate(inputs):
        starts.setdefault((shape, dtype), []).append(k)
    taken: dict[str, int] = {}
    for run in runs:
        want = [(tuple(r.operand.aval.shape), str(r.operand.aval.dtype)) for r in run]
        at = 0
        while at < len(run):
            start, length = _longest_match(want[at:], inputs, starts)
            # A lone scalar would match any other scalar.
            if length == 1 and not want[at][0]:
                length = 0
            for k in range(length):
                run[at + k].path = inputs[start + k][0]
            if length == 0:
                run[at].path = run[at].where
            at += max(length, 1)
        for r in run:
            taken[r.path] = taken.get(r.path, 0) + 1
            if taken[r.path] > 1:
                r.path = f"{r.path}#{taken[r.path]}"


def _longest_match(
    want: list[Any], inputs: Sequence[Any], starts: dict[Any, list[int]]
) -> tuple[int, int]:
    """Find the stretch of inputs that agrees longest with the front of `want`."""
    best = (0, 0)
    for start in starts.get(want[0], []):
        length = 0
        while (
            length < len(want)
            and start + length < len(inputs)
            and inputs[start + length][1:] == want[length]
        ):
            length += 1
        if length > best[1]:
            best = (start, length)
        if length == len(want):
            break
    return best


def _is_var(value: Any) -> bool:
    return not isinstance(value, _compat.Literal)


def _name(groups: Groups) -> str:
    return "by label" if callable(groups) else str(groups)
