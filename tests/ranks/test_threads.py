"""Several Python threads in a rank, each with a communicator of its own."""

from __future__ import annotations

import pytest

from tests.jobs import Launch, on_fake_nccl

# Programs of many independent parts, which XLA shares out among its threads, beside
# small ones; with work of the user's own in between.
THREADS = """
import itertools, random, sys, threading, time
import jax, jax.numpy as jnp, numpy as np, jaxcomm
from jax import lax
world = jaxcomm.init("mpi")
n, r = world.size, world.rank
calls = int(sys.argv[2])

def subgroup(k):
    orders = list(itertools.permutations(range(n)))
    return world.subgroup(orders[k % len(orders)])

def groups_of(comm):
    # Two groups, where there are enough ranks; as `axis_index_groups`.
    return [list(range(n))[::2], list(range(n))[1::2]] if n > 1 else None

KINDS = {
    "world": lambda k: world,
    "subgroup": subgroup,
    "partition": lambda k: world,
    "eager": subgroup,
    "wide": subgroup,
}

def work(kind, k, comm):
    rng = random.Random(100 * k + r)
    own = jax.jit(lambda x: jnp.tanh(x @ x) * 0 + x)
    groups = groups_of(comm) if kind == "partition" else None

    @(lambda f: jaxcomm.data_parallel(f, comm=comm))
    def step(x):
        if kind != "wide":
            y = jnp.tanh(x @ x) * 0 + x
            return lax.psum(y, "batch", axis_index_groups=groups)
        parts = [jnp.tanh(x @ x + j) * 0 + x for j in range(24)]
        for _ in range(3):
            parts = [lax.psum(p, "batch") / n for p in parts]
            parts = [jnp.sin(p @ p) * 0 + p for p in parts]
        return sum(parts) / 24 * n

    if groups is None:
        members = range(n)
    else:
        members = next(group for group in groups if r in group)
    for i in range(calls):
        base = i * (k + 1)
        x = own(jnp.full((64, 64), float(r + base)))
        want = sum(members) + len(members) * base
        if kind == "eager":
            got = jaxcomm.all_reduce(x, op="sum", comm=comm)
        else:
            got = step(x)
        np.testing.assert_allclose(np.asarray(got), want, rtol=1e-5)
        if rng.random() < 0.1:
            time.sleep(rng.random() * 0.005)

errors = []
def guarded(*arguments):
    try:
        work(*arguments)
    except BaseException as error:
        errors.append(error)
        raise

jobs = [(kind, k, KINDS[kind](k)) for k, kind in enumerate(sys.argv[1].split(","))]
# On the ranks in different orders.
threads = [threading.Thread(target=guarded, args=job) for job in jobs]
for thread in threads if r % 2 else threads[::-1]:
    thread.start()
for thread in threads:
    thread.join()
assert not errors, errors
print("right", flush=True)
"""


@pytest.mark.parametrize(
    ("ranks", "kinds"),
    [
        pytest.param(2, "subgroup,subgroup", marks=pytest.mark.thorough),
        (3, "subgroup,subgroup"),
        (2, "world,subgroup,wide"),
        pytest.param(4, "partition,subgroup,eager", marks=pytest.mark.thorough),
    ],
)
def test_threads_of_one_core_do_not_wait_for_each_other(
    job: Launch, ranks: int, kinds: str
) -> None:
    done = job(ranks, THREADS, kinds, "40", env={"JAXCOMM_THREADS": "1"}, timeout=150)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("right") == ranks


def test_threads_share_two_cores(job: Launch) -> None:
    options = ["--threads", "2"]
    done = job(2, THREADS, "world,subgroup", "40", options=options, timeout=150)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("right") == 2


def test_threads_of_ranks_that_make_mpi_calls(job: Launch) -> None:
    env = {"JAXCOMM_THREADS": "1", "JAXCOMM_SHARED_MEMORY": "off"}
    done = job(2, THREADS, "world,subgroup", "20", env=env, timeout=150)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("right") == 2


REFUSED = """
import sys, threading
import jax.numpy as jnp
early = jnp.ones(3) if sys.argv[1] == "mpi" else None  # JAX's clients are made here
import jaxcomm
comm = jaxcomm.init(sys.argv[1])
other = comm.subgroup(range(comm.size)[::-1])
assert float(jaxcomm.all_reduce(jnp.ones(3), op="sum")[0]) == comm.size
found = []

def work():
    try:
        jaxcomm.all_reduce(jnp.ones(3), comm=other)
    except jaxcomm.errors.InvalidOptionError as error:
        found.append(str(error))

thread = threading.Thread(target=work, name="evaluation")
thread.start()
thread.join()
print(*found, flush=True)
assert float(jaxcomm.all_reduce(jnp.ones(3), op="sum")[0]) == comm.size
"""


@pytest.mark.parametrize(
    ("transport", "remedy"),
    [
        ("mpi", "jaxcomm run --threads 2"),
        ("mpi4jax", "Use transport 'mpi'"),
        ("nccl", "from the thread that called jaxcomm.init()"),
    ],
)
def test_a_thread_too_many_is_refused_with_the_remedy(
    job: Launch, transport: str, remedy: str
) -> None:
    env = {"JAXCOMM_THREADS": "1"} | (on_fake_nccl() if transport == "nccl" else {})
    done = job(2, REFUSED, transport, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("evaluation is one Python thread too many") == 2
    assert done.stdout.count(remedy) == 2


SUBNORMAL = """
import jax, jax.numpy as jnp, numpy as np, jaxcomm
from jax import lax
comm = jaxcomm.init("mpi")

@jaxcomm.data_parallel
def step(x, tiny):
    return lax.psum(x, "batch") * tiny

tiny = np.float32(1e-30)
x = np.full(3, 1e-10, np.float32)  # the product is subnormal
inside = jax.jit(lambda a, b: a * b)(x * comm.size, tiny)
np.testing.assert_array_equal(step(x, tiny), inside)
"""


def test_a_program_rounds_alike_on_whatever_thread_it_goes_on(job: Launch) -> None:
    env = {"JAXCOMM_SHARED_MEMORY": "off", "JAXCOMM_OWN_THREAD": "on"}
    done = job(2, SUBNORMAL, env=env)
    assert done.returncode == 0, done.stderr
