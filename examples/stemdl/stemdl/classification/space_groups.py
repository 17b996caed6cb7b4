"""What is to be told apart: space groups, and which materials nobody trains on."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence

import spglib

from stemdl.physics import crystals, prototypes
from stemdl.physics.symmetry import space_group

OUTPUTS = 231
"""Outputs of the network: an output's index is a space group's number, 1 to 230."""

SPLITS = ("train", "validation", "test", "textbook")
"""Textbook: the crystals of `physics.crystals`, none of which is trained on."""

RULES = ("materials", "prototypes")
"""What is held out: other elements in the same structure types, or whole types."""

TEST, VALIDATION = (2, 7), (5,)
"""Places, of every ten materials of a group, that are held out."""

_LAUE = {
    "-1": "1 -1",
    "2/m": "2 m 2/m",
    "mmm": "222 mm2 mmm",
    "4/m": "4 -4 4/m",
    "4/mmm": "422 4mm -42m 4/mmm",
    "-3": "3 -3",
    "-3m": "32 3m -3m",
    "6/m": "6 -6 6/m",
    "6/mmm": "622 6mm -62m -6m2 6/mmm",
    "m-3": "23 m-3",
    "m-3m": "432 -43m m-3m",
}

_LAST = (2, 15, 74, 142, 167, 194, 230)
_SYSTEMS = (
    *("triclinic", "monoclinic", "orthorhombic", "tetragonal"),
    *("trigonal", "hexagonal", "cubic"),
)


def present() -> tuple[int, ...]:
    """The space groups that there are prototypes of, in ascending order."""
    return tuple(sorted({p.number for p in prototypes.prototypes().values()}))


@functools.cache
def textbook() -> dict[int, tuple[str, ...]]:
    """Names of the crystals of `physics.crystals`, by space group."""
    found: dict[int, tuple[str, ...]] = {}
    for name, cell in crystals.crystals().items():
        number = space_group(cell)
        found[number] = (*found.get(number, ()), name)
    return found


def split(number: int, types: Sequence[str], rule: str) -> list[str]:
    """Divide the materials of one space group.

    Args:
      number: of the group.
      types: structure type of each material, "" for those of `textbook`.
      rule: one of RULES. Where a group has one prototype, there is none to hold out.

    Returns:
      Which of SPLITS each material belongs to.
    """
    names = sorted(set(types) - {""})
    whole = rule == "prototypes"
    held_out = names[number % len(names)] if whole and len(names) > 1 else None
    # A prototype after the other, so that each has some in training and some not.
    order = sorted(range(len(types)), key=lambda place: types[place])
    order = [place for place in order if types[place]]
    found: list[str] = ["textbook"] * len(types)
    for rank, place in enumerate(order):
        if types[place] == held_out or (not whole and rank % 10 in TEST):
            found[place] = "test"
        elif rank % 10 in VALIDATION:
            found[place] = "validation"
        else:
            found[place] = "train"
    return found


@functools.cache
def point_group(number: int) -> str:
    """Symbol of a space group's point group, as International Tables write it."""
    for hall in range(1, 531):
        kind = spglib.get_spacegroup_type(hall)
        if kind is not None and kind.number == number:
            return kind.pointgroup_international
    raise ValueError(f"space group {number}: give 1 to 230")


def laue_class(number: int) -> str:
    """The point group with an inversion added: what diffraction without it shows."""
    group = point_group(number)
    return next(laue for laue, groups in _LAUE.items() if group in groups.split())


def crystal_system(number: int) -> str:
    """The crystal system of a space group."""
    return _SYSTEMS[bisect.bisect_left(_LAST, number)]
