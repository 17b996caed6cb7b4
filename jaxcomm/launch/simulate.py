"""`jaxcomm simulate`: predict step times and efficiency of designs at any size."""

from __future__ import annotations

import json
from pathlib import Path

from rich import box
from rich.progress import Progress
from rich.table import Table

from jaxcomm import terminal
from jaxcomm.simulate import machines, report, workloads


def main(
    machine: str,
    workload: str,
    ranks: str,
    steps: int,
    samples: int,
    seed: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Predict, then print a document or tables, and draw.

    Raises:
      InvalidOptionError: an option cannot be used; names it and what to do.
    """
    where, what = machines.load(machine), workloads.load(workload)
    sizes = report.parse_ranks(ranks)
    if plot is not None:
        report.check_writable("--plot", plot)
        # Fails now, if matplotlib is missing.
        from jaxcomm.plots import pyplot

        pyplot()
    with Progress(console=terminal.console(stderr=True), transient=True) as bar:
        task = bar.add_task("simulating", total=1.0)
        found = report.make(
            where,
            what,
            sizes,
            steps=steps,
            samples=samples,
            seed=seed,
            progress=lambda phrase, done: bar.update(
                task, description=phrase, completed=done
            ),
        )
    if plot is not None:
        from jaxcomm.simulate import figures

        figures.overview(found, f"{what.title}\n{where.title}", plot)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        show(found, what.title, where.title)


def show(found: report.Report, what: str, where: str) -> None:
    """Print results and validation as tables."""
    console = terminal.console()
    console.print(f"{what}\n{where}", style="italic", highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("ranks", "design", "eff.", "range", "step", "control", "exposed"):
        side = "left" if name == "design" else "right"
        table.add_column(name, justify=side, no_wrap=True)
    last = None
    for row in found["results"]:
        if last not in (None, row["ranks"]):
            table.add_section()
        first = row["ranks"] != last
        last = row["ranks"]
        ends = row["efficiency_range"]
        table.add_row(
            f"{last:,}{'*' if row['extrapolated'] else ''}" if first else "",
            row["design"],
            f"{row['efficiency']:.3f}",
            _span(*ends) if ends else "",
            *(_ms(row[key]) for key in ("step_ms", "control_ms", "exposed_comm_ms")),
        )
    console.print(table)
    console.print(
        f"In ms a step. A device alone computes it in {_ms(found['compute_ms'])}. "
        "Range: 5th to 95th percentile of efficiency, all parameters moved in theirs. "
        "Control: how long the control plane works for a step, mostly beside the "
        "computation. Exposed: communication that no computation hides."
    )
    if any(row["extrapolated"] for row in found["results"]):
        console.print("* more ranks than the machine has")
    console.print("Published figures and the model, on Summit", style="italic")
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("anchor", "published", "model", "range", "error", "fitted"):
        anchor = name == "anchor"
        table.add_column(
            name, justify="left" if anchor else "right", no_wrap=not anchor
        )
    for row in found["validation"]:
        table.add_row(
            row["anchor"],
            f"{row['published']:g}",
            f"{row['predicted']:.3f}",
            _span(row["low"], row["high"]),
            f"{row['error']:+.0%}",
            "yes" if row["fitted_parameter"] else "no",
        )
    console.print(table)


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 1e5 else f"{value / 1e3:.0f} s"


def _span(low: float, high: float) -> str:
    return f"{low:.3f}-{high:.3f}"
