"""Native stacks in reports of stalls, MPI's transport, and the search for a hang."""

from __future__ import annotations

import re
import signal
import threading
import time
from pathlib import Path

import pytest

from jaxcomm import native
from tests.faults import mixed
from tests.jobs import Launch

MPI_CALLS = {"JAXCOMM_SHARED_MEMORY": "off"}
LIMITS = {"JAXCOMM_WARN_AFTER": "1", "JAXCOMM_ABORT_AFTER": "4"}


def caught_signals() -> str:
    status = Path("/proc/self/status").read_text()
    return status[status.index("SigCgt:") :].splitlines()[0]


def of_thread(stacks: str, number: int) -> str:
    """Return the paragraph about a thread that is alone with its stack."""
    found = re.search(
        rf"^    thread {number} \(.*\n(      .*\n)*", stacks, re.MULTILINE
    )
    assert found is not None, stacks
    return found[0]


def test_every_thread_is_told_of_and_nothing_is_left_behind() -> None:
    native.load()
    ready, end = threading.Event(), threading.Event()

    def block() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        ready.set()
        end.wait()

    blocked = threading.Thread(target=block, daemon=True)
    waiting = threading.Thread(target=end.wait, daemon=True)
    waiting.start()
    blocked.start()
    ready.wait()
    before = caught_signals()
    for _ in range(3):
        text = native.stacks(10)
        assert caught_signals() == before
    assert blocked.native_id and waiting.native_id
    blocks = of_thread(text, blocked.native_id)
    assert "no stack: it blocks the signal" in blocks
    assert "more of Python" in of_thread(text, waiting.native_id)
    assert str(threading.get_native_id()) not in text  # who asks is left out
    end.set()
    blocked.join()
    waiting.join()


