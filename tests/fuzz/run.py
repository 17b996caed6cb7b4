"""Draw random programs and run each on ranks of several transports.

python -m tests.fuzz.run [--programs N] [--seed S] [--ranks 2,3,4] [--ways NAME,...]
    [--out FILE]

Ends with 1 if a program was wrong or hung, or if more than one in twenty was refused.
`--replay FILE` runs the programs of a JSON list instead, one per job.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck as Health
from rich.console import Console
from rich.progress import Progress

from tests.fuzz import programs
from tests.jobs import launch_ranks, on_fake_nccl

# A job is one launch. Its limit catches hangs: a program takes a second or two.
PER_JOB = 21
LEAST_CALLS = 3
SECONDS_PER_PROGRAM = 30
REFUSED_AT_MOST = 0.05

console = Console(stderr=True)


@dataclasses.dataclass(frozen=True)
class Way:
    """A transport and its environment."""

    transport: str
    env: dict[str, str]


def ways() -> dict[str, Way]:
    return {
        "shared memory": Way("mpi", {}),
        "MPI calls": Way("mpi", {"JAXCOMM_SHARED_MEMORY": "off"}),
        "mpi4jax": Way("mpi4jax", {}),
        "NCCL stand-in": Way("nccl", on_fake_nccl()),
    }


def draw(count: int, size: int, seed: int) -> list[dict[str, Any]]:
    """Draw different programs; the same for the same arguments."""
    found: dict[str, dict[str, Any]] = {}

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=8 * count,
        phases=[hypothesis.Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=[
            Health.too_slow,
            Health.filter_too_much,
            Health.data_too_large,
        ],
    )
    @hypothesis.given(programs.programs(size))
    def collect(program: dict[str, Any]) -> None:
        text = json.dumps(program["body"])
        if len(found) < count and text.count('"call"') >= LEAST_CALLS:
            found[json.dumps(program)] = program

    collect()
    return list(found.values())


def run_job(
    drawn: list[dict[str, Any]], way: Way, threads: int
) -> tuple[list[dict[str, Any]], str]:
    """Run programs in one job; return a result for each, and what the job wrote.

    A program that hangs or ends the job is "hung" or "ended"; those behind have none.
    """
    with tempfile.TemporaryDirectory() as folder:
        specs, report = Path(folder) / "programs.json", Path(folder) / "report"
        specs.write_text(json.dumps(drawn))
        report.touch()
        done = launch_ranks(
            drawn[0]["size"],
            ["-m", "tests.fuzz.ranks", specs, report, way.transport],
            timeout=60 + SECONDS_PER_PROGRAM * len(drawn),
            env={
                **way.env,
                "JAXCOMM_THREADS": str(threads),
                "JAXCOMM_ABORT_AFTER": str(3 * SECONDS_PER_PROGRAM),
            },
        )
        lines = [json.loads(line) for line in report.read_text().splitlines()]
    results = [line for line in lines if line["what"] != "begins"]
    text = (done.stdout + done.stderr)[-4000:]
    if done.returncode != 0 and len(results) < len(drawn):
        hung = done.returncode in (70, 124)
        what = {"program": len(results), "what": "hung" if hung else "ended"}
        results.append({**what, "why": text})
    return results, text


def run_all(
    count: int, seed: int, ranks: list[int], names: list[str]
) -> dict[str, Any]:
    """Run about `count` programs, divided among ranks and ways."""
    chosen = [(n, name) for n in ranks for name in names]
    each = -(-count // len(chosen))
    every = ways()
    totals: collections.Counter[str] = collections.Counter()
    failures, refusals = [], []
    with Progress(console=console) as progress:
        bar = progress.add_task("programs", total=each * len(chosen))
        for place, (size, name) in enumerate(chosen):
            left = draw(each, size, seed + place)
            for job in itertools.count():
                if not left:
                    break
                threads = 1 + (place + job) % 3
                part = left[:PER_JOB]
                results, _ = run_job(part, every[name], threads)
                for result in results:
                    totals[result["what"]] += 1
                    case = {
                        "way": name,
                        "threads": threads,
                        **result,
                        "program": part[result["program"]],
                    }
                    if result["what"] == "refused":
                        refusals.append(case)
                    elif result["what"] != "ok":
                        failures.append(case)
                        console.print_json(json.dumps(case))
                left = left[max(len(results), 1) :]
                progress.advance(bar, len(results))
    return {
        "programs": sum(totals.values()),
        "seed": seed,
        "ranks": ranks,
        "ways": names,
        **{what: totals[what] for what in ("ok", "refused", "wrong", "hung", "ended")},
        "failures": failures,
        "refusals": sorted({case["why"].splitlines()[0][:160] for case in refusals}),
    }


def succeeded(result: dict[str, Any]) -> bool:
    refused = result["refused"] <= REFUSED_AT_MOST * result["programs"]
    return not result["failures"] and refused and result["programs"] > 0


def replay(path: str, names: list[str]) -> int:
    drawn: list[dict[str, Any]] = json.loads(Path(path).read_text())
    for name, program in itertools.product(names, drawn):
        results, text = run_job([program], ways()[name], 1)
        console.print(name, results, text if results[-1]["what"] != "ok" else "")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=504)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", default="2,3,4")
    parser.add_argument("--ways", default=",".join(ways()))
    parser.add_argument("--out")
    parser.add_argument("--replay")
    options = parser.parse_args()
    names = options.ways.split(",")
    if options.replay:
        return replay(options.replay, names)
    ranks = [int(n) for n in options.ranks.split(",")]
    result = run_all(options.programs, options.seed, ranks, names)
    text = json.dumps(result, indent=1)
    if options.out:
        Path(options.out).write_text(text + "\n")
    with contextlib.suppress(BrokenPipeError):
        print(text)
    return 0 if succeeded(result) else 1


if __name__ == "__main__":
    sys.exit(main())
