"""The one-time cross-rank check of a schedule, and the text of its refusal.

A schedule is registered when it is traced and compared when its first bucket is
about to run: the custom call asks, once per schedule, and `answer` does it over the
communicator's control channel. A rank that only traces or lowers never gets there,
so it never blocks. The usual case is one 64-byte reduction; only a mismatch
exchanges more. JAXCOMM_CHECK=every does it before every call, for debugging.

A refusal reaches the caller through XLA, which knows texts only: `raise_failure` makes
the exception again from the text of the error that XLA raises. Nothing is kept from one
call to the next, so no failure can be taken for another's.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import re
import threading
from typing import TYPE_CHECKING

import jax
import numpy as np

from jaxcomm import native
from jaxcomm.errors import (
    BrokenCommunicatorError,
    JaxcommError,
    ScheduleMismatchError,
    StallError,
)
from jaxcomm.planning.schedule import Schedule
from jaxcomm.ranks import deadline

if TYPE_CHECKING:
    from jaxcomm.ranks.fabric import Channel

_SHOWN_VARIANTS = 8
_SHOWN_PATHS = 3
# What XLA makes of a custom call's error: its status, then the text.
_KINDS = {
    kind.__name__: kind
    for kind in (
        BrokenCommunicatorError,
        JaxcommError,
        ScheduleMismatchError,
        StallError,
    )
}
_FAILED_CALL = re.compile(rf"[A-Z_]+: ({'|'.join(_KINDS)}): (.*)", re.DOTALL)
_REMEDY = (
    "Every rank must reduce a tree of the same paths, shapes and dtypes with the same "
    "options, in the same order."
)


@dataclasses.dataclass(frozen=True)
class _Entry:
    schedule: Schedule
    terms: str

    @functools.cached_property
    def hash(self) -> bytes:
        text = f"{self.schedule.fingerprint}|{self.terms}"
        return hashlib.sha256(text.encode()).digest()


class Agreement:
    """The schedules of one communicator, and how its ranks compare them."""

    def __init__(self, key: int, host: Channel, timeout: float, transport: str):
        """Compare nothing yet.

        Args:
          key: of the communicator.
          host: the channel over which checks run.
          timeout: seconds that a check may take.
          transport: name of the communicator's.
        """
        self._key = key
        self._host = host
        self._timeout = timeout
        self._transport = transport
        # By digest: everything that was lowered in this process.
        self._entries: dict[int, _Entry] = {}
        # Several threads may lower at a time.
        self._lock = threading.Lock()

    def register(self, schedule: Schedule) -> int:
        """Make a schedule known for the check; return the digest that names it."""
        entry = _Entry(schedule, f"{versions()}, transport {self._transport}")
        # 63 bits, as an HLO attribute; 0 means that no check is wanted.
        digest = int.from_bytes(entry.hash[:8], "big") >> 1 or 1
        with self._lock:
            self._entries[digest] = entry
        return digest

    def schedule_of(self, digest: int) -> Schedule | None:
        """Return a schedule that was traced in this process."""
        entry = self._entries.get(digest)
        return entry.schedule if entry else None

    def describe(self, digest: int, place: int) -> str:
        """Say in words what a call reduces."""
        return describe(self.schedule_of(digest), place)

    def differ(self, own: tuple[int, int], rank: int, other: tuple[int, int]) -> str:
        """Return the error of ranks that met in a call, each in another bucket.

        Args:
          own: digest and bucket of this rank's call.
          rank: the other rank.
          other: digest and bucket of its call.
        """
        error = ScheduleMismatchError(
            "the ranks came to the same call from different places of their programs; "
            f"nothing was reduced.\n  this rank: {self.describe(*own)}\n"
            f"  rank {rank}: {self.describe(*other)}\n"
            f"{_REMEDY} JAXCOMM_CHECK=every finds the first call that differs."
        )
        self._host.fault.set(error)
        return told(error)

    def answer(self, digest: int, bucket: int, number: int) -> str | None:
        """Compare a schedule across ranks; the custom calls ask this on XLA's thread.

        Args:
          digest: of the schedule.
          bucket: where every call is checked, the bucket; else -1.
          number: likewise the call's number on its communicator.

        Returns:
          None when all ranks agree, else the error's text.
        """
        try:
            self._compare(digest, (bucket, number) if bucket >= 0 else None)
        except JaxcommError as error:
            return told(error)
        except BaseException as error:  # nothing may escape into C
            return f"the schedule check failed: {type(error).__name__}: {error}"
        return None

    def _compare(self, digest: int, call: tuple[int, int] | None) -> None:
        entry = self._entries.get(digest)
        # A program from a cache may run without having been traced in this process;
        # then the digest in its HLO is all there is to compare.
        own = entry.hash if entry else digest.to_bytes(32, "big")
        compared = hashlib.sha256(own + repr(call).encode()).digest() if call else own
        mine = np.frombuffer(compared, np.uint8)
        # Minimum and maximum in one reduction: the maximum is the inverted minimum of
        # the inverse. Every rank sees the same result, so all decide alike.
        send = np.concatenate([mine, ~mine])
        what = entry.schedule.summary() if entry else "of a cached program"
        receive = self._host.reduce_min(
            send, self._timeout, f"check a schedule ({what})"
        )
        low, high = receive[:32], ~receive[32:]
        if np.array_equal(low, high):
            return
        if call is not None:
            what = self.describe(digest, call[0])
            found = self._host.all_gather((own, *call, what))
            if len({schedule for schedule, *_ in found}) == 1:
                raise ScheduleMismatchError(_explain_calls([row[1:] for row in found]))
        raise ScheduleMismatchError(_explain(self._host, own, entry))


@functools.cache
def versions() -> str:
    """Return what must be equal on all ranks besides the schedule."""
    try:
        own = importlib.metadata.version("jaxcomm")
    except importlib.metadata.PackageNotFoundError:
        own = "source tree"
    return f"jaxcomm {own}, jax {jax.__version__}"


def describe(schedule: Schedule | None, place: int) -> str:
    """Say in words what a call of a schedule reduces."""
    bucket = native.bucket_of(place)
    which = f"call {(place >> native.PLACE_BITS) + 1} of its program"
    if schedule is None or not 0 <= bucket < len(schedule.buckets):
        return f"bucket {bucket} of a program that was not traced here, {which}"
    chosen = schedule.buckets[bucket]
    paths = [schedule.leaves[i].path for i in chosen.leaves]
    nbytes = sum(schedule.leaves[i].nbytes for i in chosen.leaves)
    names = ", ".join(paths[:_SHOWN_PATHS])
    if len(paths) > _SHOWN_PATHS:
        names += f" and {len(paths) - _SHOWN_PATHS} more leaves"
    return (
        f"bucket {bucket} of {len(schedule.buckets)} ({chosen.op} of {names}; "
        f"{nbytes:,} bytes), {which}"
    )


def raise_failure(error: Exception) -> None:
    """Raise the refused call behind XLA's error, if that is what it is.

    XLA reports a custom call's error as JaxRuntimeError; where the caller is ours, the
    user sees the exception of its own kind instead.
    """
    found = _FAILED_CALL.fullmatch(str(error))
    if found is not None:
        raise _KINDS[found[1]](found[2]) from error


def told(error: JaxcommError) -> str:
    """Return an error's text as `raise_failure` reads it."""
    return f"{type(error).__name__}: {error}"


