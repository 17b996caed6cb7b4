"""Make docs/scaling.md's figures and tables: python -m jaxcomm.simulate.scaling DOCS.

Figures go to DOCS/images, every number to DOCS/scaling.json, and the tables between the
markers of DOCS/scaling.md are made from it. About two minutes on one core.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from rich.progress import Progress

from jaxcomm import terminal
from jaxcomm.plots import pyplot
from jaxcomm.simulate import (
    experiment,
    figures,
    machines,
    report,
    tables,
    uncertainty,
    workloads,
)

SIZES = [6, 96, 384, 1536, 6000, 27600]
LARGEST = 27600
TENSORS = [4, 16, 64, 256, 1024]
MAP_SIZES = [6, 48, 384, 1536, 6000, 27600]
# Machine, and as many ranks as it may have, or as make sense.
ELSEWHERE = [
    ("frontier", 65536),
    ("dgx-h100", 16384),
    ("ethernet", 512),
    ("here", 2),
]


def collect(bar: Progress) -> dict[str, Any]:
    """Everything that the page shows."""
    summit = machines.load("summit")
    task = bar.add_task("simulating", total=9.0)

    def advance(phrase: str) -> None:
        bar.update(task, description=phrase, advance=1.0)

    found: dict[str, Any] = {"efficiency": {}, "elsewhere": []}
    for name in workloads.names():
        found["efficiency"][name] = report.make(
            summit, workloads.load(name), SIZES, steps=40, samples=12
        )
        # The same in all three.
        found["validation"] = found["efficiency"][name].pop("validation")
        advance(f"efficiency of {name}")
    found["tornado"] = []
    for design in ("coordinator", "static"):
        nominal, swings = uncertainty.tornado(
            summit, workloads.load("stemdl"), LARGEST, design
        )
        rows = [dataclasses.asdict(swing) for swing in swings]
        panel = {"design": design, "nominal": nominal, "swings": rows}
        found["tornado"].append(panel)
        advance(f"parameters of {design}")
    found["control"] = [_control(summit, ranks) for ranks in (1536, LARGEST)]
    advance("control plane by tensors")
    found["gains"] = _gains(summit)
    advance("gains by tensors and ranks")
    found["order"] = _order(summit)
    advance("orders that differ")
    for name, ranks in ELSEWHERE:
        for workload in ("stemdl", "resnet50", "gpt2"):
            rows = experiment.simulate(
                machines.load(name), workloads.load(workload), ranks, steps=8
            )
            found["elsewhere"].append(
                {
                    "machine": name,
                    "workload": workload,
                    "ranks": ranks,
                    "results": [dataclasses.asdict(row) for row in rows],
                }
            )
    advance("other machines")
    return found


def _control(machine: machines.Machine, ranks: int) -> dict[str, Any]:
    """Control-plane time by number of tensors that share STEMDL's bytes and time."""
    stemdl, rows = workloads.load("stemdl"), []
    nbytes = int(stemdl.leaf_bytes.sum())
    for tensors in (8, 16, 32, 64, 128, 256, 512, 1024):
        results = experiment.simulate(
            machine,
            workloads.uniform(tensors, nbytes, stemdl),
            ranks,
            steps=3,
            designs=experiment.DESIGNS[:3],
        )
        rows += [
            {"tensors": tensors, "design": r.design, "control_ms": r.control_ms}
            for r in results
        ]
    return {"ranks": ranks, "rows": rows}


def _gains(machine: machines.Machine) -> list[dict[str, Any]]:
    """Step times over static's, for ResNet-50's bytes and time in so many tensors."""
    resnet = workloads.load("resnet50")
    nbytes = int(resnet.leaf_bytes.sum())
    others = [name for name in experiment.DESIGNS if name != "static"]
    ratios: dict[str, list[list[float]]] = {name: [] for name in others}
    for tensors in TENSORS:
        workload = workloads.uniform(tensors, nbytes, resnet)
        rows: dict[str, list[float]] = {name: [] for name in others}
        for ranks in MAP_SIZES:
            # Many draws where they cost nothing, as Horovod's cycles fall anywhere.
            steps = 40 if ranks * tensors < 1e6 else 4
            results = experiment.simulate(machine, workload, ranks, steps=steps)
            step = {r.design: r.step_ms for r in results}
            for name in others:
                rows[name].append(step[name] / step["static"])
        for name in others:
            ratios[name].append(rows[name])
    return [
        {"design": name, "tensors": TENSORS, "ranks": MAP_SIZES, "ratios": ratios[name]}
        for name in others
    ]


def _order(machine: machines.Machine) -> list[dict[str, Any]]:
    """Exposed communication where real ready times stray from the planned ones."""
    rows = []
    for spread in (0.0, 0.02, 0.05, 0.1, 0.2):
        moved = machine.at({"order_spread": spread})
        for workload in ("resnet50", "gpt2"):
            exposed: dict[str, float] = {}
            for seed in range(8):
                for result in experiment.simulate(
                    moved, workloads.load(workload), 384, steps=3, seed=seed
                ):
                    value = result.exposed_comm_ms / 8
                    exposed[result.design] = exposed.get(result.design, 0.0) + value
            rows.append({"spread": spread, "workload": workload, "exposed_ms": exposed})
    return rows


def draw(found: dict[str, Any], folder: Path) -> None:
    """Write all figures."""
    panels = [
        (workloads.load(name).title.split(",")[0], each)
        for name, each in found["efficiency"].items()
    ]
    figures.efficiencies(panels, folder / "scaling-efficiency.png")
    figures.tornado(found["tornado"], folder / "scaling-tornado.png")
    figures.control(found["control"], folder / "scaling-control.png")
    figures.energy(panels[:2], folder / "scaling-energy.png")
    shown = ("coordinator", "cache+groups", "ddp")
    maps = [each for each in found["gains"] if each["design"] in shown]
    figures.gains(maps, folder / "scaling-gains.png")


def main(docs: str) -> None:
    """Simulate, draw, and fill in the page."""
    folder = Path(docs)
    pyplot()  # says now, not after the work, if matplotlib is missing
    with Progress(console=terminal.console(stderr=True)) as bar:
        found = collect(bar)
    draw(found, folder / "images")
    (folder / "scaling.json").write_text(json.dumps(tables.rounded(found)) + "\n")
    page = folder / "scaling.md"
    page.write_text(tables.fill(page.read_text(), tables.rounded(found)))


if __name__ == "__main__":
    main(*sys.argv[1:])
