"""Crystals, and specimens cut from them.

Lattice constants are room-temperature textbook values in angstrom; the inverse
problem needs variety, not their last digit.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.spacegroup import crystal as from_space_group

from stemdl.physics.optics import SettingError

ZONES = ((0, 0, 1), (1, 1, 0), (1, 1, 1), (1, 1, 2))
"""Beam directions, as lattice vectors of the cubic or hexagonal cell."""

HELD_OUT = ("Pd", "Nb", "Ge", "MgO", "GaAs", "CeO2", "SrTiO3", "Ti")
"""Materials that the network never sees: one of most structure types."""

_ONE_CONSTANT: dict[str, dict[str, float]] = {
    "fcc": {
        "Al": 4.050, "Ca": 5.588, "Ni": 3.524, "Cu": 3.615, "Rh": 3.803, "Pd": 3.891,
        "Ag": 4.086, "Pt": 3.924, "Au": 4.078, "Pb": 4.951,
    },
    "bcc": {
        "V": 3.024, "Cr": 2.885, "Fe": 2.867, "Nb": 3.301, "Mo": 3.147, "Ta": 3.303,
        "W": 3.165,
    },
    "diamond": {"C": 3.567, "Si": 5.431, "Ge": 5.658, "Sn": 6.489},
    "rocksalt": {
        "LiF": 4.026, "NaCl": 5.640, "MgO": 4.212, "CaO": 4.811, "NiO": 4.177,
        "TiN": 4.241, "PbS": 5.936,
    },
    "zincblende": {
        "SiC": 4.360, "GaP": 5.451, "ZnS": 5.409, "GaAs": 5.653, "InP": 5.869,
        "InAs": 6.058, "CdTe": 6.482,
    },
    "cesiumchloride": {"CsCl": 4.123, "NiAl": 2.887, "CuZn": 2.950},
    "fluorite": {"CaF2": 5.463, "ZrO2": 5.100, "CeO2": 5.411, "UO2": 5.471},
    "perovskite": {
        "CaTiO3": 3.840, "SrTiO3": 3.905, "BaTiO3": 4.006, "KNbO3": 4.022,
        "LaAlO3": 3.790,
    },
}  # fmt: skip

_TWO_CONSTANTS: dict[str, dict[str, tuple[float, float]]] = {
    "hcp": {
        "Mg": (3.209, 5.211), "Ti": (2.951, 4.686), "Co": (2.507, 4.069),
        "Zn": (2.665, 4.947), "Zr": (3.232, 5.148),
    },
    "wurtzite": {"AlN": (3.112, 4.982), "ZnO": (3.250, 5.207), "GaN": (3.190, 5.186)},
}  # fmt: skip

_SPINEL = ((1 / 8,) * 3, (1 / 2,) * 3)

# Space group and setting, symbols, their sites, lattice constants, last angle.
_BY_SPACE_GROUP: dict[str, tuple] = {
    "TiO2": (136, 1, "TiO", [(0, 0, 0), (0.3053, 0.3053, 0)], (4.594, 2.959), 90),
    "SnO2": (136, 1, "SnO", [(0, 0, 0), (0.3056, 0.3056, 0)], (4.738, 3.187), 90),
    "TiO2 anatase": (141, 1, "TiO", [(0, 0, 0), (0, 0, 0.2081)], (3.785, 9.514), 90),
    "MgAl2O4": (227, 2, "MgAlO", [*_SPINEL, (0.2624,) * 3], (8.083, 8.083), 90),
    "Fe3O4": (227, 2, "FeFeO", [*_SPINEL, (0.2549,) * 3], (8.396, 8.396), 90),
    "Al2O3": (
        167, 1, "AlO", [(0, 0, 0.3522), (0.3063, 0, 0.25)], (4.759, 12.991), 120
    ),
    "FeS2": (205, 1, "FeS", [(0, 0, 0), (0.385,) * 3], (5.418, 5.418), 90),
    "NiAs": (194, 1, "NiAs", [(0, 0, 0), (1 / 3, 2 / 3, 1 / 4)], (3.619, 5.034), 120),
    "MoS2": (
        194, 1, "MoS", [(1 / 3, 2 / 3, 1 / 4), (1 / 3, 2 / 3, 0.621)],
        (3.161, 12.295), 120,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How specimens are cut from crystals, and how their atoms move.

    Attributes:
      min_thickness: of the specimens along the beam, in A; drawn uniformly.
      max_thickness: the same.
      mistilt_mrad: largest angle between beam and zone axis; drawn uniformly in the
        disk of this radius.
      rms_displacement: thermal displacement along each axis in A, of independent
        atoms (Einstein's model).
      phonons: frozen phonons: draws of the displacements whose intensities are
        averaged, as an exposure longer than any vibration does.

    Raises:
      SettingError: a field is out of range.
    """

    min_thickness: float = 10.0
    max_thickness: float = 40.0
    mistilt_mrad: float = 0.0
    rms_displacement: float = 0.08
    phonons: int = 1

    def __post_init__(self) -> None:
        ranges = {
            "min_thickness": (1e-3, self.max_thickness),
            "max_thickness": (self.min_thickness, math.inf),
            # Farther off, it is another zone axis.
            "mistilt_mrad": (0, 200),
            # Where solids have long melted (Lindemann).
            "rms_displacement": (0, 0.5),
            "phonons": (1, math.inf),
        }
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise SettingError(
                    f"preparation.{name}={value}: give {least:g} to {most:g}"
                )


@dataclasses.dataclass(frozen=True, eq=False)
class Specimen:
    """A piece of crystal in the simulation box.

    Attributes:
      symbols: chemical symbols, (n,) of str.
      positions: (n, 3) float64 in A; the beam runs along the last axis.
      thickness: extent along the beam in A.
    """

    symbols: np.ndarray
    positions: np.ndarray
    thickness: float


