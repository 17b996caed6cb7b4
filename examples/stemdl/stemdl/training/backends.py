"""Two ways to run one train step on several devices.

The step names its axis, "batch", and averages over it; who supplies the axis is
decided here. `Ranks` is one process per device, `Devices` one process for all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any, Protocol

import jax
import numpy as np

import jaxcomm

AXIS = "batch"

Step = Callable[[Any, Any], tuple[Any, jax.Array]]


class Backend(Protocol):
    """What differs between one process per device and one process for all."""

    name: str
    rank: int
    size: int
    process: int
    processes: int

    def compile(self, step: Step, **options: Any) -> Any:
        """Make `(state, batch) -> (state, loss)` run on all devices.

        Options are those of `jaxcomm.data_parallel`: groups, bucket_bytes.
        """
        ...

    def replicate(self, state: Any) -> Any:
        """Give every device the same state."""
        ...

    def share(self, rows: np.ndarray) -> np.ndarray:
        """Row indices of this process's part of a batch, shaped as the step's input."""
        ...

    def fetch(self, tree: Any) -> Any:
        """One device's copy of replicated values, as NumPy arrays."""
        ...

    def barrier(self) -> None:
        """Wait for all processes."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, on all of them; any that can be pickled."""
        ...

    def mean(self, tree: Any) -> Any:
        """Average values of this process over all, as NumPy arrays."""
        ...

    def checks(self) -> int | None:
        """Times that ranks have compared schedules so far; None without ranks."""
        ...

    def communication_seconds(self) -> float | None:
        """Time inside collectives so far, with waiting for others; None if unknown."""
        ...


class Ranks:
    """jaxcomm: every rank computes on its slice of the batch."""

    name = "jaxcomm"

    def __init__(self) -> None:
        self._comm = jaxcomm.init()
        self.rank, self.size = jaxcomm.rank(), jaxcomm.size()
        self.process, self.processes = self.rank, self.size

    def compile(self, step: Step, **options: Any) -> Any:
        return jaxcomm.data_parallel(step, axis_name=AXIS, donate_argnums=0, **options)

    def replicate(self, state: Any) -> Any:
        return jaxcomm.broadcast(state, root=0)

    def share(self, rows: np.ndarray) -> np.ndarray:
        return np.split(rows, self.size)[self.rank]

    def fetch(self, tree: Any) -> Any:
        return jax.tree.map(np.asarray, tree)

    def barrier(self) -> None:
        self._comm.barrier()

    def gather(self, value: Any) -> list[Any]:
        return self._comm.all_gather_object(value)

    def mean(self, tree: Any) -> Any:
        return self.fetch(jaxcomm.all_reduce(tree, op="mean"))

    def checks(self) -> int | None:
        return self._comm.counters().get("agreements", 0)

    def communication_seconds(self) -> float | None:
        return 1e-9 * self._comm.counters().get("nanoseconds", 0)


class Devices:
    """`jax.pmap`: arrays carry a leading device axis.

    On a CPU, XLA_FLAGS=--xla_force_host_platform_device_count=2 makes two devices.
    """

    name = "pmap"
    rank = process = 0
    processes = 1

    def __init__(self) -> None:
        self.size = jax.local_device_count()

    def compile(self, step: Step, **options: Any) -> Any:
        if any(value is not None for value in options.values()):
            raise ValueError(f"{options}: jax.pmap plans no buckets")
        return jax.pmap(step, axis_name=AXIS, donate_argnums=0)

    def replicate(self, state: Any) -> Any:
        return jax.tree.map(
            lambda leaf: np.broadcast_to(leaf, (self.size, *np.shape(leaf))), state
        )

    def share(self, rows: np.ndarray) -> np.ndarray:
        return np.stack(np.split(rows, self.size))

    def fetch(self, tree: Any) -> Any:
        return jax.tree.map(lambda leaf: np.asarray(leaf[0]), tree)

    def barrier(self) -> None:
        pass

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def mean(self, tree: Any) -> Any:
        return jax.tree.map(np.asarray, tree)

    def checks(self) -> int | None:
        return None

    def communication_seconds(self) -> float | None:
        return None


class ControlMessages:
    """Counts schedule checks, from now on."""

    def __init__(self, backend: Backend):
        self._backend = backend
        self._start, self._aside = backend.checks() or 0, 0

    @contextlib.contextmanager
    def aside(self) -> Generator[None]:
        """Leave out those of what is done meanwhile: it has schedules of its own."""
        before = self._backend.checks() or 0
        yield
        self._aside += (self._backend.checks() or 0) - before

    def per_step(self, steps: int) -> float | None:
        """Mean over so many steps; None where ranks are none."""
        checks = self._backend.checks()
        if checks is None:
            return None
        return (checks - self._start - self._aside) / max(1, steps)


BACKENDS: dict[str, Callable[[], Backend]] = {"jaxcomm": Ranks, "pmap": Devices}
