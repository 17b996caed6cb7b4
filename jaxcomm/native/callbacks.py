"""What the library asks Python while a program runs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from jaxcomm.native.declarations import AGREE_FN, DIFFER_FN, PARTITION_FN
from jaxcomm.native.library import load

AgreeCallback = Callable[[int, int, int, int], str | None]
DifferCallback = Callable[[int, tuple[int, int], int, tuple[int, int]], str]
PartitionCallback = Callable[[int, int, list[list[int]]], str | None]

# C calls these until the process ends, and ctypes frees what no Python object holds.
_held_for_c: dict[str, tuple[Any, ...]] = {}


def set_agree(agree: AgreeCallback, differ: DifferCallback) -> None:
    """Let the handlers compare ranks, and describe how they differ.

    Args:
      agree: called with a communicator's key, a schedule's digest, and where every
        call is checked the bucket and the call's number, else -1 for both. Returns
        None when all ranks agree, else the text of the error to raise.
      differ: called with a communicator's key, (schedule, bucket) of this rank's call,
        another rank and that one's (schedule, bucket); returns the text of the error.
    """

    def ask(
        key: int, digest: int, bucket: int, number: int, text: int, capacity: int
    ) -> int:
        return answer(lambda: agree(key, digest, bucket, number), text, capacity)

    def explain(
        key: int, own: Any, rank: int, other: Any, text: int, capacity: int
    ) -> None:
        places = [(w[0].schedule, w[0].bucket) for w in (own, other)]
        answer(lambda: differ(key, places[0], rank, places[1]), text, capacity)

    pair = (AGREE_FN(ask), DIFFER_FN(explain))
    load().jaxcomm_set_agree(*pair)
    _held_for_c["agree"] = pair


def set_partition(callback: PartitionCallback) -> None:
    """Let the handlers ask `callback(communicator, partition, groups)` for a subgroup.

    It creates communicator `partition` of this rank's group, and returns None or the
    text of an error.
    """

    def ask(
        key: int, partition: int, numbers: Any, length: int, text: int, capacity: int
    ) -> int:
        rows, at = [], 0
        while at < length:
            rows.append([int(r) for r in numbers[at + 1 : at + 1 + numbers[at]]])
            at += 1 + numbers[at]
        return answer(lambda: callback(key, partition, rows), text, capacity)

    function = PARTITION_FN(ask)
    load().jaxcomm_set_partition(function)
    _held_for_c["partition"] = (function,)


def check_every_call(every: bool) -> None:
    """Compare every call across ranks before it is made, or every schedule once."""
    load().jaxcomm_check_every_call(every)


def answer(ask: Callable[[], str | None], text: int, capacity: int) -> int:
    """Give C the text of an error, if there is one; return whether there is."""
    try:
        message = ask()
    except BaseException as error:  # C would take it for consent, Ctrl-C as well
        message = f"jaxcomm: {type(error).__name__}: {error}"
    if message is None:
        return 0
    raw = message.encode()[: capacity - 1]
    raw = raw.decode(errors="ignore").encode() + b"\0"  # whole characters
    ctypes.memmove(text, raw, len(raw))
    return 1
