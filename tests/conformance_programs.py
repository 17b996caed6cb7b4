"""Checks of whole programs: order, schedules, arguments; see `conformance.py`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from references import applies, close, raises, same

import jaxcomm
from jaxcomm.communicator import Communicator
from jaxcomm.errors import InvalidOptionError


def check_calls_live_whatever_is_used(comm: Communicator) -> None:
    x = jnp.ones(4)

    @jaxcomm.data_parallel
    def step(v: Any) -> Any:
        total = lax.psum(v, "batch")
        return total if comm.rank == 0 else v

    @jax.jit
    def bare(v: Any) -> Any:
        total = jaxcomm.all_reduce(v, op="sum")
        return total if comm.rank == 0 else v

    for _ in range(3):
        jax.block_until_ready((step(x), bare(x)))


def check_independent_calls_keep_their_order(comm: Communicator) -> None:
    # One rank's first operand comes late: without a fixed order its second call
    # would overtake.
    slow = 200 if comm.rank == 0 else 1

    def work(v: Any) -> Any:
        return lax.fori_loop(0, slow, lambda _, a: jnp.tanh(a @ a.T), v)

    matrix = jnp.eye(64)
    small = jnp.ones(3)

    @jaxcomm.data_parallel
    def step(a: Any, b: Any) -> Any:
        return lax.psum(work(a), "batch"), lax.pmax(b, "batch"), lax.psum(b, "batch")

    @jax.jit
    def bare(a: Any, b: Any) -> Any:
        return jaxcomm.all_reduce(work(a)), jaxcomm.all_reduce(b, op="sum")

    for _ in range(5):
        same(step(matrix, small)[2], np.full(3, comm.size))
        same(bare(matrix, small)[1], np.full(3, comm.size))


def check_data_parallel_has_no_effects(comm: Communicator) -> None:
    @jaxcomm.data_parallel
    def step(x: Any) -> Any:
        return jaxcomm.all_reduce(lax.pmean(x, "batch"))

    x = jnp.ones(3)
    assert not jax.make_jaxpr(step)(x).effects
    same(step(x), np.ones(3))


def check_programs_are_identical(comm: Communicator) -> None:
    applies(comm.transport != "mpi4jax", "it writes MPI handles into its programs")

    @jaxcomm.data_parallel
    def step(x: Any) -> Any:
        return lax.pmean(x * 2, "batch"), lax.psum(x.sum(), "batch")

    text = step.lower(jnp.ones((4, 5))).as_text()
    assert len(set(comm.all_gather_object(text))) == 1
    assert len(set(comm.all_gather_object(step.schedule.to_json()))) == 1


def check_sync_batch_norm_schedule(comm: Communicator) -> None:
    def loss(p: Any, x: Any) -> Any:
        h = x @ p["w1"]
        h = jnp.tanh(h - lax.pmean(h.mean(0), "batch"))
        h = h @ p["w2"]
        return ((h - lax.pmean(h.mean(0), "batch")) ** 2).mean()

    def step(p: Any, x: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(p, x)
        return lax.pmean((grads, value), "batch")

    rng = np.random.default_rng(5)
    params = {
        "w1": jnp.asarray(rng.normal(size=(4, 5)), jnp.float32),
        "w2": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32),
    }
    data = jnp.asarray(rng.normal(size=(comm.size, 6, 4)), jnp.float32)
    fn = jaxcomm.data_parallel(step)
    grads, value = fn(params, data[comm.rank])
    # vmap over an axis of that name is the same program on one device.
    alone = jax.jit(jax.vmap(step, in_axes=(None, 0), axis_name="batch"))
    want = alone(params, data)
    jax.tree.map(
        lambda a, b: close(a, b[comm.rank], rtol=2e-5, atol=1e-6), (grads, value), want
    )
    stages = [bucket.stage for bucket in fn.schedule.buckets]
    assert stages == sorted(stages) and len(set(stages)) == 5, stages
    paths = {leaf.path for leaf in fn.schedule.leaves}
    assert {"[0]['w1']", "[0]['w2']"} <= paths, paths


def check_mean_is_one_call(comm: Communicator) -> None:
    @jaxcomm.data_parallel
    def step(tree: Any) -> Any:
        return jax.jit(lambda t: lax.pmean(t, "batch"))(tree), lax.psum(
            tree[0], "batch"
        )

    tree = [jnp.ones(3) * comm.rank, jnp.ones((2, 2))]
    (mean, _), total = step(tree)
    same(mean, np.full(3, (comm.size - 1) / 2))
    same(total, np.full(3, comm.size * (comm.size - 1) / 2))
    ops = [bucket.op for bucket in step.schedule.buckets]
    assert sorted(ops) == ["mean", "sum"], ops


def check_same_body_called_twice(comm: Communicator) -> None:
    inner = jax.jit(lambda v: lax.psum(v, "batch"))

    @jaxcomm.data_parallel
    def step(x: Any) -> Any:
        return inner(x), inner(inner(x) + x)

    x = jnp.ones(2)
    once, twice = step(x)
    same(once, np.full(2, comm.size))
    same(twice, np.full(2, comm.size * (comm.size + 1)))


def check_donation_and_static_arguments(comm: Communicator) -> None:
    @jaxcomm.data_parallel(donate_argnums=0, static_argnums=2)
    def step(state: Any, x: Any, power: int, *, scale: Any) -> Any:
        return state + lax.psum(x**power, "batch") * scale

    state = jnp.ones(1000)
    out = step(state, jnp.full(1000, 2.0), 3, scale=jnp.float32(0.5))
    same(out, np.full(1000, 1 + 8 * comm.size * 0.5))
    assert state.is_deleted()
    step(out, jnp.ones(1000), 2, scale=jnp.float32(1))
    assert len(step.schedules) == 2


def check_under_and_over_jit(comm: Communicator) -> None:
    n = comm.size
    over = jaxcomm.data_parallel(jax.jit(lambda x: lax.psum(x, "batch")))
    under = jax.jit(jaxcomm.data_parallel(lambda x: lax.psum(x, "batch")))
    x = jnp.ones(5)
    same(over(x), np.full(5, n))
    same(under(x), np.full(5, n))
    outside = jax.grad(lambda v: over(v * v).sum())
    close(outside(x), 2 * n * np.ones(5))

    class Model:
        @jaxcomm.data_parallel(static_argnums=0)
        def step(self, x: Any) -> Any:
            return lax.psum(x, "batch")

    same(Model().step(x), np.full(5, n))


def check_optax(comm: Communicator) -> None:
    import optax

    tx = jaxcomm.optax.distribute(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    )
    plain = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    params = {"w": jnp.ones(3), "b": jnp.zeros(())}
    mine = {"w": jnp.full(3, comm.rank + 1.0), "b": jnp.float32(comm.rank)}
    mean = {"w": np.full(3, (comm.size + 1) / 2), "b": np.float32((comm.size - 1) / 2)}
    out, _ = jax.jit(tx.update)(mine, tx.init(params), params)
    want, _ = plain.update(jax.tree.map(jnp.float32, mean), plain.init(params), params)
    jax.tree.map(lambda a, b: close(a, b, rtol=1e-6), out, want)
    raises(
        InvalidOptionError,
        "bucket_bytes",
        lambda: jaxcomm.optax.distribute(tx, bucket_bytes=0),
    )


def check_lowering_alone_does_not_wait(comm: Communicator) -> None:
    @jaxcomm.data_parallel
    def step(x: Any) -> Any:
        return lax.psum(x, "batch")

    x = jnp.ones((7, 3))
    if comm.rank == 0:
        step.lower(x).compile()
        jax.eval_shape(step, x)
        jax.jit(jaxcomm.all_reduce).lower(x)
    same(step(x), np.full((7, 3), comm.size))
