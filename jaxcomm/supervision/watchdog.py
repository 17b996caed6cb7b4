"""The watchdog: a thread beside a rank's collectives that does not let them hang.

It reads what the native library writes down when a call begins and ends, which costs
the call a few stores. A rank that waits for longer than a second tells rank 0 where;
if two ranks can never meet, the job ends at once. So it does when two ranks have made
different calls and met nevertheless. Otherwise the watchdog warns of what lasts, and at
last ends the job with a report of all ranks.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from jaxcomm import native
from jaxcomm.ranks.deadline import rank_names
from jaxcomm.ranks.hosts import mpi_library
from jaxcomm.supervision import abort, reports
from jaxcomm.supervision.call_history import History

log = logging.getLogger(__name__)

WARN_AFTER, ABORT_AFTER = 60.0, 600.0  # of the watchdog, unless said otherwise
STALLED = native.STALLED  # exit code of a job that the watchdog ended
_TELL_AFTER = 1.0
_ANSWER_SECONDS = 5.0  # at most
_DUMP_SECONDS = 2.0  # for a rank to write its stacks itself
_ASK, _ANSWER, _WAITS, _ENDED, _MARKS, _LAST = range(1, 7)  # message tags


class Watchdog:
    """Looks after one process's collectives over MPI, and its host-side exchanges.

    Every rank's watchdog answers the others on a communicator of their own, which works
    while all other threads wait. One that does not answer is stopped, has ended, or
    runs code that holds the interpreter.
    """

    def __init__(
        self,
        comm: Any,
        channel: Any,
        describe: reports.Describe,
        warn_after: float,
        abort_after: float,
    ):
        # All but `_stop` is used by the watchdog's own thread alone.
        self._describe = describe  # a call, in words
        # MPI among the watchdogs; the exchanges that are watched; MPI's lock.
        self._comm, self._channel, self._turn = comm, channel, channel.turn
        self._rank, self._size = comm.Get_rank(), comm.Get_size()
        self._warn_after, self._abort_after = warn_after, abort_after
        limits = [t for t in (warn_after, abort_after) if t > 0]
        self._period = min([1.0, *(t / 5 for t in limits)])
        self._answer_seconds = min(_ANSWER_SECONDS, max(abort_after / 3, 3.0))
        mpi_library.describe()  # while MPI answers; it remembers
        # Of all ranks: who does not answer is asked by a signal where it waits.
        self._processes = comm.allgather(reports.Process.own(self._rank, self._size))
        # (communicator, call) of the last warning, and of what rank 0 was last told.
        self._warned: tuple[int, int] | None = None
        self._told: tuple[int, int] | None = None
        self._ledger = reports.Ledger()  # rank 0's: where all ranks wait
        self._history = History()  # hashes of calls, of this rank and the one before
        self._before = 0  # the rank whose hashes were heard last
        self._held = 0.0  # until when this rank does not report
        self._asked: list[Any] = []  # MPI requests of messages under way
        self._stop = threading.Event()  # set by `stop`, on the main thread
        _before_finalize(self.stop)
        self._thread = threading.Thread(
            target=self._run, name="jaxcomm watchdog", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Wait until all ranks have come to their end; before MPI ends.

        A rank that has made fewer calls than another waits for, or other ones, is found
        out here.
        """
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._period):
            self._answer()
            self._look()
            self._compare()
        self._tell(_ENDED, {c.comm: c.number for c in self._calls()})
        self._send(_LAST, (self._rank + 1) % self._size, self._history.news())
        with self._turn():
            everyone = self._comm.Ibarrier()
        ended = heard = False
        since, silent = time.monotonic(), set[int]()
        while not (ended and heard):
            self._answer()
            late = time.monotonic() - since - min(0.3 * self._rank, 5.0)
            if 0 < self._abort_after < late and time.monotonic() > self._held:
                silent = self._ask_the_silent(silent)
                since = time.monotonic() - self._abort_after / 2
            for before, marks in self._receive(_LAST):
                heard = True
                self._hear(before, marks)
            self._compare()
            time.sleep(0.01)
            with self._turn():
                ended = ended or everyone.Test()

    def _ask_the_silent(self, before: set[int]) -> set[int]:
        """At the end, return who does not answer; end the job for who did not before.

        A rank that is still busy answers, and may be so for as long as it likes.
        """
        silent = set(range(self._size)) - set(self._ask())
        if gone := silent & before:
            self._refuse(
                f"jaxcomm: the program has ended on rank {self._rank} of {self._size}, "
                f"and there is no answer from {rank_names(sorted(gone))}: stopped, out "
                "of memory, or its interpreter is held; so the job ends.\n",
                gone,
            )
        return silent

    def _calls(self) -> tuple[reports.Call, ...]:
        return reports.look(self._channel, self._describe).calls

    def _tell(self, tag: int, what: Any) -> None:
        """Let rank 0 know."""
        if self._rank == 0:
            self._enter(tag, 0, what)
        else:
            self._send(tag, 0, what)

    def _send(self, tag: int, rank: int, what: Any) -> None:
        with self._turn():
            # Soon received, or the job ends.
            self._asked = [r for r in self._asked if not r.test()[0]]
            self._asked.append(self._comm.isend(what, rank, tag))

    def _enter(self, tag: int, rank: int, what: Any) -> None:
        if tag == _WAITS:
            self._ledger.waits(rank, what)
        else:
            self._ledger.ended(rank, what)

    def _compare(self) -> None:
        """End the job if two ranks can never meet, or have met by mistake."""
        if news := self._history.news():
            self._send(_MARKS, (self._rank + 1) % self._size, news)
        for before, marks in self._receive(_MARKS):
            self._hear(before, marks)
        different = self._history.difference()
        if different is not None:
            pair = sorted([self._before, self._rank])
            self._refuse(
                reports.refusal(
                    f"{rank_names(pair)} made different calls, the first {different}",
                    [],
                )
            )
        if self._rank == 0:
            self._compare_waits()

    def _hear(self, before: int, marks: Any) -> None:
        self._history.hear(marks)
        self._before = before

    def _compare_waits(self) -> None:
        for tag in (_WAITS, _ENDED):
            for rank, what in self._receive(tag):
                self._enter(tag, rank, what)
        if self._ledger.contradiction() is None:
            return
        # Others that wait as well speak up meanwhile.
        time.sleep(0.3)
        for rank, call in self._receive(_WAITS):
            self._ledger.waits(rank, call)
        text = self._ledger.contradiction()
        assert text is not None  # it does not go away
        self._refuse(text)

    def _refuse(self, text: str, silent: Iterable[int] = ()) -> None:
        sys.stdout.flush()
        sys.stderr.write(text)
        sys.stderr.flush()
        asked = [rank for rank in silent if self._processes[rank].ask_for_stacks()]
        if asked:
            time.sleep(_DUMP_SECONDS)
        abort.end_job(STALLED)

    def _look(self) -> None:
        waiting = [c for c in self._calls() if c.seconds is not None]
        if not waiting:
            return
        call = max(waiting, key=lambda c: c.seconds or 0.0)
        seconds = call.seconds or 0.0
        if seconds > _TELL_AFTER and self._told != (call.comm, call.number):
            self._told = (call.comm, call.number)
            self._tell(_WAITS, call)
        if 0 < self._warn_after < seconds and self._warned != (call.comm, call.number):
            self._warned = (call.comm, call.number)
            log.warning(
                "rank %d of %d has waited %.0f s for the other ranks in call %d: %s",
                self._rank,
                self._size,
                seconds,
                call.number,
                call.what,
            )
        # Ranks that wait alike would all report; the first one does it for them.
        late = seconds - min(0.3 * self._rank, 5.0)
        if 0 < self._abort_after < late and time.monotonic() > self._held:
            self._end(call)

    def _end(self, call: reports.Call) -> None:
        """Ask all ranks where they are, twice; if nothing moves, report and end."""
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
                self._rank,
                self._size,
                call.number,
                call.what,
                rank_names(moving),
            )
            return
        text = reports.report(self._rank, self._size, call, states)
        self._refuse(text, set(range(self._size)) - set(states))

    def _ask(self) -> dict[int, reports.State]:
        """Return the states of all ranks that answer."""
        others = [rank for rank in range(self._size) if rank != self._rank]
        with self._turn():
            # Some are perhaps never received; then the job ends.
            self._asked += [self._comm.isend(None, rank, _ASK) for rank in others]
        states = {self._rank: reports.look(self._channel, self._describe, stacks=True)}
        end = time.monotonic() + self._answer_seconds
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
            state = reports.look(self._channel, self._describe, stacks=True)
            with self._turn():
                request = self._comm.isend(state, rank, _ANSWER)
            end = time.monotonic() + self._answer_seconds
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


def _calls(state: reports.State) -> list[tuple[int, int]]:
    return [(call.comm, call.number) for call in state.calls]


def _before_finalize(call: Callable[[], None]) -> None:
    """Let MPI_Finalize, whoever calls it, begin with a call."""
    from mpi4py import MPI

    def deleted(comm: Any, keyval: int, value: Any) -> None:
        call()

    # What is attached to COMM_SELF is what MPI_Finalize frees first.
    MPI.COMM_SELF.Set_attr(MPI.Comm.Create_keyval(delete_fn=deleted), None)
