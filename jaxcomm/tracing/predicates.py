"""Which values of a program are the same on all ranks, and where that must be so.

A collective inside `cond` or `while_loop` is only met by all ranks if all take the same
way. `check_predicates` follows every predicate that decides about a collective back to
where it comes from: literals, constants and what a collective has made equal are the
same on all ranks, and so is what is computed from these alone. Of a function's
arguments those count that are declared so, or that the function gives back equal if it
was given them equal, as it does with a step counter; their first values are compared.

Literals and constants are those of this rank's trace. So that ranks with other ones
are found, a digest of what every such predicate is made of goes into the schedule,
which the ranks compare before its first byte moves.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcomm import compat
from jaxcomm.errors import UnsupportedCollectiveError
from jaxcomm.tracing.primitives import BoundBucket, bucket_p, mark_of, rank_p
from jaxcomm.tracing.reading import EQUAL_RESULTS, Reader


class Known(NamedTuple):
    """How a value that is the same on all ranks came about.

    Attributes:
      digest: of what it is made of.
      inputs: which of the function's arguments must be the same for that.
    """

    digest: str
    inputs: frozenset[int] = frozenset()


Origin = Known | None  # None: nothing is known
_ADDRESS = re.compile(r"0x[0-9a-f]+")


class Checked(NamedTuple):
    """What `check_predicates` has found.

    Attributes:
      digest: of what the predicates are made of; "" where nothing depends on any.
      inputs: the arguments that must be the same on all ranks.
    """

    digest: str = ""
    inputs: frozenset[int] = frozenset()


def check_predicates(closed: Any, reader: Reader, inputs: Collection[int]) -> Checked:
    """Refuse collectives under predicates that may differ between ranks.

    Args:
      closed: the function's jaxpr.
      reader: the function's.
      inputs: arguments that are the same on all ranks.

    Raises:
      UnsupportedCollectiveError: for the first equation that may divide the ranks.
    """
    checker = _Checker(reader)
    checker.body(closed, _origins(closed, inputs))
    return Checked(checker.digest, checker.inputs)


def equal_results(closed: Any, reader: Reader, inputs: Collection[int]) -> list[Origin]:
    """Tell why each result is the same on all ranks if these arguments are."""
    checker = _Checker(reader, refuses=False)
    return checker.body(closed, _origins(closed, inputs))


def kept_equal(
    closed: Any, reader: Reader, declared: Collection[int], carried: Mapping[int, int]
) -> frozenset[int]:
    """Find arguments that are the same on all ranks in every call, if in the first.

    Results that a collective makes equal whatever it is given tell nothing of the
    arguments at their place.

    Args:
      closed: the function's jaxpr.
      reader: the function's.
      declared: arguments that are said to be.
      carried: arguments, and the results that the next call is given for them.
    """
    kept = frozenset({*declared, *carried})
    while True:
        results = equal_results(closed, reader, kept)
        lost = set[int]()
        for k in kept - set(declared):
            result = results[carried[k]]
            if result is None or k not in result.inputs:
                lost.add(k)
        if not lost:
            return kept
        kept -= lost


def _origins(closed: Any, inputs: Collection[int]) -> list[Origin]:
    return [
        Known(_hash(f"argument {k}"), frozenset({k})) if k in inputs else None
        for k in range(len(closed.jaxpr.invars))
    ]


class _Checker:
    """Follows values through a program, and finds predicates that may differ."""

    def __init__(self, reader: Reader, *, refuses: bool = True):
        self._reader = reader
        self._refuses = refuses
        # The predicates that decide about a collective, as a set in order.
        self._used: dict[Known, None] = {}

    @property
    def digest(self) -> str:
        return _hash(*(known.digest for known in self._used)) if self._used else ""

    @property
    def inputs(self) -> frozenset[int]:
        return frozenset[int]().union(*(known.inputs for known in self._used))

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
                return [_made(where, str(k)) for k in range(count)]
            return [None] * count
        if eqn.primitive is rank_p:  # of a decorated function that was called inside
            return [None]
        if compat.named(eqn) == mark_of(self._reader.comm):
            return [_made(f"one rank at {compat.source_line(eqn)}")]
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
        made = _made(name, params, *inputs)
        return [_made(made, str(k)) for k in range(count)]

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
        if predicate is not None:
            self._used[predicate] = None
        elif self._refuses:
            raise self._divergent(eqn, what)

    def _divergent(self, eqn: Any, what: str) -> UnsupportedCollectiveError:
        return UnsupportedCollectiveError(
            f"{eqn.primitive.name} at {compat.source_line(eqn) or 'an unknown line'} "
            f"contains a collective over axis {self._reader.axis_name!r}, and {what} "
            "may differ between ranks: some would call it and wait for the others "
            f"forever. Make {what} equal on all ranks, for instance by lax.pmax over "
            "the axis, or move the collective out. If it is equal for a reason that "
            "the program does not show, say allow_divergent=True. Of arguments those "
            "count as equal that pmap maps over None or shard_map over P(), or that "
            "the function gives back at the same place of the same structure, as it "
            "does with a step counter; but not where it is called in another program."
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
            None if None in each else _made(compat.COND, predicate, *each)
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
                    None if b is None else _made("loop", b, a)
                    for a, b in zip(after, carry, strict=True)
                ]
            carry = [None if gone else b for gone, b in zip(lost, carry, strict=True)]


def _constant(value: Any) -> Origin:
    try:
        array = np.asarray(value)
        content = hashlib.sha256(array.tobytes()).hexdigest()
        return _made(str(array.dtype), str(array.shape), content)
    except (TypeError, ValueError):  # a key array, or nothing NumPy knows
        return None


def _made(*parts: str | Origin) -> Known:
    """Say how a value came about, of texts and of values that it was made of."""
    known = [part for part in parts if isinstance(part, Known)]
    texts = [part.digest if isinstance(part, Known) else str(part) for part in parts]
    return Known(
        _hash(*texts), frozenset[int]().union(*(part.inputs for part in known))
    )


def _hash(*texts: str) -> str:
    return hashlib.sha256("|".join(texts).encode()).hexdigest()
