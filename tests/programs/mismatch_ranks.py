"""Ranks that do not do the same, one of them at a time: every rank must hear of it.

mpiexec -n 4 python -m tests.programs.mismatch_ranks TRANSPORT

All cases run in one job, each with another culprit. A case in which all ranks come to
compare raises on all of them, within seconds, and the next case goes on.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxcomm
from jaxcomm.errors import ScheduleMismatchError
from jaxcomm.ranks import agreement
from jaxcomm.ranks.communicator import Communicator


def tree(**changed: Any) -> dict[str, Any]:
    shapes = {"bias": (3,), "kernel": (4, 3), "scale": (5,)}
    return {name: jnp.ones(shape) for name, shape in shapes.items()} | changed


def cases(comm: Communicator) -> dict[str, tuple[str, Callable[[bool], Any]]]:
    """Return by name what the error says, and what the culprit does otherwise."""
    reduce = jaxcomm.all_reduce

    def order(odd: bool) -> Any:
        # A dictionary's leaves are sorted; a list's are not.
        leaves = [jnp.ones(3), jnp.ones(4)]
        return reduce(leaves[::-1] if odd else leaves)

    def groups(odd: bool) -> Any:
        halves = [[0], list(range(1, comm.size))]
        whole = [list(range(comm.size))]

        @jaxcomm.data_parallel
        def step(x: Any) -> Any:
            return lax.psum(x, "batch", axis_index_groups=halves if odd else whole)

        return step(jnp.ones(7))

    def version(odd: bool) -> Any:
        text = "jaxcomm 0.0.1, jax 0.10.2" if odd else agreement.versions()
        with mock.patch.object(agreement, "versions", return_value=text):
            return reduce(jnp.ones(21))

    def another_first(odd: bool) -> Any:
        f = jax.jit(lambda x: reduce(x, op="max"))
        g = jax.jit(lambda x: reduce(x, op="min"))
        return [step(jnp.ones(22)) for step in ((g, f) if odd else (f, g))]

    def retraced(odd: bool) -> Any:
        # What was agreed on is of no use to a rank that comes with another shape.
        step = jaxcomm.data_parallel(lambda x: lax.psum(x, "batch"))
        return step(jnp.ones(24 if odd else 23))

    def member(odd: bool) -> Any:
        others = list(range(comm.size))
        return comm.subgroup(others[::-1] if odd else others)

    wires = ["bfloat16", "float16"]
    return {
        "shape": ("kernel", lambda odd: reduce(tree(kernel=jnp.ones((4, 3 + odd))))),
        "dtype": (
            "int32",
            lambda odd: reduce(tree(scale=jnp.ones(5, "int32" if odd else "float32"))),
        ),
        "a leaf more": (
            r"\['zero'\]",
            lambda odd: reduce(tree(**({"zero": jnp.ones(1)} if odd else {}))),
        ),
        "a leaf fewer": (
            r"\['last'\]",
            lambda odd: reduce(tree(**({} if odd else {"last": jnp.ones(1)}))),
        ),
        "leaf order": (r"float32\[3\]", order),
        "op": ("op", lambda odd: reduce(jnp.ones(8), op="sum" if odd else "max")),
        "groups": ("groups|op|bucket", groups),
        "bucket size": (
            "bucket",
            lambda odd: reduce(tree(a=jnp.ones(999)), bucket_bytes=1024 << odd),
        ),
        "wire dtype": (
            "wire",
            lambda odd: reduce(jnp.ones(9), wire_dtype=wires[odd]),
        ),
        "root": ("root", lambda odd: jaxcomm.broadcast(jnp.ones(10), root=int(odd))),
        "version": (r"jaxcomm 0\.0\.1", version),
        "another function first": ("op", another_first),
        "retraced alone": (r"float32\[2[34]\]", retraced),
        "subgroup members": ("different subgroups", member),
    }


def main(transport: str) -> None:
    comm = jaxcomm.init(transport)
    for number, (name, (text, run)) in enumerate(cases(comm).items()):
        culprit = number % comm.size
        comm.barrier()
        try:
            jax.block_until_ready(run(comm.rank == culprit))
        except (ScheduleMismatchError, jax.errors.JaxRuntimeError) as error:
            message = str(error)
        else:
            raise AssertionError(f"{name}: rank {comm.rank} saw nothing")
        assert re.search(text, message), (name, message)
        assert "ScheduleMismatchError" in message or "rank" in message, message
        # All tell the same story, and in it who the culprit is.
        told = comm.all_gather_object(message)
        if name != "subgroup members":  # of which each hears from those beside it
            assert len(set(told)) == 1
        if comm.size > 2 and name != "subgroup members":
            assert f"  rank {culprit}: " in message, (name, culprit, message)
    # Nothing was sent, so the communicator is as good as new.
    total = jaxcomm.all_reduce(jnp.ones(3), op="sum")
    np.testing.assert_array_equal(total, np.full(3, comm.size))
    if comm.rank == 0:
        print(f"{number + 1} cases")


if __name__ == "__main__":
    main(sys.argv[1])
