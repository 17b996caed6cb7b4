"""Designs that negotiate in every step: Horovod's three control planes.

A background thread on every rank wakes once a cycle, and each cycle is a round of
negotiation that all ranks enter together. Tensors that are ready everywhere when a
cycle begins are released at its end, fused, and reduced one after another.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from jaxcomm.simulate import collectives
from jaxcomm.simulate.negotiation import Negotiation
from jaxcomm.simulate.noise import Ready
from jaxcomm.simulate.outcome import Outcome
from jaxcomm.simulate.workloads import Workload

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Settings:
    """How Horovod is set up.

    Attributes:
      cycle_seconds: HOROVOD_CYCLE_TIME.
      fusion_bytes: HOROVOD_FUSION_THRESHOLD.
      cached: whether responses are cached; the first step goes through rank 0 anyway.
      grouped: whether a scope's gradients are submitted together.
      radix: children of a rank where requests go through a tree; 0 for none.
    """

    cycle_seconds: float
    fusion_bytes: int
    cached: bool
    grouped: bool
    radix: int = 0


# 5 ms and 64 MiB were the defaults until 0.21; the STEMDL run set 2 ms with groups.
COORDINATOR = Settings(5e-3, 64 * MIB, cached=False, grouped=False)
CACHE = Settings(5e-3, 64 * MIB, cached=True, grouped=False)
CACHE_GROUPS = Settings(2e-3, 64 * MIB, cached=True, grouped=True)
# The SC'18 predecessor's; its radix is not quotable here: 4 is assumed.
TREE = Settings(5e-3, 64 * MIB, cached=False, grouped=False, radix=4)


class Dynamic:
    """One of Horovod's designs on a machine, step after step."""

    def __init__(self, settings: Settings, workload: Workload, plane: Negotiation):
        self.settings = settings
        self.plane = plane
        self.bytes = workload.wire_bytes
        self.count = len(self.bytes)
        self._wire = collectives.wire(plane.machine)
        labels = {name: k for k, name in enumerate(dict.fromkeys(workload.groups))}
        self._group = np.array([labels[name] for name in workload.groups])
        # Absolute times: cycles go on from step to step.
        self._now = 0.0
        self._cycle = 0.0
        self._late = plane.wake
        self._warm = not settings.cached
        self.once_messages = 0

    def step(self, ready: Ready) -> Outcome:
        """Play one step from its beginning to its last reduced gradient."""
        first = not self._warm
        slow = first or not self.settings.cached
        self._warm = True
        outcome = _Steps(self, ready, slow).run()
        if first:
            self.once_messages = round(outcome.messages)
        self._now += max(outcome.end, ready.compute)
        return outcome

    def _set_cycle(self, begin: float, busy: float) -> None:
        """Fix the next cycle's begin from this one's, and whether it is slept for.

        Horovod measures a cycle from when the thread woke, so lateness adds up.
        """
        self._cycle = max(begin + self.settings.cycle_seconds, busy)
        self._late = self.plane.wake if self._cycle > busy else 0.0

    def submitted(self, ready: Ready) -> np.ndarray:
        """When each tensor's request is in on all ranks, shape (leaves,)."""
        if not self.settings.grouped:
            return ready.latest
        whole = np.full(self._group.max() + 1, -np.inf)
        np.maximum.at(whole, self._group, ready.latest)
        return whole[self._group]

    def fuse(self, tensors: list[int]) -> list[list[int]]:
        """Divide released tensors into responses as `FuseResponses` does.

        Greedy in order, looking past what does not fit; a larger tensor goes alone.
        """
        rest, fused = list(tensors), []
        while rest:
            room = self.settings.fusion_bytes
            taken, left = [], []
            for tensor in rest:
                if not taken or self.bytes[tensor] <= room:
                    taken.append(tensor)
                    room -= self.bytes[tensor]
                else:
                    left.append(tensor)
            fused.append(taken)
            rest = left
        return fused

    def coordinate(
        self, requests: int, released: int, responses: int
    ) -> tuple[float, int]:
        """One round through rank 0, straight or up and down a tree."""
        if radix := self.settings.radix:
            return self.plane.coordinate_tree(requests, released, responses, radix)
        return self.plane.coordinate(requests, released, responses)

    def reduce_seconds(self, tensors: list[int]) -> float:
        """Time of one fused all-reduce; several tensors are copied in and out."""
        machine = self.plane.machine
        nbytes = float(self.bytes[tensors].sum())
        seconds = collectives.cached_fastest(
            self._wire, self.plane.ranks, nbytes, machine.algorithms
        )
        copies = 2 if len(tensors) > 1 and self.plane.ranks > 1 else 0
        return seconds + copies * nbytes / machine["copy_bandwidth"]


