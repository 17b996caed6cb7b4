"""What a training step computes and reduces: leaves, when they are ready, schedules."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import ml_dtypes
import numpy as np

from jaxcomm.errors import InvalidOptionError
from jaxcomm.planning import planner
from jaxcomm.planning.costs import CostModel
from jaxcomm.planning.schedule import LeafSpec, Schedule
from jaxcomm.simulate import collectives, networks
from jaxcomm.simulate.machines import Machine, Parameter

# By name, and so that NumPy knows bfloat16 without JAX.
_WIRE_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": np.dtype(ml_dtypes.bfloat16).itemsize,
}
# The backward pass takes twice the forward pass: a product for the input's gradient
# and one for the weights'.
_FORWARD = 1 / 3


@dataclasses.dataclass(frozen=True)
class Workload:
    """A training step of one network.

    Attributes:
      name: as on the command line.
      title: for people.
      names: leaves in the order in which their gradients become ready as planned.
      shapes: shape of every leaf, in that order.
      groups: scope of every leaf: what `cache+groups` reduces together.
      ready: when each gradient is ready, as a share of the step's computation.
      flops: operations of a rank's step, forward and backward.
      operand: dtype of the products, which picks the machine's peak.
      utilisation: share of that peak which the step reaches, with its range.
      wire: dtype in which float32 gradients travel.
      buffers: bytes of state that DDP broadcasts before every forward pass.
    """

    name: str
    title: str
    names: tuple[str, ...]
    shapes: tuple[networks.Shape, ...]
    groups: tuple[str, ...]
    ready: tuple[float, ...]
    flops: float
    operand: str
    utilisation: Parameter
    wire: str
    buffers: int

    @property
    def leaf_bytes(self) -> np.ndarray:
        """Bytes of every leaf in float32, shape (leaves,)."""
        return np.array([4 * math.prod(shape) for shape in self.shapes])

    @property
    def wire_bytes(self) -> np.ndarray:
        """Bytes of every leaf as it travels, shape (leaves,)."""
        return self.leaf_bytes * _WIRE_BYTES[self.wire] // 4

    def compute_seconds(self, machine: Machine) -> float:
        """Computation of one step on a device of median speed, undisturbed."""
        return self.flops / (machine[f"{self.operand}_flops"] * self.utilisation.value)

    def schedule(self, machine: Machine, ranks: int) -> tuple[Schedule, CostModel]:
        """The schedule `jaxcomm.plan` makes for this tree, and the costs it plans by.

        The costs are what `jaxcomm tune` would measure on the machine of the model.
        """
        costs = cost_model(machine, ranks)
        leaves = tuple(
            LeafSpec(name, shape, "float32", order)
            for order, (name, shape) in enumerate(
                zip(self.names, self.shapes, strict=True)
            )
        )
        wire = None if self.wire == "float32" else self.wire
        made = planner.make_schedule(
            leaves, op="mean", size=ranks, wire_dtype=wire, costs=costs
        )
        return made, costs


def cost_model(machine: Machine, ranks: int) -> CostModel:
    """The planner's cost model for so many ranks of a machine.

    A large leaf is one message here: its segments travel side by side (mpi/exchange.h),
    so latency counts once.
    """
    wire = collectives.wire(machine)
    curve = tuple(
        (
            nbytes,
            max(
                collectives.cached_fastest(wire, ranks, nbytes, machine.algorithms)
                - wire.call_latency,
                1e-9,
            ),
        )
        for nbytes in (8, *(1 << k for k in range(12, 33, 2)))
    )
    return CostModel(
        wire.call_latency, curve, machine["copy_bandwidth"], 1 << 32, machine.name
    )


def _make(
    name: str,
    title: str,
    layers: list[networks.Layer],
    *,
    samples: int,
    operand: str,
    utilisation: Parameter,
    wire: str,
    buffers: int,
) -> Workload:
    total = sum(layer.flops for layer in layers)
    done = _FORWARD
    leaves: list[tuple[str, networks.Shape, str, float]] = []
    for layer in reversed(layers):
        done += (1 - _FORWARD) * layer.flops / total
        leaves += [
            (leaf, shape, layer.scope, min(done, 1.0))
            for leaf, shape in reversed(layer.leaves.items())
        ]
    names, shapes, groups, ready = zip(*leaves, strict=True)
    flops = 3 * total * samples
    return Workload(
        name,
        title,
        names,
        shapes,
        groups,
        ready,
        flops,
        operand,
        utilisation,
        wire,
        buffers,
    )


def _stemdl() -> Workload:
    return _make(
        "stemdl",
        "STEMDL: 33 leaves, 0.47 GB in float16",
        networks.stemdl(),
        samples=1,
        operand="float16",
        utilisation=Parameter(
            0.48,
            0.35,
            0.6,
            "1.54 EF/s sustained by 27,600 ranks at 0.93 (Romero et al., NSDI'22) are "
            "60 TFLOP/s a rank, 0.48 of a V100's peak; batch 1 and 16-bit messages as "
            "in the run scripts of nlaanait/stemdl; range assumed",
        ),
        wire="float16",
        # Running mean and variance of the three batch normalisations.
        buffers=4 * 2 * (768 + 1280 + 2048),
    )


def _resnet50() -> Workload:
    return _make(
        "resnet50",
        "ResNet-50: 161 leaves, 102 MB in float32",
        networks.resnet50(),
        samples=64,
        operand="float16",
        utilisation=Parameter(
            0.16,
            0.08,
            0.25,
            "assumed: 64 images a rank at 0.16 of peak, about 800 images/s on a V100",
        ),
        wire="float32",
        buffers=4 * 2 * 26560,
    )


def _gpt2() -> Workload:
    return _make(
        "gpt2",
        "GPT-2 small: 148 leaves, 0.25 GB in bfloat16",
        networks.gpt2(),
        samples=8,
        operand="float16",
        utilisation=Parameter(
            0.35,
            0.2,
            0.5,
            "assumed: 8 sequences of 1,024 tokens a rank at 0.35 of peak",
        ),
        wire="bfloat16",
        buffers=0,
    )


_MADE: dict[str, Callable[[], Workload]] = {
    "stemdl": _stemdl,
    "resnet50": _resnet50,
    "gpt2": _gpt2,
}


def names() -> list[str]:
    """Workloads that come with the package."""
    return list(_MADE)


@functools.cache
def load(name: str) -> Workload:
    """Return a workload by name.

    Raises:
      InvalidOptionError: there is none of that name.
    """
    if name not in _MADE:
        raise InvalidOptionError(f"--workload {name}: use one of {', '.join(names())}")
    return _MADE[name]()


def uniform(count: int, nbytes: int, template: Workload) -> Workload:
    """A workload like another, but of `count` equal leaves that share `nbytes`.

    They become ready at equal intervals of the backward pass.
    """
    ready = tuple(_FORWARD + (1 - _FORWARD) * (k + 1) / count for k in range(count))
    leaf = (max(nbytes // (4 * count), 1),)
    labels = tuple(f"leaf{k:05}" for k in range(count))
    return dataclasses.replace(
        template,
        name=f"{count} leaves",
        title=f"{count} equal leaves",
        names=labels,
        shapes=(leaf,) * count,
        groups=tuple(f"group{k * 16 // count}" for k in range(count)),
        ready=ready,
    )
