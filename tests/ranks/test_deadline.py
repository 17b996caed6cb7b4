"""Waiting for other ranks, up to a limit."""

from __future__ import annotations

import time

import pytest

from jaxcomm.errors import StallError
from jaxcomm.ranks import deadline


def test_wait_ends_in_a_stall_error() -> None:
    with pytest.raises(StallError, match=r"rank 1 of 2 waited 0.05 s .* to arrive"):
        deadline.wait(lambda: False, 0.05, who="rank 1 of 2", what="arrive")


def test_wait_returns_when_done() -> None:
    end = time.monotonic() + 0.02
    deadline.wait(lambda: time.monotonic() > end, 5.0, who="", what="")
    assert time.monotonic() > end
