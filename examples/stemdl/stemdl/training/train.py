r"""Train the network, data-parallel over ranks or over devices.

jaxcomm run -n 2 -m stemdl train --out out/stemdl
jaxcomm run -n 2 -m stemdl train --config recipe.toml --set optimizer.lr=0.01
XLA_FLAGS=--xla_force_host_platform_device_count=2 \
        python -m stemdl train --backend pmap --out out/stemdl-pmap

With --checkpoint-every it goes on where it was ended: by SIGTERM or Ctrl-C, which save
first, or by a failure, after which `jaxcomm run --max-restarts 3` starts it again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any, NoReturn

import click
import jax
import numpy as np

import jaxcomm
from jaxcomm import terminal
from jaxcomm.checkpoint import CheckpointError, Stop, clear, restore, save
from stemdl import config
from stemdl.config import SAMPLES, Communication, Config, config_options
from stemdl.data import loading
from stemdl.data.cache import data_config, data_option, simulate
from stemdl.data.dataset import load
from stemdl.data.memory import Cached
from stemdl.training import nonfinite, optimizer, parameters, precision, recipe
from stemdl.training.backends import AXIS, BACKENDS, Backend, ControlMessages
from stemdl.training.monitor import Monitor
from stemdl.training.step_log import StepLog
from stemdl.training.telemetry import (
    UNTIMED_STEPS,
    NonFiniteLossError,
    Telemetry,
    Timed,
)

MOST_CACHED = 6000
"""Training samples that rank 0 simulates alone while the others wait."""


@click.command(context_settings=terminal.HELP)
@click.option(
    "--backend",
    "backend_name",
    type=click.Choice(sorted(BACKENDS)),
    default="jaxcomm",
    show_default=True,
)
@click.option(
    "--transport",
    default="auto",
    show_default=True,
    help="what jaxcomm sends by, such as mpi or mpi4jax",
)
@config_options
@click.option(
    "--stop",
    type=click.IntRange(UNTIMED_STEPS + 1),
    help="stop after so many of these steps",
)
@click.option(
    "--compare-steps",
    default=20,
    show_default=True,
    help="keep the parameters after so many steps",
)
@click.option(
    "--evaluate-every",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="score the held-out materials after every so many steps; 0: never",
)
@click.option(
    "--log-every",
    type=click.IntRange(1),
    default=20,
    show_default=True,
    help="steps between two lines of metrics.csv",
)
@click.option(
    "--tensorboard",
    is_flag=True,
    help="write metrics.csv's numbers to --out/tensorboard too",
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
    help="train from what `stemdl simulate` has written here, instead of --data",
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
    resolved: Config,
    backend_name: str,
    transport: str,
    stop: int | None,
    compare_steps: int,
    evaluate_every: int,
    log_every: int,
    tensorboard: bool,
    checkpoint_every: int,
    resume: bool,
    data_dir: Path,
    shards_dir: Path | None,
    stage: Path | None,
    out: Path,
) -> None:
    """Train the network.

    Rank 0 writes parameters and train.json to --out.
    """
    jax.config.update("jax_enable_x64", resolved.training.float64)
    if backend_name == "jaxcomm":
        # The first call decides; the backend's own returns the same communicator.
        jaxcomm.init(transport)
    elif transport != "auto":
        raise click.UsageError("--transport is jaxcomm's; --backend pmap has none")
    backend = BACKENDS[backend_name]()
    root = backend.rank == 0
    _check(resolved, backend)
    if shards_dir is not None:
        source, data = _from_shards(resolved, backend, shards_dir, stage)
    elif stage is not None:
        raise click.UsageError("--stage copies shards: give --shards too")
    else:
        source, data = _simulated(resolved, backend, data_dir)
    training = dataclasses.replace(resolved.training, samples=data["train"])
    resolved = dataclasses.replace(resolved, training=training)
    steps, batch = training.steps, training.batch
    saved = out / "checkpoints"
    if root:
        out.mkdir(parents=True, exist_ok=True)
        if not resume and os.environ.get("JAXCOMM_RESTART", "0") == "0":
            clear(saved)
    backend.barrier()

    model = recipe.build(
        resolved.network,
        source.pixels,
        axis_name=AXIS,
        dtype=precision.dtype_of(resolved.precision),
    )
    tx = optimizer.make(resolved.optimizer, resolved.schedule, steps, backend.size)
    try:
        state = recipe.initial_state(model, tx, source.example, resolved)
    except ValueError as error:  # of the network: it does not fit the data's shapes
        raise click.UsageError(str(error)) from error
    losses = np.full(steps, np.nan)
    settings = _settings(resolved, backend)
    if isinstance(source, loading.Source):
        settings["shards"] = source.manifest.sha256
    try:
        found = restore(saved, (state, losses), settings=settings, fallback=True)
    except CheckpointError as error:
        raise click.UsageError(str(error)) from error
    first, (state, losses) = found or (0, (state, losses))
    state = backend.replicate(state)
    train_step = recipe.compile_step(model, tx, resolved, backend)
    feed = Timed(source.batches(first))
    if root:
        _describe(resolved, out, first)
    if backend.name == "jaxcomm" and root:
        # Lowering plans and neither runs nor waits: one rank may do it alone.
        train_step.lower(state, next(source.batches(0)))
        schedule = train_step.schedule.explain()
        terminal.console(stderr=True).print(schedule, highlight=False, soft_wrap=True)
        (out / "schedule.txt").write_text(schedule + "\n")

    monitor = Monitor(model, source.held_out(), backend) if evaluate_every else None
    events = out / "tensorboard" if tensorboard else None
    path = out / "metrics.csv" if root else None
    log = StepLog(path, log_every, first, backend, events)
    messages = ControlMessages(backend)
    # Without it a signal ends the process at once.
    asked = Stop() if checkpoint_every else None
    stop = min(stop or steps, steps)
    try:
        with (
            contextlib.closing(log),
            Telemetry(stop, batch, root, losses[:first]) as telemetry,
        ):
            for step, local_batch in zip(
                range(first + 1, stop + 1), feed, strict=False
            ):
                # The loss is read late: the next batch is made while this step runs.
                state, loss = train_step(state, local_batch)
                telemetry.record(step, loss)
                if step == first + 1:
                    messages = ControlMessages(backend)
                if step == compare_steps and root:
                    params = backend.fetch(state.params)
                    parameters.save(out / f"params_{step}.npz", params)
                scores: dict[str, float] = {}
                if monitor and (step % evaluate_every == 0 or step == stop):
                    variables = backend.fetch((state.params, state.batch_stats))
                    with messages.aside():
                        scores = monitor(*variables)
                    telemetry.note(scores)
                log.record(step, telemetry, feed, scores)
                stopped = asked is not None and asked.requested(step)
                if checkpoint_every and (stopped or step % checkpoint_every == 0):
                    losses[:step] = telemetry.losses()
                    save(saved, step, (backend.fetch(state), losses), settings=settings)
                if stopped:
                    click.echo(f"ended on request after step {step}; saved", err=True)
                    return
    except NonFiniteLossError as error:
        _give_up(error, source, backend, out)

    if root:
        params, batch_stats = backend.fetch((state.params, state.batch_stats))
        variables = {"params": params, "batch_stats": batch_stats}
        parameters.save(out / "params.npz", variables)
        report = {
            "backend": backend.name,
            "network": resolved.network.name,
            "data": data,
            "ranks": backend.size,
            "control_messages_per_step": messages.per_step(stop - first - 1),
            "schedule_fingerprint": None,
            **telemetry.report(),
            # Waited for each batch, from this process's first step on.
            "data_seconds": feed.seconds,
        }
        if state.loss_scale is not None:
            scale = backend.fetch(state.loss_scale)
            report["loss_scale"] = float(scale.scale)
            report["skipped_steps"] = int(scale.skipped)
        if backend.name == "jaxcomm":
            report["schedule_fingerprint"] = train_step.schedule.fingerprint
        (out / "train.json").write_text(json.dumps(report, indent=1) + "\n")


def _from_shards(
    resolved: Config, backend: Backend, directory: Path, stage: Path | None
) -> tuple[loading.Source, dict[str, Any]]:
    """What batches come from, and the configuration of the data."""
    training = resolved.training
    try:
        source = loading.open_source(
            directory,
            stage,
            backend,
            training.batch,
            training.seed,
            training.samples or None,
            resolved.noise,
        )
    except loading.ShardError as error:
        raise click.UsageError(str(error)) from error
    return source, source.manifest.config


def _simulated(
    resolved: Config, backend: Backend, directory: Path
) -> tuple[Cached, dict[str, Any]]:
    """As `_from_shards`, of what rank 0 simulates unless it is cached."""
    training = resolved.training
    samples = training.samples or SAMPLES
    if samples > MOST_CACHED:
        raise click.UsageError(
            f"{samples} training samples are more than one process should simulate "
            f"({MOST_CACHED}): write shards with `stemdl simulate` on all ranks, and "
            "give --shards"
        )
    data = data_config(samples)
    if backend.rank == 0:
        simulate(data, directory, 1, terminal.console(stderr=True))
    backend.barrier()
    dataset = load(data, directory)
    source = Cached(dataset, backend, training.batch, training.seed, resolved.noise)
    return source, json.loads(data.to_json())


def _describe(resolved: Config, out: Path, first: int) -> None:
    """Write what the run is made with; what another run left here goes."""
    stale = [out / "params.npz", out / "train.json"]
    for path in [*stale, *(() if first else out.glob("params_*.npz"))]:
        path.unlink(missing_ok=True)
    (out / "config.toml").write_text(resolved.to_toml())
    versions = json.dumps(config.versions(), indent=1)
    (out / "versions.json").write_text(versions + "\n")


def _check(resolved: Config, backend: Backend) -> None:
    """Refuse what does not go with the backend or its number of devices."""
    batch, accumulate = resolved.training.batch, resolved.training.accumulate
    if batch % (backend.size * accumulate):
        parts = f" in {accumulate} parts each (training.accumulate)"
        raise click.UsageError(
            f"--batch {batch} does not divide over {backend.size} devices"
            + (parts if accumulate > 1 else "")
        )
    if backend.name == "pmap" and resolved.communication != Communication():
        raise click.UsageError(
            "[communication] is about jaxcomm's buckets, and --backend pmap has none: "
            "leave its keys out"
        )


def _settings(resolved: Config, backend: Backend) -> dict[str, Any]:
    """What a checkpoint must have been made with."""
    settings = resolved.flat()
    # Rounding apart, neither these matter nor how many ranks share a batch...
    for key in ("groups", "bucket_bytes"):
        del settings[f"communication.{key}"]
    del settings["network.checkpoint"]
    # ... unless they decide the learning rate.
    if resolved.schedule.times_ranks:
        settings["ranks"] = backend.size
    return settings


def _give_up(
    error: NonFiniteLossError,
    source: Any,
    backend: Backend,
    out: Path,
) -> NoReturn:
    """Keep the batch of a loss that is not finite, and end on every rank."""
    before = error.step - 1
    rows, (patterns, labels) = source.rows(before), next(source.batches(before))
    out.mkdir(parents=True, exist_ok=True)  # of another node, it may be another one
    path = out / f"nonfinite-step{error.step}-rank{backend.rank}.npz"
    found = nonfinite.keep(path, error.step, rows, patterns, labels)
    # The first rank that ends takes the others with it: not before all have saved.
    parts = [f"rank {k} had {text}" for k, text in enumerate(backend.gather(found))]
    # With exit code 2, so that it is not tried again: it would end the same way.
    raise click.UsageError(
        f"{error}; {'; '.join(parts)}. If the data are sound, lower "
        "optimizer.lr or give precision.compute a wider range."
    ) from error
