"""Functions of one rank's data, written for `jax.pmap`, and what they give.

Under jax.pmap, and under jaxcomm:

    python -m tests.programs.constructs pmap 4 OUT.npz              on 4 host devices
    mpiexec -n 4 python -m tests.programs.constructs mpi 4 OUT.npz  over MPI (or nccl)

`test_named_axis.py` runs both and compares.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if sys.argv[1:2] == ["pmap"]:
    flag = f"--xla_force_host_platform_device_count={sys.argv[2]}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Function = Callable[[Any], Any]
CONSTRUCTS: dict[str, Function] = {}
SHAPE = (8, 12)


def construct(function: Function) -> Function:
    CONSTRUCTS[function.__name__] = function
    return function


def halves() -> list[list[int]]:
    n = lax.axis_size("batch")
    return [list(range(n // 2)), list(range(n // 2, n))]


def ring(step: int = 1) -> list[tuple[int, int]]:
    n = lax.axis_size("batch")
    return [(k, (k + step) % n) for k in range(n)]


@construct
def reductions(x: Any) -> Any:
    return [f(x, "batch") for f in (lax.psum, lax.pmean, lax.pmax, lax.pmin)]


@construct
def reductions_of_trees(x: Any) -> Any:
    tree = {"a": x, "b": (x[0], None, 3 * x[:, :2]), "c": jnp.int32(7) + 0}
    return lax.pmean(tree, "batch"), lax.psum({"n": x > 0, "one": 1}, "batch")


@construct
def gathers(x: Any) -> Any:
    return (
        lax.all_gather(x, "batch"),
        lax.all_gather(x, "batch", axis=2),
        lax.all_gather(x, "batch", axis=1, tiled=True),
        lax.all_gather((x > 0, x.astype(jnp.bfloat16)), "batch", tiled=True),
        lax.all_gather(x[0, 0], "batch"),
    )


@construct
def scatters(x: Any) -> Any:
    n = lax.axis_size("batch")
    return (
        lax.psum_scatter(x, "batch", tiled=True),
        lax.psum_scatter(x, "batch", scatter_dimension=1, tiled=True),
        lax.psum_scatter(x[:, :n], "batch", scatter_dimension=1),
        lax.psum_scatter((10 * x).astype(jnp.int32), "batch", tiled=True),
    )


@construct
def exchanges(x: Any) -> Any:
    n = lax.axis_size("batch")
    return (
        lax.all_to_all(x, "batch", 0, 1, tiled=True),
        lax.all_to_all(x, "batch", 1, 1, tiled=True),
        lax.all_to_all(x[:n], "batch", 0, 0),
        lax.all_to_all(x[:, :n], "batch", 1, 0),
        lax.pswapaxes(x[:n], "batch", 0),
    )


@construct
def permutations(x: Any) -> Any:
    return (
        lax.ppermute(x, "batch", ring()),
        lax.ppermute(x, "batch", ring(-1)),
        lax.ppermute({"x": x, "i": jnp.arange(3)}, "batch", [(0, 1)]),
        lax.ppermute(x, "batch", []),
        lax.pshuffle(x, "batch", [k for k, _ in ring()][::-1]),
    )


@construct
def indices(x: Any) -> Any:
    i = lax.axis_index("batch")
    key = jax.random.fold_in(jax.random.key(3), i)
    return i, lax.axis_size("batch") * x, jax.random.normal(key, (4,)), x * i


@construct
def subgroups(x: Any) -> Any:
    groups: Any = {"axis_index_groups": halves()}
    return (
        lax.psum(x, "batch", **groups),
        lax.pmean(x, "batch", **groups),
        lax.pmax(x[0], "batch", **groups),
        lax.all_gather(x, "batch", **groups),
        lax.psum_scatter(x, "batch", tiled=True, **groups),
        lax.all_to_all(x, "batch", 0, 1, tiled=True, **groups),
        lax.psum(lax.psum(x, "batch", **groups), "batch"),
    )


@construct
def vmapped(x: Any) -> Any:
    both = jax.vmap(lambda y: lax.psum(y, ("batch", "rows")), axis_name="rows")
    return (
        jax.vmap(lambda y: lax.pmean(y, "batch"))(x),
        jax.vmap(lambda y: lax.all_gather(y, "batch", axis=1), in_axes=1)(x),
        jax.vmap(lambda y: lax.ppermute(y, "batch", ring()), out_axes=1)(x),
        jax.vmap(lambda y: lax.psum_scatter(y, "batch", tiled=True), in_axes=1)(x),
        both(x),
    )


@construct
def nested_jit(x: Any) -> Any:
    @jax.jit
    def inner(y: Any) -> Any:
        return lax.pmean(jnp.sin(y), "batch"), lax.axis_index("batch")

    return inner(x), inner(2 * x), jax.jit(lambda y: inner(y)[0] + y)(x)


@construct
def scanned(x: Any) -> Any:
    def step(total: Any, row: Any) -> Any:
        total = total + lax.psum(row, "batch")
        return lax.pmax(total, "batch"), lax.all_gather(row[0], "batch")

    return lax.scan(step, jnp.zeros(SHAPE[1]), x), lax.map(
        lambda row: lax.ppermute(row, "batch", ring()), x
    )


@construct
def loops(x: Any) -> Any:
    def unfinished(state: Any) -> Any:
        return (state[0] < 5) & (state[2] < 1e4)

    def body(state: Any) -> Any:
        k, y, _ = state
        y = lax.psum(y, "batch") / 3
        return k + 1, y, lax.pmax(jnp.max(jnp.abs(y)), "batch")

    start = (0, x, lax.pmax(jnp.max(x), "batch"))
    return lax.while_loop(unfinished, body, start), lax.fori_loop(
        0, 3, lambda k, y: lax.pmean(y + k, "batch"), x
    )


@construct
def branches(x: Any) -> Any:
    total = lax.psum(jnp.sum(x), "batch")
    one = lax.cond(
        total > 0, lambda y: lax.psum(y, "batch"), lambda y: lax.pmax(y, "batch"), x
    )
    index = jnp.clip(total.astype(jnp.int32), 0, 2)
    ways = [lambda y: y, lambda y: lax.pmean(y, "batch"), lambda y: 2 * y]
    # Nothing is sent here, so each rank may go its own way.
    own = lax.cond(x[0, 0] > 0, lambda y: y + lax.axis_index("batch"), jnp.sin, x)
    return one, lax.switch(index, ways, x), own


@construct
def checkpointed(x: Any) -> Any:
    @jax.checkpoint
    def layer(y: Any) -> Any:
        return jnp.tanh(lax.pmean(jnp.sin(y), "batch") * y)

    return jax.value_and_grad(lambda y: jnp.sum(layer(layer(y)) ** 2))(x)


@jax.custom_jvp
def _scaled(y: Any) -> Any:
    return 3 * lax.psum(y, "batch")


@_scaled.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return _scaled(*primals), 2 * lax.pmean(tangents[0], "batch")


@jax.custom_vjp
def _mean(y: Any) -> Any:
    return lax.pmean(y, "batch")


_mean.defvjp(lambda y: (_mean(y), None), lambda _, ct: (lax.pmax(ct, "batch"),))


@construct
def custom_derivatives(x: Any) -> Any:
    def loss(y: Any) -> Any:
        return jnp.sum(_scaled(y) ** 2) + jnp.sum(jnp.sin(_mean(y)))

    return _scaled(x), _mean(x), jax.grad(loss)(x)


@construct
def gradients(x: Any) -> Any:
    def loss(y: Any) -> Any:
        parts = (
            lax.psum(y, "batch"),
            lax.pmean(y**2, "batch"),
            lax.all_gather(y, "batch", tiled=True),
            lax.psum_scatter(y, "batch", tiled=True),
            lax.all_to_all(y, "batch", 0, 1, tiled=True),
            lax.ppermute(y, "batch", ring()),
        )
        return sum(jnp.sum(jnp.sin(k * p)) for k, p in enumerate(parts, 1))

    return jax.value_and_grad(loss)(x), jax.jvp(loss, (x,), (jnp.cos(x),))


@construct
def second_derivatives(x: Any) -> Any:
    def loss(y: Any) -> Any:
        return jnp.sum(lax.pmean(jnp.sin(y), "batch") ** 3)

    return jax.jvp(jax.grad(loss), (x,), (jnp.ones_like(x),))


@construct
def synchronised_batch_norm(x: Any) -> Any:
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, y: Any) -> Any:
            for width in (8, 8):
                y = nn.Dense(width)(y)
                y = nn.BatchNorm(use_running_average=False, axis_name="batch")(y)
                y = nn.relu(y)
            return jnp.mean(y**2 + y)

    net = Net()
    # Without the axis: parameters do not depend on the data.
    params = jax.eval_shape(
        lambda: nn.Module.init(_unnamed(), jax.random.key(0), jnp.zeros(SHAPE))
    )
    params = jax.tree.map(
        lambda s: jnp.linspace(-0.5, 0.7, s.size, dtype=s.dtype).reshape(s.shape),
        params["params"],
    )

    def loss(p: Any) -> Any:
        return net.apply({"params": p}, x, mutable=["batch_stats"])

    (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return lax.pmean((value, grads), "batch"), stats


def _unnamed() -> Any:
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, y: Any) -> Any:
            for width in (8, 8):
                y = nn.BatchNorm(use_running_average=False)(nn.Dense(width)(y))
            return y

    return Net()


@construct
def dependent_reductions(x: Any) -> Any:
    a = lax.psum(x, "batch")
    b = lax.pmean(x + a, "batch")
    c = lax.psum(x * 2, "batch")
    d = lax.pmax(b * c + a, "batch")
    return d, lax.psum((a, c, d), "batch")


@construct
def unused_results(x: Any) -> Any:
    lax.psum(x, "batch")
    lax.all_gather(x, "batch")
    return lax.pmean(x, "batch")


def data(rank: int) -> np.ndarray:
    rng = np.random.default_rng([7, rank])
    return rng.normal(size=SHAPE).astype(np.float32)


def flat(name: str, tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        name + jax.tree_util.keystr(path): np.asarray(leaf, np.float64)
        for path, leaf in leaves
    }


def under_pmap(ranks: int) -> dict[str, np.ndarray]:
    x = jnp.asarray(np.stack([data(r) for r in range(ranks)]))
    found: dict[str, np.ndarray] = {}
    for name, function in CONSTRUCTS.items():
        found |= flat(name, jax.pmap(function, axis_name="batch")(x))
    return found


def under_jaxcomm(transport: str, ranks: int) -> dict[str, np.ndarray]:
    import jaxcomm

    comm = jaxcomm.init(transport)
    assert comm.size == ranks
    x = jnp.asarray(data(comm.rank))
    found: dict[str, np.ndarray] = {}
    for name, function in CONSTRUCTS.items():
        step = jaxcomm.data_parallel(function)
        out = flat(name, step(x))
        mapped = flat(name, jaxcomm.pmap(function)(x[None]))
        assert out.keys() == mapped.keys()
        for path, leaf in out.items():
            np.testing.assert_array_equal(mapped[path], leaf[None], err_msg=path)
        buckets = step.schedule.buckets
        assert len(set(comm.all_gather_object(step.schedule.fingerprint))) == 1
        assert sorted(i for b in buckets for i in b.leaves) == list(
            range(len(step.schedule.leaves))
        )
        every = comm.all_gather_object(out)
        found |= {path: np.stack([each[path] for each in every]) for path in out}
    return found


def save(out: Path, found: Any) -> None:
    np.savez(out, **found)


def main(kind: str, ranks: int, out: Path) -> None:
    found = under_pmap(ranks) if kind == "pmap" else under_jaxcomm(kind, ranks)
    if kind == "pmap":
        save(out, found)
        return
    import jaxcomm

    if jaxcomm.rank() == 0:
        save(out, found)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
