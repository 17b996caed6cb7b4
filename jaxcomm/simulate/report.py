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

# Steps per sample of the ranges, and per anchor of the validation.
RANGE_STEPS, ANCHOR_STEPS = 4, 20
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
    weights = [
        n * len(workload.names) * (steps + samples * RANGE_STEPS) + 5e5 for n in ranks
    ]
    # Of the validation, in the same measure: about four seconds.
    total, done = sum(weights) + 1.5e8, 0.0
    for size, weight in zip(ranks, weights, strict=True):
        phrase = f"{size:,} ranks"
        count = {"steps": 0}
        expected = steps + 1 + samples * (RANGE_STEPS + 1)

        def tell(n: int, phrase=phrase, weight=weight, done=done, count=count, of=expected):
            count["steps"] += n
            progress(phrase, (done + weight * count["steps"] / of) / total)

        found = experiment.simulate(
            *(machine, workload, size), steps=steps, seed=seed, progress=tell
        )
        spread = {}
        if samples:
            spread = uncertainty.ranges(
                *(machine, workload, size),
                samples=samples,
                steps=RANGE_STEPS,
                seed=seed,
                progress=tell,
            )
        for result in found:
            row = dataclasses.asdict(result)
            # The nominal value belongs to its range, however few the samples.
            ends = (*spread.get(result.design, ()), result.efficiency)
            row["efficiency_range"] = [min(ends), max(ends)] if spread else None
            row["energy_j"] = 1e-3 * result.step_ms * machine["watts"] * size
            row["extrapolated"] = size > machine.max_ranks
            rows.append(row)
        done += weight
        progress(phrase, done / total)
    progress("published figures", done / total)
    anchors = validation.check(steps=ANCHOR_STEPS, seed=seed)
    progress("published figures", 1.0)
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
