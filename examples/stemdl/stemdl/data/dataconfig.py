"""What the samples of a data set depend on, and the data set's identity with it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ase import Atoms

from stemdl.physics import crystals
from stemdl.physics.cif import Crystal, require_fit, same_material
from stemdl.physics.crystals import Preparation
from stemdl.physics.optics import Optics, SettingError

VERSION = 3
"""Raise it whenever the simulation changes: old caches then have other names."""


SAMPLES = 1500
"""Training samples where no other number is asked for."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Everything the samples depend on.

    Attributes:
      train: number of training samples, spread evenly over the training materials.
      test: number of samples of the held-out materials.
      seed: of all random draws.
      optics: the microscope.
      preparation: how specimens are cut.
      cifs: crystals to train on, besides those built in.
      held_out_cifs: crystals to hold out, besides those built in.
      built_in: whether `physics.crystals` has a part in it.

    Raises:
      SettingError: fields contradict each other, or a crystal does not fit.
    """

    train: int = SAMPLES
    test: int = 200
    seed: int = 0
    optics: Optics = dataclasses.field(default_factory=Optics)
    preparation: Preparation = dataclasses.field(default_factory=Preparation)
    cifs: tuple[Crystal, ...] = ()
    held_out_cifs: tuple[Crystal, ...] = ()
    built_in: bool = True

    def __post_init__(self) -> None:
        optics, thickest = self.optics, self.preparation.max_thickness
        if thickest > optics.max_slices * optics.slice_thickness:
            raise SettingError(
                f"preparation.max_thickness={thickest} A is more than "
                f"optics.max_slices={optics.max_slices} of optics.slice_thickness="
                f"{optics.slice_thickness} A hold: raise max_slices"
            )
        optics.require_room(thickest)
        for crystal in (*self.cifs, *self.held_out_cifs):
            require_fit(crystal, optics.box)
        given = [crystal.name for crystal in (*self.cifs, *self.held_out_cifs)]
        names = [*(crystals.crystals() if self.built_in else ()), *given]
        for name in given:
            if names.count(name) > 1:
                raise SettingError(
                    f"two crystals are named {name!r}: rename the CIF file"
                )
        if given:
            self._require_disjoint()

    def _require_disjoint(self) -> None:
        """Other names do not make the held-out crystals others."""
        training = {name: self.crystal(name) for name in self.materials(False)}
        for name in self.materials(True):
            for other, atoms in training.items():
                if same_material(atoms, self.crystal(name)):
                    raise SettingError(
                        f"crystal {name} is held out, and {other}, which is to be "
                        "trained on, has its formula, and its volume or space group: "
                        "leave one out"
                    )

    @property
    def samples(self) -> int:
        """Training and held-out samples together."""
        return self.train + self.test

    def to_json(self) -> str:
        """Canonical text of the configuration and the simulation's version."""
        content = {"version": VERSION, **dataclasses.asdict(self)}
        return json.dumps(content, sort_keys=True)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> DataConfig:
        """The configuration whose `to_json`, parsed, a manifest holds."""
        fields = {key: content[key] for key in ("train", "test", "seed", "built_in")}
        return cls(
            **fields,
            optics=Optics(**content["optics"]),
            preparation=Preparation(**content["preparation"]),
            cifs=tuple(map(Crystal.from_json, content["cifs"])),
            held_out_cifs=tuple(map(Crystal.from_json, content["held_out_cifs"])),
        )

    def path(self, directory: Path) -> Path:
        """The cache file of this configuration."""
        key = hashlib.sha256(self.to_json().encode()).hexdigest()[:12]
        return directory / f"stemdl-{self.samples}-{key}.npz"

    def materials(self, held_out: bool) -> tuple[str, ...]:
        """Names of the training materials, or of those held out.

        Raises:
          SettingError: there are none.
        """
        files = self.held_out_cifs if held_out else self.cifs
        built_in = crystals.materials(held_out) if self.built_in else ()
        names = (*built_in, *(crystal.name for crystal in files))
        if not names:
            use = "hold out" if held_out else "train on"
            raise SettingError(f"no crystal to {use}: give a CIF file of one")
        return names

    def crystal(self, name: str) -> Atoms:
        """The unit cell of a material."""
        for crystal in (*self.cifs, *self.held_out_cifs):
            if crystal.name == name:
                return crystal.atoms()
        return crystals.crystals()[name]

    def material(self, index: int) -> str:
        """Material of sample `index`; held-out samples follow the training samples."""
        held_out = index >= self.train
        names = self.materials(held_out)
        return names[(index - self.train if held_out else index) % len(names)]
