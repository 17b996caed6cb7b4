"""Our declarations of NCCL against its releases' own nccl.h."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent / "native" / "check_nccl_abi.py"
spec = importlib.util.spec_from_file_location("check_nccl_abi", SCRIPT)
assert spec and spec.loader
check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check)


@pytest.fixture(scope="module")
def headers() -> dict[str, Path]:
    """Return the headers of the releases at hand; else fetch the oldest and newest."""
    if not (found := dict(check.local_headers())):
        line = [sys.executable, SCRIPT, "--few"]
        done = subprocess.run(
            line, capture_output=True, text=True, timeout=120, check=False
        )
        found = dict(check.local_headers())
        if not found:
            pytest.skip(f"no nccl.h here, and none to fetch: {done.stderr[-300:]}")
    return found


def test_declarations_agree_with_every_release(headers: dict[str, Path]) -> None:
    ours = check.OURS.read_text()
    wrong = {name: check.problems(path, ours) for name, path in headers.items()}
    assert not any(wrong.values()), {name: p for name, p in wrong.items() if p}


@pytest.mark.parametrize(
    ("text", "other", "shown"),
    [
        ("kNcclBfloat16 = 9", "kNcclBfloat16 = 8", "value of ncclBfloat16"),
        ("int min_ctas = kNcclUndefined;\n", "", "offset of maxCTAs"),
        ("int min_ctas", "unsigned min_ctas", "type of minCTAs"),
        ("char internal[128]", "char internal[64]", "size of ncclUniqueId"),
        ("0xcafebeef", "0xcafebeee", "initial magic"),
        ("X(GroupEnd,", "X(GroupFinish,", "ncclGroupFinish is not declared"),
        (
            "const void* from, size_t count",
            "const void* from, int count",
            "of ncclSend",
        ),
        ("(NcclOp op, NcclComm* comm)", "(NcclOp op)", "signature of ncclRedOpDestroy"),
        (
            "int peer, NcclComm* comm",
            "NcclComm* comm, int peer",
            "signature of ncclRecv",
        ),
        ("int* count", "size_t* count", "signature of ncclCommCount"),
        (
            "NcclDType dtype, NcclOp op",
            "NcclOp op, NcclDType dtype",
            "of ncclAllReduce",
        ),
    ],
)
def test_a_difference_is_noticed(
    headers: dict[str, Path], text: str, other: str, shown: str
) -> None:
    ours = check.OURS.read_text()
    assert text in ours
    header = list(headers.values())[-1]
    wrong = check.problems(header, ours.replace(text, other))
    assert any(shown in problem for problem in wrong), wrong
