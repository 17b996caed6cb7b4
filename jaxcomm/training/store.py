"""A directory of checkpoints: written whole or not at all, read only if unchanged.

Internal to `checkpoint`; one process at a time uses a directory.

    DIR/step-00000020/MANIFEST     what there is, and the SHA-256 of every file
    DIR/step-00000020/arrays/...   orbax's (a flat tree: leaf path -> array)
    DIR/.writing-...               a write that was cut short; the next one clears it

A checkpoint is complete once it has its name: everything is on disk before the rename.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxcomm.errors import CheckpointError

log = logging.getLogger(__name__)

FORMAT = 1
_MANIFEST, _ARRAYS = "MANIFEST", "arrays"
_HEAD = re.compile(rb"jaxcomm checkpoint (\d+) sha256 ([0-9a-f]{64})\n")
_NAME = re.compile(r"step-(\d{8,})")
_WRITING, _REMOVING, _DAMAGED = ".writing-", ".removing-", "damaged-"


@dataclasses.dataclass(frozen=True)
class Content:
    """What a checkpoint says of itself.

    Attributes:
      step: its number.
      leaves: path -> kind, shape and dtype, as `checkpoint` describes them.
      settings: what the user stored beside the arrays; plain JSON.
      files: path below the checkpoint -> size and SHA-256.
    """

    step: int
    leaves: dict[str, list[Any]]
    settings: dict[str, Any]
    files: dict[str, list[Any]] = dataclasses.field(default_factory=dict)


def steps(directory: Path) -> list[int]:
    """Return the steps of the complete checkpoints, in rising order."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    found = (_NAME.fullmatch(name) for name in names)
    return sorted(int(match[1]) for match in found if match)


def path_of(directory: Path, step: int) -> Path:
    """Return where a step's checkpoint lies."""
    return directory / f"step-{step:08d}"


def write(
    directory: Path, content: Content, arrays: Mapping[str, np.ndarray], keep: int
) -> None:
    """Write a checkpoint, then delete all but the newest `keep`.

    Whatever this raises, those that were there are untouched, and nothing half-written
    bears a checkpoint's name.
    """
    later = [step for step in steps(directory) if step >= content.step]
    if later:
        raise CheckpointError(
            f"{path_of(directory, later[-1])} is there already, and a job that starts "
            f"again would go on from it, not from step {content.step}. Delete it or "
            "give another directory"
        )
    os.makedirs(directory, exist_ok=True)
    for old in directory.glob(".*"):
        if old.name.startswith((_WRITING, _REMOVING)):
            shutil.rmtree(old)
    new = directory / f"{_WRITING}{content.step:08d}"
    try:
        os.mkdir(new)
        if arrays:
            _orbax_save(new / _ARRAYS, arrays)
        files = {name: _digest(new / name) for name in _files(new)}
        _write_manifest(new, dataclasses.replace(content, files=files))
        _sync(new)
        os.rename(new, path_of(directory, content.step))
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    _sync_one(directory)
    for step in steps(directory)[:-keep]:
        try:
            _remove(path_of(directory, step))
        except OSError as error:  # the new one is complete all the same
            log.warning("the old checkpoint of step %d stays: %s", step, error)


def check(directory: Path, step: int) -> Content:
    """Return a checkpoint's content, having read all of its files.

    Raises:
      CheckpointError: it is damaged, foreign or of another version; names the file.
    """
    path = path_of(directory, step)
    content = _read_manifest(path / _MANIFEST)
    if content.step != step:
        raise CheckpointError(f"{path} holds step {content.step}: it was renamed")
    for name, (size, digest) in content.files.items():
        try:
            found = _digest(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name}: {error.strerror}") from error
        if found != [size, digest]:
            raise CheckpointError(
                f"{path / name} is damaged: "
                + (
                    f"{found[0]} bytes where {size} were written"
                    if found[0] != size
                    else "its SHA-256 is not that of what was written"
                )
            )
    return content


def read(directory: Path, content: Content) -> dict[str, np.ndarray]:
    """Return the arrays of a checkpoint that `check` has passed."""
    names = [name for name, spec in content.leaves.items() if 0 not in spec[1]]
    if not names:
        return {}
    return _orbax_restore(path_of(directory, content.step) / _ARRAYS, names)


def set_aside(directory: Path, step: int) -> Path:
    """Rename a damaged checkpoint so that it counts no more; return its new path."""
    path = path_of(directory, step)
    new = directory / f"{_DAMAGED}{path.name}"
    number = 1
    while new.exists():
        number += 1
        new = directory / f"{_DAMAGED}{path.name}-{number}"
    os.rename(path, new)
    _sync_one(directory)
    return new


def clear(directory: Path) -> None:
    """Delete all checkpoints, damaged and half-written ones too, and nothing else."""
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        if path.name.startswith((_WRITING, _REMOVING, _DAMAGED)):
            shutil.rmtree(path)
        elif _NAME.fullmatch(path.name):
            _remove(path)


def _remove(path: Path) -> None:
    # One that is half deleted must not pass for a damaged one.
    doomed = path.with_name(f"{_REMOVING}{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _write_manifest(path: Path, content: Content) -> None:
    body = json.dumps(dataclasses.asdict(content), sort_keys=True).encode()
    head = f"jaxcomm checkpoint {FORMAT} sha256 {hashlib.sha256(body).hexdigest()}\n"
    (path / _MANIFEST).write_bytes(head.encode() + body)


def _read_manifest(path: Path) -> Content:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path.parent} is not a checkpoint of jaxcomm: {path}: {error.strerror}"
        ) from error
    head = _HEAD.match(text)
    if head is None:
        raise CheckpointError(f"{path} is damaged, or not jaxcomm's: no header")
    if int(head[1]) != FORMAT:
        raise CheckpointError(
            f"{path} was written in format {int(head[1])} by another version of "
            f"jaxcomm; this one reads format {FORMAT}"
        )
    body = text[head.end() :]
    if hashlib.sha256(body).hexdigest().encode() != head[2]:
        raise CheckpointError(f"{path} is damaged: its SHA-256 does not fit")
    return Content(**json.loads(body))


def _files(path: Path) -> Iterator[str]:
    for file in sorted(path.rglob("*")):
        if file.is_file():
            yield str(file.relative_to(path))


def _digest(path: Path) -> list[Any]:
    with path.open("rb") as file:
        return [
            os.fstat(file.fileno()).st_size,
            hashlib.file_digest(file, "sha256").hexdigest(),
        ]


def _sync(path: Path) -> None:
    """Bring a tree of files to the disk."""
    for folder, _, names in os.walk(path):
        for name in names:
            _sync_one(Path(folder, name))
        _sync_one(Path(folder))


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _orbax() -> Any:
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise CheckpointError(
            "orbax is not installed; `pip install 'jaxcomm[checkpoint]'` brings it"
        ) from error
    return ocp


@contextlib.contextmanager
def _checkpointer() -> Iterator[tuple[Any, Any]]:
    """Yield orbax and one that no other process takes part in."""
    import jax

    ocp = _orbax()
    # Under jax.distributed orbax would otherwise wait for the other processes.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix="jaxcomm"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    # Its threads log every error with pages of their stacks, and then it raises it.
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.CRITICAL)
    try:
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            yield ocp, checkpointer
    finally:
        absl.setLevel(level)


def _orbax_save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with _checkpointer() as (ocp, checkpointer):
        checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(dict(arrays)))


def _orbax_restore(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    with _checkpointer() as (ocp, checkpointer):
        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        return checkpointer.restore(
            path.absolute(), args=ocp.args.PyTreeRestore(restore_args=as_numpy)
        )
