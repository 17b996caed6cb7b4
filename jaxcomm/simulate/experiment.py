"""Play every design on a machine at several sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jaxcomm.simulate import dynamic, fixed, noise
from jaxcomm.simulate.machines import Machine
from jaxcomm.simulate.negotiation import Negotiation
from jaxcomm.simulate.outcome import Outcome
from jaxcomm.simulate.workloads import Workload

# "tree" may be asked for too: the SC'18 predecessor, which `validation` needs.
DESIGNS = ("coordinator", "cache", "cache+groups", "ddp", "xla", "static")
# The first step fills caches; it is not part of the means.
WARM_UP = 1

Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Result:
    """One design at one size, means over steps after the first.

    Attributes:
      design: one of `DESIGNS`.
      ranks: number of ranks.
      efficiency: computation of a median device alone, over the step.
      step_ms: the step.
      control_ms: how long the control plane works for a step's gradients.
      exposed_comm_ms: communication, waiting for it included, that nothing hides.
      straggler_ms: what the slowest rank computes longer than the median device.
      waited_ms: mean time from a gradient's being ready on all ranks to its reduction.
      once_ms: what is paid once: the agreement, or the first step's extra time.
      messages_per_step: control messages of the whole job.
      once_messages: control messages before or in the first step.
      reductions: rounds of negotiation, or buckets.
    """

    design: str
    ranks: int
    efficiency: float
    step_ms: float
    control_ms: float
    exposed_comm_ms: float
    straggler_ms: float
    waited_ms: float
    once_ms: float
    messages_per_step: float
    once_messages: int
    reductions: float


def make_design(
    name: str, workload: Workload, plane: Negotiation, shares: np.ndarray
) -> dynamic.Dynamic | fixed.Fixed:
    """Set up a design for a workload on a machine."""
    settings = {
        "coordinator": dynamic.COORDINATOR,
        "cache": dynamic.CACHE,
        "cache+groups": dynamic.CACHE_GROUPS,
        "tree": dynamic.TREE,
    }
    if name in settings:
        return dynamic.Dynamic(settings[name], workload, plane)
    if name == "ddp":
        return fixed.ddp(workload, plane, shares)
    if name == "xla":
        return fixed.xla(workload, plane, shares)
    return fixed.static(workload, plane)


def simulate(
    machine: Machine,
    workload: Workload,
    ranks: int,
    *,
    steps: int = 100,
    seed: int = 0,
    designs: Sequence[str] = DESIGNS,
    progress: Progress = lambda steps: None,
) -> list[Result]:
    """Play steps of every design; all designs meet the same draws.

    Args:
      machine: where.
      workload: what a step computes and reduces.
      ranks: number of ranks, 1 or more.
      steps: steps that count; one more comes before them.
      seed: fixes every draw; equal arguments give equal results.
      designs: some of `DESIGNS`.
      progress: called with 1 after every step.

    Returns:
      One result per design, in the order of `designs`.
    """
    return run_variants(
        [(machine, workload)],
        ranks,
        steps=steps,
        seed=seed,
        designs=designs,
        progress=progress,
    )[0]


def run_variants(
    variants: Sequence[tuple[Machine, Workload]],
    ranks: int,
    *,
    steps: int,
    seed: int = 0,
    designs: Sequence[str] = DESIGNS,
    progress: Progress = lambda steps: None,
) -> list[list[Result]]:
    """As `simulate`, for variants that meet the same draws.

    Their workloads have the same number of leaves.
    """
    if not variants:
        return []
    runs = []
    for machine, workload in variants:
        plane = Negotiation(machine, ranks)
        shares = noise.real_shares(workload, machine["order_spread"], seed)
        made = [make_design(name, workload, plane, shares) for name in designs]
        runs.append((machine, workload, shares, made, [[] for _ in designs]))
    for step in range(WARM_UP + steps):
        draw = noise.draw(ranks, len(variants[0][1].names), step, seed)
        for machine, workload, shares, made, outcomes in runs:
            ready = noise.ready(workload, machine, draw, shares)
            for design, found in zip(made, outcomes, strict=True):
                found.append(design.step(ready))
            progress(1)
    return [
        [
            _result(name, ranks, workload.compute_seconds(machine), design, found)
            for name, design, found in zip(designs, made, outcomes, strict=True)
        ]
        for machine, workload, _, made, outcomes in runs
    ]


def _result(
    name: str,
    ranks: int,
    compute: float,
    design: dynamic.Dynamic | fixed.Fixed,
    outcomes: list[Outcome],
) -> Result:
    rest = outcomes[WARM_UP:]

    def mean(what: Callable[[Outcome], float]) -> float:
        return float(np.mean([what(x) for x in rest]))

    seconds = mean(lambda x: x.seconds)
    if isinstance(design, fixed.Fixed):
        once = design.once_seconds
    else:
        once = max(outcomes[0].exposed - mean(lambda x: x.exposed), 0.0)
        once = once if design.settings.cached else 0.0
    return Result(
        design=name,
        ranks=ranks,
        efficiency=compute / seconds,
        step_ms=1e3 * seconds,
        control_ms=1e3 * mean(lambda x: x.control),
        exposed_comm_ms=1e3 * mean(lambda x: x.exposed),
        straggler_ms=1e3 * (mean(lambda x: x.compute) - compute),
        waited_ms=1e3 * mean(lambda x: x.waited),
        once_ms=1e3 * once,
        messages_per_step=mean(lambda x: x.messages),
        once_messages=design.once_messages,
        reductions=mean(lambda x: x.reductions),
    )
