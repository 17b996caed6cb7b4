"""metrics.csv, one line every few steps, and the same numbers for TensorBoard."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stemdl.training.backends import Backend
from stemdl.training.telemetry import Telemetry, Timed

COLUMNS: tuple[str, ...] = (
    "step",
    "loss",
    "step_ms",
    "data_ms",
    "communication_ms",
    "compute_ms",
    "held_out_nrmse",
    "held_out_pearson",
)
"""Means over the steps since the line before; `loss` lags by `telemetry.LATE` steps.

`data_ms` is how long the host waited for a batch, which delays a step only where that
exceeds what the step before still had to do. `communication_ms` is time inside
collectives on this rank, with waiting for others; `compute_ms` is the rest of the step.
"""

FLUSH_SECONDS = 10
"""After which TensorBoard sees a number, at the latest."""


class StepLog:
    """Writes the file, on one process; elsewhere it does nothing."""

    def __init__(
        self,
        path: Path | None,
        every: int,
        first: int,
        backend: Backend,
        events: Path | None = None,
    ):
        """Keep the lines of steps up to `first`, which an earlier process has done.

        Args:
          path: the file; None where another process writes.
          every: steps between two lines.
          first: steps done before.
          backend: tells the time inside collectives.
          events: folder for TensorBoard, or None.
        """
        self._path, self._every, self._backend = path, every, backend
        self._mark = (first, time.perf_counter(), 0, backend.communication_seconds())
        self._events = None
        if path is None:
            return
        if events is not None:
            from tensorboardX import SummaryWriter

            # What an earlier process wrote of later steps is hidden, as below.
            self._events = SummaryWriter(
                str(events), purge_step=first + 1, flush_secs=FLUSH_SECONDS
            )
        kept = []
        if first and path.exists():
            with path.open(newline="") as file:
                kept = [
                    row for row in csv.DictReader(file) if int(row["step"]) <= first
                ]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(kept)

    def close(self) -> None:
        """Write what TensorBoard's thread still holds."""
        if self._events is not None:
            self._events.close()

    def record(
        self,
        step: int,
        telemetry: Telemetry,
        feed: Timed[Any],
        scores: Mapping[str, float],
    ) -> None:
        """Note a step; write a line where one is due or there are scores."""
        if self._path is None or (step % self._every and not scores):
            return
        before, began, taken, inside = self._mark
        now, communicated = time.perf_counter(), self._backend.communication_seconds()
        steps = step - before
        row: dict[str, Any] = {"step": step, "loss": telemetry.latest(steps)}
        row["step_ms"] = 1e3 * (now - began) / steps
        row["data_ms"] = 1e3 * sum(feed.seconds[taken:]) / steps
        if communicated is not None and inside is not None:
            row["communication_ms"] = 1e3 * (communicated - inside) / steps
            row["compute_ms"] = row["step_ms"] - row["communication_ms"]
        row |= {f"held_out_{name}": score for name, score in scores.items()}
        with self._path.open("a", newline="") as file:
            values = {k: v if k == "step" else f"{v:.6g}" for k, v in row.items()}
            csv.DictWriter(file, COLUMNS).writerow(values)
        if self._events is not None:
            for name in row.keys() - {"step"}:
                self._events.add_scalar(name, row[name], step)
        self._mark = (step, now, len(feed.seconds), communicated)
