"""Simulate the data set, unless it is cached.

python -m stemdl cache --samples 1500 --processes 2
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from jaxcomm import terminal
from stemdl.config import SAMPLES
from stemdl.data import dataset

TEST_FRACTION = 2 / 15

data_option = click.option(
    "--data",
    "data_dir",
    type=click.Path(path_type=Path),
    default="data/stemdl",
    show_default=True,
    help="where simulated data are cached",
)


def data_config(samples: int, **physics: Any) -> dataset.DataConfig:
    """The data set of so many training samples, and held-out ones in proportion.

    Args:
      samples: to train on.
      physics: other fields of `DataConfig`.

    Raises:
      SettingError: the fields contradict each other.
    """
    config = dataset.DataConfig(train=samples, **physics)
    held_out = max(len(config.materials(True)), round(samples * TEST_FRACTION))
    return dataclasses.replace(config, test=held_out)


def simulate(
    config: dataset.DataConfig, directory: Path, processes: int, console: Console
) -> None:
    """Simulate what is not cached, with a progress bar."""
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"simulating {config.samples} samples", total=1.0)
        for done in dataset.ensure(config, directory, processes):
            progress.update(task, completed=done)


@click.command(context_settings=terminal.HELP)
@click.option("--samples", default=SAMPLES, show_default=True, help="training samples")
@data_option
@click.option("--processes", default=os.cpu_count() or 1, show_default=True)
def main(samples: int, data_dir: Path, processes: int) -> None:
    """Simulate the data set, unless it is cached."""
    console = terminal.console(stderr=True)
    config = data_config(samples)
    simulate(config, data_dir, processes, console)
    console.print(f"{config.path(data_dir)}: {config.samples} samples")
