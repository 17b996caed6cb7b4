"""An error is that of the call that raises it, and says what has happened."""

from __future__ import annotations

import jax
import pytest

from jaxcomm.errors import (
    BrokenCommunicatorError,
    JaxcommError,
    ScheduleMismatchError,
    StallError,
)
from jaxcomm.ranks import agreement
from jaxcomm.ranks import fault as _fault
from tests.jobs import Launch, on_fake_nccl

OLD = """
import jax, jax.numpy as jnp, jaxcomm
from jaxcomm.errors import ScheduleMismatchError
comm = jaxcomm.init()

def raised(call):
    try:
        jax.block_until_ready(call())
    except (jax.errors.JaxRuntimeError, ScheduleMismatchError) as error:
        return error
    raise AssertionError("nothing was raised")

# A refused call in the user's own jit: JAX raises it, and nobody of ours hears of it.
own = jax.jit(lambda x: jaxcomm.all_reduce({"first": x}, op="sum"))
error = raised(lambda: own(jnp.ones(3 + comm.rank)))
assert type(error) is jax.errors.JaxRuntimeError and "['first']" in str(error), error

def failing(x):
    raise ValueError("bad sample file")

@jaxcomm.data_parallel
def step(x):
    y = jax.pure_callback(failing, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
    return jax.lax.pmean(x, "batch"), y

error = raised(lambda: step(jnp.ones(3)))
assert type(error) is jax.errors.JaxRuntimeError, error
assert "bad sample file" in str(error)

# A failure that comes later is raised as what it is.
error = raised(lambda: jaxcomm.all_reduce({"second": jnp.ones(5 + comm.rank)}))
assert type(error) is ScheduleMismatchError and "['second']" in str(error), error
pair = comm.subgroup([1, 0])
third = {"third": jnp.ones(7 + comm.rank)}
error = raised(lambda: jaxcomm.all_reduce(third, comm=pair))
assert type(error) is ScheduleMismatchError and "['third']" in str(error), error
assert float(jaxcomm.all_reduce(jnp.ones(3), op="sum")[0]) == 2
print("told the truth")
"""


def test_an_old_failure_is_not_raised_again(job: Launch) -> None:
    done = job(2, OLD)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("told the truth") == 2


PENDING = """
import jax, jax.numpy as jnp, jaxcomm
comm = jaxcomm.init()
late = jax.jit(
    lambda x: jaxcomm.all_reduce((x @ x).sum() * jnp.ones(3 + comm.rank), op="sum")
)
out = late(jnp.ones((500, 500)))  # fails while we go on
pair = comm.subgroup([1, 0])
assert float(jaxcomm.all_reduce(jnp.ones(3), comm=pair, op="sum")[0]) == 2
try:
    jax.block_until_ready(out)
except jax.errors.JaxRuntimeError as error:
    assert "ScheduleMismatchError" in str(error)
    print("raised where it belongs")
"""


