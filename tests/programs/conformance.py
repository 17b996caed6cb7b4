"""What every transport must do, as checks that all ranks of a job run together.

`test_conformance.py` starts this file once per transport and number of ranks:

    mpiexec -n 2 python -m tests.programs.conformance RESULTS.json mpi

Each `check_*` function takes the communicator and uses NumPy as the reference. The
ranks compare notes after each check; rank 0 writes one line of outcome per check.
"""

from __future__ import annotations

import faulthandler
import functools
import json
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxcomm
from jaxcomm.errors import (
    InvalidOptionError,
    InvalidTreeError,
    ScheduleMismatchError,
    UnsupportedDtypeError,
)
from jaxcomm.ranks.communicator import Communicator
from tests.programs import (
    conformance_arrays,
    conformance_dtypes,
    conformance_programs,
    conformance_transforms,
)
from tests.programs.references import NotHere, applies, close, raises, same

SECONDS_PER_CHECK = 240  # for a hang alone
SKIPPED = "skipped: "


def check_ranks(comm: Communicator) -> None:
    assert comm == jaxcomm.world() and hash(comm) == hash(jaxcomm.world())
    assert (jaxcomm.rank(), jaxcomm.size()) == (comm.rank, comm.size)
    if comm.hosts == 1:
        assert jaxcomm.local_rank() == comm.rank
        assert jaxcomm.local_size() == comm.size
    else:
        assert jaxcomm.local_rank() < jaxcomm.local_size() < comm.size
    assert comm.all_gather_object(comm.rank) == list(range(comm.size))
    keys = comm.all_gather_object(comm.key)
    assert len(set(keys)) == 1


def check_objects(comm: Communicator) -> None:
    last = comm.size - 1
    assert comm.broadcast_object({"from": comm.rank}, root=last) == {"from": last}
    raises(InvalidOptionError, "root", lambda: comm.broadcast_object(1, comm.size))
    comm.barrier()


