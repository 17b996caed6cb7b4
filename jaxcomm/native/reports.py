"""What the library tells of this process: its calls, its threads, its timeline."""

from __future__ import annotations

import ctypes
import faulthandler
from typing import NamedTuple

from jaxcomm.native.constants import PLACE_BITS, Event
from jaxcomm.native.library import constants, load

_STACKS_BYTES = 32 << 10  # of text at most


def bucket_of(place: int) -> int:
    """Return the bucket of a call's place; -1 stays -1."""
    return place if place < 0 else place & ((1 << PLACE_BITS) - 1)


class Progress(NamedTuple):
    """How far a communicator is.

    Attributes:
      key: of the communicator.
      calls: how many custom calls have begun.
      schedule: digest of the last one's schedule.
      bucket: its number in that.
      entered: when it began, in ns of time.monotonic_ns(); 0 where it has ended.
      marks: (number, hash of the calls up to it) of some calls, the last one first.
    """

    key: int
    calls: int
    schedule: int
    bucket: int
    entered: int
    marks: tuple[tuple[int, int], ...]


def progress() -> list[Progress]:
    """Return how far every communicator of this process is."""
    columns, room = constants()["progress_columns"], 64
    while True:
        words = (ctypes.c_int64 * (columns * room))()
        count = load().jaxcomm_progress(words, room)
        if count <= room:
            break
        room = count
    rows = [words[k * columns : (k + 1) * columns] for k in range(count)]
    return [
        Progress(*row[:5], marks=tuple(zip(row[5::2], row[6::2], strict=True)))
        for row in rows
    ]


def hash_at(key: int, number: int) -> int | None:
    """Return the hash of a communicator's calls up to one; None if it is not known."""
    found = ctypes.c_int64()
    known = load().jaxcomm_hash_at(key, number, ctypes.byref(found))
    return found.value if known else None


def stacks(seconds: float = 0.5) -> str:
    """Return where all other threads of this process are, in native code.

    Each is interrupted by a signal for a moment. The text names threads, with the
    functions and files of their innermost frames; it is some KB long.

    Args:
      seconds: to wait for threads that do not answer.
    """
    text = ctypes.create_string_buffer(_STACKS_BYTES)
    load().jaxcomm_native_stacks(seconds, text, len(text))
    return text.value.decode(errors="replace")


def dump_on_signal(head: str) -> int:
    """Let this process write its stacks to standard error when it gets a signal.

    Also where a thread holds the interpreter for good.

    Args:
      head: what stands above the native ones.

    Returns:
      The signal, which nobody used; 0 if all are in use.
    """
    number = load().jaxcomm_unused_signal()
    if number:
        faulthandler.register(number, file=2, all_threads=True)
        load().jaxcomm_dump_on_signal(number, head.encode())
    return number


def timeline_start() -> None:
    """Record from now on when collectives begin and end."""
    load().jaxcomm_timeline_start()


def timeline_take() -> list[tuple[int, ...]]:
    """Return what was recorded, and forget it.

    Each event is (communicator, schedule, bucket, kind, start, end): kind 0 says that
    the operands are there, 1 is the collective; times are nanoseconds of the host's
    monotonic clock.
    """
    found: list[tuple[int, ...]] = []
    events = (Event * 4096)()
    while count := load().jaxcomm_timeline_take(events, len(events)):
        found += [tuple(events[k]) for k in range(count)]
    return found
