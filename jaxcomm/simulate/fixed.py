"""Designs whose buckets and order are fixed before the step: no negotiation in it.

PyTorch's DDP after its first step, XLA's `psum` and jaxcomm's static schedule. All of
them reduce buckets in one order, so a bucket that is late holds up those behind it:

    begin of bucket k = max(ready on all ranks, end of bucket k - 1)
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxcomm.simulate import collectives
from jaxcomm.simulate.negotiation import Negotiation
from jaxcomm.simulate.noise import Ready
from jaxcomm.simulate.outcome import Outcome
from jaxcomm.simulate.workloads import Workload

# torch.nn.parallel.DistributedDataParallel: bucket_cap_mb=25, the first bucket 1 MiB.
DDP_BYTES, DDP_FIRST_BYTES = 25 << 20, 1 << 20
# jaxcomm's watchdog: once a second a rank tells the next one which calls it has made,
# on a thread and a communicator of its own (watchdog.py). No gradient waits for it.
MARKS_PER_SECOND = 1.0
# XLA's xla_gpu_all_reduce_combine_threshold_bytes.
XLA_BYTES = 30 << 20


@dataclasses.dataclass(frozen=True)
class FixedBucket:
    """Leaves that are reduced together, and how long that takes."""

    leaves: np.ndarray
    seconds: float


class Fixed:
    """A design with fixed buckets, step after step.

    Attributes:
      once_seconds: what the job pays before the first reduction.
      once_messages: control messages then, of the whole job.

    Messages beside the steps come at a rate of so many a second, of the whole job.
    """

    def __init__(
        self,
        buckets: list[FixedBucket],
        *,
        overlap: float = 1.0,
        before: float = 0.0,
        once: tuple[float, int] = (0.0, 0),
        messages_per_second: float = 0.0,
    ):
        self.buckets = buckets
        self._overlap, self._before = overlap, before
        self._rate = messages_per_second
        self.once_seconds, self.once_messages = once

    def step(self, ready: Ready) -> Outcome:
        """Play one step: buckets in their order."""
        end = waited = 0.0
        latest, compute = ready.latest + self._before, ready.compute + self._before
        for bucket in self.buckets:
            begin = float(latest[bucket.leaves].max())
            # What is not overlapped waits for the computation's end.
            begin += (1 - self._overlap) * max(compute - begin, 0.0)
            begin = max(begin, end)
            waited += float((begin - latest[bucket.leaves]).sum())
            end = begin + bucket.seconds
        # What happens before the step delays it all and is communication too.
        end, leaves = max(end, compute), len(latest)
        return Outcome(
            end=end,
            compute=ready.compute,
            messages=self._rate * end,
            waited=waited / leaves,
            reductions=len(self.buckets),
        )


def ddp(workload: Workload, plane: Negotiation, shares: np.ndarray) -> Fixed:
    """PyTorch's DDP: buckets rebuilt in the order seen in the first step.

    Gradients are copied into buckets sized in their own dtype, and travel in the
    workload's, as under a compression hook. Buffers are broadcast before every forward
    pass (broadcast_buffers=True). The first step's extra costs are left out.
    """
    order = np.argsort(shares, kind="stable")
    parts, used, limit = [[]], 0, DDP_FIRST_BYTES
    for leaf in order:
        parts[-1].append(leaf)
        used += workload.leaf_bytes[leaf]
        if used >= limit:
            parts.append([])
            used, limit = 0, DDP_BYTES
    copies = 2.0
    buckets = _timed([p for p in parts if p], workload, plane, copies)
    before = 0.0
    if workload.buffers and plane.ranks > 1:
        # A broadcast is half of an all-reduce: the way down without the way up.
        before = _reduce_seconds(plane, workload.buffers) / 2
    return Fixed(buckets, before=before)


def xla(workload: Workload, plane: Negotiation, shares: np.ndarray) -> Fixed:
    """XLA's `psum`: neighbours in the compiled order are combined up to a threshold."""
    order = np.argsort(shares, kind="stable")
    parts: list[list[int]] = [[]]
    used = 0
    for leaf in order:
        nbytes = workload.wire_bytes[leaf]
        if parts[-1] and used + nbytes > XLA_BYTES:
            parts.append([])
            used = 0
        parts[-1].append(leaf)
        used += nbytes
    buckets = _timed(parts, workload, plane, copies=0.0)
    return Fixed(buckets, overlap=plane.machine["xla_overlap"])


def static(workload: Workload, plane: Negotiation) -> Fixed:
    """jaxcomm: the schedule of `jaxcomm.plan`, in the order planned from the trace.

    Its times are those of the planner's own model, which counts a message's latency for
    every leaf that is reduced where it lies. The ranks compare fingerprints once.
    """
    schedule, costs = workload.schedule(plane.machine, plane.ranks)
    alone = plane.ranks == 1
    buckets = [
        FixedBucket(
            np.array(bucket.leaves),
            0.0 if alone else schedule.bucket_seconds(bucket, costs),
        )
        for bucket in schedule.buckets
    ]
    marks = 0.0 if alone else MARKS_PER_SECOND * plane.ranks
    return Fixed(buckets, once=plane.agree(), messages_per_second=marks)


def _timed(
    parts: list[list[int]], workload: Workload, plane: Negotiation, copies: float
) -> list[FixedBucket]:
    found = []
    for part in parts:
        leaves = np.array(part)
        nbytes = float(workload.wire_bytes[leaves].sum())
        seconds = _reduce_seconds(plane, nbytes)
        if plane.ranks > 1:
            copied = copies * workload.leaf_bytes[leaves].sum()
            seconds += copied / plane.machine["copy_bandwidth"]
        found.append(FixedBucket(leaves, float(seconds)))
    return found


def _reduce_seconds(plane: Negotiation, nbytes: float) -> float:
    machine = plane.machine
    wire = collectives.wire(machine)
    return collectives.cached_fastest(wire, plane.ranks, nbytes, machine.algorithms)
