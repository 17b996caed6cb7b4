"""Checks of every dtype, and of 16-bit wires. See conformance.py."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxcomm
from jaxcomm.errors import InvalidOptionError, UnsupportedDtypeError
from jaxcomm.ranks.communicator import Communicator
from tests.programs.references import (
    DTYPES,
    HALVES,
    NUMPY_OPS,
    SHAPES,
    applies,
    close,
    meaningful,
    raises,
    reference,
    same,
    values,
)


def check_all_reduce_against_numpy(comm: Communicator) -> None:
    with jax.enable_x64(True):
        for op in ("mean", *NUMPY_OPS):
            tree = {
                f"{dtype}{shape}": values(comm.rank, shape, dtype)
                for dtype in DTYPES
                for shape in SHAPES
                if meaningful(op, dtype)
                # NCCL multiplies no complex numbers.
                and not (op == "prod" and dtype[0] == "c" and comm.transport == "nccl")
            }
            eager = jaxcomm.all_reduce(tree, op=op)
            jitted = jax.jit(lambda t, op=op: jaxcomm.all_reduce(t, op=op))(tree)
            for name, mine in tree.items():
                parts = [
                    values(r, mine.shape, str(mine.dtype)) for r in range(comm.size)
                ]
                want = reference(op, parts)
                for got in (eager[name], jitted[name]):
                    assert got.dtype == mine.dtype and got.shape == mine.shape, name
                    same(got, want, err_msg=f"{op} {name}")


def check_meaningless_dtypes_are_refused(comm: Communicator) -> None:
    for op, leaf, why in (
        ("sum", jnp.array([True]), r"'flag'.*bool.*op='max'"),
        ("mean", jnp.array([True]), r"'flag'.*bool"),
        ("max", jnp.array([1j]), r"'flag'.*complex64.*no order"),
        ("sum", jnp.array([1], jnp.int4), r"'flag'.*int4.*share bytes"),
    ):
        tree = {"flag": leaf}
        for call in (jaxcomm.all_reduce, jaxcomm.plan):
            raises(
                UnsupportedDtypeError,
                why,
                lambda call=call, tree=tree, op=op: call(tree, op=op),
            )
    nibble = jnp.array([1], jnp.int4)
    raises(UnsupportedDtypeError, "int4", lambda: jaxcomm.broadcast(nibble))


def check_broadcast_of_every_dtype(comm: Communicator) -> None:
    with jax.enable_x64(True):
        for root in range(comm.size):
            tree = {d: values(comm.rank, (5, 3), d) for d in (*DTYPES, "float8_e4m3fn")}
            out = jaxcomm.broadcast(tree, root=root)
            for dtype, leaf in out.items():
                want = values(root, (5, 3), dtype)
                assert leaf.dtype == want.dtype
                same(np.asarray(leaf), want, err_msg=dtype)


def check_min_and_max_do_not_depend_on_the_order(comm: Communicator) -> None:
    applies(comm.size > 1, "one rank has no order")
    applies(comm.transport != "nccl", "NCCL promises nothing about NaN and -0")
    # Rank 0 has NaN where others have numbers, and zeros of the other sign.
    own = [np.nan, 0.0, -0.0, 1.0] if comm.rank == 0 else [1.0, -0.0, 0.0, np.nan]
    with jax.enable_x64(True):
        for dtype in ("float32", "float64", *HALVES):
            x = np.array(own, dtype)
            low = np.asarray(jaxcomm.all_reduce(x, op="min")).astype(np.float64)
            high = np.asarray(jaxcomm.all_reduce(x, op="max")).astype(np.float64)
            for out in (low, high):
                same(np.isnan(out), [True, False, False, True], err_msg=dtype)
            same(np.signbit(low[1:3]), [True, True], err_msg=dtype)
            same(np.signbit(high[1:3]), [False, False], err_msg=dtype)
            jaxcomm.assert_replicated(jaxcomm.all_reduce(x, op="min"))


def check_float16_mean_does_not_overflow(comm: Communicator) -> None:
    for count in (3, 100_000):
        x = jnp.full(count, 60_000, jnp.float16)
        same(jaxcomm.all_reduce(x), np.full(count, 60_000, np.float16))
    x = np.array([60_000, 1e-5], np.float32)
    out = np.asarray(jaxcomm.all_reduce(x, wire_dtype="float16"))
    close(out, x, rtol=2**-9, atol=comm.size * 2.0**-24)


def check_subnormals_survive(comm: Communicator) -> None:
    applies(comm.transport != "mpi4jax", "its reductions run as XLA rounds")
    x = np.array([1e-40, 1e-44], np.float32)
    h = np.full(99, 2.0**-24, np.float16)  # the smallest there is
    out = jaxcomm.all_reduce({"x": x, "h": h}, op="sum")
    total = np.zeros(2, np.float32)
    for _ in range(comm.size):
        total = total + x
    same(np.asarray(out["x"]).view(np.uint32), total.view(np.uint32))
    same(np.asarray(out["h"]), (h.astype(np.float32) * comm.size).astype(np.float16))


def check_wire_dtype(comm: Communicator) -> None:
    n = comm.size

    def tree_of(rank: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([11, rank])
        return {
            "large": rng.normal(size=400_001).astype(np.float32),
            "small": rng.normal(size=(7, 3)).astype(np.float32),
            "count": np.array([rank + 100_001], np.int32),
            "empty": np.zeros(0, np.float32),
        }

    parts = [tree_of(r) for r in range(n)]
    for wire, u in (("bfloat16", 2.0**-8), ("float16", 2.0**-11)):
        for op in ("mean", "sum", "max"):

            def reduce(tree: Any, op: str = op, wire: str = wire) -> Any:
                return jaxcomm.all_reduce(tree, op=op, wire_dtype=wire)

            out = jax.jit(reduce)(tree_of(comm.rank))
            jaxcomm.assert_replicated({k: v for k, v in out.items() if n > 1})
            same(out["count"], reference(op, [p["count"] for p in parts]))
            for name in ("large", "small"):
                stack = np.stack([p[name] for p in parts]).astype(np.float64)
                if op == "max":
                    exact, scale = stack.max(0), abs(stack).max(0)
                else:
                    exact, scale = stack.sum(0), abs(stack).sum(0)
                if op == "mean":
                    exact, scale = exact / n, scale / n
                bound = ((1 + u) ** (n + 1) - 1) * scale
                bound += n * 2.0**-24 if wire == "float16" else 0
                error = abs(np.asarray(out[name], np.float64) - exact)
                assert (error <= bound).all(), (wire, op, name, (error / bound).max())
                if n > 1 and name == "large":
                    assert error.max() > 0  # it did travel in 16 bits
        schedule = jaxcomm.plan(parts[0], wire_dtype=wire)
        floats = 4 * (400_001 + 21)
        assert schedule.nbytes - schedule.wire_nbytes == floats // 2
        step = jaxcomm.data_parallel(lambda x: lax.pmean(x, "batch"), wire_dtype=wire)
        mine = parts[comm.rank]["large"]
        same(step(mine), jaxcomm.all_reduce(mine, wire_dtype=wire))
    leaf = {"w": jnp.ones(3, jnp.bfloat16)}
    same(jaxcomm.all_reduce(leaf, wire_dtype="bfloat16")["w"], np.ones(3))


def check_wire_dtype_is_checked(comm: Communicator) -> None:
    for leaf, wire, why in (
        (jnp.ones(3, jnp.float16), "bfloat16", r"'w'.*float16.*no narrower"),
        (jnp.ones(3, jnp.bfloat16), "float32", r"'w'.*no narrower"),
        (jnp.ones(3), "float32", r"'w'.*float32.*bfloat16, float16"),
        (jnp.ones(3), "int8", "bfloat16, float16"),
        (jnp.ones(3), "brain", "brain.*bfloat16, float16"),
        (jnp.ones(3), 16, "16.*bfloat16, float16"),
    ):
        raises(
            InvalidOptionError,
            why,
            lambda x=leaf, w=wire: jaxcomm.all_reduce(
                {"w": x},
                wire_dtype=w,  # pyright: ignore[reportArgumentType]
            ),
        )
