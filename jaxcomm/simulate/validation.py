"""The model against what was published, always on Summit.

Anchors are the abstracts' figures, which is what can be quoted: Romero et al., NSDI'22,
and Kurth et al., SC'18 (DOI 10.1109/sc.2018.00054). One parameter is fitted, to one
anchor; every other row is a prediction, and some disagree.
"""

from __future__ import annotations

import dataclasses

from jaxcomm.simulate import (
    dynamic,
    experiment,
    machines,
    noise,
    uncertainty,
    workloads,
)
from jaxcomm.simulate.machines import Parameter
from jaxcomm.simulate.negotiation import Negotiation
from jaxcomm.simulate.workloads import Workload

# benchmarks/results/control.json.
MEASURED_CYCLE_MS = 1.08


@dataclasses.dataclass(frozen=True)
class Row:
    """One published figure and what the model says.

    Attributes:
      anchor: what was published.
      published: its value.
      predicted: the model's.
      low: lower end of the prediction's range, all parameters moved at once.
      high: upper end.
      fitted_parameter: the parameter that was fitted to this figure, or None.
      note: what to keep in mind.
    """

    anchor: str
    published: float
    predicted: float
    low: float
    high: float
    fitted_parameter: str | None
    note: str

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.published - 1


def predecessor() -> Workload:
    """DeepLabv3+ of the SC'18 run, as far as its abstract tells.

    325.8 PF/s of 27,360 ranks at 0.907 are 13.1 TFLOP/s a rank in float32. Its leaves
    are taken to be those of ResNet-50, and its step to last a second: both assumed.
    """
    peak = machines.load("summit")["float32_flops"]
    rate = 325.8e15 / 27360 / 0.907
    return dataclasses.replace(
        workloads.load("resnet50"),
        name="deeplabv3+",
        flops=rate,
        operand="float32",
        utilisation=Parameter(
            rate / peak, 0.5 * rate / peak, 1.5 * rate / peak, "assumed"
        ),
    )


def check(
    *,
    steps: int = 20,
    samples: int = 8,
    seed: int = 0,
    progress: experiment.Progress = lambda steps: None,
) -> list[Row]:
    """Predict every anchor.

    Args:
      steps: steps per prediction.
      samples: points of the parameters' ranges for `Row.low` and `Row.high`.
      seed: fixes every draw.
      progress: called with 1 after every step.
    """
    summit = machines.load("summit")

    def play(
        workload: Workload, ranks: int, *designs: str
    ) -> list[list[experiment.Result]]:
        """The nominal run, and those of the samples."""
        nominal = experiment.simulate(
            summit,
            workload,
            ranks,
            steps=steps,
            seed=seed,
            designs=designs,
            progress=progress,
        )
        others = experiment.run_variants(
            uncertainty.variants(summit, workload, samples, seed),
            ranks,
            steps=2,
            seed=seed,
            designs=designs,
            progress=progress,
        )
        return [nominal, *others]

    def speedups(runs: list[list[experiment.Result]]) -> list[float]:
        return [first.step_ms / second.step_ms for first, second in runs]

    stemdl, resnet = workloads.load("stemdl"), workloads.load("resnet50")
    ours = "cache+groups"
    whole = play(stemdl, 27600, ours)
    rows = []
    for workload in (resnet, stemdl):
        twice = speedups(play(workload, 6000, "coordinator", ours))
        rows.append(
            _row(
                f"NSDI'22: 2x over the original at 6,000 GPUs [{workload.name}]",
                2.0,
                twice,
                None,
                "the abstract does not name the workload: the gain depends on the "
                "number of tensors and the length of a step",
            )
        )
    rows.append(
        _row(
            "NSDI'22: scaling of 0.93 at 27,600 GPUs [stemdl]",
            *(0.93, [run[0].efficiency for run in whole], None),
            "against a median device alone; what the paper scales from is not quotable",
        )
    )
    rows.append(
        _row(
            "NSDI'22: comparable to DDP up to 1,536 GPUs, step time over DDP's "
            "[resnet50]",
            1.0,
            speedups(play(resnet, 1536, ours, "ddp")),
            None,
            "'comparable' is taken as 1",
        )
    )
    tree = [run[0].efficiency for run in play(predecessor(), 27360, "tree")]
    rows.append(
        _row(
            "SC'18: 0.907 at 27,360 GPUs [DeepLabv3+]",
            0.907,
            tree,
            None,
            "its leaves, its step of 1 s and the tree's radix of 4 are assumed",
        )
    )
    rows.append(_measured_here(seed))
    sustained = [27600 * stemdl.flops / (1e15 * run[0].step_ms) for run in whole]
    rows.append(
        _row(
            "NSDI'22: 1.54 EF/s at 27,600 GPUs [stemdl]",
            1.54,
            sustained,
            "utilisation of stemdl",
            "agrees by construction",
        )
    )
    return rows


def _measured_here(seed: int) -> Row:
    """Horovod itself, on two ranks of one host: cycles and rounds without data.

    Measured by `make bench-control`, "Horovod grouped, 161 tensors, cycle 1 ms".
    """
    here, resnet = machines.load("here"), workloads.load("resnet50")
    empty = dataclasses.replace(
        resnet, shapes=((1,),) * len(resnet.shapes), groups=("all",) * 161, flops=1.0
    )
    settings = dataclasses.replace(dynamic.CACHE_GROUPS, cycle_seconds=1e-3)

    def step_ms(wake: float) -> float:
        machine = here.at({"wake_seconds": wake})
        plane = Negotiation(machine, 2)
        design = dynamic.Dynamic(settings, empty, plane)
        shares = noise.real_shares(empty, 0.0, seed)
        outcomes = [
            design.step(
                noise.ready(empty, machine, noise.draw(2, 161, k, seed), shares)
            )
            for k in range(6)
        ]
        # The first two fill the cache and fall into step with the cycles.
        return 1e3 * sum(x.seconds for x in outcomes[2:]) / 4

    wake = here.parameters["wake_seconds"]
    return Row(
        "measured here: Horovod 0.28.1's step without data, 2 ranks, 161 tensors in a "
        "group, cycle of 1 ms, in ms",
        MEASURED_CYCLE_MS,
        step_ms(wake.value),
        step_ms(wake.low),
        step_ms(wake.high),
        None,
        "the range is that of how late the thread wakes",
    )


def _row(
    anchor: str,
    published: float,
    values: list[float],
    fitted: str | None,
    note: str,
) -> Row:
    return Row(anchor, published, values[0], min(values), max(values), fitted, note)


def as_dicts(rows: list[Row]) -> list[dict[str, object]]:
    """Rows for JSON, with their errors."""
    return [{**dataclasses.asdict(row), "error": row.error} for row in rows]
