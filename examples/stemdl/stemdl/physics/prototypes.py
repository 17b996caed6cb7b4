"""Crystals made from structure types: elements substituted, cells and sites varied.

A prototype is a space group with its occupied sites. Where symmetry leaves a coordinate
or an edge of the cell free, each material gets its own; what is free follows from the
group's operations. The cell's size follows from the elements' covalent radii. Charges
are not balanced and nothing is relaxed, so most of these materials do not exist. Their
symmetry does, and spglib confirms it for each.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from importlib import resources

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers, covalent_radii
from ase.geometry import cellpar_to_cell
from ase.spacegroup import Spacegroup

from stemdl.physics import crystals
from stemdl.physics.symmetry import space_group

VISIBLE = 0.03
"""A group must hold if operations may be off by so much, in A: a distortion that is
smaller can hardly be seen between thermal displacements."""

EDGES = (2.0, 16.0)
"""Shortest and longest edge of a cell in A; `classification.data` has a box of 16."""

STRAIN = 0.03
"""Standard deviation of the cell's strains, as far as the group leaves them free."""

SHIFT = 0.06
"""The same of atoms along each free direction, in A."""

SPREAD = 1.3
"""Radii of substituted elements, over those of the prototype's, differ by less than
this factor: larger ones would make other structures."""

_CLASSES = tuple(
    text.split()
    for text in (
        # Large and electropositive; metals; half metals and their like; small ones that
        # fill gaps; anions.
        "Na K Rb Cs Ca Sr Ba Y La Ce Pr Nd Sm Gd Tb Dy Ho Er Yb Lu Tl Pb Th U",
        "Li Mg Al Sc Ti V Cr Mn Fe Co Ni Cu Zn Zr Nb Mo Ru Rh Pd Ag Cd Hf Ta W Re Os "
        "Ir Pt Au Hg",
        "Si P Ga Ge As In Sn Sb Te Bi Po",
        "Be B C N",
        "O F S Cl Se Br I",
    )
)


