"""When every bucket was ready, began and ended: JAXCOMM_TIMELINE=file.json.

The file is in Chrome's trace format; Perfetto (ui.perfetto.dev) opens it. Each rank is
a process with two rows: `ready` spans the time in which a bucket's operands are there
and its collective has not begun, `collective` the collective itself. Decorated
functions record both, bare collectives the second only. Times are those of each host's
clock.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxcomm import native
from jaxcomm.planning.schedule import Schedule

VARIABLE = "JAXCOMM_TIMELINE"
_READY, _COLLECTIVE = 0, 1

ScheduleOf = Callable[[int, int], Schedule | None]


@dataclasses.dataclass(frozen=True)
class Span:
    """One bucket of one call.

    Attributes:
      bucket: its number in the schedule.
      name: its first leaf, and how many more there are.
      nbytes: size of its leaves.
      ready: when its operands were there; nanoseconds.
      start: when its collective began.
      end: when it ended.
    """

    bucket: int
    name: str
    nbytes: int
    ready: int
    start: int
    end: int


def wanted() -> bool:
    """Tell whether the environment asks for a timeline."""
    return bool(os.environ.get(VARIABLE))


def spans(events: Sequence[tuple[int, ...]], schedule_of: ScheduleOf) -> list[Span]:
    """Pair a rank's events: the operands of a bucket, and its collective."""
    ready: dict[tuple[int, ...], int] = {}
    found = []
    for comm, digest, place, kind, start, end in events:
        bucket = native.bucket_of(place)
        if kind == _READY:
            ready[comm, digest, bucket] = start
            continue
        name, nbytes = f"bucket {bucket}", 0
        if schedule := schedule_of(comm, digest):
            leaves = schedule.buckets[bucket].leaves
            first = schedule.leaves[leaves[0]].path if leaves else "(empty)"
            more = f" +{len(leaves) - 1}" if len(leaves) > 1 else ""
            name = f"bucket {bucket}: {first}{more}"
            nbytes = schedule.bucket_nbytes(schedule.buckets[bucket])
        since = ready.pop((comm, digest, bucket), start)
        found.append(Span(bucket, name, nbytes, since, start, end))
    return found


def write(ranks: Sequence[Sequence[tuple[int, ...]]], schedule_of: ScheduleOf) -> None:
    """Write all ranks' events to the file that the environment names.

    Args:
      ranks: the events of each.
      schedule_of: gives the schedule of a communicator's key and a digest.
    """
    entries: list[dict[str, Any]] = []
    for rank, events in enumerate(ranks):
        about = {"ph": "M", "pid": rank}
        entries += [
            about | {"name": "process_name", "args": {"name": f"rank {rank}"}},
            about | {"name": "thread_name", "tid": 0, "args": {"name": "ready"}},
            about | {"name": "thread_name", "tid": 1, "args": {"name": "collective"}},
        ]
        for span in spans(events, schedule_of):
            common = {"ph": "X", "pid": rank, "name": span.name}
            common["args"] = {"bucket": span.bucket, "bytes": span.nbytes}
            for tid, start, end in (
                (0, span.ready, span.start),
                (1, span.start, span.end),
            ):
                if end > start:
                    micros = {"ts": start / 1e3, "dur": (end - start) / 1e3}
                    entries.append(common | micros | {"tid": tid})
    path = Path(os.environ[VARIABLE])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"traceEvents": entries, "displayTimeUnit": "ms"}))
