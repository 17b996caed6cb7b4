"""Pictures of predictions, from the documents that `report` and `scaling` make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxcomm.plots import pyplot
from jaxcomm.simulate.experiment import DESIGNS
from jaxcomm.simulate.machines import PARAMETERS
from jaxcomm.simulate.report import Report

# Okabe and Ito's colours, which most people can tell apart; and a dash for each, as
# curves lie on one another.
_LOOKS: dict[str, tuple[str, Any, str]] = {
    "coordinator": ("#d55e00", "-", "o"),
    "cache": ("#e69f00", "--", "s"),
    "cache+groups": ("#cc79a7", "-.", "d"),
    "ddp": ("#0072b2", ":", "^"),
    "xla": ("#56b4e9", (0, (5, 1, 1, 1, 1, 1)), "v"),
    "static": ("#009e73", "-", "*"),
}


def _line(design: str) -> dict[str, Any]:
    colour, style, marker = _LOOKS[design]
    return {
        "color": colour,
        "linestyle": style,
        "marker": marker,
        "markersize": 5,
        "label": design,
    }


def overview(report: Report, title: str, path: Path) -> None:
    """Efficiency by ranks, and what a step loses, of one report."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    _efficiency(left, report["results"])
    largest = max(row["ranks"] for row in report["results"])
    rows = [row for row in report["results"] if row["ranks"] == largest]
    _losses(right, rows)
    right.set_title(f"what a step loses at {largest:,} ranks")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def efficiencies(reports: Sequence[tuple[str, Report]], path: Path) -> None:
    """Efficiency by ranks, one panel per report."""
    plt = pyplot()
    figure, axes = plt.subplots(
        1, len(reports), figsize=(4.4 * len(reports), 4.3), layout="constrained"
    )
    for axis, (title, report) in zip(axes, reports, strict=True):
        _efficiency(axis, report["results"])
        axis.set_title(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _efficiency(axis: Any, rows: list[dict[str, Any]]) -> None:
    for design in DESIGNS:
        mine = [row for row in rows if row["design"] == design]
        ranks = [row["ranks"] for row in mine]
        axis.plot(ranks, [row["efficiency"] for row in mine], **_line(design))
        # One band is enough: those without a coordinator coincide.
        if design in ("coordinator", "static") and mine[0]["efficiency_range"]:
            low, high = zip(*(row["efficiency_range"] for row in mine), strict=True)
            axis.fill_between(ranks, low, high, color=_LOOKS[design][0], alpha=0.15)
    sizes = sorted({row["ranks"] for row in rows})
    axis.set_xscale("log")
    axis.set_xticks(sizes, [f"{n:,}" for n in sizes], rotation=40, ha="right")
    axis.minorticks_off()
    axis.set(xlabel="ranks", ylabel="efficiency", ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower left")


def _losses(axis: Any, rows: list[dict[str, Any]]) -> None:
    names = [row["design"] for row in rows]
    stragglers = [row["straggler_ms"] for row in rows]
    exposed = [row["exposed_comm_ms"] for row in rows]
    places = range(len(names))
    axis.barh(places, stragglers, color="0.75", label="waiting for the slowest rank")
    colours = [_LOOKS[name][0] for name in names]
    axis.barh(places, exposed, left=stragglers, color=colours, label="communication")
    for place, (a, b) in enumerate(zip(stragglers, exposed, strict=True)):
        axis.text(a + b, place, f" {b:,.1f} ms", va="center", fontsize=8)
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    axis.set_xlabel("ms beyond a lone device's step (coloured: communication)")
    axis.margins(x=0.15)


def tornado(panels: Sequence[dict[str, Any]], path: Path, shown: int = 10) -> None:
    """Swings of efficiency, one panel per design: widest on top."""
    plt = pyplot()
    figure, axes = plt.subplots(
        1, len(panels), figsize=(6.2 * len(panels), 4.6), layout="constrained"
    )
    for axis, panel in zip(axes, panels, strict=True):
        swings, nominal = panel["swings"][:shown], panel["nominal"]
        for place, swing in enumerate(swings):
            for end, colour in (("low", "#56b4e9"), ("high", "#d55e00")):
                value = swing[f"at_{end}"]
                axis.barh(place, value - nominal, left=nominal, color=colour)
        labels = [
            f"{s['knob']}\n{_in_units(s['knob'], s['low'], s['high'])}" for s in swings
        ]
        axis.set_yticks(range(len(swings)), labels, fontsize=7)
        axis.invert_yaxis()
        axis.axvline(nominal, color="k", linewidth=0.8)
        axis.set_title(f"{panel['design']}: {nominal:.3f}")
        axis.set_xlabel("efficiency (blue: low end of the parameter, orange: high)")
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _in_units(knob: str, low: float, high: float) -> str:
    """A range in units that people use."""
    unit = PARAMETERS[knob][0] if knob in PARAMETERS else "1"
    scale, name = {"s": (1e6, " us"), "B/s": (1e-9, " GB/s")}.get(unit, (1.0, ""))
    return f"{low * scale:.3g} to {high * scale:.3g}{name}"


def control(curves: Sequence[dict[str, Any]], path: Path) -> None:
    """Control-plane time by number of tensors, one panel per number of ranks."""
    plt = pyplot()
    figure, axes = plt.subplots(
        1, len(curves), figsize=(5 * len(curves), 4), layout="constrained", sharey=True
    )
    for axis, curve in zip(axes, curves, strict=True):
        for design in DESIGNS[:3]:
            mine = [row for row in curve["rows"] if row["design"] == design]
            tensors = [row["tensors"] for row in mine]
            axis.loglog(tensors, [row["control_ms"] for row in mine], **_line(design))
        counts = sorted({row["tensors"] for row in curve["rows"]})
        axis.set_xticks(counts, [str(n) for n in counts])
        axis.minorticks_off()
        axis.set_title(f"{curve['ranks']:,} ranks (ddp, xla, static: 0)")
        axis.set(xlabel="gradient tensors", ylabel="control plane, ms per step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def energy(panels: Sequence[tuple[str, Report]], path: Path) -> None:
    """Energy of a step beyond what computing it takes on devices of median speed."""
    plt = pyplot()
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5 * len(panels), 3.4), layout="constrained"
    )
    for axis, (title, report) in zip(axes, panels, strict=True):
        largest = max(row["ranks"] for row in report["results"])
        rows = [row for row in report["results"] if row["ranks"] == largest]
        lost = [row["energy_j"] * (1 - row["efficiency"]) / 1e6 for row in rows]
        names = [row["design"] for row in rows]
        axis.barh(names, lost, color=[_LOOKS[name][0] for name in names])
        for place, value in enumerate(lost):
            axis.text(value, place, f" {value:.2f}", va="center", fontsize=8)
        useful = rows[0]["energy_j"] * rows[0]["efficiency"] / 1e6
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_title(f"{title}, {largest:,} ranks")
        axis.set_xlabel(f"MJ per step lost; computing takes {useful:.2f} MJ")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def gains(maps: Sequence[dict[str, Any]], path: Path) -> None:
    """Step time of other designs over static's, by ranks and tensors."""
    plt = pyplot()
    figure, axes = plt.subplots(
        1, len(maps), figsize=(4.3 * len(maps), 4), layout="constrained"
    )
    for axis, each in zip(axes, maps, strict=True):
        ratios = each["ratios"]
        # Colours saturate; the numbers tell.
        axis.imshow(ratios, cmap="PuOr_r", vmin=0.5, vmax=1.5, aspect="auto")
        for i, row in enumerate(ratios):
            for k, value in enumerate(row):
                text = f"{value:.2f}" if value < 10 else f"{value:.0f}"
                colour = "w" if value > 1.4 else "k"
                axis.text(
                    k, i, text, ha="center", va="center", fontsize=8, color=colour
                )
        axis.set_xticks(range(len(each["ranks"])), [f"{n:,}" for n in each["ranks"]])
        axis.set_yticks(range(len(each["tensors"])), each["tensors"])
        axis.set_xlabel("ranks")
        axis.set_ylabel("gradient tensors")
        axis.set_title(f"{each['design']} / static")
    figure.savefig(path, dpi=120)
    plt.close(figure)
