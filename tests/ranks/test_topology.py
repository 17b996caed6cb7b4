"""JAX knows which process of how many a rank is, and what that costs is bounded."""

from __future__ import annotations

import ipaddress
import time

import psutil
import pytest

from jaxcomm.ranks import coordination
from jaxcomm.ranks.topology import shared_address
from tests.jobs import Launch


def _no_service_is_left(mark: str) -> None:
    """Wait until JAX's service of the job with `mark` in its environment has ended."""
    end = time.monotonic() + 20
    while True:
        left = []
        for process in psutil.process_iter(["cmdline", "environ"]):
            command, environ = process.info["cmdline"], process.info["environ"]
            if coordination.__file__ in (command or ()) and environ.get("MARK") == mark:
                left.append(process.pid)
        if not left:
            return
        assert time.monotonic() < end, left
        time.sleep(0.1)


PLACE = """
import jax, jaxcomm
comm = jaxcomm.init()
assert jax.process_index() == comm.rank, jax.process_index()
assert jax.process_count() == comm.size and jax.device_count() == comm.size
assert jax.local_device_count() == 1
assert {d.process_index for d in jax.devices()} == set(range(comm.size))

@jaxcomm.data_parallel
def step(x):
    return jax.lax.pmean(x, "batch")

x = jax.numpy.float32(comm.rank)
assert step(x) == (comm.size - 1) / 2 and jaxcomm.all_reduce(x) == step(x)
"""


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.thorough), 3])
def test_names_are_right(job: Launch, ranks: int) -> None:
    # gRPC would ask a proxy for the ranks' own addresses.
    mark = f"names {ranks}"
    done = job(ranks, PLACE, env={"http_proxy": "http://127.0.0.1:9", "MARK": mark})
    assert done.returncode == 0, done.stderr
    assert "JAX" not in done.stderr
    _no_service_is_left(mark)


@pytest.mark.parametrize(
    "transport", ["mpi4jax", pytest.param("mpi", marks=pytest.mark.thorough)]
)
def test_names_are_right_over(job: Launch, transport: str) -> None:
    done = job(2, PLACE.replace("init()", f"init({transport!r})"))
    assert done.returncode == 0, done.stderr


LISTENERS = """
import ipaddress, jaxcomm, jax, psutil
comm = jaxcomm.init()
comm.barrier()
own = psutil.Process()
for c in [c for p in [own, *own.children()] for c in p.net_connections()]:
    if c.status == psutil.CONN_LISTEN:
        ip = ipaddress.ip_address(c.laddr.ip)
        ip = getattr(ip, "ipv4_mapped", None) or ip
        print("listens", ip, flush=True)
comm.barrier()
"""


def test_one_host_listens_on_the_loopback_alone(job: Launch) -> None:
    done = job(2, LISTENERS)
    assert done.returncode == 0, done.stderr
    found = {line.split()[1] for line in done.stdout.splitlines() if "listens" in line}
    assert found == {"127.0.0.1"}
    done = job(2, LISTENERS, env={"JAXCOMM_DISTRIBUTED": "off"})
    assert done.returncode == 0 and "listens" not in done.stdout, done.stdout


SIGNALLED = """
import signal, time
import psutil
import jaxcomm
comm = jaxcomm.init()
asked = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
if comm.rank == 0:
    children = psutil.Process().children()
    [service] = [c for c in children if "coordination.py" in " ".join(c.cmdline())]
    for number in asked:
        service.send_signal(number)
time.sleep(1)
comm.barrier()
print("saved", flush=True)
"""


