"""Transport `nccl` without a GPU: what is lowered for one, and every way to fail.

Numbers are checked by test_conformance.py, over tests/native/fake_nccl.cc.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jaxcomm.transports.nccl import library
from tests.jobs import Launch, fake_nccl, on_fake_nccl

pytestmark = pytest.mark.long

LOWERED = """
import re
import jax, jax.numpy as jnp, jaxcomm
from jax import lax
comm = jaxcomm.init("nccl")

@jaxcomm.data_parallel(bucket_bytes=64, donate_argnums=0)
def step(params, x):
    grads = {k: v * v + 1 for k, v in params.items()}
    grads = lax.pmean(grads, "batch")
    rows = lax.all_gather(x, "batch")
    place = lax.axis_index("batch")
    return {k: params[k] - grads[k] for k in params}, rows, place

params = {"a": jnp.ones(16), "b": jnp.ones(16), "c": jnp.ones(3, jnp.int16)}
text = step.trace(params, jnp.ones(4)).lower(lowering_platforms=("cuda",)).as_text()
calls = re.findall(r"custom_call @(\\w+)\\((.*?)\\)", text)
names = [name for name, _ in calls]
assert sorted(names) == ["jaxcomm_nccl_all_reduce"] * 3 + [
    "jaxcomm_nccl_move", "jaxcomm_nccl_rank"], names
# One chain: each call's last operand is the last result of the one before.
lines = [line for line in text.splitlines() if "@jaxcomm_nccl_" in line]
chained = [line for line in lines if "nccl_rank" not in line]
for before, after in zip(chained, chained[1:]):
    result = re.match(r"\\s*(%\\d+):(\\d+) = ", before)
    token = f"{result[1]}#{int(result[2]) - 1}"
    operands = re.search(r"\\((.*?)\\) \\{", after)[1].split(", ")
    assert operands[-1] == token, (token, after)
reduced = [line for line in lines if "all_reduce" in line]
for line in reduced:
    # In place, the token too, and no pointer: the communicator is a number.
    assert line.count("output_operand_alias<") == 2, line
    assert f"comm = {comm.key} : i64" in line, line
    assert "op = 4" in line or "i32" in line, line  # ncclAvg; integers are summed
    assert "has_side_effect = true" in line
