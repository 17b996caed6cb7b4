"""Memory that the ranks of one host share: one window for each rank."""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Callable
from typing import Any

import numpy as np

_NONCE_BYTES = 32


class SharedWindow:
    """Zero-filled windows of equal size; made by all ranks of `comm` together.

    Whatever fails on whichever rank, all ranks come to the same end: they have windows,
    or none of them has, and `failure` says why.

    Attributes:
      nbytes: size of one rank's window.
      addresses: where every rank's window lies in this process; empty where the ranks
        cannot share memory.
      failure: why they cannot, or "".
      crowded: whether there are more ranks than cores for them.
    """

    def __init__(self, comm: Any, nbytes: int, attach: Callable[[SharedWindow], None]):
        """Map windows of `nbytes` bytes or a little more.

        Args:
          comm: an MPI communicator.
          nbytes: of one rank's window.
          attach: begins to use the windows; called where all ranks have mapped them.
            If it raises on a rank, none has them.
        """
        self._comm, self._rank, self._size = comm, comm.Get_rank(), comm.Get_size()
        pages = -(-nbytes // mmap.PAGESIZE)
        self.nbytes = pages * mmap.PAGESIZE
        self.addresses: list[int] = []
        self.crowded, self.failure = False, ""
        self._file = -1
        try:
            cores: list[set[int]] = self._together(lambda: os.sched_getaffinity(0))
            self.crowded = len(set[int]().union(*cores)) < self._size
            made = self._together(self._create)[0]
            self._together(lambda: self._map(*made))
            self._together(lambda: attach(self))
        except _FailedError as error:
            self.failure = str(error)
            self.addresses = []
        finally:
            if self._file >= 0:
                os.close(self._file)

    def _together(self, step: Callable[[], Any]) -> list[Any]:
        """Return what a step gives on every rank; raise on all if it does on one."""
        mine, failure = None, ""
        try:
            mine = step()
        except Exception as error:  # the others wait to hear of it, whatever it is
            failure = f"rank {self._rank}: {type(error).__name__}: {error}"
        found = self._comm.allgather((mine, failure))
        for _, text in found:
            if text:
                raise _FailedError(text)
        return [result for result, _ in found]

    def _create(self) -> tuple[Any, ...] | None:
        """On rank 0, make the memory; return where it is and what it is."""
        if self._rank != 0:
            return None
        # Without a name: nothing is left behind, however a rank ends.
        self._file = os.memfd_create("jaxcomm")
        end = self._size * self.nbytes
        os.ftruncate(self._file, end + _NONCE_BYTES)
        nonce = secrets.token_bytes(_NONCE_BYTES)
        os.pwrite(self._file, nonce, end)
        return os.getpid(), self._file, _identity(os.fstat(self._file)), nonce

    def _map(self, pid: int, file: int, identity: Any, nonce: bytes) -> None:
        if self._rank != 0:
            self._file = self._open(f"/proc/{pid}/fd/{file}", identity, nonce)
        # Without memory for a page this fails, and not the first write to it. The rank
        # that asks for a page has it nearby.
        os.posix_fallocate(self._file, self._rank * self.nbytes, self.nbytes)
        # Kept as long as the process: custom calls may use it until the end.
        self._memory = np.frombuffer(
            mmap.mmap(self._file, self._size * self.nbytes), np.uint8
        )
        windows = self._memory.reshape(self._size, self.nbytes)
        self.addresses = [window.ctypes.data for window in windows]

    def _open(self, path: str, identity: Any, nonce: bytes) -> int:
        """Open the memory of rank 0 for writing, but no other file.

        Where ranks see other processes than each other, as in containers, the path is
        that of any file of any process. Nothing is opened that is not of the kind, the
        size and the number of what is looked for, and nothing for writing that does not
        hold what rank 0 has put there.
        """
        other = f"{path} is not the memory of rank 0: the ranks see other processes"
        if _identity(os.stat(path)) != identity:
            raise OSError(other)
        reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            same = _identity(os.fstat(reading)) == identity
            end = self._size * self.nbytes
            if not same or os.pread(reading, _NONCE_BYTES, end) != nonce:
                raise OSError(other)
            return os.open(f"/proc/self/fd/{reading}", os.O_RDWR)
        finally:
            os.close(reading)


class _FailedError(Exception):
    """A step has failed on some rank; raised on all of them."""


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_mode, status.st_dev, status.st_ino, status.st_size
