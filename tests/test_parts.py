"""Small parts, each on its own: watchdog, refused transports, simulation, Flax."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from jaxcomm.errors import StallError
from jaxcomm.ranks import deadline
from jaxcomm.simulate import control
from jaxcomm.transports.nccl import library

REFUSED = """
import jaxcomm
try:
    jaxcomm.init({name!r})
except jaxcomm.errors.TransportUnavailableError as error:
    print(error)
"""

FLAX = """
import jax, jaxcomm, numpy as np
from flax import nnx
comm = jaxcomm.init()
model = nnx.Sequential(
    nnx.Linear(3, 4, rngs=nnx.Rngs(comm.rank)),
    nnx.BatchNorm(4, rngs=nnx.Rngs(comm.rank)),
    nnx.Dropout(0.5, rngs=nnx.Rngs(comm.rank)),
)
want = comm.broadcast_object(jax.tree.map(np.asarray, nnx.state(model, nnx.Param)), 1)
assert jaxcomm.flax.broadcast(model, root=1) is model
got = nnx.state(model, nnx.Param)
jax.tree.map(np.testing.assert_array_equal, got, want)
jaxcomm.assert_replicated(got)
"""


def test_wait_ends_in_a_stall_error() -> None:
    with pytest.raises(StallError, match=r"rank 1 of 2 waited 0.05 s .* to arrive"):
        deadline.wait(lambda: False, 0.05, who="rank 1 of 2", what="arrive")


def test_wait_returns_when_done() -> None:
    end = time.monotonic() + 0.02
    deadline.wait(lambda: time.monotonic() > end, 5.0, who="", what="")
    assert time.monotonic() > end


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nccl", "moves arrays of NVIDIA GPUs, but JAX runs on 'cpu'"),
    ],
)
def test_transports_that_cannot_be_had_say_so(name: str, says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REFUSED.format(name=name)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert says in done.stdout
    assert "'mpi'" in done.stdout


def test_nccl_version() -> None:
    assert library.version_text(22703) == "2.27.3"


def test_control_traffic() -> None:
    coordinator, cache, static = control.designs(6000, 160)
    # Within the size of what rank 0 sends itself of the figure for Horovod's code.
    assert coordinator.bytes_into_rank_0 == pytest.approx(127e6, rel=0.01)
    assert cache.bytes_into_rank_0 == 24 * 13
    assert (static.per_step, static.rounds_per_step) == (0, 0)
    assert [t.per_step for t in control.designs(1, 5)] == [0, 0, 0]


def test_nnx_module_gets_the_roots_state(job: Callable[..., object]) -> None:
    done = job(2, FLAX)
    assert done.returncode == 0, done.stderr  # type: ignore[attr-defined]
