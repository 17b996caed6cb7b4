"""Which samples a rank takes at which step: index arithmetic, no loading.

The order is a pure function of (seed, step), so the position in the data is the number
of steps done, and a checkpoint that holds that holds it all.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxcomm import startup
from jaxcomm.errors import InvalidOptionError


class Rows(NamedTuple):
    """One rank's part of a global batch.

    Attributes:
      indices: (batch // size,) int64, below `samples`.
      weights: (batch // size,) float32; 1, or 0 for a row that only fills the batch.

    Example:
      >>> rows = jaxcomm.data.Batches(2 * jaxcomm.size(), 2 * jaxcomm.size()).at(0)
      >>> rows.indices.dtype, rows.weights
      (dtype('int64'), array([1., 1.], dtype=float32))
    """

    indices: np.ndarray
    weights: np.ndarray


@dataclasses.dataclass(frozen=True)
class Batches:
    """Shuffled global batches, dealt to the ranks; as many steps on every rank.

    In an epoch every sample occurs at most once, and exactly once if the remainder is
    padded. The global batches are the same for any number of ranks, rank r holding the
    r-th part of each.

    In a step over padded batches, the exact mean over the samples that count is
    all_reduce(weighted mean over the rows, weight=rows.weights.sum()).

    Attributes:
      samples: how many there are.
      batch: rows of a global batch, over all ranks together.
      seed: of the order.
      remainder: what becomes of the samples that do not fill a batch at the end of an
        epoch: "drop" leaves them out of it, "pad" fills up with rows of weight 0.
      shuffle: whether each epoch has an order of its own, else that of the indices.
      rank: whose part `at` returns; this process's unless given, with `size`.
      size: over how many ranks batches are dealt; all unless given, with `rank`.

    Raises:
      InvalidOptionError: a value is unusable; says which.

    Example:
      >>> n = jaxcomm.size()
      >>> x = np.arange(3 * n, dtype=np.float32)
      >>> batches = jaxcomm.data.Batches(len(x), batch=2 * n, remainder="pad")
      >>> batches.steps_per_epoch
      2
      >>> total = 0
      >>> for step in range(batches.steps_per_epoch):
      ...     rows = batches.at(step)  # this rank's two
      ...     mine = (x[rows.indices] * rows.weights).sum()
      ...     total += jaxcomm.all_reduce(mine, op="sum")
      >>> int(total) == int(x.sum())
      True
    """

    samples: int
    batch: int
    seed: int = 0
    remainder: Literal["drop", "pad"] = "drop"
    shuffle: bool = True
    rank: int = -1
    size: int = 0

    def __post_init__(self) -> None:
        if (self.rank == -1) != (self.size == 0):
            given, other = ("rank", "size") if self.size == 0 else ("size", "rank")
            remedy = f"give {other}= as well, or neither for this process's own"
            _require(False, given, self, remedy)
        if self.size == 0:
            object.__setattr__(self, "size", startup.size())
            object.__setattr__(self, "rank", startup.rank())
        for name in ("samples", "batch", "size"):
            _require(getattr(self, name) >= 1, name, self, "give a positive number")
        _require(0 <= self.rank < self.size, "rank", self, f"of {self.size} ranks")
        _require(0 <= self.seed < 1 << 64, "seed", self, "give 64 bits, not negative")
        _require(
            self.batch % self.size == 0,
            "batch",
            self,
            f"give a multiple of the {self.size} ranks",
        )
        known = self.remainder in ("drop", "pad")
        _require(known, "remainder", self, 'give "drop" or "pad"')
        _require(
            self.remainder == "pad" or self.samples >= self.batch,
            "batch",
            self,
            f'exceeds the {self.samples} samples; give fewer or remainder="pad"',
        )

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which the samples are gone through once, the same on every rank."""
        whole, rest = divmod(self.samples, self.batch)
        return whole + (rest > 0 and self.remainder == "pad")

    def epoch(self, step: int) -> int:
        """Return which epoch a step belongs to, both counted from 0."""
        return step // self.steps_per_epoch

    def at(self, step: int) -> Rows:
        """Return this rank's rows at a step, counted from 0 over all epochs."""
        _require(step >= 0, "step", {"step": step}, "give a number of steps, from 0")
        epoch, place = divmod(step, self.steps_per_epoch)
        share = self.batch // self.size
        start = place * self.batch + self.rank * share
        positions = np.arange(start, start + share)
        real = positions < self.samples
        # A row that only fills up repeats a sample; its weight is 0.
        indices = np.where(real, positions, 0)
        if self.shuffle:
            indices = order(self.seed, epoch, self.samples)[indices]
        return Rows(indices, real.astype(np.float32))


@functools.lru_cache(maxsize=2)
def order(seed: int, epoch: int, samples: int) -> np.ndarray:
    """Return an epoch's permutation of range(samples), int64, read-only.

    It is that of sorting Philox's raw numbers, which NumPy keeps the same from version
    to version, as it does not keep `Generator.permutation`.

    Args:
      seed: below 2**64.
      epoch: counted from 0.
      samples: the length of the permutation.

    Example:
      >>> jaxcomm.data.order(seed=0, epoch=0, samples=5).tolist()
      [0, 2, 1, 4, 3]
    """
    key = np.array([seed, epoch], np.uint64)
    permutation = np.argsort(
        np.random.Philox(key=key).random_raw(samples), kind="stable"
    )
    permutation.flags.writeable = False
    return permutation


def _require(good: bool, name: str, given: Any, remedy: str) -> None:
    if not good:
        value = given[name] if isinstance(given, dict) else getattr(given, name)
        raise InvalidOptionError(f"{name}={value!r}; {remedy}")
