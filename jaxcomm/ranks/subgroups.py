"""Before a subgroup is made over MPI, its members see that they mean the same one.

MPI's own call would wait for ever. Internal to `fabric`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from jaxcomm.errors import ScheduleMismatchError
from jaxcomm.ranks.hosts import mpi

_TAG = 7
# How long a verdict may be under way after those that it lets go on.
_GRACE_SECONDS = 2.0
_Turn = Callable[[], contextlib.AbstractContextManager[None]]
_Wait = Callable[[Callable[[], bool], str], None]


# About which lists, and a verdict: None asks for one, "" says that all agree.
_Message = tuple[tuple[list[int], ...], str | None]


class Comparison:
    """Compares the members of subgroups of one communicator, one after another."""

    def __init__(self, comm: Any, turn: _Turn, wait: _Wait):
        """Send over an MPI communicator.

        Args:
          comm: MPI communicator of which the members are ranks.
          turn: held around MPI calls.
          wait: polls a function until it returns True; is told what for, and gives up
            with a StallError.
        """
        self._comm, self._turn, self._wait = comm, turn, wait
        # Of other subgroups, from ranks that are ahead of this one.
        self._early: list[tuple[int, _Message]] = []

    def compare(self, members: Sequence[int]) -> None:
        """Compare lists of members: all of them call this, each with its own.

        The lowest rank hears from the others and answers them. Everyone's next rank
        hears too, so that one with another idea of who is the lowest finds out. Two
        ranks that ask for different lists, each with the other in it, wait for each
        other: whoever finds that out tells everyone in either. A rank that asks for
        another list after this one, or for one that this rank comes to later, does not.

        Args:
          members: distinct ranks, this one among them.

        Raises:
          ScheduleMismatchError: a list differs; on every rank in either.
          StallError: a member does not come.
        """
        own, rank = list(members), self._comm.Get_rank()
        ring, leader = sorted(own), min(own)
        place = ring.index(rank)
        following, preceding = ring[(place + 1) % len(own)], ring[place - 1]
        here = {rank}
        verdict: str | None = None
        sent: list[Any] = []
        start = time.monotonic()

        def send(message: _Message, ranks: Iterable[int]) -> None:
            with self._turn():
                sent.extend(self._comm.isend(message, to, _TAG) for to in ranks)

        def step() -> bool:
            nonlocal verdict
            messages = [*self._early, *_received(self._comm, self._turn)]
            self._early = []
            late = time.monotonic() - start > _GRACE_SECONDS
            for source, (lists, text) in messages:
                if own not in lists:
                    self._early.append((source, (lists, text)))
                elif text is None:
                    here.add(source)
                else:
                    verdict = text
            if verdict is None and late:
                for source, (lists, text) in self._early:
                    if text is None and source in {*own} - here:
                        verdict = _differing({rank: own, source: lists[0]})
                        both = {*own, *lists[0]} - {rank}
                        send(((own, lists[0]), verdict), sorted(both))
                        break
            if verdict is None and rank == leader and len(here) == len(own):
                verdict = ""
                send(((own,), ""), [to for to in own if to != rank])
            # What the one before has sent is received: it is not left for a later list.
            return verdict is not None and (verdict != "" or preceding in here)

        send(((own,), None), {leader, following} - {rank})
        try:
            self._wait(step, f"make the subgroup {own}")
            self._wait(lambda: _sent(sent, self._turn), f"hear of the subgroup {own}")
        except BaseException:
            mpi.abandoned += sent
            raise
        if verdict:
            raise ScheduleMismatchError(verdict)


def _differing(asked: dict[int, list[int]]) -> str:
    lists = "; ".join(f"rank {r} asks for {asked[r]}" for r in sorted(asked))
    return (
        f"the ranks ask for different subgroups: {lists}. Every member must give the "
        "same ranks in the same order."
    )


def _received(comm: Any, turn: _Turn) -> Iterator[tuple[int, Any]]:
    from mpi4py import MPI

    while True:
        status = MPI.Status()
        with turn():
            if not comm.iprobe(MPI.ANY_SOURCE, _TAG, status):
                return
            source = status.Get_source()
            message = comm.recv(source=source, tag=_TAG)
        yield source, message


def _sent(requests: Sequence[Any], turn: _Turn) -> bool:
    with turn():
        return all(request.test()[0] for request in requests)
