"""STEMDL's sharded data: written, staged, loaded and refused. Random samples do."""

from __future__ import annotations

import hashlib
import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import jaxcomm
from jaxcomm.data import Batches
from stemdl.data import augmentation, dataset, loading, manifest, simulation
from stemdl.data.manifest import ShardError
from stemdl.data.shard_order import ShardOrder
from stemdl.training.telemetry import Timed
from tests.jobs import launch_ranks
from tests.stemdl.small_shards import CONFIG, SEED, open_source, produce, random_sample


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
        turns = augmentation.draw(SEED, source.order.epoch(step), CONFIG.train)[rows]
        wanted = augmentation.augment(data.train_x[rows], data.train_y[rows], turns)
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
        return simulation.produce(CONFIG, tmp_path, 2, comm, console, fails)

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


def test_two_ranks_write_stage_and_train_without_a_break(
    whole: Path, tmp_path: Path
) -> None:
    done = launch_ranks(2, ["-m", "tests.stemdl.shard_ranks", tmp_path])
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
