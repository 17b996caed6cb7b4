"""Diffraction patterns with the space group they come from.

A sample is one material along three zone axes, a focused probe's pattern of each. Its
thickness, in-plane angle and origin are drawn for each: the lattice lies at random, so
a probe in the middle of the box stands at a random position of the crystal, as in a
scan. Averaging over positions would need many patterns for one, and take away the
fringes in which overlapping disks show their phases.

Sample i is a pure function of (configuration, i). The cache has a fixed number of
parts, so any number of ranks can share the simulation and finds the same data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from stemdl.classification import space_groups
from stemdl.data.dataset import Arrays, CacheError, read, write
from stemdl.physics import crystals, multislice, potential
from stemdl.physics.optics import Optics

VERSION = 1
"""Raise it whenever the simulation changes: old caches then have other names."""

ZONES = crystals.ZONES[:3]
"""The three projections of a sample."""

OPTICS = Optics(aperture_mrad=8.0, probes=1, detector=43)
"""A narrower aperture than the reconstruction's, so that disks stand apart, and a
detector that reaches to the band limit."""

FLOOR = 1e-6
"""Fraction of the beam below which `log_scaled` tells little apart."""

PARTS = 16
"""Files of a cache."""

_KEYS = ("patterns", "groups", "material")


@dataclasses.dataclass(frozen=True)
class PatternConfig:
    """Everything the samples depend on.

    Attributes:
      train: number of training samples; they go round the space groups, and round the
        materials of each, so that no group is more frequent than another.
      test: number of samples of the held-out materials, likewise.
      seed: of all random draws.
      optics: the microscope; `probes` must be 1.
    """

    train: int = 1400
    test: int = 280
    seed: int = 0
    optics: Optics = OPTICS

    def __post_init__(self) -> None:
        if self.train < 1 or self.test < 1:
            raise ValueError(
                f"train={self.train}, test={self.test}: give one sample of each or more"
            )
        if self.optics.probes != 1:
            raise ValueError(
                f"optics.probes={self.optics.probes}: a projection is one pattern; "
                "give 1"
            )

    @property
    def samples(self) -> int:
        """Training and held-out samples together."""
        return self.train + self.test

    def to_json(self) -> str:
        """Canonical text of the configuration and the simulation's version."""
        content = {"version": VERSION, "zones": ZONES, **dataclasses.asdict(self)}
        return json.dumps(content, sort_keys=True)

    def describe(self, part: int) -> str:
        """What a cache file says that it holds."""
        return f"part {part} of {PARTS} of {self.to_json()}"

    def path(self, directory: Path, part: int) -> Path:
        """The cache file of a part of this configuration's samples."""
        key = hashlib.sha256(self.to_json().encode()).hexdigest()[:12]
        return directory / f"patterns-{self.samples}-{key}-{part:02d}.npz"

    def kind(self, index: int) -> tuple[int, str]:
        """Space group and material of a sample; held-out ones follow the others."""
        held_out = index >= self.train
        by_group = space_groups.materials(held_out)
        place = index - self.train if held_out else index
        number = list(by_group)[place % len(by_group)]
        names = by_group[number]
        return number, names[place // len(by_group) % len(names)]


@dataclasses.dataclass(frozen=True, eq=False)
class Patterns:
    """Arrays ready for training.

    Attributes:
      x: (n, 3, detector, detector) float32, log-scaled intensities of each sample's
        projections, standardised with the training samples' mean and deviation.
      y: (n,) int32 space groups.
      material: (n,) of str.
    """

    x: np.ndarray
    y: np.ndarray
    material: np.ndarray


def log_scaled(intensity: np.ndarray) -> np.ndarray:
    """log(1 + intensity / FLOOR): weak disks count as strong ones do.

    Args:
      intensity: fractions of the beam, of any shape; not negative.

    Returns:
      float32 of the same shape, 0 where there is no intensity.
    """
    return np.log1p(np.asarray(intensity, np.float64) / FLOOR).astype(np.float32)


def simulate_sample(config: PatternConfig, index: int) -> np.ndarray:
    """Simulate one sample.

    Returns:
      (3, detector, detector) float32 intensities as fractions of the beam.
    """
    optics = config.optics
    rng = np.random.default_rng([config.seed, index])
    patterns = []
    for zone in ZONES:
        specimen = crystals.cut(config.kind(index)[1], rng, optics.box, zone)
        slices = int(np.ceil(specimen.thickness / optics.slice_thickness))
        atoms = potential.fourier_coefficients(specimen, optics)
        pattern = multislice.scan(potential.slices(atoms), slices, optics)
        patterns.append(pattern[0, 0])
    return np.stack(patterns)


def simulate_part(config: PatternConfig, part: int) -> Arrays:
    """Simulate every `PARTS`-th sample, starting with number `part`."""
    indices = range(part, config.samples, PARTS)
    side = config.optics.detector
    patterns = np.empty((len(indices), len(ZONES), side, side), np.float32)
    for place, index in enumerate(indices):
        patterns[place] = simulate_sample(config, index)
    kinds = [config.kind(index) for index in indices]
    return {
        "patterns": patterns,
        "groups": np.array([number for number, _ in kinds], np.int32),
        "material": np.array([name for _, name in kinds], dtype=str),
    }


def ensure(
    config: PatternConfig, directory: Path, rank: int = 0, size: int = 1
) -> Iterator[float]:
    """Simulate and cache this rank's parts unless they are there.

    Yields:
      The fraction of this rank's parts that are done.
    """
    mine = range(rank, PARTS, size)
    for done, part in enumerate(mine, 1):
        path = config.path(directory, part)
        if not path.exists():
            text = np.array(config.describe(part))
            write(path, {"config": text, **simulate_part(config, part)})
        yield done / len(mine)


def load(config: PatternConfig, directory: Path) -> tuple[Patterns, Patterns]:
    """Read the cache; scale and standardise the patterns.

    Args:
      config: the data set wanted; `ensure` must have written it.
      directory: where the cache lies.

    Returns:
      Training samples and held-out samples.

    Raises:
      FileNotFoundError: a part has not been simulated.
      CacheError: a file is damaged or holds something else.
    """
    parts = [_read(config, directory, part) for part in range(PARTS)]
    joined = {}
    for key in _KEYS:
        first = parts[0][key]
        dtype = np.result_type(*(part[key].dtype for part in parts))
        joined[key] = np.empty((config.samples, *first.shape[1:]), dtype)
        for number, part in enumerate(parts):
            joined[key][number::PARTS] = part[key]
    x = log_scaled(joined["patterns"])
    train = slice(None, config.train)
    x = (x - x[train].mean()) / x[train].std()
    return tuple(
        Patterns(x[rows], joined["groups"][rows], joined["material"][rows])
        for rows in (train, slice(config.train, None))
    )  # type: ignore[return-value]


def _read(config: PatternConfig, directory: Path, part: int) -> Arrays:
    path = config.path(directory, part)
    stored, arrays = read(path, _KEYS, "classify")
    if stored != config.describe(part):
        raise CacheError(
            f"{path} holds other samples; delete it and they are simulated again. "
            f"Wanted {config.describe(part)}, found {stored}"
        )
    return arrays
