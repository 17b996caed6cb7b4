"""Python objects between ranks, on an MPI communicator of their own."""

from __future__ import annotations

import contextlib
import pickle
import time
from collections.abc import Callable, Generator
from typing import Any

import numpy as np

from jaxcomm import native
from jaxcomm.errors import StallError
from jaxcomm.ranks import deadline
from jaxcomm.ranks.fault import Fault

_POLL_SECONDS = 50e-6
_PARTING_TAG = 8
_PARTING_BYTES = 1000  # so little is sent without the receiver's help

# Requests that nobody waits for any more, with their buffers: MPI may still complete
# them, and takes no collective back.
abandoned: list[Any] = []


class HostChannel:
    """Blocking exchange of picklable objects.

    Where MPI allows one thread at a time (MPI_THREAD_SERIALIZED), every exchange is
    started and then tested for its end, the lock being free in between: a custom call
    on one of XLA's threads may be what the other ranks wait for.
    """

    def __init__(self, comm: Any, fault: Fault):
        from mpi4py import MPI

        self._comm, self.fault = comm, fault
        # For the watchdog's thread, which only reads them: which exchange this is, of
        # what kind, and since when (ns of time.monotonic_ns; 0 between exchanges).
        self.count, self.what, self.entered = 0, "", 0
        # Whether threads take turns in MPI.
        self._turns = MPI.Query_thread() < MPI.THREAD_MULTIPLE
        self.rank, self.size = comm.Get_rank(), comm.Get_size()

    @contextlib.contextmanager
    def _exchange(self, what: str) -> Generator[None]:
        self.fault.check()
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
        """Elementwise minimum over ranks; StallError after `timeout` seconds.

        A rank that gives up has sent its share already, with which a late one would go
        on. So a barrier follows: only where all ranks have the result does any return.
        """
        from mpi4py import MPI

        receive = np.empty_like(send)
        with self.fault.guard():
            self._join(
                lambda: self._comm.Iallreduce(send, receive, op=MPI.MIN), timeout, what
            )
            self._join(self._comm.Ibarrier, timeout, what)
        return receive

    def _join(self, start: Callable[[], Any], timeout: float, what: str) -> None:
        """Take part in a collective; who gives up leaves it behind."""
        with self.turn():
            request = start()
        try:
            self.wait(lambda: self._test(request), timeout, what)
        except BaseException:
            abandoned.append(request)  # it holds its buffers
            raise

    def wait(self, done: Callable[[], bool], timeout: float, what: str) -> None:
        """Poll until `done()`; StallError if this rank gives up, or another has.

        Args:
          done: tells whether the awaited thing has happened.
          timeout: seconds.
          what: what it is, to follow "the other ranks to".
        """
        who = f"rank {self.rank} of {self.size}"
        partings: list[str] = []

        def over() -> bool:
            partings.extend(self._partings())
            return bool(partings) or done()

        try:
            deadline.wait(over, timeout, who=who, what=what)
        except StallError as error:
            self._part(str(error))
            raise
        if partings:
            raise StallError(
                f"{who} was about to {what}, but another rank has given up: "
                f"{partings[0]}"
            )

    def _part(self, text: str) -> None:
        """Tell the other ranks that this one has given up, and why."""
        from mpi4py import MPI

        message = text.encode()[:_PARTING_BYTES]
        for rank in set(range(self.size)) - {self.rank}:
            with self.turn():
                request = self._comm.Isend([message, MPI.BYTE], rank, _PARTING_TAG)
            abandoned.append(request)  # some rank may never receive it

    def _partings(self) -> Generator[str]:
        """Return what ranks have said that gave up."""
        from mpi4py import MPI

        status = MPI.Status()
        message = bytearray(_PARTING_BYTES)
        with self.turn():
            while self._comm.Iprobe(MPI.ANY_SOURCE, _PARTING_TAG, status):
                self._comm.Recv(
                    [message, MPI.BYTE], status.Get_source(), _PARTING_TAG, status
                )
                count = status.Get_count(MPI.BYTE)
                yield message[:count].decode(errors="replace")

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
