"""What a sharded data set consists of: the manifest that is written when it is whole.

    DIR/manifest.json           configuration, statistics, shards and their checksums
    DIR/train-00000.h5 ...      training samples, equally many in each
    DIR/test-00000.h5 ...       samples of the held-out materials
    DIR/NAME.sha256             as `sha256sum` writes it, beside every shard
    DIR/.NAME.writing           a shard cut short; it is simulated again

A shard is complete once it has its name, the data set once it has its manifest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from stemdl.data import augmentation, dataset

FORMAT = 1
"""Raise it whenever the layout of shards or manifest changes."""

NAME = "manifest.json"
SPLITS = ("train", "test")


class ShardError(RuntimeError):
    """A sharded data set that cannot be used; names the file and the field."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of samples.

    Attributes:
      name: of the file.
      split: "train" or "test", whose materials are not those of training.
      first: index of its first sample in the data set; the rest follow.
      samples: how many.
      bytes: size of the file; 0 until it is written.
      sha256: of the file, hexadecimal; "" until it is written.
    """

    name: str
    split: str
    first: int
    samples: int
    bytes: int = 0
    sha256: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Manifest:
    """The whole data set.

    Attributes:
      config: of the simulation, with its version: `DataConfig.to_json`, parsed.
      shards: those of training first, each in order of their samples.
      mean: (detector, detector) float32, subtracted from amplitudes.
      std: (detector, detector) float32, by which they are divided.
    """

    config: dict[str, Any]
    shards: tuple[Shard, ...]
    mean: np.ndarray
    std: np.ndarray

    def split(self, name: str) -> tuple[Shard, ...]:
        """The shards of "train" or of "test"."""
        return tuple(shard for shard in self.shards if shard.split == name)

    def content(self) -> dict[str, Any]:
        """What the file holds, without the checksum of itself."""
        return {
            "format": FORMAT,
            "config": self.config,
            "shards": [dataclasses.asdict(shard) for shard in self.shards],
            # A float32 is written as the shortest text of its float64: exact.
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
        }

    @property
    def sha256(self) -> str:
        """Identifies configuration and every byte of the samples."""
        return _digest(self.content())


def plan(config: dataset.DataConfig, count: int) -> tuple[Shard, ...]:
    """Divide a data set into `count` equal training shards, and held-out ones.

    Raises:
      ShardError: the training samples do not divide.
    """
    if count < 1 or config.train % count:
        raise ShardError(
            f"{config.train} training samples do not divide into {count} equal shards"
        )
    shards = []
    for split, start, samples in (
        ("train", 0, config.train),
        ("test", config.train, config.test),
    ):
        # Nothing steps through held-out shards together: they may differ by one.
        parts = np.array_split(
            np.arange(start, start + samples), max(1, min(count, samples))
        )
        shards += [
            Shard(f"{split}-{number:05d}.h5", split, int(part[0]), len(part))
            for number, part in enumerate(parts)
            if len(part)
        ]
    return tuple(shards)


def statistics(
    total: np.ndarray, squares: np.ndarray, patterns: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and spread that `dataset.load` standardises with, from sums.

    Args:
      total: (detector, detector) float64, sum of the amplitudes.
      squares: (detector, detector) float64, sum of their squares.
      patterns: of how many diffraction patterns.

    Returns:
      mean and std, (detector, detector) float32.
    """
    raw = total / patterns
    # Statistics that respect the symmetries commute with augmentation.
    mean = augmentation.symmetrised(raw)
    variance = squares / patterns - 2 * mean * raw + mean**2
    spread = np.sqrt(np.maximum(augmentation.symmetrised(variance), 0))
    std = np.maximum(spread, 1e-3 * spread.max())
    return mean.astype(np.float32), std.astype(np.float32)


def write(directory: Path, manifest: Manifest) -> None:
    """Write the manifest, all of it or nothing, with its own checksum."""
    content = {**manifest.content(), "sha256": manifest.sha256}
    new = directory / f".{NAME}.writing"
    with new.open("w") as file:
        file.write(json.dumps(content, indent=1, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.rename(new, directory / NAME)
    sync(directory)


def read(directory: Path) -> Manifest:
    """Read the manifest and check that it describes a usable data set.

    Raises:
      ShardError: it is missing, damaged, of another version or inconsistent.
    """
    path = directory / NAME
    try:
        content = json.loads(path.read_text())
        claimed = content.pop("sha256")
    except FileNotFoundError:
        raise ShardError(
            f"{path} does not exist: simulate the data set, or let the simulation end, "
            "with python -m stemdl simulate"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{path} is damaged, or not a manifest: {error!r}") from error
    require(path, "format", content.get("format"), FORMAT)
    require(path, "sha256", _digest(content), claimed)
    require(path, "config.version", content["config"]["version"], dataset.VERSION)
    shards = tuple(Shard(**shard) for shard in content["shards"])
    manifest = Manifest(
        config=content["config"],
        shards=shards,
        mean=np.array(content["mean"], np.float32),
        std=np.array(content["std"], np.float32),
    )
    for split in SPLITS:
        samples = sum(shard.samples for shard in manifest.split(split))
        require(path, f"samples of {split}", samples, manifest.config[split])
    first = shards[0]
    for shard in manifest.split("train"):
        # The ranks take as many samples from each shard at every step.
        field = f"samples of {shard.name}"
        require(path, field, shard.samples, first.samples, f"as {first.name} has")
    return manifest


def require(path: Path, field: str, found: Any, wanted: Any, why: str = "") -> None:
    """Raise a `ShardError` that names file and field unless the two are equal."""
    if found == wanted:
        return
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted({**found, **wanted}):
            require(path, f"{field}.{key}", found.get(key), wanted.get(key), why)
    raise ShardError(
        f"{path}: {field} is {found!r}, wanted {wanted!r} {why}".rstrip()
        + ". Nothing was changed; use another directory, or delete the file and "
        "simulate again"
    )


def sync(path: Path) -> None:
    """Bring a file, or a directory's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
