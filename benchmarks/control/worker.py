"""The control plane's steps over MPI, timed.

mpiexec -n N python -m benchmarks.control.worker OUT LIBRARY REPEATS. Rank 0 writes OUT;
LIBRARY is made of steps.cc. Every sample is the slowest rank's, in microseconds.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from mpi4py import MPI

TENSORS = (33, 161)
REQUEST_BYTES = 132
STATUS_BITS = 3


class Cycle:
    """One negotiation cycle of each kind, for so many tensors on every rank."""

    def __init__(self, steps: ctypes.CDLL, tensors: int):
        self.comm, self.steps, self.tensors = MPI.COMM_WORLD, steps, tensors
        self.mine = np.zeros(tensors * REQUEST_BYTES, np.uint8)
        self.bits = np.full(-(-(tensors + STATUS_BITS) // 64), -1, np.int64)
        self.sizes = np.zeros(self.comm.size, np.int32)
        self.all = np.zeros(self.mine.nbytes * self.comm.size, np.uint8)
        # A fused response: a device of every rank, a name and size of every tensor.
        self.answer = np.zeros(4 * self.comm.size + 62 * tensors, np.uint8)

    def intersect(self) -> None:
        """AND the bit vectors of all ranks, as the response cache does."""
        self.comm.Allreduce(MPI.IN_PLACE, self.bits, op=MPI.BAND)

    def coordinate(self) -> None:
        """Send requests to rank 0, who counts them and answers."""
        comm, root = self.comm, self.comm.rank == 0
        data = self.mine.ctypes.data_as(ctypes.c_char_p)
        size = self.steps.write_requests(data, comm.rank, self.tensors)
        comm.Gather(np.int32(size), self.sizes if root else None)
        into = (self.all, (self.sizes, None)) if root else None
        comm.Gatherv(self.mine, into)
        if root:
            found = self.count(self.all, comm.size)
            assert found == self.tensors
        length = np.array(len(self.answer), np.int32)
        comm.Bcast(length)
        comm.Bcast(self.answer)

    def count(self, requests: np.ndarray, ranks: int) -> int:
        data = requests.ctypes.data_as(ctypes.c_char_p)
        return self.steps.count_requests(data, ctypes.c_int64(requests.nbytes), ranks)


def timed(what: Callable[[], object], repeats: int) -> list[float]:
    """Microseconds of every repeat, the slowest rank's."""
    comm, samples = MPI.COMM_WORLD, []
    for _ in range(repeats):
        comm.Barrier()
        start = time.perf_counter()
        what()
        samples.append(1e6 * (time.perf_counter() - start))
    slowest = np.array(samples)
    comm.Allreduce(MPI.IN_PLACE, slowest, op=MPI.MAX)
    return slowest.tolist()


def alone(steps: ctypes.CDLL, repeats: int) -> dict[str, list[float]]:
    """What rank 0's processor does at sizes that no two cores can hold.

    Returns:
      Nanoseconds per request by ranks, and nanoseconds per byte of cached responses.
    """
    found: dict[str, list[float]] = {}
    for ranks in (8, 512, 4096):
        tensors = 33
        cycle = Cycle(steps, tensors)
        requests = np.zeros((ranks, tensors * REQUEST_BYTES), np.uint8)
        for rank in range(ranks):
            data = requests[rank].ctypes.data_as(ctypes.c_char_p)
            steps.write_requests(data, rank, tensors)
        samples = []
        for _ in range(repeats):
            start = time.perf_counter()
            cycle.count(requests.ravel(), ranks)
            samples.append(1e9 * (time.perf_counter() - start) / (ranks * tensors))
        found[f"request, {ranks} ranks (ns)"] = samples
    for ranks in (512, 6000, 27600):
        samples = []
        for _ in range(repeats):
            start = time.perf_counter()
            steps.copy_responses(161, ranks, 8)
            total = 8 * 161 * 4 * ranks
            samples.append(1e9 * (time.perf_counter() - start) / total)
        found[f"cached responses, {ranks} ranks (ns/byte)"] = samples
    return found


def main(out: str, library: str, repeats: str) -> None:
    """Time every kind of cycle on this job's ranks."""
    comm, steps, samples = MPI.COMM_WORLD, ctypes.CDLL(library), {}
    steps.write_requests.restype = ctypes.c_int64
    for tensors in TENSORS:
        cycle = Cycle(steps, tensors)
        for kind in (cycle.intersect, cycle.coordinate):
            timed(kind, 20)
            samples[f"{kind.__name__}, {tensors} tensors (us)"] = timed(
                kind, int(repeats)
            )
    if comm.size == 2 and comm.rank == 0:
        samples |= alone(steps, 15)
    if comm.rank == 0:
        Path(out).write_text(json.dumps(samples))


if __name__ == "__main__":
    main(*sys.argv[1:])
