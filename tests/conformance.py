"""What every transport must do, as checks that all ranks of a job run together.

`test_conformance.py` starts this file once per transport and number of ranks:

    mpiexec -n 2 python conformance.py RESULTS.json mpi

Each `check_*` function takes the communicator and uses NumPy as the reference. The
ranks compare notes after each check; rank 0 writes one line of outcome per check.
"""

from __future__ import annotations

import faulthandler
import functools
import json
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conformance_arrays
import conformance_dtypes
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from references import close, raises, same

import jaxcomm
from jaxcomm.communicator import Communicator
from jaxcomm.errors import (
    InvalidOptionError,
    InvalidTreeError,
    ScheduleMismatchError,
    UnsupportedDtypeError,
)

SECONDS_PER_CHECK = 90


def check_ranks(comm: Communicator) -> None:
    assert comm == jaxcomm.world() and hash(comm) == hash(jaxcomm.world())
    assert (jaxcomm.rank(), jaxcomm.size()) == (comm.rank, comm.size)
    assert jaxcomm.local_rank() == comm.rank
    assert jaxcomm.local_size() == comm.size
    assert comm.all_gather_object(comm.rank) == list(range(comm.size))
    keys = comm.all_gather_object(comm.key)
    assert len(set(keys)) == 1


def check_objects(comm: Communicator) -> None:
    last = comm.size - 1
    assert comm.broadcast_object({"from": comm.rank}, root=last) == {"from": last}
    raises(InvalidOptionError, "root", lambda: comm.broadcast_object(1, comm.size))
    comm.barrier()


