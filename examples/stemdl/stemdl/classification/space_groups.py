"""What is to be told apart: space groups, and which materials nobody trains on."""

from __future__ import annotations

import functools

from stemdl.physics import crystals
from stemdl.physics.symmetry import space_group

OUTPUTS = 231
"""Outputs of the network: an output's index is a space group's number, 1 to 230."""

HELD_OUT = frozenset(
    (*crystals.HELD_OUT, "Ag", "NaCl", "Fe", "InP", "NiAl", "Zr", "GaN", "SnO2")
)
"""Materials of the test: those of the reconstruction and, so that each space group has
some, others; about a quarter of every group."""


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