def test_a_subgroup_does_not_raise_what_failed_elsewhere(job: Launch) -> None:
    # With one thread a program runs where it is called, and raises there.
    done = job(2, PENDING, env={"JAXCOMM_THREADS": "2"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("raised where it belongs") == 2


def xla(text: str) -> Exception:
    return jax.errors.JaxRuntimeError(text)


@pytest.mark.parametrize(
    "kind", [ScheduleMismatchError, StallError, BrokenCommunicatorError, JaxcommError]
)
def test_a_refused_call_is_known_by_its_text(kind: type[JaxcommError]) -> None:
    text = "the ranks differ.\n  rank 1: leaf ['w']"
    refused = xla(f"FAILED_PRECONDITION: {kind.__name__}: {text}")
    with pytest.raises(kind) as caught:
        agreement.raise_failure(refused)
    assert type(caught.value) is kind and str(caught.value) == text
    assert caught.value.__cause__ is refused


@pytest.mark.parametrize(
    "text",
    [
        "INTERNAL: CpuCallback error: ValueError: ScheduleMismatchError: an old one",
        "INTERNAL: Error dispatching computation: StallError: of an operand",
        "INTERNAL: jaxcomm: MPI_Allreduce failed",
        "FAILED_PRECONDITION: ValueError: bad",
    ],
)
def test_other_errors_are_left_alone(text: str) -> None:
    agreement.raise_failure(xla(text))


def test_only_the_first_fault_counts() -> None:
    fault, told = _fault.Fault(), []
    fault.listen(told.append)
    fault.check()
    with pytest.raises(StallError), fault.guard():
        raise StallError("rank 1 waited 2 s")
    fault.set(StallError("another"))
    for use in (fault.check, fault.guard().__enter__):
        with pytest.raises(BrokenCommunicatorError) as caught:
            use()
        assert "first: StallError: rank 1 waited 2 s" in str(caught.value)
        assert "Start the job again" in str(caught.value)
    assert len(told) == 1


STALL = """
import sys, time
import jax, jax.numpy as jnp, jaxcomm
from jax import lax
from jaxcomm.errors import BrokenCommunicatorError, StallError
comm = jaxcomm.init(sys.argv[1], timeout=2)
shard = jaxcomm.data_parallel(lambda x: lax.psum(x, "batch"))
own = jax.jit(lambda x: jaxcomm.all_reduce(x, op="sum"))
known = jnp.ones(4)
for call in (shard, own, lambda x: jaxcomm.all_reduce(x, op="sum")):
    assert float(call(known)[0]) == comm.size
own_new = jax.jit(lambda x: jaxcomm.all_reduce(x, op="max"))

late = comm.rank == comm.size - 1
if late:
    time.sleep(5)
try:
    jaxcomm.all_reduce({"a": jnp.ones(3)}, op="sum")
except StallError as error:
    assert "waited 2 s for the other ranks to check a schedule" in str(error), error
    assert "first leaf ['a'] float32[3]" in str(error), error
    if late:
        assert f"rank {comm.rank} of {comm.size} was about to" in str(error), error
        assert "another rank has given up" in str(error), error
else:
    raise AssertionError("a call was made that another rank has given up")

# A message of the call that was given up is still under way: nothing may follow it.
everything = {
    "eager": lambda: jaxcomm.all_reduce(jnp.ones(5), op="sum"),
    "eager, agreed on": lambda: jaxcomm.all_reduce(known, op="sum"),
    "gather": lambda: jaxcomm.all_gather(jnp.ones(5)),
    "gradient": lambda: jax.grad(lambda x: jaxcomm.all_reduce(x).sum())(known),
    "decorated": lambda: jaxcomm.data_parallel(lambda x: lax.pmax(x, "batch"))(known),
    "decorated, agreed on": lambda: shard(known),
    "barrier": comm.barrier,
    "broadcast_object": lambda: comm.broadcast_object(1),
    "all_gather_object": lambda: comm.all_gather_object(1),
    "subgroup": lambda: comm.subgroup([0, comm.size - 1]),
    "assert_replicated": lambda: jaxcomm.assert_replicated(known),
}
for name, call in everything.items():
    start = time.monotonic()
    try:
        call()
    except BrokenCommunicatorError as error:
        assert "first: StallError: rank " in str(error), (name, error)
        assert "Start the job again" in str(error)
    else:
        raise AssertionError(name)
    assert time.monotonic() - start < 2, name  # less than a wait for the others
for call in (own, own_new):
    try:
        jax.block_until_ready(call(known))
    except jax.errors.JaxRuntimeError as error:
        assert "BrokenCommunicatorError: this communicator" in str(error), error
    else:
        raise AssertionError("own jit")
print("refused", len(everything), flush=True)
"""


@pytest.mark.parametrize(
    ("transport", "ranks", "env"),
    [
        pytest.param("mpi", 2, {}, marks=pytest.mark.thorough),
        ("mpi", 3, {"JAXCOMM_SHARED_MEMORY": "off", "JAXCOMM_OWN_THREAD": "on"}),
        pytest.param(
            "mpi",
            2,
            {"MPI4PY_RC_THREAD_LEVEL": "serialized"},
            marks=pytest.mark.thorough,
        ),
        ("nccl", 2, {}),
        pytest.param("mpi4jax", 2, {}, marks=pytest.mark.thorough),
    ],
)
def test_nothing_follows_a_stall(
    job: Launch, transport: str, ranks: int, env: dict[str, str]
) -> None:
    if transport == "nccl":
        env = on_fake_nccl(**env)
    done = job(ranks, STALL, transport, env=env, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("refused 11") == ranks, done.stdout


MEMBER_LATE = """
import time, jaxcomm
import jax.numpy as jnp
from jaxcomm.errors import BrokenCommunicatorError, StallError
comm = jaxcomm.init(timeout=2)
if comm.rank == 1:
    time.sleep(5)
try:
    comm.subgroup([0, 1])
except StallError as error:
    assert "the other ranks to make the subgroup [0, 1]" in str(error), error
else:
    raise AssertionError("a subgroup of one")
for call in (lambda: comm.subgroup([1, 0]), lambda: jaxcomm.all_reduce(jnp.ones(3))):
    try:
        call()
    except BrokenCommunicatorError as error:
        assert "first: StallError: rank " in str(error), error
    else:
        raise AssertionError("went on")
print("refused")
"""


def test_nothing_follows_a_subgroup_that_was_given_up(job: Launch) -> None:
    done = job(2, MEMBER_LATE, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("refused") == 2


STRANGERS = """
import jax, jax.numpy as jnp, jaxcomm
from jax import lax
from jaxcomm.errors import BrokenCommunicatorError, ScheduleMismatchError
# Without the watchdog, which ends such a job.
comm = jaxcomm.init(warn_after=0, abort_after=0)
groups = [list(range(comm.size))] if __import__("sys").argv[1] == "part" else None

def make(op):
    return jaxcomm.data_parallel(
        lambda tree: op(tree, "batch", axis_index_groups=groups)
    )

sums, means = make(lax.psum), make(lax.pmax)
tree = {"weight": jnp.ones(3)}
steps = [sums, means]
for step in steps:
    jax.block_until_ready(step(tree))
if comm.rank == 1:
    steps.reverse()
try:
    for step in steps:
        jax.block_until_ready(step(tree))
except (jax.errors.JaxRuntimeError, ScheduleMismatchError) as error:
    text = str(error)
else:
    raise AssertionError("strangers met")
assert "came to the same call from different places" in text, text
assert "sum of [0]['weight']" in text and "max of [0]['weight']" in text, text
for call in (lambda: sums(tree), lambda: jaxcomm.all_reduce(jnp.ones(4))):
    try:
        call()
    except BrokenCommunicatorError as error:
        assert "first: ScheduleMismatchError: the ranks came" in str(error), error
    else:
        raise AssertionError("went on")
print("named")
"""


@pytest.mark.parametrize("where", ["all", "part"])
def test_ranks_that_met_as_strangers_meet_no_more(job: Launch, where: str) -> None:
    done = job(2, STRANGERS, where)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("named") == 2
