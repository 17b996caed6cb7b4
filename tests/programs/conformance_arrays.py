"""Checks of collectives that move arrays, and of subgroups. See conformance.py."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxcomm
from jaxcomm.errors import (
    InvalidOptionError,
    UnsupportedCollectiveError,
    UnsupportedDtypeError,
)
from jaxcomm.ranks.communicator import Communicator
from tests.programs.references import DTYPES, applies, close, raises, same, values


def check_all_gather_against_numpy(comm: Communicator) -> None:
    with jax.enable_x64(True):
        for shape in ((), (3,), (2, 5), (0, 4)):
            tree = {d: values(comm.rank, shape, d) for d in (*DTYPES, "float8_e4m3fn")}
            stacked = jaxcomm.all_gather(tree)
            last = jax.jit(lambda t: jaxcomm.all_gather(t, axis=-1))(tree)
            tiled = jaxcomm.all_gather(tree, axis=0, tiled=True) if shape else None
            for dtype, leaf in tree.items():
                parts = [values(r, shape, dtype) for r in range(comm.size)]
                assert stacked[dtype].dtype == leaf.dtype
                same(np.asarray(stacked[dtype]), np.stack(parts), err_msg=dtype)
                same(np.asarray(last[dtype]), np.stack(parts, -1), err_msg=dtype)
                if tiled:
                    want = np.concatenate(parts)
                    same(np.asarray(tiled[dtype]), want, err_msg=dtype)


def check_reduce_scatter_against_numpy(comm: Communicator) -> None:
    n = comm.size
    with jax.enable_x64(True):
        tree = {d: values(comm.rank, (3 * n, 5), d) for d in DTYPES if d != "bool"}
        summed = jaxcomm.reduce_scatter(tree, op="sum", tiled=True)
        means = jax.jit(lambda t: jaxcomm.reduce_scatter(t, tiled=True))(tree)
        for dtype, x in tree.items():
            wide = np.complex128 if dtype.startswith("c") else np.float64
            parts = [values(r, x.shape, dtype).astype(wide) for r in range(n)]
            total = np.sum(parts, axis=0)
            mine = total[3 * comm.rank : 3 * (comm.rank + 1)]
            out, mean = summed[dtype], means[dtype]
            assert out.dtype == x.dtype
            same(np.asarray(out).astype(wide), mine, err_msg=dtype)
            want = mine / n
            if "int" in dtype:
                want = np.trunc(want)
            close(np.asarray(mean).astype(wide), want, rtol=1e-2, err_msg=dtype)
        rows = np.arange(4.0 * n).reshape(4, n)
        out = jaxcomm.reduce_scatter(rows, op="sum", axis=1)
        same(out, n * rows[:, comm.rank])
    # More than the staging buffer holds, in parts.
    large = np.arange(n * 3_000_000, dtype=np.float32).reshape(n, -1) % 1000
    same(jaxcomm.reduce_scatter(large, op="sum"), n * large[comm.rank])


def check_all_to_all_against_numpy(comm: Communicator) -> None:
    n = comm.size
    for dtype in ("float32", "int8", "bfloat16", "bool"):
        parts = [values(r, (2 * n, 3), dtype) for r in range(n)]
        x = parts[comm.rank]
        rows = slice(2 * comm.rank, 2 * comm.rank + 2)
        out = jaxcomm.all_to_all(x, split_axis=0, concat_axis=1, tiled=True)
        want = np.concatenate([part[rows] for part in parts], axis=1)
        same(np.asarray(out), want, err_msg=dtype)
        parts = [values(r, (4, n), dtype) for r in range(n)]
        swap = jax.jit(lambda v: jaxcomm.all_to_all(v, split_axis=1, concat_axis=0))
        want = np.stack([part[:, comm.rank] for part in parts])
        same(np.asarray(swap(parts[comm.rank])), want, err_msg=dtype)


def check_typed_keys_travel(comm: Communicator) -> None:
    every = [jax.random.split(jax.random.key(r), comm.size) for r in range(comm.size)]
    words = [np.asarray(jax.random.key_data(keys)) for keys in every]
    mine = every[comm.rank]
    gathered = jaxcomm.all_gather({"key": mine}, axis=1)["key"]
    assert jax.random.key_impl(gathered) == jax.random.key_impl(mine)
    same(np.asarray(jax.random.key_data(gathered)), np.stack(words, axis=1))
    swapped = jax.jit(jaxcomm.all_to_all)(mine)
    want = np.stack([words[r][comm.rank] for r in range(comm.size)])
    same(np.asarray(jax.random.key_data(swapped)), want)
    raises(UnsupportedDtypeError, "key", lambda: jaxcomm.reduce_scatter(mine))

    @jaxcomm.data_parallel
    def step(keys: Any) -> Any:  # which jax.pmap itself does not lower
        around = [(r, (r + 1) % comm.size) for r in range(comm.size)]
        return (
            lax.all_gather(keys, "batch", axis=1),
            lax.ppermute(keys, "batch", around),
            lax.all_to_all(keys, "batch", 0, 0),
        )

    found = [np.asarray(jax.random.key_data(keys)) for keys in step(mine)]
    for got, expected in zip(
        found, (np.stack(words, axis=1), words[comm.rank - 1], want), strict=True
    ):
        same(got, expected)


def check_barrier_waits_for_the_last(comm: Communicator) -> None:
    @jax.jit
    def step(x: Any) -> Any:
        jaxcomm.barrier()
        return 2 * x

    @jaxcomm.data_parallel
    def decorated(x: Any) -> Any:
        jaxcomm.barrier()
        return 2 * x

    x = jnp.ones(2)
    folder = comm.broadcast_object(tempfile.mkdtemp() if comm.rank == 0 else None)
    for number, wait in enumerate((jaxcomm.barrier, step, decorated)):
        here = () if wait is jaxcomm.barrier else (x,)
        # Compiled, and its schedule compared: what follows is the barrier alone.
        jax.block_until_ready(wait(*here))
        comm.all_gather_object("all are here")
        late = Path(folder, f"late {number}")
        if comm.rank == comm.size - 1:
            time.sleep(0.7)  # others, if they do not wait, look long before
            late.touch()
        out = jax.block_until_ready(wait(*here))
        jax.effects_barrier()
        assert late.exists(), (number, "went on without the last rank")
        if here:
            same(out, [2, 2])
    comm.all_gather_object("all have looked")
    if comm.rank == 0:
        shutil.rmtree(folder)


def check_array_collectives_refuse(comm: Communicator) -> None:
    n, x = comm.size, {"w": jnp.ones((3, comm.size + 1))}
    for match, call in (
        (r"'w'.*axis=5", lambda: jaxcomm.all_gather(x, axis=5)),
        (r"axis='a'", lambda: jaxcomm.all_gather(x, axis="a")),  # type: ignore[arg-type]
        (r"'w'.*length", lambda: jaxcomm.reduce_scatter(x, axis=1)),
        (r"'min'", lambda: jaxcomm.reduce_scatter(x, op="min")),
        (r"'w'.*length", lambda: jaxcomm.all_to_all(x, split_axis=1)),
        (r"concat_axis=3", lambda: jaxcomm.all_to_all(jnp.ones((n, 1)), concat_axis=3)),
    ):
        raises(InvalidOptionError, match, call)
    if n > 1:
        odd = {"w": jnp.ones(n + 1)}
        raises(
            InvalidOptionError,
            r"'w'.*cannot be divided among",
            lambda: jaxcomm.reduce_scatter(odd, tiled=True),
        )
    flags = {"w": jnp.ones(n, bool)}
    raises(UnsupportedDtypeError, "bool", lambda: jaxcomm.reduce_scatter(flags))


def check_derivatives_of_array_collectives(comm: Communicator) -> None:
    n, rank = comm.size, comm.rank
    x = jnp.arange(2.0 * n) + rank

    def gathered(v: Any) -> Any:
        weights = jnp.arange(1.0, 1 + 2 * n * n).reshape(n, 2 * n)
        return jnp.sum(weights * (1 + rank) * jaxcomm.all_gather(v))

    # Of every rank's loss, the part that this rank's data are in.
    weights = np.arange(1.0, 1 + 2 * n * n).reshape(n, 2 * n)[rank]
    want = weights * sum(1 + r for r in range(n))
    close(jax.jit(jax.grad(gathered))(x), want)
    close(jax.grad(gathered)(x), want)

    def scattered(v: Any) -> Any:
        return (1 + rank) * jnp.sum(jaxcomm.reduce_scatter(v, op="sum", tiled=True))

    close(jax.grad(scattered)(x), np.repeat(1.0 + np.arange(n), 2))

    def exchanged(v: Any) -> Any:
        return (1 + rank) * jnp.sum(jaxcomm.all_to_all(v, tiled=True))

    close(jax.grad(exchanged)(x), np.repeat(1.0 + np.arange(n), 2))


def check_decorated_functions_can_be_mapped_and_differentiated(
    comm: Communicator,
) -> None:
    n, rank = comm.size, comm.rank

    @jaxcomm.data_parallel
    def step(x: Any) -> Any:
        every = lax.all_gather(x, "batch", tiled=True)
        part = lax.psum_scatter(every, "batch", tiled=True)
        ring = [(k, (k + 1) % n) for k in range(n)]
        return lax.ppermute(part, "batch", ring) + lax.all_to_all(
            every.reshape(n, -1), "batch", 0, 0, tiled=True
        ).sum(0)

    rows = jnp.arange(6.0).reshape(2, 3) + 10 * rank
    want = jnp.stack([step(row) for row in rows])
    close(jax.vmap(step)(rows), want)
    close(jax.vmap(step, in_axes=1, out_axes=1)(rows.T), want.T)
    grad = jax.grad(lambda v: jnp.sum(step(v)))(rows[0])
    # Linear, and each rank's part comes back n times by sum and n times by exchange.
    total = comm.all_gather_object(float(grad.sum()))
    close(sum(total), sum(comm.all_gather_object(float(jnp.sum(step(jnp.ones(3)))))))


def check_permutations_differentiated_from_outside(comm: Communicator) -> None:
    n, rank = comm.size, comm.rank
    weights = 1.0 + np.arange(n) ** 2

    @jaxcomm.data_parallel
    def around(x: Any) -> Any:
        # To one side only, so that from three ranks on the way back is another way.
        return lax.ppermute(x, "batch", [(k, (k + 1) % n) for k in range(n)])

    @jaxcomm.data_parallel
    def along(x: Any) -> Any:
        return lax.ppermute(x, "batch", [(k, k + 1) for k in range(n - 1)])

    @jaxcomm.data_parallel
    def weighted(x: Any) -> Any:
        own = jnp.asarray(weights)[lax.axis_index("batch")]
        return own * lax.ppermute(x * own, "batch", [(k, k - 1) for k in range(1, n)])

    x = jnp.arange(3.0)
    # What comes back is the weight of the rank that it was sent to.
    for step, to in ((around, (rank + 1) % n), (along, rank + 1), (weighted, rank - 1)):
        own = weights[rank] if step is weighted else 1.0
        back = weights[to] if 0 <= to < n else 0.0
        outer = 1.0 if step is weighted else weights[rank]
        for wrap in (lambda f: f, jax.jit):
            grad = wrap(jax.grad(lambda v, f=step, w=outer: jnp.sum(w * f(v))))(x)
            same(grad, np.full(3, own * back), err_msg=f"rank {rank}")
    _, pull = jax.vjp(around, x)
    same(pull(x + 10 * rank)[0], x + 10 * ((rank + 1) % n))


def check_subgroups_of_an_axis(comm: Communicator) -> None:
    applies(comm.size == 4, "two groups of two make four ranks")
    pairs = [[0, 3], [2, 1]]

    @jaxcomm.data_parallel
    def step(x: Any) -> Any:
        own = lax.psum(x, "batch", axis_index_groups=pairs)
        return (
            own,
            lax.psum(own, "batch"),
            # Divided by the axis, not by the group: no mean.
            lax.psum(x, "batch", axis_index_groups=pairs) / 4,
            lax.all_gather(x, "batch", axis_index_groups=pairs),
        )

    x = jnp.full(70_000, 1.0 + comm.rank)
    other = {0: 3, 3: 0, 1: 2, 2: 1}[comm.rank]
    for _ in range(3):
        own, all_, quarter, every = step(x)
        same(own, np.full(70_000, 2.0 + comm.rank + other))
        same(all_, np.full(70_000, 2 * (1.0 + 2 + 3 + 4)))
        same(quarter, np.asarray(own) / 4)
        pair = next(p for p in pairs if comm.rank in p)
        same(every[:, 0], [1.0 + r for r in pair])


def check_bare_collectives_in_branches_that_may_differ(comm: Communicator) -> None:
    applies(comm.size > 1, "one rank does not differ from others")

    @jaxcomm.data_parallel
    def step(x: Any) -> Any:
        return lax.cond(x[0] > 0, jaxcomm.all_reduce, lambda v: v, x)

    raises(UnsupportedCollectiveError, "cond.*differ", lambda: step(jnp.ones(3)))
