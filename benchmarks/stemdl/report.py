"""The STEMDL benchmark's samples: medians, efficiencies, shares of a step, tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.common import results
from benchmarks.common.taking_turns import ALONE, TOGETHER

OURS = "jaxcomm"
GOAL = 0.97
"""Of the ceiling, on `small`."""

TITLES = {
    ("ranks", ALONE): "JAX, one process, the other core idle",
    ("ranks", TOGETHER): "JAX, two processes that do not communicate: the ceiling",
    ("ranks", OURS): "jaxcomm, two ranks",
    ("devices", "jax.pmap"): "jax.pmap, two host devices",
    ("torch", ALONE): "PyTorch, one process, the other core idle",
    ("torch", TOGETHER): "PyTorch, two processes that do not communicate",
    ("torch", "torch DDP, gloo"): "PyTorch DDP over gloo, two ranks",
}


def combined(ranks: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    """One sample per repeat: the slowest rank's; of `ALONE` the mean of the ranks'."""
    return {
        way: [
            statistics.mean(times) if way == ALONE else max(times)
            for times in zip(*(rank[way] for rank in ranks), strict=True)
        ]
        for way in ranks[0]
    }


def ratio(over: Sequence[float], under: Sequence[float], paired: bool) -> float:
    """Median of ratios of samples that one job took in turn, else ratio of medians.

    Neighbours in time share what else the machine did.
    """
    if not paired:
        return statistics.median(over) / statistics.median(under)
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def efficiencies(samples: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """By peer and way: times; what is left of one process's speed, of the ceiling's.

    PyTorch is compared with its own processes; `jax.pmap`, whose two devices share one,
    with JAX's, which ran in another job.
    """
    found: dict[str, Any] = {}
    for peer, ways in samples.items():
        paired = peer != "devices"
        base = ways if paired else samples.get("ranks", {})
        for way, times in ways.items():
            entry: dict[str, Any] = {**results.summary(times)}
            if way != ALONE and ALONE in base:
                entry["of_one"] = ratio(base[ALONE], times, paired)
                if way != TOGETHER:
                    entry["of_ceiling"] = ratio(base[TOGETHER], times, paired)
            found.setdefault(peer, {})[way] = entry
    return found


def split(trace: dict[str, Any], buckets: int) -> dict[str, list[float]]:
    """Shares of each step but the last, in milliseconds, from a timeline of two ranks.

    A bucket's collective begins on each rank when its operands are there. Until the
    last rank's begins the others wait; from then on data travel.

    Args:
      trace: what JAXCOMM_TIMELINE wrote; its last calls are those of the step.
      buckets: of the step's schedule.

    Returns:
      "step", from its first collective to that of the next, "waiting", mean over ranks,
      and "travelling": a sample of each per step.
    """
    events = [
        e for e in trace["traceEvents"] if e.get("ph") == "X" and e.get("tid") == 1
    ]
    rows = [
        sorted((e for e in events if e["pid"] == rank), key=lambda e: e["ts"])
        for rank in sorted({e["pid"] for e in events})
    ]
    found: dict[str, list[float]] = {"step": [], "waiting": [], "travelling": []}
    # Broadcasts of the first state came before, of whatever number.
    count = min(_tail(row, buckets) for row in rows)
    for step in range(count - 1):
        first = -(count - step) * buckets
        waiting = travelling = 0.0
        for k in range(first, first + buckets):
            starts = [row[k]["ts"] for row in rows]
            ends = [row[k]["ts"] + row[k]["dur"] for row in rows]
            waiting += max(starts) - statistics.mean(starts)
            travelling += statistics.mean(ends) - max(starts)
        whole = rows[0][first + buckets]["ts"] - rows[0][first]["ts"]
        for name, micros in zip(found, (whole, waiting, travelling), strict=True):
            found[name].append(micros / 1e3)
    return found


def _tail(row: list[dict[str, Any]], buckets: int) -> int:
    """How many whole steps of the same buckets a rank's row ends with."""
    names = [e["name"] for e in reversed(row)]
    groups = [names[k : k + buckets] for k in range(0, len(names), buckets)]
    differing = (k for k, group in enumerate(groups) if group != groups[0])
    return next(differing, len(groups))


