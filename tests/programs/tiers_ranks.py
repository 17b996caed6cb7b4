"""Reductions of ranks that pretend to be on several hosts: `tiers_ranks.py`.

`test_tiers.py` says which (JAXCOMM_TEST_HOSTS). Subgroups have other layouts than all.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomm
from jaxcomm.planning.costs import ALGORITHMS, CostModel
from jaxcomm.ranks.communicator import Communicator
from tests.programs.references import same

DTYPES = ("float32", "float64", "float16", "bfloat16", "int32", "uint8", "complex64")
# Some of one segment, some of many, one that ends within a cache line.
SIZES = (1, 7, 1000, 30_011, 700_001)


def use(algorithm: str) -> None:
    """Let all plans between hosts take an algorithm."""
    CostModel.algorithm = lambda self, nbytes, hosts: algorithm  # pyright: ignore
    jaxcomm.cache_clear()


def values(rank: int, dtype: str, count: int) -> np.ndarray:
    rng = np.random.default_rng([7, rank, count])
    if np.issubdtype(np.dtype(dtype), np.integer):
        return rng.integers(0, 100, count).astype(dtype)
    return (rng.normal(size=count) * 3).astype(dtype)


def tree(parts: Sequence[np.ndarray], op: np.ufunc) -> np.ndarray:
    """Combine as docs/order.md says hosts' sums are."""
    half = 1 << (len(parts).bit_length() - 1)
    extra = len(parts) - half
    pairs = [op(parts[2 * k], parts[2 * k + 1]) for k in range(extra)]
    nodes = [*pairs, *parts[2 * extra :]]
    while len(nodes) > 1:
        nodes = [op(a, b) for a, b in zip(nodes[::2], nodes[1::2], strict=True)]
    return nodes[0]


def reduced(
    parts: Sequence[np.ndarray], hosts: Sequence[int], op: str, wire: str | None
) -> np.ndarray:
    """Return what is to come out, bit by bit."""
    dtype = parts[0].dtype
    travels = np.dtype(wire or dtype)
    ufunc = {"max": np.maximum, "min": np.minimum, "prod": np.multiply}.get(op, np.add)
    half = travels.itemsize == 2 and travels.kind in "fV"
    wide = half and ufunc in (np.add, np.multiply)
    # What is not a number of float16 has a mean that is one.
    reserve = 1.0
    while op == "mean" and travels == np.float16 and reserve < len(parts):
        reserve *= 2
    sums = []
    for host in dict.fromkeys(hosts):
        mine = [x for x, h in zip(parts, hosts, strict=True) if h == host]
        if wire:
            mine = [(x / np.float32(reserve)).astype(travels) for x in mine]
        if wide:
            scale = np.float32(reserve if wire else 1)
            mine = [x.astype(np.float32) * scale for x in mine]
        total = functools.reduce(ufunc, mine)
        if wide:
            total = (total / np.float32(reserve)).astype(travels)
            total = total.astype(np.float32) * np.float32(reserve)
        sums.append(total)
    out = tree(sums, ufunc)
    if op == "mean":
        if out.dtype.kind in "iu":
            out = (out.astype(np.int64) / len(parts)).astype(dtype)
        else:
            complex_ = out.dtype == np.complex64
            real = out.view(np.float32) if complex_ else out
            out = (real / real.dtype.type(len(parts))).view(out.dtype)
    return out.astype(travels).astype(dtype)


