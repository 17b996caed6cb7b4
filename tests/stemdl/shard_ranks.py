"""What test_data.py asks of two ranks. Arguments: a folder."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import jaxcomm
from stemdl.data import loading, manifest, simulation
from stemdl.data.dataset import DataConfig
from stemdl.training import train
from stemdl.training.backends import Ranks
from tests.stemdl.small_shards import BATCH, CONFIG, SEED, random_sample

main, backend, comm = Path(sys.argv[1]), Ranks(), jaxcomm.world()
directory, stage = main / "shards", main / "stage"
quiet = Console(quiet=True)


def refused(call: Callable[[], Any], *words: str) -> None:
    try:
        call()
    except manifest.ShardError as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError(f"rank {comm.rank} was not told of {words}")
    assert len(set(comm.all_gather_object(words))) == 1


def fails(config: DataConfig, index: int) -> tuple[np.ndarray, np.ndarray]:
    if index == 5:
        raise OSError("no space left")
    return random_sample(config, index)


def start(sample: Any) -> manifest.Manifest:
    return simulation.produce(CONFIG, directory, 2, comm, quiet, sample)


refused(lambda: start(fails), "rank 1: OSError: no space left")
assert not (directory / "train-00001.h5").exists()
found = start(random_sample)


def source(**options: Any) -> loading.Source:
    given = {"stage": stage, "backend": backend, "batch": BATCH, "seed": SEED}
    return loading.open_source(directory, **(given | options))


opened = source()
comm.barrier()
assert not list(stage.iterdir())
batches, digests = opened.batches(0), []
for _ in range(3):
    parts = comm.all_gather_object(next(batches))
    x, y = map(np.concatenate, zip(*parts, strict=True))
    digests.append(hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest())
batches.close()
opened.close()
if comm.rank == 0:
    print("found", json.dumps([found.sha256, digests]), flush=True)

# What is wrong with the files of one rank, both say.
bad = directory / "train-00001.h5"
good = bad.read_bytes()
comm.barrier()
if comm.rank == 0:
    bad.write_bytes(good[:5000])
comm.barrier()
for options in ({}, {"stage": None}):
    refused(functools.partial(source, **options), str(bad), "bytes is 5000")
assert not list(stage.iterdir())
comm.barrier()
if comm.rank == 0:
    bad.write_bytes(good)
    # Only one rank of a node asks.
    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: types.SimpleNamespace(free=7)
comm.barrier()
refused(source, str(stage), "7 are free")
if comm.rank == 0:
    shutil.disk_usage = usage


def run(out: str) -> None:
    line = f"--shards {directory} --stage {stage} --network toy --batch 4 --steps 8"
    line += f" --compare-steps 4 --checkpoint-every 5 --out {main / out}"
    train.main.main(line.split(), standalone_mode=False)
    comm.barrier()


run("whole")
# As it lies there when the job is killed between steps 5 and 8.
if comm.rank == 0:
    shutil.copytree(main / "whole/checkpoints", main / "broken/checkpoints")
comm.barrier()
run("broken")
