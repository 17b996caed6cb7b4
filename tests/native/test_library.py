"""The native library: conversions, kernels, limits, threads."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from collections.abc import Callable

import pytest

from jaxcomm.native import callbacks

pytestmark = pytest.mark.long

Job = Callable[..., "subprocess.CompletedProcess[str]"]

CONVERSIONS = """
import sys
import jax, jax.numpy as jnp, numpy as np, jaxcomm
from jaxcomm import native
comm = jaxcomm.init("mpi")
assert native.kernels() == sys.argv[1], native.kernels()
rng = np.random.default_rng(0)
bits = rng.integers(0, 2**32, 300_000, dtype=np.uint64).astype(np.uint32)
# Around every rounding boundary and special value of both formats.
edges = np.arange(0, 2**16, dtype=np.uint32)
edges = np.concatenate([(edges << 16) + d for d in (0, 1, 0x7FFF, 0x8000, 0x8001)])
halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
finite = halves[np.isfinite(halves)]
middles = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
x = np.concatenate([bits.view(np.float32), edges.view(np.float32), halves, middles])
mine = x if comm.rank == 0 else np.full_like(x, -0.0)
for wire in ("bfloat16", "float16"):
    with np.errstate(all="ignore"):
        want = x.astype(jnp.dtype(wire)).astype(np.float32)
    got = np.asarray(jaxcomm.all_reduce(mine, op="sum", wire_dtype=wire))
    nan = np.isnan(want)
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(got[~nan].view(np.uint32), want[~nan].view(np.uint32))
    # All numbers of the format itself.
    every = np.arange(2**16, dtype=np.uint16).view(jnp.dtype(wire))
    got = jaxcomm.all_reduce(
        every if comm.rank == 0 else np.full_like(every, -0.0), op="sum"
    )
    nan = np.isnan(every.astype(np.float32))
    same = np.asarray(got).view(np.uint16) == every.view(np.uint16)
    assert same[~nan].all() and np.isnan(np.asarray(got)[nan].astype(np.float32)).all()
"""

COUNTS = """
import jax, jax.numpy as jnp, jaxcomm
comm = jaxcomm.init("mpi")
n = 2**31 + 5
step = jaxcomm.data_parallel(
    lambda x: jaxcomm.all_reduce(x, op="sum"), donate_argnums=0
)
out = step(jnp.full(n, 3 + comm.rank, jnp.int8))
assert out.shape == (n,)
assert int(out.min()) == int(out.max()) == 7
"""

STAGING = """
import os
import jax.numpy as jnp, numpy as np, jaxcomm
comm = jaxcomm.init(staging_bytes=5000 if comm_rank_is_zero() else None)
assert comm.staging_bytes == 4992  # rank 0's, in whole elements
tree = [jnp.full(n, float(n + comm.rank)) for n in (1, 999, 1249, 3000, 40_000, 90_000)]
for out, leaf in zip(jaxcomm.all_reduce(tree, op="sum", groups=1), tree):
    np.testing.assert_array_equal(out, np.full(leaf.shape, 2.0 * leaf.size + 1))
for bad in (0, -1, 17, "many"):
    try:
        jaxcomm.init(staging_bytes=bad)
    except jaxcomm.errors.InvalidOptionError as error:
        assert "staging_bytes" in str(error)
    else:
        raise AssertionError(bad)
"""

SERIALIZED = """
import threading
import mpi4py
mpi4py.rc.thread_level = "serialized"
from mpi4py import MPI
import jax, jax.numpy as jnp, numpy as np, jaxcomm
assert MPI.Query_thread() == MPI.THREAD_SERIALIZED
comm = jaxcomm.init("mpi")

@jaxcomm.data_parallel
def step(x):
    return jax.lax.pmean(1.0000001 * x, "batch")

x = jnp.ones(2_000_000)
for k in range(10):
    x = step(x)  # in flight while the host talks
    assert comm.all_gather_object((comm.rank, k))[-1] == (comm.size - 1, k)
    assert comm.broadcast_object([k] if comm.rank == 0 else None) == [k]
    comm.barrier()
jaxcomm.assert_replicated(x)
other = comm.subgroup(range(comm.size)[::-1])
results = {}

