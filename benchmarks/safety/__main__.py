"""What safety costs: the watchdog, and JAXCOMM_CHECK=every.

Two ranks; jobs with each setting take turns, so that a changing machine changes all.
Writes benchmarks/results/safety.json and .md.

python -m benchmarks.safety --rounds 10
"""

from __future__ import annotations

import datetime
import json

import click
from rich.progress import track

from benchmarks.common import jobs, results
from jaxcomm import terminal

SETTINGS = {
    "no watchdog": jobs.UNWATCHED,
    "watchdog (default)": {},
    "watchdog, every call compared": {"JAXCOMM_CHECK": "every"},
}


@click.command(context_settings=terminal.HELP)
@click.option("--rounds", default=10, show_default=True)
@click.option("--write/--no-write", default=True, show_default=True)
def main(rounds: int, write: bool) -> None:
    """Time reductions with each setting, in turn."""
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in SETTINGS}
    for _ in track(range(rounds), "rounds", console=terminal.console(stderr=True)):
        for name, env in SETTINGS.items():
            for tree, seconds in jobs.run_safety(2, env).items():
                samples[name].setdefault(tree, []).append(1e6 * seconds)
    times = {name: results.summaries(found) for name, found in samples.items()}
    plain = times["no watchdog"]
    lines = ["# What safety costs", ""]
    lines += [
        f"Two ranks; medians of {rounds} jobs that took turns; microseconds a call."
    ]
    lines += ["", f"| | {' | '.join(plain)} |", "|---|" + "--:|" * len(plain)]
    for name, found in times.items():
        row = [
            f"{ours['median']:.1f} ({ours['median'] / plain[tree]['median']:.2f})"
            for tree, ours in found.items()
        ]
        lines.append(f"| {name} | {' | '.join(row)} |")
    text = "\n".join([*lines, "", "In brackets: times what it takes without.", ""])
    print(text)
    if write:
        content = {
            "date": datetime.date.today().isoformat(),
            "machine": results.machine(),
            "versions": results.versions(),
            "rounds": rounds,
            "times_us": times,
        }
        file = results.FOLDER / "safety.json"
        file.write_text(json.dumps(content, indent=1) + "\n")
        (results.FOLDER / "safety.md").write_text(text)


if __name__ == "__main__":
    main()
