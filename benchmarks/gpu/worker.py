"""One rank of one section of `benchmarks.gpu`: benchmarks.gpu.worker SECTION OUT.

Writes {"ok": ..., ...} to OUT.<rank>. Variables that sections.py sets: BENCH_TRANSPORT;
BENCH_COORDINATOR, BENCH_RANK and BENCH_RANKS where jax.distributed is to be used;
BENCH_SMALL=1 for small trees and few steps; BENCH_DUMP, a folder; BENCH_WHEN and
BENCH_NETWORK for the sections that ask for them.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Any

TIMEOUT = 15.0  # seconds that jaxcomm waits for ranks that do not come
SMALL = os.environ.get("BENCH_SMALL") == "1"


def connect(timeout: float = TIMEOUT) -> Any:
    """Join the other ranks, and return the communicator."""
    import jax

    import jaxcomm

    if "BENCH_COORDINATOR" in os.environ:
        jax.distributed.initialize(
            os.environ["BENCH_COORDINATOR"],
            int(os.environ["BENCH_RANKS"]),
            int(os.environ["BENCH_RANK"]),
            initialization_timeout=30,
            heartbeat_timeout_seconds=20,
            shutdown_timeout_seconds=20,
        )
    transport = os.environ["BENCH_TRANSPORT"]
    return jaxcomm.init(transport, timeout=timeout, abort_after=timeout)


def main(section: str, out: Path) -> None:
    faulthandler.enable()
    rank = os.environ.get("BENCH_RANK", "0")
    rank = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", rank))
    if section == "graph":
        folder = Path(os.environ["BENCH_DUMP"]) / rank
        flags = f"--xla_dump_to={folder} --xla_dump_hlo_as_text"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    from benchmarks.gpu import checks, graph, times

    if section == "refused":
        found = checks.refused(connect)
    elif section == "steps":
        from benchmarks.gpu import steps

        found = steps.steps(connect())
    else:
        comm = connect(checks.CONFORM_TIMEOUT if section == "conform" else TIMEOUT)
        rank = comm.rank
        works = {
            "exact": checks.exact,
            "mismatch": checks.mismatch,
            "conform": lambda comm: checks.conform(comm, out.with_name("checks")),
            "graph": lambda comm: graph.graph(comm, folder),
            "times": times.times,
            "memory": times.memory,
            "overlap": times.overlap,
        }
        if section == "leave":
            checks.leave(comm, out.with_name(f"{out.name}.{rank}"))
            return
        found = works[section](comm)
    out.with_name(f"{out.name}.{rank}").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
