"""The settings of a training, with their defaults and what each may be.

`config.load` reads them from a file and checks them; a section of the file is a class.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from stemdl.model import losses
from stemdl.model.network import LAYOUTS, NETWORKS
from stemdl.training.telemetry import UNTIMED_STEPS


def _one_of(default: str, choices: Sequence[str]) -> Any:
    return dataclasses.field(default=default, metadata={"choices": tuple(choices)})


def _number(default: float, least: float = 0, most: float = math.inf) -> Any:
    return dataclasses.field(default=default, metadata={"range": (least, most)})


@dataclasses.dataclass(frozen=True)
class Training:
    """How long, on what.

    Attributes:
      steps: updates, and the length of the schedule.
      batch: samples per update, over all ranks together.
      accumulate: parts that each rank's share of a batch is computed in, one after the
        other; each has batch statistics of its own.
      samples: training samples; 0: all that shards hold, or so many simulated ones
        as `dataconfig.SAMPLES`.
      seed: of the first parameters and of the order of samples.
      float64: compute in double precision.
    """

    steps: int = _number(1600, UNTIMED_STEPS + 1)
    batch: int = _number(16, 1)
    accumulate: int = _number(1, 1)
    samples: int = _number(0, 0)
    seed: int = _number(0, 0, 2**32 - 1)
    float64: bool = False


@dataclasses.dataclass(frozen=True)
class Noise:
    """Electrons per pattern, drawn anew for each sample and epoch (see `noise`).

    Attributes:
      least_dose: 0 trains without noise.
      most_dose: draws are log-uniform between the two.
    """

    least_dose: float = _number(0.0)
    most_dose: float = _number(1e7, 1)


@dataclasses.dataclass(frozen=True)
class Network:
    """Which network; layout "default" is the named one's own (see `StemNet`)."""

    name: str = _one_of("tiny", tuple(NETWORKS))
    layout: str = _one_of("default", ("default", *LAYOUTS))
    checkpoint: bool = False


@dataclasses.dataclass(frozen=True)
class Loss:
    """See `losses.named`."""

    name: str = _one_of("mse", losses.NAMES)
    huber_delta: float = _number(1.0, 1e-9)
    gradient_weight: float = _number(0.0)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """See `optimizer.make`; LARC's defaults are STEMDL's stored ones for "scale"."""

    name: str = _one_of("adam", ("adam", "sgd"))
    lr: float = _number(3e-3, 0, 10)
    momentum: float = _number(0.0, 0, 1)
    larc: str = _one_of("off", ("off", "scale", "clip"))
    larc_eta: float = _number(2e-3)
    larc_epsilon: float = _number(6.25e-6)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """See `optimizer.learning_rate`.

    Attributes:
      name: "cosine" or "staircase".
      warm_up_steps: until the rate is reached.
      times_ranks: whether the rate grows with the number of ranks.
      final_fraction: of the rate at which a cosine ends.
      decay_steps: between two treads of the staircase.
      decay_rate: by which each multiplies the rate.
    """

    name: str = _one_of("cosine", ("cosine", "staircase"))
    warm_up_steps: int = _number(30)
    times_ranks: bool = False
    final_fraction: float = _number(0.02, 0, 1)
    decay_steps: int = _number(400, 1)
    decay_rate: float = _number(0.5, 1e-9, 1)


@dataclasses.dataclass(frozen=True)
class Precision:
    """Dtype of the computation, and in float16 the loss scale (see `precision`)."""

    compute: str = _one_of("float32", ("float32", "bfloat16", "float16"))
    loss_scale: float = _number(2.0**24, 1, 2.0**60)
    growth_interval: int = _number(2000, 1)


@dataclasses.dataclass(frozen=True)
class Communication:
    """How gradients are averaged.

    Attributes:
      wire_dtype: what gradients travel as; batch statistics stay float32.
      groups: "planner", or "scopes": one bucket for each top-level module.
      bucket_bytes: at which the planner closes a bucket; 0 asks its cost model.
    """

    wire_dtype: str = _one_of("float32", ("float32", "bfloat16", "float16"))
    groups: str = _one_of("planner", ("planner", "scopes"))
    bucket_bytes: int = _number(0)


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that the trained parameters depend on, but data and ranks."""

    training: Training = dataclasses.field(default_factory=Training)
    noise: Noise = dataclasses.field(default_factory=Noise)
    network: Network = dataclasses.field(default_factory=Network)
    loss: Loss = dataclasses.field(default_factory=Loss)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    precision: Precision = dataclasses.field(default_factory=Precision)
    communication: Communication = dataclasses.field(default_factory=Communication)

    def flat(self) -> dict[str, Any]:
        """All values by "section.key"."""
        return {
            f"{section}.{key}": value
            for section, keys in dataclasses.asdict(self).items()
            for key, value in keys.items()
        }

    def to_toml(self) -> str:
        """The file that `load` reads this from."""
        lines = []
        for section, keys in dataclasses.asdict(self).items():
            # JSON's texts, numbers and booleans are TOML's too.
            lines += [
                f"[{section}]",
                *(f"{k} = {json.dumps(v)}" for k, v in keys.items()),
            ]
            lines.append("")
        return "\n".join(lines)
