"""Several hosts on one machine: network namespaces on a bridge, with ranks on each.

Every namespace has a host name of its own, so that MPI sees hosts and talks TCP between
them. Needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxcomm.launch import run as launcher
from tests.jobs import ROOT

NETWORK = "10.79.0"
TOOLS = ("ip", "unshare")


def missing() -> str:
    """Return what keeps this machine from having several hosts, or ""."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [name for name in TOOLS if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


class Hosts:
    """Namespaces, numbered from 0, with addresses on one network."""

    def __init__(self, count: int):
        # Two jobs at a time do not meet.
        self.names = [f"jaxcomm-{os.getpid()}-{k}" for k in range(count)]
        self.switch = f"jaxcomm-{os.getpid()}-switch"

    def make(self) -> None:
        """Create them; what fails raises CalledProcessError."""
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self.switch, "link", "set", "bridge", "up")
        for k, name in enumerate(self.names):
            port = f"port{k}"
            _ip("netns", "add", name)
            line = f"link add wire netns {name} type veth peer name {port} netns"
            _ip(*line.split(), self.switch)
            _ip("-n", self.switch, "link", "set", port, "master", "bridge", "up")
            _ip("-n", name, "addr", "add", f"{NETWORK}.{k + 1}/24", "dev", "wire")
            _ip("-n", name, "link", "set", "wire", "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def remove(self) -> None:
        for name in [*self.names, self.switch]:
            subprocess.run(
                ["ip", "netns", "del", name], capture_output=True, check=False
            )

    def sent(self) -> list[int]:
        """Return how many bytes have left each host, headers included."""
        path = "/sys/class/net/wire/statistics/tx_bytes"
        # sysfs shows the namespace it was mounted in: `ip netns exec` mounts it anew.
        return [
            int(subprocess.check_output(["ip", "netns", "exec", name, "cat", path]))
            for name in self.names
        ]

    def launch(
        self,
        ranks: Sequence[int],
        command: Sequence[str | Path],
        *,
        timeout: float,
        env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a script or `-m module` on so many ranks of each host.

        Its standard output and error come in one text.
        """
        total = sum(ranks)
        job = launcher.Job(total, tuple(map(str, command)))
        added = {**launcher.environment(job), "JAXCOMM_PROFILE": "off", **(env or {})}
        places = [f"{NETWORK}.{k + 1}:{n}" for k, n in enumerate(ranks)]
        with tempfile.TemporaryDirectory() as folder:
            # In place of ssh: a host's daemon is started in its namespace.
            agent = Path(folder) / "agent"
            cases = "".join(
                f"{NETWORK}.{k + 1}) name={name};;\n"
                for k, name in enumerate(self.names)
            )
            agent.write_text(
                f'#!/bin/sh\ncase "$1" in\n{cases}esac\nshift\n'
                "exec ip netns exec $name unshare --uts "
                'sh -c "hostname $name; exec sh -c \\"\\$*\\"" sh "$@"\n'
            )
            agent.chmod(0o755)
            line = [launcher.find_mpiexec().path, "-n", str(total), "--map-by", "slot"]
            line += ["--bind-to", "none", "--host", ",".join(places)]
            line += ["--prtemca", "plm_ssh_agent", str(agent)]
            line += ["--mca", "pml", "ob1", "--mca", "btl", "tcp,self,sm"]
            line += ["--mca", "btl_tcp_if_include", f"{NETWORK}.0/24"]
            for name in added:
                line += ["-x", name]
            line += [sys.executable, "-m", "jaxcomm.launch.worker", *job.command]
            inside = f"hostname {self.names[0]}; exec {shlex.join(line)}"
            within = f"timeout {timeout} ip netns exec {self.names[0]} unshare --uts"
            return subprocess.run(
                [*within.split(), "sh", "-c", inside],
                cwd=ROOT,
                env={**os.environ, **added},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )


@contextlib.contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """Make so many hosts, and remove them at the end."""
    made = Hosts(count)
    try:
        made.make()
        yield made
    finally:
        made.remove()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