@dataclasses.dataclass(frozen=True)
class Prototype:
    """A structure type.

    Attributes:
      name: of it.
      number: of its space group, 1 to 230.
      setting: choice of origin, 1 or 2; rhombohedral groups have hexagonal axes.
      lattice: a, b, c in A and the three angles in degrees.
      symbols: element of each site, in a compound that has the structure.
      sites: one position of each, in fractions of the cell.
    """

    name: str
    number: int
    setting: int
    lattice: tuple[float, ...]
    symbols: tuple[str, ...]
    sites: tuple[tuple[float, ...], ...]

    @property
    def species(self) -> tuple[str, ...]:
        """Its elements, each once."""
        return tuple(dict.fromkeys(self.symbols))

    def operations(self) -> tuple[np.ndarray, np.ndarray]:
        """Rotations (n, 3, 3) and translations (n, 3) of the group, with centring."""
        return _operations(self.number, self.setting)

    def atoms(
        self,
        species: tuple[str, ...] | None = None,
        rng: np.random.Generator | None = None,
    ) -> Atoms:
        """A crystal of this type, of the compound's size.

        Args:
          species: elements in place of `self.species`.
          rng: draws strains and shifts; without one there are none.
        """
        named = dict(zip(self.species, species or self.species, strict=True))
        cell = cellpar_to_cell(self.lattice)
        sites = np.array(self.sites)
        if rng is not None:
            cell = cell @ self._strain(cell, rng)
            sites = np.stack([self._shifted(site, cell, rng) for site in sites])
        positions = [self._orbit(site) for site in sites]
        symbols = [
            named[symbol]
            for symbol, orbit in zip(self.symbols, positions, strict=True)
            for _ in orbit
        ]
        return Atoms(
            symbols, scaled_positions=np.concatenate(positions), cell=cell, pbc=True
        )

    def _orbit(self, site: np.ndarray) -> np.ndarray:
        """All positions that the group makes of one."""
        rotations, translations = self.operations()
        images = (rotations @ site + translations) % 1
        apart = images[:, None] - images[None]
        same = (np.abs(apart - np.round(apart)) < _SAME).all(-1)
        return images[same.argmax(1) == np.arange(len(images))]

    def _shifted(
        self, site: np.ndarray, cell: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Move a site where the operations that keep it let it go."""
        rotations, translations = self.operations()
        apart = rotations @ site + translations - site
        keep = (np.abs(apart - np.round(apart)) < _SAME).all(-1)
        free = rotations[keep].mean(0)  # the mean over a group projects
        moved = rng.normal(scale=SHIFT, size=3) @ np.linalg.inv(cell)
        return site + free @ moved

    def _strain(self, cell: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A strain (of row vectors) that the group's rotations leave as it is."""
        strain = rng.normal(scale=STRAIN, size=(3, 3))
        strain = (strain + strain.T) / 2
        turns = np.linalg.inv(cell) @ self.operations()[0].swapaxes(1, 2) @ cell
        return np.eye(3) + (turns.swapaxes(1, 2) @ strain @ turns).mean(0)


_SAME = 1e-4
"""Fractions of the cell nearer than this are one position."""


@dataclasses.dataclass(frozen=True, eq=False)
class Material:
    """A generated crystal.

    Attributes:
      prototype: name of its structure type.
      species: its elements, in the order of the prototype's.
      number: of its space group, which spglib has confirmed.
      atoms: its conventional cell.
    """

    prototype: str
    species: tuple[str, ...]
    number: int
    atoms: Atoms

    @property
    def name(self) -> str:
        """Structure type and elements; no two materials share it."""
        return f"{self.prototype} {'-'.join(self.species)}"


@functools.cache
def prototypes() -> dict[str, Prototype]:
    """All structure types by name."""
    text = resources.files("stemdl.physics").joinpath("prototypes.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    found = [_parse(line) for line in lines]
    return {prototype.name: prototype for prototype in found}


def contact(atoms: Atoms) -> float:
    """Least distance of two atoms over the sum of their covalent radii.

    The radii are those of Cordero et al., Dalton Trans. (2008) 2832, as ASE has them.
    """
    radii = covalent_radii[atoms.numbers]
    cells = np.stack(np.meshgrid(*3 * [(-1, 0, 1)], indexing="ij"), -1).reshape(-1, 3)
    apart = atoms.positions[:, None] - atoms.positions
    distance = np.linalg.norm(
        apart + (cells @ atoms.cell.array)[:, None, None], axis=-1
    )
    # Without each atom's distance from itself, in the cell in the middle.
    distance[13][np.diag_indices(len(atoms))] = np.inf
    return float((distance.min(0) / (radii[:, None] + radii)).min())


@functools.cache
def group_materials(number: int, count: int, seed: int = 0) -> tuple[Material, ...]:
    """Materials of one space group, round its prototypes.

    Args:
      number: of the group.
      count: of the materials, if so many can be made.
      seed: of elements, strains and shifts.

    Returns:
      The materials. No two of one prototype have the same elements, in whatever order,
      and none has those of a crystal of `physics.crystals` in this group.
    """
    makers = [
        _made(prototype, np.random.default_rng([seed, number, place]))
        for place, prototype in enumerate(prototypes().values())
        if prototype.number == number
    ]
    found: list[Material] = []
    while makers and len(found) < count:
        for maker in tuple(makers):
            material = next(maker, None)
            if material is None:
                makers.remove(maker)
            elif len(found) < count:
                found.append(material)
    return tuple(found)


_TRIES = 1000
"""Draws of elements for a prototype, after which it gives no more materials."""


def _made(prototype: Prototype, rng: np.random.Generator) -> Iterator[Material]:
    """Draw materials of a prototype until there are hardly new ones."""
    wanted = contact(prototype.atoms())
    pools = [_substitutes(symbol, prototype) for symbol in prototype.species]
    reference = _radii(prototype.species)
    seen = set(_built_in(prototype.number))
    for _ in range(_TRIES):
        species = tuple(str(rng.choice(pool)) for pool in pools)
        ratios = _radii(species) / reference
        elements = frozenset(species)
        if (
            len(elements) < len(species)
            or elements in seen
            or ratios.max() > SPREAD * ratios.min()
        ):
            continue
        atoms = prototype.atoms(species, rng)
        # As near as in the compound, so that the cell's size follows the radii.
        scale = wanted / contact(atoms) * rng.normal(1, STRAIN / 2)
        atoms.set_cell(atoms.cell.array * scale, scale_atoms=True)
        edges = atoms.cell.lengths()
        if edges.min() < EDGES[0] or edges.max() > EDGES[1]:
            continue
        if confirmed(atoms, prototype.number):
            seen.add(elements)
            yield Material(prototype.name, species, prototype.number, atoms)


def confirmed(atoms: Atoms, number: int) -> bool:
    """Whether spglib finds this space group, strictly and within `VISIBLE`."""
    try:
        return all(space_group(atoms, off) == number for off in (1e-3, VISIBLE))
    except ValueError:
        return False


def _radii(species: tuple[str, ...]) -> np.ndarray:
    return covalent_radii[[atomic_numbers[symbol] for symbol in species]]


def _substitutes(symbol: str, prototype: Prototype) -> Sequence[str]:
    """Elements that may stand for one of a prototype's."""
    if len(prototype.species) == 1:
        return [element for group in _CLASSES[:3] for element in group]
    return next(group for group in _CLASSES if symbol in group)


@functools.cache
def _built_in(number: int) -> frozenset[frozenset[str]]:
    """Elements of each of `crystals.crystals()` that is of this space group."""
    return frozenset(
        frozenset(cell.get_chemical_symbols())
        for cell in crystals.crystals().values()
        if space_group(cell) == number
    )


@functools.cache
def _operations(number: int, setting: int) -> tuple[np.ndarray, np.ndarray]:
    rotations, translations = zip(*Spacegroup(number, setting).get_symop(), strict=True)
    return np.array(rotations, float), np.array(translations, float)


def _parse(line: str) -> Prototype:
    name, group, rest = line.split(maxsplit=2)
    number, _, setting = group.partition(":")
    # Lattice constants end where the first site's element begins.
    start = next(place for place, letter in enumerate(rest) if letter.isalpha())
    numbers = [float(word) for word in rest[:start].split()]
    sites = [site.split() for site in rest[start:].split(";")]
    return Prototype(
        name=name,
        number=int(number),
        setting=int(setting or 1),
        lattice=_lattice(int(number), numbers),
        symbols=tuple(symbol for symbol, *_ in sites),
        sites=tuple(
            tuple(float(Fraction(x)) for x in position) for _, *position in sites
        ),
    )


def _lattice(number: int, given: list[float]) -> tuple[float, ...]:
    """Edges and angles from those that are a crystal system's own."""
    match given:
        case [a]:
            return (a, a, a, 90.0, 90.0, 90.0)
        case [a, c]:
            return (a, a, c, 90.0, 90.0, 120.0 if 143 <= number <= 194 else 90.0)
        case [a, b, c]:
            return (a, b, c, 90.0, 90.0, 90.0)
        case [a, b, c, beta]:
            return (a, b, c, 90.0, beta, 90.0)
    raise ValueError(f"lattice constants {given}: give one to four")
