"""Blocks of steps that all ranks run at once, or one rank while the other sleeps.

Needs nothing but the standard library, so that all peers' workers take turns alike.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

RANKS = 2
WARM_UP = 1
TOGETHER, ALONE = "plain step, both at once", "plain step, one alone"

Barrier = Callable[[], None]
Block = Callable[[], None]


def seconds_of(
    blocks: dict[str, Block],
    rank: int,
    repeats: int,
    folder: Path,
    barrier: Barrier,
    *,
    one_alone: bool = True,
) -> dict[str, list[float]]:
    """Time blocks in turn; all ranks call it together.

    Args:
      blocks: by name; that of `TOGETHER` is also run on one rank at a time, which gives
        a sample of `ALONE` on the rank that runs.
      rank: this process's.
      repeats: samples of each, after `WARM_UP` that do not count.
      folder: on a disk of this host, where the ranks find each other.
      barrier: waits for the other rank.
      one_alone: whether `ALONE` is measured, for which there must be two ranks.

    Returns:
      This rank's seconds by name, one for each repeat.
    """
    pipes = [folder / f"turn.{turn}" for turn in range(RANKS if one_alone else 0)]
    if rank == 0:
        for pipe in pipes:
            os.mkfifo(pipe)
    samples: dict[str, list[float]] = {name: [] for name in blocks}
    if one_alone:
        samples[ALONE] = []

    def together(name: str) -> float:
        barrier()
        return timed(blocks[name])

    def alone() -> float:
        found = 0.0
        for turn in range(RANKS):
            barrier()
            if rank == turn:
                found = timed(blocks[TOGETHER])
                # Wakes the other. A barrier of MPI would keep its core busy meanwhile.
                pipes[turn].open("wb").close()
            else:
                with pipes[turn].open("rb") as pipe:
                    pipe.read()
        return found

    names = list(samples)
    for repeat in range(WARM_UP + repeats):
        # Another one is first each time: what went before may matter.
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            seconds = alone() if name == ALONE else together(name)
            if repeat >= WARM_UP:
                samples[name].append(seconds)
    return samples


def timed(block: Block) -> float:
    """Seconds that a block takes."""
    start = time.perf_counter()
    block()
    return time.perf_counter() - start
