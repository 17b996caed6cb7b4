"""The data set in memory, as a source of batches beside `loading.Source`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from jaxcomm.data import Batches
from stemdl import config
from stemdl.data.augmentation import augment, draw
from stemdl.data.dataset import Dataset
from stemdl.data.noise import Noise
from stemdl.training.backends import Backend


class Cached:
    """The data set in memory, with the interface of `loading.Source`.

    Attributes:
      example: (scan, scan, detector, detector) float32, an input.
      pixels: side of the labels.
    """

    def __init__(
        self,
        dataset: Dataset,
        backend: Backend,
        batch: int,
        seed: int,
        noise: config.Noise,
    ):
        self.example, self.pixels = dataset.train_x[0], dataset.train_y.shape[-1]
        self._dataset, self._backend = dataset, backend
        self._order = Batches(len(dataset.train_x), batch, seed, rank=0, size=1)
        self._noise = Noise.of(noise, seed, dataset.mean, dataset.std)

    def rows(self, step: int) -> np.ndarray:
        """Indices of this process's samples at a step; pmap's by device."""
        return self._backend.share(self._order.at(step).indices)

    def batches(self, first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Endless augmented batches: the same global ones for any number of ranks.

        Each is a function of the seed and of the number of steps before it, which
        begins with `first`.

        Yields:
          This process's part: patterns and labels; pmap's with a leading device axis.
        """
        order, dataset = self._order, self._dataset
        for step in itertools.count(first):
            rows, epoch = self.rows(step), order.epoch(step)
            flat = rows.ravel()
            symmetries = draw(order.seed, epoch, order.samples)[flat]
            x, y = augment(dataset.train_x[flat], dataset.train_y[flat], symmetries)
            x = self._noise.add(x, flat, epoch)
            # A second axis of rows, where there is one, is pmap's device axis.
            yield (
                x.reshape(*rows.shape, *x.shape[1:]),
                y.reshape(*rows.shape, *y.shape[1:]),
            )

    def held_out(self) -> tuple[np.ndarray, np.ndarray]:
        """This process's share of the held-out samples: patterns and labels."""
        mine = slice(self._backend.process, None, self._backend.processes)
        return self._dataset.test_x[mine], self._dataset.test_y[mine]
