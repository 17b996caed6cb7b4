"""The microscope and the specimens' preparation from a TOML file.

    [optics]
    energy_ev = 200e3
    c1 = -50

    [preparation]
    phonons = 8

`python -m stemdl microscope` prints a file of all fields with their defaults;
`physics.optics.Optics` and `physics.crystals.Preparation` say what they mean.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

import click

from stemdl.physics.crystals import Preparation
from stemdl.physics.optics import Optics, SettingError

SECTIONS = {"optics": Optics, "preparation": Preparation}


def load(path: Path | None) -> dict[str, Any]:
    """Read the fields "optics" and "preparation" of a `DataConfig`.

    Args:
      path: a TOML file; what it leaves out keeps its default. None: defaults alone.

    Raises:
      SettingError: the file cannot be read, or a section, a key or a value is none
        that there is; names file and key.
    """
    try:
        tree = {} if path is None else tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingError(f"{path} is no readable TOML file: {error}") from error
    for section, keys in tree.items():
        if section not in SECTIONS or not isinstance(keys, dict):
            raise SettingError(
                f"{path}: [{section}] is no section; use {', '.join(SECTIONS)}"
            )
    try:
        return {name: _section(name, tree.get(name, {})) for name in SECTIONS}
    except SettingError as error:
        raise SettingError(f"{path}: {error}") from error


def _section(name: str, given: dict[str, Any]) -> Any:
    kinds = {field.name: type(field.default) for field in _fields(name)}
    values = {}
    for key, value in given.items():
        if key not in kinds:
            raise SettingError(f"{name}.{key} is unknown; use {', '.join(kinds)}")
        kind = kinds[key]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise SettingError(f"{name}.{key}={value!r}: give a {kind.__name__}")
        values[key] = value
    return SECTIONS[name](**values)


def _fields(section: str) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(SECTIONS[section])


def to_toml() -> str:
    """The file of all fields with their defaults."""
    lines = [
        "# Lengths in angstrom (1 mm is 1e7), energy in eV; angles as named.",
        "# phonons = 8 averages over frozen phonons; c1 < 0 is underfocus.",
    ]
    for section in SECTIONS:
        lines += ["", f"[{section}]"]
        lines += [f"{f.name} = {json.dumps(f.default)}" for f in _fields(section)]
    return "\n".join(lines) + "\n"


@click.command()
def main() -> None:
    """Print a TOML file of the microscope and the preparation, with their defaults."""
    click.echo(to_toml(), nl=False)
