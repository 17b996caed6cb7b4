"""STEMDL's sharded data: written, staged, loaded and refused. Random samples do."""

from __future__ import annotations

import hashlib
import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import Launch
from rich.console import Console

import augment
import dataset
import jaxcomm
import loading
import manifest
import simulate_shards
from jaxcomm.data import Batches
from manifest import ShardError
from parallel import Devices
from shard_order import ShardOrder
from simulate_cache import data_config
from telemetry import Timed

CONFIG = data_config(8)
BATCH, SEED = 4, 3


def random_sample(
    config: dataset.DataConfig, index: int
) -> tuple[np.ndarray, np.ndarray]:
    rng, optics = np.random.default_rng([config.seed, index]), config.optics
    shape = (optics.probes, optics.probes, optics.detector, optics.detector)
    label = rng.normal(size=(optics.label_pixels, optics.label_pixels))
    return rng.random(shape, np.float32), label.astype(np.float32)


def produce(directory: Path, count: int = 2) -> manifest.Manifest:
    console = Console(quiet=True)
    return simulate_shards.produce(
        CONFIG, directory, count, jaxcomm.world(), console, random_sample
    )


def open_source(directory: Path, **options: object) -> loading.Source:
    backend = Devices()
    arguments = {"stage": None, "backend": backend, "batch": BATCH, "seed": SEED}
    return loading.open_source(directory, **{**arguments, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards")
    produce(directory)
    return directory


def test_shards_hold_what_the_cache_holds(whole: Path, tmp_path: Path) -> None:
    samples = [random_sample(CONFIG, index) for index in range(CONFIG.samples)]
    amplitudes, labels = map(np.stack, zip(*samples, strict=True))
    names = np.array([CONFIG.material(index) for index in range(CONFIG.samples)])
    arrays = {"amplitudes": amplitudes, "labels": labels, "material": names}
    dataset.save(CONFIG, arrays, tmp_path)
    ours, theirs = loading.load(whole), dataset.load(CONFIG, tmp_path)
    for name in ("train_y", "test_y", "train_names", "test_names"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    for name in ("train_x", "test_x", "mean", "std"):
        np.testing.assert_allclose(
            getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-5
        )
    assert ours.optics == theirs.optics
    for shard in manifest.read(whole).shards:
        digest, name = (whole / f"{shard.name}.sha256").read_text().split()
        found = hashlib.sha256((whole / name).read_bytes()).hexdigest()
        assert found == digest == shard.sha256
        assert (whole / name).stat().st_size == shard.bytes


def test_every_epoch_deals_every_sample_once() -> None:
    order = ShardOrder(shards=3, each=8, batch=6, seed=5)
    slots = np.arange(6)
    epochs = [
        np.concatenate([order.at(4 * epoch + step, slots) for step in range(4)])
        for epoch in range(2)
    ]
    for rows in epochs:
        assert sorted(rows) == list(range(24))
    assert list(epochs[0]) != list(epochs[1])
    assert order.epoch(3) == 0 and order.epoch(4) == 1
    step = order.at(2, slots)
    assert list(step // 8) == [0, 0, 1, 1, 2, 2]
    # However the rows are divided, two to a rank or three.
    for parts in (2, 3):
        dealt = [order.at(2, part) for part in np.split(slots, parts)]
        np.testing.assert_array_equal(np.concatenate(dealt), step)


def test_one_shard_has_the_order_of_batches() -> None:
    order = ShardOrder(shards=1, each=10, batch=4, seed=7)
    batches = Batches(10, 4, 7, rank=0, size=1)
    for step in range(7):
        rows = order.at(step, np.arange(4))
        np.testing.assert_array_equal(rows, batches.at(step).indices)


def test_batches_go_on_at_any_step(whole: Path) -> None:
    source = open_source(whole)
    data = loading.load(whole)
    straight = source.batches(0)
    for step in range(5):
        x, y = next(straight)
        rows = source.rows(step)
        turns = augment.draw(SEED, source.order.epoch(step), CONFIG.train)[rows]
        wanted = augment.augment(data.train_x[rows], data.train_y[rows], turns)
        # One device: its axis is the first.
        np.testing.assert_array_equal(x[0], wanted[0])
        np.testing.assert_array_equal(y[0], wanted[1])
    later = Timed(source.batches(3))
    next(later)
    np.testing.assert_array_equal(next(later)[0], x)
    assert len(later.seconds) == 2 and min(later.seconds) > 0
    straight.close()
    source.close()


def test_an_interrupted_simulation_goes_on(tmp_path: Path) -> None:
    simulated: list[int] = []

    def fails(config: dataset.DataConfig, index: int) -> tuple[np.ndarray, np.ndarray]:
        simulated.append(index)
        if len(simulated) == 7:
            raise OSError("no space left")
        return random_sample(config, index)

    def start() -> manifest.Manifest:
        console, comm = Console(quiet=True), jaxcomm.world()
        return simulate_shards.produce(CONFIG, tmp_path, 2, comm, console, fails)

    with pytest.raises(ShardError, match="rank 0: OSError: no space left"):
        start()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "train-00000.h5",
        "train-00000.h5.sha256",
    ]
    with pytest.raises(ShardError, match=r"manifest\.json does not exist"):
        manifest.read(tmp_path)
    before = (tmp_path / "train-00000.h5").stat()
    # As a killed process leaves it.
    (tmp_path / ".train-00001.h5.writing").write_bytes(b"half")
    found = start()
    after = (tmp_path / "train-00000.h5").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert simulated == [*range(7), *range(4, CONFIG.samples)]
    assert not list(tmp_path.glob(".*"))
    done = len(simulated)
    assert start().sha256 == found.sha256 and len(simulated) == done


def test_staging_leaves_nothing_and_wants_room(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = tmp_path / "stage"
    # As a process killed while it copied leaves it.
    (stage / "jaxcomm-staged-old").mkdir(parents=True)
    (stage / "else").touch()
    source, plain = open_source(whole, stage=stage), open_source(whole)
    assert [path.name for path in stage.iterdir()] == ["else"]
    np.testing.assert_array_equal(source.read(1)[0], plain.read(1)[0])
    source.close()
    plain.close()
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    size = sum(shard.bytes for shard in manifest.read(whole).split("train"))
    message = f"{stage}: staging needs {size} bytes, and 1000 are free"
    with pytest.raises(ShardError, match=message):
        open_source(whole, stage=stage)
    assert [path.name for path in stage.iterdir()] == ["else"]


ON_TWO_RANKS = r"""
import hashlib, json, shutil, sys, types
from pathlib import Path

sys.path += ["examples/stemdl", "tests"]
import numpy as np
from rich.console import Console

import jaxcomm, loading, manifest, simulate_shards, train
from parallel import Ranks
from test_stemdl_data import BATCH, CONFIG, SEED, random_sample

main, backend, comm = Path(sys.argv[1]), Ranks(), jaxcomm.world()
directory, stage = main / "shards", main / "stage"
quiet = Console(quiet=True)


def refused(call, *words):
    try:
        call()
    except manifest.ShardError as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError(f"rank {comm.rank} was not told of {words}")
    assert len(set(comm.all_gather_object(words))) == 1


def fails(config, index):
    if index == 5:
        raise OSError("no space left")
    return random_sample(config, index)


def start(sample):
    return simulate_shards.produce(CONFIG, directory, 2, comm, quiet, sample)


refused(lambda: start(fails), "rank 1: OSError: no space left")
assert not (directory / "train-00001.h5").exists()
found = start(random_sample)


def source(**options):
    given = dict(stage=stage, backend=backend, batch=BATCH, seed=SEED)
    return loading.open_source(directory, **(given | options))


opened = source()
comm.barrier()
assert not list(stage.iterdir())
batches, digests = opened.batches(0), []
for step in range(3):
    parts = comm.all_gather_object(next(batches))
    x, y = map(np.concatenate, zip(*parts))
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
    refused(lambda: source(**options), str(bad), "bytes is 5000")
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


def run(out):
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
"""


def test_two_ranks_write_stage_and_train_without_a_break(
    job: Launch, whole: Path, tmp_path: Path
) -> None:
    done = job(2, ON_TWO_RANKS, str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(s for s in done.stdout.splitlines() if s.startswith("found "))
    sha256, digests = json.loads(line.removeprefix("found "))
    # Neither files nor batches depend on the number of ranks.
    assert sha256 == manifest.read(whole).sha256
    source = open_source(whole)
    for step, digest in enumerate(digests):
        x, y = source.read(step)
        assert hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest() == digest
    source.close()
    assert not list((tmp_path / "stage").iterdir())
    straight, broken = tmp_path / "whole", tmp_path / "broken"
    with np.load(straight / "params.npz") as a, np.load(broken / "params.npz") as b:
        assert a.files == b.files
        for key in a.files:
            assert a[key].tobytes() == b[key].tobytes(), key
    paths = [out / "train.json" for out in (straight, broken)]
    reports = [json.loads(path.read_text()) for path in paths]
    assert reports[0]["losses"] == reports[1]["losses"]
    assert [len(report["data_seconds"]) for report in reports] == [8, 3]
