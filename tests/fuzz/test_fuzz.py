"""A seeded part of `make fuzz`: random compositions, against exact sums."""

from __future__ import annotations

import pytest

from tests.fuzz import run


@pytest.mark.parametrize(
    ("ranks", "way"),
    [
        pytest.param(2, "mpi4jax", marks=pytest.mark.thorough),
        (3, "shared memory"),
        pytest.param(2, "MPI calls", marks=pytest.mark.thorough),
        pytest.param(3, "NCCL stand-in", marks=pytest.mark.thorough),
    ],
)
def test_random_compositions(ranks: int, way: str) -> None:
    result = run.run_all(6, seed=1, ranks=[ranks], names=[way])
    assert result["programs"] == 6
    assert run.succeeded(result), result
