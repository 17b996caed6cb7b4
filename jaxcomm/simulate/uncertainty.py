"""How sure a prediction is, and on what it hangs: parameters moved in their ranges."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jaxcomm.simulate import experiment
from jaxcomm.simulate.machines import Machine, Parameter
from jaxcomm.simulate.workloads import Workload

UTILISATION = "utilisation"
# Of the samples, what counts as the range.
_LOW, _HIGH = 5, 95


def knobs(machine: Machine, workload: Workload) -> dict[str, Parameter]:
    """Parameters that have a range: the machine's, and the workload's utilisation."""
    found = {name: machine.parameters[name] for name in machine.uncertain()}
    found.pop("watts", None)
    return {**found, UTILISATION: workload.utilisation}


def turn(
    machine: Machine, workload: Workload, values: Mapping[str, float]
) -> tuple[Machine, Workload]:
    """Return machine and workload with other values of some knobs."""
    values = dict(values)
    if UTILISATION in values:
        moved = dataclasses.replace(workload.utilisation, value=values.pop(UTILISATION))
        workload = dataclasses.replace(workload, utilisation=moved)
    return machine.at(values), workload


def latin_hypercube(samples: int, dimensions: int, seed: int) -> np.ndarray:
    """Points in the unit cube: in every dimension one in each of `samples` slices.

    Returns:
      Array of shape (samples, dimensions).
    """
    rng = np.random.default_rng([seed, 3])
    slices = np.argsort(rng.random((samples, dimensions)), axis=0)
    return (slices + rng.random((samples, dimensions))) / samples


def variants(
    machine: Machine, workload: Workload, samples: int, seed: int
) -> list[tuple[Machine, Workload]]:
    """Machines and workloads with all knobs at random places of their ranges."""
    if samples == 0:
        return []
    found = knobs(machine, workload)
    points = latin_hypercube(samples, len(found), seed)
    return [
        turn(
            machine,
            workload,
            {
                name: knob.at(share)
                for (name, knob), share in zip(found.items(), point, strict=True)
            },
        )
        for point in points
    ]


def ranges(
    machine: Machine,
    workload: Workload,
    ranks: int,
    *,
    samples: int = 16,
    steps: int = 4,
    seed: int = 0,
    designs: Sequence[str] = experiment.DESIGNS,
    progress: experiment.Progress = lambda steps: None,
) -> dict[str, tuple[float, float]]:
    """Efficiency's range per design: 5th to 95th percentile over all knobs at once."""
    runs = experiment.run_variants(
        variants(machine, workload, samples, seed),
        ranks,
        steps=steps,
        seed=seed,
        designs=designs,
        progress=progress,
    )
    found = {}
    for k, design in enumerate(designs):
        efficiencies = [run[k].efficiency for run in runs]
        low, high = np.percentile(efficiencies, [_LOW, _HIGH])
        found[design] = (float(low), float(high))
    return found


@dataclasses.dataclass(frozen=True)
class Swing:
    """Efficiency of one design with one knob at the ends of its range."""

    knob: str
    low: float
    high: float
    at_low: float
    at_high: float


def tornado(
    machine: Machine,
    workload: Workload,
    ranks: int,
    design: str,
    *,
    steps: int = 8,
    seed: int = 0,
) -> tuple[float, list[Swing]]:
    """Move one knob at a time.

    Returns:
      The nominal efficiency, and a swing per knob, the widest first.
    """
    found = knobs(machine, workload)
    cases = [(machine, workload)]
    for name, knob in found.items():
        cases += [turn(machine, workload, {name: x}) for x in (knob.low, knob.high)]
    runs = experiment.run_variants(
        cases, ranks, steps=steps, seed=seed, designs=[design]
    )
    values = [run[0].efficiency for run in runs]
    swings = [
        Swing(name, knob.low, knob.high, values[1 + 2 * k], values[2 + 2 * k])
        for k, (name, knob) in enumerate(found.items())
    ]
    swings.sort(key=lambda s: -abs(s.at_high - s.at_low))
    return values[0], swings
