"""Diffraction patterns with the space group they come from.

A sample is one material along three zone axes, with the patterns of a focused probe
averaged over nine positions, as a defocused or slow detector averages over a scan
(position-averaged convergent-beam diffraction, LeBeau et al., Ultramicroscopy 110
(2010) 118): a single position's pattern need not show the crystal's symmetry. Its
thickness, in-plane angle and origin are drawn for each projection.

A sample is a pure function of (seed, space group, its place among the group's
materials, repetition). The cache has a file per group, so any number of ranks can
share the simulation and finds the same data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ase import Atoms

from stemdl.classification import space_groups
from stemdl.data.dataset import Arrays, CacheError, read, write
from stemdl.physics import crystals, multislice, potential, prototypes
from stemdl.physics.optics import Optics

VERSION = 2
"""Raise it whenever the simulation or the prototypes change: old caches then have
other names."""

ZONES = crystals.ZONES[:3]
"""The three projections of a sample, as lattice vectors of the conventional cell."""

OPTICS = Optics(aperture_mrad=4.0, probes=3, detector=43)
"""Disks of the smaller cells stand apart; the detector reaches to the band limit."""

FLOOR = 1e-6
"""Fraction of the beam below which `log_scaled` tells little apart."""

_KEYS = ("patterns", "material", "prototype")


@dataclasses.dataclass(frozen=True)
class PatternConfig:
    """Everything the samples depend on.

    Attributes:
      groups: numbers of the space groups; empty: all that there are prototypes of.
      materials: generated materials of each group; a few groups have less.
      repeats: samples of each material.
      seed: of all random draws.
      optics: the microscope; patterns are averaged over its `probes` x `probes`
        positions.
    """

    groups: tuple[int, ...] = ()
    materials: int = 30
    repeats: int = 2
    seed: int = 0
    optics: Optics = OPTICS

    def __post_init__(self) -> None:
        if self.materials < 10 or self.repeats < 1:
            raise ValueError(
                f"materials={self.materials}, repeats={self.repeats}: give 10 or more "
                "and 1 or more; of ten materials some are held out"
            )
        if unknown := set(self.groups) - set(space_groups.present()):
            raise ValueError(
                f"groups={sorted(unknown)}: no prototypes; there are those of "
                + ", ".join(map(str, space_groups.present()))
            )

    @property
    def numbers(self) -> tuple[int, ...]:
        """The space groups wanted, in ascending order."""
        return tuple(sorted(self.groups)) or space_groups.present()

    def describe(self, number: int) -> str:
        """What the cache file of a group says that it holds."""
        fields = dataclasses.asdict(self)
        del fields["groups"]
        content = {"version": VERSION, "zones": ZONES, "group": number, **fields}
        return json.dumps(content, sort_keys=True)

    def path(self, directory: Path, number: int) -> Path:
        """The cache file of a group."""
        key = hashlib.sha256(self.describe(number).encode()).hexdigest()[:12]
        return directory / f"patterns-{number:03d}-{key}.npz"


@dataclasses.dataclass(frozen=True, eq=False)
class Patterns:
    """Arrays ready for training.

    Attributes:
      x: (n, 3, detector, detector) float32, log-scaled intensities of each sample's
        projections, standardised with the training samples' mean and deviation.
      y: (n,) int32 space groups.
      material: (n,) of str.
      prototype: (n,) of str, "" for the textbook's.
    """

    x: np.ndarray
    y: np.ndarray
    material: np.ndarray
    prototype: np.ndarray


def log_scaled(intensity: np.ndarray) -> np.ndarray:
    """log(1 + intensity / FLOOR): weak disks count as strong ones do.

    Args:
      intensity: fractions of the beam, of any shape; not negative.

    Returns:
      float32 of the same shape, 0 where there is no intensity.
    """
    return np.log1p(np.asarray(intensity, np.float64) / FLOOR).astype(np.float32)


def subjects(config: PatternConfig, number: int) -> list[tuple[str, str, Atoms]]:
    """Name, prototype and cell of the materials of a group, the textbook's last."""
    made = prototypes.group_materials(number, config.materials, config.seed)
    known = space_groups.textbook().get(number, ())
    return [
        *((material.name, material.prototype, material.atoms) for material in made),
        *((name, "", crystals.crystals()[name]) for name in known),
    ]


