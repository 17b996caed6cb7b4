"""Shards: HDF5 files of samples, written whole or not at all, read if unchanged.

A file holds, for n samples, "amplitudes" (n, scan, scan, detector, detector) and
"labels" (n, pixels, pixels), float32, "material" (n,) of str, and of the amplitudes
the sums "total" and "squares" (detector, detector), float64. Its attributes are
"config", "split", "first" and "samples".
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from stemdl.data.dataset import DataConfig
from stemdl.data.manifest import Shard, ShardError, require, sync

Sample = Callable[[DataConfig, int], tuple[np.ndarray, np.ndarray]]
"""(configuration, index) -> amplitudes and label, as `dataset.simulate_sample`."""

_PIECE_BYTES = 4 << 20


def write(
    directory: Path, shard: Shard, config: DataConfig, sample: Sample
) -> Generator[int, None, Shard]:
    """Simulate and write one shard; yields 1 after each sample.

    Whatever this raises, no file has the shard's name unless it is on disk and whole.

    Returns:
      The shard with the size and the checksum of its file.
    """
    new = directory / f".{shard.name}.writing"
    try:
        # HDF5's first format limits attributes to 64 kB, and a configuration with many
        # crystals has more.
        with h5py.File(new, "w", libver=("v108", "latest")) as file:
            yield from _fill(file, shard, config, sample)
        sync(new)
        done = _described(new, shard)
        text = f"{done.sha256}  {shard.name}\n"
        _checksum_of(directory, shard).write_text(text)
        sync(_checksum_of(directory, shard))
        os.rename(new, directory / shard.name)
        sync(directory)
    finally:
        new.unlink(missing_ok=True)
    return done


def _fill(
    file: h5py.File, shard: Shard, config: DataConfig, sample: Sample
) -> Generator[int, None, None]:
    file.attrs["config"] = config.to_json()
    for name in ("split", "first", "samples"):
        file.attrs[name] = getattr(shard, name)
    total = squares = np.zeros(())
    for place in range(shard.samples):
        amplitudes, label = sample(config, shard.first + place)
        for name, array in (("amplitudes", amplitudes), ("labels", label)):
            if name not in file:
                # Contiguous: a sample is one read. Noise-like data compress poorly.
                shape = (shard.samples, *array.shape)
                file.create_dataset(name, shape, np.float32)
            file[name][place] = array  # type: ignore[index]
        exact = amplitudes.astype(np.float64)
        total = total + exact.sum((0, 1))
        squares = squares + (exact**2).sum((0, 1))
        yield 1
    file["total"], file["squares"] = total, squares
    indices = range(shard.first, shard.first + shard.samples)
    names = [config.material(index) for index in indices]
    file.create_dataset("material", data=names, dtype=h5py.string_dtype())


def finished(directory: Path, shard: Shard, config: DataConfig) -> Shard | None:
    """The shard as it lies there complete, or None where it has to be simulated.

    Raises:
      ShardError: the file is damaged, foreign or of another data set.
    """
    if not (directory / shard.name).exists():
        return None
    with open_shard(directory, shard, json.loads(config.to_json())):
        pass
    path = _checksum_of(directory, shard)
    try:
        wanted = path.read_text().split()[0]
    except (OSError, IndexError) as error:
        raise ShardError(f"{path}: no checksum ({error!r})") from error
    done = _described(directory / shard.name, shard)
    require(directory / shard.name, "sha256", done.sha256, wanted, f"by {path.name}")
    return done


def open_shard(directory: Path, shard: Shard, config: dict[str, Any]) -> h5py.File:
    """Open a shard, having compared what it says of itself.

    Args:
      directory: where it lies.
      shard: what it must be.
      config: the configuration it must have been simulated with.

    Raises:
      ShardError: missing, truncated, foreign, or of another data set.
    """
    path = directory / shard.name
    try:
        # Finished files never change, and parallel file systems may not know locks.
        file = h5py.File(path, "r", locking=False)
    except FileNotFoundError:
        raise ShardError(f"{path} is missing; the manifest lists it") from None
    except OSError as error:
        text = f"{path} is truncated, or not an HDF5 file: {error}"
        raise ShardError(text) from error
    try:
        _compare(file, path, shard, config)
    except BaseException:
        file.close()
        raise
    return file


def _compare(file: h5py.File, path: Path, shard: Shard, config: dict[str, Any]) -> None:
    for name in ("config", "split", "first", "samples"):
        if name not in file.attrs:
            raise ShardError(f"{path} is foreign: it has no attribute {name!r}")
    require(path, "config", json.loads(str(file.attrs["config"])), config)
    for name in ("split", "first", "samples"):
        # `item` makes a number of Python of NumPy's, which messages show better.
        found = np.asarray(file.attrs[name]).item()
        require(path, name, found, getattr(shard, name))
    for name, axes in (("amplitudes", 5), ("labels", 3), ("material", 1)):
        if name not in file:
            raise ShardError(f"{path} is foreign: it has no data set {name!r}")
        shape = file[name].shape  # type: ignore[union-attr]
        require(path, f"axes of {name}", len(shape), axes)
        require(path, f"samples in {name}", shape[0], shard.samples)
        if axes > 1:
            dtype = str(file[name].dtype)  # type: ignore[union-attr]
            require(path, f"dtype of {name}", dtype, "float32")


def verify(directory: Path, shard: Shard) -> None:
    """Compare a file with the size and the checksum in the manifest.

    Raises:
      ShardError: it is missing or differs.
    """
    path = directory / shard.name
    try:
        # Size first: it tells what has happened, and at once.
        require(path, "bytes", path.stat().st_size, shard.bytes)
        found = _described(path, shard)
    except FileNotFoundError:
        raise ShardError(f"{path} is missing; the manifest lists it") from None
    require(path, "sha256", found.sha256, shard.sha256)


def copy(directory: Path, shard: Shard, target: Path) -> None:
    """Copy a file and compare what was read with the manifest, and what was written.

    Raises:
      ShardError: it is missing or differs.
    """
    path, digest = directory / shard.name, hashlib.sha256()
    try:
        require(path, "bytes", path.stat().st_size, shard.bytes)
        with path.open("rb") as source, (target / shard.name).open("xb") as copied:
            while piece := source.read(_PIECE_BYTES):
                digest.update(piece)
                copied.write(piece)
    except FileNotFoundError:
        raise ShardError(f"{path} is missing; the manifest lists it") from None
    require(path, "sha256", digest.hexdigest(), shard.sha256)
    verify(target, shard)


def _described(path: Path, shard: Shard) -> Shard:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = os.fstat(file.fileno()).st_size
    return dataclasses.replace(shard, bytes=size, sha256=digest)


def _checksum_of(directory: Path, shard: Shard) -> Path:
    return directory / f"{shard.name}.sha256"
