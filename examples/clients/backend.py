"""One training script, several ways to run it: what differs between them.

Under JAX's own `pmap` and `shard_map` one process drives all devices; under jaxcomm's
each process drives one. Under `pmap` arrays have a leading axis of as many devices as
the process has; under `shard_map` they have none, and a device's part is a block.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
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
KEPT = "state.msgpack"
# The name of each way to run, and how its losses are drawn.
WAYS = {"pmap": "o", "jaxcomm": "-", "shard_map": "x", "jaxcomm-shard_map": "--"}


@dataclasses.dataclass(frozen=True)
class Backend:
    """Who runs.

    Attributes:
      name: one of WAYS.
      mapped: `jax.pmap`, `jaxcomm.pmap`, `jax.shard_map` or `jaxcomm.shard_map`.
      place: from arrays that every process holds whole, and a spec, to what a function
        under `shard_map` is called with. None under `pmap`.
      first: the number of this process's first device among all.
      local: how many devices this process has.
      total: how many there are.
    """

    name: str
    mapped: Callable[..., Any]
    place: Callable[[Any, P], Any] | None
    first: int
    local: int
    total: int

    @property
    def pmap(self) -> Callable[..., Any]:
        if self.place:
            raise click.UsageError(f"no step of this script is for {self.name}")
        return self.mapped

    @property
    def shard_map(self) -> Callable[..., Any] | None:
        """`shard_map`, where the script is to use it and not `pmap`."""
        return self.mapped if self.place else None

    def shard(self, batch: Any) -> Any:
        """Split arrays along axis 0 into one part a device; keep this process's."""
        if self.place:
            return self.place(batch, P(AXIS))

        def split(x: Any) -> Any:
            parts = np.reshape(x, (self.total, -1, *np.shape(x)[1:]))
            return parts[self.first : self.first + self.local]

        return jax.tree.map(split, batch)

    def per_device(self, keys: Any) -> Any:
        """Give each device its own of arrays that have a row for every one."""
        return self.shard(keys) if self.place else keys[self.first :][: self.local]

    def replicate(self, tree: Any) -> Any:
        """Give every device of this process a copy."""
        if self.place:
            return self.place(tree, P())
        return jax.tree.map(
            lambda x: jnp.broadcast_to(x, (self.local, *np.shape(x))), tree
        )

    def first_copy(self, tree: Any) -> Any:
        """Take one device's copy of what all of them have alike."""
        return tree if self.place else jax.tree.map(lambda x: x[0], tree)


def connect(name: str, devices: int) -> Backend:
    """Start a backend; the first thing that a script does with JAX."""
    if name == "pmap":
        jax.config.update("jax_num_cpu_devices", devices)
        return Backend(name, jax.pmap, None, 0, devices, devices)
    if name == "shard_map":
        jax.config.update("jax_num_cpu_devices", devices)
        mesh = jax.make_mesh((devices,), (AXIS,), axis_types=(AxisType.Auto,))

        def place(tree: Any, spec: P) -> Any:
            return jax.device_put(tree, NamedSharding(mesh, spec))

        mapped = functools.partial(jax.shard_map, mesh=mesh)
        return Backend(name, mapped, place, 0, devices, devices)
    import jaxcomm

    comm = jaxcomm.init()
    if name == "jaxcomm":
        return Backend(name, jaxcomm.pmap, None, comm.rank, 1, comm.size)
    return Backend(
        name, jaxcomm.shard_map, jaxcomm.local_block, comm.rank, 1, comm.size
    )


