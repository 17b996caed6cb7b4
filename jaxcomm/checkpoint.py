"""Checkpoints of a job, and ending it on request: save, restore, `Stop`.

Rank 0 alone writes and reads, through orbax, so a directory on its own disk is enough
as long as rank 0 stays on that host. The other ranks get the values by broadcast, and
every rank learns what has come of it.

    found = checkpoint.restore("out/checkpoints", first_state)
    step, state = found or (0, first_state)
    with checkpoint.Stop() as stop:
        while step < steps:
            state = train_step(state, batches.at(step))
            step += 1
            ending = stop.requested(step)
            if ending or step % 500 == 0:
                checkpoint.save("out/checkpoints", step, state)
            if ending:
                sys.exit(0)
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxcomm import _snapshot, _store, collectives
from jaxcomm.communicator import Communicator
from jaxcomm.errors import CheckpointError, InvalidOptionError
from jaxcomm.preemption import Stop as Stop
from jaxcomm.startup import world

log = logging.getLogger(__name__)

_PIECE_BYTES = 32 << 20  # that is broadcast at a time


class Restored(NamedTuple):
    """What `restore` found: the step it was saved at, and the state."""

    step: int
    state: Any


def save(
    directory: str | Path,
    step: int,
    state: Any,
    *,
    keep: int = 3,
    settings: Mapping[str, Any] | None = None,
    comm: Communicator | None = None,
) -> None:
    """Write a checkpoint; all ranks call it together.

    Rank 0 writes its state, under another name until every byte is on the disk. A crash
    at any moment leaves the earlier checkpoints whole. It takes as long as rank 0 needs
    to copy, write and hash the arrays, and the other ranks wait for that: they must not
    be made to wait longer than `abort_after` (see `init`).

    Args:
      directory: where checkpoints are kept, one folder each; made if need be. No other
        job may write to it.
      step: number of steps done; higher than that of any checkpoint there.
      state: any pytree of arrays, typed PRNG keys and Python numbers; the position in
        the data belongs in it. Only rank 0's is written.
      keep: how many checkpoints stay; older ones are deleted once this one is complete.
      settings: what `restore` must find unchanged, such as the learning rate: names and
        values that JSON can hold.
      comm: the ranks that take part; all by default.

    Raises:
      CheckpointError: on every rank, if rank 0 could not write it (a full disk, say) or
        a later checkpoint is there; names the path and the remedy.
      InvalidOptionError: an option is unusable.
    """
    comm = comm or world()
    _check_step(step)
    if keep < 1:
        raise InvalidOptionError(f"keep={keep}; give how many to keep, at least 1")
    plain = _plain(settings)
    directory, failure = Path(directory), ""
    if comm.rank == 0:
        try:
            leaves, arrays = _snapshot.take(state)
            content = _store.Content(step, leaves, plain)
            _store.write(directory, content, arrays, keep)
        except Exception as error:  # orbax raises whatever its libraries do
            log.debug("the checkpoint failed", exc_info=True)
            failure = _why_not_saved(directory, step, error)
    outcomes = comm.all_gather_object((step, failure))
    different = {number: rank for rank, (number, _) in enumerate(outcomes)}
    if len(different) > 1:
        who = ", ".join(f"rank {rank} at step {n}" for n, rank in different.items())
        raise CheckpointError(
            f"the ranks save different steps ({who}): all must call save together"
        )
    if failure := outcomes[0][1]:
        raise CheckpointError(failure)


def restore(
    directory: str | Path,
    like: Any,
    *,
    step: int | None = None,
    fallback: bool = False,
    settings: Mapping[str, Any] | None = None,
    comm: Communicator | None = None,
) -> Restored | None:
    """Return the newest checkpoint, or None if there is none; all ranks together.

    Rank 0 reads every byte of it twice, once to compare its SHA-256, and sends it to
    the others. Nothing is read into a state before structure, shapes and dtypes have
    been compared on every rank.

    Args:
      directory: as given to `save`; only rank 0 looks there.
      like: a tree of the state's structure, shapes and dtypes: the initial state, or
        one of `jax.ShapeDtypeStruct`. Arrays of JAX come back where they lie in it.
      step: the step wanted; the newest by default.
      fallback: whether a damaged checkpoint is renamed to "damaged-..." and the one
        before it is taken, with a warning; else it is an error.
      settings: as given to `save`; compared if given.
      comm: the ranks that take part; all by default.

    Returns:
      The step and the state, bitwise as they were saved, equal on all ranks.

    Raises:
      CheckpointError: on every rank: a file is damaged or foreign, a setting or a leaf
        differs, or the step asked for is not there. Nothing is changed on disk.
    """
    comm = comm or world()
    plain = _plain(settings)
    directory = Path(directory)
    wanted = _snapshot.specs(like)
    chosen: _store.Content | None = None

    def choose() -> tuple[str, int, dict[str, Any], dict[str, Any]] | None:
        nonlocal chosen
        chosen = _choose(directory, step, fallback)
        if chosen is None:
            return None
        path = _store.path_of(directory, chosen.step)
        return str(path), chosen.step, chosen.leaves, chosen.settings

    found = _on_root(comm, directory, choose)
    if found is None:
        return None
    path, number, leaves, found_settings = found
    difference = _snapshot.difference(wanted, leaves)
    if settings is not None:
        difference = _changed(plain, found_settings) or difference
    # All raise what any of them found.
    differences = comm.all_gather_object(difference)
    if difference := next(filter(None, differences), ""):
        raise CheckpointError(f"{path} does not fit this job: {difference}")
    arrays = _receive(directory, chosen, comm)
    return Restored(number, _snapshot.put_back(like, leaves, arrays))


def steps(directory: str | Path) -> list[int]:
    """Return the steps of the complete checkpoints in a directory, in rising order."""
    return _store.steps(Path(directory))


def clear(directory: str | Path) -> None:
    """Delete all checkpoints in a directory, and no other file.

    One process does it, while none writes there.

    Args:
      directory: where `save` kept them; it need not exist.

    Raises:
      OSError: a checkpoint cannot be deleted.
    """
    _store.clear(Path(directory))


def _choose(directory: Path, step: int | None, fallback: bool) -> _store.Content | None:
    there = _store.steps(directory)
    if step is not None:
        if step not in there:
            raise CheckpointError(
                f"{directory} holds no checkpoint of step {step}, but of {there}"
            )
        there = [step]
    damaged = []
    for number in reversed(there):
        try:
            content = _store.check(directory, number)
        except CheckpointError as error:
            if not fallback:
                raise
            damaged.append(number)
            log.warning("%s; trying the one before", error)
            if number == there[0]:
                raise CheckpointError(
                    f"no checkpoint in {directory} is whole; the oldest: {error}"
                ) from error
            continue
        for bad in damaged:
            log.warning("renamed to %s", _store.set_aside(directory, bad))
        return content
    return None


def _why_not_saved(directory: Path, step: int, error: Exception) -> str:
    try:
        last = _store.steps(directory)[-1:]
    except OSError:
        last = []
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, CheckpointError):
        return f"step {step} was not saved: {error}."
    return (
        f"step {step} was not saved to {directory}: {text[:500]}. "
        + (f"The checkpoint of step {last[0]} is untouched. " if last else "")
        + "Make room there (df, quota), or give another directory, and start again."
    )


def _remedy(directory: Path) -> str:
    there = _store.steps(directory)
    if len(there) < 2:
        return "Nothing was changed. Remove it to start from the beginning."
    return (
        f"Nothing was changed. Steps {there} are there; give restore(fallback=True) to "
        "take the newest whole one, or remove the damaged one."
    )


def _check_step(step: Any) -> None:
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise InvalidOptionError(f"step={step!r}; give a number of steps, at least 0")


def _plain(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return settings as they come back from JSON."""
    try:
        return json.loads(json.dumps(dict(settings or {})))
    except (TypeError, ValueError) as error:
        raise InvalidOptionError(
            f"settings={settings!r}: {error}; give names with numbers, texts, None, or "
            "lists and dicts of them"
        ) from error


