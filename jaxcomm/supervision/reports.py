"""What a rank knows of its own state, and reports made from all ranks' states.

Internal to `watchdog`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jaxcomm import native
from jaxcomm.ranks.deadline import rank_names
from jaxcomm.ranks.hosts import mpi_library
from jaxcomm.ranks.hosts.mpi import HostChannel

_HOST = 0  # in place of a communicator's key
_FRAMES = 12
_NATIVE_RANKS = 4  # of those whose native stacks a report holds, of each kind
_REMEMBERED = 256

Describe = Callable[[int, int, int], str]


@dataclasses.dataclass(frozen=True)
class Call:
    """A collective: of which communicator, which of its calls, and what it reduces.

    Attributes:
      comm: key of the communicator.
      number: counted from 1; the same for the same call on every rank.
      where: what it is, the same for the same call on every rank.
      what: its bucket and leaves, in words.
      seconds: for how long the rank has been in it; None if it has come out.
    """

    comm: int
    number: int
    where: tuple[int, int]
    what: str
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class State:
    """One rank's state.

    Attributes:
      host: its host's name.
      calls: the last call of every communicator.
      stacks: where its Python threads are.
      native: where all its threads are, in native code.
      mpi: its MPI library, and by which components messages travel.
    """

    host: str
    calls: tuple[Call, ...]
    stacks: str = ""
    native: str = ""
    mpi: str = ""


@dataclasses.dataclass(frozen=True)
class Process:
    """The process of a rank, as others on its host know it.

    Attributes:
      host: its host's name.
      number: its process id there.
      began: when it began; another process of the same number began later.
      signal: at which it writes its stacks to standard error; 0 for none.
    """

    host: str
    number: int
    began: str
    signal: int

    @classmethod
    def own(cls, rank: int, size: int) -> Process:
        """Return this process, ready to be asked for its stacks."""
        host, number = socket.gethostname(), os.getpid()
        head = f"jaxcomm: the native threads of rank {rank} of {size} ({host}) are at\n"
        return cls(host, number, _began(number), native.dump_on_signal(head))

    def ask_for_stacks(self) -> bool:
        """Let it write its stacks; False if it is not on this host, or has ended."""
        here = self.host == socket.gethostname() and self.signal
        if not here or not self.began or _began(self.number) != self.began:
            return False
        with contextlib.suppress(OSError):
            os.kill(self.number, self.signal)
            return True
        return False


def _began(number: int) -> str:
    try:
        stat = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return ""
    # The second field, a name in brackets, may hold spaces.
    return stat.rpartition(")")[2].split()[19]


def look(channel: HostChannel, describe: Describe, *, stacks: bool = False) -> State:
    """Return this rank's state.

    Args:
      channel: where its objects are exchanged.
      describe: says what a call reduces; see `Registry.describe`.
      stacks: whether to look where its threads are.
    """
    now = time.monotonic_ns()
    entered = channel.entered
    host = Call(
        _HOST,
        channel.count,
        (int.from_bytes(hashlib.sha256(channel.what.encode()).digest()[:8]), 0),
        f"the host-side {channel.what}",
        1e-9 * (now - entered) if entered else None,
    )
    calls = (host, *(_call(row, now, describe) for row in native.progress()))
    if not stacks:
        return State(socket.gethostname(), calls)
    return State(
        socket.gethostname(),
        calls,
        stacks=_stacks(),
        native=native.stacks(),
        mpi=mpi_library.describe(),
    )


def _call(row: native.Progress, now: int, describe: Describe) -> Call:
    seconds = 1e-9 * (now - row.entered) if row.entered else None
    what = describe(row.key, row.schedule, row.bucket)
    return Call(row.key, row.calls, (row.schedule, row.bucket), what, seconds)


class Ledger:
    """Where ranks wait and with which calls they have ended, to find contradictions.

    What it holds stays true when a rank has gone on: nobody ever meets a rank that
    came to the same call from another place of the program.
    """

    def __init__(self) -> None:
        # Of (communicator, number of the call): its places, and who came there.
        self._calls: dict[tuple[int, int], dict[tuple[int, int], list[int]]] = {}
        self._what: dict[tuple[int, int], str] = {}
        self._last: dict[int, tuple[int, int, str]] = {}  # number, rank, what
        self._ended: dict[int, Mapping[int, int]] = {}

    def waits(self, rank: int, call: Call) -> None:
        """Note that a rank waits in a call."""
        key = (call.comm, call.number)
        self._calls.setdefault(key, {}).setdefault(call.where, []).append(rank)
        self._what[call.where] = call.what
        last = self._last.get(call.comm, (0, 0, ""))
        self._last[call.comm] = max(last, (call.number, rank, call.what))
        if len(self._calls) > _REMEMBERED:
            del self._calls[next(iter(self._calls))]

    def ended(self, rank: int, calls: Mapping[int, int]) -> None:
        """Note that a rank has come to its end, and after how many calls of each."""
        self._ended[rank] = calls

    def contradiction(self) -> str | None:
        """Return the report of ranks that can never meet, if there are any."""
        for (_, number), places in self._calls.items():
            if len(places) > 1:
                lines = [
                    f"  {rank_names(sorted(set(ranks)))}: {self._what[where]}"
                    for where, ranks in sorted(places.items(), key=lambda p: min(p[1]))
                ]
                what = "the ranks are in different calls where all must be in call"
                return refusal(f"{what} {number}", lines)
        for comm, (number, rank, what) in self._last.items():
            gone = sorted(
                r
                for r, calls in self._ended.items()
                if calls.get(comm, number) < number
            )
            if gone:
                line = f"  rank {rank} waits in call {number}: {what}"
                return refusal(f"{rank_names(gone)} ended without a call", [line])
        return None


def refusal(what: str, lines: Sequence[str]) -> str:
    """Return the report of ranks that did not do the same."""
    return "\n".join(
        [
            f"jaxcomm: ScheduleMismatchError: {what}, so the job ends.",
            *lines,
            "Every rank must run the same programs, the same number of times, in the "
            "same order. JAXCOMM_CHECK=every names the first call that differs.\n",
        ]
    )


def report(own: int, size: int, waited: Call, states: Mapping[int, State]) -> str:
    """Say who waits, who has not come and where it is, and who does not answer.

    Args:
      own: the reporting rank.
      size: number of ranks.
      waited: the call that it waits in.
      states: of all ranks that answered.
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
    lines.append(f"  waiting in this call: {rank_names(there)}")
    missing = sorted(set(range(size)) - set(states))
    # Where all have come, what is lost lies between them: then all are of interest.
    shown = [own] if away or past or missing else there[:_NATIVE_RANKS]
    for rank in shown:
        lines.append(f"  rank {rank} (host {states[rank].host}) waits here.")
        lines += _where(states[rank], native=True)
    for index, (rank, call) in enumerate(away):
        last = f"its last call was {call.number}" if call else "it has called nothing"
        elsewhere = next((c for c in states[rank].calls if c.seconds is not None), None)
        if elsewhere is not None:
            last = f"it waits in call {elsewhere.number}: {elsewhere.what}"
        lines.append(f"  not arrived: rank {rank} (host {states[rank].host}), {last}.")
        lines += _where(states[rank], native=index < _NATIVE_RANKS)
    for index, (rank, call) in enumerate(past):
        where = f"waits in call {call.number}" if call.seconds else "is in no call"
        lines.append(f"  past this call: rank {rank}, which {where}.")
        lines += _where(states[rank], native=index < _NATIVE_RANKS)
    if missing:
        lines.append(
            f"  no answer from {rank_names(missing)}: ended, stopped, out of memory, "
            "or its interpreter is held"
        )
    libraries: dict[str, list[int]] = {}
    for rank, state in states.items():
        libraries.setdefault(state.mpi, []).append(rank)
    lines += [f"  MPI of {rank_names(sorted(r))}: {m}" for m, r in libraries.items()]
    return "\n".join(lines) + "\n"


def _where(state: State, *, native: bool) -> list[str]:
    """Return a rank's stacks, each with a heading."""
    lines = ["   Its Python is at", state.stacks]
    if native:
        lines += ["   Its native threads are at", state.native.rstrip("\n")]
    return lines


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
