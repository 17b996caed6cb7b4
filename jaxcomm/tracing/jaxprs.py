"""Jaxprs as the pass reads them: flat lists of equations, sums that are means.

Internal to `rewrite`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxcomm import compat
from jaxcomm.errors import UnsupportedCollectiveError


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


def flatten(
    jaxpr: Any, has_collective: Callable[[Any], bool]
) -> tuple[list[tuple[Any, list[Any], list[Any]]], dict[Any, Any]]:
    """Put the equations of called bodies with collectives in place of the calls.

    Returns:
      (equation, operands, results) triples, and what outer variables stand for.
    """
    out: list[tuple[Any, list[Any], list[Any]]] = []

    def visit(jaxpr: Any, names: dict[Any, Any]) -> None:
        for eqn in jaxpr.eqns:
            invars = [names.get(v, v) if is_var(v) else v for v in eqn.invars]
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
                    names[outer] = local.get(var, var) if is_var(var) else var
            else:
                outvars = []
                for var in eqn.outvars:
                    fresh = Var(var.aval) if isinstance(jaxpr, _Scoped) else var
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


@dataclasses.dataclass(frozen=True)
class Means:
    result: dict[Any, Any]  # psum's result -> the mean's
    skipped: set[int]  # positions of the divisions that are folded in


def means_of(
    eqns: Sequence[Any], jaxpr: Any, rename: dict[Any, Any], axis_name: str, size: int
) -> Means:
    """Find sums whose only use is a division by the axis size: lax.pmean."""
    uses: dict[Any, list[int]] = {}
    for position, (_, invars, _) in enumerate(eqns):
        for var in invars:
            if is_var(var):
                uses.setdefault(var, []).append(position)
    for var in jaxpr.outvars:
        if is_var(var):
            uses.setdefault(rename.get(var, var), []).append(-1)
    found = Means({}, set())
    for eqn, _, outvars in eqns:
        if eqn.primitive.name != "psum":
            continue
        if compat.axis_groups(eqn) or compat.axes(eqn) != (axis_name,):
            continue
        for var in outvars:
            users = uses.get(var, [])
            if len(users) != 1 or users[0] < 0:
                continue
            division, operands, results = eqns[users[0]]
            if division.primitive.name == "div" and operands[0] is var:
                divisor = operands[1]
                scalar = not is_var(divisor) and np.ndim(divisor.val) == 0
                if scalar and divisor.val == size:
                    found.result[var] = results[0]
                    found.skipped.add(users[0])
    return found


def awaited_by(
    eqns: Sequence[Any], is_collective: Sequence[bool], placed: Sequence[bool]
) -> set[int]:
    """Find the equations that a collective waits for, by their positions.

    They are those from whose results a way leads to an operand of a collective.
    """
    wanted: set[Any] = set()
    found = set()
    for position in range(len(eqns) - 1, -1, -1):
        _, invars, outvars = eqns[position]
        if placed[position]:
            invars, outvars = [*invars, EFFECT], [*outvars, EFFECT]
        awaited = not wanted.isdisjoint(outvars)
        if awaited:
            found.add(position)
        if awaited or is_collective[position]:
            wanted.update(v for v in invars if is_var(v))
    return found


def is_var(value: Any) -> bool:
    return not isinstance(value, compat.Literal)
