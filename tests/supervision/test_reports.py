"""What the watchdog concludes from what ranks tell, without any ranks."""

from __future__ import annotations

import pytest

from jaxcomm import native
from jaxcomm.supervision import call_history, reports

WORLD, PAIR = 7, 8


def call(number: int, bucket: int = 0, comm: int = WORLD) -> reports.Call:
    return reports.Call(comm, number, (99, bucket), f"bucket {bucket}", 1.5)


def test_ranks_that_wait_alike_are_no_contradiction() -> None:
    ledger = reports.Ledger()
    for rank in range(3):
        ledger.waits(rank, call(4))
    ledger.waits(3, call(3, bucket=1))  # has not come this far
    ledger.waits(4, call(4, bucket=1, comm=PAIR))  # elsewhere
    assert ledger.contradiction() is None


def test_different_places_in_one_call_are() -> None:
    ledger = reports.Ledger()
    for rank in (0, 1, 3):
        ledger.waits(rank, call(4))
    ledger.waits(2, call(4, bucket=1))
    text = ledger.contradiction()
    assert text is not None
    assert "ScheduleMismatchError" in text and "must be in call 4" in text
    assert "  ranks 0-1, 3: bucket 0\n  rank 2: bucket 1\n" in text


def test_a_rank_that_has_ended_never_comes() -> None:
    ledger = reports.Ledger()
    ledger.ended(1, {WORLD: 4, PAIR: 0})
    ledger.waits(0, call(4))
    assert ledger.contradiction() is None  # it has made that call
    ledger.waits(0, call(9, comm=12))  # and is no member of that communicator
    assert ledger.contradiction() is None
    ledger.waits(0, call(5))
    text = ledger.contradiction()
    assert text is not None
    assert "rank 1 ended without a call" in text
    assert "rank 0 waits in call 5: bucket 0" in text


def test_old_calls_are_forgotten() -> None:
    ledger = reports.Ledger()
    ledger.waits(0, call(1))
    for number in range(2, 400):
        ledger.waits(0, call(number))
    ledger.waits(1, call(1, bucket=1))
    assert ledger.contradiction() is None


def test_hashes_are_compared_where_both_have_been(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = {1: 11, 2: 22, 3: 33}
    row = native.Progress(WORLD, 3, 99, 0, 0, ((3, 33), (0, 0), (0, 0), (0, 0)))
    monkeypatch.setattr(native, "progress", lambda: [row])
    monkeypatch.setattr(native, "hash_at", lambda key, number: own.get(number))
    history = call_history.History()
    assert history.news() == {WORLD: [(3, 33)]}
    assert history.news() == {}  # nothing since
    history.hear({WORLD: [(2, 22)]})
    assert history.difference() is None
    history.hear({WORLD: [(4, 44)]})  # this rank will get there
    assert history.difference() is None
    row = row._replace(calls=4)
    own[4] = 45
    assert history.difference() == "between call 3 and call 4"
