"""When gradients are ready on every rank: devices differ, steps differ, orders differ.

Draws depend on seed, step and rank only. So a larger job holds the ranks of a smaller
one, designs are compared on the same draws, and changing a parameter rescales the same
draws.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from jaxcomm.simulate.machines import Machine
from jaxcomm.simulate.workloads import Workload

# Independent streams of one seed.
_RANKS, _ORDER, _STEPS = range(3)
# No device computes a step in less than half the median's time.
_FASTEST = 0.5
# Arrivals are counted on a grid of so many parts of a step: 20 us of STEMDL's 1.3 s.
_BINS = 1 << 16


@dataclasses.dataclass(frozen=True)
class Draw:
    """Standard normal numbers of one step: per rank, and per rank and leaf."""

    rank: np.ndarray
    step: np.ndarray
    leaf: np.ndarray


@dataclasses.dataclass(frozen=True)
class Ready:
    """When gradients of one step are ready, in seconds from its beginning.

    Attributes:
      times: shape (ranks, leaves).
      compute: when the slowest rank has computed its step.
    """

    times: np.ndarray
    compute: float

    @functools.cached_property
    def latest(self) -> np.ndarray:
        """When each leaf is ready on all ranks, shape (leaves,)."""
        return self.times.max(axis=0).astype(float)

    @property
    def grid(self) -> float:
        """Seconds to which `count` and `after` are exact."""
        return self.compute / _BINS

    @functools.cached_property
    def _cumulative(self) -> np.ndarray:
        """Gradients ready before each point of the grid, shape (about _BINS + 1,)."""
        places = (self.times * np.float32(1 / self.grid)).astype(np.int32)
        return np.concatenate([[0], np.cumsum(np.bincount(places.ravel()))])

    def count(self, until: float) -> int:
        """How many gradients of all ranks together are ready by a time."""
        place = min(int(until / self.grid), len(self._cumulative) - 1)
        return int(self._cumulative[max(place, 0)])

    def after(self, count: int) -> float:
        """When more than so many gradients are ready."""
        place = np.searchsorted(self._cumulative, count, side="right")
        # Half a grid beyond, so that `count` of this time is not rounded below it.
        return (float(place) + 0.5) * self.grid


def rank_draws(ranks: int, seed: int) -> np.ndarray:
    """Each device's own standard normal number, the same in all steps.

    Rank 0's is the median device, by whose step alone efficiency is measured.
    """
    rng = np.random.default_rng([seed, _RANKS])
    found = rng.standard_normal(ranks, np.float32)
    found[0] = 0.0
    return found


def draw(ranks: int, leaves: int, step: int, seed: int) -> Draw:
    """Draw one step's numbers; the first ranks' do not depend on how many follow."""
    rng = np.random.default_rng([seed, _STEPS, step])
    both = rng.standard_normal((ranks, leaves + 1), np.float32)
    return Draw(rank_draws(ranks, seed), both[:, 0], both[:, 1:])


def real_shares(workload: Workload, spread: float, seed: int) -> np.ndarray:
    """When leaves really become ready, as shares of the step, shape (leaves,).

    A compiler reorders: every leaf is displaced from its planned time by a normal
    number, the same in all steps and on all ranks, within the backward pass. What the
    pass computes last is a gradient, so the last is ready when it ends.
    """
    rng = np.random.default_rng([seed, _ORDER])
    planned = np.array(workload.ready)
    moved = planned + spread * rng.standard_normal(len(planned))
    moved = np.clip(moved, min(workload.ready), 1.0)
    return np.where(moved == moved.max(), 1.0, moved)


def ready(
    workload: Workload, machine: Machine, draw: Draw, shares: np.ndarray
) -> Ready:
    """Combine draws and parameters into ready times."""
    factor = 1 + machine["rank_spread"] * draw.rank + machine["step_spread"] * draw.step
    seconds = workload.compute_seconds(machine) * np.maximum(factor, _FASTEST)
    leaf = machine["leaf_spread"]
    times = draw.leaf * np.float32(leaf) if leaf else np.zeros_like(draw.leaf)
    times += shares.astype(np.float32)
    times *= seconds.astype(np.float32)[:, None]
    np.maximum(times, 0, out=times)
    return Ready(times, float(max(seconds.max(), times.max())))
