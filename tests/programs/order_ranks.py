"""Collectives in every composition: one order on all ranks, and every call made.

mpiexec -n N python -m tests.programs.order_ranks WAY REPORT [ROW ...]

WAY says what a call is and what owns the program around it:

  bare      a bare all_reduce in the user's own jit
  nested    a decorated function in the user's own jit
  inside    a bare all_reduce in a decorated function
  inner     a decorated function in a decorated function
  axis      lax.psum over a decorated function's axis

Every row runs twice. First each rank gets the numbers that JAX gives for the same
function under vmap with a named axis. Then one rank drops the results of its calls,
which changes what it computes but not what is called: a call too few, or in another
order, is found by the sums that follow.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxcomm
from jaxcomm.errors import UnsupportedCollectiveError

AXIS = "ranks"
Call = Callable[[Any], Any]
Make = Callable[
    [Call, bool], tuple[Callable[..., Any], Callable[[int], tuple[Any, ...]]]
]
ROWS: dict[str, Make] = {}


def row(make: Make) -> Make:
    ROWS[make.__name__] = make
    return make


def vector(rank: int) -> Any:
    return jnp.arange(1.0, 4.0) + rank


def one(rank: int) -> tuple[Any, ...]:
    return (vector(rank),)


def two(rank: int) -> tuple[Any, ...]:
    return (jnp.stack([vector(rank), 2 * vector(rank)]),)


def choose(call: Call, drop: bool) -> Call:
    """Make a call that a rank may drop the result of."""

    def chosen(x: Any) -> Any:
        y = call(x)
        return 0.5 * x if drop else y

    return chosen


@row
def calls_in_a_row(call: Call, drop: bool):
    use = choose(call, drop)
    return lambda x: use(x) + use(2 * x) - use(x * x), one


@row
def inner_jit(call: Call, drop: bool):
    use = jax.jit(choose(call, drop))
    return lambda x: use(x) + 3 * use(2 * x), one


@row
def scan(call: Call, drop: bool):
    use = choose(call, drop)

    def run(x):
        carry, ys = lax.scan(lambda c, t: (0.1 * use(c + t), c), x, jnp.arange(4.0))
        return carry + ys.sum(0)

    return run, one


@row
def scan_of_a_constant(call: Call, drop: bool):
    use = choose(call, drop)

    def run(x):
        return lax.scan(lambda c, t: (c + t * use(2 * x), None), x, jnp.arange(4.0))[0]

    return run, one


@row
def while_loop(call: Call, drop: bool):
    use = choose(call, drop)

    def run(x):
        def body(state):
            return state[0] + 1, 0.5 * use(state[1])

        return lax.while_loop(lambda state: state[0] < 3, body, (0, x))[1]

    return run, one


@row
def cond(call: Call, drop: bool):
    use = choose(call, drop)

    def run(x):
        def branches(k, v):
            return lax.cond(k > 0, lambda: use(v), lambda: use(2 * v) - use(v))

        return branches(jnp.int32(1), x) + branches(jnp.int32(0), x)

    return run, one


@row
def lax_map(call: Call, drop: bool):
    use = choose(call, drop)
    return lambda xs: lax.map(use, xs), two


@row
def vmap(call: Call, drop: bool):
    use = choose(call, drop)
    return jax.vmap(lambda x: use(x) + use(x * x)), two


@row
def vmap_of_scan(call: Call, drop: bool):
    run, _ = scan(call, drop)
    return jax.vmap(run), two


@row
def vmap_of_while_loop(call: Call, drop: bool):
    run, _ = while_loop(call, drop)
    return jax.vmap(run), two


@row
def vmap_of_cond(call: Call, drop: bool):
    use = choose(call, drop)

    def run(k, x):
        return lax.cond(k > 0, lambda: use(x), lambda: use(2 * x))

    return lambda xs: jax.vmap(run)(jnp.arange(2), xs), two


def _scalar(call: Call) -> Callable[[Any], Any]:
    return lambda x: jnp.sum(call(x * x) ** 2)


@row
def grad(call: Call, drop: bool):
    return jax.grad(_scalar(choose(call, drop))), one


@row
def grad_that_stops(call: Call, drop: bool):
    use = choose(call, drop)
    return jax.grad(lambda x: jnp.sum(lax.stop_gradient(use(x * x)) * x)), one


@row
def grad_of_nothing(call: Call, drop: bool):
    # On the rank that drops it, the backward pass has no cotangent for the call.
    def loss(x):
        y = call(x * x)
        return jnp.sum(x * x if drop else x * y)

    return jax.grad(loss), one


def _in_a_scan(call: Call, drop: bool, stop: bool, constant: bool):
    def loss(x):
        def body(c, t):
            y = call((x if constant else c) * (2.0 if constant else t))
            y = lax.stop_gradient(y) if stop else y
            return 0.9 * c if drop else 0.1 * (c + y), None

        return jnp.sum(lax.scan(body, x, jnp.arange(1.0, 4.0))[0])

    return jax.grad(loss), one


@row
def grad_of_scan(call: Call, drop: bool):
    return _in_a_scan(call, drop, stop=False, constant=False)


@row
def grad_of_scan_that_stops(call: Call, drop: bool):
    return _in_a_scan(call, drop, stop=True, constant=False)


@row
def grad_of_scan_of_a_constant(call: Call, drop: bool):
    return _in_a_scan(call, drop, stop=False, constant=True)


@row
def grad_of_scan_of_a_constant_that_stops(call: Call, drop: bool):
    return _in_a_scan(call, drop, stop=True, constant=True)


@row
def grad_of_cond(call: Call, drop: bool):
    run, arguments = cond(call, drop)
    return jax.grad(lambda x: jnp.sum(run(x) ** 2)), arguments


@row
def grad_of_vmap(call: Call, drop: bool):
    run, arguments = vmap(call, drop)
    return jax.grad(lambda xs: jnp.sum(run(xs) ** 2)), arguments


@row
def vmap_of_grad(call: Call, drop: bool):
    # The backward call of a dropped result has no batch: another shape, refused.
    return jax.vmap(jax.grad(_scalar(call))), two


@row
def jvp(call: Call, drop: bool):
    use = choose(call, drop)
    return lambda x: jax.jvp(lambda y: use(y * y), (x,), (2 * x,)), one


@row
def hessian(call: Call, drop: bool):
    # Of a dropped result there is no second derivative: another program, refused.
    return jax.hessian(_scalar(call)), one


def _layers(call: Call, drop: bool):
    use = choose(call, drop)
    return jax.checkpoint(lambda w, h: jnp.tanh(0.01 * use(w) * h))


@row
def checkpoint(call: Call, drop: bool):
    layer = _layers(call, drop)

    def loss(ws):
        h = jnp.ones(3)
        for k in range(2):
            h = layer(ws[k], h)
        return jnp.sum(h)

    return jax.grad(loss), two


@row
def checkpoint_in_scan(call: Call, drop: bool):
    layer = _layers(call, drop)

    def loss(ws):
        return jnp.sum(lax.scan(lambda h, w: (layer(w, h), None), jnp.ones(3), ws)[0])

    return jax.grad(loss), two


@row
def custom_vjp(call: Call, drop: bool):
    use = choose(call, drop)

    @jax.custom_vjp
    def function(x):
        return use(x)

    function.defvjp(lambda x: (use(x), x), lambda x, ct: (use(ct * x),))
    return jax.grad(lambda x: jnp.sum(function(x) ** 2)), one


@row
def custom_jvp(call: Call, drop: bool):
    use = choose(call, drop)

    @jax.custom_jvp
    def function(x):
        return use(x)

    @function.defjvp
    def _(primals, tangents):
        return use(primals[0]), 3 * use(tangents[0])

    return jax.grad(lambda x: jnp.sum(function(x) ** 2)), one


def ways(comm: Any) -> dict[str, tuple[Call, Callable[..., Any]]]:
    def bare(x: Any) -> Any:
        return jaxcomm.all_reduce(x, op="sum")

    def over_axis(x: Any) -> Any:
        return lax.psum(x, "batch")

    step = jaxcomm.data_parallel(over_axis)
    return {
        "bare": (bare, jax.jit),
        "nested": (step, jax.jit),
        "inside": (bare, jaxcomm.data_parallel),
        "inner": (step, jaxcomm.data_parallel(axis_name="outer")),
        "axis": (over_axis, jaxcomm.data_parallel),
    }


def check_values(make: Make, call: Call, own: Callable[..., Any], comm: Any) -> None:
    function, arguments = make(call, False)
    got = own(function)(*arguments(comm.rank))
    function, _ = make(lambda x: lax.psum(x, AXIS), False)
    every = [arguments(rank) for rank in range(comm.size)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *every)
    want = jax.tree.map(
        lambda leaf: leaf[comm.rank],
        jax.jit(jax.vmap(function, axis_name=AXIS))(*stacked),
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def check_calls(make: Make, call: Call, own: Callable[..., Any], comm: Any) -> None:
    function, arguments = make(call, comm.rank == comm.size - 1)
    jax.block_until_ready(own(function)(*arguments(comm.rank)))
    for k in range(3):  # a call too few would meet one of these
        total = jaxcomm.all_reduce(jnp.float32(100 * k + comm.rank), op="sum")
        assert total == sum(100 * k + r for r in range(comm.size)), total


def check_linear_solve(
    way: str, call: Call, own: Callable[..., Any], comm: Any
) -> None:
    """JAX has no order for calls inside this primitive, but where it is only run."""

    def run(b):
        return lax.custom_linear_solve(lambda v: 2 * v, b, lambda _, v: call(v) / 2)

    x = vector(comm.rank)
    if way in ("bare", "nested"):
        want = sum(vector(rank) for rank in range(comm.size))
        np.testing.assert_allclose(own(run)(x), want / 2)
        return
    try:
        own(run)(x)
    except UnsupportedCollectiveError as error:
        assert "custom_linear_solve" in str(error)
        assert "order_ranks.py" in str(error)
    else:
        raise AssertionError("a call inside custom_linear_solve was accepted")


def main(way: str, report: str, rows: list[str]) -> None:
    comm = jaxcomm.init()
    call, own = ways(comm)[way]
    found = {}
    for name, make in ROWS.items():
        if rows and name not in rows:
            continue
        found[name] = ""
        try:
            check_values(make, call, own, comm)
            # What a reduction over an axis depends on is part of the schedule.
            if way != "axis":
                check_calls(make, call, own, comm)
        except Exception:
            found[name] = traceback.format_exc()
            print(
                f"rank {comm.rank}, {name}:", found[name], file=sys.stderr, flush=True
            )
    if not rows:
        check_linear_solve(way, call, own, comm)
    everyone = comm.all_gather_object(found)
    if comm.rank == 0:
        Path(report).write_text(json.dumps(everyone))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
