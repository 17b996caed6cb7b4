"""Check and measure jaxcomm on a GPU, a section at a time.

`bash benchmarks/gpu/gpu.sh` runs it. Every section runs in processes of its own
(worker.py, or `benchmarks.many_cores`) under its own time limit; one that fails is
recorded with its error, and the next one runs. Those that time nothing run two at once.
Each of two calls has its sections; the second puts its own beside the first's in
gpu.json. The exit code is 1 if a section about correctness failed. `--dry` runs what
can be run without a GPU, over MPI on the CPU, so that this script is tested where none
is.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.common import results
from benchmarks.gpu import report, sections
from benchmarks.gpu.sections import Machine, Section
from jaxcomm import terminal
from jaxcomm.launch import devices
from jaxcomm.launch import run as launcher

PACKAGES = ("jaxcomm", "jax", "jaxlib", "numpy", "mpi4py", "click", "rich", "flax")
PREFIXES = ("jax-cuda", "nvidia-nccl")
AT_ONCE = 2


def versions() -> dict[str, str]:
    """Versions of what the figures depend on; what is missing says so."""
    found = {}
    for wheel in importlib.metadata.distributions():
        name = (wheel.metadata["Name"] or "").lower().replace("_", "-")
        if name in PACKAGES or name.startswith(PREFIXES):
            found.setdefault(name, wheel.version)
    missing = {name: "missing" for name in PACKAGES if name not in found}
    return {"python": sys.version.split()[0], **dict(sorted(found.items())), **missing}


def ask(command: list[str]) -> list[str]:
    """Lines that a command prints; none where it cannot be run."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def find_machine(dry: bool, launch: str | None) -> Machine:
    """Look at what there is, starting neither CUDA nor MPI in this process."""
    look = (
        "import dataclasses, json; from jaxcomm.transports.nccl import library; "
        "found = library.find(); print(json.dumps(found and dataclasses.asdict(found)))"
    )
    lines = ask([sys.executable, "-c", look])
    nccl = json.loads(lines[-1]) if lines else None
    try:
        launcher.find_mpiexec()
        mpi = bool(ask([sys.executable, "-c", "from mpi4py import MPI; print(1)"]))
    except launcher.LaunchError:
        mpi = False
    host = os.environ.get("JAXCOMM_NCCL_HOST_MEMORY") == "1"
    return Machine(
        dry=dry,
        transport="mpi" if dry and not host else "nccl",
        launch=launch or ("mpi" if dry else "distributed"),
        devices=[] if dry else devices.visible(),
        nccl=nccl,
        mpi=mpi,
    )


def attempt(section: Section, machine: Machine, seconds: float) -> dict[str, Any]:
    """Run one section, whatever comes of it; return its row."""
    try:
        return run_section(section, machine, seconds)
    except Exception as error:  # the next one is to run
        text = f"{type(error).__name__}: {error}"
        return {**about(section), "status": "failed", "error": text, "results": []}


def about(section: Section) -> dict[str, Any]:
    return {
        "name": section.name,
        "ranks": section.ranks,
        "correctness": section.correctness,
    }


def run_section(section: Section, machine: Machine, seconds: float) -> dict[str, Any]:
    """Run one section; return its row."""
    row = about(section)
    reason = sections.unfit(section, machine)
    if seconds < 5:
        reason = "no time was left"
    if reason:
        return {**row, "status": "skipped", "error": reason}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result"
        limit = min(section.seconds, seconds)
        with multi_process_service(section, machine, Path(folder)) as added:
            codes, output = _processes(section, machine, out, limit, added)
        found = sorted(out.parent.glob("result.*"))
        results = [json.loads(path.read_text()) for path in found]
    row["seconds"] = round(time.monotonic() - start, 1)
    if codes is None:
        error = f"still ran after {limit:.0f} s\n{output}"
        status = "failed"
        if limit < section.seconds:  # of its own
            status, error = "skipped", f"no time was left: {error}"
        return {**row, "status": status, "error": error, "results": results}
    if section.ends:
        # The one that leaves does so with a code of its own (mpiexec passes it on);
        # the others must end by themselves, and not as if all were well.
        ok = codes[-1] == sections.LEFT and 0 not in codes
        row |= {"codes": codes, "error": output}
        return {**row, "status": "ok" if ok else "failed", "results": results}
    ok = not any(codes) and len(results) == section.ranks
    ok = ok and all(result.get("ok", True) for result in results)
    if not ok:
        row["error"] = f"exit codes {codes}\n{output}"
    # A sample is the same on all ranks, so one rank's report is the section's.
    kept = results[:1] if ok else results
    return {**row, "status": "ok" if ok else "failed", "results": kept}


