"""One rank of a test of the fake NCCL: `fake_nccl_ranks.py LIBRARY ID RANK RANKS CASE`.

Drives the library over ctypes and compares with NumPy.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.native.nccl_library import (
    ARGUMENT,
    CUDA,
    DTYPES,
    IN_PROGRESS,
    INTERNAL,
    REMOTE,
    SUCCESS,
    SYSTEM,
    UNDEFINED,
    USAGE,
    Comm,
    UniqueId,
    dtype_of,
    init,
    load,
)

OPS = ["sum", "prod", "max", "min", "avg"]
BIG = 1_000_003


def numbers(name: str, n: int, rank: int) -> np.ndarray:
    rng = np.random.default_rng(1000 * rank + n % 1000)
    dtype = dtype_of(name)
    if dtype.kind in "iu":
        low, high = (-9, 10) if dtype.kind == "i" else (0, 200)
        return rng.integers(low, high, n).astype(dtype)
    return rng.standard_normal(n).astype(dtype)


def reduced(op: str, parts: list[np.ndarray], factors: list[np.ndarray]) -> np.ndarray:
    """Return what all ranks should get, combined in the order of the ranks."""
    dtype = parts[0].dtype
    wide = np.dtype(np.float32) if dtype.itemsize == 2 else dtype
    combine: dict[str, Callable[..., Any]]
    combine = {"prod": np.multiply, "max": np.maximum, "min": np.minimum}
    total: Any = None
    for part, factor in zip(parts, factors, strict=True):
        x = part.astype(wide)
        if op == "premulsum":
            x = x * factor.astype(wide)
        total = x if total is None else combine.get(op, np.add)(total, x)
    if op == "avg" and dtype.kind in "iu":
        n = len(parts)
        total = (
            np.sign(total) * (np.abs(total) // n) if dtype.kind == "i" else total // n
        )
    elif op == "avg":
        total = total / wide.type(len(parts))
    return total.astype(dtype)


def same(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))


def case_reductions(comm: Comm) -> None:
    for name in DTYPES:
        for op in [*OPS, "premulsum"]:
            sizes = (0, 1, 1000, BIG) if op == "sum" else (50_001,)
            for n in sizes:
                check_reduction(comm, name, op, n)


def check_reduction(comm: Comm, name: str, op: str, n: int) -> None:
    ranks, me = range(comm.size), comm.rank
    factors = [np.array([p + 2], dtype_of(name)) for p in ranks]
    number = OPS.index(op) if op in OPS else comm.pre_mul_sum(factors[me])
    parts = [numbers(name, n, p) for p in ranks]
    want = reduced(op, parts, factors)
    out = np.zeros_like(want)
    assert comm.all_reduce(parts[me], out, number) == SUCCESS
    same(out, want)
    inplace = parts[me].copy()
    assert comm.all_reduce(inplace, inplace, number) == SUCCESS
    same(inplace, want)
    m = n // comm.size
    mine = slice(me * m, (me + 1) * m)
    source = parts[me][: m * comm.size].copy()
    out = np.zeros_like(want[:m])
    assert comm.reduce_scatter(source, out, number) == SUCCESS
    same(out, want[mine])
    assert comm.reduce_scatter(source, source[mine], number) == SUCCESS
    same(source[mine], want[mine])
    if op == "premulsum":
        assert comm.lib.ncclRedOpDestroy(number, comm.handle) == SUCCESS
        assert comm.all_reduce(out, out, number) == ARGUMENT
        # A factor in the device's memory counts as it is when the collective runs.
        factor = np.zeros_like(factors[me])
        number = comm.pre_mul_sum(factor, residence=0)
        factor[:] = factors[me]
        assert comm.all_reduce(parts[me], inplace, number) == SUCCESS
        same(inplace, want)


def case_movement(comm: Comm) -> None:
    for name, n in (
        ("int8", 0),
        ("float64", 1),
        ("bfloat16", BIG),
        ("float32", 70_001),
    ):
        parts = [numbers(name, n, p) for p in range(comm.size)]
        mine = parts[comm.rank]
        for root in range(comm.size):
            out = np.zeros_like(mine)
            assert comm.broadcast(mine, out, root) == SUCCESS
            same(out, parts[root])
            out = mine.copy()
            assert comm.broadcast(out, out, root) == SUCCESS
            same(out, parts[root])
        want = np.concatenate(parts)
        out = np.zeros_like(want)
        assert comm.all_gather(mine, out) == SUCCESS
        same(out, want)
        out[:] = 0
        own = out[comm.rank * n : (comm.rank + 1) * n]
        own[:] = mine
        assert comm.all_gather(own, out) == SUCCESS
        same(out, want)


def case_messages(comm: Comm) -> None:
    lib, me, size = comm.lib, comm.rank, comm.size

    def message(a: int, b: int, n: int) -> np.ndarray:
        return numbers("int32", n, 10 * a + b)

    # All to all, itself included, in an order that differs from rank to rank.
    for n in (0, 1, 100_003):
        calls = [(kind, p) for kind in ("send", "recv") for p in range(size)]
        calls = [calls[k] for k in np.random.default_rng(me).permutation(len(calls))]
        sent = [message(me, p, n) for p in range(size)]
        got = [np.zeros(n, np.int32) for p in range(size)]
        assert lib.ncclGroupStart() == SUCCESS
        for kind, p in calls:
            call = comm.send(sent[p], p) if kind == "send" else comm.recv(got[p], p)
            assert call == SUCCESS
        assert lib.ncclGroupEnd() == SUCCESS
        for p in range(size):
            same(got[p], message(p, me, n))
    # A ring, several messages to the same rank, and a collective among them.
    n, right, left = 30_000, (me + 1) % size, (me - 1) % size
    sent = [message(me, k, n + k) for k in range(3)]
    got = [np.zeros(n + k, np.int32) for k in range(3)]
    total = np.ones(5, np.float32)
    lib.ncclGroupStart()
    for k in range(3):
        comm.send(sent[k], right)
        if k == 1 + me % 2:
            comm.all_reduce(total, total)
        comm.recv(got[k], left)
    assert lib.ncclGroupEnd() == SUCCESS
    for k in range(3):
        same(got[k], message(left, k, n + k))
    same(total, np.full(5, size, np.float32))
    # Outside a group one call runs at a time.
    x = np.arange(BIG)
    if me == 0:
        assert comm.send(x, 1) == SUCCESS
    elif me == 1:
        y = np.zeros_like(x)
        assert comm.recv(y, 0) == SUCCESS
        same(x, y)


def case_groups(comm: Comm) -> None:
    lib = comm.lib
    x, y = np.ones(1000, np.float32), np.ones(3, np.int64)
    assert lib.ncclGroupStart() == SUCCESS
    assert comm.all_reduce(x, x) == SUCCESS
    assert lib.ncclGroupStart() == SUCCESS
    assert comm.all_reduce(y, y) == SUCCESS
    assert lib.ncclGroupEnd() == SUCCESS
    assert x[0] == 1 and y[0] == 1  # only queued
    assert lib.ncclGroupEnd() == SUCCESS
    assert x[-1] == comm.size and y[-1] == comm.size
    # A bad call spoils its group.
    assert lib.ncclGroupStart() == SUCCESS
    assert comm.all_reduce(x, x) == SUCCESS
    assert comm.all_reduce(x, x, 77) == ARGUMENT
    assert lib.ncclGroupEnd() == ARGUMENT
    assert "no such operation" in comm.last_error()
    assert x[0] == comm.size
    assert lib.ncclGroupEnd() == USAGE and "not in a group" in comm.last_error()
    assert comm.broadcast(x, x, comm.size) == ARGUMENT
    assert comm.all_reduce(x, x) == SUCCESS


def case_split(comm: Comm) -> None:
    me, size = comm.rank, comm.size
    part = comm.split(me % 2, -me)  # even and odd ranks, backwards
    assert part is not None
    members = [p for p in range(size) if p % 2 == me % 2][::-1]
    assert (part.rank, part.size) == (members.index(me), len(members))
    x = np.array([me], np.int32)
    out = np.zeros(part.size, np.int32)
    assert part.all_gather(x, out) == SUCCESS
    assert out.tolist() == members
    none = comm.split(-1 if me == 0 else 5, 0)
    assert (none is None) == (me == 0)
    if none:
        assert none.size == size - 1 and none.rank == me - 1
        assert none.all_reduce(x, x) == SUCCESS
        assert x[0] == size * (size - 1) // 2
        assert none.destroy() == SUCCESS
    # A part of a part, and all of them in one group.
    again = part.split(0, 0)
    assert again is not None and again.rank == part.rank
    ones = [np.ones(100, np.float32) for _ in range(3)]
    comm.lib.ncclGroupStart()
    for c, one in zip((comm, part, again), ones, strict=True):
        c.all_reduce(one, one)
    assert comm.lib.ncclGroupEnd() == SUCCESS
    assert [one[0] for one in ones] == [size, part.size, part.size]
    for c in (again, part):
        assert c.lib.ncclCommFinalize(c.handle) == SUCCESS
        assert c.all_reduce(x, x) == USAGE
        assert c.destroy() == SUCCESS
    assert part.all_reduce(x, x) == ARGUMENT


def case_nonblocking(comm: Comm) -> None:
    """`comm` is nonblocking, so its calls are in progress when they return.

    Before 2.23 they are done then, but the second rank's are injected not to be.
    """
    lib = comm.lib
    version = ctypes.c_int()
    assert lib.ncclGetVersion(ctypes.byref(version)) == SUCCESS
    usual = IN_PROGRESS if version.value >= 22304 else SUCCESS
    x = np.ones(BIG, np.float32)
    assert comm.all_reduce(x[:0], x[:0]) == SUCCESS
    lib.ncclGroupStart()
    assert comm.all_reduce(x, x) == SUCCESS
    assert lib.ncclGroupEnd() == (IN_PROGRESS if comm.rank == 1 else usual)
    assert comm.wait() == SUCCESS
    assert (x == comm.size).all()
    # The first rank keeps this one waiting.
    if comm.rank == 1:
        assert comm.all_reduce(x, x) == IN_PROGRESS
        assert comm.state() == IN_PROGRESS
        assert comm.all_reduce(x, x) == ARGUMENT
        assert "in progress" in comm.last_error()
        assert comm.destroy() == ARGUMENT
    else:
        time.sleep(0.2)
        assert comm.all_reduce(x, x) == usual
    assert comm.wait() == SUCCESS
    assert (x == comm.size**2).all()
    part = ctypes.c_void_p(1)
    out = ctypes.byref(part)
    # As NCCL's: success, while its thread is at it.
    assert lib.ncclCommSplit(comm.handle, 0, -comm.rank, out, None) == SUCCESS
    assert comm.wait() == SUCCESS
    other = Comm(lib, part, comm.size - 1 - comm.rank, comm.size)
    assert other.state() == SUCCESS
    assert other.all_reduce(x, x) == usual
    assert other.wait() == SUCCESS
    assert lib.ncclCommFinalize(other.handle) == IN_PROGRESS
    assert other.wait() == SUCCESS
    assert other.destroy() == SUCCESS


def aborted_call(comm: Comm, call: Callable[[], int], hang: float = 0.15) -> None:
    """Check that a call hangs until another thread aborts the communicator."""
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join(hang)
    assert thread.is_alive() and not results
    assert comm.abort() == SUCCESS
    thread.join(5)
    assert results == [INTERNAL], results
    assert "aborted" in comm.last_error()
    assert comm.all_reduce(np.ones(1), np.ones(1)) == ARGUMENT


def case_stall(comm: Comm) -> None:
    """The last rank's second all-reduce is injected to stall: so do all others'."""
    x = np.ones(100_000)
    assert comm.all_reduce(x, x) == SUCCESS
    aborted_call(comm, lambda: comm.all_reduce(x, x))


def case_never_done(comm: Comm) -> None:
    """`comm` is nonblocking: there is no call to end, but the work goes on."""
    x = np.ones(4)
    assert comm.all_reduce(x, x) == IN_PROGRESS
    time.sleep(0.1)
    assert comm.state() == IN_PROGRESS
    assert comm.abort() == SUCCESS


def case_mismatch(comm: Comm) -> None:
    """What ranks do not agree about hangs."""
    n, me = 10, comm.rank
    x, f = np.ones(n, np.int32), np.ones(n, np.float32)
    out = np.zeros(n * comm.size, np.int32)
    odd = me == 1
    pairs: list[Callable[[Comm], int]] = [
        lambda c: c.all_reduce(x[: n - odd], x[: n - odd]),
        lambda c: c.all_reduce(f, f) if odd else c.all_reduce(x, x),
        lambda c: c.all_reduce(x, x, int(odd)),
        lambda c: c.broadcast(x, x, me),
        lambda c: c.all_gather(x, out) if odd else c.broadcast(x, x, 0),
        lambda c: c.recv(x[1:], 0) if odd else c.send(x, 1),
        lambda c: c.send(x, 0) if odd else c.send(x, 1),
    ]
    parts = [comm.split(0, 0) for _ in pairs]
    for part, call in zip(parts, pairs, strict=True):
        assert part is not None
        aborted_call(part, lambda part=part, call=call: call(part))


def case_errors(comm: Comm) -> None:
    """On the second rank every call below fails as injected; the first makes none."""
    lib, x = comm.lib, np.ones(3)
    if comm.rank == 1:
        for result in (CUDA, SYSTEM, INTERNAL, ARGUMENT, USAGE, REMOTE):
            assert comm.all_reduce(x, x) == result
            assert "ncclAllReduce: injected" in comm.last_error()
            assert lib.ncclGetErrorString(result)
        assert lib.ncclGroupStart() == SUCCESS
        assert comm.send(x, 0) == REMOTE
        assert lib.ncclGroupEnd() == REMOTE
        assert lib.ncclGroupStart() == SUCCESS
        assert comm.recv(x, 0) == SUCCESS
        assert lib.ncclGroupEnd() == SYSTEM
        assert "ncclGroupEnd: injected" in comm.last_error()
    assert comm.all_reduce(x, x) == SUCCESS
    assert x[0] == 2
    # An asynchronous error, from the call that brings it on.
    assert comm.broadcast(x, x, 0) == SUCCESS
    if comm.rank == 1:
        assert comm.state() == REMOTE
        assert comm.all_reduce(x, x) == REMOTE
        assert comm.destroy() == REMOTE
        assert comm.abort() == SUCCESS
    else:
        assert comm.state() == SUCCESS


def main(path: str, uid: str, rank: int, size: int, case: str) -> None:
    lib = load(path)
    id_ = UniqueId.from_buffer_copy(bytes.fromhex(uid))
    blocking = 0 if case in ("nonblocking", "never_done") else UNDEFINED
    if case == "nonblocking" and rank == 0:
        time.sleep(0.2)  # so that the other is seen waiting
    result, comm = init(lib, id_, rank, size, blocking)
    if blocking == 0:
        assert result == IN_PROGRESS, result
        assert case != "nonblocking" or rank == 0 or comm.state() == IN_PROGRESS
        assert comm.wait() == SUCCESS
    else:
        assert result == SUCCESS, comm.last_error()
        assert init(lib, id_, rank, size)[0] == SYSTEM
    end = (SUCCESS, IN_PROGRESS) if blocking == 0 else (SUCCESS,)
    globals()[f"case_{case}"](comm)
    if case not in ("stall", "never_done") and not (case == "errors" and rank == 1):
        # All have come to the end; nobody's segment is left behind.
        assert case == "errors" or comm.all_reduce(np.ones(1), np.ones(1)) in end
        assert comm.wait() == SUCCESS
        assert comm.destroy() == SUCCESS
    assert comm.destroy() == ARGUMENT


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