class _Steps:
    """The cycles of one step."""

    def __init__(self, design: Dynamic, ready: Ready, slow: bool):
        self.design, self.ready, self.slow = design, ready, slow
        self.events = design.submitted(ready) + design._now
        self.order = np.argsort(self.events, kind="stable")
        self.requests = ready.times.size if slow else 0
        self.counted = 0
        self.done = 0
        self.end = 0.0
        self.control = self.waited = 0.0
        self.messages = self.cycles = 0

    def run(self) -> Outcome:
        design = self.design
        while self.done < design.count:
            # A thread that sleeps until the cycle wakes late, and looks then.
            begin = self._next_cycle() + design._late
            tensors = self._ready_at(begin)
            fused = design.fuse(tensors)
            seconds, messages = self._negotiate(begin, tensors, fused)
            release = begin + seconds
            if tensors:
                self.waited += float((release - self.events[tensors]).sum())
            for part in fused:
                self.end = max(self.end, release) + design.reduce_seconds(part)
            self.control += seconds
            self.messages += messages
            self.cycles += 1
            busy = self.end if design.plane.machine.blocking and fused else release
            design._set_cycle(begin, busy)
        if self.counted != self.requests:
            raise RuntimeError("a request was never counted")
        return Outcome(
            end=self.end - design._now,
            compute=self.ready.compute,
            control=self.control,
            messages=self.messages,
            waited=self.waited / design.count,
            reductions=self.cycles,
        )

    def _next_cycle(self) -> float:
        """Begin of the next cycle that has something to do; idle ones are skipped."""
        design = self.design
        event = self.events[self.order[self.done]]
        late = design._late
        if event <= design._cycle + late:
            return design._cycle
        if self.counted < self.requests:
            event = min(event, self.ready.after(self.counted) + design._now)
        if event <= design._cycle + late:
            return design._cycle
        seconds, messages = self._idle()
        period = design.settings.cycle_seconds
        late = design._late = design.plane.wake if seconds < period else 0.0
        period = max(period + late, seconds)
        idle = max(math.ceil((event - late - design._cycle) / period), 0)
        self.messages += idle * messages
        design._cycle += idle * period
        return design._cycle

    def _idle(self) -> tuple[float, int]:
        plane = self.design.plane
        if self.slow:
            return self.design.coordinate(0, 0, 0)
        return plane.intersect(self.design.count, 0)

    def _ready_at(self, begin: float) -> list[int]:
        # In the order of the cache's bits, which is that of the first step.
        found = []
        while (
            self.done < self.design.count
            and self.events[self.order[self.done]] <= begin
        ):
            found.append(int(self.order[self.done]))
            self.done += 1
        return sorted(found)

    def _negotiate(
        self, begin: float, tensors: list[int], fused: list[list[int]]
    ) -> tuple[float, int]:
        plane = self.design.plane
        if not self.slow:
            return plane.intersect(self.design.count, len(tensors))
        until = begin - self.design._now
        # Whoever released the last tensor has seen all requests: no rounding here.
        last = self.done == self.design.count
        seen = self.requests if last else self.ready.count(until)
        new, self.counted = seen - self.counted, seen
        return self.design.coordinate(new, len(tensors), len(fused))
