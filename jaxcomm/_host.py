"""Python objects between ranks, on an MPI communicator of their own."""

from __future__ import annotations

import contextlib
import pickle
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxcomm import _waiting, native

_POLL_SECONDS = 50e-6


class HostChannel:
    """Blocking exchange of picklable objects.

    Where MPI allows one thread at a time (MPI_THREAD_SERIALIZED), every exchange is
    started and then tested for its end, the lock being free in between: a custom call
    on one of XLA's threads may be what the other ranks wait for.
    """

    def __init__(self, comm: Any):
        from mpi4py import MPI

        self._comm = comm
        # For the watchdog: which exchange this is, of what kind, and since when.
        self.count, self.what, self.entered = 0, "", 0
        self._turns = MPI.Query_thread() < MPI.THREAD_MULTIPLE
        self.rank, self.size = comm.Get_rank(), comm.Get_size()

    @contextlib.contextmanager
    def _exchange(self, what: str) -> Iterator[None]:
        self.count, self.what = self.count + 1, what
        self.entered = time.monotonic_ns()
        try:
            yield
        finally:
            self.entered = 0

    def barrier(self) -> None:
        with self._exchange("barrier"):
            if not self._turns:
                self._comm.Barrier()
            else:
                self._finish(self._comm.Ibarrier)

    def broadcast(self, obj: Any, root: int) -> Any:
        with self._exchange("broadcast of an object"):
            return self._broadcast(obj, root)

    def all_gather(self, obj: Any) -> list[Any]:
        with self._exchange("gathering of objects"):
            return self._all_gather(obj)

    def _broadcast(self, obj: Any, root: int) -> Any:
        if not self._turns:
            return self._comm.bcast(obj, root)
        own = pickle.dumps(obj) if self.rank == root else b""
        length = np.array([len(own)], np.int64)
        self._finish(lambda: self._comm.Ibcast(length, root))
        data = np.frombuffer(own, np.uint8).copy()
        if self.rank != root:
            data = np.empty(length[0], np.uint8)
        self._finish(lambda: self._comm.Ibcast(data, root))
        return pickle.loads(data.tobytes())

    def _all_gather(self, obj: Any) -> list[Any]:
        if not self._turns:
            return self._comm.allgather(obj)
        from mpi4py import MPI

        own = np.frombuffer(pickle.dumps(obj), np.uint8).copy()
        lengths = np.empty(self.size, np.int64)
        mine = np.array([len(own)], np.int64)
        self._finish(lambda: self._comm.Iallgather(mine, lengths))
        data = np.empty(int(lengths.sum()), np.uint8)
        starts = [0, *np.cumsum(lengths)[:-1].tolist()]
        into = [data, (lengths.tolist(), starts), MPI.BYTE]
        self._finish(lambda: self._comm.Iallgatherv(own, into))
        ends = np.cumsum(lengths)
        return [
            pickle.loads(data[start:end].tobytes())
            for start, end in zip(starts, ends, strict=True)
        ]

    def reduce_min(self, send: np.ndarray, timeout: float, what: str) -> np.ndarray:
        """Elementwise minimum over ranks; StallError after `timeout` seconds."""
        from mpi4py import MPI

        receive = np.empty_like(send)
        with self.turn():
            request = self._comm.Iallreduce(send, receive, op=MPI.MIN)
        _waiting.wait(
            lambda: self._test(request),
            timeout,
            who=f"rank {self.rank} of {self.size}",
            what=what,
        )
        return receive

    def turn(self) -> contextlib.AbstractContextManager[None]:
        """Hold MPI where threads take turns in it."""
        return native.mpi_turn() if self._turns else contextlib.nullcontext()

    def _test(self, request: Any) -> bool:
        with self.turn():
            return request.Test()

    def _finish(self, start: Callable[[], Any]) -> None:
        with self.turn():
            request = start()
        while not self._test(request):
            time.sleep(_POLL_SECONDS)
