"""Checkpoints of a job, and ending it on request: save, restore, `Stop`.

Rank 0 alone writes and reads, through orbax, so a directory on its own disk is enough
as long as rank 0 stays on that host. The other ranks get the values by broadcast, and
every rank learns what has come of it.

Example:
  >>> from jaxcomm import checkpoint
  >>> train_step = jaxcomm.data_parallel(lambda x: jax.lax.pmean(x + 1, "batch"))
  >>> step, state = checkpoint.restore("run", like=jnp.zeros(2)) or (0, jnp.zeros(2))
  >>> with checkpoint.Stop() as stop:
  ...     while step < 10:
  ...         step, state = step + 1, train_step(state)
  ...         ending = stop.requested(step)  # SIGTERM or Ctrl-C on any rank
  ...         if ending or step % 5 == 0:
  ...             checkpoint.save("run", step, state)
  ...         if ending:
  ...             sys.exit(0)
  >>> checkpoint.steps("run")
  [5, 10]
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxcomm.collectives import reductions
from jaxcomm.errors import CheckpointError, InvalidOptionError, JaxcommError
from jaxcomm.ranks.communicator import Communicator
from jaxcomm.ranks.deadline import rank_names
from jaxcomm.startup import world
from jaxcomm.training import snapshot, store
from jaxcomm.training.preemption import Stop as Stop

log = logging.getLogger(__name__)

_PIECE_BYTES = 32 << 20  # that is broadcast at a time
_SHOWN_VARIANTS = 4
_COMPARED = ("values", "structure")


class Restored(NamedTuple):
    """What `restore` found: the step it was saved at, and the state.

    Example:
      >>> jaxcomm.checkpoint.save("run", 100, {"w": jnp.ones(3)})
      >>> step, state = jaxcomm.checkpoint.restore("run", like={"w": jnp.zeros(3)})
      >>> step, state["w"]
      (100, Array([1., 1., 1.], dtype=float32))
    """

    step: int
    state: Any


def save(
    directory: str | Path,
    step: int,
    state: Any,
    *,
    keep: int = 3,
    settings: Mapping[str, Any] | None = None,
    compare: Literal["values", "structure"] = "values",
    comm: Communicator | None = None,
) -> None:
    """Write a checkpoint; all ranks call it together.

    First the ranks compare what they are about to save: step, options, settings, the
    leaves' paths, shapes and dtypes, and their values, by SHA-256. Where anything
    differs, all raise an error that names it and the ranks, and nothing is written or
    deleted.

    Then rank 0 writes its state, under another name until every byte is on the disk. A
    crash at any moment leaves the earlier checkpoints whole. It takes as long as rank 0
    needs to copy, write and hash the arrays, and the other ranks wait for that: they
    must not be made to wait longer than `abort_after` (see `init`).

    Args:
      directory: where checkpoints are kept, one folder each; made if need be. No other
        job may write to it. Only rank 0's counts: another host may have none.
      step: number of steps done; higher than that of any checkpoint there.
      state: any pytree of arrays, typed PRNG keys and Python numbers; the position in
        the data belongs in it. It must be equal on all ranks, bit for bit, since
        `restore` gives all of them what rank 0 has written.
      keep: how many checkpoints stay; older ones are deleted once this one is complete.
      settings: what `restore` must find unchanged, such as the learning rate: names and
        values that JSON can hold.
      compare: "values", or "structure" to leave values out: where a leaf is each rank's
        own and rank 0's will do for all.
      comm: the ranks that take part; all by default.

    Raises:
      CheckpointError: on every rank, if the ranks differ, if rank 0 could not write it
        (a full disk, say) or a later checkpoint is there; names leaf and ranks, or the
        path, and the remedy.
      InvalidOptionError: an option is unusable.

    Example:
      >>> for step in (100, 200, 300):
      ...     jaxcomm.checkpoint.save("run", step, {"w": jnp.ones(3)}, keep=2)
      >>> jaxcomm.checkpoint.steps("run")
      [200, 300]
    """
    comm = comm or world()
    proposal: _Proposal | None = None
    refused: JaxcommError | None = None
    try:
        proposal = _propose(step, state, keep, settings, compare, comm.size > 1)
    except JaxcommError as error:
        refused = error
    _agree(step, proposal, refused, comm)
    assert proposal is not None
    directory, failure = Path(directory), ""
    if comm.rank == 0:
        try:
            leaves, arrays = snapshot.take(state)
            content = store.Content(step, leaves, proposal.options["settings"])
            store.write(directory, content, arrays, keep)
        except Exception as error:  # orbax raises whatever its libraries do
            log.debug("the checkpoint failed", exc_info=True)
            failure = _why_not_saved(directory, step, error)
    if failure := comm.broadcast_object(failure):
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

    Example:
      >>> first = {"w": jnp.zeros(3)}
      >>> jaxcomm.checkpoint.restore("run", first) is None
      True
      >>> jaxcomm.checkpoint.save("run", 100, {"w": jnp.ones(3)})
      >>> jaxcomm.checkpoint.restore("run", first).state
      {'w': Array([1., 1., 1.], dtype=float32)}
    """
    comm = comm or world()
    plain = _plain(settings)
    directory = Path(directory)
    wanted = snapshot.specs(like)
    chosen: store.Content | None = None

    def choose() -> tuple[str, int, dict[str, Any], dict[str, Any]] | None:
        nonlocal chosen
        chosen = _choose(directory, step, fallback)
        if chosen is None:
            return None
        path = store.path_of(directory, chosen.step)
        return str(path), chosen.step, chosen.leaves, chosen.settings

    found = _on_root(comm, directory, choose)
    if found is None:
        return None
    path, number, leaves, found_settings = found
    difference = snapshot.difference(wanted, leaves)
    if settings is not None:
        difference = _changed(plain, found_settings) or difference
    # All raise what any of them found.
    differences = comm.all_gather_object(difference)
    if difference := next(filter(None, differences), ""):
        raise CheckpointError(f"{path} does not fit this job: {difference}")
    arrays = _receive(directory, chosen, comm)
    return Restored(number, snapshot.put_back(like, leaves, arrays))


