"""Crystals generated from structure types: symmetry, distances, no two alike."""

from __future__ import annotations

import numpy as np
import pytest
from ase.spacegroup import crystal

from stemdl.physics import crystals, prototypes
from stemdl.physics.symmetry import space_group

PROTOTYPES = prototypes.prototypes()
GROUPS = sorted({prototype.number for prototype in PROTOTYPES.values()})


def test_there_are_enough_groups_and_types() -> None:
    assert len(GROUPS) >= 80 and len(PROTOTYPES) >= 190
    # Of two enantiomorphic groups one is there.
    pairs = [(76, 78), (91, 95), (92, 96), (144, 145), (151, 153), (152, 154),
             (169, 170), (171, 172), (178, 179), (180, 181), (212, 213)]  # fmt: skip
    assert not any(set(pair) <= set(GROUPS) for pair in pairs)


@pytest.mark.parametrize("number", GROUPS)
def test_spglib_finds_the_group_of_each_type(number: int) -> None:
    for prototype in PROTOTYPES.values():
        if prototype.number == number:
            atoms = prototype.atoms()
            assert prototypes.confirmed(atoms, number), prototype.name
            # Least in alpha-U, whose covalent radius is that of compounds.
            assert 0.7 < prototypes.contact(atoms) < 1.3, prototype.name


@pytest.mark.parametrize(
    ("name", "setting"), [("spinel", 2), ("quartz", 1), ("calcite", 1), ("olivine", 1)]
)
def test_orbits_are_those_of_ase(name: str, setting: int) -> None:
    mine = PROTOTYPES[name]
    assert mine.setting == setting
    theirs = crystal(
        list(mine.symbols),
        list(mine.sites),
        spacegroup=mine.number,
        setting=setting,
        cellpar=list(mine.lattice),
    )
    atoms = mine.atoms()
    assert atoms.symbols.formula.count() == theirs.symbols.formula.count()
    for symbol, place in zip(atoms.symbols, atoms.get_scaled_positions(), strict=True):
        apart = theirs.get_scaled_positions() - place
        near = np.abs(apart - np.round(apart)).max(-1) < 1e-6
        assert [str(s) for s in np.array(theirs.symbols)[near]] == [symbol]


@pytest.mark.parametrize("number", [15, 62, 141, 160, 194, 225])
def test_materials_differ_and_keep_their_group(number: int) -> None:
    made = prototypes.group_materials(number, 12)
    assert len({material.name for material in made}) == 12
    assert len({(m.prototype, frozenset(m.species)) for m in made}) == 12
    built_in = {
        frozenset(cell.get_chemical_symbols())
        for cell in crystals.crystals().values()
        if space_group(cell) == number
    }
    types = [name for name, p in PROTOTYPES.items() if p.number == number]
    assert {material.prototype for material in made} == set(types)
    for material in made:
        assert material.number == space_group(material.atoms) == number
        assert len(set(material.species)) == len(material.species)
        assert frozenset(material.species) not in built_in
        reference = prototypes.contact(PROTOTYPES[material.prototype].atoms())
        closest = prototypes.contact(material.atoms)
        assert abs(closest / reference - 1) < 0.1
        edges = material.atoms.cell.lengths()
        assert prototypes.EDGES[0] <= edges.min() <= edges.max() <= prototypes.EDGES[1]


def test_what_symmetry_leaves_free_varies_and_nothing_else() -> None:
    rutile, draw = PROTOTYPES["rutile"], np.random.default_rng(0)
    atoms = [rutile.atoms(rng=draw) for _ in range(2)]
    ratios = [cell[0] / cell[2] for cell in (a.cell.lengths() for a in atoms)]
    assert abs(ratios[0] - ratios[1]) > 1e-4
    for one in atoms:
        a, b, _ = one.cell.lengths()
        assert a == pytest.approx(b)
        np.testing.assert_allclose(one.cell.angles(), 90, atol=1e-6)
        x, y, z = one.get_scaled_positions()[one.symbols == "O"][0]
        assert (x, z) == pytest.approx((y, 0), abs=1e-9) and x != pytest.approx(0.305)


def test_materials_are_the_same_again() -> None:
    once = prototypes.group_materials(136, 10, 0)
    prototypes.group_materials.cache_clear()
    again = prototypes.group_materials(136, 12, 0)
    for one, other in zip(once, again[:10], strict=True):
        assert one.name == other.name
        np.testing.assert_array_equal(one.atoms.positions, other.atoms.positions)
    assert [m.name for m in prototypes.group_materials(136, 10, 1)] != [
        m.name for m in once
    ]


@pytest.mark.thorough
def test_there_are_more_than_a_thousand_materials() -> None:
    made = [prototypes.group_materials(number, 20) for number in GROUPS]
    assert all(len(materials) == 20 for materials in made)
    assert len({m.name for materials in made for m in materials}) > 1000
