"""Checkpoints: what comes back, what is refused, and what a crash leaves."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomm import checkpoint
from jaxcomm.errors import CheckpointError, InvalidOptionError
from jaxcomm.training import store
from tests.jobs import Launch
from tests.programs import checkpoint_ranks


class Moments(NamedTuple):
    count: Any
    mean: Any


def some_state(value: float = 0.0) -> dict[str, Any]:
    """One leaf of every kind; different values give different leaves of each."""
    number = int(value)
    x = jnp.arange(6.0).reshape(2, 3) + value
    names = ("bfloat16", "float16", "int8", "uint32", "int4", "float8_e4m3fn")
    return {
        "params": {"Dense/0": {"w.x": x, "empty": jnp.zeros((0, 3))}},
        "opt": (Moments(jnp.int32(number), [x * 2, x[0, 0]]), (), None),
        "dtypes": {name: jnp.ones(3, name) * number for name in names},
        "complex": x.astype(jnp.complex64) * 1j,
        "mask": x > value + 1,
        "key": jax.random.key(number),
        "keys": jax.random.split(jax.random.key(number, impl="rbg"), (2, 2)),
        "no keys": jax.random.split(jax.random.key(0), 0),
        "step": number,
        "lr": 0.1 + value,
        "done": number % 2 == 1,
        "z": complex(value, 1),
        "numpy": np.arange(3, dtype=np.float64) / 3 + value,
        "scalar": np.float64(1 / 3 + value),
        "sorted": np.asfortranarray(np.arange(6.0).reshape(2, 3) + value),
    }


def assert_same(got: Any, wanted: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert type(a) is type(b)
        if isinstance(b, bool | int | float | complex):
            assert a == b
            continue
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_every_kind_of_leaf_comes_back_bitwise(tmp_path: Path) -> None:
    state = some_state(3)
    assert checkpoint.restore(tmp_path / "new", state) is None
    checkpoint.save(tmp_path / "new", 7, state)
    like = some_state(0)
    found = checkpoint.restore(tmp_path / "new", like)
    assert found is not None and found.step == 7
    assert_same(found.state, state)
    assert_same(like, some_state(0))
    # What NumPy's leaves give back can be written to.
    found.state["numpy"][0] = 1
    arrays = {name: state[name] for name in ("params", "key", "keys", "dtypes")}
    checkpoint.save(tmp_path / "arrays", 0, arrays)
    found = checkpoint.restore(
        tmp_path / "arrays", jax.eval_shape(lambda: arrays), step=0
    )
    assert found is not None
    assert_same(found.state, arrays)
    checkpoint.save(tmp_path / "nothing", 1, ((), None))
    assert checkpoint.restore(tmp_path / "nothing", ((), None)) == (1, ((), None))


def test_only_the_newest_are_kept_and_none_is_written_over(tmp_path: Path) -> None:
    for step in range(1, 5):
        checkpoint.save(tmp_path, step, {"x": step}, keep=2)
    assert checkpoint.steps(tmp_path) == [3, 4]
    assert sorted(os.listdir(tmp_path)) == ["step-00000003", "step-00000004"]
    found = checkpoint.restore(tmp_path, {"x": 0}, step=3)
    assert found == (3, {"x": 3})
    before = digest(tmp_path)
    for step in (3, 4):
        with pytest.raises(CheckpointError, match="step-00000004 is there already"):
            checkpoint.save(tmp_path, step, {"x": 9})
    with pytest.raises(CheckpointError, match="no checkpoint of step 2"):
        checkpoint.restore(tmp_path, {"x": 0}, step=2)
    with pytest.raises(InvalidOptionError, match="keep=0"):
        checkpoint.save(tmp_path, 5, {"x": 9}, keep=0)
    with pytest.raises(InvalidOptionError, match="compare='nothing'; use one of"):
        checkpoint.save(tmp_path, 5, {"x": 9}, compare="nothing")  # pyright: ignore
    with pytest.raises(InvalidOptionError, match=r"step=2\.0"):
        checkpoint.save(tmp_path, 2.0, {"x": 9})  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidOptionError, match="settings="):
        checkpoint.save(tmp_path, 5, {"x": 9}, settings={"tx": object()})
    for bad in ("text", object(), np.array(["text"]), 1 << 70):
        with pytest.raises(CheckpointError, match=r"leaf \['bad'\]"):
            checkpoint.save(tmp_path, 5, {"bad": bad})
    assert digest(tmp_path) == before


def test_clear_takes_checkpoints_alone(tmp_path: Path) -> None:
    checkpoint.clear(tmp_path / "nowhere")
    for step in (1, 2):
        checkpoint.save(tmp_path, step, some_state())
    store.set_aside(tmp_path, 1)
    (tmp_path / ".writing-00000003").mkdir()
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "mine.txt").write_text("mine")
    checkpoint.clear(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["mine.txt", "step-notes"]


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    state = {"w": jnp.ones((2, 3)), "k": jax.random.key(0), "n": 1}
    checkpoint.save(tmp_path, 1, state, settings={"lr": 0.1, "layers": (1, 2)})
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"w": jnp.ones((3, 2))},
            r"\['w'\] is float32\[3, 2\] and was float32\[2, 3\]",
        ),
        ({"w": np.ones((2, 3))}, r"\['w'\] is float64\[2, 3\] and was float32"),
        ({"k": jax.random.key(0, impl="rbg")}, r"\['k'\] is key<rbg>.*key<fry>"),
        ({"k": jnp.zeros(2, jnp.uint32)}, r"\['k'\] is uint32\[2\] and was key<fry>"),
        ({"n": 1.0}, r"\['n'\] is the number float and was the number int"),
        ({"n": jnp.int32(1)}, r"\['n'\] is int32\[\] and was the number int"),
        ({"w": {"v": 1}}, r"\['w'\]\['v'\] is only in the state asked for"),
        ({"w": None}, r"\['w'\] is only in the checkpoint"),
    ]
    for change, words in cases:
        with pytest.raises(CheckpointError, match=words):
            checkpoint.restore(tmp_path, {**state, **change})
    same = {"layers": [1, 2], "lr": 0.1}
    assert checkpoint.restore(tmp_path, state, settings=same) is not None
    for change, words in (({"lr": 0.2}, "lr is 0.2 and was 0.1"), ({"b": 1}, "b is 1")):
        with pytest.raises(CheckpointError, match=words):
            checkpoint.restore(tmp_path, state, settings={**same, **change})


def damage(path: Path) -> Iterator[Path]:
    """Damage each file of a checkpoint in turn, in every way; mend it afterwards."""
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        whole = file.read_bytes()
        flipped = bytearray(whole)
        if flipped:
            flipped[len(flipped) // 2] ^= 1
        ways = [b"", whole[:-1], whole + b"\0", bytes(flipped)]
        for content in (way for way in ways if way != whole):
            file.write_bytes(content)
            yield file
        file.unlink()
        yield file
        file.write_bytes(whole)


def test_damage_is_named_and_nothing_is_overwritten(tmp_path: Path) -> None:
    state = {"w": jnp.arange(1000.0), "k": jax.random.key(1)}
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state)
    newest = tmp_path / "step-00000002"
    names = set()
    for file in damage(newest):
        names.add(file.name)
        before = digest(tmp_path)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.restore(tmp_path, state)
        assert str(file) in str(caught.value)
        assert "fallback=True" in str(caught.value)
        assert digest(tmp_path) == before
    assert {"MANIFEST", "_METADATA"} < names
    found = checkpoint.restore(tmp_path, state)
    assert found is not None and found.step == 2  # mended

    manifest = newest / "MANIFEST"
    text = manifest.read_bytes()
    manifest.write_bytes(text.replace(b"checkpoint 1 ", b"checkpoint 2 "))
    with pytest.raises(CheckpointError, match=r"format 2 by another version.*format 1"):
        checkpoint.restore(tmp_path, state)
    manifest.write_bytes(text)
    newest.rename(tmp_path / "step-00000003")
    with pytest.raises(CheckpointError, match="holds step 2: it was renamed"):
        checkpoint.restore(tmp_path, state)
    shutil.rmtree(tmp_path / "step-00000003")
    (tmp_path / "step-00000009").mkdir()
    with pytest.raises(CheckpointError, match="is not a checkpoint of jaxcomm"):
        checkpoint.restore(tmp_path, state)


def test_fallback_takes_the_newest_whole_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"x": step})
    for step in (2, 3):
        with open(tmp_path / f"step-0000000{step}" / "MANIFEST", "ab") as file:
            file.write(b" ")
    damaged = digest(tmp_path / "step-00000003")
    found = checkpoint.restore(tmp_path, {"x": 0}, fallback=True)
    assert found == (1, {"x": 1})
    assert checkpoint.steps(tmp_path) == [1]
    assert digest(tmp_path / "damaged-step-00000003") == damaged
    # The steps may now be done again.
    checkpoint.save(tmp_path, 3, {"x": 33})
    assert checkpoint.restore(tmp_path, {"x": 0}) == (3, {"x": 33})
    for step in (1, 3):
        (tmp_path / f"step-0000000{step}" / "MANIFEST").write_bytes(b"")
    before = digest(tmp_path)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        checkpoint.restore(tmp_path, {"x": 0}, fallback=True)
    assert digest(tmp_path) == before


class Killed(BaseException):
    pass


def test_a_crash_at_any_moment_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every system call by which `_store` changes the disk is the last one, in turn."""
    places = [(os, "mkdir"), (os, "rename"), (os, "fsync"), (store, "_write_manifest")]
    places += [(store, "_orbax_save"), (shutil, "rmtree"), (store, "_digest")]
    left = 0

    def dying(original: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:  # a process that was killed does nothing more
                raise Killed
            return original(*arguments, **options)

        return call

    survivors = set()
    for moment in range(1000):
        folder = tmp_path / str(moment)
        checkpoint.save(folder, 1, {"x": np.full(3, 1)})
        with monkeypatch.context() as patch:
            for owner, name in places:
                patch.setattr(owner, name, dying(getattr(owner, name)))
            left = moment
            try:
                checkpoint.save(folder, 2, {"x": np.full(3, 2)}, keep=1)
            except Killed:
                finished = False
            else:
                finished = True
        found = checkpoint.restore(folder, {"x": np.zeros(3, int)})
        assert found is not None
        assert found.state["x"].tolist() == [found.step] * 3
        survivors.add(found.step)
        checkpoint.save(folder, 3, {"x": np.full(3, 3)}, keep=1)
        assert os.listdir(folder) == ["step-00000003"]
        if finished:
            break
    assert finished and moment > 20
    assert survivors == {1, 2}


def test_missing_orbax_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(CheckpointError, match=r"pip install 'jaxcomm\[checkpoint\]'"):
        checkpoint.save(tmp_path, 1, {"x": jnp.ones(3)})
    assert os.listdir(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder with a small file system of its own."""
    folder = tmp_path / "disk"
    size = f"size={checkpoint_ranks.MEGABYTES}m"
    line = ["mount", "-t", "tmpfs", "-o", size, "jaxcomm-test", str(folder)]
    folder.mkdir()
    if os.geteuid() or not shutil.which("mount") or subprocess.run(line).returncode:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param(2, marks=pytest.mark.thorough),
        3,
        pytest.param(4, marks=pytest.mark.thorough),
    ],
)
def test_on_ranks(launch: Launch, tmp_path: Path, ranks: int) -> None:
    # RLIMIT_FSIZE stands for a full disk.
    done = launch(ranks, ["-m", "tests.programs.checkpoint_ranks", tmp_path])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all checked") == ranks, done.stdout + done.stderr


def test_on_a_disk_that_fills_up(launch: Launch, small_disk: Path) -> None:
    done = launch(2, ["-m", "tests.programs.checkpoint_ranks", small_disk, "disk"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all checked") == 2, done.stdout + done.stderr
