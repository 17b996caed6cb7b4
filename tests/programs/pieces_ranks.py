"""Arrays that are too large for one call: `pieces_ranks.py FOLDER`; all ranks run it.

MPI moves at most 1 GiB at a time, and a checkpoint's arrays are sent 32 MiB at a time.
Here both are a few bytes: pieces begin and end within elements.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxcomm
from jaxcomm import checkpoint, native
from jaxcomm.ranks.communicator import Communicator
from tests.programs.references import same

PIECE = 1001  # bytes
# Of elements of four bytes: less than a piece, and several with and without a rest.
COUNTS = (250, PIECE, 2 * PIECE + 7)


def data(rank: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return one rank's numbers: no two alike, nor like another's."""
    count = int(np.prod(shape))
    return (np.arange(count, dtype=np.int32) + 1_000_003 * (rank + 1)).reshape(shape)


def check_broadcast(comm: Communicator) -> None:
    for count in COUNTS:
        for root in range(comm.size):
            before = comm.counters()["mpi_broadcast"]
            out = jaxcomm.broadcast(data(comm.rank, (count,)), root=root)
            same(out, data(root, (count,)))
            pieces = comm.counters()["mpi_broadcast"] - before
            assert pieces == -(-4 * count // PIECE), pieces


def check_gather(comm: Communicator) -> None:
    for count in COUNTS:
        out = jaxcomm.all_gather(data(comm.rank, (count,)))
        same(out, np.stack([data(r, (count,)) for r in range(comm.size)]))


def check_exchange(comm: Communicator) -> None:
    for count in COUNTS:
        out = jaxcomm.all_to_all(data(comm.rank, (comm.size, count)))
        every = [data(r, (comm.size, count)) for r in range(comm.size)]
        same(out, np.stack([x[comm.rank] for x in every]))


def check_permutation(comm: Communicator) -> None:
    n = comm.size

    @jaxcomm.data_parallel
    def step(x: Any) -> Any:
        around = lax.ppermute(x, "batch", [(r, (r + 1) % n) for r in range(n)])
        return around, lax.ppermute(x, "batch", [(0, n - 1)])

    for count in COUNTS:
        around, one = step(data(comm.rank, (count,)))
        same(around, data((comm.rank - 1) % n, (count,)))
        none = np.zeros(count, np.int32)
        same(one, data(0, (count,)) if comm.rank == n - 1 else none)


def check_checkpoint(comm: Communicator, folder: Path) -> None:
    checkpoint._PIECE_BYTES = PIECE
    state = {
        "large": jnp.asarray(data(comm.rank, (2 * PIECE + 7, 3))),
        "whole": np.arange(4 * PIECE, dtype=np.int8) + np.int8(comm.rank),
        "small": data(comm.rank, (5,)),
    }
    checkpoint.save(folder, 1, state, compare="structure")
    before = comm.counters()["mpi_broadcast"]
    found = checkpoint.restore(folder, state)
    assert found is not None
    sent = comm.counters()["mpi_broadcast"] - before
    assert sent == -(-12 * (2 * PIECE + 7) // PIECE) + 4 + 1, sent
    same(found.state["large"], data(0, (2 * PIECE + 7, 3)))
    same(found.state["whole"], np.arange(4 * PIECE, dtype=np.int8))
    same(found.state["small"], data(0, (5,)))


def main(folder: str) -> None:
    comm = jaxcomm.init("mpi")
    # Not in pieces at first.
    before = comm.counters()["mpi_broadcast"]
    same(jaxcomm.broadcast(data(comm.rank, (COUNTS[-1],))), data(0, (COUNTS[-1],)))
    assert comm.counters()["mpi_broadcast"] - before == 1
    native.load().jaxcomm_limit_pieces(comm.key, PIECE)
    check_broadcast(comm)
    check_gather(comm)
    check_exchange(comm)
    check_permutation(comm)
    check_checkpoint(comm, Path(folder, "checkpoints"))
    print("all checked", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
