"""What the reduction adds to a step: from summaries to tables and the plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common import results

PLAIN_SUFFIX = {"plain": ", plain mpiexec", "plain devices": ", plain Python"}
OURS, RAW, PLAIN = "jaxcomm", "raw MPI in place", "no reduction"
# These reduce what already lies in memory: nothing is to be subtracted.
BARE = (
    RAW,
    "memory limit (NumPy)",
    "torch flat, gloo",
    "Horovod, per leaf async",
    "Horovod, grouped",
)
TITLES = {
    "resnet50": "ResNet-50: 161 leaves, 102 MB",
    "stemdl": "STEMDL, growth 256: 33 leaves, 0.93 GB",
    "gpt2": "GPT-2 small: 148 leaves, 0.50 GB",
    "small": "1,000 leaves of 1 KB",
    "one_leaf": "one leaf of 400 MB",
    "mixed": "ResNet-50 with bfloat16 convolutions: 161 leaves, 51 MB",
    "dispatch": "100 leaves of 16 bytes, 1 rank: what a call costs without data",
}
Times = dict[str, results.Summary]


def alone(jobs: dict[str, Times]) -> dict[str, float]:
    """Milliseconds that the reduction adds to a step, by way, fastest first.

    Args:
      jobs: times by way, of every kind of job.

    Returns:
      The median of each way less the median of the same job's program without
      reduction.
    """
    found: dict[str, float] = {}
    for peer, times in jobs.items():
        medians = {way: summary["median"] for way, summary in times.items()}
        for way in BARE:
            if way in medians:
                found[way] = medians.pop(way)
        plain = medians.pop(PLAIN, 0.0)
        sharded = medians.pop("no reduction, shard_map", plain)
        for way, median in medians.items():
            name = way + PLAIN_SUFFIX.get(peer, "")
            found[name] = median - (sharded if way == "shard_map" else plain)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def targets(result: dict[str, Any]) -> list[tuple[str, str, float | None, bool]]:
    """(measure, target, value, met) for what the project promises."""
    times = {work: entry["alone_ms"] for work, entry in result["workloads"].items()}
    big, small, empty = times["resnet50"], times["small"], times["dispatch"]

    def ratio(table: dict[str, float], over: str, under: str) -> float | None:
        return table[over] / table[under] if over in table else None

    memory = result["peak_bytes"]
    calls = result["mpi_calls_per_step"][OURS]
    others = sum(n for kind, n in calls.items() if kind != "Allreduce")
    horovod = [big[way] for way in big if way.startswith("Horovod")]
    rows = [
        ("reduction / raw MPI in place", "<=", 1.3, ratio(big, OURS, RAW)),
        ("pmap / jaxcomm", ">=", 4, ratio(big, "pmap", OURS)),
        (
            "pmap as its users start it / jaxcomm",
            ">=",
            4,
            ratio(big, "pmap, plain Python", OURS),
        ),
        ("mpi4jax per leaf / jaxcomm", ">=", 3, ratio(big, "mpi4jax per leaf", OURS)),
        (
            "mpi4jax as its users start it / jaxcomm",
            ">=",
            3,
            ratio(big, "mpi4jax per leaf, plain mpiexec", OURS),
        ),
        (
            "the same, jaxcomm started like it",
            ">=",
            3,
            ratio(big, "mpi4jax per leaf, plain mpiexec", "jaxcomm, plain mpiexec"),
        ),
        ("gloo shard_map / jaxcomm", ">=", 12, ratio(big, "shard_map, gloo", OURS)),
        ("torch DDP gloo / jaxcomm", ">=", 3, ratio(big, "torch DDP, gloo", OURS)),
        (
            "Horovod's faster way / jaxcomm",
            ">=",
            3,
            min(horovod) / big[OURS] if horovod else None,
        ),
        (
            "1,000 x 1 KB: mpi4jax per leaf / jaxcomm",
            ">=",
            15,
            ratio(small, "mpi4jax per leaf", OURS),
        ),
        ("dispatch over plain jit, 100 leaves (us)", "<=", 20, 1e3 * empty[OURS]),
        (
            "extra memory per rank at 0.93 GB (MiB)",
            "<=",
            16,
            (memory[OURS] - memory[PLAIN]) / 2**20,
        ),
        ("MPI calls per step without gradients", "<=", 0, others),
    ]
    return [
        (
            name,
            f"{sign} {goal:g}",
            value,
            value is not None and (value <= goal if sign == "<=" else value >= goal),
        )
        for name, sign, goal, value in rows
    ]


def markdown(result: dict[str, Any]) -> str:
    """All tables of the result."""
    machine = result["machine"]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {result['date']}, "
        f"{result['rounds']} round(s) of {result['repeats']} repeats; "
        + ", ".join(f"{name} {v}" for name, v in result["versions"].items())
        + ".",
        "",
        "| measure | target | measured | |",
        "|---|--:|--:|---|",
    ]
    for name, goal, value, met in targets(result):
        text = "not measured" if value is None else f"{value:.3g}"
        mark = "met" if met else ("" if value is None else "**missed**")
        lines.append(f"| {name} | {goal} | {text} | {mark} |")
    lines += [
        "",
        "Below: milliseconds that the reduction adds to a step (medians of interleaved "
        "repeats; quartiles of whole steps are in the JSON), and how many times "
        "jaxcomm's. Two ranks on two cores unless said.",
    ]
    for work, entry in result["workloads"].items():
        lines += _table(TITLES[work], entry["alone_ms"])
    lines += _table("ResNet-50 on 4 ranks, 2 cores", result["four_ranks"]["alone_ms"])
    lines += _buckets(result)
    lines += [
        "",
        "**MPI calls per step, ResNet-50**",
        "",
        "| way | calls |",
        "|---|---|",
    ]
    for way, calls in result["mpi_calls_per_step"].items():
        text = ", ".join(f"{n:g} MPI_{kind}" for kind, n in calls.items()) or "none"
        lines.append(f"| {way} | {text} |")
    lines += ["", "**Peak memory above a step without reduction, STEMDL**", ""]
    lines += ["| way | MiB per rank |", "|---|--:|"]
    for way, peak in result["peak_bytes"].items():
        if way != PLAIN:
            extra = (peak - result["peak_bytes"][PLAIN]) / 2**20
            lines.append(f"| {way} | {extra:.1f} |")
    lines += [
        "",
        "**Before the first step, ResNet-50**",
        "",
        "| what | ms |",
        "|---|--:|",
    ]
    lines += [f"| {what} | {ms:.3g} |" for what, ms in result["planning_ms"].items()]
    return "\n".join(lines) + "\n"


def _table(title: str, times: dict[str, float]) -> list[str]:
    lines = ["", f"**{title}**", "", "| way | ms | / jaxcomm |", "|---|--:|--:|"]
    for way, milliseconds in times.items():
        if way.startswith("jaxcomm, buckets"):
            continue
        name = f"**{way}**" if way == OURS else way
        ratio = milliseconds / times[OURS]
        lines.append(f"| {name} | {milliseconds:.3g} | {ratio:.2f} |")
    return lines


def _buckets(result: dict[str, Any]) -> list[str]:
    fixed = [
        way
        for way in result["workloads"]["resnet50"]["alone_ms"]
        if way.startswith("jaxcomm, buckets")
    ]
    fixed.sort(key=lambda way: int(way.split()[-2]))
    sizes = " | ".join(way.removeprefix("jaxcomm, buckets of ") for way in fixed)
    lines = [
        "",
        "**The planner's buckets against fixed ones (ms added to a step)**",
        "",
        f"| workload | planner | {sizes} |",
        "|---|" + "--:|" * (1 + len(fixed)),
    ]
    for work, entry in result["workloads"].items():
        times = entry["alone_ms"]
        if work == "dispatch":
            continue
        cells = " | ".join(f"{times[way]:.3g}" for way in fixed)
        lines.append(f"| {TITLES[work]} | {times[OURS]:.3g} | {cells} |")
    return lines


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of every workload's ways, shortest on top."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    works = [work for work in result["workloads"] if work != "dispatch"]
    figure, axes = plt.subplots(
        -(-len(works) // 2), 2, figsize=(12, 11), layout="constrained"
    )
    for axis, work in zip(axes.flat, works, strict=False):
        times = {
            way: milliseconds
            for way, milliseconds in result["workloads"][work]["alone_ms"].items()
            if not way.startswith("jaxcomm, buckets") and milliseconds > 0
        }
        colours = ["tab:blue" if way == OURS else "0.7" for way in times]
        bars = axis.barh(list(times), list(times.values()), color=colours)
        labels = [f"{milliseconds:.3g}" for milliseconds in times.values()]
        axis.bar_label(bars, labels, padding=3, fontsize=8)
        axis.set_xscale("log")
        axis.margins(x=0.15)
        axis.invert_yaxis()
        axis.set(title=TITLES[work], xlabel="ms added to a step")
        axis.tick_params(axis="y", labelsize=8)
    for axis in list(axes.flat)[len(works) :]:
        axis.set_visible(False)
    figure.suptitle("Averaging gradients over two ranks on two cores")
    figure.savefig(path, dpi=110)
    plt.close(figure)
