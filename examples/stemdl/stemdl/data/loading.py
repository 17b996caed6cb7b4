"""Batches from shards, read ahead of the step by `grain`.

Every rank opens only the files that its part of the global batches comes from
(`shard_order`), and the position in the data is the number of steps done. It is all the
state that grain has here, so a checkpoint's step number restores it.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import grain
import h5py
import numpy as np

import jaxcomm
from stemdl import config
from stemdl.data import augmentation, manifest, shards
from stemdl.data.consensus import together
from stemdl.data.dataset import Dataset
from stemdl.data.manifest import Manifest, Shard, ShardError
from stemdl.data.noise import Noise
from stemdl.data.shard_order import ShardOrder
from stemdl.data.staging import staged
from stemdl.physics.optics import Optics
from stemdl.training.backends import Backend

Batch = tuple[np.ndarray, np.ndarray]

THREADS, AHEAD = 2, 4
"""Threads that read, and batches that they read ahead. One would do: the second is for
the moment in which the disk answers late."""

_ENDLESS = 1 << 62


class Source:
    """One process's training shards, open.

    Attributes:
      manifest: of the data set.
      order: of its samples.
      example: (scan, scan, detector, detector) float32 of zeros, an input's shape.
      pixels: side of the labels.
    """

    def __init__(
        self,
        whole: Manifest,
        order: ShardOrder,
        backend: Backend,
        directory: Path,
        home: Path,
        noise: Noise,
    ):
        """Open the files in `directory` that this process's rows come from.

        In `home` are all, those of held-out samples too.
        """
        self.manifest, self.order = whole, order
        self._noise, self._home = noise, home
        self._held_out = whole.split("test")[backend.process :: backend.processes]
        slots = self._slots = backend.share(np.arange(order.batch))
        self._files: list[h5py.File] = []
        # Looking a data set up in its file takes longer than reading a sample of it.
        self._arrays: dict[str, dict[int, h5py.Dataset]] = {
            "amplitudes": {},
            "labels": {},
        }
        training = whole.split("train")
        for shard in map(int, np.unique(order.shard_of(slots))):
            file = shards.open_shard(directory, training[shard], whole.config)
            self._files.append(file)
            for name, arrays in self._arrays.items():
                arrays[shard] = file[name]  # type: ignore[assignment]
                first = next(iter(arrays.values()))
                manifest.require(
                    directory / training[shard].name,
                    f"shape of {name}",
                    arrays[shard].shape[1:],
                    first.shape[1:],
                )
        first = next(iter(self._arrays["amplitudes"].values()))
        self.example = np.zeros(first.shape[1:], np.float32)
        self.pixels = next(iter(self._arrays["labels"].values())).shape[-1]
        path, shape = directory / manifest.NAME, self.example.shape[2:]
        manifest.require(path, "shape of mean", whole.mean.shape, shape)

    def rows(self, step: int) -> np.ndarray:
        """Indices of this process's samples at a step: (n,) int64."""
        return self.order.at(step, self._slots.ravel())

    def read(self, step: int) -> Batch:
        """Read a step's samples and augment them; steps are counted from 0.

        Returns:
          Standardised patterns and labels, float32, shaped as the train step's input.
        """
        rows = self.rows(step)
        x = self._gather("amplitudes", rows)
        x = (x - self.manifest.mean) / self.manifest.std
        epoch = self.order.epoch(step)
        symmetries = augmentation.draw(self.order.seed, epoch, self.order.samples)
        x, y = augmentation.augment(x, self._gather("labels", rows), symmetries[rows])
        x = self._noise.add(x, rows, epoch)
        # A second axis of slots, where there is one, is pmap's device axis.
        shape = self._slots.shape
        return x.reshape(*shape, *x.shape[1:]), y.reshape(*shape, *y.shape[1:])

    def _gather(self, name: str, rows: np.ndarray) -> np.ndarray:
        arrays = self._arrays[name]
        places = [divmod(int(row), self.order.each) for row in rows]
        return np.stack([arrays[shard][place] for shard, place in places])

    def batches(self, first: int) -> Generator[Batch]:
        """This process's parts of all batches from step `first` on."""
        steps = grain.MapDataset.range(_ENDLESS).map(self.read)
        options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
        ahead = iter(steps.to_iter_dataset(options))
        # All of grain's state: a checkpoint's step number restores it.
        ahead.set_state({"next_index": first})
        try:
            yield from ahead
        finally:
            ahead.close()

    def held_out(self) -> Batch:
        """This process's share of the held-out samples: patterns and labels.

        Raises:
          ShardError: a file is damaged, foreign or missing.
        """
        x = np.zeros((0, *self.example.shape), np.float32)
        y = np.zeros((0, self.pixels, self.pixels), np.float32)
        for shard in self._held_out:
            more_x, more_y, _ = _arrays(self._home, shard, self.manifest)
            x = np.concatenate([x, (more_x - self.manifest.mean) / self.manifest.std])
            y = np.concatenate([y, more_y])
        return x, y

    def close(self) -> None:
        """Close the files; copies on staging storage are gone with that."""
        for file in self._files:
            file.close()


