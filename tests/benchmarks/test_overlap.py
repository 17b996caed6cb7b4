"""The overlap benchmark: its arithmetic, and its table, which comes from its JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.overlap import __main__ as overlap


def test_overlap_is_what_did_not_add_to_the_step() -> None:
    samples = {"compute": [100.0], "communication": [40.0]}
    found = overlap.overlaps(samples | {"none": [140.0], "all": [100.0]})
    assert found["none"]["overlap"] == 0 and found["all"]["overlap"] == 1
    assert found["none"]["over_longer"] == pytest.approx(1.4)


def test_table_is_that_of_the_json() -> None:
    results = Path(overlap.HERE) / "results"
    result = json.loads((results / "overlap.json").read_text())
    assert (results / "overlap.md").read_text() == overlap.markdown(result)
