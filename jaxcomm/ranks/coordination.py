"""JAX's coordination service in a process of its own, on the host of rank 0.

In rank 0 itself, where `jax.distributed.initialize` has it, the service would end with
that rank, and JAX would then end all others, with pages of text below the report of
what really happened. This process ends by itself when the last rank has gone.

Run as a file, so that neither jaxcomm nor JAX is imported: that takes longer than all
that it does.
"""

from __future__ import annotations

import importlib
import select
import signal
import sys
import time
from typing import Any

_POLL_SECONDS = 0.05
# Slurm sends what ranks are asked to end by to all processes of a job, and JAX aborts
# the ranks, which are saving their state, when this one has gone.
_FOR_RANKS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


def main() -> None:
    for number in _FOR_RANKS:
        signal.signal(number, signal.SIG_IGN)
    library: Any = importlib.import_module("jaxlib._jax")
    # The parent knows the address when the ranks have met; importing takes longer.
    address, _, ranks = sys.stdin.readline().partition(" ")
    if not ranks:
        return
    # Heartbeats would end ranks that were only stopped: the watchdog decides that.
    service = library.get_distributed_runtime_service(
        address, int(ranks), heartbeat_timeout=10**7, shutdown_timeout=10**7
    )
    print("ready", flush=True)
    select.select([sys.stdin], [], [])  # until rank 0 has ended, or closes it
    while _connected(int(address.rpartition(":")[2])):
        time.sleep(_POLL_SECONDS)
    del service


def _connected(port: int) -> bool:
    import psutil

    return any(
        c.status == psutil.CONN_ESTABLISHED and c.laddr.port == port
        for c in psutil.Process().net_connections("tcp")
    )


if __name__ == "__main__":
    main()
