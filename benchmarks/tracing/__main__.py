"""Measure what the compiler pass adds to tracing: `make bench-tracing`.

ResNet-50's training step (worker.py) is traced and lowered, with JAX's caches
empty each time, under jax.pmap, under jax.shard_map and under jaxcomm, in turn.
Writes results/tracing.json and .md.
"""

from __future__ import annotations

import datetime
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.common import jobs, results

OURS, PASS = "jaxcomm.data_parallel", "of it, the pass"


def markdown(result: dict[str, Any]) -> str:
    """The result as a table."""
    median = {
        name: statistics.median(times) for name, times in result["samples_ms"].items()
    }
    lines = [
        f"ResNet-50's training step, {result['buckets']} buckets, {result['date']}, "
        f"medians of {len(result['samples_ms'][OURS])}.",
        "",
        "| trace and lower | ms | jaxcomm / it |",
        "|---|--:|--:|",
    ]
    for name, ms in median.items():
        ratio = "" if name in (OURS, PASS) else f"{median[OURS] / ms:.2f}"
        lines.append(f"| {name} | {ms:.0f} | {ratio} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--repeats", type=click.IntRange(1), default=15, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=results.FOLDER)
def main(repeats: int, out: Path) -> None:
    """Measure tracing and lowering on two ranks that do it at the same time."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "samples.json"
        command = [sys.executable, "-m", "jaxcomm", "run", "-n", "2"]
        command += ["-m", "benchmarks.tracing.worker", str(file), str(repeats)]
        subprocess.run(command, cwd=jobs.ROOT, check=True, timeout=580)
        found = json.loads(file.read_text())
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": results.machine(),
        "versions": results.versions(),
        "buckets": found["buckets"],
        "samples_ms": found["samples"],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "tracing.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "tracing.md").write_text(markdown(result))
    Console().print(Markdown(markdown(result)))


if __name__ == "__main__":
    main()