def options(command: Callable[..., None]) -> click.Command:
    """Give a script its command line."""
    for option in (
        click.option("--devices", default=2, show_default=True, help="Under pmap."),
        click.option("--steps", type=click.IntRange(1), default=20, show_default=True),
        click.option(
            "--backend",
            "backend_name",
            type=click.Choice(list(WAYS)),
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
    after: Callable[[int, Any], None] = lambda done, state: None,
) -> None:
    """Run the steps, show progress, and save losses, times and parameters.

    Args:
      backend: who runs.
      name: of the script; results go to out/clients/NAME-BACKEND.npz.
      step: a mapped function of (state, batch) that returns (state, loss).
      state: as the step takes it.
      batches: global batches.
      steps: how many.
      parameters: from a state to the tree that is compared between backends.
      after: called after each step, with the number of those done and the state.
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
        for done in range(1, steps + 1):
            batch = backend.shard(next(batches))
            start = time.perf_counter()
            state, loss = step(state, batch)
            losses.append(float(backend.first_copy(loss)))  # waits for the step
            seconds.append(time.perf_counter() - start)
            after(done, state)
            progress.advance(task)

    tree = backend.first_copy(parameters(state))
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    arrays: dict[str, Any] = {
        jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in found
    }
    if backend.name.startswith("jaxcomm"):
        import jaxcomm

        jaxcomm.assert_replicated(arrays)
    if backend.first == 0:
        OUT.mkdir(parents=True, exist_ok=True)
        times = {"losses": np.array(losses), "seconds": np.array(seconds)}
        np.savez(OUT / f"{name}-{backend.name}.npz", **times, **arrays)
        plot(name)


def save(backend: Backend, name: str, step: int, state: Any) -> None:
    """Keep one device's copy of a state; under jaxcomm all ranks call it together."""
    directory = OUT / f"{name}-{backend.name}"
    if backend.name.startswith("jaxcomm"):
        from jaxcomm import checkpoint

        checkpoint.save(directory, step, state)
        return
    # One process has it all: any library will do, and need not know of devices.
    directory.mkdir(parents=True, exist_ok=True)
    (directory / KEPT).write_bytes(serialization.to_bytes((step, state)))


def restore(backend: Backend, name: str, like: Any) -> tuple[int, Any]:
    """Return the newest state that was kept, to be replicated, and its step."""
    directory = OUT / f"{name}-{backend.name}"
    if backend.name.startswith("jaxcomm"):
        from jaxcomm import checkpoint

        found = checkpoint.restore(directory, like)
        if found is None:
            raise click.UsageError(f"no checkpoint in {directory}")
        return found
    found: Any = serialization.from_bytes((0, like), (directory / KEPT).read_bytes())
    return found


def forget(backend: Backend, name: str) -> None:
    """Delete what was kept; steps begin at 0 again."""
    if backend.first == 0:
        shutil.rmtree(OUT / f"{name}-{backend.name}", ignore_errors=True)


def plot(name: str) -> None:
    """Draw the loss curves that there are of a script."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for backend, style in WAYS.items():
        path = OUT / f"{name}-{backend}.npz"
        if path.exists():
            axes.plot(np.load(path)["losses"], style, label=backend, fillstyle="none")
    axes.set(title=name, xlabel="step", ylabel="loss")
    axes.legend()
    figure.savefig(OUT / f"{name}.png", dpi=120)
    plt.close(figure)


def load(name: str, way: str) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Return a run's parameters, its losses, and the seconds that its steps took."""
    found = dict(np.load(OUT / f"{name}-{way}.npz"))
    losses, seconds = found.pop("losses"), found.pop("seconds")
    return found, losses, seconds


def distance(mine: np.ndarray, theirs: np.ndarray) -> float:
    """Return the norm of a difference over the norm of what it is a difference to."""
    return float(np.linalg.norm(mine - theirs) / np.linalg.norm(theirs))


def compare(name: str, ways: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return how far each way's results are from the first's, and its step times."""
    found = {}
    theirs, their_losses, others = load(name, ways[0])
    for way in ways:
        mine, losses, seconds = load(name, way)
        assert set(mine) == set(theirs)
        flat = (
            np.concatenate([np.ravel(one[leaf]).astype(np.float64) for leaf in theirs])
            for one in (mine, theirs)
        )
        # The first steps compile.
        times = [float(np.median(x[min(3, len(x) - 1) :])) for x in (seconds, others)]
        found[way] = {
            "difference of parameters": distance(*flat),
            "of losses": distance(losses, their_losses),
            "last loss": float(losses[-1]),
            "ms a step": 1e3 * times[0],
            f"time / {ways[0]}'s": times[0] / times[1],
        }
    return found
