"""Each program under jax.shard_map on host devices (one process), or under ours.

Usage: shard_map.py OUT reference|ranks [NAME...]. The reference writes what each of its
devices has, of which XLA_FLAGS says how many there are; a rank of jaxcomm writes its
own.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcomm

REFERENCE = sys.argv[2] == "reference"
if REFERENCE:
    RANKS = jax.device_count()
    MESH = jax.make_mesh((RANKS,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    shard_map: Any = functools.partial(jax.shard_map, mesh=MESH)
else:
    RANKS = jaxcomm.init().size
    shard_map = jaxcomm.shard_map

RNG = np.random.default_rng(0)
W = {
    "a": RNG.normal(size=(3, 5)).astype(np.float32),
    "b": RNG.normal(size=(5,)).astype(np.float32),
}
X = RNG.normal(size=(4 * 6, 3)).astype(np.float32)[: 4 * RANKS]
Y = RNG.normal(size=(4 * 6, 5)).astype(np.float32)[: 4 * RANKS]
WHOLE, SHARDED = P(), P("batch")


def placed(tree: Any, spec: Any) -> Any:
    """What all ranks hold whole, as an argument."""
    if REFERENCE:
        return jax.device_put(tree, NamedSharding(MESH, spec))
    return jaxcomm.local_block(tree, spec)


def loss(w: Any, x: Any, y: Any) -> Any:
    return jnp.mean((jnp.tanh(x @ w["a"]) + w["b"] - y) ** 2)


def run(f: Callable[..., Any], *, vma: bool = True, out: Any = WHOLE) -> Any:
    specs = (WHOLE, SHARDED, SHARDED)
    mapped = shard_map(f, in_specs=specs, out_specs=out, check_vma=vma)
    return mapped(placed(W, WHOLE), placed(X, SHARDED), placed(Y, SHARDED))


def grad_of_mean(w: Any, x: Any, y: Any) -> Any:
    return jax.grad(lambda w: lax.pmean(loss(w, x, y), "batch"))(w)


def grad_of_sum(w: Any, x: Any, y: Any) -> Any:
    return jax.value_and_grad(lambda w: lax.psum(loss(w, x, y), "batch"))(w)


def mean_of_grad(w: Any, x: Any, y: Any) -> Any:
    return lax.pmean(jax.grad(loss)(w, x, y), "batch")


def scanned(w: Any, x: Any, y: Any, *, vma: bool = True) -> Any:
    def body(w: Any, pair: Any) -> tuple[Any, Any]:
        if vma:
            g = jax.grad(lambda w: lax.pmean(loss(w, *pair), "batch"))(w)
        else:
            g = lax.pmean(jax.grad(loss)(w, *pair), "batch")
        return jax.tree.map(lambda p, g: p - 0.1 * g, w, g), lax.psum(1.0, "batch")

    return lax.scan(body, w, (x[:, None], y[:, None]))


def pieces(w: Any, x: Any, y: Any) -> Any:
    """Collectives of every kind, and this rank's number."""
    number = lax.axis_index("batch")
    spread = lax.all_to_all(jnp.tile(y, (RANKS, 1)), "batch", 0, 0, tiled=True)
    around = lax.ppermute(x, "batch", [(k, (k + 1) % RANKS) for k in range(RANKS)])
    part = lax.psum_scatter(jnp.tile(x, (RANKS, 1)), "batch", tiled=True)
    top = lax.pmax(jnp.max(x), "batch")
    return (x * number, spread, around, part), top


def gathered(w: Any, x: Any, y: Any) -> Any:
    return lax.all_gather(x, "batch", tiled=True) @ w["a"]


def convolved(w: Any, x: Any, y: Any) -> Any:
    """A primitive with a named tuple among its parameters."""

    def value(kernel: Any) -> Any:
        found = lax.conv(x[:, None], kernel, (1,), "SAME")
        return lax.pmean(jnp.mean(found**2), "batch")

    return jax.grad(value)(w["a"].T[:, None])


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=False, axis_name="batch")(x)
        return nn.Dense(5)(nn.relu(x))