def check_two_threads_on_two_communicators(comm: Communicator) -> None:
    ranks = list(range(comm.size))
    others = comm.subgroup(ranks[::-1]) if comm.size > 1 else comm
    assert others is not None
    results: dict[str, list[float]] = {}

    def work(name: str, on: Communicator, start: float) -> None:
        results[name] = [
            float(jaxcomm.all_reduce(jnp.full(50_000, start + k), op="sum", comm=on)[7])
            for k in range(30)
        ]

    threads = [
        threading.Thread(target=work, args=("a", comm, 0.0)),
        threading.Thread(target=work, args=("b", others, 1000.0)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results["a"] == [comm.size * k for k in range(30)]
    assert results["b"] == [comm.size * (1000.0 + k) for k in range(30)]


def check_planning_again_finds_the_plan(comm: Communicator) -> None:
    tree = {"a": jnp.ones((3, 2)), "b": jnp.ones(5, jnp.int32)}
    jaxcomm.all_reduce(tree)
    before = jaxcomm.cache_info()
    jaxcomm.all_reduce(tree)
    assert jaxcomm.plan(tree) is jaxcomm.plan(tree)
    assert jaxcomm.cache_info().misses == before.misses
    # What only looks like the options of before is checked all the same.
    raises(InvalidOptionError, "groups", lambda: jaxcomm.all_reduce(tree, groups=True))
    raises(InvalidOptionError, "op", lambda: jaxcomm.all_reduce(tree, op="average"))


def check_lowering_first_still_names_the_error(comm: Communicator) -> None:
    if comm.size == 1:
        return
    step = jaxcomm.data_parallel(lambda x: lax.pmean(x, "batch"))
    x = jnp.ones(5 + (comm.rank == comm.size - 1))
    step.lower(x)
    raises(ScheduleMismatchError, r"float32\[5\].*float32\[6\]", lambda: step(x))


def check_structure_is_kept(comm: Communicator) -> None:
    empty: dict[str, Any] = {}
    assert jaxcomm.all_reduce(empty) == {}
    assert jax.jit(jaxcomm.all_reduce)(None) is None
    tree = {"a": None, "b": (jnp.ones(2), [])}
    out = jaxcomm.all_reduce(tree)
    assert jax.tree.structure(out) == jax.tree.structure(tree)
    assert float(jaxcomm.all_reduce(2.0, op="sum")) == 2.0 * comm.size


def check_large_leaf_in_segments(comm: Communicator) -> None:
    x = np.arange(3_000_001, dtype=np.float32) % 1000 + comm.rank
    out = jax.jit(lambda v: jaxcomm.all_reduce(v, op="sum"))(x)
    want = sum(
        np.arange(3_000_001, dtype=np.float32) % 1000 + r for r in range(comm.size)
    )
    same(out, want)


def check_more_small_leaves_than_staging_holds(comm: Communicator) -> None:
    # 120 leaves of 100 KB fill the 8 MiB staging buffer more than once.
    tree = [jnp.full(25_000, float(i + comm.rank)) for i in range(120)]
    out = jaxcomm.all_reduce(tree, op="sum", groups=1)
    ranks = range(comm.size)
    for i, leaf in enumerate(out):
        same(leaf, np.full(25_000, sum(float(i + r) for r in ranks)))


def check_mean_divides_exactly(comm: Communicator) -> None:
    x = np.array([1 / 3, 1e-30, 7, 1e30], np.float32) * np.float32(comm.rank + 1)
    parts = [
        np.array([1 / 3, 1e-30, 7, 1e30], np.float32) * np.float32(r + 1)
        for r in range(comm.size)
    ]
    total = np.zeros(4, np.float32)
    for part in parts:
        total = total + part
    close(jaxcomm.all_reduce(x), total / np.float32(comm.size), rtol=3e-7)


def check_same_bits_on_all_ranks_and_runs(comm: Communicator) -> None:
    key = jax.random.fold_in(jax.random.key(3), comm.rank)
    tree = {"a": jax.random.normal(key, (1001, 33)), "b": jax.random.normal(key, (7,))}
    reduce = jax.jit(lambda t: jaxcomm.all_reduce(t))
    first, second = reduce(tree), reduce(tree)
    jaxcomm.assert_replicated(first)
    jax.tree.map(same, first, second)


def check_groupings_give_the_same_bits(comm: Communicator) -> None:
    key = jax.random.fold_in(jax.random.key(4), comm.rank)
    tree = {f"layer{i}": jax.random.normal(key, (50 + i, 40)) for i in range(9)}
    results = [
        jaxcomm.all_reduce(tree, **options)  # type: ignore[arg-type]
        for options in (
            {},
            {"groups": 1},
            {"groups": 9},
            {"bucket_bytes": 10_000},
            {"groups": lambda path: path[-3]},
            {"groups": ["layer[0-3]", "layer"]},
        )
    ]
    for other in results[1:]:
        jax.tree.map(same, results[0], other)


def check_broadcast(comm: Communicator) -> None:
    for root in range(comm.size):
        r = comm.rank
        tree = {
            "f": jnp.full((3, 4), float(r)),
            "h": jnp.full(5, r, jnp.bfloat16),
            "i": jnp.full(3, r, jnp.int8),
            "flag": jnp.array([r == root, False]),
            "key": jax.random.key(r),
            "raw": jax.random.PRNGKey(r),
            "none": None,
            "zero": jnp.zeros((0, 2)),
        }
        out = jaxcomm.broadcast(tree, root=root)
        jaxcomm.assert_replicated(out)
        same(out["f"], np.full((3, 4), float(root)))
        same(out["h"].astype(jnp.float32), np.full(5, root))
        same(out["flag"], [True, False])
        same(jax.random.key_data(out["key"]), jax.random.key_data(jax.random.key(root)))
        same(
            jax.jit(lambda v, k=root: jaxcomm.broadcast(v, root=k))(tree["f"]), out["f"]
        )
    raises(InvalidOptionError, "root", lambda: jaxcomm.broadcast(1.0, root=comm.size))


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
    if comm.transport == "mpi4jax":
        return  # it writes MPI handles into its programs

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
    want = jax.vmap(step, in_axes=(None, 0), axis_name="batch")(params, data)
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


def check_mismatch_raises_on_every_rank(comm: Communicator) -> None:
    last = comm.rank == comm.size - 1
    if comm.size == 1:
        return
    cases = {
        r"\['w'\] float32\[3\] against \['w'\] float32\[4\]": lambda: (
            jaxcomm.all_reduce({"w": jnp.ones(4 if last else 3)})
        ),
        r"float32\[6\] against .*int32\[6\]": lambda: jaxcomm.all_reduce(
            {"w": jnp.ones(6, jnp.int32 if last else jnp.float32)}
        ),
        r"\['extra'\]": lambda: jaxcomm.all_reduce(
            {"w": jnp.ones(8)} | ({"extra": jnp.ones(1)} if last else {})
        ),
        "op mean against sum": lambda: jaxcomm.all_reduce(
            jnp.ones(9), op="sum" if last else "mean"
        ),
        "root 0 against 1": lambda: jaxcomm.broadcast(jnp.ones(10), root=int(last)),
    }
    for match, call in cases.items():
        raises(ScheduleMismatchError, match, call)
    step = jaxcomm.data_parallel(lambda x: lax.psum(x, "batch"))
    raises(
        ScheduleMismatchError,
        r"float32\[11\] against",
        lambda: step(jnp.ones(12 if last else 11)),
    )
    raises(
        jax.errors.JaxRuntimeError,
        "ScheduleMismatchError: the ranks hold different schedules",
        lambda: jax.jit(jaxcomm.all_reduce)(jnp.ones(14 if last else 13)),
    )
    # Nothing was sent, so the communicator is as good as new.
    same(jaxcomm.all_reduce(jnp.ones(3), op="sum"), np.full(3, comm.size))


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


def check_bad_input(comm: Communicator) -> None:
    x = jnp.ones(2)

    def unhashable(path: str) -> Any:
        return [path]

    bad: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (
            InvalidTreeError,
            r"\['name'\].*str",
            lambda: jaxcomm.all_reduce({"name": "a"}),
        ),
        (InvalidTreeError, "object", lambda: jaxcomm.all_reduce(np.array([None]))),
        (
            UnsupportedDtypeError,
            r"\['k'\]",
            lambda: jaxcomm.all_reduce({"k": jax.random.key(0)}),
        ),
        (InvalidOptionError, "op=", lambda: jaxcomm.all_reduce(x, op="median")),
        (InvalidOptionError, "bucket_bytes", lambda: jaxcomm.plan(x, bucket_bytes=-1)),
        (InvalidOptionError, "groups", lambda: jaxcomm.plan(x, groups=0)),
        (InvalidOptionError, "regular", lambda: jaxcomm.plan(x, groups=["("])),
        (
            InvalidOptionError,
            "root",
            lambda: jaxcomm.plan({"root": x}, groups=lambda p: 1 / 0),
        ),
        (InvalidOptionError, "hashable", lambda: jaxcomm.plan(x, groups=unhashable)),
        (
            InvalidOptionError,
            "axis_name='data'",
            lambda: jaxcomm.data_parallel(
                lambda v: lax.psum(v, "rows"), axis_name="data"
            )(x),
        ),
        (InvalidOptionError, "subgroup", lambda: comm.subgroup([0, 0])),
        (InvalidOptionError, "subgroup", lambda: comm.subgroup([comm.size])),
        (InvalidOptionError, "init once", lambda: jaxcomm.init("local")),
    ]
    if comm.transport == "local":
        bad = [case for case in bad if case[1] not in ("init once",)]
    for kind, match, call in bad:
        raises(kind, match, call)


def check_not_replicated(comm: Communicator) -> None:
    if comm.size == 1:
        return
    tree = {"same": jnp.ones(2), "other": jnp.ones(3) * comm.rank}
    raises(AssertionError, r"\['other'\]", lambda: jaxcomm.assert_replicated(tree))


def check_subgroups(comm: Communicator) -> None:
    even = comm.subgroup(range(0, comm.size, 2))
    assert (even is None) == bool(comm.rank % 2)
    if even is not None:
        assert even is comm.subgroup(range(0, comm.size, 2))
        assert even.size == (comm.size + 1) // 2
        total = sum(r + 1.0 for r in range(0, comm.size, 2))
        out = jaxcomm.all_reduce(jnp.ones(3) * (comm.rank + 1), op="sum", comm=even)
        same(out, np.full(3, total))
        step = jaxcomm.data_parallel(lambda x: lax.psum(x, "batch"), comm=even)
        same(step(jnp.ones(3)), np.full(3, even.size))
    comm.barrier()


def check_weighted_means(comm: Communicator) -> None:
    weight = float(comm.rank)  # rank 0 has run out of data
    own = comm.rank + 1.0 if comm.rank else np.nan
    tree = {
        "w": jnp.full((3, 2), own),
        "b": jnp.asarray([0.5 * comm.rank], jnp.bfloat16),
        "c": jnp.asarray(1j * comm.rank),
    }
    ranks = np.arange(comm.size)
    total = max(ranks.sum(), 1)
    want = {
        "w": (np.full((3, 2), (ranks * (ranks + 1.0)).sum() / total), 1e-6),
        "b": ([(ranks * 0.5 * ranks).sum() / total], 1e-2),
        "c": (1j * (ranks * ranks).sum() / total, 1e-6),
    }
    eager = jaxcomm.all_reduce(tree, weight=weight)
    step = jaxcomm.data_parallel(lambda t, w: jaxcomm.all_reduce(t, weight=w))
    for out in (eager, step(tree, weight)):
        for name, leaf in out.items():
            assert leaf.dtype == tree[name].dtype
            value, rtol = want[name]
            got = np.asarray(leaf).astype(complex)
            np.testing.assert_allclose(got, value, rtol=rtol)
    same(jaxcomm.all_reduce(jnp.ones(3), weight=0), np.zeros(3))
    wire = jaxcomm.all_reduce(jnp.full(9, 2.0), weight=1001, wire_dtype="bfloat16")
    np.testing.assert_allclose(wire, 2, rtol=2e-2)
    for kind, says, leaf, options in (
        (InvalidTreeError, r"'n'.*int32", {"n": 1}, {"weight": 1.0}),
        (InvalidOptionError, "only a mean", 1.0, {"op": "sum", "weight": 1}),
        (InvalidOptionError, "one real number", 1.0, {"weight": [1, 2]}),
    ):
        raises(kind, says, functools.partial(jaxcomm.all_reduce, leaf, **options))


def check_no_control_messages_after_the_first_step(comm: Communicator) -> None:
    if comm.transport == "local":
        return

    @jaxcomm.data_parallel
    def step(x: Any) -> Any:
        return lax.pmean(x + 0.125, "batch")

    x = step(jnp.ones(77))
    before = comm.counters()["agreements"]
    for _ in range(20):
        x = step(x)
    jax.block_until_ready(x)
    assert comm.counters()["agreements"] == before


def checks() -> dict[str, Callable[[Communicator], None]]:
    """Return every check by name."""
    found = globals() | vars(conformance_dtypes) | vars(conformance_arrays)
    return {name: value for name, value in found.items() if name.startswith("check_")}


def main(results: str, transport: str) -> None:
    """Run all checks on all ranks; rank 0 writes {check: text of errors or ""}."""
    comm = jaxcomm.init(transport, timeout=SECONDS_PER_CHECK / 2)
    outcome: dict[str, str] = {}
    for name, check in checks().items():
        faulthandler.dump_traceback_later(SECONDS_PER_CHECK, exit=True)
        try:
            check(comm)
            error = ""
        except Exception:
            error = traceback.format_exc(limit=-4)
        errors = comm.all_gather_object(error)
        outcome[name] = "\n".join(
            f"rank {rank} of {comm.size}: {text}"
            for rank, text in enumerate(errors)
            if text
        )
        if comm.rank == 0:
            Path(results).write_text(json.dumps(outcome))
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(*sys.argv[1:])
