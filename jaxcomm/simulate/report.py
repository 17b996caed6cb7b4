"""A prediction as one document: results, their ranges, and the model's validation."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxcomm.errors import InvalidOptionError
from jaxcomm.simulate import experiment, uncertainty, validation
from jaxcomm.simulate.machines import Machine
from jaxcomm.simulate.workloads import Workload

# Steps per sample of the ranges; steps and samples per anchor, at most.
RANGE_STEPS = 4
ANCHOR_STEPS, ANCHOR_SAMPLES = 20, 8
FORMAT = 1
# Where the arrays of one step take about a gigabyte.
MAX_RANKS = 1_000_000

Report = dict[str, Any]
# Called with what is being done and the share that is done.
Progress = Callable[[str, float], None]


def make(
    machine: Machine,
    workload: Workload,
    ranks: list[int],
    *,
    steps: int = 100,
    samples: int = 16,
    seed: int = 0,
    progress: Progress = lambda phrase, done: None,
) -> Report:
    """Predict every design at every size.

    Args:
      machine: where.
      workload: what a step computes and reduces.
      ranks: sizes.
      steps: steps per prediction.
      samples: points of all parameters' ranges, for the ranges of efficiency; 0 leaves
        the ranges out.
      seed: fixes every draw.
      progress: told what is being done.

    Returns:
      A tree for JSON: `results` (per design and size), `validation` (per anchor), and
      what they were made from.
    """
    rows: list[dict[str, Any]] = []
    plays = steps + 1 + samples * (RANGE_STEPS + 1)
    meter = _Meter(progress, sum(ranks) * plays)
    for size in ranks:
        meter.begin(f"{size:,} ranks", size)
        found = experiment.simulate(
            machine, workload, size, steps=steps, seed=seed, progress=meter.step
        )
        spread = {}
        if samples:
            spread = uncertainty.ranges(
                machine,
                workload,
                size,
                samples=samples,
                steps=RANGE_STEPS,
                seed=seed,
                progress=meter.step,
            )
        rows += [_row(machine, result, spread.get(result.design)) for result in found]
    meter.begin("published figures", 0)
    anchors = validation.check(
        steps=min(steps, ANCHOR_STEPS),
        samples=min(samples, ANCHOR_SAMPLES),
        seed=seed,
        progress=meter.step,
    )
    return {
        "format": FORMAT,
        "machine": machine.name,
        "workload": workload.name,
        "steps": steps,
        "samples": samples,
        "seed": seed,
        "compute_ms": 1e3 * workload.compute_seconds(machine),
        "results": rows,
        "validation": validation.as_dicts(anchors),
        "parameters": parameters(machine, workload),
    }


class _Meter:
    """Progress by ranks times steps, which is what takes the time."""

    def __init__(self, progress: Progress, total: int):
        self._tell, self._total = progress, max(total, 1)
        self._phrase, self._weight, self._done = "", 0, 0

    def begin(self, phrase: str, weight: int) -> None:
        self._phrase, self._weight = phrase, weight
        self.step(0)

    def step(self, steps: int) -> None:
        self._done += steps * self._weight
        self._tell(self._phrase, min(self._done / self._total, 1.0))


def _row(
    machine: Machine,
    result: experiment.Result,
    ends: tuple[float, float] | None,
) -> dict[str, Any]:
    size, span = result.ranks, None
    if ends is not None:
        # The nominal value belongs to its range, however few the samples.
        both = (*ends, result.efficiency)
        span = [min(both), max(both)]
    return {
        **dataclasses.asdict(result),
        "efficiency_range": span,
        "energy_j": 1e-3 * result.step_ms * machine["watts"] * size,
        "extrapolated": size > machine.max_ranks,
    }


def parameters(machine: Machine, workload: Workload) -> list[dict[str, Any]]:
    """Every number with its range and source."""
    found = {**machine.parameters, uncertainty.UTILISATION: workload.utilisation}
    return [{"name": name, **dataclasses.asdict(p)} for name, p in found.items()]


def parse_ranks(text: str) -> list[int]:
    """Read "1536,6000,27600".

    Raises:
      InvalidOptionError: something in it is not a number of ranks.
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InvalidOptionError(
            f"--ranks {text!r}: give whole numbers separated by commas, such as "
            "1536,6000,27600"
        ) from error
    for ranks in found:
        if not 1 <= ranks <= MAX_RANKS:
            raise InvalidOptionError(
                f"--ranks {ranks}: give numbers from 1 to {MAX_RANKS:,}"
            )
    return found


def check_writable(option: str, path: Path) -> None:
    """Raise InvalidOptionError now rather than after the work."""
    folder = path.parent
    if path.is_dir() or not folder.is_dir():
        why = "is a folder" if path.is_dir() else f"there is no folder {folder}"
        raise InvalidOptionError(f"{option} {path}: {why}; give a file to write")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise InvalidOptionError(
            f"{option} {path}: not writable; give a file in a folder of yours"
        )
