"""Measure a communicator's cost model: latency, bandwidth, copies, best segment."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm import native
from jaxcomm.collectives import reductions
from jaxcomm.errors import TransportUnavailableError
from jaxcomm.planning.costs import CostModel
from jaxcomm.ranks.communicator import Communicator

SEGMENTS = tuple(1 << power for power in range(17, 24))  # 128 KiB to 8 MiB
MESSAGES = tuple(8 << (2 * k) for k in range(11))  # 8 B to 8 MiB
_LARGE_BYTES = 32 << 20
_BUCKETS = 20
_SECONDS_PER_MESSAGE = 0.05

Progress = Callable[[str, float], None]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured, besides the model that follows from it.

    Attributes:
      model: the cost model.
      segment_seconds: for every tried segment size, seconds for a leaf of 32 MiB.
    """

    model: CostModel
    segment_seconds: dict[int, float]


def measure(
    comm: Communicator, *, repeats: int = 9, progress: Progress | None = None
) -> Measured:
    """Measure this job's communicator; all ranks call it together. Takes seconds.

    Args:
      comm: a communicator over MPI of two ranks or more.
      repeats: medians are over so many interleaved repeats.
      progress: called with a phrase and the fraction done.

    Raises:
      TransportUnavailableError: there is nothing to measure on one rank, or over a
        transport that is not measured.
    """
    if comm.size < 2:
        raise TransportUnavailableError(
            "tuning measures communication between ranks, and this is a job of one: "
            "say `jaxcomm tune -n 2`, or run it under mpiexec or srun"
        )
    report = progress or (lambda phrase, done: None)
    buffer = np.zeros(_LARGE_BYTES // 4, np.float32)
    channels = _Channels(comm)

    report("segments of a large leaf", 0.0)
    by_segment = _interleaved(
        comm,
        {segment: lambda s=segment: channels.reduce(buffer, s) for segment in SEGMENTS},
        repeats,
    )
    best = min(by_segment, key=lambda s: (by_segment[s], s))

    curve = []
    for k, nbytes in enumerate(MESSAGES):
        report(f"messages of {nbytes:,} bytes", 0.2 + 0.6 * k / len(MESSAGES))
        curve.append((nbytes, _message(comm, channels, buffer, nbytes, repeats)))
    seconds = np.maximum.accumulate([s for _, s in curve]).tolist()
    # A curve must rise for the model to interpolate; equal times differ by a trifle.
    seconds = [s * (1 + 1e-9 * k) for k, s in enumerate(seconds)]

    report("packing", 0.8)
    small = buffer[: min(comm.staging_bytes, 4 << 20) // 4]
    both = _interleaved(
        comm,
        {
            "packed": lambda: channels.reduce(small, best, pack=True),
            "in place": lambda: channels.reduce(small, best),
        },
        repeats,
    )
    copying = max(both["packed"] - both["in place"], small.nbytes / 100e9)

    report("custom calls", 0.9)
    call = max(_custom_call(comm, repeats) - seconds[0], 1e-7)
    model = CostModel(
        call=call,
        curve=tuple(zip(MESSAGES, seconds, strict=True)),
        copy_bandwidth=small.nbytes / copying,
        segment_bytes=best,
        source=comm.topology,
    )
    report("done", 1.0)
    return Measured(comm.broadcast_object(model), by_segment)


class _Channels:
    """Native communicators that differ in their segment size."""

    def __init__(self, comm: Communicator):
        self._comm = comm
        self._keys: dict[int, int] = {}

    def reduce(self, data: np.ndarray, segment: int, *, pack: bool = False) -> None:
        if segment not in self._keys:
            self._keys[segment] = self._comm.duplicate(segment)
        native.all_reduce_array(self._keys[segment], data, data.nbytes if pack else 0)


def _interleaved(
    comm: Communicator, ways: dict[object, Callable[[], None]], repeats: int
) -> dict:
    """Median seconds of each way; a sample is the slowest rank's."""
    samples: dict[object, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            seconds = _timed(comm, way)
            if repeat:  # the first allocates and faults pages in
                samples[name].append(seconds)
    return {name: statistics.median(times) for name, times in samples.items()}


def _timed(comm: Communicator, way: Callable[[], None]) -> float:
    comm.barrier()
    start = time.perf_counter()
    way()
    return max(comm.all_gather_object(time.perf_counter() - start))


def _message(
    comm: Communicator,
    channels: _Channels,
    buffer: np.ndarray,
    nbytes: int,
    repeats: int,
) -> float:
    """Seconds of one message of `nbytes`, walking through memory as gradients do."""
    elements = nbytes // 4
    pieces = len(buffer) // elements

    def send(count: int) -> None:
        for k in range(count):
            start = k % pieces * elements
            channels.reduce(buffer[start : start + elements], MESSAGES[-1])

    first = _timed(comm, lambda: send(2)) / 2
    count = int(min(max(_SECONDS_PER_MESSAGE / repeats / first, 2), 500))
    count = comm.broadcast_object(count)
    times = [_timed(comm, lambda: send(count)) / count for _ in range(repeats)]
    return statistics.median(times)


def _custom_call(comm: Communicator, repeats: int) -> float:
    """Seconds that one more bucket adds to a compiled step."""
    from jaxcomm.steps.data_parallel import data_parallel

    tree = [jnp.zeros(2) for _ in range(_BUCKETS)]

    def step(groups: int) -> Callable[[], None]:
        reduce = data_parallel(
            lambda t: reductions.all_reduce(t, groups=groups, comm=comm), comm=comm
        )

        def run() -> None:
            for _ in range(20):
                jax.block_until_ready(reduce(tree))

        return run

    times = _interleaved(comm, {n: step(n) for n in (1, _BUCKETS)}, repeats)
    return max(times[_BUCKETS] - times[1], 0.0) / 20 / (_BUCKETS - 1)
