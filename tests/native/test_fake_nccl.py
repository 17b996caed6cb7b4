"""The fake NCCL, from real processes: what GPU code is tested with has to be right."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import ROOT, fake_nccl, settle
from tests.native.nccl_library import SUCCESS, UniqueId, load


@pytest.fixture(scope="session")
def library() -> Path:
    """Return the fake's library, compiled once."""
    return fake_nccl()


def segments() -> set[str]:
    return {p.name for p in Path("/dev/shm").glob("fake_nccl_*")}


def run_ranks(library: Path, ranks: int, case: str, timeout: float = 150, **env: str):
    """Run one case on some ranks; kill all when one fails or time is up."""
    uid = UniqueId()
    assert load(str(library)).ncclGetUniqueId(ctypes.byref(uid)) == SUCCESS
    program = [sys.executable, "-m", "tests.programs.fake_nccl_ranks"]
    program += [str(library), bytes(uid).hex()]
    processes = [
        subprocess.Popen(
            [*program, str(rank), str(ranks), case],
            cwd=ROOT,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    late = settle(processes, timeout)
    texts = [p.communicate()[0] for p in processes]
    report = "".join(
        f"\nrank {rank}: {text}" for rank, text in enumerate(texts) if text
    )
    assert not late, f"ranks {late} did not end{report}"
    assert all(p.returncode == 0 for p in processes), report
    name = uid.internal.decode().lstrip("/")
    assert not [s for s in segments() if s.startswith(name)], "segments left behind"


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", ["reductions", "movement", "messages", "mismatch"])
def test_transfers(library: Path, ranks: int, case: str) -> None:
    run_ranks(library, ranks, case)


def test_one_rank(library: Path) -> None:
    run_ranks(library, 1, "reductions")


def test_eight_ranks(library: Path) -> None:
    run_ranks(library, 8, "messages")


def test_groups_run_in_their_end(library: Path) -> None:
    run_ranks(library, 2, "groups")


def test_split(library: Path) -> None:
    run_ranks(library, 4, "split")


def test_nonblocking_communicators(library: Path) -> None:
    run_ranks(library, 2, "nonblocking")


def test_old_nonblocking_communicators(library: Path) -> None:
    # The first all-reduce is empty, the second in a group.
    rules = "rank=1,call=ncclGroupEnd,result=inProgress;"
    rules += "rank=1,call=ncclAllReduce,after=2,result=inProgress"
    run_ranks(
        library, 2, "nonblocking", FAKE_NCCL_INJECT=rules, FAKE_NCCL_VERSION="22203"
    )


@pytest.mark.parametrize("ranks", [2, 4])
def test_an_abort_ends_a_stalled_call(library: Path, ranks: int) -> None:
    rule = f"rank={ranks - 1},call=ncclAllReduce,after=1,result=stall"
    run_ranks(library, ranks, "stall", FAKE_NCCL_INJECT=rule)


def test_an_abort_ends_a_call_in_progress(library: Path) -> None:
    rule = "rank=1,call=ncclAllReduce,result=neverDone"
    run_ranks(library, 2, "never_done", FAKE_NCCL_INJECT=rule)


def test_injected_errors(library: Path) -> None:
    names = "unhandledCudaError systemError internalError invalidArgument invalidUsage"
    rules = [
        f"rank=1,call=ncclAllReduce,after={k},result={name}"
        for k, name in enumerate([*names.split(), "remoteError"])
    ]
    rules += [
        "rank=1,call=ncclSend,result=remoteError",
        "rank=1,call=ncclGroupEnd,after=1,result=systemError",
        "rank=1,call=ncclBroadcast,result=async:remoteError",
    ]
    run_ranks(library, 2, "errors", FAKE_NCCL_INJECT=";".join(rules))


@pytest.mark.parametrize(
    ("rule", "shown"),
    [
        ("", "22703"),
        ("call=ncclGetVersion,times=2,result=systemError", "2 2 22703"),
        ("call=ncclGetVersion,times=always,result=systemError", "2 2 2"),
        ("call=ncclGetVersion,result=oops", "cannot read"),
        ("call=ncclNothing,result=systemError", "cannot read"),
        ("call=ncclGetVersion", "cannot read"),
    ],
)
def test_rules(library: Path, rule: str, shown: str) -> None:
    text = """
import ctypes, sys
version, call = ctypes.c_int(), ctypes.CDLL(sys.argv[1]).ncclGetVersion
print(*(call(ctypes.byref(version)) or version.value for _ in range(3)))
"""
    run = subprocess.run(
        [sys.executable, "-c", text, str(library)],
        env={**os.environ, "FAKE_NCCL_INJECT": rule},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert shown in (run.stderr if run.returncode else run.stdout)


def test_version_of_the_environment(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = ctypes.c_int()
    monkeypatch.setenv("FAKE_NCCL_VERSION", "23203")
    assert load(str(library)).ncclGetVersion(ctypes.byref(number)) == SUCCESS
    assert number.value == 23203


def test_log(library: Path, tmp_path: Path) -> None:
    run_ranks(library, 2, "groups", FAKE_NCCL_LOG=str(tmp_path / "log"))
    lines = (tmp_path / "log.0").read_text().splitlines()
    assert lines == (tmp_path / "log.1").read_text().splitlines()
    assert lines == [
        "ncclAllReduce 1000 float32 sum group=1",
        "ncclAllReduce 3 int64 sum group=1",
        "ncclAllReduce 1000 float32 sum group=0",
        "ncclAllReduce 1 float64 sum group=0",
    ]


def test_exports(library: Path) -> None:
    """Nothing of ours is visible but NCCL's names and the driver's."""
    shown = subprocess.run(
        ["nm", "-D", "--defined-only", str(library)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    # (The standard library's own templates are always visible, as weak symbols.)
    functions = [line.split()[-1] for line in shown.splitlines() if " T " in line]
    assert all(name.startswith(("nccl", "cu")) for name in functions), functions
    assert sum(name.startswith("nccl") for name in functions) == 22
