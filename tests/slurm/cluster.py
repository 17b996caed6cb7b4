"""A Slurm cluster of two nodes on this machine, for tests: needs root.

Each node is a slurmd in network, UTS, process and mount namespaces of its own, so it
has its own address, host name, processes and /dev/shm, as a machine has. The controller
has a third set, from which commands are given. All files are in one temporary folder.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

PROGRAMS = (
    "slurmctld",
    "slurmd",
    "srun",
    "munged",
    "ip",
    "nsenter",
    "setpriv",
    "unshare",
)
NODES = 2
CORES = 4  # each node says it has as many
_NETWORK = "10.79.0."
_MUNGE = Path("/run/munge/munge.socket.2")  # where PMIx looks for it, too

_CONFIGURATION = """
ClusterName=jaxcomm
SlurmctldHost={controller}({network}254)
SlurmUser=root
AuthType=auth/munge
# A job that starts again waits for as long.
AuthInfo=cred_expire=20
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
TmpFS={folder}/%n
# No control groups: not every container may make them.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
KillWait=10
MailProg=/bin/true
NodeName={node}[0-1] NodeAddr={network}[1-2] CPUs={cores} RealMemory=1000
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL PriorityTier=2
"""


def missing() -> str | None:
    """Say what keeps a cluster from running here; None if nothing does."""
    if os.geteuid() != 0:
        return "needs root, for namespaces"
    without = [name for name in PROGRAMS if shutil.which(name) is None]
    if without:
        return f"needs {', '.join(without)}: make test-slurm installs them"
    if "JAXCOMM_TEST_SLURM" not in os.environ:
        return "takes minutes: make test-slurm, or JAXCOMM_TEST_SLURM=1"
    return None


class Cluster:
    """A running cluster.

    Attributes:
      nodes: their names.
      folder: where all its files are, and may be those of jobs.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        mark = secrets.token_hex(2)
        self.controller = f"jsc{mark}"
        self.nodes = [f"js{mark}n{number}" for number in range(NODES)]
        self._environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start everything and wait until the nodes answer."""
        self._connect()
        (self.folder / "state").mkdir()
        munge = self.folder / "munge"
        munge.mkdir()
        (munge / "munge.key").write_bytes(secrets.token_bytes(128))
        (munge / "munge.key").chmod(0o400)
        files = [f"--{x}-file={munge}/munge.{x}" for x in ("key", "pid", "log", "seed")]
        socket = munge / _MUNGE.name
        line = ["munged", "--foreground", "--force", f"--socket={socket}", *files]
        self._start("munged", line)
        _wait_for(socket.exists, "munged")
        configuration = _CONFIGURATION.format(
            controller=self.controller,
            network=_NETWORK,
            folder=self.folder,
            node=self.nodes[0][:-1],
            cores=CORES,
        )
        (self.folder / "slurm.conf").write_text(configuration)
        # The plugin that asks for nothing until control groups are used.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        names = [(self.controller, 254), *zip(self.nodes, range(1, 9), strict=False)]
        lines = ["127.0.0.1 localhost", *(f"{_NETWORK}{k} {name}" for name, k in names)]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        self._start(self.controller, self._inside(self.controller, "slurmctld -D"))
        for node in self.nodes:
            self.start_node(node)

    def start_node(self, node: str) -> None:
        """Start a node, or start it again, and wait until it takes jobs."""
        (self.folder / node).mkdir(exist_ok=True)
        _ip(f"-n {node} link set e0 up")
        self._start(node, self._inside(node, "slurmd -D"))
        _wait_for(lambda: self.state(node) == "idle", f"slurmd on {node}", self.logs)

    def kill_node(self, node: str) -> None:
        """Cut its wire and kill all that runs on it, as a loss of power would."""
        _ip(f"-n {node} link set e0 down")
        self._kill(node)

    def state(self, node: str) -> str:
        """Return what Slurm says of a node: "idle", "down*", ..."""
        done = self.run(["sinfo", "-h", "-N", "-o", "%t", "-n", node])
        return (done.stdout.split() or [""])[0]

    def run(
        self, command: Sequence[str | Path], timeout: float = 60, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the controller's host."""
        process = self.popen(command, **options)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"{command} ran {timeout} s: {out}{err}") from None
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def popen(
        self,
        command: Sequence[str | Path],
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.Popen[str]:
        """Start a command on the controller's host."""
        unshare = self._daemons[self.controller].pid
        first = Path(f"/proc/{unshare}/task/{unshare}/children").read_text().strip()
        enter = ["nsenter", "-t", first, "--net", "--uts", "--mount", "--pid"]
        enter += [f"--wd={cwd or self.folder}", "--", *map(str, command)]
        return subprocess.Popen(
            enter,
            env={**self._environment, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def logs(self) -> str:
        """Return the last lines of every log."""
        found = []
        for path in sorted(self.folder.glob("*.log")):
            found += [f"-- {path.name}", *path.read_text().splitlines()[-15:]]
        return "\n".join(found)

    def stop(self) -> None:
        """End everything and remove the namespaces."""
        for name in reversed(self._daemons):
            self._kill(name)
        for name in (*self.nodes, self.controller):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def _connect(self) -> None:
        bridge = self.controller
        _ip(f"netns add {bridge}")
        _ip(f"-n {bridge} link set lo up")
        _ip(f"-n {bridge} link add br0 type bridge")
        _ip(f"-n {bridge} addr add {_NETWORK}254/24 dev br0")
        _ip(f"-n {bridge} link set br0 up")
        for number, node in enumerate(self.nodes):
            _ip(f"netns add {node}")
            _ip(f"-n {node} link set lo up")
            end = f"peer name p{number} netns {bridge}"
            _ip(f"link add e0 netns {node} type veth {end}")
            _ip(f"-n {bridge} link set p{number} master br0 up")
            _ip(f"-n {node} addr add {_NETWORK}{number + 1}/24 dev e0")

    def _inside(self, name: str, command: str) -> list[str]:
        """Return the command that runs one on a host of the cluster."""
        script = (
            f"hostname {name} && mount --bind {self.folder}/hosts /etc/hosts && "
            f"mount -t tmpfs tmpfs /run && mkdir {_MUNGE.parent} && "
            f"mount --bind {self.folder}/munge {_MUNGE.parent} && "
            # The shell stays, to collect orphans.
            f"mount -t tmpfs tmpfs /dev/shm && {{ {command}; exit $?; }}"
        )
        enter = ["ip", "netns", "exec", name, "unshare", "--uts", "--mount"]
        enter += ["--pid", "--mount-proc", "--kill-child"]
        return [*enter, "sh", "-c", script]

    def _start(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.out.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                # It shall not outlive this process, however that ends.
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _kill(self, name: str) -> None:
        """Kill a host's first process, and with it all that run there."""
        self._daemons[name].kill()
        self._daemons[name].wait()


@contextlib.contextmanager
def running() -> Iterator[Cluster]:
    """Give a cluster, and leave nothing of it behind."""
    folder = Path(tempfile.mkdtemp(prefix="js"))  # sockets' paths must be short
    cluster = Cluster(folder)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
        signal.signal(signal.SIGTERM, previous)


def _ip(line: str) -> None:
    done = subprocess.run(["ip", *line.split()], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {line}: {done.stderr}"


def _wait_for(
    true: Callable[[], bool],
    what: str,
    explain: Callable[[], str] = str,
    seconds: float = 120,
) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{what} is not there\n{explain()}"
        time.sleep(0.1)
