"""The STEMDL example's log of a training, as CSV and for TensorBoard."""

from __future__ import annotations

import csv
import struct
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from stemdl.training.step_log import COLUMNS, StepLog


def log(folder: Path, first: int, last: int) -> None:
    """Log as a process does that goes on after step `first`."""
    backend = SimpleNamespace(communication_seconds=lambda: 0.0)
    telemetry = SimpleNamespace(latest=lambda steps: 1 / steps)
    feed = SimpleNamespace(seconds=[])
    events = folder / "tensorboard"
    steps = StepLog(folder / "metrics.csv", 10, first, cast(Any, backend), events)
    for step in range(first + 1, last + 1):
        feed.seconds.append(0.001)
        scores = {"nrmse": 0.5 / step} if step == last else {}
        steps.record(step, cast(Any, telemetry), cast(Any, feed), scores)
    steps.close()


def events(file: Path) -> list[Any]:
    """What is in a file of TensorBoard's: length, checksum, event, checksum."""
    from tensorboardX.proto import event_pb2

    kind = vars(event_pb2)["Event"]  # made at run time, which pyright cannot see
    data, found = file.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        found.append(kind.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return found


def test_a_log_goes_on_where_a_checkpoint_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log(tmp_path, 0, 35)
    # Its files are named after the second in which they were made.
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 100)
    log(tmp_path, 20, 40)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["10", "20", "30", "40"]
    assert [row["loss"] for row in rows] == ["0.1"] * 4
    assert all(float(row["data_ms"]) == pytest.approx(1) for row in rows)
    assert [row["held_out_nrmse"] for row in rows] == ["", "", "", "0.0125"]

    _, second = sorted((tmp_path / "tensorboard").iterdir())
    found = events(second)
    # TensorBoard hides what the first process has written of this step and later ones.
    purged = [event.step for event in found if event.session_log.status == 1]
    assert purged == [21]
    scalars = {
        (value.tag, event.step): value.simple_value
        for event in found
        for value in event.summary.value
    }
    assert {step for _, step in scalars} == {30, 40}
    assert {tag for tag, _ in scalars} == set(COLUMNS) - {"step", "held_out_pearson"}
    assert scalars["held_out_nrmse", 40] == pytest.approx(0.0125)
    assert scalars["loss", 30] == pytest.approx(0.1)
