"""The host-side channel over jax.distributed, between real processes."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from jaxcomm.errors import InvalidTreeError, JaxcommError
from jaxcomm.ranks.hosts import encoding
from tests.jobs import ROOT, settle
from tests.programs.keyvalue_ranks import CASES


@functools.cache
def run_ranks(ranks: int, case: str, timeout: float = 300) -> list[dict[str, str]]:
    """Run one case on some ranks; what each rank says of each check.

    All are killed when one fails or time is up.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = [sys.executable, "-m", "tests.programs.keyvalue_ranks"]
    processes = [
        subprocess.Popen(
            [*program, f"{port}", f"{rank}", f"{ranks}", case],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    late = settle(processes, timeout)
    found = []
    for rank, process in enumerate(processes):
        out, err = process.communicate()
        said = dict(map(json.loads, out.splitlines()))
        said["end"] = (
            "" if process.returncode == 0 else f"exit code {process.returncode}: {err}"
        )
        if rank in late:
            said["end"] = f"killed after {timeout} s or another's failure: {err}"
        found.append(said)
    return found


@pytest.mark.parametrize(
    ("ranks", "case", "check"),
    [
        pytest.param(ranks, case, check, id=f"{check}-{ranks}", marks=marks)
        for case, ranks, marks in [
            ("all", 2, pytest.mark.thorough),
            ("all", 4, ()),
            ("stall", 3, ()),
        ]
        for check in [*(c.__name__ for c in CASES[case]), "end"]
    ],
)
def test_between_processes(ranks: int, case: str, check: str) -> None:
    every = run_ranks(ranks, case)
    wrong = {
        rank: said.get(check, "did not get there") for rank, said in enumerate(every)
    }
    assert not any(wrong.values()), "\n".join(
        f"rank {rank}: {text}" for rank, text in wrong.items() if text
    )


FOREIGN = [
    "{}",
    '{"a":1}',
    "[]",
    '["set",1]',
    '["dict",1]',
    '["dict",["list"],1]',
    '["bytes",-1]',
    '["bytes","x"]',
    '["array","O",[1]]',
    '["array","nothing",[1]]',
    '["array","<f4",[-1]]',
    '["array","<f4",["x"]]',
    '["scalar","<f4",[1]]',
    '["CostModel","{}"]',
    "[" * 100_000,
]


@pytest.mark.parametrize("text", FOREIGN, ids=lambda text: text[:24])
def test_what_nobody_encoded_is_an_error(text: str) -> None:
    with pytest.raises(JaxcommError):
        encoding.decode(len(text).to_bytes(8, "big") + text.encode())


@pytest.mark.parametrize("obj", [b"abc", {"a": (1, 2)}, np.ones(3), 1.0])
def test_a_message_of_another_length_is_an_error(obj: Any) -> None:
    data = encoding.encode(obj)
    for length in range(len(data)):
        with pytest.raises(JaxcommError):
            encoding.decode(data[:length])
    with pytest.raises(JaxcommError):
        encoding.decode(data + b"x")


def test_the_error_names_the_place_of_a_key() -> None:
    with pytest.raises(InvalidTreeError, match=r"obj\[1\], key frozenset"):
        encoding.encode([0, {frozenset(): 1}])
