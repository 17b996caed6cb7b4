r"""Simulate the data set into shards, each rank its own.

jaxcomm run -n 2 -m stemdl simulate --samples 1500 --out data/shards

Started again after an interruption, it simulates what is not complete. One job at a
time may write to a directory. Another microscope comes from a file, and other crystals
from CIF files:

python -m stemdl microscope > microscope.toml
jaxcomm run -n 2 -m stemdl simulate --out data/mine \
        --optics microscope.toml --cif a.cif --cif b.cif --held-out-cif c.cif
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import click
import h5py
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

import jaxcomm
from jaxcomm import terminal
from stemdl.config import SAMPLES, load_microscope
from stemdl.data import manifest, shards
from stemdl.data.cache import data_config
from stemdl.data.consensus import together
from stemdl.data.dataset import DataConfig, simulate_sample
from stemdl.data.manifest import Manifest, Shard, ShardError
from stemdl.physics import cif
from stemdl.physics.optics import SettingError

ROUND_SECONDS = 1.0
"""Between two meetings of the ranks: long beside a sample, so that they wait little."""


def produce(
    config: DataConfig,
    directory: Path,
    count: int,
    comm: jaxcomm.Communicator,
    console: Console,
    sample: shards.Sample = simulate_sample,
) -> Manifest:
    """Write what is missing of a data set; all ranks call it together.

    Args:
      config: what to simulate.
      directory: of the shards; seen by all ranks.
      count: number of training shards.
      comm: the ranks, which divide the shards among them.
      console: on which rank 0 shows a progress bar.
      sample: simulates one sample.

    Returns:
      The manifest, which rank 0 has written last.

    Raises:
      ShardError: on every rank: a file there is damaged or of another data set, or one
        could not be written. What is there is left as it is.
    """
    planned = manifest.plan(config, count)
    there = together(comm, lambda: _existing(config, directory, planned))
    if there is not None:
        return there
    finished: list[Shard] = []
    mine = planned[comm.rank :: comm.size]
    work = _work(config, directory, mine, sample, finished)
    columns = (*Progress.get_default_columns()[:1], BarColumn(), MofNCompleteColumn())
    shown = comm.rank == 0
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not shown
    ) as bar:
        task = bar.add_task(f"simulating on {comm.size} ranks", total=config.samples)
        running = True
        try:
            while running:
                result = together(comm, lambda: _round(work))
                results = comm.all_gather_object(result)
                bar.advance(task, sum(done for done, _ in results))
                running = any(more for _, more in results)
        finally:
            work.close()
    gathered = [shard for part in comm.all_gather_object(finished) for shard in part]
    names = [shard.name for shard in planned]
    gathered.sort(key=lambda shard: names.index(shard.name))

    def write() -> None:
        if comm.rank == 0:
            manifest.write(directory, _describe(config, directory, tuple(gathered)))

    together(comm, write)
    return together(comm, lambda: manifest.read(directory))


def _existing(
    config: DataConfig, directory: Path, planned: tuple[Shard, ...]
) -> Manifest | None:
    """The manifest if the data set is complete; None if there is something to do."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / manifest.NAME
    if not path.exists():
        return None
    there = manifest.read(directory)
    manifest.require(path, "config", there.config, json.loads(config.to_json()))
    count = len(there.split("train"))
    wanted = sum(shard.split == "train" for shard in planned)
    manifest.require(path, "number of training shards", count, wanted)
    return there


def _work(
    config: DataConfig,
    directory: Path,
    mine: tuple[Shard, ...],
    sample: shards.Sample,
    finished: list[Shard],
) -> Generator[int, None, None]:
    """Complete this rank's shards; yields numbers of samples."""
    for shard in mine:
        done = shards.finished(directory, shard, config)
        if done is None:
            done = yield from shards.write(directory, shard, config, sample)
        else:
            yield shard.samples
        finished.append(done)


