"""One rank of a test of checkpoints: `checkpoint_ranks.py FOLDER`; asserts.

`checkpoint_ranks.py FOLDER disk`: on a small file system, until it is full.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomm
from jaxcomm import checkpoint
from jaxcomm.errors import CheckpointError, InvalidOptionError
from jaxcomm.ranks.communicator import Communicator

MEGABYTES = 6  # of the small disk


def some_state(rank: int, megabytes: int = 1) -> dict[str, Any]:
    """Different on every rank, and hard to compress."""
    rng = np.random.default_rng(rank)
    return {
        "w": jnp.asarray(rng.normal(size=(megabytes << 17, 2)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=3), jnp.bfloat16),
        "key": jax.random.key(rank),
        "numpy": rng.normal(size=5),  # float64, which JAX would not keep
        "nothing": jnp.zeros((0, 2)),
        "step": rank,
    }


def raised(*, holding: str, call: Any) -> None:
    """Assert that a call raises the same on every rank."""
    text = ""
    try:
        call()
    except CheckpointError as error:
        text = str(error)
    assert holding in text, (holding, text)
    assert len(set(jaxcomm.world().all_gather_object(text))) == 1, text


@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes: a quota, for who may mount nothing."""
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, previous)


def main() -> None:
    comm, folder = jaxcomm.init(), Path(sys.argv[1])
    fill_a_disk(folder, comm.rank) if sys.argv[2:] else check_all(comm, folder)
    print("all checked", flush=True)


def check_all(comm: Communicator, folder: Path) -> None:
    rank, other = comm.rank, comm.size - 1
    mine, root = some_state(rank), some_state(0)

    # Nobody else's directory is looked at, and where the ranks may differ, all get rank
    # 0's values.
    own = folder / "checkpoints" if rank == 0 else folder / "none"
    checkpoint.save(own, 10, mine, settings={"lr": 0.1}, compare="structure")
    found = checkpoint.restore(own, mine, settings={"lr": 0.1})
    assert found is not None and found.step == 10
    same = jax.tree.map(
        lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(),
        {name: x for name, x in found.state.items() if name != "key"},
        {name: x for name, x in root.items() if name != "key"},
    )
    assert all(jax.tree.leaves(same)), same
    assert type(found.state["numpy"]) is np.ndarray
    assert found.state["numpy"].flags.writeable
    assert found.state["step"] == 0
    jaxcomm.assert_replicated({"w": found.state["w"], "key": found.state["key"]})

    # What one rank finds wrong, all raise.
    assert checkpoint.restore(folder / "none", mine) is None
    odd = {**mine, "b": jnp.zeros(4)} if rank == other else mine
    raised(
        holding="leaf ['b'] is float32[4] and was bfloat16[3]",
        call=lambda: checkpoint.restore(own, odd),
    )
    raised(
        holding="lr is 0.2 and was 0.1",
        call=lambda: checkpoint.restore(own, mine, settings={"lr": 0.2}),
    )
    ranks_that_differ(own, comm)

    # A disk that is too small leaves the last one whole, and is no half-written one.
    with file_limit(1 << 19):
        raised(
            holding="The checkpoint of step 10 is untouched. Make room there",
            call=lambda: checkpoint.save(own, 20, root),
        )
    assert checkpoint.restore(own, mine).step == 10  # pyright: ignore
    checkpoint.save(own, 20, root)
    assert checkpoint.restore(own, mine).step == 20  # pyright: ignore

    # Damage, too, is known to all.
    if rank == 0:
        manifest = own / "step-00000020" / "MANIFEST"
        manifest.write_bytes(manifest.read_bytes()[:-1])
    raised(holding="MANIFEST is damaged", call=lambda: checkpoint.restore(own, mine))
    found = checkpoint.restore(own, mine, fallback=True)
    assert found is not None and found.step == 10


