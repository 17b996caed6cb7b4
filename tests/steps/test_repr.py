"""What communicators and decorated functions show of themselves: a line."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import jaxcomm
from jaxcomm.ranks.communicator import Communicator
from jaxcomm.ranks.fabric import Alone
from jaxcomm.settings import Settings
from jaxcomm.transports.local import Local
from tests.jobs import Launch


def mean(x: Any) -> Any:
    return jax.lax.pmean(x, "batch")


class Model:
    weights = tuple(range(1000))

    @jaxcomm.data_parallel
    def step(self, x: Any) -> Any:
        return mean(x)


class TwoHosts(Alone):
    size, local_size, hosts = 4, 2, (0, 0, 1, 1)


def test_decorated_functions() -> None:
    step = jaxcomm.data_parallel(mean)
    assert repr(step) == "DataParallel(mean, axis_name='batch', schedules=0)"
    step.lower(jnp.ones(3))
    step.lower(jnp.ones(4))
    assert repr(step) == "DataParallel(mean, axis_name='batch', schedules=2)"
    mapped = jaxcomm.pmap(mean, "batch")
    assert repr(mapped) == repr(jaxcomm.data_parallel(mean))
    assert repr(Model().step) == (
        "<DataParallel(Model.step, axis_name='batch', schedules=0) of a Model>"
    )


def test_hosts() -> None:
    comm = Communicator("somebody", Local(), Settings(), TwoHosts())
    assert repr(comm).endswith("rank=0, size=4, hosts=2)")


REPRS = """
import jaxcomm
comm = jaxcomm.init("mpi")
end = f"rank={comm.rank}, size=2, hosts=1)"
assert repr(comm) == f"Communicator('world', transport='mpi', {end}", comm
other = comm.subgroup([0, 1])
assert repr(other) == f"Communicator('world/0,1', transport='mpi', {end}", other
"""


def test_communicators(job: Launch) -> None:
    done = job(2, REPRS)
    assert done.returncode == 0, done.stderr
