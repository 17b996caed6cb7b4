"""Checks of bare collectives under JAX's transformations; see `conformance.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxcomm
from jaxcomm.errors import InvalidOptionError
from jaxcomm.ranks.communicator import Communicator
from tests.programs.references import close, raises, same


def check_grad(comm: Communicator) -> None:
    n, x = comm.size, jnp.arange(4.0) + comm.rank
    loss = jax.jit(jax.grad(lambda v: jaxcomm.all_reduce(v * v, op="sum").sum()))
    close(loss(x), 2 * x * n)
    mean = jax.grad(lambda v: jaxcomm.all_reduce(v * v, op="mean").sum())
    close(mean(x), 2 * x)
    close(
        jax.jvp(lambda v: jaxcomm.all_reduce(v, op="sum"), (x,), (x,))[1],
        sum(np.arange(4.0) + r for r in range(n)),
    )
    if comm.transport != "local":
        raises(
            InvalidOptionError,
            "differentiable",
            lambda: jax.grad(lambda v: jaxcomm.all_reduce(v, op="max").sum())(x),
        )


def check_vmap(comm: Communicator) -> None:
    total = sum(r + 1 for r in range(comm.size))
    x = jnp.ones((3, 5)) * (comm.rank + 1)

    def f(a: Any, b: Any) -> Any:
        return jaxcomm.all_reduce({"a": a, "b": b}, op="sum")

    out = jax.jit(jax.vmap(f, in_axes=(1, None)))(x, jnp.ones(2))
    same(out["a"], np.full((5, 3), total))
    same(out["b"], np.full((5, 2), comm.size))


def check_control_flow(comm: Communicator) -> None:
    n = comm.size
    total = sum(r + 1.0 for r in range(n))
    x = jnp.ones(3) * (comm.rank + 1)

    def everything(x: Any, reduce: Callable[[Any], Any]) -> Any:
        carry, ys = lax.scan(
            lambda c, t: (c + reduce(t), reduce(2 * t)), jnp.zeros(()), x
        )
        _, w = lax.while_loop(
            lambda s: s[0] < 3, lambda s: (s[0] + 1, reduce(s[1])), (0, x)
        )
        chosen = lax.cond(x.shape[0] > 2, reduce, lambda v: v, x)
        switched = lax.switch(jnp.int32(1), [lambda v: v, reduce], x)
        looped = lax.fori_loop(0, 2, lambda _, v: reduce(v), x)
        ckpt = jax.checkpoint(lambda u: jnp.sin(reduce(jnp.sin(u))))
        grad = jax.grad(lambda v: ckpt(v).sum())(x)
        return carry, ys, w, chosen, switched, looped, grad

    expected = (3 * total, np.full(3, 2 * total), np.full(3, total * n * n))
    bare = jax.jit(lambda x: everything(x, lambda t: jaxcomm.all_reduce(t, op="sum")))
    decorated = jaxcomm.data_parallel(
        lambda x: everything(x, lambda t: lax.psum(t, "batch"))
    )
    for out in (bare(x), decorated(x)):
        for got, want in zip(out[:3], expected, strict=True):
            same(got, want)
        same(out[3], np.full(3, total))
        same(out[4], np.full(3, total))
        same(out[5], np.full(3, total * n))
        sine = sum(np.sin(r + 1.0) for r in range(n))
        cosines = sum(np.cos(sine) for _ in range(n))
        close(out[6], np.full(3, cosines * np.cos(comm.rank + 1.0)), rtol=1e-5)


def check_custom_derivatives(comm: Communicator) -> None:
    @jax.custom_vjp
    def double(x: Any) -> Any:
        return 2 * jaxcomm.all_reduce(x, op="sum")

    double.defvjp(
        lambda x: (double(x), None), lambda _, g: (jaxcomm.all_reduce(3 * g, op="sum"),)
    )
    x = jnp.ones(2)
    close(jax.jit(jax.grad(lambda v: double(v).sum()))(x), np.full(2, 3.0 * comm.size))
    step = jaxcomm.data_parallel(
        lambda v: (double(v), jax.grad(lambda u: double(u).sum())(v))
    )
    close(step(x)[1], np.full(2, 3.0 * comm.size))
    close(step(x)[0], np.full(2, 2.0 * comm.size))
