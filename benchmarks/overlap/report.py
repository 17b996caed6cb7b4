"""What hid behind computation: from summaries to fractions, tables and the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common.results import Summary

COMPUTE, COMMUNICATION = "compute", "communication"


def overlaps(times: dict[str, Summary]) -> dict[str, dict[str, float]]:
    """For every way: its median step, and the fraction of what could hide that did.

    That fraction is (compute + communication - step) / min(compute, communication).
    """
    median = {way: summary["median"] for way, summary in times.items()}
    compute, wire = median.pop(COMPUTE), median.pop(COMMUNICATION)
    return {
        way: {
            "step_ms": step,
            "over_longer": step / max(compute, wire),
            "overlap": (compute + wire - step) / min(compute, wire),
        }
        for way, step in median.items()
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as tables."""
    lines = [
        f"Two hosts of one core each, {result['megabits']:g} Mbit/s between them, "
        f"{result['date']}. Overlap is the part of what could be hidden that was: "
        "(compute + communication - step) / the shorter of the two."
    ]
    for name, job in result["jobs"].items():
        times = job["times_ms"]
        compute, wire = (times[k]["median"] for k in (COMPUTE, COMMUNICATION))
        lines += [
            "",
            f"**{name}**: {job['bytes'] / 1e6:.1f} MB of gradients; medians of "
            f"{times[COMPUTE]['samples']}; computing alone takes {compute:.0f} ms, "
            f"communicating alone {wire:.0f} ms: a step takes at least "
            f"{max(compute, wire):.0f} and, with nothing hidden, "
            f"{compute + wire:.0f} ms.",
            "",
            "| | buckets | step, ms | / longer of the two | overlap |",
            "|---|--:|--:|--:|--:|",
        ]
        for way, found in job["overlaps"].items():
            lines.append(
                f"| {way} | {job['buckets'].get(way, '')} | {found['step_ms']:.0f} "
                f"| {found['over_longer']:.2f} | {found['overlap']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def draw(trace: dict[str, Any], buckets: int, path: Path) -> None:
    """Draw the last step of so many buckets, of rank 0, from a timeline file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    events = [e for e in trace["traceEvents"] if e.get("ph") == "X" and not e["pid"]]
    done = sorted((e for e in events if e["tid"] == 1), key=lambda e: e["ts"])[
        -buckets:
    ]
    first, last = done[0]["ts"], done[-1]["ts"]
    waits = {
        e["args"]["bucket"]: e
        for e in events
        if e["tid"] == 0 and first - 1e6 < e["ts"] <= last
    }
    start = min(e["ts"] for e in done)
    start = min([start, *(waits[k]["ts"] for k in waits if k < buckets)])
    figure, axes = plt.subplots(figsize=(9, 3.5), layout="constrained")
    for row, event in enumerate(done):
        wait = waits.get(event["args"]["bucket"])
        if wait is not None:
            axes.barh(
                row, wait["dur"] / 1e3, left=(wait["ts"] - start) / 1e3, color="0.8"
            )
        left = (event["ts"] - start) / 1e3
        axes.barh(row, event["dur"] / 1e3, left=left, color="tab:blue")
    ready = [waits[k]["ts"] for k in waits if k < buckets] or [last]
    axes.axvline((max(ready) - start) / 1e3, color="tab:red", linestyle="--")
    axes.annotate(
        "the last gradient is there",
        ((max(ready) - start) / 1e3, -0.4),
        xytext=(-5, 0),
        textcoords="offset points",
        horizontalalignment="right",
        color="tab:red",
    )
    axes.set_yticks(range(len(done)), [e["name"][:34] for e in done], fontsize=7)
    axes.invert_yaxis()
    axes.set(
        xlabel="ms since the first bucket was ready",
        title="One step: buckets wait (grey) and travel (blue)",
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