def markdown(result: dict[str, Any]) -> str:
    """The result as tables."""
    machine = result["machine"]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {result['date']}"
        f"{', **a quick trial**' if result['quick'] else ''}. STEMDL's training step, "
        "float32, Adam, probes as channels; a core and a fixed batch for every rank. "
        "Efficiency is a median of ratios of neighbouring samples: the time of one "
        "process alone (mean of both cores), or of two that do not communicate, over "
        "the way's; of `jax.pmap`, which had jobs of its own, a ratio of medians. "
        "Read ratios: machines differ."
    ]
    for name, entry in result["networks"].items():
        if "times_ms" not in entry:
            continue
        lines += [
            "",
            f"**{name}**: {entry['parameters']:,} parameters, "
            f"{entry['bytes'] / 1e6:.2f} MB a step in {entry['buckets']} buckets "
            f"(batch statistics included), {entry['batch_per_rank']} samples a rank.",
            "",
            "| | step, ms | quartiles | of one alone | of the ceiling |",
            "|---|--:|--:|--:|--:|",
        ]
        for peer, ways in entry["times_ms"].items():
            order = [way for p, way in TITLES if p == peer]
            for way in sorted(ways, key=order.index):
                found = ways[way]
                low, high = found["quartiles"]
                quartiles = f"{low:.4g} to {high:.4g}" if found["samples"] > 1 else ""
                cells = [
                    f"{found[key]:.3f}" if key in found else ""
                    for key in ("of_one", "of_ceiling")
                ]
                lines.append(
                    f"| {TITLES[peer, way]} | {found['median']:.4g} | {quartiles} "
                    f"| {cells[0]} | {cells[1]} |"
                )
        if "split_ms" in entry:
            lines += ["", _shares(entry["split_ms"])]
    small = result["networks"].get("small", {}).get("times_ms")
    if small is not None:
        value = small["ranks"][OURS]["of_ceiling"]
        met = "met" if value >= GOAL else "**missed**"
        lines += ["", f"Goal: {GOAL} of the ceiling on `small`; {value:.3f}, {met}."]
    if training := result.get("training"):
        shards, memory = training["shards"], training["memory"]
        lines += [
            "",
            f"`train.py` on two ranks, `{training['network']}`, {training['steps']} "
            f"steps, {training['rounds']} times in turn: a step takes "
            f"{shards['step_ms']:.1f} ms where grain reads the batches from shards, "
            f"{memory['step_ms']:.1f} ms where they come from memory. Of a step, "
            f"{shards['data_ms']:.2f} and {memory['data_ms']:.2f} ms are waited for a "
            f"batch ({shards['data_ms'] / shards['step_ms']:.1%}, "
            f"{memory['data_ms'] / memory['step_ms']:.1%}); what grain's threads take "
            "from the step is in the difference of the two.",
        ]
    if any("torch" in e.get("times_ms", {}) for e in result["networks"].values()):
        lines += [
            "",
            "PyTorch keeps batch statistics per rank (its synchronised normalisation "
            "has no CPU version); JAX's steps average them, in the forward pass.",
        ]
    return "\n".join(lines) + "\n"


def _shares(times: dict[str, results.Summary]) -> str:
    median = {name: summary["median"] for name, summary in times.items()}
    whole = median["step"]
    return (
        f"By the timeline of {times['step']['samples']} more of jaxcomm's steps, "
        f"{whole:.4g} ms each: data travel for {median['travelling']:.3g} ms "
        f"({median['travelling'] / whole:.1%}), a rank waits for the other for "
        f"{median['waiting']:.3g} ms ({median['waiting'] / whole:.1%}), the rest is "
        "computation."
    )
