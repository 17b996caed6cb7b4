"""Measure what the compiler pass adds to tracing: `make bench-tracing`.

ResNet-50's training step (worker.py) is traced and lowered, with JAX's caches
empty each time, under jax.pmap, under jax.shard_map and under jaxcomm, in turn.
Writes results/tracing.json and .md.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from benchmarks.common import jobs, results
from benchmarks.tracing import report
from jaxcomm import terminal


@click.command(context_settings=terminal.HELP)
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
        "times_ms": results.summaries(found["samples"]),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "tracing.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "tracing.md").write_text(report.markdown(result))
    terminal.markdown(terminal.console(), report.markdown(result))


if __name__ == "__main__":
    main()
