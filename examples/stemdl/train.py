r"""Train the network, data-parallel over ranks or over devices.

jaxcomm run -n 2 examples/stemdl/train.py --out out/stemdl
XLA_FLAGS=--xla_force_host_platform_device_count=2 \
        python examples/stemdl/train.py --backend pmap --out out/stemdl-pmap

With --checkpoint-every it goes on where it was ended: by SIGTERM or Ctrl-C, which save
first, or by a failure, after which `jaxcomm run --max-restarts 3` starts it again.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax
import jax.numpy as jnp
import numpy as np
import optax
from click.core import ParameterSource
from rich.console import Console

import checkpoint
import loading
from augment import augment, draw
from dataset import Dataset, load
from jaxcomm.checkpoint import CheckpointError, Stop, restore, save
from jaxcomm.data import Batches
from network import NETWORKS, StemNet
from parallel import AXIS, BACKENDS, Backend
from simulate import data_config, data_option, simulate
from telemetry import UNTIMED_STEPS, Telemetry, Timed

WARM_UP_STEPS = 30
FINAL_LR_FRACTION = 0.02


class State(NamedTuple):
    """What a train step reads and renews."""

    params: Any
    batch_stats: Any
    opt_state: optax.OptState


def optimizer(lr: float, steps: int) -> optax.GradientTransformation:
    """Adam; linear warm-up, then a cosine to 2 % of `lr` over all `steps`."""
    warm_up = min(WARM_UP_STEPS, steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(
        lr / WARM_UP_STEPS, lr, warm_up, steps, end_value=FINAL_LR_FRACTION * lr
    )
    return optax.adam(schedule)


def initial_state(
    model: StemNet,
    tx: optax.GradientTransformation,
    sample: np.ndarray,
    seed: int,
    dtype: Any,
) -> State:
    """The same on every rank that calls it with the same seed."""
    variables = jax.jit(model.init)(jax.random.key(seed), sample[None])
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
    params = variables["params"]
    return State(params, variables["batch_stats"], tx.init(params))


def make_train_step(model: StemNet, tx: optax.GradientTransformation) -> Any:
    """One step on one device's samples, as one would write it for `jax.pmap`."""

    def train_step(
        state: State, batch: tuple[jax.Array, jax.Array]
    ) -> tuple[State, jax.Array]:
        x, y = batch

        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            predicted, updated = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                x,
                train=True,
                mutable=["batch_stats"],
            )
            return jnp.mean((predicted - y) ** 2), updated["batch_stats"]

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, batch_stats), grads = grad_fn(state.params)
        grads = jax.lax.pmean(grads, AXIS)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, batch_stats, opt_state), jax.lax.pmean(loss, AXIS)

    return train_step