def test_threads_with_equal_stacks_are_told_of_once() -> None:
    end = threading.Event()
    threads = [threading.Thread(target=end.wait, daemon=True) for _ in range(20)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    text = native.stacks(10)
    end.set()
    counts = [int(n) for n in re.findall(r"^    (\d+) threads \(", text, re.MULTILINE)]
    assert max(counts) >= 20, text


BUSY = """
import sys, threading, time
import jax, jax.numpy as jnp, numpy as np, jaxcomm
from jaxcomm import native
from mpi4py import MPI
comm = jaxcomm.init("mpi")

@jax.jit
def reduce(tree, factor):
    tree = [leaf * factor for leaf in tree]
    for _ in range(3):
        tree = jaxcomm.all_reduce(tree, op="sum")
    return tree

tree = [jnp.full(n, comm.rank + 1.0) for n in (3, 70_000, 1_000_000)]
texts = []

def look():
    for _ in range(100):
        texts.append(native.stacks(10))
        time.sleep(0.01)

thread = threading.Thread(target=look)
calls = 0
reduce(tree, 1.0)
thread.start()
while not comm.broadcast_object(not thread.is_alive()):
    calls += 1
    found = reduce(tree, np.float32(calls))
    for leaf in found:
        assert (np.asarray(leaf) == 12 * calls).all()
    flat = np.full(1000, float(calls))
    MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, flat)
    assert (flat == 2 * calls).all()
thread.join()
assert calls >= 10 and len(texts) == 100
assert all("thread" in text for text in texts)
inside = sum("libmpi" in t or "libjaxcomm_native" in t for t in texts)
assert inside > 0
print("right", calls, inside, flush=True)
"""


@pytest.mark.parametrize(
    "way",
    [pytest.param({}, marks=pytest.mark.thorough), MPI_CALLS],
    ids=["shared memory", "MPI calls"],
)
def test_a_running_program_is_not_disturbed(job: Launch, way: dict[str, str]) -> None:
    done = job(2, BUSY, env=way, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("right") == 2


HELD = """
import ctypes, os
import jax.numpy as jnp, jaxcomm
comm = jaxcomm.init("mpi")
jaxcomm.all_reduce(jnp.ones(3)).block_until_ready()
if comm.rank == 1:
    # With the interpreter, which it does not let go.
    ctypes.PyDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)
jaxcomm.all_reduce(jnp.ones(3)).block_until_ready()
"""


def test_a_rank_that_holds_the_interpreter_says_itself_where(job: Launch) -> None:
    done = job(2, HELD, env={**MPI_CALLS, **LIMITS})
    assert done.returncode == 70, done.stderr
    text = done.stderr  # of both ranks, in any order
    assert "no answer from rank 1: " in text
    assert "jaxcomm: the native threads of rank 1 of 2 (" in text
    assert re.search(r"^      \w*read \(libc", text, re.MULTILINE), text
    # Python's stack as well: faulthandler writes it so.
    assert re.search(r'script\.py", line \d+ in <module>', text), text


TRANSPORT = """
from mpi4py import MPI
from jaxcomm.ranks.hosts import mpi_library
level = MPI.Query_thread()
if MPI.COMM_WORLD.rank == 0:
    print(mpi_library.describe())
assert MPI.Query_thread() == level
MPI.COMM_WORLD.Barrier()
"""


def vendor() -> str:
    from mpi4py import MPI

    return MPI.get_vendor()[0]


@pytest.mark.parametrize("setting", mixed.SETTINGS)
def test_components_in_use(job: Launch, setting: str) -> None:
    if vendor() != "Open MPI":
        pytest.skip(f"components are Open MPI's; this is {vendor()}")
    done = job(2, TRANSPORT, env=mixed.SETTINGS[setting])
    assert done.returncode == 0, done.stderr
    parts = done.stdout.strip().split("; ")
    assert re.fullmatch(r"Open MPI v\d+\.\d+\.\d+\S*", parts[0])
    assert "pml ob1" in parts
    btl = {"sm": "sm", "tcp": "tcp", "no-cma": "sm"}[setting]
    assert f"btl self, {btl}" in parts
    assert f"OMPI_MCA_btl=self,{btl}" in parts
    assert ("smsc none" in parts) == (setting == "no-cma")


@pytest.mark.thorough  # the next runs it until it hangs
def test_the_mixed_job() -> None:
    attempt = mixed.run("sm", 3, 0, trees=["middle", "small"])
    assert attempt.verdict == mixed.DONE, attempt.text
    calls = attempt.ranks[0]["calls"]
    assert calls == attempt.ranks[1]["calls"]
    for kind in ("jaxcomm", "mpi4jax per leaf", "raw MPI"):
        assert calls[f"{kind}, middle"] >= 2
    assert attempt.ranks[0]["mpi"].startswith("Open MPI")


@pytest.mark.parametrize(
    "hang", [pytest.param("raw MPI", marks=pytest.mark.thorough), "jaxcomm"]
)
def test_the_mixed_job_finds_a_hang(monkeypatch: pytest.MonkeyPatch, hang: str) -> None:
    monkeypatch.setitem(mixed.LIMITS, "JAXCOMM_ABORT_AFTER", "8")
    attempt = mixed.run(
        "tcp",
        30,
        0,
        trees=["middle", "small"],
        hang=hang,
        # The watchdog does not see raw calls.
        stall_seconds=8 if hang == "raw MPI" else 600,
    )
    assert attempt.verdict == mixed.HANG, attempt.text
    assert "btl self, tcp" in attempt.text
    assert "PMPI_Allreduce (libmpi" in attempt.text
    assert "time.sleep" in attempt.text or "mixed_ranks.py" in attempt.text
    assert re.search(r"(?<![\w.])/\w+/\w+/", attempt.text) is None, attempt.text


def test_paths_are_not_kept() -> None:
    text = 'File "/any/where/train.py", line 3; at /usr/lib/libc.so.6+0x3, 1/2'
    kept = 'File "train.py", line 3; at libc.so.6+0x3, 1/2'
    assert mixed.without_paths(text) == kept
