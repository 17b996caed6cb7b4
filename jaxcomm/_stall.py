"""What a rank knows of its own state, and the report made from all ranks' states.

Internal to `watchdog`.
"""

from __future__ import annotations

import dataclasses
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxcomm import agreement, native

if TYPE_CHECKING:
    from jaxcomm._host import HostChannel

_HOST = 0  # in place of a communicator's key
_FRAMES = 12
_PATHS = 3


@dataclasses.dataclass(frozen=True)
class Call:
    """A collective: of which communicator, the how manieth, and what it reduces.

    Attributes:
      comm: key of the communicator.
      number: counted from 1; the same for the same call on every rank.
      what: its bucket and leaves, in words.
      seconds: for how long the rank has been in it; None if it has come out.
    """

    comm: int
    number: int
    what: str
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class State:
    """One rank's state.

    Attributes:
      host: its host's name.
      calls: the last call of every communicator.
      stacks: where its Python threads are.
    """

    host: str
    calls: tuple[Call, ...]
    stacks: str = ""


def look(channel: HostChannel, *, stacks: bool = False) -> State:
    """Return this rank's state; `channel` is where its objects are exchanged."""
    now = time.monotonic_ns()
    entered = channel.entered
    host = Call(
        _HOST,
        channel.count,
        f"the host-side {channel.what}",
        1e-9 * (now - entered) if entered else None,
    )
    calls = (host, *(_call(row, now) for row in native.progress()))
    return State(socket.gethostname(), calls, _stacks() if stacks else "")


def _call(row: native.Progress, now: int) -> Call:
    seconds = 1e-9 * (now - row.entered) if row.entered else None
    return Call(row.key, row.calls, describe(row), seconds)


def describe(row: native.Progress) -> str:
    """Say in words what a call reduces."""
    schedule = agreement.schedule_of(row.key, row.schedule)
    if schedule is None or not 0 <= row.bucket < len(schedule.buckets):
        return f"bucket {row.bucket} of a program that was not traced here"
    bucket = schedule.buckets[row.bucket]
    paths = [schedule.leaves[i].path for i in bucket.leaves]
    nbytes = sum(schedule.leaves[i].nbytes for i in bucket.leaves)
    names = ", ".join(paths[:_PATHS])
    if len(paths) > _PATHS:
        names += f" and {len(paths) - _PATHS} more leaves"
    return (
        f"bucket {row.bucket} of {len(schedule.buckets)} ({bucket.op} of {names}; "
        f"{nbytes:,} bytes)"
    )


def report(
    own: int, size: int, waited: Call, states: Mapping[int, State], names: Any
) -> str:
    """Say who waits, who has not come and where it is, and who does not answer.

    Args:
      own: the reporting rank.
      size: number of ranks.
      waited: the call that it waits in.
      states: of all ranks that answered.
      names: from a list of ranks to "rank 3" or "ranks 0-2, 5".
    """
    head = (
        f"jaxcomm: no progress for {waited.seconds or 0:.0f} s, so the job ends. Rank "
        f"{own} of {size} waits in call {waited.number}: {waited.what}."
    )
    lines = [head]
    there, away, past = [], [], []
    for rank, state in sorted(states.items()):
        call = next((c for c in state.calls if c.comm == waited.comm), None)
        if call is None or call.number < waited.number:
            away.append((rank, call))
        elif call.number == waited.number and call.seconds is not None:
            there.append(rank)
        else:
            past.append((rank, call))
    lines.append(f"  waiting in this call: {names(there)}")
    for rank, call in away:
        last = f"its last call was {call.number}" if call else "it has called nothing"
        elsewhere = next((c for c in states[rank].calls if c.seconds is not None), None)
        if elsewhere is not None:
            last = f"it waits in call {elsewhere.number}: {elsewhere.what}"
        lines.append(
            f"  not arrived: rank {rank} (host {states[rank].host}), {last}. Its "
            "Python is at"
        )
        lines.append(states[rank].stacks)
    for rank, call in past:
        where = f"waits in call {call.number}" if call.seconds else "is in no call"
        lines.append(f"  past this call: rank {rank}, which {where}. Its Python is at")
        lines.append(states[rank].stacks)
    missing = sorted(set(range(size)) - set(states))
    if missing:
        lines.append(
            f"  no answer from {names(missing)}: ended, stopped, out of memory, or its "
            "interpreter is held"
        )
    return "\n".join(lines) + "\n"


def _stacks() -> str:
    """Where this process's Python threads are, but for the watchdog's own."""
    names = {t.ident: t.name for t in threading.enumerate()}
    out: list[str] = []
    for ident, frame in sys._current_frames().items():
        if ident == threading.get_ident():
            continue
        lines: Sequence[str] = traceback.format_stack(frame)[-_FRAMES:]
        out.append(f"    thread {names.get(ident, ident)}:")
        out += [f"    {line}" for text in lines for line in text.rstrip().splitlines()]
    return "\n".join(out)