def _round(work: Generator[int, None, None]) -> tuple[int, bool]:
    """Work for a while: samples done, and whether there are more."""
    end, samples = time.monotonic() + ROUND_SECONDS, 0
    for done in work:
        samples += done
        if time.monotonic() > end:
            return samples, True
    return samples, False


def _describe(
    config: DataConfig, directory: Path, complete: tuple[Shard, ...]
) -> Manifest:
    """Sum up the shards; always in their order, whoever has written them."""
    total = squares = np.zeros(())
    patterns = 0
    materials: dict[str, set[str]] = {split: set() for split in manifest.SPLITS}
    for shard in complete:
        with h5py.File(directory / shard.name, "r", locking=False) as file:
            materials[shard.split] |= set(file["material"].asstr()[:])  # type: ignore[union-attr]
            if shard.split == "train":
                total = total + file["total"][:]  # type: ignore[index]
                squares = squares + file["squares"][:]  # type: ignore[index]
                shape = file["amplitudes"].shape  # type: ignore[union-attr]
                patterns += int(np.prod(shape[:3]))
    if both := materials["train"] & materials["test"]:
        raise ShardError(f"{directory}: {sorted(both)} are in training and held out")
    mean, std = manifest.statistics(total, squares, patterns)
    parsed = json.loads(config.to_json())
    return Manifest(config=parsed, shards=complete, mean=mean, std=std)


def configured(
    comm: jaxcomm.Communicator,
    samples: int,
    optics: Path | None = None,
    cifs: Sequence[Path] = (),
    held_out_cifs: Sequence[Path] = (),
    built_in: bool = True,
) -> DataConfig:
    """Read microscope and crystals; all ranks call it together.

    Rank 0 alone reads the files, so that all have the same, and none else needs them.

    Raises:
      ShardError: on every rank: a file is bad, or the settings contradict each other.
    """

    def read() -> DataConfig | None:
        if comm.rank:
            return None
        try:
            return data_config(
                samples,
                **load_microscope(optics),
                cifs=tuple(map(cif.read, cifs)),
                held_out_cifs=tuple(map(cif.read, held_out_cifs)),
                built_in=built_in,
            )
        except SettingError as error:
            raise ShardError(str(error)) from error

    return comm.all_gather_object(together(comm, read))[0]


@click.command(context_settings=terminal.HELP)
@click.option("--samples", default=SAMPLES, show_default=True, help="training samples")
@click.option(
    "--shards",
    "count",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="files of training samples; --batch must be a multiple of it, and so should "
    "the number of ranks or the other way around",
)
@click.option(
    "--optics",
    type=click.Path(path_type=Path),
    help="a TOML file: energy, aberrations, grids, mistilt, frozen phonons, ...; "
    "python -m stemdl microscope prints one with all fields",
)
@click.option(
    "--cif",
    "cifs",
    multiple=True,
    type=click.Path(path_type=Path),
    help="a crystal to train on; may be repeated",
)
@click.option(
    "--held-out-cif",
    "held_out_cifs",
    multiple=True,
    type=click.Path(path_type=Path),
    help="a crystal never trained on; may be repeated",
)
@click.option(
    "--built-in/--no-built-in",
    default=True,
    show_default=True,
    help="simulate the materials of physics/crystals.py too",
)
@click.option(
    "--out", type=click.Path(path_type=Path), default="data/shards", show_default=True
)
def main(samples: int, count: int, out: Path, **physics: Any) -> None:
    """Simulate the data set into shards.

    It goes on where it was interrupted.
    """
    comm, console = jaxcomm.world(), terminal.console(stderr=True)
    began = time.monotonic()
    try:
        config = configured(comm, samples, **physics)
        done = produce(config, out, count, comm, console)
    except ShardError as error:
        raise click.UsageError(str(error)) from error
    if comm.rank == 0:
        size = sum(shard.bytes for shard in done.shards) / 1e6
        number = f"{done.config['train']} + {done.config['test']} samples"
        seconds = time.monotonic() - began
        console.print(
            f"{out}: {number} in {len(done.shards)} shards, {size:.0f} MB, "
            f"{seconds:.1f} s"
        )