def trained(vma: bool) -> Callable[[], Any]:
    net, tx = Net(), optax.sgd(0.1, momentum=0.9)
    variables = net.init(jax.random.key(0), jnp.ones((2, 3)))
    state = {"v": variables, "opt": tx.init(variables["params"]), "step": 0}

    def step(state: Any, x: Any, y: Any) -> Any:
        def objective(params: Any) -> Any:
            seen, new = net.apply(
                {**state["v"], "params": params}, x, mutable=["batch_stats"]
            )
            value = jnp.mean((seen - y) ** 2)
            # By default the gradient of a mean over all ranks is one itself.
            return (lax.pmean(value, "batch") if vma else value), new

        params = state["v"]["params"]
        (value, new), grads = jax.value_and_grad(objective, has_aux=True)(params)
        if not vma:
            value, grads = lax.pmean((value, grads), "batch")
        updates, opt = tx.update(grads, state["opt"], params)
        variables = {**new, "params": optax.apply_updates(params, updates)}
        return {"v": variables, "opt": opt, "step": state["step"] + 1}, value

    def go() -> Any:
        mapped = shard_map(
            step,
            in_specs=(P(), SHARDED, SHARDED),
            out_specs=(P(), P()),
            check_vma=vma,
        )
        now, value = placed(state, P()), None
        for _ in range(4):
            now, value = mapped(now, placed(X, SHARDED), placed(Y, SHARDED))
        return now, value

    return go


def outside(vma: bool, jitted: bool) -> Callable[[], Any]:
    """The gradient is taken outside, as of a function of whole arrays."""

    def go() -> Any:
        specs = {"in_specs": (P(), SHARDED, SHARDED), "out_specs": P()}
        mapped = shard_map(
            lambda w, x, y: lax.pmean(loss(w, x, y), "batch"), check_vma=vma, **specs
        )

        def step(w: Any, x: Any, y: Any) -> Any:
            value, grads = jax.value_and_grad(mapped)(w, x, y)
            return jax.tree.map(lambda p, g: p - 0.1 * g, w, grads), value

        w, value = placed(W, P()), None
        for _ in range(3):
            run = jax.jit(step) if jitted else step
            w, value = run(w, placed(X, SHARDED), placed(Y, SHARDED))
        return w, value

    return go


def outside_with_blocks(vma: bool) -> Callable[[], Any]:
    """Integers among arguments and results, sharded results, and both gradients."""

    def body(w: Any, x: Any, n: Any) -> Any:
        total = lax.psum(jnp.sum(x @ w["a"]) * n[0], "batch")
        return total, jnp.tanh(x) * 2, n + 1

    def go() -> Any:
        mapped = shard_map(
            body,
            in_specs=(P(), SHARDED, P()),
            out_specs=(P(), SHARDED, P()),
            check_vma=vma,
        )

        def value(w: Any, x: Any) -> Any:
            total, blocks, count = mapped(w, x, jnp.arange(1, 3))
            del blocks, count
            return total**2

        return jax.jit(jax.grad(value, argnums=(0, 1)))(
            placed(W, P()), placed(X, SHARDED)
        )

    return go


PROGRAMS: dict[str, Callable[[], Any]] = {
    "grad of mean": lambda: run(grad_of_mean),
    "grad of sum": lambda: run(grad_of_sum),
    "mean of grad": lambda: run(mean_of_grad),
    "mean of grad, local": lambda: run(mean_of_grad, vma=False),
    "scan": lambda: run(scanned),
    "scan, local": lambda: run(functools.partial(scanned, vma=False), vma=False),
    "pieces": lambda: run(pieces, out=(SHARDED, P())),
    "pieces, local": lambda: run(pieces, vma=False, out=(SHARDED, P())),
    "gathered": lambda: run(gathered, vma=False),
    "convolved": lambda: run(convolved),
    "trained": trained(vma=True),
    "trained, local": trained(vma=False),
    "outside": outside(vma=True, jitted=True),
    "outside, local": outside(vma=False, jitted=True),
    "outside, eager": outside(vma=True, jitted=False),
    "outside, blocks": outside_with_blocks(vma=True),
    "outside, blocks, local": outside_with_blocks(vma=False),
}


def main() -> None:
    results: dict[str, Any] = {}
    for name in sys.argv[3:] or PROGRAMS:
        for path, leaf in jax.tree_util.tree_leaves_with_path(PROGRAMS[name]()):
            key = f"{name}|{jax.tree_util.keystr(path)}"
            if REFERENCE:
                for shard in leaf.addressable_shards:
                    results[f"{shard.device.id}|{key}"] = np.asarray(shard.data)
            else:
                results[f"{jaxcomm.rank()}|{key}"] = np.asarray(leaf)
    end = "reference" if REFERENCE else jaxcomm.rank()
    np.savez(f"{sys.argv[1]}/{end}.npz", **results)


if __name__ == "__main__":
    main()
