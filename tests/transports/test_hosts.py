"""Ranks on several hosts, which are network namespaces."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests import namespaces
from tests.programs import conformance

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(bool(namespaces.missing()), reason=namespaces.missing()),
]


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "ranks", [(2, 2), pytest.param((2, 1, 1), marks=pytest.mark.thorough)]
)
def test_what_leaves_a_host(ranks: Sequence[int]) -> None:
    h, megabytes, times = len(ranks), 20, 10
    with namespaces.hosts(h) as made:
        sent = []
        # What starting and ending sends is in both.
        for repeats in (0, times):
            before = made.sent()
            done = made.launch(
                ranks,
                ["-m", "tests.programs.wire_ranks", str(megabytes), str(repeats)],
                timeout=90,
            )
            assert done.returncode == 0, done.stdout
            assert done.stdout.count("all checked") == sum(ranks), done.stdout
            sent.append([b - a for a, b in zip(before, made.sent(), strict=True)])
    least = 2 * (h - 1) / h * 1e6 * megabytes * times
    for nothing, all_of_it in zip(*sent, strict=True):
        # Frames, acknowledgements, and what starting sends this time and not last time.
        assert least < all_of_it - nothing < 1.06 * least + 1e6, (sent, least)


@pytest.mark.thorough
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [(2, 2), (2, 1, 1)])
def test_conformance_between_hosts(ranks: Sequence[int], tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    with namespaces.hosts(len(ranks)) as made:
        done = made.launch(
            ranks,
            ["-m", "tests.programs.conformance", results, "mpi"],
            timeout=800,
        )
    assert done.returncode == 0, done.stdout[-6000:]
    found = json.loads(results.read_text())
    failed = {
        name: text
        for name, text in found.items()
        if text and not text.startswith(conformance.SKIPPED)
    }
    assert found and not failed