def check(
    comm: Communicator, hosts: Sequence[int], ranks: Sequence[int], few: bool = False
) -> None:
    cases = [(dtype, op, None) for dtype in DTYPES for op in ("sum", "mean")]
    cases += [("float32", "max", None), ("bfloat16", "prod", None)]
    cases += [("int32", "min", None), ("float16", "min", None)]
    for wire in ("bfloat16", "float16"):
        cases += [("float32", op, wire) for op in ("sum", "mean", "max")]
    if few:
        cases = [("float32", "mean", None), ("bfloat16", "sum", None)]
        cases += [("float32", "mean", "float16")]
    for dtype, op, wire in cases:
        every = [
            {
                f"{n}": values(r, dtype, n)
                for n in SIZES
                if dtype == "float32" or n < 99999
            }
            for r in ranks
        ]
        want = {
            name: reduced([part[name] for part in every], hosts, op, wire)
            for name in every[0]
        }
        for algorithm, size in (
            (ALGORITHMS[0], 1),
            (ALGORITHMS[1], 1),
            (ALGORITHMS[1], 99),
        ):
            use(algorithm)
            out = jaxcomm.all_reduce(
                every[comm.rank], op=op, wire_dtype=wire, groups=size, comm=comm
            )
            for name, got in out.items():
                where = f"{hosts} {dtype} {op} {wire} {algorithm} {name}"
                same(np.asarray(got), want[name], err_msg=where)


def check_what_leaves_a_host(comm: Communicator, hosts: Sequence[int]) -> None:
    """Every byte leaves a host 2 (h - 1) / h times, however many ranks are there."""
    count = 1_000_000
    h = len(set(hosts))
    for algorithm, share in (("pairwise", 2 * (h - 1) / h), ("doubling", None)):
        use(algorithm)
        before = comm.counters()
        jax.block_until_ready(
            jaxcomm.all_reduce(jnp.ones(count, jnp.float32), comm=comm)
        )
        after = comm.counters()
        found = comm.all_gather_object(
            (hosts[comm.rank], after["sent"] - before["sent"])
        )
        for host in set(hosts):
            sent = sum(n for where, n in found if where == host)
            if share is not None:
                assert sent <= share * 4 * count * 1.001 + 4096, (hosts, sent)
            assert sent > 0
    use("doubling")
    before = comm.counters()["messages"]
    jax.block_until_ready(jaxcomm.all_reduce(jnp.ones(100), comm=comm))
    messages = comm.counters()["messages"] - before
    # A segment of one part, sent by the first rank of every host.
    first = list(hosts).index(hosts[comm.rank]) == comm.rank
    steps = h.bit_length() - 1
    assert messages <= (steps + 1 if first else 0), (hosts, messages)


def check_partition(comm: Communicator) -> None:
    """Subgroups by axis_index_groups, each with a layout of its own."""
    groups = [list(range(comm.size))[::2], list(range(comm.size))[1::2]]
    if len(groups[0]) != len(groups[1]):
        return
    step = jaxcomm.data_parallel(
        lambda x: jax.lax.psum(x, "batch", axis_index_groups=groups)
    )
    mine = next(group for group in groups if comm.rank in group)
    same(
        np.asarray(step(jnp.full(50_000, 1.0 + comm.rank, jnp.float32))),
        np.full(50_000, sum(1.0 + r for r in mine), np.float32),
    )


def main(text: str) -> None:
    jax.config.update("jax_enable_x64", True)
    comm = jaxcomm.init("mpi")
    hosts = tuple(map(int, text.split(",")))
    order = list(dict.fromkeys(hosts))
    hosts = tuple(map(order.index, hosts))
    assert comm.hosts == len(order) and comm.backend.two_tiers, comm
    plan = jaxcomm.plan({"a": jax.ShapeDtypeStruct((9,), "float32")})
    assert plan.buckets[0].algorithm in plan.explain()
    assert jaxcomm.Schedule.from_json(plan.to_json()) == plan
    check(comm, hosts, range(comm.size))
    check_what_leaves_a_host(comm, hosts)
    check_partition(comm)
    for ranks in ([comm.size - 1, *range(comm.size - 1)], list(range(1, comm.size))):
        part = comm.subgroup(ranks)
        if part is not None and len({hosts[r] for r in ranks}) > 1:
            layout = [hosts[r] for r in ranks]
            if part.backend.two_tiers:
                check(part, layout, ranks, few=True)
                check_what_leaves_a_host(part, layout)
    jaxcomm.assert_replicated(jnp.ones(3))
    print("all checked", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