def batches(
    dataset: Dataset, backend: Backend, batch: int, seed: int, first: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless augmented batches: the same global ones for any number of ranks.

    Each is a function of the seed and of the number of steps before it, which begins
    with `first`.

    Yields:
      This process's part: patterns and labels; pmap's with a leading device axis.
    """
    order = Batches(len(dataset.train_x), batch, seed, rank=0, size=1)
    for step in itertools.count(first):
        rows = backend.share(order.at(step).indices)
        symmetries = draw(seed, order.epoch(step), order.samples)
        x, y = augment(
            dataset.train_x[rows.ravel()],
            dataset.train_y[rows.ravel()],
            symmetries[rows.ravel()],
        )
        # A second axis of rows, where there is one, is pmap's device axis.
        yield (
            x.reshape(*rows.shape, *x.shape[1:]),
            y.reshape(*rows.shape, *y.shape[1:]),
        )


@click.command()
@click.option(
    "--backend",
    "backend_name",
    type=click.Choice(sorted(BACKENDS)),
    default="jaxcomm",
    show_default=True,
)
@click.option(
    "--steps",
    type=click.IntRange(UNTIMED_STEPS + 1),
    default=1600,
    show_default=True,
    help="length of the schedule",
)
@click.option(
    "--stop",
    type=click.IntRange(UNTIMED_STEPS + 1),
    help="stop after so many of these steps",
)
@click.option("--batch", default=16, show_default=True, help="over all ranks together")
@click.option(
    "--network",
    type=click.Choice(list(NETWORKS)),
    default="tiny",
    show_default=True,
)
@click.option("--lr", default=3e-3, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--samples", default=1500, show_default=True, help="training samples")
@click.option(
    "--float64",
    is_flag=True,
    help="train in double precision, to compare backends without rounding",
)
@click.option(
    "--compare-steps",
    default=20,
    show_default=True,
    help="keep the parameters after so many steps",
)
@click.option(
    "--checkpoint-every",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="save in --out after every so many steps, and on SIGTERM or Ctrl-C; 0: never",
)
@click.option(
    "--resume/--no-resume",
    default=True,
    show_default=True,
    help="go on from the last checkpoint in --out, or delete what is there",
)
@data_option
@click.option(
    "--shards",
    "shards_dir",
    type=click.Path(path_type=Path),
    help="train from what simulate_shards.py has written here, instead of --data",
)
@click.option(
    "--stage",
    type=click.Path(path_type=Path),
    help="copy the shards to this directory, on each node's own storage, first",
)
@click.option(
    "--out", type=click.Path(path_type=Path), default="out/stemdl", show_default=True
)
def main(
    backend_name: str,
    steps: int,
    stop: int | None,
    batch: int,
    network: str,
    lr: float,
    seed: int,
    samples: int,
    float64: bool,
    compare_steps: int,
    checkpoint_every: int,
    resume: bool,
    data_dir: Path,
    shards_dir: Path | None,
    stage: Path | None,
    out: Path,
) -> None:
    """Train the network; rank 0 writes parameters and train.json to --out."""
    jax.config.update("jax_enable_x64", float64)
    backend = BACKENDS[backend_name]()
    root = backend.rank == 0
    if batch % backend.size:
        raise click.UsageError(
            f"--batch {batch} does not divide over {backend.size} devices"
        )
    source = None
    if shards_dir is not None:
        try:
            # Unless it was asked for, their number is what the manifest says.
            asked_for = click.get_current_context().get_parameter_source("samples")
            explicit = asked_for is ParameterSource.COMMANDLINE
            config = data_config(samples) if explicit else None
            source = loading.open_source(
                shards_dir, stage, backend, batch, seed, config
            )
        except loading.ShardError as error:
            raise click.UsageError(str(error)) from error
        samples = source.order.samples
    elif stage is not None:
        raise click.UsageError("--stage copies shards: give --shards too")
    if batch > samples:
        raise click.UsageError(f"--batch {batch} exceeds --samples {samples}")
    saved = out / "checkpoints"
    if root:
        out.mkdir(parents=True, exist_ok=True)
        if not resume and os.environ.get("JAXCOMM_RESTART", "0") == "0":
            shutil.rmtree(saved, ignore_errors=True)
        if source is None:
            simulate(data_config(samples), data_dir, 1, Console(stderr=True))
    backend.barrier()
    if source is not None:
        example, feed_from = source.example, source.batches
    else:
        dataset = load(data_config(samples), data_dir)
        example = dataset.train_x[0]
        feed_from = functools.partial(batches, dataset, backend, batch, seed)

    model = NETWORKS[network].clone(axis_name=AXIS)
    tx = optimizer(lr, steps)
    dtype = jnp.float64 if float64 else jnp.float32
    state = initial_state(model, tx, example, seed, dtype)
    losses = np.full(steps, np.nan)
    # But for rounding it does not matter how many ranks share a batch: not among these.
    settings = {"steps": steps, "batch": batch, "lr": lr, "seed": seed}
    settings |= {"samples": samples, "float64": float64, "network": network}
    if source is not None:
        settings["shards"] = source.manifest.sha256
    try:
        found = restore(saved, (state, losses), settings=settings, fallback=True)
    except CheckpointError as error:
        raise click.UsageError(str(error)) from error
    first, (state, losses) = found or (0, (state, losses))
    state = backend.replicate(state)
    train_step = backend.compile(make_train_step(model, tx))
    feed = Timed(feed_from(first))
    if backend.name == "jaxcomm" and root:
        # Lowering plans and neither runs nor waits: one rank may do it alone.
        train_step.lower(state, next(feed_from(0)))
        schedule = train_step.schedule.explain()
        Console(stderr=True).print(schedule, highlight=False, soft_wrap=True)
        (out / "schedule.txt").write_text(schedule + "\n")

    checks = backend.checks()
    # Without it a signal ends the process at once.
    asked = Stop() if checkpoint_every else None
    stop = min(stop or steps, steps)
    with Telemetry(stop, batch, root, losses[:first]) as telemetry:
        for step, local_batch in zip(range(first + 1, stop + 1), feed, strict=False):
            # The loss is read late: the next batch is made while this step runs.
            state, loss = train_step(state, local_batch)
            telemetry.record(step, loss)
            if step == first + 1:
                checks = backend.checks()
            if step == compare_steps and root:
                checkpoint.save(out / f"params_{step}.npz", backend.fetch(state.params))
            stopped = asked is not None and asked.requested(step)
            if checkpoint_every and (stopped or step % checkpoint_every == 0):
                losses[:step] = telemetry.losses()
                save(saved, step, (backend.fetch(state), losses), settings=settings)
            if stopped:
                click.echo(f"ended on request after step {step}; saved", err=True)
                return

    if root:
        params, batch_stats = backend.fetch((state.params, state.batch_stats))
        variables = {"params": params, "batch_stats": batch_stats}
        checkpoint.save(out / "params.npz", variables)
        report = {
            "backend": backend.name,
            "network": network,
            "ranks": backend.size,
            "control_messages_per_step": _per_step(checks, backend.checks(), stop),
            "schedule_fingerprint": None,
            **telemetry.report(),
            # Waited for each batch, from this process's first step on.
            "data_seconds": feed.seconds,
        }
        if backend.name == "jaxcomm":
            report["schedule_fingerprint"] = train_step.schedule.fingerprint
        (out / "train.json").write_text(json.dumps(report, indent=1) + "\n")


def _per_step(first: int | None, last: int | None, steps: int) -> float | None:
    """Schedule checks per step after the first."""
    if first is None or last is None:
        return None
    return (last - first) / max(1, steps - 1)


if __name__ == "__main__":
    main()
