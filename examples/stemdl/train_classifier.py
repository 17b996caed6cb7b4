r"""Train a ResNet to tell space groups from diffraction patterns, data-parallel.

jaxcomm run -n 2 examples/stemdl/train_classifier.py --out out/classify
XLA_FLAGS=--xla_force_host_platform_device_count=2 \
        python examples/stemdl/train_classifier.py --backend pmap --out out/classify-pmap
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import augment
import checkpoint
import config
from classify import data, groups, scores
from classify.network import NETWORKS, ResNet
from jaxcomm.data import Batches
from parallel import AXIS, BACKENDS, Backend, Step
from recipe import State
from telemetry import UNTIMED_STEPS, NonFiniteLossError, Telemetry

SAMPLES_PER_RATE = 32
"""Patterns of a global batch that one --lr is for: the batch per rank of ORNL's code,
whose rate is 1e-3 times the ranks."""

WEIGHT_DECAY = 1e-2


def optimizer(lr: float, batch: int, steps: int) -> optax.GradientTransformation:
    """AdamW with linear scaling, a linear warm-up and a cosine.

    The rate goes by the global batch: with so many samples per rank that is the rate
    times the ranks, and a run does not depend on how many ranks share its batches.
    """
    peak = lr * batch / SAMPLES_PER_RATE
    warm_up = min(steps // 10, 100)
    rate = optax.warmup_cosine_decay_schedule(
        peak / max(1, warm_up), peak, warm_up, steps, 0.01 * peak
    )
    return optax.adamw(rate, weight_decay=WEIGHT_DECAY)


def initial_state(
    model: ResNet, tx: optax.GradientTransformation, side: int, seed: int, dtype: Any
) -> State:
    """The same in every process that calls it with the same arguments."""
    shape = jnp.zeros((1, side, side), dtype)
    variables = jax.jit(model.init)(jax.random.key(seed), shape)
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
    params = variables["params"]
    return State(params, variables["batch_stats"], tx.init(params))


def make_train_step(model: ResNet, tx: optax.GradientTransformation) -> Step:
    """Return `(state, (patterns, groups)) -> (state, loss)` of one device's samples."""

    def train_step(state: State, batch: Any) -> tuple[State, jax.Array]:
        x, y = batch

        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updated = model.apply(
                variables, x, train=True, mutable=["batch_stats"]
            )
            each = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return each.mean(), updated["batch_stats"]

        (loss, batch_stats), grads = jax.value_and_grad(loss_of, has_aux=True)(
            state.params
        )
        grads = jax.lax.pmean(grads, AXIS)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, batch_stats, opt_state), jax.lax.pmean(loss, AXIS)

    return train_step


def batches(
    patterns: data.Patterns, backend: Backend, batch: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless augmented batches of single patterns, the same for any number of ranks.

    Yields:
      This process's part: patterns and space groups; pmap's with a device axis.
    """
    projections = patterns.x.shape[1]
    x = patterns.x.reshape(-1, *patterns.x.shape[2:])
    y = np.repeat(patterns.y, projections)
    order = Batches(len(x), batch, seed, rank=0, size=1)
    for step in itertools.count():
        rows = backend.share(order.at(step).indices)
        # Turned or mirrored, a crystal keeps its space group, unless that is one of the
        # 22 chiral ones: none here is.
        symmetries = augment.draw(seed, order.epoch(step), len(x))
        drawn = [augment.transform_label(x[i], int(symmetries[i])) for i in rows.flat]
        yield np.reshape(drawn, (*rows.shape, *x.shape[1:])), y[rows]


def classify(model: ResNet, variables: Any, x: np.ndarray) -> np.ndarray:
    """Logits of samples: (n, projections, side, side) to (n, projections, outputs)."""
    apply = jax.jit(model.apply)
    return np.stack([apply(variables, sample) for sample in x])


@click.command()
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
    help=f"for {SAMPLES_PER_RATE} patterns of a batch",
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
    """Train a ResNet; rank 0 writes classify.json and confusion.png to --out."""
    jax.config.update("jax_enable_x64", float64)
    backend = BACKENDS[backend_name]()
    root = backend.rank == 0
    console = Console(stderr=True)
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
    train, test = data.load(wanted, data_dir)

    dtype = jnp.float64 if float64 else jnp.float32
    model = NETWORKS[network].clone(axis_name=AXIS)
    tx = optimizer(lr, batch, steps)
    state = initial_state(model, tx, train.x.shape[-1], seed, dtype)
    leaves = jax.tree.leaves(state.params)
    state = backend.replicate(state)
    step_of = backend.compile(make_train_step(model, tx))
    feed = batches(train, backend, batch, seed)
    if root:
        out.mkdir(parents=True, exist_ok=True)
    schedule = None
    if backend.name == "jaxcomm" and root:
        # Lowering plans and neither runs nor waits: one rank may do it alone.
        step_of.lower(state, next(batches(train, backend, batch, seed)))
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
    checkpoint.save(out / "params.npz", variables)
    logits = classify(model, variables, test.x)
    predicted = logits.mean(1).argmax(-1)
    scores.draw_confusion(out / "confusion.png", test.y, predicted)
    report = {
        "backend": backend.name,
        "ranks": backend.size,
        "network": network,
        "parameters": sum(leaf.size for leaf in leaves),
        "gradients": len(leaves),
        "schedule": _planned(schedule),
        "space_groups": groups.present(),
        "train_samples": len(train.y),
        "test_samples": len(test.y),
        "held_out": sorted(set(test.material.tolist())),
        **scores.score_logits(logits, test.y),
        "on_training_samples": scores.score_logits(
            classify(model, variables, train.x[: len(test.y)]), train.y[: len(test.y)]
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
    # One process of several devices simulates alone.
    size = backend.size if backend.name == "jaxcomm" else 1
    with Progress(console=console, transient=True, disable=backend.rank > 0) as shown:
        task = shown.add_task(f"simulating {wanted.samples} samples", total=1.0)
        for done in data.ensure(wanted, directory, backend.rank, size):
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


if __name__ == "__main__":
    main()
