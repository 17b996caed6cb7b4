"""Space groups of crystals, by spglib."""

from __future__ import annotations

from typing import Any

import spglib
import spglib.error
from ase import Atoms

# Otherwise spglib warns at every call that it will raise in future.
spglib.error.OLD_ERROR_HANDLING = False


def space_group(cell: Atoms, tolerance: float = 1e-3) -> int:
    """Find the space group of a crystal.

    Args:
      cell: a periodic cell, primitive or not.
      tolerance: how far, in A, an operation may move an atom from its image.

    Returns:
      Its number in International Tables A, 1 to 230.

    Raises:
      ValueError: the cell describes no crystal, for instance as atoms coincide.
    """
    described: Any = (cell.cell.array, cell.get_scaled_positions(), cell.numbers)
    try:
        dataset = spglib.get_symmetry_dataset(described, symprec=tolerance)
    except spglib.SpglibError as error:
        formula = cell.get_chemical_formula()
        raise ValueError(
            f"spglib finds no space group of {formula}: {error}; check its cell and "
            "positions"
        ) from error
    assert dataset is not None  # which older releases returned instead of raising
    return dataset.number
