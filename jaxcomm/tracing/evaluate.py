"""Evaluate a planned function under the current trace, threading the token.

Internal to `rewrite`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from jaxcomm import compat
from jaxcomm.errors import UnsupportedCollectiveError
from jaxcomm.planning.schedule import Schedule
from jaxcomm.ranks.communicator import Communicator
from jaxcomm.supervision import timeline
from jaxcomm.tracing.primitives import bind_bucket, mark
from jaxcomm.tracing.reading import Body, Unit
from jaxcomm.transports.base import local_result


class Evaluator:
    """Evaluates planned bodies under the current trace, threading the token.

    With None for a token nothing is threaded: each call has the effect instead.
    """

    def __init__(self, schedule: Schedule, comm: Communicator):
        self.schedule = schedule
        self.comm = comm

    def body(
        self, body: Body, token: Any, args: Sequence[Any]
    ) -> tuple[list[Any], Any]:
        env: dict[Any, Any] = {}
        env.update(zip(body.constvars, body.consts, strict=True))
        env.update(zip(body.invars, args, strict=True))

        def read(var: Any) -> Any:
            return env[var] if compat.is_var(var) else var.val

        for unit in body.units:
            values = [read(v) for v in unit.inputs]
            if unit.kind == "equation":
                results = compat.eval_eqn(unit.eqn, values)
            elif unit.function is not None:
                results = [unit.function(*values)]
            elif unit.kind == "bucket":
                results, token = self._bucket(unit.index, values, token)
            elif unit.kind == "foreign":
                results, token = bind_bucket(values, token, **unit.eqn.params)
            else:
                results, token = self._threaded(unit, values, token)
            env.update(zip(unit.outputs, results, strict=True))
        return [read(v) for v in body.outvars], token

    def _bucket(
        self, index: int, values: Sequence[Any], token: Any
    ) -> tuple[list[Any], Any]:
        if self.comm.alone:
            bucket = self.schedule.buckets[index]
            return [local_result(bucket, value) for value in values], token
        marks = timeline.wanted() and self.comm.backend.marks_operands
        if marks and token is not None:
            token = mark(values, token, self.comm, self.schedule, index)
        return bind_bucket(values, token, self.comm, self.schedule, index)

    def _threaded(
        self, unit: Unit, values: Sequence[Any], token: Any
    ) -> tuple[list[Any], Any]:
        name = unit.eqn.primitive.name
        if name == compat.SCAN:
            return self._scan(unit, values, token)
        if name == compat.WHILE:
            return self._while(unit, values, token)
        if name == compat.COND:
            index, *operands = values
            branches = [self._caller(body) for body in unit.bodies]
            token, results = lax.switch(index, branches, token, operands)
            return list(results), token
        _, prevent_cse, policy = compat.checkpoint(unit.eqn)
        run = jax.checkpoint(
            self._caller(unit.bodies[0]), prevent_cse=prevent_cse, policy=policy
        )
        token, results = run(token, list(values))
        return list(results), token

    def _caller(self, body: Body) -> Callable[..., Any]:
        def call(token: Any, args: Sequence[Any]) -> tuple[Any, list[Any]]:
            results, token = self.body(body, token, args)
            return token, results

        return call

    def _scan(
        self, unit: Unit, values: Sequence[Any], token: Any
    ) -> tuple[list[Any], Any]:
        (body,) = unit.bodies
        _, n_consts, n_carry, length, reverse, unroll = compat.scan(unit.eqn)
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
            length=length,
            reverse=reverse,
            unroll=unroll,
        )
        return [*carry, *ys], token

    def _while(
        self, unit: Unit, values: Sequence[Any], token: Any
    ) -> tuple[list[Any], Any]:
        _, _, n_cond, n_body = compat.while_loop(unit.eqn)
        cond_consts = list(values[:n_cond])
        body_consts = list(values[n_cond : n_cond + n_body])
        init = list(values[n_cond + n_body :])
        test, step = unit.bodies
        if any(unit.kind in ("bucket", "foreign", "body") for unit in test.units):
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