@functools.lru_cache
def crystals() -> dict[str, Atoms]:
    """Unit cells of all materials by chemical formula."""
    cells: dict[str, Atoms] = {}
    for structure, materials in _ONE_CONSTANT.items():
        for name, a in materials.items():
            if structure == "perovskite":
                cells[name] = _perovskite(name, a)
            else:
                cells[name] = bulk(name, structure, a=a, cubic=True)
    for structure, pairs in _TWO_CONSTANTS.items():
        for name, (a, c) in pairs.items():
            cells[name] = bulk(name, structure, a=a, c=c)
    for name, (
        group,
        setting,
        symbols,
        sites,
        (a, c),
        angle,
    ) in _BY_SPACE_GROUP.items():
        lattice = [a, a, c, 90, 90, angle]
        cells[name] = from_space_group(
            symbols, sites, spacegroup=group, setting=setting, cellpar=lattice
        )
    return cells


def materials(held_out: bool) -> tuple[str, ...]:
    """Names of the training materials, or of those held out."""
    return tuple(n for n in crystals() if (n in HELD_OUT) == held_out)


def cut(
    crystal: str | Atoms,
    rng: np.random.Generator,
    box: float,
    zone: tuple[int, int, int] | None = None,
    preparation: Preparation = Preparation(),
) -> Specimen:
    """Cut a specimen: the first of `configurations`, whose arguments it takes.

    Returns:
      The atoms with 0 <= x, y < box and 0 <= z < thickness before displacement.
    """
    return next(configurations(crystal, rng, box, zone, preparation))


def configurations(
    crystal: str | Atoms,
    rng: np.random.Generator,
    box: float,
    zone: tuple[int, int, int] | None = None,
    preparation: Preparation = Preparation(),
) -> Iterator[Specimen]:
    """Cut a randomly placed and oriented specimen; yields its frozen phonons.

    Zone, in-plane angle, origin, thickness, mistilt and displacements are drawn. More
    phonons leave the first ones as they are, and mistilt leaves the other draws.

    Args:
      crystal: a unit cell, or the name of one of `crystals()`.
      rng: source of everything random.
      box: side of the square that the specimen fills, in A.
      zone: beam direction as a lattice vector of the cell; drawn from `ZONES` unless
        given.
      preparation: thickness, mistilt and displacements.

    Yields:
      `preparation.phonons` specimens that differ in the displacements alone.
    """
    cell = crystals()[crystal] if isinstance(crystal, str) else crystal
    if zone is None:
        zone = ZONES[rng.integers(len(ZONES))]
    thickness = float(rng.uniform(preparation.min_thickness, preparation.max_thickness))
    turn = _orientation(zone @ cell.cell.array, rng.uniform(0, 2 * np.pi))
    if preparation.mistilt_mrad:
        turn = _mistilt(preparation.mistilt_mrad * 1e-3, rng.spawn(1)[0]) @ turn
    vectors = cell.cell.array @ turn.T
    basis = (cell.positions + rng.uniform(size=3) @ cell.cell.array) @ turn.T

    centre = np.array([box, box, thickness]) / 2
    reach = np.linalg.norm(centre) + np.linalg.norm(vectors.sum(0))
    # Lattice planes of vector i lie 1 / |reciprocal vector i| apart.
    counts = np.ceil(reach * np.linalg.norm(np.linalg.inv(vectors), axis=0)).astype(int)
    grid = np.stack(
        np.meshgrid(*(np.arange(-n, n + 1) for n in counts), indexing="ij"), -1
    ).reshape(-1, 3)
    positions = (centre + grid @ vectors)[:, None, :] + basis
    symbols = np.broadcast_to(cell.get_chemical_symbols(), positions.shape[:2])
    extent = np.array([box, box, thickness])
    inside = np.all((positions >= 0) & (positions < extent), axis=-1)
    kept, symbols = positions[inside], symbols[inside]
    for _ in range(preparation.phonons):
        moved = rng.normal(scale=preparation.rms_displacement, size=kept.shape)
        yield Specimen(symbols=symbols, positions=kept + moved, thickness=thickness)


def _perovskite(name: str, a: float) -> Atoms:
    """Cubic ABO3: A at the corner, B at the centre, oxygen on the faces."""
    sites = [(0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0), (0.5, 0, 0.5), (0, 0.5, 0.5)]
    return Atoms(name, scaled_positions=sites, cell=[a, a, a], pbc=True)


def _orientation(direction: np.ndarray, angle: float) -> np.ndarray:
    """Rotation matrix that brings `direction` to z and then turns about z."""
    z = direction / np.linalg.norm(direction)
    helper = np.eye(3)[np.argmin(np.abs(z))]
    x = np.cross(helper, z)
    x /= np.linalg.norm(x)
    aligned = np.stack([x, np.cross(z, x), z])
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ aligned


def _mistilt(largest: float, rng: np.random.Generator) -> np.ndarray:
    """Rotation matrix that tilts z by an angle of at most `largest` rad."""
    angle, azimuth = largest * math.sqrt(rng.uniform()), rng.uniform(0, 2 * np.pi)
    tilted = (
        math.sin(angle) * math.cos(azimuth),
        math.sin(angle) * math.sin(azimuth),
        math.cos(angle),
    )
    # Tilted about an axis in the plane, and not turned in it.
    x, y, z = tilted
    return np.array(
        [
            [1 - x * x / (1 + z), -x * y / (1 + z), x],
            [-x * y / (1 + z), 1 - y * y / (1 + z), y],
            [-x, -y, z],
        ]
    )
