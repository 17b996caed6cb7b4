r"""Train a network to tell space groups from diffraction patterns, data-parallel.

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
    "--steps", type=click.IntRange(UNTIMED_STEPS + 1), default=1000, show_default=True
)
@click.option(
    "--batch",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="samples, over all ranks together",
)
@click.option(
    "--lr",
    type=click.FloatRange(0, min_open=True),
    default=1e-3,
    show_default=True,
    help=f"for {training.SAMPLES_PER_RATE} samples of a batch",
)
@click.option(
    "--group",
    "groups",
    type=int,
    multiple=True,
    help="a space group; may be repeated; without it all that there are prototypes of",
)
@click.option(
    "--materials",
    type=click.IntRange(10),
    default=30,
    show_default=True,
    help="generated materials of each space group",
)
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="samples of each material",
)
@click.option(
    "--hold-out",
    "rule",
    type=click.Choice(space_groups.RULES),
    default="materials",
    show_default=True,
    help="materials: elements that their structure type does not have in training; "
    "prototypes: whole structure types",
)
@click.option(
    "--test/--no-test",
    "tested",
    default=True,
    show_default=True,
    help="score the test materials too; leave that out while you choose settings",
)
@click.option(
    "--network",
    type=click.Choice(list(NETWORKS)),
    default="spectral",
    show_default=True,
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
    groups: tuple[int, ...],
    materials: int,
    repeats: int,
    rule: str,
    tested: bool,
    network: str,
    seed: int,
    float64: bool,
    data_dir: Path,
    out: Path,
) -> None:
    """Train a network to tell space groups.

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
    try:
        wanted = data.PatternConfig(groups, materials, repeats)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    simulated = time.perf_counter()
    _simulate(wanted, data_dir, backend, console)
    backend.barrier()
    simulated = time.perf_counter() - simulated
    try:
        parts = data.load(wanted, data_dir, rule)
    except CacheError as error:
        raise click.UsageError(str(error)) from error
    train = parts["train"]
    if batch > len(train.y):
        raise click.UsageError(
            f"--batch {batch} exceeds the {len(train.y)} training samples; give fewer, "
            "or more --repeats"
        )

    dtype = jnp.float64 if float64 else jnp.float32
    model = NETWORKS[network].clone(axis_name=AXIS)
    tx = training.optimizer(lr, batch, steps)
    state = training.initial_state(model, tx, train.x.shape[1:], seed, dtype)
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
    logits = {
        name: training.classify(model, variables, samples.x)
        for name, samples in parts.items()
        if len(samples.y) and (tested or name in ("train", "validation"))
    }
    judged = "test" if "test" in logits else "validation"
    unseen = {name: parts[name] for name in logits if name != "train"}
    truth = parts[judged].y
    predicted = logits[judged].argmax(-1)
    scores.draw_confusion(out / "confusion.png", truth, predicted)
    report = {
        "backend": backend.name,
        "ranks": backend.size,
        "network": network,
        "parameters": sum(leaf.size for leaf in leaves),
        "gradients": len(leaves),
        "schedule": _planned(schedule),
        "held_out": rule,
        "space_groups": wanted.numbers,
        "samples": {name: len(samples.y) for name, samples in parts.items()},
        "materials": {
            name: len(np.unique(samples.material)) for name, samples in parts.items()
        },
        "prototypes": {
            name: len(np.unique(samples.prototype)) for name, samples in parts.items()
        },
        "scores": {
            "network": {
                name: scores.score_logits(found, parts[name].y)
                for name, found in logits.items()
            },
            "most frequent group": {
                name: scores.most_frequent(train.y, samples.y)
                for name, samples in unseen.items()
            },
            **scores.baselines(train, parts["validation"], unseen),
        },
        "confusion": {"of": judged, **scores.explain(truth, predicted)},
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
        task = shown.add_task(
            f"simulating {len(wanted.numbers)} space groups", total=1.0
        )
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
    tests = [name for name in report["scores"]["network"] if name != "train"]
    table = Table("top-1, macro-F1", *tests)
    for method, found in report["scores"].items():
        pairs = [(found[name]["top1"], found[name]["macro_f1"]) for name in tests]
        table.add_row(method, *(f"{top1:.3f}  {f1:.3f}" for top1, f1 in pairs))
    console.print(table)
    console.print(f"{report['samples_per_s']:.0f} samples/s")


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
