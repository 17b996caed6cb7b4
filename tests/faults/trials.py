"""Trials of faults: what, where, when and to whom, all from a seed; and the verdict.

python -m tests.faults.trials --out benchmarks/results/faults.json
"""

from __future__ import annotations

import collections
import dataclasses
import json
import platform
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.jobs import launch_ranks, on_fake_nccl

RANKS = ("-m", "tests.faults.ranks")
SOAK = ("-m", "tests.faults.soak")
STEPS = 12
TIMEOUT = 90.0
WRONG_EXIT = 3

# What each ends with when it does not go right on.
KINDS = {
    "kill": r"signal 9|SIGKILL|Killed|KILLED",
    "stop": r"no answer from rank {culprit}\b",
    "delay": None,
    "exception": r"rank {culprit} of {ranks} failed .*injected at step",
    "odd": r"ScheduleMismatchError",
    "skip": r"ScheduleMismatchError: .*rank {culprit} ended without a call",
    "swap": r"ScheduleMismatchError",
    "return": r"ScheduleMismatchError: .*rank {culprit} ended without a call",
}
# Each as often as the others, where several are one kind of fault.
WEIGHTS = {"odd": 0.25, "skip": 0.25, "swap": 0.25, "return": 0.25}

WAYS = {
    "mpi": {},
    "mpi, MPI calls": {"JAXCOMM_SHARED_MEMORY": "off"},
    "mpi, own thread": {"JAXCOMM_SHARED_MEMORY": "off", "JAXCOMM_OWN_THREAD": "on"},
    "mpi4jax": {},
    "nccl": {},
}
# A loaded machine needs a while until all ranks are in init.
LIMITS = {"JAXCOMM_WARN_AFTER": "1", "JAXCOMM_ABORT_AFTER": "6"}

RIGHT, REPORTED = "finished right", "ended with the right report"
UNCLEAR, WRONG, HANG = "ended without it", "wrong result", "hang"
VERDICTS = (RIGHT, REPORTED, UNCLEAR, WRONG, HANG)


@dataclasses.dataclass(frozen=True)
class Trial:
    """What is done to whom, where and when.

    Attributes:
      seed: of the trial; all else follows from it.
      kind: of KINDS.
      way: of WAYS.
      ranks: 2 to 4.
      culprit: the rank that it happens to.
      step: of the loop, -1 for while the ranks find each other.
      offset: seconds after the step began, or the process started.
      bucket_bytes: how the tree is divided.
    """

    seed: int
    kind: str
    way: str
    ranks: int
    culprit: int
    step: int
    offset: float
    bucket_bytes: int

    def spec(self) -> str:
        fields: dict[str, Any] = dataclasses.asdict(self)
        fields["transport"] = self.way.split(",")[0]
        return json.dumps(fields | {"steps": STEPS})


def draw(seed: int) -> Trial:
    """Return the trial of a seed."""
    rng = random.Random(seed)
    weights = [WEIGHTS.get(kind, 1.0) for kind in KINDS]
    kind = rng.choices(list(KINDS), weights)[0]
    ranks = rng.randint(2, 4)
    step = rng.randrange(STEPS)
    offset = rng.choice([0.0, 1e-4, 1e-3, 1e-2]) * rng.random()
    if kind == "delay":
        offset = 2.0 * rng.random()
    elif kind in ("kill", "stop") and rng.random() < 0.2:
        step, offset = -1, 3.0 * rng.random()
    return Trial(
        seed=seed,
        kind=kind,
        way=rng.choice(list(WAYS)),
        ranks=ranks,
        culprit=rng.randrange(ranks),
        step=step,
        offset=offset,
        bucket_bytes=rng.choice([1 << 12, 1 << 18, 1 << 22]),
    )


def run(trial: Trial) -> dict[str, Any]:
    """Run a trial; return its fields, "verdict", "exit" and "seconds"."""
    env = {**LIMITS, **WAYS[trial.way]}
    if trial.way == "nccl":
        env |= on_fake_nccl()
    start = time.monotonic()
    done = launch_ranks(trial.ranks, [*RANKS, trial.spec()], env=env, timeout=TIMEOUT)
    result = dataclasses.asdict(trial)
    result["verdict"] = verdict(trial, done.returncode, done.stdout, done.stderr)
    result["exit"] = done.returncode
    result["seconds"] = round(time.monotonic() - start, 1)
    if result["verdict"] in (UNCLEAR, WRONG, HANG):
        result["output"] = (done.stdout + done.stderr)[-6000:]
    return result