def test_what_ranks_are_asked_to_end_by_does_not_end_the_service(job: Launch) -> None:
    done = job(2, SIGNALLED, env={"MARK": "signalled"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved") == 2
    _no_service_is_left("signalled")


ORBAX = """
import sys, pathlib
import jax, jaxcomm, numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
comm = jaxcomm.init()
folder = pathlib.Path(sys.argv[1])
tree = jax.device_get({"w": jax.numpy.arange(4.0)})
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder / "one", tree)
with ocp.CheckpointManager(folder / "many") as manager:
    manager.save(3, args=ocp.args.StandardSave(tree))
    manager.wait_until_finished()
    assert manager.latest_step() == 3
    back = manager.restore(3, args=ocp.args.StandardRestore(tree))
assert (back["w"] == tree["w"]).all()
all_ranks = multihost_utils.process_allgather(np.int32(comm.rank))
assert sorted(all_ranks.ravel()) == list(range(comm.size)), all_ranks
"""


def test_orbax_writes_one_checkpoint(job: Launch, tmp_path) -> None:
    done = job(2, ORBAX, str(tmp_path))
    assert done.returncode == 0, done.stderr


EARLY = """
import jax
import jaxcomm
jax.numpy.zeros(())
comm = jaxcomm.init()
assert jax.process_count() == 1

@jaxcomm.data_parallel
def step(x):
    return jax.lax.pmean(x, "batch")

step(jax.numpy.float32(1))
step(jax.numpy.ones(2))
"""


def test_a_backend_that_came_first_is_named_once(job: Launch) -> None:
    done = job(2, EARLY)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("already running on rank 0") == 1
    assert "call jaxcomm.init() before the first use" in done.stderr
    assert done.stderr.count("This job has 2 ranks, and JAX believes to be alone") == 1
    assert "process_index()" in done.stderr


@pytest.mark.parametrize(
    "how", [pytest.param("argument", marks=pytest.mark.thorough), "variable"]
)
def test_off_leaves_jax_alone(job: Launch, how: str) -> None:
    script, env = EARLY.replace("jax.numpy.zeros(())\n", ""), {}
    if how == "argument":
        script = script.replace("init()", "init(distributed=False)")
    else:
        env["JAXCOMM_DISTRIBUTED"] = "off"
    done = job(2, script, env=env)
    assert done.returncode == 0, done.stderr
    assert "does not know its place" not in done.stderr
    assert done.stderr.count("JAX believes to be alone") == 1


def test_bad_modes_are_refused(job: Launch) -> None:
    done = job(2, "import jaxcomm; jaxcomm.init(distributed=1.5)")
    assert done.returncode == 1
    assert "init(distributed=...): 1.5; give True" in done.stderr
    done = job(2, "import jaxcomm; jaxcomm.init()", env={"JAXCOMM_DISTRIBUTED": "yes"})
    assert done.returncode == 1
    assert "JAXCOMM_DISTRIBUTED: 'yes'; give True ('on')" in done.stderr
    differ = """
import os, jaxcomm
jaxcomm.init(distributed=os.environ["OMPI_COMM_WORLD_RANK"] == "0")
"""
    done = job(2, differ)
    assert done.returncode == 1
    assert "differs between ranks: ['on', 'off']" in done.stderr
    twice = "import jaxcomm; jaxcomm.init(); jaxcomm.init(distributed=False)"
    done = job(2, twice)
    assert done.returncode == 1
    assert "init(distributed=False), but this process already uses True" in done.stderr


OWN = """
import os, socket, jax
from mpi4py import MPI
world = MPI.COMM_WORLD
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    address = world.bcast(f"127.0.0.1:{s.getsockname()[1]}")
number = NUMBER
jax.distributed.initialize(
    address, 2, number, cluster_detection_method="deactivate",
    coordinator_bind_address=address,
)
import jaxcomm
comm = jaxcomm.init()
print(comm.rank, jax.process_index())
jaxcomm.barrier()
"""


def test_an_own_jax_distributed_is_kept(job: Launch) -> None:
    done = job(2, OWN.replace("NUMBER", "world.rank"))
    assert done.returncode == 0, done.stderr
    assert "place" not in done.stderr
    assert sorted(done.stdout.split()) == ["0", "0", "1", "1"]


def test_other_numbers_are_named(job: Launch) -> None:
    done = job(2, OWN.replace("NUMBER", "1 - world.rank"))
    assert done.returncode == 0, done.stderr
    assert "rank 0 is process 1 of 2 there" in done.stderr


DIES = """
import os, signal, sys, time, jaxcomm
comm = jaxcomm.init()
comm.barrier()
if comm.rank == int(sys.argv[1]):
    os.kill(os.getpid(), int(sys.argv[2]))
time.sleep(60)
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_death_ends_the_job_and_no_other_report_hides_it(
    job: Launch, rank: int
) -> None:
    mark = f"death {rank}"
    done = job(2, DIES, str(rank), "9", env={"MARK": mark})
    assert done.returncode == 137, done.stderr
    assert f"process rank {rank} with PID" in done.stderr
    assert "JAX distributed service" not in done.stderr
    _no_service_is_left(mark)


FAILS = """
import jaxcomm, time
comm = jaxcomm.init()
comm.barrier()
if comm.rank == 0:
    raise ValueError("the disk is on fire")
time.sleep(60)
"""


def test_where_rank_0_fails_its_report_is_all(job: Launch) -> None:
    done = job(2, FAILS)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("ValueError: the disk is on fire")
    assert "oordination" not in done.stderr


def test_sigterm_still_ends_a_rank(job: Launch) -> None:
    done = job(2, DIES, "1", "15")
    assert done.returncode == 143, done.stderr


LATE = """
import sys, time, jaxcomm
comm = jaxcomm.init()
if comm.rank == 1:
    time.sleep(4)
"""


def test_ranks_may_end_at_different_times(job: Launch) -> None:
    done = job(2, LATE, env={"JAXCOMM_ABORT_AFTER": "30"})
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr


def test_the_address_that_most_hosts_share() -> None:
    lone = ["172.17.0.1/16"]
    assert shared_address([[*lone, "10.0.0.1/24"], ["10.0.0.2/24"]]) == "10.0.0.1"
    three = [
        ["192.168.5.1/24", "10.0.0.1/24"],
        ["192.168.5.2/24", "10.0.0.2/24"],
        ["10.0.0.3/24"],
    ]
    assert shared_address(three) == "10.0.0.1"
    # What no other host has is better than nothing: routes may lead there.
    assert shared_address([lone, ["10.0.0.2/24"]]) == "172.17.0.1"
    assert ipaddress.ip_address(shared_address([[], []]))
