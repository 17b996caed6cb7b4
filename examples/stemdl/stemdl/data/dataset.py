"""The data set: simulated once, cached on disk, loaded by every rank.

Sample i is a pure function of (configuration, i), so any number of processes may
simulate any part of it and the result is the same.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from stemdl.config import SAMPLES
from stemdl.data import augmentation
from stemdl.physics import crystals, multislice, potential
from stemdl.physics.cif import Crystal, require_fit, same_material
from stemdl.physics.crystals import Preparation
from stemdl.physics.optics import Optics, SettingError

VERSION = 3
"""Raise it whenever the simulation changes: old caches then have other names."""

Arrays = dict[str, np.ndarray]

_KEYS = ("amplitudes", "labels", "material")


class CacheError(RuntimeError):
    """A cache file that cannot be used."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Everything the samples depend on.

    Attributes:
      train: number of training samples, spread evenly over the training materials.
      test: number of samples of the held-out materials.
      seed: of all random draws.
      optics: the microscope.
      preparation: how specimens are cut.
      cifs: crystals to train on, besides those built in.
      held_out_cifs: crystals to hold out, besides those built in.
      built_in: whether `physics.crystals` has a part in it.

    Raises:
      SettingError: fields contradict each other, or a crystal does not fit.
    """

    train: int = SAMPLES
    test: int = 200
    seed: int = 0
    optics: Optics = dataclasses.field(default_factory=Optics)
    preparation: Preparation = dataclasses.field(default_factory=Preparation)
    cifs: tuple[Crystal, ...] = ()
    held_out_cifs: tuple[Crystal, ...] = ()
    built_in: bool = True

    def __post_init__(self) -> None:
        optics, thickest = self.optics, self.preparation.max_thickness
        if thickest > optics.max_slices * optics.slice_thickness:
            raise SettingError(
                f"preparation.max_thickness={thickest} A is more than "
                f"optics.max_slices={optics.max_slices} of optics.slice_thickness="
                f"{optics.slice_thickness} A hold: raise max_slices"
            )
        optics.require_room(thickest)
        for crystal in (*self.cifs, *self.held_out_cifs):
            require_fit(crystal, optics.box)
        given = [crystal.name for crystal in (*self.cifs, *self.held_out_cifs)]
        names = [*(crystals.crystals() if self.built_in else ()), *given]
        for name in given:
            if names.count(name) > 1:
                raise SettingError(
                    f"two crystals are named {name!r}: rename the CIF file"
                )
        if given:
            self._require_disjoint()

    def _require_disjoint(self) -> None:
        """Other names do not make the held-out crystals others."""
        training = {name: self.crystal(name) for name in self.materials(False)}
        for name in self.materials(True):
            for other, atoms in training.items():
                if same_material(atoms, self.crystal(name)):
                    raise SettingError(
                        f"crystal {name} is held out, and {other}, which is to be "
                        "trained on, has its formula, and its volume or space group: "
                        "leave one out"
                    )

    @property
    def samples(self) -> int:
        """Training and held-out samples together."""
        return self.train + self.test

    def to_json(self) -> str:
        """Canonical text of the configuration and the simulation's version."""
        content = {"version": VERSION, **dataclasses.asdict(self)}
        return json.dumps(content, sort_keys=True)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> DataConfig:
        """The configuration whose `to_json`, parsed, a manifest holds."""
        fields = {key: content[key] for key in ("train", "test", "seed", "built_in")}
        return cls(
            **fields,
            optics=Optics(**content["optics"]),
            preparation=Preparation(**content["preparation"]),
            cifs=tuple(map(Crystal.from_json, content["cifs"])),
            held_out_cifs=tuple(map(Crystal.from_json, content["held_out_cifs"])),
        )

    def path(self, directory: Path) -> Path:
        """The cache file of this configuration."""
        key = hashlib.sha256(self.to_json().encode()).hexdigest()[:12]
        return directory / f"stemdl-{self.samples}-{key}.npz"

    def materials(self, held_out: bool) -> tuple[str, ...]:
        """Names of the training materials, or of those held out.

        Raises:
          SettingError: there are none.
        """
        files = self.held_out_cifs if held_out else self.cifs
        built_in = crystals.materials(held_out) if self.built_in else ()
        names = (*built_in, *(crystal.name for crystal in files))
        if not names:
            use = "hold out" if held_out else "train on"
            raise SettingError(f"no crystal to {use}: give a CIF file of one")
        return names

    def crystal(self, name: str) -> Atoms:
        """The unit cell of a material."""
        for crystal in (*self.cifs, *self.held_out_cifs):
            if crystal.name == name:
                return crystal.atoms()
        return crystals.crystals()[name]

    def material(self, index: int) -> str:
        """Material of sample `index`; held-out samples follow the training samples."""
        held_out = index >= self.train
        names = self.materials(held_out)
        return names[(index - self.train if held_out else index) % len(names)]


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Arrays ready for training.

    Attributes:
      train_x: (n, scan, scan, detector, detector) float32, square roots of
        intensities, standardised per detector pixel with training statistics.
      train_y: (n, pixels, pixels) float32 potentials, each of mean 0 and variance 1.
      test_x: as train_x, for held-out materials.
      test_y: as train_y.
      train_names: material of each training sample, (n,) of str.
      test_names: material of each held-out sample.
      mean: (detector, detector) float32, subtracted from amplitudes.
      std: (detector, detector) float32, by which they are divided.
      optics: the microscope.
    """

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    train_names: np.ndarray
    test_names: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    optics: Optics

    def amplitudes(self, standardised: np.ndarray) -> np.ndarray:
        """Square roots of intensities, as fractions of the beam, from inputs."""
        return standardised * self.std + self.mean


def configurations_of(config: DataConfig, index: int) -> Iterator[crystals.Specimen]:
    """Cut the crystal of sample `index`; yields its frozen phonons."""
    rng = np.random.default_rng([config.seed, index])
    crystal = config.crystal(config.material(index))
    return crystals.configurations(
        crystal, rng, config.optics.box, preparation=config.preparation
    )


def specimen_of(config: DataConfig, index: int) -> crystals.Specimen:
    """Cut the crystal of sample `index`: its atoms, displaced once, and thickness."""
    return next(configurations_of(config, index))


def simulate_sample(config: DataConfig, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Simulate one sample: amplitudes of the diffraction patterns, and the label.

    Both are those of the mean over frozen phonons: of intensities, and of potentials.
    """
    optics, phonons = config.optics, config.preparation.phonons
    intensity = coefficients = np.float32(0)
    for specimen in configurations_of(config, index):
        frozen = potential.fourier_coefficients(specimen, optics)
        slices = int(np.ceil(specimen.thickness / optics.slice_thickness))
        coefficients = coefficients + frozen
        intensity += multislice.scan(potential.slices(frozen), slices, optics)
    label = potential.label(np.asarray(coefficients) / np.float32(phonons), optics)
    return np.sqrt(intensity / np.float32(phonons)), label