def steps(directory: str | Path) -> list[int]:
    """Return the steps of the complete checkpoints in a directory, in rising order.

    Empty where the directory is not there, as on hosts other than rank 0's.

    Example:
      >>> jaxcomm.checkpoint.save("run", 100, {"w": jnp.ones(3)})
      >>> jaxcomm.checkpoint.steps("run")
      [100]
    """
    return store.steps(Path(directory))


def clear(directory: str | Path) -> None:
    """Delete all checkpoints in a directory, and no other file.

    One process does it, while none writes there.

    Args:
      directory: where `save` kept them; it need not exist.

    Raises:
      OSError: a checkpoint cannot be deleted.

    Example:
      >>> jaxcomm.checkpoint.save("run", 100, {"w": jnp.ones(3)})
      >>> if jaxcomm.rank() == 0:
      ...     jaxcomm.checkpoint.clear("run")
      >>> jaxcomm.barrier()
      >>> jaxcomm.checkpoint.steps("run")
      []
    """
    store.clear(Path(directory))


class _Proposal(NamedTuple):
    """What a rank is about to save: plain data, as JSON holds it.

    Attributes:
      options: what `save` was given beside the state, step included.
      leaves: path -> kind, shape and dtype.
      digests: path -> SHA-256 of the values; empty where they are not compared.
    """

    options: dict[str, Any]
    leaves: dict[str, list[Any]]
    digests: dict[str, str]


def _propose(
    step: int,
    state: Any,
    keep: int,
    settings: Mapping[str, Any] | None,
    compare: str,
    several: bool,
) -> _Proposal:
    _check_step(step)
    if keep < 1:
        raise InvalidOptionError(f"keep={keep}; give how many to keep, at least 1")
    if compare not in _COMPARED:
        raise InvalidOptionError(
            f"compare={compare!r}; use one of {', '.join(_COMPARED)}"
        )
    options = {"keep": keep, "compare": compare, "settings": _plain(settings)}
    hashed = several and compare == "values"
    return _Proposal(
        {"step": step, **options},
        snapshot.specs(state),
        snapshot.digests(state) if hashed else {},
    )