def work(name, on):
    results[name] = [
        float(jaxcomm.all_reduce(jnp.full(9000, k + 1.0), op="sum", comm=on)[3])
        for k in range(20)
    ]

threads = [threading.Thread(target=work, args=a) for a in (("a", comm), ("b", other))]
[t.start() for t in threads]
[t.join() for t in threads]
want = [comm.size * (k + 1.0) for k in range(20)]
assert results == {"a": want, "b": want}
try:
    jaxcomm.all_reduce(jnp.ones(3 + comm.rank))
except jaxcomm.errors.ScheduleMismatchError as error:
    assert "float32[3]" in str(error)
else:
    raise AssertionError("no mismatch")
"""


SHARED = """
import sys
import time
import jax.numpy as jnp, numpy as np, jaxcomm
comm = jaxcomm.init("mpi")
assert comm.shared_memory == (sys.argv[1] == "shared"), comm.shared_memory
def tree_of(rank):
    rng = np.random.default_rng(rank)
    # Odd sizes: pieces of leaves start anywhere in a slot, and parts end anywhere.
    sizes = (1, 300_007, 3, 0, 77_777, 131_072, 13, 999_999)
    tree = [rng.integers(-8, 9, n) for n in sizes]
    return [x.astype(d) for x in tree for d in ("float32", "bfloat16", "int8")]
parts = [tree_of(rank) for rank in range(comm.size)]
before, began = comm.counters(), time.perf_counter_ns()
for repeat in range(3):
    out = jaxcomm.all_reduce(parts[comm.rank], op="sum")
    for k, leaf in enumerate(out):
        want = np.sum([part[k].astype(np.int64) for part in parts], axis=0)
        np.testing.assert_array_equal(np.asarray(leaf).astype(np.int64), want)
    floats = [x for x in parts[comm.rank] if x.dtype == np.float32]
    out = jaxcomm.all_reduce(floats, op="mean", wire_dtype="bfloat16")
    for k, leaf in enumerate(out):
        want = np.mean([part[3 * k] for part in parts], axis=0)
        np.testing.assert_array_equal(leaf, want)  # multiples of 1/4 below 8: exact
counted = {k: n - before[k] for k, n in comm.counters().items()}
assert 0 < counted["nanoseconds"] < time.perf_counter_ns() - began, counted
through = {"shared": ["segments"], "apart": ["mpi_all_reduce"]}
through["ring"] = ["segments", "mpi_all_reduce"]
for name in ("segments", "mpi_all_reduce"):
    assert (counted[name] > 0) == (name in through[sys.argv[1]]), counted
jaxcomm.assert_replicated(jaxcomm.all_reduce(
    np.random.default_rng(comm.rank).normal(size=700_001).astype(np.float32)))