def simulate_part(config: DataConfig, part: int, parts: int) -> Arrays:
    """Simulate every `parts`-th sample, starting with number `part`.

    Returns:
      "amplitudes" (n, scan, scan, detector, detector) and "labels"
      (n, pixels, pixels), float32, and "material", (n,) of str.
    """
    indices = range(part, config.samples, parts)
    amplitudes, labels = zip(
        *(simulate_sample(config, index) for index in indices), strict=True
    )
    return {
        "amplitudes": np.stack(amplitudes),
        "labels": np.stack(labels),
        "material": np.array([config.material(index) for index in indices]),
    }


def simulate(config: DataConfig, processes: int, parts: int) -> Iterator[Arrays]:
    """Simulate in several processes; yields the parts in order as they are done."""
    if processes == 1:
        yield from (simulate_part(config, part, parts) for part in range(parts))
        return
    # Forking a process that has started JAX can deadlock, hence spawn.
    context = multiprocessing.get_context("spawn")
    places = context.SimpleQueue()
    for place in range(processes):
        places.put(place)
    with concurrent.futures.ProcessPoolExecutor(
        processes, context, initializer=_settle, initargs=(places,)
    ) as pool:
        futures = [
            pool.submit(simulate_part, config, part, parts) for part in range(parts)
        ]
        for future in futures:
            yield future.result()


