"""One rank of a trial: reduces known numbers in a loop, and one rank comes to grief.

mpiexec -n 4 python -m tests.faults.ranks TRIAL.json

Rank r gives, in its k-th call, numbers that say r and k. So every sum is known exactly,
and what does not belong together cannot add up to it. A rank prints "right" when all
its sums were right, and exits with 3 at the first that is not.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import Any

TRIAL = json.loads(sys.argv[1])
BEGAN = time.monotonic()


def act(kind: str) -> None:
    """Do to this process what its trial is about."""
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)


def later(kind: str, seconds: float) -> None:
    """Do it at a moment that falls anywhere: into a call, a compilation, a copy."""

    def wait() -> None:
        time.sleep(seconds)
        act(kind)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    kind, step_of_fault = TRIAL["kind"], TRIAL["step"]
    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0")))
    culprit = rank == TRIAL["culprit"]
    if culprit and step_of_fault < 0:  # while the ranks find each other
        later(kind, TRIAL["offset"])

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax

    import jaxcomm

    comm = jaxcomm.init(TRIAL["transport"], timeout=20)
    rng = np.random.default_rng(TRIAL["seed"])
    shapes = [tuple(rng.integers(1, 60, rng.integers(0, 3))) for _ in range(12)]
    shapes.append((int(rng.integers(1, 300_000)),))
    calls = 0

    @jaxcomm.data_parallel(bucket_bytes=TRIAL["bucket_bytes"])
    def train_step(rank: Any, call: Any) -> Any:
        tree = [jnp.full(shape, rank * 1000 + call) for shape in shapes]
        return lax.psum(tree, "batch")

    @jaxcomm.data_parallel
    def other_step(rank: Any, call: Any) -> Any:
        return lax.pmax(jnp.full((5,), rank * 1000 + call), "batch")

    @jaxcomm.data_parallel
    def odd_step(rank: Any, call: Any) -> Any:
        return lax.psum(jnp.full((6,), rank * 1000 + call), "batch")

    def check(found: Any, wanted: float) -> None:
        for leaf in jax.tree.leaves(found):
            if not (np.asarray(leaf) == wanted).all():
                print(f"wrong: rank {comm.rank}, call {calls}: {leaf}", flush=True)
                os._exit(3)

    def reduce() -> None:
        nonlocal calls
        calls += 1
        found = train_step(jnp.float32(comm.rank), jnp.float32(calls))
        everyone = sum(1000 * r + calls for r in range(comm.size))
        check(found, everyone)

    def largest() -> None:
        nonlocal calls
        calls += 1
        found = other_step(jnp.float32(comm.rank), jnp.float32(calls))
        check(found, 1000 * (comm.size - 1) + calls)

    for step in range(TRIAL["steps"]):
        programs = [reduce, largest]
        if culprit and step == step_of_fault:
            print(f"fault after {time.monotonic() - BEGAN:.3f} s", flush=True)
            if kind in ("kill", "stop"):
                later(kind, TRIAL["offset"])
            elif kind == "delay":
                time.sleep(TRIAL["offset"])
            elif kind == "exception":
                raise RuntimeError(f"injected at step {step}")
            elif kind == "odd":  # a program that nobody else runs now
                odd_step(jnp.float32(0), jnp.float32(0)).block_until_ready()
            elif kind == "skip":
                continue
            elif kind == "swap":
                programs.reverse()
            elif kind == "return":
                break
        for program in programs:
            program()
    print("right", flush=True)


main()
