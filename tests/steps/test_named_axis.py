"""Functions written for jax.pmap give under jaxcomm what they give there."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from tests.jobs import ROOT, launch_ranks, on_fake_nccl
from tests.programs import constructs

pytestmark = pytest.mark.long

PROGRAM = ("-m", "tests.programs.constructs")


@functools.cache
def results(
    transport: str, ranks: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What the constructs give under jax.pmap and under jaxcomm."""
    with tempfile.TemporaryDirectory() as folder:
        want, got = Path(folder) / "pmap.npz", Path(folder) / "ranks.npz"
        done = subprocess.run(
            [sys.executable, *PROGRAM, "pmap", str(ranks), want],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        env = on_fake_nccl() if transport == "nccl" else {}
        command = [*PROGRAM, transport, str(ranks), got]
        done = launch_ranks(ranks, command, timeout=300, env=env)
        assert done.returncode == 0, done.stderr[-6000:]
        return dict(np.load(want)), dict(np.load(got))


@pytest.mark.timeout(700)
@pytest.mark.parametrize(
    ("transport", "ranks"),
    [
        ("mpi", 2),
        pytest.param("mpi", 4, marks=pytest.mark.thorough),
        pytest.param("nccl", 2, marks=pytest.mark.thorough),
    ],
)
@pytest.mark.parametrize("name", sorted(constructs.CONSTRUCTS))
def test_as_under_pmap(transport: str, ranks: int, name: str) -> None:
    want, got = results(transport, ranks)
    mine = {path for path in want if path.startswith(name)}
    assert mine and mine == {path for path in got if path.startswith(name)}
    for path in mine:
        # Sums of other orders round otherwise, by the size of what is summed.
        size = max(1.0, float(np.max(np.abs(want[path]), initial=0.0)))
        np.testing.assert_allclose(
            got[path], want[path], rtol=1e-6, atol=1e-6 * size, err_msg=path
        )
