"""Progress on the terminal, and the figures of a finished training."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from jaxcomm import terminal

UNTIMED_STEPS = 3
"""First steps, which compile and touch memory; left out of the speed."""

LATE = 4
"""Steps after which a loss is read: by then it is there, and dispatch stays ahead."""

LINE_EVERY = 100

Item = TypeVar("Item")


class NonFiniteLossError(FloatingPointError):
    """A loss that is infinite or NaN; `step` counts from 1."""

    def __init__(self, step: int, loss: float):
        super().__init__(f"the loss of step {step} is {loss}")
        self.step = step


class Telemetry:
    """Collects losses and time; shows them, where asked to."""

    def __init__(self, steps: int, batch: int, shown: bool, before: np.ndarray):
        """`before` are the losses of the steps done before, in another process."""
        self._steps, self._batch, self._first = steps, batch, len(before)
        self._losses: list[Any] = before.tolist()
        self._read: list[float] = before.tolist()
        self._started = self._seconds = 0.0
        console = terminal.console(stderr=True)
        # Where there is no terminal, a log gets a line now and then.
        self._log = console if shown and not console.is_terminal else None
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[speed]:.0f} samples/s"),
            TextColumn("{task.fields[held_out]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not (shown and console.is_terminal),
        )
        self._task = self._bar.add_task(
            "",
            total=steps,
            completed=self._first,
            loss=math.nan,
            speed=0.0,
            held_out="",
        )

    def __enter__(self) -> Telemetry:
        self._bar.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._bar.stop()
        if kind is None:
            self.losses()
            if self._started:
                self._seconds = time.perf_counter() - self._started

    def record(self, step: int, loss: jax.Array) -> None:
        """Note the loss of step number `step`, counted from 1, without waiting."""
        self._losses.append(loss)
        if step == self._first + UNTIMED_STEPS:
            jax.block_until_ready(loss)
            self._started = time.perf_counter()
        if step > len(self._read) + LATE:
            self._read_next()
            self._show(step)

    def latest(self, steps: int) -> float:
        """Mean loss of the last so many steps whose loss has been read."""
        return float(np.mean(self._read[-steps:])) if self._read else math.nan

    def note(self, scores: Mapping[str, float]) -> None:
        """Show scores on held-out materials."""
        text = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
        if self._log:
            self._log.print(f"step {len(self._losses)}: held out: {text}")
        self._bar.update(self._task, held_out=f"held out {text}")

    def losses(self) -> list[float]:
        """The losses of all steps so far; waits for the last of them.

        Raises:
          NonFiniteLossError: one is infinite or NaN. `record` raises it too: losses are
            equal on all ranks and read after the same steps, so all stop at once.
        """
        while len(self._read) < len(self._losses):
            self._read_next()
        return self._read

    def _read_next(self) -> None:
        loss = _scalar(self._losses[len(self._read)])
        if not math.isfinite(loss):
            raise NonFiniteLossError(len(self._read) + 1, loss)
        self._read.append(loss)

    def _show(self, step: int) -> None:
        late = float(np.mean(self._read[-20:]))
        elapsed = time.perf_counter() - self._started
        speed = (step - self._first - UNTIMED_STEPS) * self._batch / elapsed
        self._bar.update(self._task, completed=step, loss=late, speed=speed)
        if self._log and (step % LINE_EVERY == 0 or step == self._steps):
            self._log.print(
                f"step {step}/{self._steps}  loss {late:.3f}  {speed:.0f} samples/s"
            )

    def report(self) -> dict[str, Any]:
        """Steps, seconds and samples/s without the first steps, and all losses."""
        steps = len(self._read)
        timed = (steps - self._first - UNTIMED_STEPS) * self._batch
        return {
            "steps": steps,
            "batch": self._batch,
            "seconds": self._seconds,
            # Unknown where a job that went on had hardly a step left.
            "samples_per_s": timed / self._seconds if self._seconds else None,
            "losses": self._read,
        }


class Timed(Generic[Item]):
    """An iterator that notes how long each item has been waited for.

    Attributes:
      seconds: one number for each item taken.
    """

    def __init__(self, items: Iterator[Item]):
        self._items = items
        self.seconds: list[float] = []

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        began = time.perf_counter()
        item = next(self._items)
        self.seconds.append(time.perf_counter() - began)
        return item


def _scalar(loss: jax.Array) -> float:
    """A loss on the host; pmap's has one equal value per device."""
    return float(np.ravel(loss)[0])
