"""Crystals, and specimens cut from them.

Lattice constants are room-temperature textbook values in angstrom; the inverse
problem needs variety, not their last digit.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from ase import Atoms
from ase.build import bulk

ZONES = ((0, 0, 1), (1, 1, 0), (1, 1, 1), (1, 1, 2))
"""Beam directions, as lattice vectors of the cubic or hexagonal cell."""

MIN_THICKNESS, MAX_THICKNESS = 10.0, 40.0
RMS_DISPLACEMENT = 0.08
"""Thermal displacement along each axis, in A."""

HELD_OUT = ("Pd", "Nb", "Ge", "MgO", "GaAs", "CeO2", "SrTiO3", "Ti")
"""Materials that the network never sees: one of each common structure type."""

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
    return cells


def materials(held_out: bool) -> tuple[str, ...]:
    """Names of the training materials, or of those held out."""
    return tuple(n for n in crystals() if (n in HELD_OUT) == held_out)


def cut(
    name: str,
    rng: np.random.Generator,
    box: float,
    zone: tuple[int, int, int] | None = None,
) -> Specimen:
    """Cut a randomly placed and oriented specimen from a crystal.

    Zone, in-plane angle, origin, thickness and thermal displacements are drawn.

    Args:
      name: a material of `crystals()`.
      rng: source of everything random.
      box: side of the square that the specimen fills, in A.
      zone: beam direction as a lattice vector of the cell; drawn from `ZONES` unless
        given.

    Returns:
      The atoms with 0 <= x, y < box and 0 <= z < thickness before displacement.
    """
    cell = crystals()[name]
    if zone is None:
        zone = ZONES[rng.integers(len(ZONES))]
    thickness = float(rng.uniform(MIN_THICKNESS, MAX_THICKNESS))
    turn = _orientation(zone @ cell.cell.array, rng.uniform(0, 2 * np.pi))
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
    kept = positions[inside]
    return Specimen(
        symbols=symbols[inside],
        positions=kept + rng.normal(scale=RMS_DISPLACEMENT, size=kept.shape),
        thickness=thickness,
    )


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
