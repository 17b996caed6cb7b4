"""What test_recipe.py asks of two ranks. Arguments: a folder with a data set."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxcomm
from stemdl import config
from stemdl.model.network import scopes
from stemdl.training import optimizer, precision, recipe, train
from stemdl.training.backends import AXIS, Ranks

backend = Ranks()
SGD = ("optimizer.name=sgd", "optimizer.lr=0.1")


class Small(nn.Module):
    """Stands in for the network: compiles in a second in float16 too."""

    norm: bool = True
    axis_name: str | None = AXIS
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Dense(6, dtype=self.dtype)(x.reshape(len(x), -1))
        if self.norm:
            x = nn.BatchNorm(not train, axis_name=self.axis_name, dtype=self.dtype)(x)
        y = nn.Dense(16, dtype=self.dtype)(nn.relu(x)).reshape(-1, 4, 4)
        return y.astype(jnp.float32)


def data(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A batch of this rank's own."""
    rng = np.random.default_rng([seed, backend.rank])
    x = rng.normal(size=(rows, 2, 2, 3, 3)).astype(np.float32)
    return x, rng.normal(size=(rows, 4, 4)).astype(np.float32)


class Run:
    """A network with its step and its state."""

    def __init__(self, *assignments: str, norm: bool = True):
        self.config = config.load(None, ["schedule.warm_up_steps=0", *assignments])
        dtype = precision.dtype_of(self.config.precision)
        self.model: Any = Small(norm, dtype=dtype)
        tx = optimizer.make(self.config.optimizer, self.config.schedule, 10, 2)
        self.state = recipe.initial_state(self.model, tx, data(1)[0][0], self.config)
        self.step = recipe.compile_step(self.model, tx, self.config, backend)

    def train(self, *batches: Any) -> Any:
        for batch in batches:
            self.state, loss = self.step(self.state, batch)
            assert np.isfinite(loss), loss
        return backend.fetch(self.state)


def largest_difference(a: Any, b: Any) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(x - y).max()) for x, y in pairs)


def bitwise_equal(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.tobytes() == y.tobytes() for x, y in pairs)


def overflow_on_one_rank_skips_on_both() -> None:
    run = Run("precision.compute=float16", "precision.loss_scale=1024")
    x, y = data(2)
    # The same data do no harm alone: what overflows later does so on rank 1.
    before = run.train((x, y))
    assert (before.loss_scale.scale, before.loss_scale.skipped) == (1024, 0)
    after = run.train((x, y * np.float32(1 if backend.rank == 0 else 1e6)))
    for name in ("params", "batch_stats", "opt_state"):
        assert bitwise_equal(getattr(before, name), getattr(after, name)), name
    assert (after.loss_scale.scale, after.loss_scale.skipped) == (512, 1)
    last = run.train((x, y))
    assert (last.loss_scale.scale, last.loss_scale.clean) == (512, 1)
    assert largest_difference(after.params, last.params) > 1e-3
    assert largest_difference(after.batch_stats, last.batch_stats) > 1e-3
    jaxcomm.assert_replicated(run.state)


def accumulation_equals_one_large_batch() -> None:
    # Without batch statistics, which each part has of its own.
    parts = Run("training.accumulate=2", *SGD, norm=False).train(data(4))
    whole = Run(*SGD, norm=False)
    before = backend.fetch(whole.state)
    after = whole.train(data(4))
    moved = largest_difference(before.params, after.params)
    assert largest_difference(parts.params, after.params) < 1e-5 * moved


def groups_and_wire() -> None:
    batches = [data(2, seed) for seed in range(3)]
    # Adam would make as much of a gradient that is nothing but rounding as of others.
    planner = Run(*SGD)
    before = backend.fetch(planner.state)
    wanted = planner.train(*batches)
    grouped = Run(*SGD, "communication.groups=scopes")
    assert bitwise_equal(grouped.train(*batches), wanted)
    wire = Run(*SGD, "communication.groups=scopes", "communication.wire_dtype=bfloat16")
    moved = largest_difference(wanted.params, before.params)
    error = largest_difference(wire.train(*batches).params, wanted.params)
    assert 0 < error < 0.02 * moved, (error, moved)

    def labels(run: Run) -> set[str]:
        return {bucket.label for bucket in run.step.schedule.buckets} - {""}

    every = set(scopes(wanted.params))
    assert len(every) == 3 and labels(grouped) == labels(wire) == every
    assert not labels(planner)
    # Gradients alone are sent in 16 bits: the rest is batch statistics and the loss.
    for bucket in wire.step.schedule.buckets:
        assert (bucket.wire == "bfloat16") == bool(bucket.label), bucket


def accumulation_with_batch_statistics_and_larc() -> None:
    """Collectives inside the scan, and a stateful transformation of the gradients."""
    run = Run(
        *("training.accumulate=2", "loss.name=pairwise"),
        *("optimizer.name=sgd", "optimizer.larc=clip", "schedule.name=staircase"),
        "precision.compute=bfloat16",
    )
    before = backend.fetch(run.state)
    after = run.train(data(4))
    assert largest_difference(before.params, after.params) > 0
    assert {leaf.dtype.name for leaf in jax.tree.leaves(after.params)} == {"float32"}
    jaxcomm.assert_replicated(run.state)


def a_loss_that_is_no_number(folder: str) -> None:
    out = Path(folder) / "out"
    options = ["--config", f"{folder}/recipe.toml", "--steps", "12"]
    options += ["--set", "training.accumulate=2", "--data", folder, "--out", str(out)]
    try:
        train.main.main(options, standalone_mode=False)
    except click.UsageError as error:
        assert error.exit_code == 2
        print(f"rank {backend.rank} stopped:", error.message, flush=True)
    assert not (out / "params.npz").exists()


for check in (
    overflow_on_one_rank_skips_on_both,
    accumulation_equals_one_large_batch,
    groups_and_wire,
    accumulation_with_batch_statistics_and_larc,
):
    check()
    print("passed", check.__name__, flush=True)
a_loss_that_is_no_number(sys.argv[1])
