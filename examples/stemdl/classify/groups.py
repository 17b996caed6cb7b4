"""What is to be told apart: space groups, and which materials nobody trains on."""

from __future__ import annotations

import functools
from typing import Any

import spglib
import spglib.error
from ase import Atoms

from simulate import crystals

OUTPUTS = 231
"""Outputs of the network: an output's index is a space group's number, 1 to 230."""

HELD_OUT = frozenset(
    (*crystals.HELD_OUT, "Ag", "NaCl", "Fe", "InP", "NiAl", "Zr", "GaN", "SnO2")
)
"""Materials of the test: those of the reconstruction and, so that each space group has
some, others; about a quarter of every group."""

_TOLERANCE = 1e-3
"""How far, in A, an operation may move an atom from its image."""

# Otherwise spglib warns at every call that it will raise in future.
spglib.error.OLD_ERROR_HANDLING = False


def space_group(cell: Atoms) -> int:
    """Find the space group of a crystal.

    Args:
      cell: a periodic cell, primitive or not.

    Returns:
      Its number in International Tables A, 1 to 230.

    Raises:
      ValueError: the cell describes no crystal, for instance as atoms coincide.
    """
    described: Any = (cell.cell.array, cell.get_scaled_positions(), cell.numbers)
    try:
        dataset = spglib.get_symmetry_dataset(described, symprec=_TOLERANCE)
    except spglib.SpglibError as error:
        formula = cell.get_chemical_formula()
        raise ValueError(
            f"spglib finds no space group of {formula}: {error}; check its cell and "
            "positions"
        ) from error
    assert dataset is not None  # which older releases returned instead of raising
    return dataset.number


@functools.lru_cache
def materials(held_out: bool) -> dict[int, tuple[str, ...]]:
    """Names of the training materials, or of those held out, by space group.

    Groups of a single material are left out: they cannot be both learned and tested.
    """
    found: dict[int, list[str]] = {}
    for name, cell in crystals.crystals().items():
        found.setdefault(space_group(cell), []).append(name)
    return {
        number: tuple(name for name in names if (name in HELD_OUT) == held_out)
        for number, names in sorted(found.items())
        if len(names) > 1
    }


def present() -> tuple[int, ...]:
    """The space groups that there are to tell apart, in ascending order."""
    return tuple(materials(held_out=False))