def ranks_that_differ(own: Path, comm: Communicator) -> None:
    """One rank is about to save something else: nothing is written or deleted."""
    other = comm.size - 1
    odd = comm.rank == other
    rest = "rank 0" if other == 1 else f"ranks 0-{other - 1}"
    state = some_state(0)
    key = state["key"]

    def bad(**change: Any) -> dict[str, Any]:
        return {**state, **change} if odd else state

    not_saved = "step 20 was not saved, because the ranks differ: "
    structure = ". All must save the same structure. Nothing was written."
    states = {
        # Another tree.
        f"leaf ['more'] is {rest} missing; rank {other} float32[1]{structure}": bad(
            more=jnp.ones(1)
        ),
        f"leaf ['b'] is {rest} bfloat16[3]; rank {other} missing{structure}": {
            name: leaf for name, leaf in state.items() if not odd or name != "b"
        },
        # Another shape, dtype or kind.
        f"leaf ['b'] is {rest} bfloat16[3]; rank {other} bfloat16[4]": bad(
            b=jnp.zeros(4, jnp.bfloat16)
        ),
        f"leaf ['b'] is {rest} bfloat16[3]; rank {other} float32[3]": bad(
            b=state["b"].astype(jnp.float32)
        ),
        f"leaf ['step'] is {rest} the number int; rank {other} int32[]": bad(
            step=jnp.int32(0)
        ),
        # Other values, if only in the last bit.
        "leaf ['w'] has other values": bad(
            w=state["w"].at[-1, -1].set(jnp.nextafter(state["w"][-1, -1], 9))
        ),
        "leaf ['key'] has other values": bad(key=jax.random.fold_in(key, 1)),
        "leaf ['step'] has other values": bad(step=1),
        "leaf ['numpy'] has other values": bad(numpy=-state["numpy"]),
    }
    calls: dict[str, Callable[[], None]] = {
        not_saved + text: functools.partial(checkpoint.save, own, 20, tree)
        for text, tree in states.items()
    }
    save = functools.partial(checkpoint.save, own, state=state)
    calls |= {
        f"save different steps ({rest} at step 11; rank {other} at step 12)": (
            lambda: save(step=11 + odd)
        ),
        f"{not_saved}keep is {rest} 1; rank {other} 2": lambda: save(
            step=20, keep=1 + odd
        ),
        f"{not_saved}the setting lr is {rest} 0.1; rank {other} 0.2": lambda: save(
            step=20, settings={"lr": 0.2 if odd else 0.1}
        ),
        f"{not_saved}compare is {rest} 'values'; rank {other} 'structure'": lambda: (
            save(step=20, compare="structure" if odd else "values")
        ),
        # What one rank cannot save, nobody saves.
        f"step 20 was not saved: rank {other}: leaf ['b'] is object": (
            lambda: checkpoint.save(own, 20, bad(b=object()))
        ),
    }
    before = sorted(os.listdir(own)) if own.exists() else None
    for text, call in calls.items():
        raised(holding=text, call=call)
    # An unusable option of one rank, too, ends the call on all.
    try:
        save(step=20, keep=0 if odd else 3)
    except InvalidOptionError as error:
        assert odd and "keep=0" in str(error)
    except CheckpointError as error:
        assert not odd and f"rank {other}: keep=0" in str(error), error
    else:
        raise AssertionError("saved")
    assert (sorted(os.listdir(own)) if own.exists() else None) == before
    found = checkpoint.restore(own, state)
    assert found is not None and found.step == 10


def fill_a_disk(disk: Path, rank: int) -> None:
    """Save until the disk is full; the last one that was saved comes back."""
    saved = 0
    for step in range(1, 2 * MEGABYTES):
        try:
            checkpoint.save(disk / "new", step, some_state(step), keep=99)
        except CheckpointError as error:
            assert f"step {saved} is untouched" in str(error), error
            break
        saved = step
    assert 2 < saved < 2 * MEGABYTES - 1
    found = checkpoint.restore(disk / "new", some_state(rank))
    assert found is not None and found.step == saved
    assert np.array_equal(found.state["w"], some_state(saved)["w"])
    if rank == 0:
        # Nothing of the failed attempt takes up room.
        assert len(os.listdir(disk / "new")) == saved


if __name__ == "__main__":
    main()