def _explain_calls(found: list[tuple[int, int, str]]) -> str:
    """Say which ranks are in which call of the same schedule."""
    ranks: dict[tuple[int, str], list[int]] = {}
    for rank, (_, number, what) in enumerate(found):
        ranks.setdefault((number, what), []).append(rank)
    lines = ["the ranks are in different calls; nothing was sent."]
    for (number, what), members in list(ranks.items())[:_SHOWN_VARIANTS]:
        lines.append(f"  {deadline.rank_names(members)}: call {number}, {what}")
    return "\n".join([*lines, _REMEDY])


def _explain(host: Channel, own: bytes, entry: _Entry | None) -> str:
    """Say which ranks agree and where the others first differ; same on all ranks."""
    ranks: dict[bytes, list[int]] = {}
    for rank, digest in enumerate(host.all_gather(own)):
        ranks.setdefault(digest, []).append(rank)
    lines = ["the ranks hold different schedules; nothing was sent."]
    reference: tuple[Schedule, str] | None = None
    for digest, members in list(ranks.items())[:_SHOWN_VARIANTS]:
        mine = (entry.schedule.to_json(), entry.terms) if entry else None
        text = host.broadcast(mine if own == digest else None, members[0])
        who = f"  {deadline.rank_names(members)}: "
        if text is None:
            lines.append(who + "a compiled program that was not traced here")
            continue
        schedule, terms = Schedule.from_json(text[0]), text[1]
        if reference is None:
            reference = (schedule, terms)
            lines.append(
                who + f"{len(schedule.leaves)} leaves, {schedule.nbytes:,} bytes, "
                f"{len(schedule.buckets)} buckets ({terms})"
            )
        else:
            found = reference[0].diff(schedule) or f"{reference[1]} against {terms}"
            first = next(iter(ranks.values()))[0]
            lines.append(who + f"rank {first} has another: {found}")
    if len(ranks) > _SHOWN_VARIANTS:
        lines.append(f"  ... and {len(ranks) - _SHOWN_VARIANTS} more variants")
    return "\n".join([*lines, _REMEDY])
