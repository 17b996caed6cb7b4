"""Which values of a program are the same on all ranks, and where that must be so.

A collective inside `cond` or `while_loop` is only met by all ranks if all take the same
way. `check` follows every predicate that decides about a collective back to where it
comes from: literals, constants and what a collective has made equal are the same on all
ranks, and so is what is computed from these alone. A function's arguments are not:
nothing compares their values.

Literals and constants are those of this rank's trace. So that ranks with other ones
are found, a digest of what every such predicate is made of goes into the schedule,
which the ranks compare before its first byte moves.

Internal to `rewrite`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxcomm import compat
from jaxcomm.errors import UnsupportedCollectiveError
from jaxcomm.tracing.primitives import BoundBucket, bucket_p, mark_of
from jaxcomm.tracing.reading import EQUAL_RESULTS, Reader

# A digest of how a value that is the same on all ranks came about; None: unknown.
Origin = str | None
_ADDRESS = re.compile(r"0x[0-9a-f]+")


def check_predicates(closed: Any, reader: Reader) -> str:
    """Refuse collectives under predicates that may differ between ranks.

    Returns:
      A digest of what the others are made of, or "" where nothing depends on any.

    Raises:
      UnsupportedCollectiveError: for the first equation that may divide the ranks.
    """
    if not reader.branches_communicate(closed.jaxpr):
        return ""
    checker = _Checker(reader)
    checker.body(closed, [None] * len(closed.jaxpr.invars))
    return checker.digest


class _Checker:
    """Follows values through a program, and finds predicates that may differ."""

    def __init__(self, reader: Reader):
        self._reader = reader
        # The predicates that decide about a collective, as a set in order.
        self._used: dict[str, None] = {}

    @property
    def digest(self) -> str:
        return _hash(*self._used) if self._used else ""

    def body(self, closed: Any, inputs: Sequence[Origin]) -> list[Origin]:
        """Check one jaxpr; return its outputs' origins."""
        jaxpr = getattr(closed, "jaxpr", closed)
        consts = getattr(closed, "consts", ())
        known: dict[Any, Origin] = dict(zip(jaxpr.invars, inputs, strict=True))
        if len(consts) == len(jaxpr.constvars):
            for var, value in zip(jaxpr.constvars, consts, strict=True):
                known[var] = _constant(value)

        def origin(var: Any) -> Origin:
            return known.get(var) if compat.is_var(var) else _constant(var.val)

        for eqn in jaxpr.eqns:
            outs = self._equation(eqn, [origin(v) for v in eqn.invars])
            known.update(zip(eqn.outvars, outs, strict=True))
        return [origin(v) for v in jaxpr.outvars]

    def _equation(self, eqn: Any, inputs: list[Origin]) -> list[Origin]:
        name, count = eqn.primitive.name, len(eqn.outvars)
        if eqn.primitive is bucket_p or self._reader.uses_axis(eqn):
            if made := self._made_equal(eqn):
                where = f"{made} at {compat.source_line(eqn)}"
                return [_hash(where, str(k)) for k in range(count)]
            return [None] * count
        if compat.named(eqn) == mark_of(self._reader.comm):
            return [_hash(f"one rank at {compat.source_line(eqn)}")]
        if name == compat.COND:
            return self._cond(eqn, inputs)
        if name == compat.WHILE:
            return self._while(eqn, inputs)
        if name == compat.SCAN:
            return self._scan(eqn, inputs)
        bodies = compat.sub_jaxprs(eqn)
        if len(bodies) == 1 and len(bodies[0].invars) == len(inputs):
            outs = self.body(compat.closed(eqn, bodies[0]), inputs)
            if len(outs) == count:
                return outs
        for body in bodies:
            if any(map(self._reader.communicates, body.eqns)):
                self.body(body, [None] * len(body.invars))
        if bodies or None in inputs or eqn.effects or "callback" in name:
            return [None] * count
        params = _ADDRESS.sub("", compat.parameters(eqn))
        made = _hash(name, params, *[x or "" for x in inputs])
        return [_hash(made, str(k)) for k in range(count)]

    def _made_equal(self, eqn: Any) -> str:
        """Name a collective whose results are the same on all ranks; else ""."""
        if eqn.primitive is not bucket_p:
            name, grouped = eqn.primitive.name, compat.axis_groups(eqn)
            return name if name in EQUAL_RESULTS and not grouped else ""
        call = BoundBucket(**eqn.params)
        # What a subgroup has agreed on, another may not have.
        if not call.bucket.makes_equal or call.comm != self._reader.comm:
            return ""
        return f"{call.bucket.op} of {call.schedule.fingerprint}, bucket {call.index},"

    def _decide(self, eqn: Any, predicate: Origin, what: str) -> None:
        if predicate is None:
            raise self._divergent(eqn, what)
        self._used[predicate] = None

    def _divergent(self, eqn: Any, what: str) -> UnsupportedCollectiveError:
        return UnsupportedCollectiveError(
            f"{eqn.primitive.name} at {compat.source_line(eqn) or 'an unknown line'} "
            f"contains a collective over axis {self._reader.axis_name!r}, and {what} "
            "may differ between ranks: some would call it and wait for the others "
            f"forever. Make {what} equal on all ranks, for instance by lax.pmax over "
            "the axis, or move the collective out. If it is equal for a reason that "
            "the program does not show (a step counter that all ranks keep alike), say "
            "allow_divergent=True."
        )

    def _cond(self, eqn: Any, inputs: list[Origin]) -> list[Origin]:
        predicate, *operands = inputs
        branches = compat.branches(eqn)
        if self._reader.communicates(eqn):
            self._decide(eqn, predicate, "the predicate")
        outs = [self.body(branch, operands) for branch in branches]
        if predicate is None:
            return [None] * len(eqn.outvars)
        return [
            None if None in each else _hash(compat.COND, predicate, *map(str, each))
            for each in zip(*outs, strict=True)
        ]

    def _while(self, eqn: Any, inputs: list[Origin]) -> list[Origin]:
        test, step, n_cond, n_body = compat.while_loop(eqn)
        of_test, of_step = inputs[:n_cond], inputs[n_cond : n_cond + n_body]
        carry = self._steady(
            inputs[n_cond + n_body :], lambda state: self.body(step, [*of_step, *state])
        )
        (predicate,) = self.body(test, [*of_test, *carry])
        if self._reader.communicates(eqn):
            self._decide(eqn, predicate, "the condition")
        return carry if predicate is not None else [None] * len(carry)

    def _scan(self, eqn: Any, inputs: list[Origin]) -> list[Origin]:
        body, n_consts, n_carry, *_ = compat.scan(eqn)
        consts = inputs[:n_consts]
        xs = inputs[n_consts + n_carry :]
        carry = self._steady(
            inputs[n_consts : n_consts + n_carry],
            lambda state: self.body(body, [*consts, *state, *xs])[:n_carry],
        )
        ys = self.body(body, [*consts, *carry, *xs])[n_carry:]
        return [*carry, *ys]

    @staticmethod
    def _steady(
        init: list[Origin], step: Callable[[list[Origin]], list[Origin]]
    ) -> list[Origin]:
        """What of a loop's state is the same on all ranks in every iteration."""
        carry = list(init)
        while True:
            after = step(carry)
            lost = [
                a is None and b is not None for a, b in zip(after, carry, strict=True)
            ]
            if not any(lost):
                # Not the first iteration's alone: what the body does to it counts too.
                return [
                    None if b is None else _hash("loop", b, str(a))
                    for a, b in zip(after, carry, strict=True)
                ]
            carry = [None if gone else b for gone, b in zip(lost, carry, strict=True)]


def _constant(value: Any) -> Origin:
    try:
        array = np.asarray(value)
        content = hashlib.sha256(array.tobytes()).hexdigest()
        return _hash(str(array.dtype), str(array.shape), content)
    except (TypeError, ValueError):  # a key array, or nothing NumPy knows
        return None


def _hash(*texts: str) -> str:
    return hashlib.sha256("|".join(texts).encode()).hexdigest()
