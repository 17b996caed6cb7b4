"""Run random programs on ranks and compare them with what they must compute.

mpiexec -n N python -m tests.fuzz.ranks PROGRAMS REPORT TRANSPORT

Rank 0 writes a line per program as it goes: which one begins, and at its end "ok",
"refused" or "wrong" with the reason.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import jaxcomm
from jaxcomm.errors import JaxcommError
from tests.fuzz import programs


def meaning(comm: Any) -> programs.Meaning:
    """What a program's parts are on this rank."""
    size, rank = comm.size, comm.rank

    def subgroup(groups: list[list[int]]) -> Any:
        return comm.subgroup(next(group for group in groups if rank in group))

    half, pair = subgroup(programs.halves_of(size)), subgroup(programs.pairs_of(size))
    again = comm.subgroup(range(size))

    def over(group: Any) -> Callable[[Any], Any]:
        return lambda x: jaxcomm.all_reduce(x, op="sum", comm=group)

    def step(group: Any) -> Any:
        return jaxcomm.data_parallel(lambda x: lax.psum(x, "batch"), comm=group)

    optimizer = jaxcomm.optax.distribute(optax.sgd(1.0), op="sum")
    state = optimizer.init(jnp.zeros(programs.SIZE))

    def nest(name: str, function: Callable[[Any], Any]) -> Any:
        return jaxcomm.data_parallel(function, axis_name=name, allow_divergent=True)

    calls = {
        "bare": over(None),
        "step": step(None),
        "mean": lambda x: jaxcomm.all_reduce(size * x, op="mean"),
        "optimizer": lambda x: jnp.negative(jnp.asarray(optimizer.update(x, state)[0])),
        "again": over(again),
        "half": over(half),
        "half step": step(half),
        "pair": over(pair),
        "max": lambda x: jaxcomm.all_reduce(lax.stop_gradient(x), op="max"),
        "psum": lax.psum,
    }

    def choose(who: int, own: Any, result: Any) -> Any:
        return own if who == rank else result

    def work(who: int, count: int, x: Any) -> Any:
        """Something to do for one rank alone: in its program, and while it runs."""
        if who != rank:
            return x
        y = jnp.ones((24, 24)) * lax.stop_gradient(x).sum()
        for _ in range(count // 20):
            y = jnp.tanh(y @ y)
        y = lax.fori_loop(0, count, lambda _, z: jnp.tanh(z @ z), y)
        return x + 0 * jnp.nan_to_num(y[0, 0])

    return programs.Meaning(calls, choose, work, nest)


def run(program: dict[str, Any], means: programs.Meaning, comm: Any) -> str:
    """Run a program; return "" or what is wrong."""
    function = programs.build(program["body"], means, "batch")
    if program["owner"] == "jit":
        function = jax.jit(function)
    elif program["owner"] == "decorated":
        function = means.nest("batch", function)
    starts = [
        np.random.default_rng(k).integers(0, 50, (comm.size, programs.SIZE)) * 1.0
        for k in range(program["times"])
    ]
    # One is dispatched after another, as a training loop does.
    found = [function(jnp.asarray(start[comm.rank])) for start in starts]
    for start, result in zip(starts, found, strict=True):
        want = np.asarray(programs.reference(program, jnp.asarray(start)))
        if not np.array_equal(result, want[comm.rank]):
            return f"{np.asarray(result)} instead of {want[comm.rank]}"
    return ""


def main(specs: str, report: str, transport: str) -> None:
    jax.config.update("jax_enable_x64", True)
    comm = jaxcomm.init(transport)
    means = meaning(comm)

    def say(**what: Any) -> None:
        if comm.rank == 0:
            with Path(report).open("a") as file:
                print(json.dumps(what), file=file)

    counted = itertools.count()
    for program in json.loads(Path(specs).read_text()):
        number = next(counted)
        say(program=number, what="begins")
        refused, wrong = "", ""
        try:
            wrong = run(program, means, comm)
        except (JaxcommError, NotImplementedError) as error:
            refused = f"{type(error).__name__}: {error}"
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        # Each rank's own words: that some refuse and others do not is wrong, too.
        every = comm.all_gather_object((refused, wrong))
        bad = [f"rank {r}: {text}" for r, (_, text) in enumerate(every) if text]
        if len({bool(text) for text, _ in every}) > 1:
            bad.append(f"refused by some ranks only: {[text for text, _ in every]}")
        if bad:
            say(program=number, what="wrong", why=bad)
        elif refused:
            say(program=number, what="refused", why=refused)
        else:
            say(program=number, what="ok")


if __name__ == "__main__":
    main(*sys.argv[1:])