def open_source(
    directory: Path,
    stage: Path | None,
    backend: Backend,
    batch: int,
    seed: int,
    samples: int | None = None,
    noise: config.Noise | None = None,
) -> Source:
    """Open the training shards; all ranks call it together.

    Args:
      directory: of the shards; all ranks see it.
      stage: storage of each node's own, where they are copied first; None: they are
        read where they are, each file's checksum being compared by one rank.
      backend: divides the rows of a batch.
      batch: rows of a global batch.
      seed: of order, augmentation and noise.
      samples: how many to train on the manifest must have; None: any number.
      noise: that training patterns get; None: none.

    Raises:
      ShardError: on every rank, if a file is damaged, foreign or missing on any, or the
        batch does not divide.
    """
    comm = jaxcomm.world()

    def described() -> Manifest:
        found = manifest.read(directory)
        if samples is not None:
            path, there = directory / manifest.NAME, found.config["train"]
            manifest.require(path, "config.train", there, samples, "training.samples")
        return found

    whole = together(comm, described)
    digests = comm.all_gather_object(whole.sha256)
    if len(set(digests)) > 1:
        raise ShardError(
            f"{directory / manifest.NAME}: sha256 is not the same on all ranks: "
            + ", ".join(f"rank {rank} {text[:12]}" for rank, text in enumerate(digests))
        )
    training = whole.split("train")
    if batch % len(training) or batch > whole.config["train"]:
        raise ShardError(
            f"{directory}: a batch of {batch} does not take equally many samples from "
            f"each of {len(training)} training shards of {training[0].samples}"
        )
    order = ShardOrder(len(training), training[0].samples, batch, seed)
    slots = backend.share(np.arange(batch))
    noisy = Noise.of(noise or config.Noise(), seed, whole.mean, whole.std)

    def source(place: Path) -> Source:
        return together(
            comm, lambda: Source(whole, order, backend, place, directory, noisy)
        )

    def verify() -> None:
        # Those of held-out samples are read where they are, whatever is staged.
        read_here = training if stage is None else ()
        for shard in [*read_here, *whole.split("test")][comm.rank :: comm.size]:
            shards.verify(directory, shard)

    together(comm, verify)
    if stage is None:
        return source(directory)
    needed = [training[k] for k in np.unique(order.shard_of(slots))]
    with staged(directory, stage, needed, comm) as place:
        return source(place)


def load(directory: Path) -> Dataset:
    """Read all shards into memory, as `dataset.load` does, for evaluation.

    Raises:
      ShardError: a file is damaged, foreign or missing.
    """
    whole = manifest.read(directory)
    arrays = {}
    for split in manifest.SPLITS:
        parts = [_arrays(directory, shard, whole) for shard in whole.split(split)]
        amplitudes, labels, names = (
            np.concatenate(part) for part in zip(*parts, strict=True)
        )
        arrays[f"{split}_x"] = (amplitudes - whole.mean) / whole.std
        arrays[f"{split}_y"], arrays[f"{split}_names"] = labels, names
    optics = Optics(**whole.config["optics"])
    return Dataset(**arrays, mean=whole.mean, std=whole.std, optics=optics)


def _arrays(directory: Path, shard: Shard, whole: Manifest) -> list[np.ndarray]:
    shards.verify(directory, shard)
    with shards.open_shard(directory, shard, whole.config) as file:
        names = np.array(file["material"].asstr()[:], str)  # type: ignore[union-attr]
        return [file["amplitudes"][:], file["labels"][:], names]  # type: ignore[index]
