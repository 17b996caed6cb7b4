"""Crystals from CIF files, read by ASE, as part of a data set's configuration.

The configuration holds the unit cell itself, and the file's checksum: whoever has the
configuration can simulate, without the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.io import read as read_atoms
from ase.neighborlist import neighbor_list

from stemdl.physics.optics import SettingError
from stemdl.physics.potential import scattering_factor
from stemdl.physics.symmetry import space_group

CLOSEST = 0.5
"""Atoms nearer than this, in A, are no crystal: hydrogen molecules have 0.74."""

RELAXED = 0.05
"""How far, in A, relaxation may have left atoms from where symmetry wants them."""


@dataclasses.dataclass(frozen=True)
class Crystal:
    """A unit cell.

    Attributes:
      name: of the material: the file's name without suffix.
      sha256: of the CIF file, hexadecimal.
      cell: three lattice vectors of three numbers, in A.
      symbols: chemical symbol of each of n atoms.
      positions: n of three numbers, in A.
    """

    name: str
    sha256: str
    cell: tuple[tuple[float, ...], ...]
    symbols: tuple[str, ...]
    positions: tuple[tuple[float, ...], ...]

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Crystal:
        """The inverse of `dataclasses.asdict` and of a JSON file between."""
        rows = {key: tuple(map(tuple, content[key])) for key in ("cell", "positions")}
        symbols = tuple(content["symbols"])
        return cls(content["name"], content["sha256"], symbols=symbols, **rows)

    def atoms(self) -> Atoms:
        """The same for ASE."""
        return Atoms(self.symbols, positions=self.positions, cell=self.cell, pbc=True)


def read(path: Path) -> Crystal:
    """Read a CIF file of one ordered structure.

    Symmetry operations that the file does not list are those of its space group in the
    first setting.

    Raises:
      SettingError: it is unreadable, incomplete, disordered, or has an element without
        form factor; names the file.
    """
    try:
        content = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            # Most files name their crystal system, which ASE has no need of.
            warnings.filterwarnings("ignore", "crystal system .* is not interpreted")
            text = io.StringIO(content.decode())
            # Under MPI ASE would have all ranks wait for one another here.
            structures = read_atoms(text, index=":", format="cif", parallel=False)
    except Exception as error:  # ASE raises whatever its parser meets
        raise SettingError(
            f"{path} is no readable CIF file ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(structures, list) or len(structures) != 1:
        number = len(structures) if isinstance(structures, list) else 0
        raise SettingError(f"{path} holds {number} structures with atoms: give one")
    atoms = structures[0]
    _check(path, atoms)
    return Crystal(
        name=path.stem,
        sha256=hashlib.sha256(content).hexdigest(),
        cell=tuple(map(tuple, atoms.cell.array.tolist())),
        symbols=tuple(atoms.get_chemical_symbols()),
        positions=tuple(map(tuple, atoms.positions.tolist())),
    )


def _check(path: Path, atoms: Atoms) -> None:
    if atoms.cell.rank < 3:
        raise SettingError(
            f"{path} has no unit cell: it needs _cell_length_a and so on"
        )
    for site in atoms.info.get("occupancy", {}).values():
        if any(abs(share - 1) > 1e-3 for share in site.values()):
            shares = ", ".join(f"{symbol} {share:g}" for symbol, share in site.items())
            raise SettingError(
                f"{path} has a partly occupied site ({shares}): give an ordered "
                "structure, such as a supercell with whole atoms"
            )
    for symbol in sorted(set(atoms.get_chemical_symbols())):
        try:
            scattering_factor(symbol, np.zeros(1))
        except SettingError as error:
            raise SettingError(f"{path}: {error}") from error
    near = neighbor_list("d", atoms, CLOSEST)
    if len(near):
        raise SettingError(
            f"{path} has atoms {near.min():.2f} A apart: disorder without occupancies, "
            "or another setting of its space group than the first; list the symmetry "
            "operations, and whole atoms alone"
        )


def require_fit(crystal: Crystal, box: float) -> None:
    """Refuse a cell of which no specimen holds a whole one.

    How long it is along the beam does not matter, but zones are drawn, so any edge may
    come to lie across.

    Raises:
      SettingError: an edge of the cell is longer than the box's side.
    """
    longest = float(np.linalg.norm(crystal.cell, axis=1).max())
    if longest > box:
        raise SettingError(
            f"crystal {crystal.name}: the cell's edge of {longest:.1f} A exceeds "
            f"optics.box={box:g} A, so that no sample would show a whole cell; enlarge "
            "the box (and optics.pixels), or give a smaller cell"
        )


def same_material(a: Atoms, b: Atoms) -> bool:
    """Whether two crystals have one formula, and one volume or one space group.

    Volumes per atom agree to 2 %. A relaxed structure's may not: density functionals
    miss lattice constants by more, and symmetry by a little.
    """
    if a.symbols.formula.reduce()[0].count() != b.symbols.formula.reduce()[0].count():
        return False
    ratio = a.get_volume() / len(a) / (b.get_volume() / len(b))
    return abs(ratio - 1) < 0.02 or space_group(a, RELAXED) == space_group(b, RELAXED)