places = [int(re.search(r"bucket = (\\d+)", line)[1]) for line in chained]
assert places == [k << 32 | k for k in range(4)], places
# 16-bit integers travel as 32.
assert any("tensor<3xi32>" in line for line in reduced), reduced
assert comm.all_gather_object(text.encode()) == [text.encode()] * comm.size
"""


def test_lowering_for_a_gpu(job: Launch) -> None:
    done = job(2, LOWERED, env=on_fake_nccl(FAKE_NCCL_VERSION="22703"))
    assert done.returncode == 0, done.stderr


PACKED = """
import re
import jax, jax.numpy as jnp, jaxcomm, numpy as np
from jax import lax
comm = jaxcomm.init("nccl")
step = jaxcomm.data_parallel(lambda t: lax.pmean(t, "batch"), groups=1)
# Elements of a leaf just small enough to be packed; one more is not.
large = comm.costs.pack_bytes // 4 // 2 * 2
tree = {"a": jnp.ones((3, 5)), "b": jnp.ones(large + 1), "c": jnp.float32(2),
        "d": jnp.ones((0, 4)), "e": jnp.ones((2, large // 2))}
tree = jax.tree.map(lambda x: x * (1 + comm.rank), tree)
text = step.trace(tree).lower(lowering_platforms=("cuda",)).as_text()
(call,) = [line for line in text.splitlines() if "@jaxcomm_nccl_all" in line]
kinds = re.search(r"\\}? : \\((.*?)\\) ->", call)[1].split(", ")
sizes = [f"tensor<{n}xf32>" for n in (15 + 1 + large, large + 1)]
assert kinds == [*sizes, "tensor<0x4xf32>", "tensor<ui32>"], kinds
for name, got in step(tree).items():
    np.testing.assert_array_equal(got, np.asarray(tree[name]) * 1.5 / (1 + comm.rank))
"""


def test_small_leaves_share_a_collective(job: Launch) -> None:
    done = job(2, PACKED, env=on_fake_nccl())
    assert done.returncode == 0, done.stderr


ALONE = """
import sys
import jax, jax.numpy as jnp, jaxcomm
comm = jaxcomm.init("nccl")
assert comm.size == 1 and "mpi4py" not in sys.modules

@jaxcomm.data_parallel
def step(x):
    total, every = jax.lax.psum(x, "batch"), jax.lax.all_gather(x, "batch")
    nobody = jax.lax.ppermute(x, "batch", [])
    return total, every, jax.lax.ppermute(x, "batch", [(0, 0)]), nobody

assert [leaf.tolist() for leaf in step(jnp.float32(3))] == [3, [3], 3, 0]
# Nothing travels, so XLA is given nothing to call, and no token is a result. One
# collective warmed NCCL up.
assert len(jax.tree.leaves(jax.eval_shape(step._program, jnp.float32(3)))) == 4
assert "jaxcomm_nccl" not in step.lower(jnp.float32(3)).as_text()
assert comm.counters()["nccl_collectives"] == 1
"""


def test_one_rank_needs_no_mpi(job: Launch) -> None:
    done = job(1, ALONE, env=on_fake_nccl())
    assert done.returncode == 0, done.stderr


OTHERS = """
import jax, jax.numpy as jnp, jaxcomm
comm = jaxcomm.init("mpi")
step = jaxcomm.data_parallel(lambda x: jax.lax.psum(x, "batch"))
try:
    step.trace(jnp.ones(3)).lower(lowering_platforms=("cuda",))
except jaxcomm.errors.TransportUnavailableError as error:
    assert "jaxcomm.init('nccl')" in str(error)
else:
    raise AssertionError("lowered")
"""


def test_other_transports_are_not_for_a_gpu(job: Launch) -> None:
    done = job(2, OTHERS)
    assert done.returncode == 0, done.stderr


USED = """
import sys
import jax, jax.numpy as jnp, jaxcomm
comm = jaxcomm.init("nccl", timeout=float(sys.argv[1]))
for k in range(5):
    jax.block_until_ready(jaxcomm.all_reduce(jnp.ones(7 + k), op="sum"))
print("no error", flush=True)
"""


@pytest.mark.parametrize(
    ("call", "result"),
    [
        ("ncclAllReduce", "unhandledCudaError"),
        pytest.param("ncclAllReduce", "invalidUsage", marks=pytest.mark.thorough),
        pytest.param("ncclGroupEnd", "systemError", marks=pytest.mark.thorough),
        pytest.param("ncclGroupEnd", "internalError", marks=pytest.mark.thorough),
        ("ncclGroupEnd", "remoteError"),
    ],
)
def test_an_error_of_nccl_names_itself(job: Launch, call: str, result: str) -> None:
    rule = f"rank=1,call={call},after=3,result={result}"
    env = on_fake_nccl(FAKE_NCCL_INJECT=rule)
    done = job(2, USED, "30", env=env, timeout=150)
    assert done.returncode not in (0, 124), done.stderr
    assert "ncclAllReduce failed on rank 1 of 2" in done.stderr
    assert "injected" in done.stderr
    assert "has been aborted; the job must be started again" in done.stderr


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("rank=0,call=ncclAllReduce,after=3,result=stall", "was not done after 3 s"),
        pytest.param(
            "rank=0,call=ncclGroupEnd,after=3,result=neverDone",
            "not done after 3 s",
            marks=pytest.mark.thorough,
        ),
        (
            "rank=0,call=ncclAllReduce,after=2,result=async:remoteError",
            "failed in the background on rank 0",
        ),
        (
            "rank=1,call=ncclCommInitRankConfig,result=neverDone",
            "ncclCommInitRankConfig was not done after 3 s",
        ),
        (
            "rank=1,call=ncclCommInitRankConfig,result=systemError",
            "ncclCommInitRankConfig failed on rank 1 of 2",
        ),
    ],
)
def test_what_never_ends_is_aborted(job: Launch, rule: str, says: str) -> None:
    slow = USED.replace("for k", "import time\nfor k").replace(
        "    jax.block", "    time.sleep(0.3); jax.block"
    )
    # Up to NCCL 2.22 a collective comes back at once, and only the monitor asks.
    old = "22203" if "async" in rule else "22703"
    env = on_fake_nccl(FAKE_NCCL_INJECT=rule, FAKE_NCCL_VERSION=old)
    done = job(2, slow, "3", env=env, timeout=150)
    assert done.returncode not in (0, 124), done.stdout + done.stderr
    assert says in done.stderr, done.stderr
    if "async" in rule:  # nothing was under way, so the next call raises
        assert done.returncode == 1
        assert "The job must be started again" in done.stderr


RANK = """
import os, time
rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", 0)))
"""

VERSIONS = f"""{RANK}
os.environ["FAKE_NCCL_VERSION"] = "22703" if rank == 0 else "23004"
import jaxcomm
jaxcomm.init("nccl")
"""


def test_ranks_with_different_versions(job: Launch) -> None:
    done = job(2, VERSIONS, env=on_fake_nccl())
    assert done.returncode == 1
    text = "the ranks have different versions of NCCL: NCCL 2.27.3 on ranks 0; NCCL"
    assert text in done.stderr
    assert "2.30.4 on ranks 1" in done.stderr


INIT = "import jaxcomm; jaxcomm.init('nccl'); print('connected')"


@pytest.mark.parametrize(
    ("env", "says"),
    [
        (
            {"JAXCOMM_NCCL_LIBRARY": "/nowhere/libnccl.so.2"},
            ["finds no NCCL (/nowhere"],
        ),
        pytest.param(
            {"FAKE_NCCL_VERSION": "21703"},
            ["2.17.3 (", "is too old"],
            marks=pytest.mark.thorough,
        ),
        ({"JAXCOMM_NCCL_HOST_MEMORY": "0"}, ["JAX runs on 'cpu'"]),
        (
            {"CUDA_VISIBLE_DEVICES": "0", "FAKE_NCCL_VERSION": "22703"},
            ["ranks 0, 1 share GPU-30000000-0000-", "2.27.3 allows one rank per GPU"],
        ),
        (
            {"CUDA_VISIBLE_DEVICES": "0", "FAKE_NCCL_VERSION": "23004"},
            ["2.30.4 allows that only with NCCL_MULTI_RANK_GPU_ENABLE=1"],
        ),
        (
            {"JAXCOMM_NCCL_GRAPHS": "1", "JAXCOMM_CHECK": "every"},
            ["rank 0, 1 of 2: JAXCOMM_CHECK=every", "leave one of them out"],
        ),
    ],
)
def test_what_cannot_be_used_says_why(
    job: Launch, env: dict[str, str], says: list[str]
) -> None:
    done = job(2, INIT, env=on_fake_nccl(**env))
    assert done.returncode == 1
    assert "connected" not in done.stdout
    for text in says:
        assert text in done.stderr


OF_SLURM = f"""{RANK}
import jaxcomm
from jaxcomm.transports.nccl import library
# As jax.distributed under Slurm: every process sees all GPUs, and has the rank's.
library.ordinal = lambda: rank
os.environ["FAKE_NCCL_WANTS_DEVICE"] = str(rank)
comm = jaxcomm.init("nccl")
assert comm.subgroup([1, 0]).size == 2
"""


def test_ranks_that_see_all_gpus_and_have_one_each(job: Launch) -> None:
    done = job(2, OF_SLURM, env=on_fake_nccl(CUDA_VISIBLE_DEVICES="0,1"))
    assert done.returncode == 0, done.stderr


GRAPHS = f"""{RANK}
import re, sys
if sys.argv[1:] == ["one"]:
    os.environ["JAXCOMM_NCCL_GRAPHS"] = "01"[rank == 1]
import jax, jax.numpy as jnp, jaxcomm
from jaxcomm.transports import nccl
nccl.CLOSE_SECONDS = 1000.0  # were the end to wait for graphs
comm = jaxcomm.init("nccl", timeout=120)
assert os.environ["NCCL_GRAPH_REGISTER"] == os.environ["NCCL_RUNTIME_CONNECT"] == "0"
def body(x):
    halves = jax.lax.psum(x, "batch", axis_index_groups=[[0], [1]])
    return jax.lax.psum(x, "batch"), halves, jax.lax.all_gather(x, "batch")
step = jaxcomm.data_parallel(body)
text = step.trace(jnp.ones(4)).lower(lowering_platforms=("cuda",)).as_text()
names = sorted(re.findall(r"custom_call @jaxcomm_nccl_(\\w+)\\(", text))
# What may meet other ranks while it is recorded is not.
assert names == ["all_reduce", "graph_all_reduce", "move"], names
assert float(step(jnp.ones(4))[0][0]) == comm.size
"""


def test_calls_may_be_recorded_into_graphs(job: Launch) -> None:
    """NCCL then ends no communicator: neither the end nor an error may wait for it."""
    env = on_fake_nccl(JAXCOMM_NCCL_GRAPHS="1", FAKE_CUDA_RECORDS="1")
    done = job(2, GRAPHS, env=env, timeout=150)
    assert done.returncode == 0, done.stderr
    rule = "rank=1,call=ncclGroupEnd,after=1,result=remoteError"
    done = job(2, GRAPHS, env={**env, "FAKE_NCCL_INJECT": rule}, timeout=150)
    assert done.returncode not in (0, 124), done.stderr
    assert "rank 1 of 2 failed" in done.stderr
    assert ": remote error" in done.stderr and "has been aborted" in done.stderr


def test_graphs_are_for_all_ranks_or_none(job: Launch) -> None:
    done = job(2, GRAPHS, "one", env=on_fake_nccl())
    assert done.returncode == 1
    assert "JAXCOMM_NCCL_GRAPHS=1 is set on ranks 1 of 2 only" in done.stderr


RUNNING = f"""{RANK}
import sys
# Two records for each collective, the warm-up's too: after 5 the second sum has begun
# on rank 1's GPU and does not end; after 4 it waits for what lies before it.
if rank == 1:
    os.environ["FAKE_CUDA_STOPS"] = sys.argv[1]
import jax, jax.numpy as jnp, jaxcomm
comm = jaxcomm.init("nccl", warn_after=0, abort_after=float(sys.argv[2]))
step = jaxcomm.data_parallel(lambda x: jax.lax.psum(x, "batch"))
for _ in range(int(sys.argv[3])):
    jax.block_until_ready(step(jnp.ones(7)))
    time.sleep(0.1)
print("went on", flush=True)
"""


def test_a_kernel_that_waits_for_ever_ends_the_job(job: Launch) -> None:
    done = job(2, RUNNING, "5", "2", "300", env=on_fake_nccl(), timeout=150)
    assert done.returncode == 70, done.stderr
    text = "bucket 0 began on the GPU and was not done after 2 s on rank 1 of 2"
    assert text in done.stderr
    assert "this process ends" in done.stderr
    assert "went on" not in done.stdout


@pytest.mark.parametrize(
    ("stops", "abort_after"),
    [("4", "1"), pytest.param("5", "0", marks=pytest.mark.thorough)],
)
def test_other_kernels_may_take_their_time(
    job: Launch, stops: str, abort_after: str
) -> None:
    done = job(2, RUNNING, stops, abort_after, "30", env=on_fake_nccl(), timeout=150)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("went on") == 2


def test_an_error_in_the_background_ends_what_is_under_way(job: Launch) -> None:
    rule = "rank=1,call=ncclAllReduce,after=2,result=async:remoteError"
    env = on_fake_nccl(FAKE_NCCL_INJECT=rule, FAKE_NCCL_VERSION="22203")
    done = job(2, RUNNING, "4", "60", "300", env=env, timeout=150)
    assert done.returncode == 70, done.stderr
    assert "NCCL failed in the background on rank 1 of 2: remote error" in done.stderr
    assert "went on" not in done.stdout


def test_ranks_may_share_a_gpu_where_that_is_allowed(job: Launch) -> None:
    env = {"CUDA_VISIBLE_DEVICES": "0", "FAKE_NCCL_VERSION": "23004"}
    env["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    done = job(2, INIT, env=on_fake_nccl(**env))
    assert done.returncode == 0, done.stderr


def test_two_copies_of_nccl(job: Launch, tmp_path: Path) -> None:
    loads = ["import ctypes"]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        copy = tmp_path / folder / "libnccl.so.2"
        shutil.copy(fake_nccl(), copy)
        loads.append(f"ctypes.CDLL({str(copy)!r})")
    done = job(2, "\n".join([*loads, INIT]), env=on_fake_nccl())
    assert done.returncode == 1
    assert "two copies of NCCL are loaded" in done.stderr


MISMATCH = """
import jax.numpy as jnp, jaxcomm
comm = jaxcomm.init("nccl")
try:
    jaxcomm.all_reduce({"w": jnp.ones(4 + comm.rank)})
except jaxcomm.errors.ScheduleMismatchError as error:
    assert "'w'" in str(error) and "float32[5]" in str(error), error
else:
    raise AssertionError("no mismatch")
# Nothing was sent, so everything still works.
assert float(jaxcomm.all_reduce(jnp.ones(3), op="sum")[0]) == comm.size
"""


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_a_mismatch_is_found_before_anything_is_sent(job: Launch, ranks: int) -> None:
    done = job(ranks, MISMATCH, env=on_fake_nccl())
    assert done.returncode == 0, done.stderr


DISTRIBUTED = """
import sys
import jax
port, rank, size, what = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
jax.distributed.initialize(f"127.0.0.1:{port}", size, rank)
import jax.numpy as jnp, numpy as np, jaxcomm
assert "mpi4py" not in sys.modules
comm = jaxcomm.init("nccl", timeout=8 if what == "raise" else 60)
assert (comm.rank, comm.size, comm.local_rank, comm.local_size) == (rank, size) * 2
step = jaxcomm.data_parallel(lambda x: jax.lax.pmean(x, "batch"))
mean = step(jnp.full(3, float(rank)))
np.testing.assert_array_equal(mean, np.full(3, (size - 1) / 2))
back = comm.subgroup(range(size)[::-1])
assert back.rank == size - 1 - rank
assert float(jaxcomm.all_reduce(jnp.ones(2), op="sum", comm=back)[0]) == size
pairs = [[k, k + 1] for k in range(0, size, 2)]
halves = jaxcomm.data_parallel(
    lambda x: jax.lax.psum(x, "batch", axis_index_groups=pairs))
assert float(halves(jnp.float32(rank))) == 4 * (rank // 2) + 1
try:
    jaxcomm.all_reduce({"w": jnp.ones(4 + rank)})
except jaxcomm.errors.ScheduleMismatchError as error:
    assert "float32[5]" in str(error), error
else:
    raise AssertionError("no mismatch")
if what == "raise" and rank == 1:
    raise ValueError("of this rank")
# Orbax must not wait for processes that do not call it.
from jaxcomm import checkpoint
state = {"x": jnp.full(3, float(rank)), "key": jax.random.key(rank), "n": rank}
checkpoint.save(sys.argv[5], 1, state, compare="structure")
found = checkpoint.restore(sys.argv[5], state)
assert found.state["n"] == 0 and not found.state["x"].any()
jaxcomm.assert_replicated(found.state)
assert comm.all_gather_object(("here", rank))[-1] == ("here", size - 1)
"""


def distributed(tmp_path: Path, ranks: int, what: str) -> list[tuple[int, str]]:
    """Run ranks that only jax.distributed connects; exit codes and stderr."""
    script = tmp_path / "script.py"
    script.write_text(DISTRIBUTED)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, script, port, str(rank), str(ranks), what, tmp_path],
            env={**os.environ, **on_fake_nccl(), "JAX_PLATFORMS": "cpu"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    found = []
    try:
        for process in processes:
            _, text = process.communicate(timeout=90)
            found.append((process.returncode, text))
    finally:
        for process in processes:
            process.kill()
    return found


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_ranks_that_jax_distributed_connects(tmp_path: Path, ranks: int) -> None:
    for code, text in distributed(tmp_path, ranks, "run"):
        assert code == 0, text


def test_an_exception_ends_the_others_in_bounded_time(tmp_path: Path) -> None:
    (first, of_first), (second, of_second) = distributed(tmp_path, 2, "raise")
    assert second == 1
    assert "rank 1 of 2 failed" in of_second and "of this rank" in of_second
    assert first != 0, of_first


REFUSED = """
import jaxcomm
try:
    jaxcomm.init("nccl")
except jaxcomm.errors.TransportUnavailableError as error:
    print(error)
"""


def test_without_a_gpu_init_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-c", REFUSED],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "moves arrays of NVIDIA GPUs, but JAX runs on 'cpu'" in done.stdout
    assert "'mpi'" in done.stdout


def test_nccl_version() -> None:
    assert library.version_text(22703) == "2.27.3"
