"""Which samples make up which global batch, where they lie in shards.

Of a global batch, every training shard gives the same number of samples, in an order
of its own, which is a pure function of the seed and the step. So the batches are the
same for any number of ranks, and a rank needs only the shards of its part of them.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

import jaxcomm.data


@dataclasses.dataclass(frozen=True)
class ShardOrder:
    """Which samples make up which global batch.

    Row j of a global batch comes from shard j // (batch // shards).

    Attributes:
      shards: number of training shards.
      each: samples in each.
      batch: rows of a global batch; a multiple of `shards`.
      seed: of the order. With one shard it is that of `jaxcomm.data.Batches`.
    """

    shards: int
    each: int
    batch: int
    seed: int

    @property
    def samples(self) -> int:
        """In all shards together."""
        return self.shards * self.each

    @functools.cached_property
    def _batches(self) -> jaxcomm.data.Batches:
        share = self.batch // self.shards
        return jaxcomm.data.Batches(self.each, share, self.seed, rank=0, size=1)

    def epoch(self, step: int) -> int:
        """Return which epoch a step belongs to, both counted from 0."""
        return self._batches.epoch(step)

    def shard_of(self, slots: np.ndarray) -> np.ndarray:
        """Return the shards that rows of every global batch come from."""
        return slots // (self.batch // self.shards)

    def at(self, step: int, slots: np.ndarray) -> np.ndarray:
        """Return the samples in some rows of a step's global batch.

        Args:
          step: counted from 0 over all epochs.
          slots: (n,) integers, rows of the global batch.

        Returns:
          (n,) int64 indices over all training samples.
        """
        epoch, place = divmod(step, self._batches.steps_per_epoch)
        share, found = self.batch // self.shards, np.empty(len(slots), np.int64)
        owners = self.shard_of(slots)
        for shard in np.unique(owners):
            mine = owners == shard
            within = place * share + slots[mine] % share
            order = _order((self.seed + int(shard)) % (1 << 64), epoch, self.each)
            found[mine] = shard * self.each + order[within]
        return found


# jaxcomm.data keeps two orders; here every shard has one.
@functools.lru_cache(maxsize=4096)
def _order(seed: int, epoch: int, samples: int) -> np.ndarray:
    return jaxcomm.data.order(seed, epoch, samples)
