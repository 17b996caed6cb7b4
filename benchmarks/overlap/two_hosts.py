"""Two hosts on one machine: network namespaces, joined by a wire of limited rate.

Needs root, iproute2 and unshare (util-linux). Each namespace has a host name of its
own, so that MPI sees two hosts and talks TCP between them.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import jobs
from jaxcomm.launch import run as launcher

NAMES = ("jaxcomm-a", "jaxcomm-b")
TOOLS = ("ip", "tc", "unshare", "taskset")
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def missing() -> str:
    """Return what keeps this machine from having two hosts, or ""."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    tools = [name for name in TOOLS if shutil.which(name) is None]
    return f"not installed: {', '.join(tools)} (Debian: iproute2)" if tools else ""


@contextlib.contextmanager
def wire(megabits: float) -> Iterator[None]:
    """Join two new namespaces by a wire of so many megabits a second each way."""
    _remove()
    try:
        for name in NAMES:
            _do(f"ip netns add {name}")
        a, b = NAMES
        _do(f"ip link add wire0 netns {a} type veth peer name wire1 netns {b}")
        for k, name in enumerate(NAMES):
            _do(f"ip -n {name} addr add {ADDRESSES[k]}/24 dev wire{k}")
            _do(f"ip -n {name} link set wire{k} up")
            _do(f"ip -n {name} link set lo up")
            rate = f"rate {megabits}mbit burst 256kb latency 100ms"
            _do(f"ip netns exec {name} tc qdisc add dev wire{k} root tbf {rate}")
        yield
    finally:
        _remove()


def run(command: list[str], *, timeout: float, env: dict[str, str]) -> str:
    """Run a script or `-m module` on one rank a host; return its output.

    Raises:
      RuntimeError: it failed; the text holds its output.
    """
    job = launcher.Job(2, tuple(command))
    added = {**launcher.environment(job), "JAXCOMM_THREADS": "1", **env}
    mpiexec = launcher.find_mpiexec().path
    # Both ranks are their host's first: without this they would share one core.
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        # In place of ssh: the second host's daemon is started in its namespace.
        agent = Path(folder) / "agent"
        inside = f'hostname {NAMES[1]}; shift; exec sh -c "$*"'
        agent.write_text(
            f"#!/bin/sh\nexec taskset -c {cores[1]} ip netns exec {NAMES[1]} "
            f"unshare --uts "
            f'sh -c {shlex.quote(inside)} sh "$@"\n'
        )
        agent.chmod(0o755)
        line = [mpiexec, "-n", "2", "--map-by", "node", "--bind-to", "none"]
        line += ["--host", ",".join(f"{address}:1" for address in ADDRESSES)]
        line += ["--prtemca", "plm_ssh_agent", str(agent)]
        line += ["--mca", "btl", "tcp,self", "--mca", "pml", "ob1"]
        line += ["--mca", "btl_tcp_if_include", "10.77.0.0/24"]
        for name in added:
            line += ["-x", name]
        line += [sys.executable, "-m", "jaxcomm.launch.worker", *command]
        here = ["taskset", "-c", str(cores[0]), "ip", "netns", "exec", NAMES[0]]
        start = f"hostname {NAMES[0]}; exec {shlex.join(line)}"
        done = subprocess.run(
            [*here, "unshare", "--uts", "sh", "-c", start],
            cwd=jobs.ROOT,
            env={**os.environ, **added},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def run_apart(command: list[str], *, timeout: float) -> None:
    """Run a command once a host, without MPI; it finds the other as in jobs.py.

    Raises:
      RuntimeError: it failed; the text holds its output.
    """
    processes = []
    try:
        for rank, name in enumerate(NAMES):
            extra = {
                "BENCH_RANK": str(rank),
                "BENCH_RANKS": str(len(NAMES)),
                "BENCH_COORDINATOR": f"{ADDRESSES[0]}:29400",
                "GLOO_SOCKET_IFNAME": f"wire{rank}",
            }
            processes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", name, *command],
                    cwd=jobs.ROOT,
                    env={**os.environ, **launcher.MALLOC, **extra},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"{command}: exit code {process.returncode}\n{output}")


def _do(line: str) -> None:
    subprocess.run(line.split(), check=True, capture_output=True, text=True)


def _remove() -> None:
    for name in NAMES:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
