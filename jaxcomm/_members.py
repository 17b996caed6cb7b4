"""Before a subgroup is made over MPI, its members see that they mean the same one.

MPI's own call would wait for ever. Internal to `_fabric`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from jaxcomm import _waiting
from jaxcomm.errors import ScheduleMismatchError

_TAG = 7
_Turn = Callable[[], contextlib.AbstractContextManager[None]]


def compare(comm: Any, turn: _Turn, members: Sequence[int], timeout: float) -> None:
    """Compare lists of members: all of them call this, each with its own.

    The lowest rank hears from the others and answers them. Everyone's next rank hears
    too, so that one with another idea of who is the lowest finds out. Whoever hears of
    another list tells everyone in either.

    Args:
      comm: MPI communicator of which the members are ranks.
      turn: held around MPI calls.
      members: distinct ranks, this one among them.
      timeout: seconds.

    Raises:
      ScheduleMismatchError: a list differs; on every rank in either.
      StallError: a member does not come.
    """
    own = list(members)
    rank, leader = comm.Get_rank(), min(own)
    ring = sorted(own)
    place = ring.index(rank)
    following, preceding = ring[(place + 1) % len(own)], ring[place - 1]
    here = {rank}
    verdict: str | None = None
    sent: list[Any] = []

    def send(text: str | None, ranks: Iterable[int]) -> None:
        with turn():
            sent.extend(comm.isend((own, text), to, _TAG) for to in ranks)

    def settle(text: str, ranks: Sequence[int]) -> None:
        nonlocal verdict
        verdict = text
        send(text, [to for to in ranks if to != rank])

    def step() -> bool:
        nonlocal verdict
        for source, (theirs, text) in _received(comm, turn):
            if text is not None:
                verdict = text
            elif theirs == own:
                here.add(source)
            else:
                asked = {rank: own, source: theirs}
                lists = "; ".join(
                    f"rank {r} asks for {asked[r]}" for r in sorted(asked)
                )
                differing = "the ranks ask for different subgroups: "
                settle(
                    f"{differing}{lists}. Every member must give the "
                    "same ranks in the same order.",
                    sorted({*own, *theirs}),
                )
        if verdict is None and len(here) == len(own):
            settle("", own)
        # All that was sent is received: the next subgroup's messages are its own.
        return verdict is not None and (verdict != "" or preceding in here)

    send(None, {leader, following} - {rank})
    _waiting.wait(step, timeout, who=f"rank {rank}", what=f"make the subgroup {own}")
    _waiting.wait(
        lambda: _sent(sent, turn), timeout, who=f"rank {rank}", what="hear of it"
    )
    if verdict:
        raise ScheduleMismatchError(verdict)


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
