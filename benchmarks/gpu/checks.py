"""Sections of worker.py about correctness: numbers, mismatch, ranks that leave."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxcomm
from benchmarks.gpu import sections
from jaxcomm.errors import (
    JaxcommError,
    ScheduleMismatchError,
    UnsupportedDtypeError,
)
from jaxcomm.ranks.communicator import Communicator
from tests.programs import conformance, references

SMALL = os.environ.get("BENCH_SMALL") == "1"
# What conformance.py itself asks of `init`.
CONFORM_TIMEOUT = conformance.SECONDS_PER_CHECK / 2
OPS = ("mean", "sum", "min", "max", "prod")
DTYPES = ("float32", "bfloat16", "int32") if SMALL else references.DTYPES


def exact(comm: Communicator) -> dict[str, Any]:
    """Compare every op of every dtype, and the other collectives, with NumPy."""
    reductions: dict[str, dict[str, str]] = {}
    with jax.enable_x64(True):
        for op in OPS:
            reductions[op] = {
                dtype: _reduction(comm, op, dtype)
                for dtype in DTYPES
                if references.meaningful(op, dtype)
            }
    others = {
        name: _attempt(lambda check=check: check(comm))
        for name, check in (
            ("broadcast", _broadcast),
            ("array collectives", _arrays),
            ("decorated", _decorated),
            ("wire dtype", _wire),
        )
    }
    texts = [text for row in reductions.values() for text in row.values()]
    ok = all(text.startswith(("ok", "refused")) for text in (*texts, *others.values()))
    return {
        "ok": ok and reductions["mean"]["float32"] == "ok",
        "reductions": reductions,
        "others": others,
        "counters": comm.counters(),
        "platform": jax.default_backend(),
        "kind": jax.local_devices()[0].device_kind,
    }


def _reduction(comm: Communicator, op: str, dtype: str) -> str:
    shapes = references.SHAPES
    mine = {str(s): references.values(comm.rank, s, dtype) for s in shapes}

    def check() -> None:
        step = jax.jit(lambda tree: jaxcomm.all_reduce(tree, op=op))
        for got in (step(mine), step(mine)):
            for shape in shapes:
                parts = [
                    references.values(rank, shape, dtype) for rank in range(comm.size)
                ]
                want = references.reference(op, parts)
                assert got[str(shape)].dtype == want.dtype
                references.same(got[str(shape)], want, err_msg=str(shape))

    return _attempt(check)


def _attempt(check: Callable[[], None]) -> str:
    try:
        check()
    except UnsupportedDtypeError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:600]
    return "ok"


def _broadcast(comm: Communicator) -> None:
    for root in range(comm.size):
        for dtype in DTYPES:
            got = jaxcomm.broadcast(
                references.values(comm.rank, (5, 7), dtype), root=root
            )
            references.same(got, references.values(root, (5, 7), got.dtype.name))


def _arrays(comm: Communicator) -> None:
    n = comm.size
    parts = [
        references.values(r, (4 * n, 3), "float32").astype("float32") for r in range(n)
    ]
    x = jnp.asarray(parts[comm.rank])
    references.same(jaxcomm.all_gather(x), np.stack(parts))
    mine = slice(4 * comm.rank, 4 * comm.rank + 4)
    summed = jaxcomm.data_parallel(
        lambda x: lax.psum_scatter(x, "batch", scatter_dimension=0, tiled=True)
    )(x)
    references.same(summed, np.sum(parts, axis=0)[mine])
    swapped = jaxcomm.data_parallel(
        lambda x: lax.all_to_all(x, "batch", 0, 0, tiled=True)
    )
    references.same(swapped(x), np.concatenate([part[mine] for part in parts]))


def _decorated(comm: Communicator) -> None:
    @jaxcomm.data_parallel
    def step(x: Any) -> Any:
        total = lax.psum(x, "batch")
        return total, lax.pmax(total * lax.axis_index("batch"), "batch")

    x = jnp.arange(1000.0) + comm.rank
    total, largest = step(x)
    want = sum(np.arange(1000.0) + rank for rank in range(comm.size))
    references.same(total, want)
    references.same(largest, want * (comm.size - 1))


def _wire(comm: Communicator) -> None:
    parts = [np.random.default_rng(r).normal(size=9999) for r in range(comm.size)]
    for wire, unit in (("bfloat16", 2.0**-8), ("float16", 2.0**-11)):
        mine = jnp.asarray(parts[comm.rank], jnp.float32)
        got = jaxcomm.all_reduce(mine, op="sum", wire_dtype=wire)
        bound = (1 + unit) ** (comm.size + 1) - 1
        limit = bound * sum(np.abs(part) for part in parts) + comm.size * 2.0**-24
        assert (np.abs(np.asarray(got) - sum(parts)) <= limit).all(), wire


def mismatch(comm: Communicator) -> dict[str, Any]:
    """Let the ranks' trees differ: each must say so, and go on working."""
    tree = {"kernel": jnp.ones((3, 4 + comm.rank)), "bias": jnp.ones(2)}
    start = time.monotonic()
    try:
        jax.block_until_ready(jaxcomm.all_reduce(tree))
        text = "no error"
    except ScheduleMismatchError as error:
        text = str(error)
    seconds = time.monotonic() - start
    after = float(jaxcomm.all_reduce(jnp.float32(comm.rank), op="sum"))
    want = comm.size * (comm.size - 1) / 2
    ok = "kernel" in text and after == want and seconds < 30
    return {"ok": ok, "error": text, "seconds": seconds, "sum after": after}


def leave(comm: Communicator, out: Path) -> None:
    """Let the last rank end without a word; the others must end with an error.

    Over NCCL the monitor may end the process; then nothing is written.

    It leaves before a schedule was compared, or (BENCH_WHEN=after) afterwards, so that
    the others are already inside the collective. What they say is written to `out`,
    since the way out of the process may add more.
    """
    step = jaxcomm.data_parallel(lambda x: lax.psum(x, "batch"))
    x = jnp.ones(1 << 20)
    if os.environ["BENCH_WHEN"] == "after":
        x = jax.block_until_ready(step(x))
    comm.barrier()
    if comm.rank == comm.size - 1:
        os._exit(sections.LEFT)
    start = time.monotonic()
    found: dict[str, Any] = {"ok": False, "error": "a sum without a rank came back"}
    try:
        jax.block_until_ready(step(x))
    except Exception as error:
        found = {"ok": True, "error": f"{type(error).__name__}: {error}"[:1500]}
        raise
    finally:
        found["seconds"] = time.monotonic() - start
        out.write_text(json.dumps(found))


def refused(connect: Callable[[], Communicator]) -> dict[str, Any]:
    """Without NCCL_MULTI_RANK_GPU_ENABLE, two ranks on one GPU must be told of it."""
    start = time.monotonic()
    try:
        connect()
        text = "no error"
    except JaxcommError as error:
        text = str(error)
    seconds = time.monotonic() - start
    ok = "NCCL_MULTI_RANK_GPU_ENABLE" in text
    return {"ok": ok, "error": text, "seconds": seconds}


def conform(comm: Communicator, results: Path) -> dict[str, Any]:
    """Run what every transport must do: tests/programs/conformance.py."""
    conformance.main(str(results), comm.transport)
    comm.barrier()
    found = json.loads(results.read_text())
    said = {name: text for name, text in found.items() if text}
    failed = {
        name: text[-1500:]
        for name, text in said.items()
        if not text.startswith(conformance.SKIPPED)
    }
    return {
        "ok": not failed,
        "passed": len(found) - len(said),
        "skipped": len(said) - len(failed),
        "failed": failed,
    }
