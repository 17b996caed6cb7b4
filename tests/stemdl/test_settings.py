"""What STEMDL's simulator can be told: a microscope's file, CIF files, and refusals."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.build import bulk
from ase.io import write

from stemdl.config import load_microscope, microscope_toml
from stemdl.data import dataset, manifest
from stemdl.data.dataset import DataConfig
from stemdl.physics import cif, crystals, potential
from stemdl.physics.crystals import Preparation, Specimen
from stemdl.physics.optics import Optics, SettingError
from tests.jobs import Launch

SALT = """data_salt
_cell_length_a 5.64
_cell_length_b 5.64
_cell_length_c 5.64
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_symmetry_space_group_name_H-M 'F m -3 m'
_symmetry_Int_Tables_number 225
_symmetry_cell_setting cubic
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
Na1 Na 0 0 0 1.0
Cl1 Cl 0.5 0.5 0.5 1.0
"""


def salt(path: Path, *changes: tuple[str, str]) -> Path:
    text = SALT
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"aperture_mrad": 60.0}, "aperture_mrad=60.* the band limit, 49.4 mrad"),
        ({"detector": 45}, "detector=45 pixels reach to 50.9 mrad, the band limit"),
        ({"detector": 24}, "detector=24: give an odd number"),
        ({"window": 20.0}, "window=20.* larger than optics.box=16"),
        ({"label_pixels": 30}, "label_pixels=30 .* must be box / pixels"),
        ({"label_pixels": 31}, "label_pixels=31: give an even number"),
        ({"box": 16.25, "pixels": 65}, "optics.pixels=65: give an even number"),
        ({"c3": 1e7}, "c3=10000000.* radius of 80.0 A.* the box has 4 A"),
        ({"energy_ev": 0.0}, "energy_ev=0.0: give a positive number"),
        ({"c1": float("nan")}, "c1=nan: give a finite number"),
    ],
)
def test_optics_that_cannot_be_are_refused(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        Optics(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"phonons": 0}, "phonons=0: give 1 to inf"),
        ({"mistilt_mrad": -1.0}, "mistilt_mrad=-1.0: give 0 to 200"),
        ({"min_thickness": 50.0}, "min_thickness=50.0: give 0.001 to 40"),
        ({"max_thickness": 41.0}, "max_thickness=41.*max_slices=20 of .*: raise"),
    ],
)
def test_specimens_that_cannot_be_are_refused(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        DataConfig(preparation=Preparation(**fields))


def test_a_probe_that_spreads_out_of_the_box_is_refused() -> None:
    optics = Optics(max_slices=150)
    assert DataConfig(optics=optics, preparation=Preparation(max_thickness=190))
    with pytest.raises(SettingError, match=r"radius of 4.4 A at a depth of 220 A"):
        DataConfig(optics=optics, preparation=Preparation(max_thickness=220))


def test_a_specimen_thicker_than_the_slices_is_refused() -> None:
    atom = Specimen(np.array(["Si"]), np.zeros((1, 3)), 40.5)
    with pytest.raises(SettingError, match=r"40.5 A is thicker .*max_slices=20"):
        potential.fourier_coefficients(atom, Optics())
    unknown = dataclasses.replace(atom, symbols=np.array(["Es"]), thickness=2.0)
    with pytest.raises(SettingError, match="no form factor of 'Es'"):
        potential.fourier_coefficients(unknown, Optics())


def test_the_printed_file_holds_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "microscope.toml"
    path.write_text(microscope_toml())
    assert load_microscope(path) == load_microscope(None)
    assert DataConfig(**load_microscope(path)) == DataConfig()
    path.write_text("[optics]\nc1 = -50\n[preparation]\nphonons = 8\n")
    given = load_microscope(path)
    assert given["optics"] == Optics(c1=-50.0)
    assert given["preparation"] == Preparation(phonons=8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optics]\ndefocus = 3", r"optics.defocus is unknown; .*has energy_ev, "),
        ("[optics]\nprobes = 4.5", r"optics.probes=4.5 is of type float; .*int"),
        ("[lens]", r"there is no section lens; use optics, preparation"),
        ("[lens]\nc1 = 3", r"lens.c1 is in no section .*use optics, preparation"),
        ("c1 = 3", r"c1 is outside a section"),
        ("[optics", "is no readable TOML file"),
        ("[optics]\nc3 = 1e9", r"microscope.toml: optics.c1=0.0, c3=1000000000"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "microscope.toml"
    path.write_text(text)
    with pytest.raises(SettingError, match=message) as caught:
        load_microscope(path)
    assert str(path) in str(caught.value)


def test_a_cif_of_a_crystal_there_is_gives_its_samples(tmp_path: Path) -> None:
    crystal = cif.read(salt(tmp_path / "salt.cif"))
    assert crystal.name == "salt" and len(crystal.sha256) == 64
    given = DataConfig(
        train=1,
        test=1,
        cifs=(crystal,),
        held_out_cifs=(other(tmp_path),),
        built_in=False,
    )
    specimen = dataset.specimen_of(given, 0)
    rng = np.random.default_rng([0, 0])
    wanted = crystals.cut(crystal.atoms(), rng, given.optics.box)
    np.testing.assert_array_equal(specimen.positions, wanted.positions)
    # The same crystal as ASE builds it, its atoms in whatever order.
    built = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    ours = crystal.atoms()
    for symbol in ("Na", "Cl"):
        a, b = (
            sorted(np.round(c.get_scaled_positions()[c.symbols == symbol], 6).tolist())
            for c in (ours, built)
        )
        assert a == b
    np.testing.assert_allclose(ours.cell.array, built.cell.array)


def other(directory: Path, name: str = "other") -> cif.Crystal:
    path = directory / f"{name}.cif"
    write(path, bulk("RbF", "rocksalt", a=5.64, cubic=True), format="cif")
    return cif.read(path)


def test_the_files_content_identifies_the_data_set(tmp_path: Path) -> None:
    crystal = cif.read(salt(tmp_path / "salt.cif"))
    remarked = cif.read(salt(tmp_path / "salt.cif", ("data_salt", "# !\ndata_salt")))
    moved = cif.read(salt(tmp_path / "salt.cif", ("5.64", "5.65")))
    configs = [DataConfig(cifs=c) for c in ((), (crystal,), (remarked,), (moved,))]
    configs.append(DataConfig(held_out_cifs=(other(tmp_path),)))
    assert len({config.path(tmp_path) for config in configs}) == 5
    for config in configs:
        assert DataConfig.from_json(json.loads(config.to_json())) == config


CL = "Cl1 Cl 0.5 0.5 0.5 1.0\n"
NO_CELL = tuple((f"_cell_length_{axis} 5.64\n", "") for axis in "abc") + tuple(
    (f"_cell_angle_{angle} 90\n", "") for angle in ("alpha", "beta", "gamma")
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([(CL, CL[:-4] + "0.5\n")], r"partly occupied site \(Cl 0.5\)"),
        ([(CL, CL + "K1 K 0 0 0 0.5\n")], r"partly occupied site \(.*K 0.5"),
        ([("Na1 Na", "Qq1 Qq")], "no readable CIF file .*Qq"),
        ([("Na1 Na", "Es1 Es")], "no form factor of 'Es'"),
        ([(SALT, "some text")], "no readable CIF file"),
        ([(SALT, "")], "holds 0 structures"),
        ([(SALT, SALT + SALT.replace("salt", "two"))], "holds 2 structures"),
        ([(CL, "Cl1 Cl 0.5 0.5 0.46 1.0\n")], "atoms 0.32 A apart"),
        (NO_CELL, "no unit cell|no readable CIF"),
    ],
)
def test_a_bad_cif_is_named(
    tmp_path: Path, changes: list[tuple[str, str]], message: str
) -> None:
    path = salt(tmp_path / "bad.cif", *changes)
    with pytest.raises(SettingError, match=message) as caught:
        cif.read(path)
    assert str(path) in str(caught.value)


def test_a_missing_cif_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=re.escape(str(tmp_path / "no.cif"))):
        cif.read(tmp_path / "no.cif")


def test_crystals_that_contradict_are_refused(tmp_path: Path) -> None:
    crystal, foreign = cif.read(salt(tmp_path / "salt.cif")), other(tmp_path)
    # NaCl is trained on, under its own name.
    with pytest.raises(SettingError, match="salt is held out, and NaCl"):
        DataConfig(held_out_cifs=(crystal,))
    magnesia = salt(tmp_path / "a.cif", ("5.64", "4.22"), ("Na", "Mg"), ("Cl", "O"))
    with pytest.raises(SettingError, match="MgO is held out, and a, "):
        DataConfig(cifs=(cif.read(magnesia),))
    # Of another volume, as density functionals have it, it is the same material.
    relaxed = salt(tmp_path / "b.cif", ("5.64", "4.40"), ("Na", "Mg"), ("Cl", "O"))
    with pytest.raises(SettingError, match="MgO is held out, and b, "):
        DataConfig(cifs=(cif.read(relaxed),))
    with pytest.raises(SettingError, match="two crystals are named 'other'"):
        DataConfig(cifs=(foreign,), held_out_cifs=(foreign,))
    large = dataclasses.replace(foreign, name="large", cell=((17.0, 0, 0),) * 3)
    with pytest.raises(SettingError, match=r"large: the cell's edge of 17.0 A exceeds"):
        DataConfig(cifs=(large,))
    with pytest.raises(SettingError, match="no crystal to hold out: give a CIF"):
        DataConfig(cifs=(crystal,), built_in=False).materials(True)


@pytest.mark.thorough
def test_two_ranks_simulate_what_one_rank_reads(job: Launch, tmp_path: Path) -> None:
    salt(tmp_path / "salt.cif")
    other(tmp_path)
    (tmp_path / "microscope.toml").write_text(
        "[optics]\nenergy_ev = 200e3\nprobes = 2\nc1 = -30\n"
        "[preparation]\nphonons = 2\nmistilt_mrad = 5\n"
    )
    done = job(2, ON_TWO_RANKS, str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    found = manifest.read(tmp_path / "shards")
    config = DataConfig.from_json(found.config)
    assert config.materials(False) == ("salt",)
    assert config.materials(True) == ("other",)
    assert config.optics == Optics(energy_ev=200e3, probes=2, c1=-30.0)
    assert config.preparation == Preparation(phonons=2, mistilt_mrad=5.0)
    assert config.train == 4


ON_TWO_RANKS = r"""
import sys
from pathlib import Path

import click, pytest
import jaxcomm
from stemdl.data import simulation

main, comm = Path(sys.argv[1]), jaxcomm.world()
line = f"--samples 4 --shards 2 --out {main}/shards --no-built-in"
line += f" --optics {main}/microscope.toml --cif {main}/salt.cif"


def run(line):
    simulation.main.main(line.split(), standalone_mode=False)


# Every rank is told of what rank 0 alone has read.
with pytest.raises(click.UsageError, match="rank 0: .*no crystal to hold out"):
    run(line)
with pytest.raises(click.UsageError, match="rank 0: .*no.cif is no readable"):
    run(line + f" --cif {main}/no.cif")
run(line + f" --held-out-cif {main}/other.cif")
"""