"""


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.thorough)])
@pytest.mark.parametrize(
    "stores", [pytest.param("ordinary", marks=pytest.mark.thorough), "streaming"]
)
def test_shared_memory_with_either_kind_of_stores(
    job: Job, ranks: int, stores: str
) -> None:
    done = job(ranks, SHARED, "shared", env={"JAXCOMM_STORES": stores})
    assert done.returncode == 0, done.stderr


def test_ranks_that_share_no_memory_use_mpi(job: Job) -> None:
    done = job(2, SHARED, "apart", env={"JAXCOMM_SHARED_MEMORY": "off"})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param(2, marks=pytest.mark.thorough),
        3,
        pytest.param(4, marks=pytest.mark.thorough),
    ],
)
def test_large_leaves_go_around_a_ring_between_hosts(job: Job, ranks: int) -> None:
    env = {"JAXCOMM_SHARED_MEMORY": "off", "JAXCOMM_OWN_THREAD": "on"}
    done = job(ranks, SHARED, "ring", env=env)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kernels", ["baseline", "avx2", "avx512"])
def test_sixteen_bit_floats_round_as_numpys(job: Job, kernels: str) -> None:
    if kernels != "baseline" and platform.machine() != "x86_64":
        pytest.skip("not an x86-64 processor")
    with open("/proc/cpuinfo") as file:
        flags = file.read()
    if {"avx2": "avx2", "avx512": "avx512bw"}.get(kernels, "") not in flags:
        pytest.skip(f"this processor has no {kernels}")
    done = job(2, CONVERSIONS, kernels, env={"JAXCOMM_KERNELS": kernels})
    assert done.returncode == 0, done.stderr


@pytest.mark.thorough  # it moves gigabytes; test_segments has small pieces
def test_more_elements_than_an_int_counts(job: Job) -> None:
    done = job(2, COUNTS, timeout=240)
    assert done.returncode == 0, done.stderr


def test_staging_buffer_of_a_few_pages(job: Job) -> None:
    text = STAGING.replace(
        "comm_rank_is_zero()",
        'os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")) == "0"',
    )
    done = job(2, text, env={"JAXCOMM_STAGING_BYTES": "8192"})
    assert done.returncode == 0, done.stderr


def test_unusable_staging_size(job: Job) -> None:
    done = job(2, "import jaxcomm; jaxcomm.init()", env={"JAXCOMM_STAGING_BYTES": "8M"})
    assert done.returncode != 0
    assert "JAXCOMM_STAGING_BYTES: '8M'" in done.stderr


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_threads_take_turns_in_mpi(job: Job, ranks: int) -> None:
    done = job(ranks, SERIALIZED)
    assert done.returncode == 0, done.stderr


NO_MEMORY = """
import resource, sys
import jax.numpy as jnp, jaxcomm
comm = jaxcomm.init("mpi")
other = comm.subgroup(range(comm.size)[::-1]) if sys.argv[1] == "thread" else comm
warm = jaxcomm.all_reduce(jnp.ones(3 << 20))  # not packed: needs no staging buffer
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), resource.RLIM_INFINITY))
try:
    jaxcomm.all_reduce(jnp.ones(3), comm=other)
except Exception as error:
    text = str(error)
else:
    text = "no error"
assert "no memory for the staging buffer of 4294967296 bytes" in text, text
assert "JAXCOMM_STAGING_BYTES" in text, text
try:
    jaxcomm.all_reduce(jnp.ones(3), comm=other)
except Exception as error:
    assert "an earlier call of this communicator failed" in str(error), error
else:
    raise AssertionError("the communicator is used on")
print("said so", flush=True)
"""


@pytest.mark.parametrize(
    "where", [pytest.param("inline", marks=pytest.mark.thorough), "thread"]
)
def test_a_failed_allocation_is_an_exception(job: Job, where: str) -> None:
    env = {"JAXCOMM_SHARED_MEMORY": "off", "JAXCOMM_STAGING_BYTES": str(4 << 30)}
    env["JAXCOMM_OWN_THREAD"] = "on" if where == "thread" else "off"
    done = job(2, NO_MEMORY, where, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("said so") == 2


NO_THREAD = """
import resource
import jaxcomm
from jaxcomm import native

native.load()
# Too little is left for the stack of a thread.
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), resource.RLIM_INFINITY))
try:
    with native.deadline(100, "never", 1):
        raise AssertionError("there was memory for a thread")
except jaxcomm.errors.TransportUnavailableError as error:
    print("said:", error)
"""


def test_a_thread_that_cannot_be_made_is_an_exception() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_THREAD],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "said: Resource temporarily unavailable" in done.stdout


def test_a_failing_callback_is_a_refusal() -> None:
    text = ctypes.create_string_buffer(100)

    def interrupted() -> str | None:
        raise KeyboardInterrupt

    refused = callbacks.answer(interrupted, ctypes.addressof(text), len(text))
    assert (refused, text.value) == (1, b"jaxcomm: KeyboardInterrupt: ")
    assert callbacks.answer(lambda: None, ctypes.addressof(text), len(text)) == 0


MANY = """
from jaxcomm import native
from mpi4py import MPI
import numpy as np
native.bind_mpi(MPI)
for key in range(1, 301):
    native.create_communicator(
        key, MPI.COMM_SELF, staging_bytes=4096, segment_bytes=4096,
        own_thread=False, ring=False,
    )
assert sorted(row.key for row in native.progress()) == list(range(1, 301))
"""


def test_all_communicators_are_watched(job: Job) -> None:
    done = job(1, MANY)
    assert done.returncode == 0, done.stderr
