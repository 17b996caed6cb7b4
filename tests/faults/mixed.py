"""Look for a hang of jobs that mix jaxcomm's MPI calls, mpi4jax and raw MPI.

python -m tests.faults.mixed --minutes 30 --out benchmarks/results/mixed.json
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from tests.jobs import launch_ranks

RANKS = ("-m", "tests.faults.mixed_ranks")
# Of Open MPI 5, where messages within a host are copied by CMA unless it is off.
SETTINGS = {
    "sm": {"OMPI_MCA_btl": "self,sm"},
    "tcp": {"OMPI_MCA_btl": "self,tcp"},
    "no-cma": {"OMPI_MCA_btl": "self,sm", "OMPI_MCA_smsc": "^cma"},
}
LIMITS = {"JAXCOMM_WARN_AFTER": "20", "JAXCOMM_ABORT_AFTER": "60"}
ATTEMPT_SECONDS = 420.0  # then a new job, with other addresses and another order
# More than a rank needs to import, compile and find out that nothing moves.
MORE_SECONDS = 300.0
# The watchdog comes first (LIMITS), but sees jaxcomm's own calls only.
STALL_SECONDS = 120.0
# The large one is reduced in turn by all ways; the others, at random, in between.
TREES = ("resnet50", "small", "many", "middle")
STALLED = (70, 71, 124)  # the watchdog's, the rank's own, the launcher's limit
WRONG = 3
DONE, HANG, WRONG_SUM, FAILED = "done", "hang", "wrong", "failed"


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One job.

    Attributes:
      verdict: DONE, HANG, FAILED or WRONG_SUM.
      minutes: how long it reduced.
      ranks: what each rank wrote.
      text: what it printed and the ranks' own reports, unless it is done.
    """

    verdict: str
    minutes: float
    ranks: list[dict[str, Any]]
    text: str


def run(setting: str, seconds: float, seed: int, **changes: Any) -> Attempt:
    """Run one job of two ranks; `changes` are fields of the job."""
    job = {"seconds": seconds, "seed": seed, "trees": TREES, "hang": None}
    job |= {"stall_seconds": STALL_SECONDS} | changes
    # With a thread of its own for a communicator's calls, and without.
    thread = {"JAXCOMM_OWN_THREAD": "on" if seed % 4 == 3 else "off"}
    env = {"JAXCOMM_SHARED_MEMORY": "off", **thread, **SETTINGS[setting], **LIMITS}
    env["XLA_FLAGS"] = ""  # of the tests
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        done = launch_ranks(
            2,
            [*RANKS, json.dumps(job | {"folder": name})],
            env=env,
            timeout=seconds + MORE_SECONDS,
        )
        ranks = [json.loads(p.read_text()) for p in sorted(folder.glob("rank-*.json"))]
        stalls = [path.read_text() for path in sorted(folder.glob("stall-*.txt"))]
    code, verdict = done.returncode, FAILED
    if code == WRONG or any(rank["wrong"] for rank in ranks):
        verdict = WRONG_SUM
    elif code == 0 and [rank["state"] for rank in ranks] == ["done"] * 2:
        verdict = DONE
    elif code in STALLED:
        verdict = HANG
    minutes = min((rank["seconds"] for rank in ranks), default=0.0) / 60
    text = "" if verdict == DONE else "\n".join([done.stdout, done.stderr, *stalls])
    return Attempt(verdict, minutes, ranks, without_paths(text))


def without_paths(text: str) -> str:
    """Reduce the paths of this machine to the names of the files."""
    return re.sub(r"(?<![\w.])/(?:[^\s/:\"',()]+/)+(?=[^\s/:\"',()])", "", text)


def search(setting: str, minutes: float, first_seed: int) -> dict[str, Any]:
    """Run jobs one after another for so many minutes; return what was seen."""
    # Should jobs fail at once, it ends nevertheless.
    end = time.monotonic() + 60 * (2 * minutes + 10)
    left = 60 * minutes
    calls: Counter[str] = Counter()
    attempts: list[Attempt] = []
    mpi = ""
    while left > 0 and time.monotonic() < end:
        seed = first_seed + len(attempts)
        attempt = run(setting, min(left, ATTEMPT_SECONDS), seed)
        attempts.append(attempt)
        left -= 60 * attempt.minutes
        first = attempt.ranks[0] if attempt.ranks else {"calls": {}, "mpi": ""}
        calls.update(first["calls"])
        mpi = first["mpi"] or mpi
        spent = f"{attempt.minutes:.1f} minutes, {sum(calls.values()):,} calls"
        click.echo(f"{setting}, job {len(attempts)}: {attempt.verdict} after {spent}")
        if attempt.verdict != DONE:
            click.echo(attempt.text)
    verdicts = Counter(attempt.verdict for attempt in attempts)
    bad = [a for a in attempts if a.verdict != DONE]
    return {
        "setting": setting,
        "environment": SETTINGS[setting],
        "mpi": mpi,
        "minutes": round(sum(a.minutes for a in attempts), 1),
        "jobs": len(attempts),
        "iterations": sum(a.ranks[0]["iterations"] for a in attempts if a.ranks),
        "calls": dict(sorted(calls.items())),
        "hangs": verdicts[HANG],
        "wrong": verdicts[WRONG_SUM],
        "failed": verdicts[FAILED],
        "reports": [
            {"verdict": a.verdict, "ranks": a.ranks, "text": a.text} for a in bad
        ],
    }


@click.command()
@click.option("--minutes", default=30.0, show_default=True, help="of each setting")
@click.option(
    "--setting",
    "settings",
    type=click.Choice(list(SETTINGS)),
    multiple=True,
    default=tuple(SETTINGS),
    show_default=True,
)
@click.option("--together", is_flag=True, help="All settings at the same time.")
@click.option("--first-seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False))
def main(
    minutes: float,
    settings: tuple[str, ...],
    together: bool,
    first_seed: int,
    out: Path | None,
) -> None:
    """Run the mixed job on two ranks under each setting of Open MPI's transport.

    Exits with 1 if a job hung, gave a wrong sum or failed.
    """
    with ThreadPoolExecutor(len(settings) if together else 1) as pool:
        found = list(pool.map(lambda s: search(s, minutes, first_seed), settings))
    if out is not None:
        machine = f"{os.cpu_count()} cores, Python {platform.python_version()}"
        versions = {name: version(name) for name in ("jax", "mpi4jax", "mpi4py")}
        head = {"machine": machine, "versions": versions, "together": together}
        head["settings"] = found
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(head, indent=1) + "\n")
    for row in found:
        numbers = ", ".join(f"{row[k]} {k}" for k in ("hangs", "wrong", "failed"))
        total = sum(row["calls"].values())
        click.echo(
            f"{row['setting']}: {row['minutes']} minutes, {row['jobs']} jobs, "
            f"{total:,} calls, {numbers} ({row['mpi']})"
        )
    sys.exit(any(row[k] for row in found for k in ("hangs", "wrong", "failed")))


if __name__ == "__main__":
    main()
