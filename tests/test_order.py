"""One order of all calls in every composition, and every call made: see order_ranks.py."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT, Launch

WAYS = ("bare", "nested", "inside", "inner", "axis")
IN_ALL_RUNS = {("bare", 2), ("bare", 3), ("nested", 2), ("nested", 3), ("inside", 3)}
IN_ALL_RUNS |= {("inner", 3), ("axis", 2)}
CASES = [
    pytest.param(
        *case,
        marks=() if case in IN_ALL_RUNS else pytest.mark.thorough,
        id="-".join(map(str, case)),
    )
    for case in [(way, ranks) for ranks in (2, 3, 4) for way in WAYS]
]


@pytest.mark.parametrize(("way", "ranks"), CASES)
def test_every_row(launch: Launch, tmp_path, way: str, ranks: int) -> None:
    report = tmp_path / "report.json"
    script = ROOT / "tests" / "order_ranks.py"
    done = launch(ranks, [script, way, report], timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    failed = [
        f"rank {rank}, {row}: {text[-600:]}"
        for rank, rows in enumerate(json.loads(report.read_text()))
        for row, text in rows.items()
        if text
    ]
    assert not failed, "\n".join(failed)