def _changed(wanted: dict[str, Any], found: dict[str, Any]) -> str:
    for name in {**wanted, **found}:
        ours, theirs = wanted.get(name), found.get(name)
        if ours != theirs:
            return (
                f"{name} is {ours!r} and was {theirs!r}. Use the settings it was saved "
                "with, or another directory"
            )
    return ""


def _on_root(comm: Communicator, directory: Path, call: Callable[[], Any]) -> Any:
    """Return on every rank what rank 0's call returns, or raise what it raises."""
    value, failure = None, ""
    if comm.rank == 0:
        try:
            value = call()
        except Exception as error:  # orbax raises whatever its libraries do
            failure = f"{error}. {_remedy(directory)}"
    value, failure = comm.broadcast_object((value, failure))
    if failure:
        raise CheckpointError(failure)
    return value


def _receive(
    directory: Path, chosen: _store.Content | None, comm: Communicator
) -> dict[str, np.ndarray]:
    """Return the arrays on every rank; rank 0 reads what it has chosen."""
    arrays: dict[str, np.ndarray] = {}

    def read() -> list[tuple[str, tuple[int, ...], str]]:
        assert chosen is not None
        arrays.update(_store.read(directory, chosen))
        return [(name, x.shape, x.dtype.name) for name, x in arrays.items()]

    header = _on_root(comm, directory, read)
    if comm.size == 1:
        return arrays
    return {
        name: _broadcast(arrays.get(name), shape, jnp.dtype(dtype), comm)
        for name, shape, dtype in header
    }


def _broadcast(
    value: np.ndarray | None, shape: tuple[int, ...], dtype: Any, comm: Communicator
) -> np.ndarray:
    """Send rank 0's array in pieces; as bytes, so that its dtype does not matter."""
    result = np.zeros(shape, dtype) if value is None else np.ascontiguousarray(value)
    data = np.frombuffer(result.tobytes(), np.uint8)
    pieces = [
        np.asarray(collectives.broadcast(data[start : start + _PIECE_BYTES], comm=comm))
        for start in range(0, len(data), _PIECE_BYTES)
    ]
    return np.concatenate(pieces).view(dtype).reshape(shape)