def _agree(
    step: Any,
    proposal: _Proposal | None,
    error: JaxcommError | None,
    comm: Communicator,
) -> None:
    """Raise on every rank unless all of them propose the same."""
    text = json.dumps(proposal, sort_keys=True)
    found = comm.all_gather_object(
        (str(error or ""), hashlib.sha256(text.encode()).digest())
    )
    if isinstance(error, InvalidOptionError):
        raise error
    failures = _by_value([failure for failure, _ in found])
    if failure := next(filter(None, failures), ""):
        ranks = failures[failure]
        who = f"{rank_names(ranks)}: " if len(ranks) < comm.size else ""
        raise CheckpointError(f"step {step} was not saved: {who}{failure}.")
    if len({digest for _, digest in found}) > 1:
        every = [
            _Proposal(*row) for row in comm.all_gather_object(tuple(proposal or ()))
        ]
        raise CheckpointError(f"{_disagreement(every)} Nothing was written.")


def _disagreement(every: Sequence[_Proposal]) -> str:
    """Say what differs first between the ranks' proposals, and the remedy."""
    steps = _by_value([one.options["step"] for one in every])
    if len(steps) > 1:
        who = _each(steps, lambda n: f"at step {n}")
        return f"the ranks save different steps ({who}): all must call save together."
    step = next(iter(steps))
    head = f"step {step} was not saved, because the ranks differ: "
    for name in ("keep", "compare"):
        values = _by_value([one.options[name] for one in every])
        if len(values) > 1:
            return f"{head}{name} is {_each(values, repr)}. Give all ranks the same."
    settings = [one.options["settings"] for one in every]
    for name in _names(settings):
        values = _by_value([repr(one.get(name)) for one in settings])
        if len(values) > 1:
            who = _each(values, str)
            return f"{head}the setting {name} is {who}. Give all ranks the same."
    leaves = [one.leaves for one in every]
    for path in _names(leaves):
        kinds = _by_value(
            [snapshot.words(one[path]) if path in one else "missing" for one in leaves]
        )
        if len(kinds) > 1:
            who = _each(kinds, str)
            return f"{head}leaf {path} is {who}. All must save the same structure."
    digests = [one.digests for one in every]
    different = [p for p in _names(digests) if len({one[p] for one in digests}) > 1]
    path = different[0]
    values = _by_value([one[path] for one in digests])
    return (
        f"{head}leaf {path} has other values ({_each(values, lambda d: d[:8])}); "
        f"{len(different)} of {len(leaves[0])} leaves differ. Only rank 0's would come "
        "back: send one rank's values with jaxcomm.broadcast and reduce batch "
        'statistics before, or give compare="structure" if rank 0\'s will do for all.'
    )


def _by_value(values: Sequence[Any]) -> dict[Any, list[int]]:
    """Return which ranks have each value."""
    ranks: dict[Any, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return ranks


def _each(values: dict[Any, list[int]], show: Callable[[Any], str]) -> str:
    parts = [f"{rank_names(ranks)} {show(value)}" for value, ranks in values.items()]
    shown = parts[:_SHOWN_VARIANTS]
    return "; ".join([*shown, "..."] if len(parts) > len(shown) else shown)


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _choose(directory: Path, step: int | None, fallback: bool) -> store.Content | None:
    there = store.steps(directory)
    if step is not None:
        if step not in there:
            raise CheckpointError(
                f"{directory} holds no checkpoint of step {step}, but of {there}"
            )
        there = [step]
    damaged = []
    for number in reversed(there):
        try:
            content = store.check(directory, number)
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
            log.warning("renamed to %s", store.set_aside(directory, bad))
        return content
    return None


def _why_not_saved(directory: Path, step: int, error: Exception) -> str:
    try:
        last = store.steps(directory)[-1:]
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
    there = store.steps(directory)
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
    directory: Path, chosen: store.Content | None, comm: Communicator
) -> dict[str, np.ndarray]:
    """Return the arrays on every rank; rank 0 reads what it has chosen."""
    arrays: dict[str, np.ndarray] = {}

    def read() -> list[tuple[str, tuple[int, ...], str]]:
        assert chosen is not None
        arrays.update(store.read(directory, chosen))
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
        np.asarray(reductions.broadcast(data[start : start + _PIECE_BYTES], comm=comm))
        for start in range(0, len(data), _PIECE_BYTES)
    ]
    return np.concatenate(pieces).view(dtype).reshape(shape)
