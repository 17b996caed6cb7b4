"""STEMDL's sharded data, damaged: what is wrong is named, and nothing overwritten."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from stemdl.data import manifest
from stemdl.data.manifest import ShardError
from tests.stemdl.small_shards import CONFIG, open_source, produce


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards")
    produce(directory)
    return directory


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "copied"))


def damage_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def damage_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_foreign(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["something"] = 1


def damage_config(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["config"] = dataclasses.replace(CONFIG, seed=1).to_json()


def damage_count(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["samples"] = 3


def damage_array(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["labels"]
        file["labels"] = np.zeros((3, 32, 32), np.float32)


DAMAGES = [
    (damage_truncated, "bytes is 5000", "truncated, or not an HDF5 file"),
    (damage_bit, "sha256 is", "sha256 is"),
    (damage_foreign, "bytes is", "foreign: it has no attribute 'config'"),
    (damage_config, "(bytes|sha256) is", "config.seed is 1, wanted 0"),
    (damage_count, "(bytes|sha256) is", "samples is 3, wanted 4"),
    (damage_array, "(bytes|sha256) is", "samples in labels is 3, wanted 4"),
    (Path.unlink, "is missing", ""),
]


@pytest.mark.parametrize(("damage", "loaded"), [row[:2] for row in DAMAGES])
def test_a_bad_shard_is_named(
    copied: Path, tmp_path: Path, damage: object, loaded: str
) -> None:
    path = copied / "train-00001.h5"
    damage(path)  # type: ignore[operator]
    stage = tmp_path / "stage"
    for options in ({}, {"stage": stage}):
        with pytest.raises(ShardError, match=rf"rank 0: .*{path.name}.*{loaded}"):
            open_source(copied, **options)
    assert not list(stage.iterdir())


# One that is missing is made.
@pytest.mark.parametrize(
    ("damage", "resumed"), [(row[0], row[2]) for row in DAMAGES if row[2]]
)
def test_a_simulation_goes_on_over_no_bad_shard(
    copied: Path, damage: object, resumed: str
) -> None:
    path = copied / "train-00001.h5"
    damage(path)  # type: ignore[operator]
    (copied / manifest.NAME).unlink()
    before = path.read_bytes()
    with pytest.raises(ShardError, match=rf"{path.name}.*{resumed}"):
        produce(copied)
    assert path.read_bytes() == before


def edit(directory: Path, change: object, sealed: bool = True) -> None:
    """Change the manifest; with a checksum that fits, unless not `sealed`."""
    path = directory / manifest.NAME
    content = json.loads(path.read_text())
    claimed = content.pop("sha256")
    change(content)  # type: ignore[operator]
    text = json.dumps(content, sort_keys=True).encode()
    digest = hashlib.sha256(text).hexdigest() if sealed else claimed
    path.write_text(json.dumps({**content, "sha256": digest}))


def test_a_manifest_that_does_not_match_is_named(copied: Path) -> None:
    path = copied / manifest.NAME
    good = path.read_text()

    def unequal(content: dict) -> None:
        content["shards"][0]["samples"] = 5
        content["shards"][1]["samples"] = 3

    changes = [
        (lambda c: c.update(format=9), True, "format is 9, wanted 1"),
        (lambda c: c["config"].update(seed=1), False, "sha256 is"),
        (lambda c: c["config"].update(version=0), True, "config.version is 0"),
        (lambda c: c["config"].update(seed=1), True, "h5: config.seed is 0, wanted 1"),
        (lambda c: c["shards"].pop(), True, "samples of test is 4, wanted 8"),
        (unequal, True, "samples of train-00001.h5 is 3, wanted 5"),
        (lambda c: c["shards"][0].update(sha256="0"), True, "00000.h5: sha256 is"),
        (lambda c: c["shards"][0].update(bytes=1), True, "00000.h5: bytes is"),
    ]
    for change, sealed, message in changes:
        edit(copied, change, sealed)
        with pytest.raises(ShardError, match=message):
            open_source(copied)
        path.write_text(good)
    for text in (good[:500], "[1]", "{}"):
        path.write_text(text)
        with pytest.raises(ShardError, match=r"manifest\.json is damaged"):
            open_source(copied)
    path.unlink()
    with pytest.raises(ShardError, match="stemdl simulate"):
        open_source(copied)


def test_what_does_not_fit_the_data_set_is_refused(whole: Path) -> None:
    for batch in (3, 12):
        with pytest.raises(ShardError, match=f"batch of {batch}.*2 training shards"):
            open_source(whole, batch=batch)
    with pytest.raises(ShardError, match=r"config\.train is 8, wanted 16"):
        open_source(whole, samples=16)
    with pytest.raises(ShardError, match="number of training shards is 2, wanted 4"):
        produce(whole, 4)
    with pytest.raises(ShardError, match="do not divide into 3 equal shards"):
        produce(whole, 3)
