"""One order of all calls in every composition, and every call made (order_ranks.py)."""

from __future__ import annotations

import json

import pytest

from tests.jobs import Launch

WAYS = ("bare", "nested", "inside", "inner", "axis")
IN_ALL_RUNS = {("bare", 2), ("nested", 3), ("inside", 2)}
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
    done = launch(ranks, ["-m", "tests.programs.order_ranks", way, report], timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    failed = [
        f"rank {rank}, {row}: {text[-600:]}"
        for rank, rows in enumerate(json.loads(report.read_text()))
        for row, text in rows.items()
        if text
    ]
    assert not failed, "\n".join(failed)


def passed(done, ranks: int) -> None:
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    assert done.stdout.count("right on rank") == ranks, done.stdout


# Two members of an ensemble: equal shapes, one step, in one program. How long a batch
# takes differs between ranks, so that without an order their calls would cross.
ENSEMBLE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax import lax
import jaxcomm

comm = jaxcomm.init()
what = sys.argv[1]
again = comm.subgroup(range(comm.size)[::-1])
comms = (None, again) if what == "two communicators" else (None, None)

def net(p, x):
    for w, b in p:
        x = jnp.tanh(x @ w + b)
    return jnp.mean(x**2)

def make(comm):
    @jaxcomm.data_parallel(comm=comm)
    def step(p, x):
        return jax.tree.map(lambda g: lax.pmean(g, "batch"), jax.grad(net)(p, x))
    return step

steps = [make(c) for c in comms]
rng = np.random.default_rng(0)
members = [
    [(jnp.asarray(rng.standard_normal((32, 32)), "float32") / 6, jnp.zeros(32))
     for _ in range(8)]
    for _ in range(4)
]
mine = np.random.default_rng(1 + comm.rank)
batches = [
    jnp.asarray(mine.standard_normal((64 if comm.rank else 1024, 32)), "float32")
    for _ in members
]
want = [steps[0](p, x) for p, x in zip(members, batches)]

def all_members(members, batches):
    return [steps[k % 2](p, x) for k, (p, x) in enumerate(zip(members, batches))]

own = {"in a step": jaxcomm.data_parallel(axis_name="all")}.get(what, jax.jit)
together = own(all_members)
for _ in range(10):
    for a, b in zip(jax.tree.leaves(together(members, batches)), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-6)
print("right on rank", comm.rank)
"""


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("what", ["in a jit", "in a step", "two communicators"])
def test_steps_in_one_program(job: Launch, what: str, ranks: int) -> None:
    passed(job(ranks, ENSEMBLE, what, timeout=200), ranks)


SUBGROUPS = """
import jax, jax.numpy as jnp, numpy as np
from jax import lax
import jaxcomm

comm = jaxcomm.init()
parts = [range(k, comm.size, 2) for k in (0, 1)]
half = [comm.subgroup(part) for part in parts][comm.rank % 2]
# Of some ranks only: the others' program has no such call.
few = comm.subgroup([0, 1]) if comm.rank < 2 else None
x = jnp.arange(5.0) + 10 * comm.rank
everyone = sum(np.arange(5.0) + 10 * r for r in range(comm.size))
mine = sum(np.arange(5.0) + 10 * r for r in parts[comm.rank % 2])

@jaxcomm.data_parallel
def step(x):
    a = lax.psum(x, "batch")
    b = jaxcomm.all_reduce(x, op="sum", comm=half)
    c = 0 * a
    if few is not None:
        c = jaxcomm.all_reduce(a, op="max", comm=few) - a
    return a, lax.psum(b + c, "batch"), lax.scan(
        lambda s, _: (s + jaxcomm.all_reduce(x, op="sum", comm=half), None), 0 * x,
        length=3)[0]

for _ in range(5):
    a, b, c = step(x)
    np.testing.assert_array_equal(a, everyone)
    total = sum(sum(np.arange(5.0) + 10 * r for r in parts[k % 2])
                for k in range(comm.size))
    np.testing.assert_array_equal(b, total)
    np.testing.assert_array_equal(c, 3 * mine)
assert [bucket.op for bucket in step.schedule.buckets] == ["sum", "sum"]
print("right on rank", comm.rank)
"""


@pytest.mark.parametrize("ranks", [3, pytest.param(4, marks=pytest.mark.thorough)])
def test_subgroups_keep_their_own_communicator(job: Launch, ranks: int) -> None:
    passed(job(ranks, SUBGROUPS, timeout=200), ranks)


UNLIKE = """
import jax, jax.numpy as jnp, numpy as np
from jax import lax
import jaxcomm

comm = jaxcomm.init()
constant = jnp.arange(3.0)

@jax.jit
def of_a_constant(x):
    return x + jaxcomm.all_reduce(constant, op="sum")

for _ in range(3):
    np.testing.assert_array_equal(of_a_constant(constant), (1 + comm.size) * constant)
before = comm.counters()["calls"]
jax.block_until_ready(of_a_constant(constant))
assert comm.counters()["calls"] == before + 1  # in the program, not when it was traced
assert jax.make_jaxpr(of_a_constant)(constant).effects  # and in its order

@jaxcomm.data_parallel
def step(x):
    for _ in range(5 * comm.rank):  # what one rank computes besides
        x = jnp.sin(jnp.arcsin(x))
    y = lax.pmean(x, "batch")
    if comm.rank == 1:
        y = jnp.cos(y)
    z = lax.pmean({"a": 2 * x, "b": x[:2]}, "batch")
    return (y, z) if comm.rank else z

got = step(0.1 * constant)
got = got[1] if comm.rank else got
np.testing.assert_allclose(got["a"], 0.2 * constant, rtol=1e-4)
print("right on rank", comm.rank)
"""


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.thorough)])
def test_what_ranks_compute_besides_may_differ(job: Launch, ranks: int) -> None:
    passed(job(ranks, UNLIKE, timeout=200), ranks)


OVERLAPPING = """
import itertools
import jax.numpy as jnp
import jaxcomm

comm = jaxcomm.init()
everyone = range(comm.size)
for count in everyone:
    # Members alone ask, so that some are ahead of others.
    for members in itertools.combinations(everyone, count + 1):
        if comm.rank in members:
            group = comm.subgroup(members)
            total = jaxcomm.all_reduce(jnp.float32(comm.rank), op="sum", comm=group)
            assert total == sum(members), (members, total)
print("right on rank", comm.rank)
"""


def test_subgroups_that_overlap(job: Launch) -> None:
    passed(job(4, OVERLAPPING, timeout=200), 4)


AHEAD = """
import time
import jaxcomm

comm = jaxcomm.init()
if comm.rank == 0:
    time.sleep(0.5)  # rank 2, which waits for it, hears first of what rank 1 asks for
for members in ([0, 2], [1, 2]):
    if comm.rank in members:
        assert comm.subgroup(members).size == 2
print("right on rank", comm.rank)
"""


def test_a_rank_that_is_ahead_is_no_contradiction(job: Launch) -> None:
    passed(job(3, AHEAD, timeout=200), 3)


# Equal shapes, one schedule: which call of its program each is tells them apart.
SITES = """
import sys
import jax, jax.numpy as jnp
import jaxcomm

comm = jaxcomm.init()
x = jnp.ones(3)

def twice(x):
    return jaxcomm.all_reduce(x, op="sum"), jaxcomm.all_reduce(2 * x, op="sum")

text = jax.jit(twice).lower(x).as_text()
assert "bucket = 0 :" in text and f"bucket = {1 << 32} :" in text, text
jax.block_until_ready(jax.jit(twice)(x))
if comm.rank == 0:
    run = jax.jit(twice)
else:  # two programs of a call each, not one of two
    def run(x):
        y = jaxcomm.all_reduce(x, op="sum")
        return y, jaxcomm.all_reduce(2 * x, op="sum")
try:
    jax.block_until_ready(run(x))
except Exception as error:
    assert "ScheduleMismatchError" in str(error) or "Mismatch" in type(error).__name__
    assert "call 2 of its program" in str(error), error
    assert "call 1 of its program" in str(error), error
    print("right on rank", comm.rank)
"""


@pytest.mark.parametrize("check", ["once", "every"])
def test_ranks_in_different_calls_of_one_schedule(job: Launch, check: str) -> None:
    done = job(2, SITES, timeout=200, env={"JAXCOMM_CHECK": check})
    assert done.stdout.count("right on rank") == 2, done.stdout + done.stderr
