"""One training script, two ways to run it: what differs between them.

Under `jax.pmap` one process drives all devices; under jaxcomm each process drives one.
Both see a leading axis of as many devices as the process has.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from jaxcomm import terminal

AXIS = "batch"
OUT = Path("out") / "clients"


@dataclasses.dataclass(frozen=True)
class Backend:
    """Who runs.

    Attributes:
      name: "pmap" or "jaxcomm".
      pmap: `jax.pmap` or `jaxcomm.pmap`.
      first: the number of this process's first device among all.
      local: how many devices this process has.
      total: how many there are.
    """

    name: str
    pmap: Callable[..., Any]
    first: int
    local: int
    total: int

    def shard(self, batch: Any) -> Any:
        """Split arrays along axis 0 into one part a device; keep this process's."""

        def split(x: Any) -> Any:
            parts = np.reshape(x, (self.total, -1, *np.shape(x)[1:]))
            return parts[self.first : self.first + self.local]

        return jax.tree.map(split, batch)

    def replicate(self, tree: Any) -> Any:
        """Give every device of this process a copy, on a leading axis."""
        return jax.tree.map(
            lambda x: np.broadcast_to(np.asarray(x), (self.local, *np.shape(x))), tree
        )


def connect(name: str, devices: int) -> Backend:
    """Start a backend; the first thing that a script does with JAX."""
    if name == "pmap":
        jax.config.update("jax_num_cpu_devices", devices)
        return Backend(name, jax.pmap, 0, devices, devices)
    import jaxcomm

    comm = jaxcomm.init()
    return Backend(name, jaxcomm.pmap, comm.rank, 1, comm.size)


def options(command: Callable[..., None]) -> click.Command:
    """Give a script its command line."""
    for option in (
        click.option("--devices", default=2, show_default=True, help="Under pmap."),
        click.option("--steps", type=click.IntRange(1), default=20, show_default=True),
        click.option(
            "--backend",
            "backend_name",
            type=click.Choice(["pmap", "jaxcomm"]),
            default="pmap",
            show_default=True,
        ),
    ):
        command = option(command)
    return click.command(context_settings=terminal.HELP)(command)


def train(
    backend: Backend,
    name: str,
    step: Callable[[Any, Any], tuple[Any, Any]],
    state: Any,
    batches: Iterator[Any],
    steps: int,
    parameters: Callable[[Any], Any],
) -> None:
    """Run the steps, show progress, and save losses, times and parameters.

    Args:
      backend: who runs.
      name: of the script; results go to out/clients/NAME-BACKEND.npz.
      step: a mapped function of (state, batch) that returns (state, loss).
      state: with the leading axis.
      batches: global batches.
      steps: how many.
      parameters: from a state to the tree that is compared between backends.
    """
    losses, seconds = [], []
    columns = (TextColumn(f"{name}, {backend.name}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeElapsedColumn(),
        console=terminal.console(stderr=True),
        disable=backend.first > 0,
    ) as progress:
        task = progress.add_task("", total=steps)
        for _ in range(steps):
            batch = backend.shard(next(batches))
            start = time.perf_counter()
            state, loss = step(state, batch)
            losses.append(float(np.asarray(loss)[0]))  # waits for the step
            seconds.append(time.perf_counter() - start)
            progress.advance(task)

    found = jax.tree_util.tree_flatten_with_path(parameters(state))[0]
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf)[0] for path, leaf in found}
    if backend.name == "jaxcomm":
        import jaxcomm

        jaxcomm.assert_replicated(arrays)
    if backend.first == 0:
        OUT.mkdir(parents=True, exist_ok=True)
        times = {"losses": np.array(losses), "seconds": np.array(seconds)}
        np.savez(OUT / f"{name}-{backend.name}.npz", **times, **arrays)
        plot(name)


def plot(name: str) -> None:
    """Draw the loss curves that there are of a script."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for backend, style in (("pmap", "o"), ("jaxcomm", "-")):
        path = OUT / f"{name}-{backend}.npz"
        if path.exists():
            axes.plot(np.load(path)["losses"], style, label=backend, fillstyle="none")
    axes.set(title=name, xlabel="step", ylabel="loss")
    axes.legend()
    figure.savefig(OUT / f"{name}.png", dpi=120)
    plt.close(figure)


def compare(name: str) -> dict[str, float]:
    """Return how far the backends' parameters are apart, and their step times.

    The difference is the norm of all parameters' difference over their norm.
    """
    one, other = (
        np.load(OUT / f"{name}-{backend}.npz") for backend in ("pmap", "jaxcomm")
    )
    assert set(one) == set(other)
    names = sorted(set(one) - {"losses", "seconds"})
    mine, theirs = (
        np.concatenate([np.ravel(found[name]).astype(np.float64) for name in names])
        for found in (other, one)
    )
    gap = float(np.linalg.norm(mine - theirs) / np.linalg.norm(theirs))
    # The first steps compile.
    times = [float(np.median(found["seconds"][3:])) for found in (one, other)]
    return {
        "relative difference": gap,
        "last loss, pmap": float(one["losses"][-1]),
        "last loss, jaxcomm": float(other["losses"][-1]),
        "ms a step, pmap": 1e3 * times[0],
        "ms a step, jaxcomm": 1e3 * times[1],
        "jaxcomm / pmap": times[1] / times[0],
    }


def report(names: list[str]) -> dict[str, dict[str, float]]:
    """Compare scripts and write out/clients/report.json."""
    found = {name: compare(name) for name in names}
    (OUT / "report.json").write_text(json.dumps(found, indent=1) + "\n")
    return found