def check_two_threads_on_two_communicators(comm: Communicator) -> None:
    applies(comm.transport not in ("mpi4jax", "nccl"), "one thread only: test_threads")
    ranks = list(range(comm.size))
    others = comm.subgroup(ranks[::-1]) if comm.size > 1 else comm
    assert others is not None
    results: dict[str, list[float]] = {}

    def work(name: str, on: Communicator, start: float) -> None:
        results[name] = [
            float(jaxcomm.all_reduce(jnp.full(50_000, start + k), op="sum", comm=on)[7])
            for k in range(30)
        ]

    threads = [
        threading.Thread(target=work, args=("a", comm, 0.0)),
        threading.Thread(target=work, args=("b", others, 1000.0)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results["a"] == [comm.size * k for k in range(30)]
    assert results["b"] == [comm.size * (1000.0 + k) for k in range(30)]


def check_planning_again_finds_the_plan(comm: Communicator) -> None:
    tree = {"a": jnp.ones((3, 2)), "b": jnp.ones(5, jnp.int32)}
    jaxcomm.all_reduce(tree)
    before = jaxcomm.cache_info()
    jaxcomm.all_reduce(tree)
    assert jaxcomm.plan(tree) is jaxcomm.plan(tree)
    assert jaxcomm.cache_info().misses == before.misses
    # What only looks like the options of before is checked all the same.
    raises(InvalidOptionError, "groups", lambda: jaxcomm.all_reduce(tree, groups=True))
    raises(InvalidOptionError, "op", lambda: jaxcomm.all_reduce(tree, op="average"))


def check_lowering_first_still_names_the_error(comm: Communicator) -> None:
    applies(comm.size > 1, "one rank agrees with itself")
    step = jaxcomm.data_parallel(lambda x: lax.pmean(x, "batch"))
    x = jnp.ones(5 + (comm.rank == comm.size - 1))
    step.lower(x)
    raises(ScheduleMismatchError, r"float32\[5\].*float32\[6\]", lambda: step(x))


def check_structure_is_kept(comm: Communicator) -> None:
    empty: dict[str, Any] = {}
    assert jaxcomm.all_reduce(empty) == {}
    assert jax.jit(jaxcomm.all_reduce)(None) is None
    tree = {"a": None, "b": (jnp.ones(2), [])}
    out = jaxcomm.all_reduce(tree)
    assert jax.tree.structure(out) == jax.tree.structure(tree)
    assert float(jaxcomm.all_reduce(2.0, op="sum")) == 2.0 * comm.size


def check_large_leaf_in_segments(comm: Communicator) -> None:
    x = np.arange(3_000_001, dtype=np.float32) % 1000 + comm.rank
    out = jax.jit(lambda v: jaxcomm.all_reduce(v, op="sum"))(x)
    want = sum(
        np.arange(3_000_001, dtype=np.float32) % 1000 + r for r in range(comm.size)
    )
    same(out, want)


def check_more_small_leaves_than_staging_holds(comm: Communicator) -> None:
    # 120 leaves of 100 KB fill the 8 MiB staging buffer more than once.
    tree = [jnp.full(25_000, float(i + comm.rank)) for i in range(120)]
    out = jaxcomm.all_reduce(tree, op="sum", groups=1)
    ranks = range(comm.size)
    for i, leaf in enumerate(out):
        same(leaf, np.full(25_000, sum(float(i + r) for r in ranks)))


def check_mean_divides_exactly(comm: Communicator) -> None:
    x = np.array([1 / 3, 1e-30, 7, 1e30], np.float32) * np.float32(comm.rank + 1)
    parts = [
        np.array([1 / 3, 1e-30, 7, 1e30], np.float32) * np.float32(r + 1)
        for r in range(comm.size)
    ]
    total = np.zeros(4, np.float32)
    for part in parts:
        total = total + part
    close(jaxcomm.all_reduce(x), total / np.float32(comm.size), rtol=3e-7)


def check_same_bits_on_all_ranks_and_runs(comm: Communicator) -> None:
    key = jax.random.fold_in(jax.random.key(3), comm.rank)
    tree = {"a": jax.random.normal(key, (1001, 33)), "b": jax.random.normal(key, (7,))}
    reduce = jax.jit(lambda t: jaxcomm.all_reduce(t))
    first, second = reduce(tree), reduce(tree)
    jaxcomm.assert_replicated(first)
    jax.tree.map(same, first, second)


def check_groupings_give_the_same_bits(comm: Communicator) -> None:
    rng = np.random.default_rng([4, comm.rank])
    tree = {f"layer{i}": rng.normal(size=(50 + i, 40)) for i in range(9)}
    tree = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
    results = [
        jaxcomm.all_reduce(tree, **options)  # type: ignore[arg-type]
        for options in (
            {},
            {"groups": 1},
            {"groups": 9},
            {"bucket_bytes": 10_000},
            {"groups": lambda path: path[-3]},
            {"groups": ["layer[0-3]", "layer"]},
        )
    ]
    for other in results[1:]:
        jax.tree.map(same, results[0], other)


def check_broadcast(comm: Communicator) -> None:
    for root in range(comm.size):
        r = comm.rank
        tree = {
            "f": jnp.full((3, 4), float(r)),
            "h": jnp.full(5, r, jnp.bfloat16),
            "i": jnp.full(3, r, jnp.int8),
            "flag": jnp.array([r == root, False]),
            "key": jax.random.key(r),
            "raw": jax.random.PRNGKey(r),
            "none": None,
            "zero": jnp.zeros((0, 2)),
        }
        out = jaxcomm.broadcast(tree, root=root)
        jaxcomm.assert_replicated(out)
        same(out["f"], np.full((3, 4), float(root)))
        same(out["h"].astype(jnp.float32), np.full(5, root))
        same(out["flag"], [True, False])
        same(jax.random.key_data(out["key"]), jax.random.key_data(jax.random.key(root)))
        same(
            jax.jit(lambda v, k=root: jaxcomm.broadcast(v, root=k))(tree["f"]), out["f"]
        )
    raises(InvalidOptionError, "root", lambda: jaxcomm.broadcast(1.0, root=comm.size))


def check_mismatch_raises_on_every_rank(comm: Communicator) -> None:
    applies(comm.size > 1, "one rank agrees with itself")
    last = comm.rank == comm.size - 1
    cases = {
        r"\['w'\] float32\[3\] against \['w'\] float32\[4\]": lambda: (
            jaxcomm.all_reduce({"w": jnp.ones(4 if last else 3)})
        ),
        r"float32\[6\] against .*int32\[6\]": lambda: jaxcomm.all_reduce(
            {"w": jnp.ones(6, jnp.int32 if last else jnp.float32)}
        ),
        r"\['extra'\]": lambda: jaxcomm.all_reduce(
            {"w": jnp.ones(8)} | ({"extra": jnp.ones(1)} if last else {})
        ),
        "op mean against sum": lambda: jaxcomm.all_reduce(
            jnp.ones(9), op="sum" if last else "mean"
        ),
        "root 0 against 1": lambda: jaxcomm.broadcast(jnp.ones(10), root=int(last)),
    }
    for match, call in cases.items():
        raises(ScheduleMismatchError, match, call)
    step = jaxcomm.data_parallel(lambda x: lax.psum(x, "batch"))
    raises(
        ScheduleMismatchError,
        r"float32\[11\] against",
        lambda: step(jnp.ones(12 if last else 11)),
    )
    raises(
        jax.errors.JaxRuntimeError,
        "ScheduleMismatchError: the ranks hold different schedules",
        lambda: jax.jit(jaxcomm.all_reduce)(jnp.ones(14 if last else 13)),
    )
    # Nothing was sent, so the communicator is as good as new.
    same(jaxcomm.all_reduce(jnp.ones(3), op="sum"), np.full(3, comm.size))


def check_bad_input(comm: Communicator) -> None:
    x = jnp.ones(2)

    def unhashable(path: str) -> Any:
        return [path]

    bad: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (
            InvalidTreeError,
            r"\['name'\].*str",
            lambda: jaxcomm.all_reduce({"name": "a"}),
        ),
        (InvalidTreeError, "object", lambda: jaxcomm.all_reduce(np.array([None]))),
        (
            UnsupportedDtypeError,
            r"\['k'\]",
            lambda: jaxcomm.all_reduce({"k": jax.random.key(0)}),
        ),
        (InvalidOptionError, "op=", lambda: jaxcomm.all_reduce(x, op="median")),
        (InvalidOptionError, "bucket_bytes", lambda: jaxcomm.plan(x, bucket_bytes=-1)),
        (InvalidOptionError, "groups", lambda: jaxcomm.plan(x, groups=0)),
        (InvalidOptionError, "regular", lambda: jaxcomm.plan(x, groups=["("])),
        (
            InvalidOptionError,
            "root",
            lambda: jaxcomm.plan({"root": x}, groups=lambda p: 1 / 0),
        ),
        (InvalidOptionError, "hashable", lambda: jaxcomm.plan(x, groups=unhashable)),
        (
            InvalidOptionError,
            "axis_name='data'",
            lambda: jaxcomm.data_parallel(
                lambda v: lax.psum(v, "rows"), axis_name="data"
            )(x),
        ),
        (InvalidOptionError, "subgroup", lambda: comm.subgroup([0, 0])),
        (InvalidOptionError, "subgroup", lambda: comm.subgroup([comm.size])),
        (InvalidOptionError, "init once", lambda: jaxcomm.init("local")),
    ]
    if comm.transport == "local":
        bad = [case for case in bad if case[1] not in ("init once",)]
    for kind, match, call in bad:
        raises(kind, match, call)


def check_not_replicated(comm: Communicator) -> None:
    applies(comm.size > 1, "one rank agrees with itself")
    tree = {"same": jnp.ones(2), "other": jnp.ones(3) * comm.rank}
    raises(AssertionError, r"\['other'\]", lambda: jaxcomm.assert_replicated(tree))


def check_subgroups(comm: Communicator) -> None:
    even = comm.subgroup(range(0, comm.size, 2))
    assert (even is None) == bool(comm.rank % 2)
    if even is not None:
        assert even is comm.subgroup(range(0, comm.size, 2))
        assert even.size == (comm.size + 1) // 2
        total = sum(r + 1.0 for r in range(0, comm.size, 2))
        out = jaxcomm.all_reduce(jnp.ones(3) * (comm.rank + 1), op="sum", comm=even)
        same(out, np.full(3, total))
        step = jaxcomm.data_parallel(lambda x: lax.psum(x, "batch"), comm=even)
        same(step(jnp.ones(3)), np.full(3, even.size))
    comm.barrier()


def check_weighted_means(comm: Communicator) -> None:
    weight = float(comm.rank)  # rank 0 has run out of data
    own = comm.rank + 1.0 if comm.rank else np.nan
    tree = {
        "w": jnp.full((3, 2), own),
        "b": jnp.asarray([0.5 * comm.rank], jnp.bfloat16),
        "c": jnp.asarray(1j * comm.rank),
    }
    ranks = np.arange(comm.size)
    total = max(ranks.sum(), 1)
    want = {
        "w": (np.full((3, 2), (ranks * (ranks + 1.0)).sum() / total), 1e-6),
        "b": ([(ranks * 0.5 * ranks).sum() / total], 1e-2),
        "c": (1j * (ranks * ranks).sum() / total, 1e-6),
    }
    eager = jaxcomm.all_reduce(tree, weight=weight)
    step = jaxcomm.data_parallel(lambda t, w: jaxcomm.all_reduce(t, weight=w))
    for out in (eager, step(tree, weight)):
        for name, leaf in out.items():
            assert leaf.dtype == tree[name].dtype
            value, rtol = want[name]
            got = np.asarray(leaf).astype(complex)
            np.testing.assert_allclose(got, value, rtol=rtol)
    same(jaxcomm.all_reduce(jnp.ones(3), weight=0), np.zeros(3))
    # Groups are of the user's leaves; the weight's own sum is in none of them.
    labels = {"['a']": "first", "['b']": "second"}
    pair = {"a": jnp.full(3, comm.rank + 1.0), "b": jnp.ones(())}
    grouped = jaxcomm.data_parallel(
        lambda t, w: jaxcomm.all_reduce(t, weight=w, groups=lambda path: labels[path])
    )
    for out in (
        grouped(pair, 2.0),
        jaxcomm.all_reduce(pair, weight=2.0, groups=lambda path: labels[path]),
    ):
        close(out["a"], np.full(3, (comm.size + 1) / 2), rtol=1e-6)
    # A weighted leaf may exceed what its dtype holds, and no kind of number differs.
    large = jaxcomm.all_reduce(jnp.full(2, 3e38), weight=1000.0)
    np.testing.assert_allclose(large, 3e38, rtol=1e-6)
    kinds = (3, 3.0, np.float64(3), np.int32(3), jnp.float32(3))
    mine = jnp.full(2, float(comm.rank))
    alike = jaxcomm.all_reduce(mine, weight=kinds[comm.rank])
    np.testing.assert_allclose(alike, jaxcomm.all_reduce(mine), rtol=1e-6)
    wire = jaxcomm.all_reduce(jnp.full(9, 2.0), weight=1001, wire_dtype="bfloat16")
    np.testing.assert_allclose(wire, 2, rtol=2e-2)
    for kind, says, leaf, options in (
        (InvalidTreeError, r"'n'.*int32", {"n": 1}, {"weight": 1.0}),
        (InvalidOptionError, "only a mean", 1.0, {"op": "sum", "weight": 1}),
        (InvalidOptionError, "one real number", 1.0, {"weight": [1, 2]}),
    ):
        raises(kind, says, functools.partial(jaxcomm.all_reduce, leaf, **options))


def check_no_control_messages_after_the_first_step(comm: Communicator) -> None:
    applies(comm.transport != "local", "one rank alone counts nothing")

    @jaxcomm.data_parallel
    def step(x: Any) -> Any:
        return lax.pmean(x + 0.125, "batch")

    x = step(jnp.ones(77))
    before = comm.counters()["agreements"]
    for _ in range(20):
        x = step(x)
    jax.block_until_ready(x)
    assert comm.counters()["agreements"] == before


def checks() -> dict[str, Callable[[Communicator], None]]:
    """Return every check by name."""
    found = dict(globals())
    for module in (
        conformance_dtypes,
        conformance_arrays,
        conformance_transforms,
        conformance_programs,
    ):
        found |= vars(module)
    return {name: value for name, value in found.items() if name.startswith("check_")}


def main(results: str, transport: str, *names: str) -> None:
    """Run checks, all unless named, on all ranks.

    Rank 0 writes {check: text of errors or ""}; of a check that does not apply here,
    SKIPPED and why.
    """
    comm = jaxcomm.init(transport, timeout=SECONDS_PER_CHECK / 2)
    outcome: dict[str, str] = {}
    for name in names or checks():
        check = checks()[name]
        faulthandler.dump_traceback_later(SECONDS_PER_CHECK, exit=True)
        try:
            check(comm)
            error = ""
        except NotHere as why:
            error = f"{SKIPPED}{why}"
        except Exception:
            error = traceback.format_exc(limit=-4)
        errors = comm.all_gather_object(error)
        if error.startswith(SKIPPED) and len(set(errors)) == 1:
            outcome[name] = error
        else:
            outcome[name] = "\n".join(
                f"rank {rank} of {comm.size}: {text}"
                for rank, text in enumerate(errors)
                if text
            )
        if comm.rank == 0:
            Path(results).write_text(json.dumps(outcome))
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(*sys.argv[1:])