def simulate_sample(
    config: PatternConfig, number: int, place: int, repeat: int
) -> np.ndarray:
    """Simulate one sample.

    Args:
      config: of the data set.
      number: of the space group.
      place: of the material in `subjects`.
      repeat: which of the material's samples.

    Returns:
      (3, detector, detector) float32 intensities as fractions of the beam.
    """
    optics = config.optics
    _, _, atoms = subjects(config, number)[place]
    rng = np.random.default_rng([config.seed, number, place, repeat])
    patterns = []
    for zone in ZONES:
        specimen = crystals.cut(atoms, rng, optics.box, zone)
        slices = int(np.ceil(specimen.thickness / optics.slice_thickness))
        coefficients = potential.fourier_coefficients(specimen, optics)
        pattern = multislice.scan(potential.slices(coefficients), slices, optics)
        patterns.append(pattern.mean((0, 1)))
    return np.stack(patterns)


def simulate_group(config: PatternConfig, number: int) -> Arrays:
    """Simulate all samples of a group, log-scaled, in half precision."""
    there = subjects(config, number)
    patterns = [
        log_scaled(simulate_sample(config, number, place, repeat))
        for place in range(len(there))
        for repeat in range(config.repeats)
    ]
    return {
        "patterns": np.array(patterns, np.float16),
        "material": np.repeat([name for name, _, _ in there], config.repeats),
        "prototype": np.repeat(
            [prototype for _, prototype, _ in there], config.repeats
        ),
    }


def ensure(
    config: PatternConfig, directory: Path, rank: int = 0, size: int = 1
) -> Iterator[float]:
    """Simulate and cache this rank's groups unless they are there.

    Yields:
      The fraction of this rank's groups that are done.
    """
    mine = config.numbers[rank::size]
    for done, number in enumerate(mine, 1):
        path = config.path(directory, number)
        if not path.exists():
            text = np.array(config.describe(number))
            write(path, {"config": text, **simulate_group(config, number)})
        yield done / len(mine)


def load(
    config: PatternConfig, directory: Path, rule: str = "materials"
) -> dict[str, Patterns]:
    """Read the cache; divide the samples and standardise the patterns.

    Args:
      config: the data set wanted; `ensure` must have written it.
      directory: where the cache lies.
      rule: what is held out, one of `space_groups.RULES`.

    Returns:
      The samples of each of `space_groups.SPLITS`.

    Raises:
      FileNotFoundError: a group has not been simulated.
      CacheError: a file is damaged or holds something else.
    """
    parts = {number: _read(config, directory, number) for number in config.numbers}
    labels = []
    for number, part in parts.items():
        types = part["prototype"][:: config.repeats].tolist()
        each = space_groups.split(number, types, rule)
        labels += np.repeat(each, config.repeats).tolist()
    x, material, prototype = (
        np.concatenate([part[key] for part in parts.values()]) for key in _KEYS
    )
    y = np.repeat(
        np.array(list(parts), np.int32),
        [len(part["material"]) for part in parts.values()],
    )
    rows = {name: np.array(labels) == name for name in space_groups.SPLITS}
    seen = x[rows["train"]].astype(np.float32)
    mean, std = seen.mean(), seen.std()
    return {
        name: Patterns(
            (x[mine].astype(np.float32) - mean) / std,
            y[mine],
            material[mine],
            prototype[mine],
        )
        for name, mine in rows.items()
    }


def _read(config: PatternConfig, directory: Path, number: int) -> Arrays:
    path = config.path(directory, number)
    stored, arrays = read(path, _KEYS, "classify")
    if stored != config.describe(number):
        raise CacheError(
            f"{path} holds other samples; delete it and they are simulated again. "
            f"Wanted {config.describe(number)}, found {stored}"
        )
    return arrays
