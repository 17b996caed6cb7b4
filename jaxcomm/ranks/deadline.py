"""Waiting with an end: a rank that others do not join says so, then gives up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from jaxcomm.errors import StallError

log = logging.getLogger(__name__)

WARN_SECONDS = 10.0
_POLL_SECONDS = 0.001


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
