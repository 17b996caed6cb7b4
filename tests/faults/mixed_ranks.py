"""One rank of a mixed job: reduces by jaxcomm's MPI calls, mpi4jax and raw MPI in turn.

mpiexec -n 2 python -m tests.faults.mixed_ranks JOB.json

Every sum is compared with the exact one. Rank r writes rank-r.json to the job's folder
as it goes on: calls by kind, and how they ended. Should nothing move for long, every
rank writes where its threads are to stall-r.txt, and the job ends.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import mpi4jax
import numpy as np
from mpi4py import MPI

import jaxcomm
from jaxcomm import native
from jaxcomm.ranks.hosts import mpi_library
from jaxcomm.simulate import networks

STALLED, WRONG = 71, 3
SEGMENT_BYTES = 2 << 20  # as benchmarks/reduction/worker.py cuts its raw calls

Tree = dict[str, Any]
Way = Callable[[Tree, Any], Tree]

JOB = json.loads(sys.argv[1])
FOLDER = Path(JOB["folder"])


class Record:
    """What this rank has done; kept in a file, for the case that it ends in a hang."""

    def __init__(self, rank: int):
        self.path = FOLDER / f"rank-{rank}.json"
        self.stall = FOLDER / f"stall-{rank}.txt"
        self.calls: Counter[str] = Counter()
        self.iterations, self.seconds = 0, 0.0
        self.wrong: list[str] = []
        self.doing = ""
        self.moved = self.written = time.monotonic()
        threading.Thread(target=self._watch, daemon=True).start()

    def done(self, kind: str) -> None:
        self.calls[kind] += 1
        self.moved = time.monotonic()
        if self.moved > self.written + 1:
            self.write("runs")

    def write(self, state: str) -> None:
        self.written = time.monotonic()
        found = {
            "state": state,
            "iterations": self.iterations,
            "seconds": round(self.seconds, 1),
            "calls": self.calls,
            "wrong": self.wrong,
            "doing": self.doing,
            "mpi": mpi_library.describe(),
        }
        draft = self.path.with_suffix(".draft")
        draft.write_text(json.dumps(found))
        draft.replace(self.path)

    def _watch(self) -> None:
        """End the job where nothing moves; raw calls and mpi4jax's have no watchdog."""
        limit = JOB["stall_seconds"]
        while time.monotonic() < self.moved + limit:
            time.sleep(1)
        self.write("stalled")
        with self.stall.open("w") as file:
            file.write(f"no progress for {limit:.0f} s in {self.doing}\n")
            file.write(f"MPI: {mpi_library.describe()}\nPython:\n")
            file.flush()
            faulthandler.dump_traceback(file)
            file.write(f"native threads:\n{native.stacks()}")
        time.sleep(10)  # the other rank writes its own
        MPI.COMM_WORLD.Abort(STALLED)


def trees(rank: int) -> dict[str, Tree]:
    """Return the trees by name: whole numbers that depend on element and rank."""
    shapes = {
        "resnet50": [s for _, s in networks.shapes(networks.resnet50()).items()],
        "small": [(3,), (), (64, 7), (1000,)],
        "many": [(256,)] * 60,
        "middle": [(300, 700), (5,), (1 << 20,), (17, 3)],
    }

    def leaf(shape: tuple[int, ...]) -> Any:
        numbers = np.arange(int(np.prod(shape)), dtype=np.int64) % 61 * (rank + 1)
        return jnp.asarray(numbers.reshape(shape), jnp.float32)

    return {
        name: {f"leaf{index:03}": leaf(shape) for index, shape in enumerate(found)}
        for name, found in shapes.items()
        if name in JOB["trees"]
    }


