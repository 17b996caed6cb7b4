"""Checks of whole programs: order, schedules, arguments; see `conformance.py`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxcomm
from jaxcomm.errors import InvalidOptionError, UnsupportedCollectiveError
from jaxcomm.ranks.communicator import Communicator
from tests.programs.references import applies, close, raises, same


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
    assert not step.trace(x).jaxpr.effects  # as the program that it is at the top
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


def check_a_part_of_a_grouped_sum_is_no_mean(comm: Communicator) -> None:
    # A sum over groups, divided by the number of all ranks.
    half = max(comm.size // 2, 1)
    ranks = list(range(comm.size))
    groups = [ranks[i : i + half] for i in range(0, comm.size, half)]

    @jaxcomm.data_parallel
    def step(x: Any) -> Any:
        grouped = lax.psum(x, "batch", axis_index_groups=groups) / comm.size
        return grouped, lax.psum(x, "batch") / half, lax.psum(x, "batch") / comm.size

    mine = next(group for group in groups if comm.rank in group)
    grouped, other, mean = step(jnp.full(3, comm.rank + 1.0))
    total = sum(rank + 1.0 for rank in ranks)
    # Thirds are rounded.
    close(grouped, np.full(3, sum(rank + 1.0 for rank in mine) / comm.size), rtol=1e-6)
    same(other, np.full(3, total / half))
    close(mean, np.full(3, total / comm.size), rtol=1e-6)
    found = {(bool(b.groups), b.op) for b in step.schedule.buckets}
    assert (True, "mean") not in found and (False, "mean") in found, found


def check_predicates_that_collectives_make(comm: Communicator) -> None:
    everyone = list(range(comm.size))
    flag = jnp.ones((comm.size, 1), jnp.int32)

    def decided_by(make: Any) -> Any:
        @jaxcomm.data_parallel
        def step(x: Any, flag: Any) -> Any:
            chosen = jnp.sum(make(flag)) > 0
            return lax.cond(chosen, lambda v: lax.psum(v, "batch"), lambda v: v, x)

        return step

    def reduced(op: str) -> Any:
        return lambda v: jaxcomm.all_reduce(v, op=op)

    equal: dict[str, Any] = {
        **{op: reduced(op) for op in ("mean", "sum", "min", "max", "prod")},
        "a tree": lambda v: jaxcomm.all_reduce({"a": v, "b": v + 1})["b"],
        "weighted": lambda v: jaxcomm.all_reduce(v + 0.0, weight=2.0),
        "broadcast": lambda v: jaxcomm.broadcast(v, root=0),
        "all_gather": jaxcomm.all_gather,
        "inside jit": jax.jit(lambda v: jaxcomm.all_reduce(v, op="max") + 1),
        "under scan": lambda v: lax.scan(
            lambda c, _: (jaxcomm.all_reduce(c, op="max"), None),
            jaxcomm.all_reduce(v, op="max"),
            length=2,
        )[0],
        "lax.pmin": lambda v: lax.pmin(v, "batch"),
        "lax.all_gather": lambda v: lax.all_gather(v, "batch"),
    }
    for name, make in equal.items():
        out = decided_by(make)(jnp.ones(2), flag)
        np.testing.assert_array_equal(out, np.full(2, comm.size), err_msg=name)

    shift = [(rank, (rank + 1) % comm.size) for rank in everyone]
    alone = [[rank] for rank in everyone]
    other = comm.subgroup(everyone)
    unequal: dict[str, Any] = {
        "the data itself": lambda v: v,
        "ppermute": lambda v: lax.ppermute(v, "batch", shift),
        "all_to_all": lambda v: lax.all_to_all(v, "batch", 0, 0),
        "psum_scatter": lambda v: lax.psum_scatter(v, "batch"),
        "grouped psum": lambda v: lax.psum(v, "batch", axis_index_groups=alone),
        "grouped all_gather": lambda v: lax.all_gather(
            v, "batch", axis_index_groups=alone
        ),
        "grouped pmax": lambda v: lax.pmax(v, "batch", axis_index_groups=alone),
        "axis_index": lambda v: v + lax.axis_index("batch"),
        "reduce_scatter": jaxcomm.reduce_scatter,
        "exchange": lambda v: jaxcomm.all_to_all(v, split_axis=0, concat_axis=0),
        "mixed": lambda v: v * jaxcomm.all_reduce(v, op="max"),
        "another communicator": lambda v: jaxcomm.all_reduce(v, op="max", comm=other),
    }
    for name, make in unequal.items():
        try:
            decided_by(make).lower(jnp.ones(2), flag)
        except UnsupportedCollectiveError as error:
            assert "the predicate may differ between ranks" in str(error), (name, error)
        else:
            raise AssertionError(f"{name} was accepted")


def check_equal_predicates_are_told_apart(comm: Communicator) -> None:
    # They stand on lines of their own, by which ranks that take others are found out.
    def step(x: Any, which: bool) -> Any:
        a = jaxcomm.all_reduce(x.sum(), op="max")
        b = jaxcomm.all_reduce(x.sum(), op="max")
        keep = a if which else b
        return lax.cond(keep > 0, lambda v: lax.psum(v, "batch"), lambda v: v, x)

    found = []
    for which in (True, False, True):
        decorated = jaxcomm.data_parallel(step, static_argnums=1)
        decorated.lower(jnp.ones(3), which)
        found.append(decorated.schedule.fingerprint)
    assert found[0] == found[2] != found[1]


def check_equal_results_can_be_transformed(comm: Communicator) -> None:
    x = jnp.arange(3.0)

    def loss(v: Any) -> Any:
        return jaxcomm.all_reduce(v * v, op="sum").sum()

    for grad in (jax.grad(loss), jax.jit(jax.grad(loss))):
        close(grad(x), 2 * comm.size * x)
    rows = jax.jit(jax.vmap(lambda v: jaxcomm.all_reduce(v, op="sum")))(x[:, None])
    same(rows, comm.size * x[:, None])
    counts = jax.jit(lambda v: jaxcomm.all_reduce(v, op="max"))(jnp.arange(3))
    assert counts.dtype == jnp.arange(3).dtype
    same(counts, np.arange(3))


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

    model = Model()
    same(model.step(x), np.full(5, n))
    # A bound method has what the function has.
    assert model.step.schedule is Model.step.schedule
    assert model.step.schedules == Model.step.schedules
    assert "func.func public @main" in model.step.lower(x).as_text()
    assert model.step.trace(x).jaxpr.out_avals[0].shape == (5,)
    model.step.clear_cache()
    same(model.step(x), np.full(5, n))
    assert len(model.step.schedules) == 2


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
    half = jaxcomm.optax.distribute(optax.sgd(1.0), weight=float(comm.rank + 1))
    steps: Any = half.update(mine, half.init(params), params)[0]
    weights = np.arange(1.0, comm.size + 1)
    close(steps["w"], np.full(3, -(weights**2).sum() / weights.sum()), rtol=1e-6)
    bad: dict[str, tuple[type[Exception], dict[str, Any]]] = {
        "bucket_bytes=0": (InvalidOptionError, {"bucket_bytes": 0}),
        "op='median'": (InvalidOptionError, {"op": "median"}),
        "groups=0": (InvalidOptionError, {"groups": 0}),
        "wire_dtype='float32': use one of": (
            InvalidOptionError,
            {"wire_dtype": "float32"},
        ),
        "wire_dtype='f8'": (InvalidOptionError, {"wire_dtype": "f8"}),
        "comm=3; give a communicator": (InvalidOptionError, {"comm": 3}),
        "weight has shape": (InvalidOptionError, {"weight": jnp.ones(3)}),
        "weight='two'": (InvalidOptionError, {"weight": "two"}),
        "only a mean has weights": (InvalidOptionError, {"op": "sum", "weight": 1.0}),
        "'bucket_byte'": (TypeError, {"bucket_byte": 3}),
    }
    for text, (kind, options) in bad.items():
        raises(kind, text, lambda o=options: jaxcomm.optax.distribute(tx, **o))


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
