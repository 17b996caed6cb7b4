r"""Train a ResNet to tell space groups from diffraction patterns, data-parallel.

jaxcomm run -n 2 -m stemdl classify --out out/classify
XLA_FLAGS=--xla_force_host_platform_device_count=2 \
        python -m stemdl classify --backend pmap --out out/classify-2
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from jaxcomm import terminal
from stemdl import config
from stemdl.classification import data, scores, space_groups, training
from stemdl.classification.network import NETWORKS
from stemdl.data.dataset import CacheError
from stemdl.training import parameters
from stemdl.training.backends import AXIS, BACKENDS, Backend
from stemdl.training.telemetry import UNTIMED_STEPS, NonFiniteLossError, Telemetry


@click.command(context_settings=terminal.HELP)
@click.option(
    "--backend",
    "backend_name",
    type=click.Choice(sorted(BACKENDS)),
    default="jaxcomm",
    show_default=True,
)
@click.option(
    "--steps", type=click.IntRange(UNTIMED_STEPS + 1), default=700, show_default=True
)
@click.option(
    "--batch",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="patterns, over all ranks together",
)
@click.option(
    "--lr",
    type=click.FloatRange(0, min_open=True),
    default=1e-3,
    show_default=True,
    help=f"for {training.SAMPLES_PER_RATE} patterns of a batch",
)
@click.option("--samples", type=click.IntRange(1), default=1400, show_default=True)
@click.option("--test-samples", type=click.IntRange(1), default=280, show_default=True)
@click.option(
    "--network", type=click.Choice(list(NETWORKS)), default="small", show_default=True
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--float64", is_flag=True, help="train in double precision")
@click.option(
    "--data",
    "data_dir",
    type=click.Path(path_type=Path, file_okay=False),
    default="data/stemdl-classify",
    show_default=True,
    help="where simulated data are cached; all ranks must see it",
)
@click.option(
    "--out", type=click.Path(path_type=Path), default="out/classify", show_default=True
)
def main(
    backend_name: str,
    steps: int,
    batch: int,
    lr: float,
    samples: int,
    test_samples: int,
    network: str,
    seed: int,
    float64: bool,
    data_dir: Path,
    out: Path,
) -> None:
    """Train a ResNet.

    Rank 0 writes classify.json and confusion.png to --out.
    """
    jax.config.update("jax_enable_x64", float64)
    backend = BACKENDS[backend_name]()
    root = backend.rank == 0
    console = terminal.console(stderr=True)
    if batch % backend.size:
        raise click.UsageError(
            f"--batch {batch} does not divide over {backend.size} devices"
        )
    wanted = data.PatternConfig(train=samples, test=test_samples)
    if batch > samples * len(data.ZONES):
        raise click.UsageError(
            f"--batch {batch} exceeds the {samples * len(data.ZONES)} training "
            "patterns; give fewer, or more --samples"
        )
    simulated = time.perf_counter()
    _simulate(wanted, data_dir, backend, console)
    backend.barrier()
    simulated = time.perf_counter() - simulated
    try:
        train, test = data.load(wanted, data_dir)
    except CacheError as error:
        raise click.UsageError(str(error)) from error

    dtype = jnp.float64 if float64 else jnp.float32
    model = NETWORKS[network].clone(axis_name=AXIS)
    tx = training.optimizer(lr, batch, steps)
    state = training.initial_state(model, tx, train.x.shape[-1], seed, dtype)
    leaves = jax.tree.leaves(state.params)
    state = backend.replicate(state)
    step_of = backend.compile(training.make_train_step(model, tx))
    feed = training.batches(train, backend, batch, seed)
    if root:
        out.mkdir(parents=True, exist_ok=True)
    schedule = None
    if backend.name == "jaxcomm" and root:
        # Lowering plans and neither runs nor waits: one rank may do it alone.
        step_of.lower(state, next(training.batches(train, backend, batch, seed)))
        schedule = step_of.schedule
        console.print(schedule.explain(), highlight=False, soft_wrap=True)
        (out / "schedule.txt").write_text(schedule.explain() + "\n")
    try:
        with Telemetry(steps, batch, root, np.empty(0)) as telemetry:
            for step, local_batch in zip(range(1, steps + 1), feed, strict=False):
                state, loss = step_of(state, local_batch)
                telemetry.record(step, loss)
    except NonFiniteLossError as error:
        raise click.UsageError(f"{error}; give a lower --lr") from error
    if not root:
        return

    params, batch_stats = backend.fetch((state.params, state.batch_stats))
    variables = {"params": params, "batch_stats": batch_stats}
    parameters.save(out / "params.npz", variables)
    logits = training.classify(model, variables, test.x)
    predicted = logits.mean(1).argmax(-1)
    scores.draw_confusion(out / "confusion.png", test.y, predicted)
    report = {
        "backend": backend.name,
        "ranks": backend.size,
        "network": network,
        "parameters": sum(leaf.size for leaf in leaves),
        "gradients": len(leaves),
        "schedule": _planned(schedule),
        "space_groups": space_groups.present(),
        "train_samples": len(train.y),
        "test_samples": len(test.y),
        "held_out": sorted(set(test.material.tolist())),
        **scores.score_logits(logits, test.y),
        "on_training_samples": scores.score_logits(
            training.classify(model, variables, train.x[: len(test.y)]),
            train.y[: len(test.y)],
        ),
        "chance": 1 / len(np.unique(test.y)),
        "most_frequent": scores.most_frequent(train.y, test.y),
        "radial_forest": scores.radial_forest(train.x, train.y, test.x, test.y),
        "simulation_seconds": simulated,
        **telemetry.report(),
        "versions": config.versions(),
    }
    (out / "classify.json").write_text(json.dumps(report, indent=1) + "\n")
    _show(report, console)


def _simulate(
    wanted: data.PatternConfig, directory: Path, backend: Backend, console: Console
) -> None:
    """Simulate what is not cached, every rank its share."""
    process, processes = backend.process, backend.processes
    with Progress(console=console, transient=True, disable=process > 0) as shown:
        task = shown.add_task(f"simulating {wanted.samples} samples", total=1.0)
        for done in data.ensure(wanted, directory, process, processes):
            shown.update(task, completed=done)


def _show(report: dict[str, Any], console: Console) -> None:
    """Print the figures of the report."""
    planned = report["schedule"]
    if planned is not None:
        console.print(
            f"{report['gradients']} gradients in {planned['buckets_with_gradients']} "
            f"of {planned['buckets']} buckets; the others hold batch statistics"
        )
    table = Table("on held-out materials", "top-1", "macro-F1")
    for name, found in (
        ("chance", {"top1": report["chance"]}),
        ("most frequent group", report["most_frequent"]),
        ("random forest on radial profiles", report["radial_forest"]),
        (f"network, {report['steps']} steps", report),
    ):
        f1 = f"{found['macro_f1']:.3f}" if "macro_f1" in found else ""
        table.add_row(name, f"{found['top1']:.3f}", f1)
    console.print(table)
    console.print(f"{report['samples_per_s']:.0f} patterns/s")


def _planned(schedule: Any) -> dict[str, Any] | None:
    """What the schedule holds, in numbers."""
    if schedule is None:
        return None
    paths = [leaf.path for leaf in schedule.leaves]
    # A gradient goes by the name of the parameter that it becomes.
    with_gradients = [
        bucket
        for bucket in schedule.buckets
        if any(paths[leaf].startswith("[0].params") for leaf in bucket.leaves)
    ]
    return {
        "fingerprint": schedule.fingerprint,
        "leaves": len(paths),
        "bytes": schedule.nbytes,
        "buckets": len(schedule.buckets),
        "buckets_with_gradients": len(with_gradients),
    }