def _settle(places: Any) -> None:
    """Keep a worker to one core, so that the workers' thread pools do not compete."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[places.get() % len(cores)]})


def join(parts: list[Arrays]) -> Arrays:
    """Interleave all parts of `simulate_part` into samples in order of their index."""
    samples = sum(len(part["labels"]) for part in parts)
    joined: Arrays = {}
    for key in _KEYS:
        first = parts[0][key]
        dtype = np.result_type(*(part[key].dtype for part in parts))
        joined[key] = np.empty((samples, *first.shape[1:]), dtype)
        for index, part in enumerate(parts):
            joined[key][index :: len(parts)] = part[key]
    return joined


def save(config: DataConfig, arrays: Arrays, directory: Path) -> Path:
    """Write the cache file, all of it or nothing."""
    path = config.path(directory)
    write(path, {"config": np.array(config.to_json()), **arrays})
    return path


def write(path: Path, arrays: Arrays) -> None:
    """Write an .npz file, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # An interrupted write, or two processes at once, must not leave a torn file.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)  # pyright: ignore
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def ensure(config: DataConfig, directory: Path, processes: int = 1) -> Iterator[float]:
    """Simulate and cache the data set unless it is there; yields the fraction done."""
    if not config.path(directory).exists():
        count = max(1, min(50, config.samples // 20))
        parts: list[Arrays] = []
        for part in simulate(config, processes, count):
            parts.append(part)
            yield len(parts) / count
        save(config, join(parts), directory)
    yield 1.0


def load(config: DataConfig, directory: Path) -> Dataset:
    """Read the cache and standardise the inputs.

    Args:
      config: the data set wanted; `ensure` must have written it.
      directory: where the cache lies.

    Returns:
      Training and held-out samples, and the statistics of standardisation.

    Raises:
      FileNotFoundError: the data set has not been simulated.
      CacheError: the file is damaged or holds something else.
    """
    arrays = _read(config, config.path(directory))
    x, y = arrays["amplitudes"], arrays["labels"]
    train_x, test_x = x[: config.train], x[config.train :]
    # Statistics that respect the symmetries commute with augmentation.
    mean = augmentation.symmetrised(train_x.mean((0, 1, 2)))
    spread = np.sqrt(augmentation.symmetrised(((train_x - mean) ** 2).mean((0, 1, 2))))
    std = np.maximum(spread, 1e-3 * spread.max())
    return Dataset(
        train_x=(train_x - mean) / std,
        train_y=y[: config.train],
        test_x=(test_x - mean) / std,
        test_y=y[config.train :],
        train_names=arrays["material"][: config.train],
        test_names=arrays["material"][config.train :],
        mean=mean,
        std=std,
        optics=config.optics,
    )


def read(path: Path, keys: Sequence[str], command: str) -> tuple[str, Arrays]:
    """Read what `write` has written.

    Args:
      path: the file.
      keys: of the arrays wanted.
      command: simulates it, for messages.

    Returns:
      The text of its configuration, and the arrays.

    Raises:
      FileNotFoundError: it is not there.
      CacheError: it is damaged.
    """
    try:
        # Given a path, np.load leaves a damaged file open.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return str(file["config"]), {key: file[key] for key in keys}
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} does not exist; simulate it with python -m stemdl {command}"
        ) from None
    except Exception as error:  # np.load raises whatever zipfile, zlib or pickle do
        raise CacheError(
            f"{path} is not a readable data set ({type(error).__name__}: {error}); "
            "delete it and it is simulated again"
        ) from error


def _read(config: DataConfig, path: Path) -> Arrays:
    stored, arrays = read(path, _KEYS, "cache")
    shape = (config.samples, config.optics.probes, config.optics.probes)
    if stored != config.to_json() or arrays["amplitudes"].shape[:3] != shape:
        raise CacheError(
            f"{path} holds the data set of another configuration; delete it and it is "
            f"simulated again. Wanted {config.to_json()}, found {stored}"
        )
    return arrays