def ways() -> dict[str, Way]:
    """Return functions that give the sum over ranks of tree * factor."""

    def scaled(tree: Tree, factor: Any) -> Tree:
        return jax.tree.map(lambda leaf: leaf * factor, tree)

    def ours(**options: Any) -> Way:
        return jaxcomm.data_parallel(
            lambda tree, factor: jaxcomm.all_reduce(
                scaled(tree, factor), op="sum", **options
            )
        )

    def per_leaf(tree: Tree, factor: Any) -> Tree:
        return jax.tree.map(
            lambda leaf: mpi4jax.allreduce(leaf, op=MPI.SUM), scaled(tree, factor)
        )

    def concatenated(tree: Tree, factor: Any) -> Tree:
        leaves, treedef = jax.tree.flatten(scaled(tree, factor))
        flat = jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])
        flat = mpi4jax.allreduce(flat, op=MPI.SUM)
        ends = np.cumsum([leaf.size for leaf in leaves])
        parts = jnp.split(flat, ends[:-1])
        shaped = [p.reshape(x.shape) for p, x in zip(parts, leaves, strict=True)]
        return jax.tree.unflatten(treedef, shaped)

    def raw(tree: Tree, factor: Any) -> Tree:
        sums = {}
        for name, leaf in tree.items():
            flat = (np.asarray(leaf) * np.float32(factor)).ravel()
            step = SEGMENT_BYTES // flat.itemsize
            for start in range(0, len(flat), step):
                segment = flat[start : start + step]
                MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, segment, MPI.SUM)
            sums[name] = flat.reshape(leaf.shape)
        return sums

    step = ours()

    def beside(tree: Tree, factor: Any) -> Tree:
        # One of XLA's threads is in MPI while this one is.
        found = step(tree, factor)
        raw(dict(list(tree.items())[:4]), factor)
        return found

    return {
        "jaxcomm": step,
        "jaxcomm, buckets of 1 MiB": ours(bucket_bytes=1 << 20),
        "jaxcomm, bare in jit": jax.jit(
            lambda tree, factor: jaxcomm.all_reduce(scaled(tree, factor), op="sum")
        ),
        "mpi4jax per leaf": jax.jit(per_leaf),
        "mpi4jax concatenated": jax.jit(concatenated),
        "raw MPI": raw,
        "jaxcomm beside raw MPI": beside,
    }


def main() -> None:
    comm = jaxcomm.init("mpi")
    record = Record(comm.rank)
    record.write("starts")
    everywhere = sum(range(1, comm.size + 1))
    made, known = trees(comm.rank), ways()
    # All ranks' leaves are this rank's times one number, so each sum is known exactly.
    rng = random.Random(JOB["seed"])  # the same on every rank
    order = [(tree, way) for tree in made for way in known]

    def reduce(tree: str, way: str, factor: int) -> None:
        record.doing = f"{way} of {tree}, call {sum(record.calls.values()) + 1}"
        if way == JOB["hang"] and comm.rank == 1 and record.iterations > 0:
            time.sleep(3600)
        found = jax.block_until_ready(known[way](made[tree], np.float32(factor)))
        for name, leaf in made[tree].items():
            share = everywhere * factor / (comm.rank + 1)
            if not (np.asarray(found[name]) == np.asarray(leaf) * share).all():
                record.wrong.append(f"{record.doing}: {name}")
                record.write("wrong")
                os._exit(WRONG)
        record.done(f"{way}, {tree}")

    for tree, way in order:  # compiles, for which ranks need unequal times
        reduce(tree, way, 1)
        comm.barrier()
    start = time.monotonic()
    while not comm.broadcast_object(time.monotonic() > start + JOB["seconds"]):
        # The large tree in turn by all, as in the job that hung; the small in between.
        for way in rng.sample(list(known), len(known)):
            if rng.random() < 0.5:
                record.doing = "a barrier"
                comm.barrier()
            reduce(JOB["trees"][0], way, rng.randint(1, 500))
            for _ in range(rng.randint(0, 100)):
                tree = rng.choice(JOB["trees"][1:])
                reduce(tree, rng.choice(list(known)), rng.randint(1, 500))
        record.iterations += 1
        record.seconds = time.monotonic() - start
    record.write("done")


main()
