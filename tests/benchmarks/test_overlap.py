"""The overlap benchmark's arithmetic."""

from __future__ import annotations

import pytest

from benchmarks.common import results
from benchmarks.overlap import report


def test_overlap_is_what_did_not_add_to_the_step() -> None:
    samples = {"compute": [100.0], "communication": [40.0]}
    samples |= {"none": [140.0], "all": [100.0]}
    found = report.overlaps(results.summaries(samples))
    assert found["none"]["overlap"] == 0 and found["all"]["overlap"] == 1
    assert found["none"]["over_longer"] == pytest.approx(1.4)
