"""Memory that the ranks of one host share: one window for each rank."""

from __future__ import annotations

import mmap
import os
from typing import Any

import numpy as np

from jaxcomm import native


class SharedWindow:
    """Zero-filled windows of equal size; made by all ranks of `comm` together.

    Attributes:
      nbytes: size of one rank's window.
      addresses: where every rank's window lies in this process; empty where the ranks
        cannot share memory.
      failure: why they cannot, or "".
      crowded: whether there are more ranks than cores for them.
    """

    def __init__(self, comm: Any, budget: int):
        """Map windows whose slots take at most `budget` bytes."""
        rank, size = comm.Get_rank(), comm.Get_size()
        slot = min(budget // native.SLOTS, native.MAX_SLOT_BYTES)
        wanted = native.CONTROL_BYTES + native.SLOTS * slot
        self.nbytes = -(-wanted // mmap.PAGESIZE) * mmap.PAGESIZE
        cores = set().union(*comm.allgather(os.sched_getaffinity(0)))
        self.crowded = len(cores) < size

        # Memory without a name: nothing is left behind, however a rank ends. The others
        # open it through the process of rank 0, which works in one container, where
        # they also see each other's files.
        file, failure = -1, ""
        try:
            if rank == 0:
                file = os.memfd_create("jaxcomm")
                os.ftruncate(file, size * self.nbytes)
            owner = comm.bcast((os.getpid(), file))
            if rank != 0:
                file = os.open(f"/proc/{owner[0]}/fd/{owner[1]}", os.O_RDWR)
            # Kept as long as the process: custom calls may use it until the end.
            self._memory = np.frombuffer(mmap.mmap(file, size * self.nbytes), np.uint8)
        except OSError as error:
            failure = f"rank {rank}: {error}"
        failures = [text for text in comm.allgather(failure) if text]
        if file >= 0:
            os.close(file)  # after all have opened it
        self.failure = failures[0] if failures else ""
        self.addresses: list[int] = []
        if not failures:
            windows = self._memory.reshape(size, self.nbytes)
            windows[rank] = 0  # the first to touch a page has it nearby
            comm.Barrier()
            self.addresses = [window.ctypes.data for window in windows]
