"""One rank of a test of checkpoints: `checkpoint_ranks.py FOLDER`; asserts.

`checkpoint_ranks.py FOLDER disk`: on a small file system, until it is full.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomm
from jaxcomm import checkpoint
from jaxcomm.communicator import Communicator
from jaxcomm.errors import CheckpointError

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

    # All get rank 0's values, and nobody else's directory is looked at.
    own = folder / "checkpoints" if rank == 0 else folder / "none"
    checkpoint.save(own, 10, mine, settings={"lr": 0.1})
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
    raised(
        holding=f"rank {other} at step 12",
        call=lambda: checkpoint.save(
            folder / "different", 11 + (rank == other), {"x": 1}
        ),
    )

    # A disk that is too small leaves the last one whole, and is no half-written one.
    with file_limit(1 << 19):
        raised(
            holding="The checkpoint of step 10 is untouched. Make room there",
            call=lambda: checkpoint.save(own, 20, mine),
        )
    assert checkpoint.restore(own, mine).step == 10  # pyright: ignore
    checkpoint.save(own, 20, mine)
    assert checkpoint.restore(own, mine).step == 20  # pyright: ignore

    # Damage, too, is known to all.
    if rank == 0:
        manifest = own / "step-00000020" / "MANIFEST"
        manifest.write_bytes(manifest.read_bytes()[:-1])
    raised(holding="MANIFEST is damaged", call=lambda: checkpoint.restore(own, mine))
    found = checkpoint.restore(own, mine, fallback=True)
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