def verdict(trial: Trial, code: int, out: str, err: str) -> str:
    """Say how a trial ended."""
    if code == 124:
        return HANG
    if "wrong: rank" in out or code == WRONG_EXIT:
        return WRONG
    if code == 0:
        return RIGHT if out.count("right\n") == trial.ranks else WRONG
    pattern = KINDS[trial.kind]
    if pattern is None:  # should have gone right
        return UNCLEAR
    pattern = pattern.format(culprit=trial.culprit, ranks=trial.ranks)
    if trial.way in ("mpi, MPI calls", "mpi, own thread"):
        # Of different sizes: MPI itself may notice first.
        pattern += r"|message truncated|MPI_ERR_TRUNCATE"
    # Whom a stop or a kill catches before init has no watchdog yet.
    if trial.step < 0 and trial.kind == "stop":
        pattern += r"|in init for the other ranks|in MPI_Finalize for the other ranks"
        if trial.way == "nccl":  # its own limit, for its first collective
            pattern += r"|another rank has not come"
    return REPORTED if re.search(pattern, err) else UNCLEAR


def counted(results: list[dict[str, Any]]) -> dict[str, Any]:
    """How many trials ended in which way, and the longest."""
    counts = collections.Counter(result["verdict"] for result in results)
    longest = max((result["seconds"] for result in results), default=0.0)
    verdicts = {verdict: counts[verdict] for verdict in VERDICTS}
    return {"trials": len(results), **verdicts, "longest_s": longest}


def by(field: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """The same for every value of a field."""
    names = {"kind": KINDS, "way": WAYS}[field]
    return {name: counted([r for r in results if r[field] == name]) for name in names}


def table(results: list[dict[str, Any]]) -> Table:
    shown = Table("fault", "trials", *VERDICTS, "longest, s")
    for kind, found in {**by("kind", results), "all": counted(results)}.items():
        *numbers, longest = found.values()
        shown.add_row(kind, *map(str, numbers), f"{longest:.0f}")
    return shown


@click.command()
@click.option("--trials", default=200, show_default=True)
@click.option("--first-seed", default=0, show_default=True)
@click.option("--soak", default=100_000, show_default=True, help="calls")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False))
def main(trials: int, first_seed: int, soak: int, out: Path | None) -> None:
    """Run trials and a soak.

    Exits with 1 if a trial gave a wrong result, hung or ended without the right report,
    or if anything grew.
    """
    console = Console(stderr=True)
    seeds = range(first_seed, first_seed + trials)
    results = []
    for seed in track(seeds, "trials", console=console):
        results.append(run(draw(seed)))
        if "output" in results[-1]:
            console.print(json.dumps(results[-1], indent=1), markup=False)
    Console().print(table(results))
    wrong = [r for r in results if "output" in r]
    soaks = {way: run_soak(soak, WAYS[way]) for way in ("mpi", "mpi, own thread")}
    for way, grown in soaks.items():
        Console().print(f"{soak:,} calls, {way}: {grown}", highlight=False)
    if out is not None:
        machine = f"{platform.machine()}, Python {platform.python_version()}"
        # What a job printed is on the console; it holds paths of this machine.
        content = {
            "machine": machine,
            "first_seed": first_seed,
            "all": counted(results),
            "by_kind": by("kind", results),
            "by_way": by("way", results),
            "wrong": [{k: v for k, v in r.items() if k != "output"} for r in wrong],
            "calls": soak,
            "grown": soaks,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(content, indent=1) + "\n")
    sys.exit(int(bool(wrong) or any(grows(grown) for grown in soaks.values())))


def run_soak(calls: int, env: dict[str, str]) -> dict[str, int]:
    """Run soak.py on two ranks; return what it prints."""
    done = launch_ranks(2, [*SOAK, str(calls)], env=env, timeout=1200)
    if done.returncode != 0:
        raise click.ClickException(done.stdout + done.stderr)
    return json.loads(done.stdout)


def grows(grown: dict[str, int]) -> bool:
    """Tell whether a soak has used up more than allocators vary by."""
    return grown["bytes"] >= 8 << 20 or grown["descriptors"] > 0 or grown["threads"] > 0


if __name__ == "__main__":
    main()
