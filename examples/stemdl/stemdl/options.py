"""Command-line options that make up a configuration."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from stemdl import config
from stemdl.data.dataconfig import SAMPLES
from stemdl.model.network import NETWORKS
from stemdl.settings import Config

DEFAULTS = Config().flat()


def _option(flag: str, key: str, **more: Any) -> Any:
    """An option that stands for a key; left out, it leaves the key to the file."""
    default = DEFAULTS[key]
    if not isinstance(default, bool):
        text = f"{more.pop('help', '')}  [default: {default}]".strip()
        more = {"type": type(default), "help": text, **more}
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
    _option("--network", "network.name", type=click.Choice(list(NETWORKS))),
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
        is_flag=True,
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
            resolved = config.load(config_path, assignments, given)
        except config.ConfigError as error:
            raise click.UsageError(str(error)) from error
        return command(resolved=resolved, **options)

    for option in reversed(_OPTIONS):
        resolve = option(resolve)
    return resolve
