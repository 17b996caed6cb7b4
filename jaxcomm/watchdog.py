"""Waiting with an end: a rank that others do not join says so, then gives up.

Two kinds of waiting are watched. `wait` polls: the one-time schedule check. The
`Watchdog` is a thread beside a rank's collectives: it reads what the native library
writes down when a call begins and ends, which costs the call a few stores. It warns,
and at last ends the job with a report of all ranks.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from jaxcomm import _stall
from jaxcomm.errors import StallError

log = logging.getLogger(__name__)

WARN_SECONDS = 10.0
WARN_AFTER, ABORT_AFTER = 60.0, 600.0  # of the watchdog, unless said otherwise
STALLED = 70  # exit code of a job that the watchdog ended
_POLL_SECONDS = 0.001
_ANSWER_SECONDS = 5.0
_ASK, _ANSWER = 1, 2  # message tags


class Watchdog:
    """Looks after one process's collectives over MPI, and its host-side exchanges.

    Every rank's watchdog answers the others on a communicator of their own, which works
    while all other threads wait. One that does not answer is stopped, has ended, or
    runs code that holds the interpreter.
    """

    def __init__(self, comm: Any, channel: Any, warn_after: float, abort_after: float):
        self._comm, self._channel, self._turn = comm, channel, channel.turn
        self._rank, self._size = comm.Get_rank(), comm.Get_size()
        self._warn_after, self._abort_after = warn_after, abort_after
        limits = [t for t in (warn_after, abort_after) if t > 0]
        self._period = min([1.0, *(t / 5 for t in limits)])
        self._warned: tuple[int, int] | None = None
        self._held = 0.0  # until when this rank does not report
        self._asked: list[Any] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name="jaxcomm watchdog", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End the thread; before MPI ends."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._period):
            self._answer()
            self._look()

    def _look(self) -> None:
        waiting = [c for c in _stall.look(self._channel).calls if c.seconds is not None]
        if not waiting:
            return
        call = max(waiting, key=lambda c: c.seconds or 0.0)
        seconds = call.seconds or 0.0
        if 0 < self._warn_after < seconds and self._warned != (call.comm, call.number):
            self._warned = (call.comm, call.number)
            log.warning(
                "rank %d of %d has waited %.0f s for the other ranks in call %d: %s",
                *(self._rank, self._size, seconds, call.number, call.what),
            )
        # Ranks that wait alike would all report; the first one does it for them.
        late = seconds - min(0.3 * self._rank, 5.0)
        if 0 < self._abort_after < late and time.monotonic() > self._held:
            self._end(call)

    def _end(self, call: _stall.Call) -> None:
        """Ask all ranks where they are, twice; if nothing moves, report and end."""
        from jaxcomm.launch import abort

        states = self._ask()
        if self._stop.wait(min(max(self._abort_after / 10, 0.5), 10.0)):
            return
        before, states = states, self._ask()
        moving = [
            rank
            for rank, state in states.items()
            if rank in before and _calls(state) != _calls(before[rank])
        ]
        if moving:
            self._held = time.monotonic() + self._abort_after
            log.warning(
                "rank %d of %d still waits in call %d: %s; %s makes other calls",
                *(self._rank, self._size, call.number, call.what, rank_names(moving)),
            )
            return
        text = _stall.report(self._rank, self._size, call, states, rank_names)
        sys.stdout.flush()
        sys.stderr.write(text)
        abort.end_job(STALLED)

    def _ask(self) -> dict[int, _stall.State]:
        """Return the states of all ranks that answer."""
        others = [rank for rank in range(self._size) if rank != self._rank]
        with self._turn():
            # Some are perhaps never received; then the job ends.
            self._asked = [self._comm.isend(None, rank, _ASK) for rank in others]
        states = {self._rank: _stall.look(self._channel)}
        end = time.monotonic() + _ANSWER_SECONDS
        while len(states) < self._size and time.monotonic() < end:
            for rank, state in self._receive(_ANSWER):
                states[rank] = state
            self._answer()
            time.sleep(0.01)
        return states

    def _answer(self) -> None:
        for rank, _ in self._receive(_ASK):
            # It reports for all, and needs a moment.
            self._held = time.monotonic() + 2 * _ANSWER_SECONDS
            state = _stall.look(self._channel, stacks=True)
            with self._turn():
                request = self._comm.isend(state, rank, _ANSWER)
            end = time.monotonic() + _ANSWER_SECONDS
            while time.monotonic() < end:
                with self._turn():
                    done, _ = request.test()
                if done:
                    break
                time.sleep(0.01)

    def _receive(self, tag: int) -> list[tuple[int, Any]]:
        """Return (rank, object) of all messages that are there."""
        from mpi4py import MPI

        found = []
        while True:
            status = MPI.Status()
            with self._turn():
                if not self._comm.iprobe(MPI.ANY_SOURCE, tag, status):
                    return found
                source = status.Get_source()
                found.append((source, self._comm.recv(source=source, tag=tag)))


def _calls(state: _stall.State) -> list[tuple[int, int]]:
    return [(call.comm, call.number) for call in state.calls]


def wait(
    done: Callable[[], bool],
    timeout: float,
    *,
    who: str,
    what: str,
    late: Callable[[], str] | None = None,
) -> None:
    """Poll until `done()`; log after 10 s, give up after `timeout`.

    Args:
      done: tells whether the awaited thing has happened; called every millisecond,
        or as often as it returns.
      timeout: seconds.
      who: the waiting rank, as the message's subject.
      what: what it waits for, to follow "the other ranks to".
      late: asked at the end for a sentence about who has not come, where that is known.

    Raises:
      StallError: `timeout` seconds went by.
    """
    start = time.monotonic()
    warned = False
    while not done():
        waited = time.monotonic() - start
        if waited > WARN_SECONDS and not warned:
            warned = True
            log.warning("%s waits for the other ranks to %s", who, what)
        if waited > timeout:
            known = f" {late()}" if late else ""
            raise StallError(
                f"{who} waited {timeout:g} s for the other ranks to {what}.{known} A "
                "rank ended, runs another program or has not got here; every rank must "
                "call the same collectives in the same order. init(timeout=...) sets "
                "the time."
            )
        time.sleep(_POLL_SECONDS)


def rank_names(ranks: Sequence[int]) -> str:
    """Return "rank 3" or "ranks 0-2, 5" for ranks in rising order."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"