@contextlib.contextmanager
def multi_process_service(
    section: Section, machine: Machine, folder: Path
) -> Iterator[dict[str, str]]:
    """Run NVIDIA's MPS for the ranks of a section that asks for it; their variables."""
    if not section.mps or machine.dry:
        yield {}
        return
    added = {f"CUDA_MPS_{kind}_DIRECTORY": str(folder) for kind in ("PIPE", "LOG")}
    env = {**os.environ, **added}
    subprocess.run([sections.MPS, "-d"], env=env, check=True, timeout=30)
    try:
        yield added
    finally:
        control = [sections.MPS]
        subprocess.run(control, env=env, input="quit\n", text=True, timeout=60)


def _processes(
    section: Section,
    machine: Machine,
    out: Path,
    limit: float,
    added: dict[str, str],
) -> tuple[list[int] | None, str]:
    """Run a section's processes; exit codes (None: out of time) and what they wrote."""
    commands = sections.commands(section, machine, out)
    logs = [out.parent / f"log{rank}" for rank in range(len(commands))]
    processes = []
    for (command, env), log in zip(commands, logs, strict=True):
        with log.open("w") as file:
            processes.append(
                subprocess.Popen(
                    command,
                    env=env | added,
                    cwd=out.parent,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    end = time.monotonic() + limit
    while any(process.poll() is None for process in processes):
        late = time.monotonic() > end
        failed = any(process.returncode for process in processes)
        if late or (failed and not section.ends):
            # Those that are left may wait for the one that failed.
            time.sleep(0 if late else 5)
            break
        time.sleep(0.1)
    left = [process for process in processes if process.poll() is None]
    for process in left:
        os.killpg(process.pid, 9)
    codes = [process.wait() for process in processes]
    out_of_time = bool(left) and time.monotonic() > end
    size = 3000 // len(logs)
    texts = [log.read_text(errors="replace")[-size:] for log in logs]
    return None if out_of_time else codes, "\n".join(texts)


def batches(chosen: Sequence[Section], dry: bool) -> Iterator[list[Section]]:
    """Sections that run together: one that times something runs alone."""
    waiting: list[Section] = []
    for section in chosen:
        alone = section.times and not dry
        if alone and waiting:
            yield waiting
            waiting = []
        waiting.append(section)
        if alone or len(waiting) == AT_ONCE:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=lambda prog: argparse.HelpFormatter(
            prog, width=terminal.HELP_WIDTH
        ),
    )
    parser.add_argument("--dry", action="store_true", help="without a GPU")
    parser.add_argument("--call", type=int, choices=[1, 2], default=1)
    parser.add_argument("--only", default="", help="sections, separated by commas")
    parser.add_argument("--seconds", type=float, default=350, help="for all of it")
    parser.add_argument("--launch", choices=["mpi", "distributed"], help="two ranks")
    parser.add_argument("--built", default="", help="how the package was built")
    parser.add_argument("--out", type=Path, help="folder of gpu.json")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    chosen = sections.chosen(args.only, args.call)
    if not chosen:
        parser.error(f"--only {args.only}: no such section")
    if not args.dry and not devices.visible():
        parser.error("no GPU is visible; --dry runs what can be run without one")
    out = args.out or Path(os.environ.get("OUT") or results.FOLDER)
    out.mkdir(parents=True, exist_ok=True)
    machine = find_machine(args.dry, args.launch)
    names = "--query-gpu=name,driver_version,memory.total"
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "dry": args.dry,
        "gpus": ask(["nvidia-smi", names, "--format=csv,noheader"]),
        "visible": machine.devices,
        "transport": machine.transport,
        "launch": machine.launch,
        "mpi": machine.mpi,
        "nccl": machine.nccl,
        "versions": versions(),
        "built": args.built,
        "sections": [],
    }
    before = results.FOLDER / "gpu.json"
    if args.call == 2 and not args.dry and before.exists():
        result["sections"] = json.loads(before.read_text())["sections"]
    failed = False
    for together in batches(chosen, args.dry):
        # The time that is left is asked once: what runs together has the same.
        left = end - time.monotonic()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            rows = [pool.submit(attempt, one, machine, left) for one in together]
        for row in (future.result() for future in rows):
            row["call"] = args.call
            result["sections"] = report.with_row(result["sections"], row)
            failed |= row["status"] == "failed" and row["correctness"]
            lines = row.get("error", "").strip().splitlines()
            why = f": {lines[-1][:150]}" if lines else ""
            sys.stderr.write(
                f"{row['status']:8}{row['name']} ({row.get('seconds', 0)} s){why}\n"
            )
        # What there is so far, should this be cut off.
        text = json.dumps(report.without_paths(result), indent=1)
        (out / "gpu.json").write_text(text + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
