"""The pass: what it refuses, what it says, and its schedule for random programs."""

from __future__ import annotations

import logging
import random
import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec

import jaxcomm
from jaxcomm import compat
from jaxcomm.errors import InvalidOptionError, UnsupportedCollectiveError
from jaxcomm.ranks.communicator import Communicator
from jaxcomm.ranks.fabric import Alone
from jaxcomm.settings import Settings
from jaxcomm.tracing import rewrite
from jaxcomm.tracing.primitives import new_token
from jaxcomm.transports.local import Local

Job = Callable[..., "subprocess.CompletedProcess[str]"]


def refused(
    function: Callable[..., Any], match: str, *args: Any, **options: Any
) -> None:
    step = jaxcomm.data_parallel(function, **options)
    with pytest.raises(UnsupportedCollectiveError, match=match):
        step.lower(*args or (jnp.ones(3),))


def test_branches_that_may_differ_are_refused() -> None:
    def by_data(x: Any) -> Any:
        return lax.cond(x[0] > 0, lambda v: lax.psum(v, "batch"), lambda v: v, x)

    def by_argument(x: Any, n: Any) -> Any:
        return lax.fori_loop(0, n, lambda _, v: lax.pmean(v, "batch"), x)

    def inside(x: Any) -> Any:
        body = lambda c, t: (by_data(c + t), t)  # noqa: E731
        return lax.scan(body, x, jnp.ones((2, 3)))

    def by_rank(x: Any) -> Any:
        first = lax.axis_index("batch") == 0
        return lax.cond(first, lambda v: lax.pmax(v, "batch"), lambda v: v, x)

    def drifting(x: Any) -> Any:
        # Equal at first, but not after the first iteration.
        def body(state: Any) -> Any:
            k, v = state
            return k + v[0], lax.psum(v, "batch")

        return lax.while_loop(lambda s: s[0] < 9, body, (0.0, x))

    where = r"test_rewrite\.py:\d+ \("
    refused(by_data, rf"cond at {where}by_data.*the predicate.*allow_divergent")
    refused(by_argument, rf"while at {where}.*condition", jnp.ones(3), 4)
    refused(inside, rf"cond at {where}by_data")
    refused(jax.jit(by_data), "cond")
    refused(by_rank, "cond")
    refused(drifting, "while")
    for function, args in ((by_data, ()), (by_argument, (3,))):
        step = jaxcomm.data_parallel(function, allow_divergent=True)
        step.lower(jnp.ones(3), *args)


@pytest.mark.parametrize(
    "reduce",
    [
        lambda x: lax.ppermute(x, "batch", [(0, 0)]),
        lambda x: lax.all_to_all(x[None], "batch", 0, 0, tiled=True),
        lambda x: lax.psum_scatter(x, "batch", tiled=True),
        lambda x: lax.psum(x, "batch", axis_index_groups=[[0]]),
    ],
    ids=["ppermute", "all_to_all", "psum_scatter", "grouped psum"],
)
def test_predicates_of_collectives_that_differ_are_refused(reduce: Any) -> None:
    def step(x: Any) -> Any:
        psum = lambda v: lax.psum(v, "batch")  # noqa: E731
        return lax.cond(reduce(x).sum() > 0, psum, lambda v: v, x)

    refused(step, "cond")


def test_predicates_that_are_equal_are_accepted() -> None:
    def step(x: Any, n: Any) -> Any:
        agreed = lax.pmax(n, "batch")
        x = lax.fori_loop(0, agreed, lambda _, v: lax.pmean(v, "batch"), x)
        x = lax.fori_loop(0, 3, lambda _, v: lax.pmean(v, "batch"), x)
        total = lax.psum(x, "batch").sum() * 2 + 1
        return lax.cond(total > 0, lambda v: lax.psum(v, "batch"), lambda v: v, x)

    jaxcomm.data_parallel(step).lower(jnp.ones(3), 4)


def test_ranks_with_other_constants_have_other_schedules() -> None:
    def step(x: Any, limit: int) -> Any:
        stop = jnp.asarray(np.array(limit))
        return lax.while_loop(
            lambda s: s[0] < stop,
            lambda s: (s[0] + 1, lax.psum(s[1], "batch")),
            (0, x),
        )

    found = []
    for limit in (3, 3, 4):
        decorated = jaxcomm.data_parallel(lambda x, k=limit: step(x, k))
        decorated.lower(jnp.ones(3))
        found.append(decorated.schedule.fingerprint)
    assert found[0] == found[1] != found[2]


def test_what_cannot_be_scheduled_names_primitive_axis_and_line() -> None:
    mesh = jax.make_mesh((1,), ("local",))
    spec = PartitionSpec()

    def sharded(x: Any) -> Any:
        inner = lambda v: lax.psum(v, "batch")  # noqa: E731
        return jax.shard_map(
            inner, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
        )(x)

    refused(sharded, r"shard_map over axis 'batch' at test_rewrite\.py:\d+")
    uneven = lambda x: lax.ragged_all_to_all(  # noqa: E731
        x, x, *[jnp.ones(1, jnp.int32)] * 4, axis_name="batch"
    )
    refused(uneven, r"ragged_all_to_all over axis 'batch' at test_rewrite\.py:\d+")
    step = jaxcomm.data_parallel(lambda x: lax.pmean(x, "devices"))
    match = r"pmean at test_rewrite\.py:\d+.*devices.*axis_name='batch'"
    with pytest.raises(InvalidOptionError, match=match):
        step.lower(jnp.ones(3))


PERMUTATIONS = """
import jax.numpy as jnp, numpy as np, jaxcomm
from jax import lax
comm = jaxcomm.init("mpi")
n, x = comm.size, jnp.ones(3) * (comm.rank + 1)

def permuted(pairs):
    return jaxcomm.data_parallel(lambda x: lax.ppermute(x, "batch", pairs))(x)

for pairs, why in (
    ([(0, 1), (1, 1)], "(1, 1) of (source, target), rank 1 receives from two ranks"),
    ([(0, 0), (0, 1)], "(0, 1) of (source, target), rank 0 sends to two ranks"),
    ([(0, n)], f"(0, {n}) of (source, target), ranks go from 0 to {n - 1}"),
    ([(-1, 0)], "(-1, 0) of (source, target), ranks go from 0 to"),
):
    try:
        permuted(pairs)
    except jaxcomm.errors.InvalidOptionError as error:
        assert why in str(error), error
        assert "axis 'batch' at script.py:8 (<lambda>)" in str(error), error
    else:
        raise AssertionError(pairs)
np.testing.assert_array_equal(permuted([(0, 1)]), jnp.full(3, comm.rank == 1, float))
np.testing.assert_array_equal(permuted([]), jnp.zeros(3))
"""


def test_pairs_that_are_no_permutation_are_refused(job: Job) -> None:
    done = job(2, PERMUTATIONS)
    assert done.returncode == 0, done.stderr


def test_a_second_trace_says_why(caplog: pytest.LogCaptureFixture) -> None:
    step = jaxcomm.data_parallel(lambda t: lax.pmean(t, "batch"))
    with caplog.at_level(logging.INFO, logger="jaxcomm"):
        step({"w": jnp.ones(3)})
        step({"w": jnp.ones(3)})
        assert not caplog.records
        step({"w": jnp.ones(4)})
        step({"w": jnp.ones(4, jnp.int32)})
        step({"w": jnp.ones(4, jnp.int32), "b": jnp.ones(1)})
    lines = [record.getMessage() for record in caplog.records]
    assert "argument [0]['w'] was float32[3] and is float32[4]" in lines[0]
    assert "float32[4] and is int32[4]" in lines[1]
    assert "is new" in lines[2]
    assert all("\n" not in line for line in lines)
    assert len(step.schedules) == 4


def test_pmap_refuses_with_reasons() -> None:
    f = lambda x: lax.pmean(x, "batch")  # noqa: E731
    for match, call in (
        ("devices=", lambda: jaxcomm.pmap(f, devices=[])),
        ("JAX runs on 'cpu'", lambda: jaxcomm.pmap(f, backend="tpu")),
        ("axis_size=2", lambda: jaxcomm.pmap(f, axis_size=2)(jnp.ones((1, 2)))),
        (
            r"argument 0\['w'\].*\(2, 3\)",
            lambda: jaxcomm.pmap(f)({"w": jnp.ones((2, 3))}),
        ),
        (r"argument 0 has shape \(\)", lambda: jaxcomm.pmap(f)(jnp.float32(1))),
        ("2 entries for 1", lambda: jaxcomm.pmap(f, in_axes=(0, 0))(jnp.ones((1, 2)))),
        ("no axis", lambda: jaxcomm.pmap(f, in_axes="0")(jnp.ones((1, 2)))),
        ("prefix", lambda: jaxcomm.pmap(f, in_axes=({"a": 0},))(jnp.ones((1, 2)))),
    ):
        with pytest.raises(InvalidOptionError, match=match):
            call()


def test_pmap_accepts_what_is_harmless() -> None:
    step = jaxcomm.pmap(
        lambda x: 2 * x,
        axis_name=None,
        axis_size=1,
        devices=jax.local_devices(),
        backend="cpu",
        global_arg_shapes=None,
    )
    np.testing.assert_array_equal(step(jnp.ones((1, 3))), np.full((1, 3), 2.0))
    lowered = step.lower(jnp.ones((1, 3)))
    assert lowered.out_info.shape == (1, 3)
    compiled = lowered.compile()
    assert compiled.out_tree == jax.tree.structure(0)
    np.testing.assert_array_equal(compiled(jnp.ones((1, 3))), np.full((1, 3), 2.0))
    assert "HloModule" in compiled.as_text()


def test_pmap_honours_axes() -> None:
    @jaxcomm.pmap(
        in_axes=(0, None, {"a": 1, "b": None}, None),
        out_axes=(0, None, {"sum": 1}),
        static_broadcasted_argnums=3,
    )
    def step(x: Any, y: Any, tree: Any, name: str, *, scale: Any) -> Any:
        assert name == "static"
        assert x.shape == (3,) and y.shape == (1, 2) and tree["a"].shape == (2, 3)
        total = lax.psum(x, "batch") * scale
        return total, y + tree["b"], {"sum": tree["a"] + total}

    tree = {"a": jnp.ones((2, 1, 3)), "b": jnp.ones(2)}
    total, y, out = step(
        jnp.ones((1, 3)), jnp.ones((1, 2)), tree, "static", scale=jnp.full(1, 2.0)
    )
    assert total.shape == (1, 3) and y.shape == (1, 2)
    assert out["sum"].shape == (2, 1, 3)
    np.testing.assert_array_equal(out["sum"], np.full((2, 1, 3), 3.0))


class Node(NamedTuple):
    """One value of a random program, made of earlier ones; number 0 is the argument."""

    kind: str
    a: int
    b: int
    returned: bool

    @property
    def operands(self) -> tuple[int, ...]:
        return (self.a, self.b) if self.kind in BINARY else (self.a,)


REDUCTIONS = {"psum": "sum", "pmax": "max", "pmean": "mean"}
BINARY = ("add", "larger")
# Divided by the number of ranks, a sum is a mean, unless it is needed itself; by
# another number it is none.
KINDS = (*REDUCTIONS, *BINARY, "share", "part")


@st.composite
def programs(draw: st.DrawFn) -> list[Node]:
    nodes = []
    for k in range(draw(st.integers(1, 14))):
        kind, before = draw(st.sampled_from(KINDS)), st.integers(0, k)
        nodes.append(Node(kind, draw(before), draw(before), draw(st.booleans())))
    return nodes


def computed(nodes: list[Node], order: list[int], x: Any, size: int, call: Any) -> Any:
    """Return the values of a program, whose reductions are made by `call`."""
    values: dict[int, Any] = {0: x}
    for k in order:
        node = nodes[k]
        operands = [values[i] for i in node.operands]
        if node.kind in REDUCTIONS:
            values[k + 1] = call(node.kind, *operands)
        elif node.kind == "share":
            values[k + 1] = operands[0] / size
        elif node.kind == "part":
            values[k + 1] = operands[0] / (size + 1)
        else:
            combine = jnp.add if node.kind == "add" else jnp.maximum
            values[k + 1] = combine(*operands)
    return [values[k + 1] for k, node in enumerate(nodes) if node.returned]


def planned(nodes: list[Node], order: list[int], size: int) -> Any:
    """Plan a program whose equations stand in another, equivalent order."""
    comm = Communicator(f"{size} that are not there", Local(), Settings(), Alone())
    comm.size, comm.alone = size, False

    def call(kind: str, x: Any) -> Any:
        return getattr(lax, kind)(x, "batch")

    def run(x: Any) -> Any:
        return computed(nodes, order, x, size, call)

    args = [jnp.ones(3)]
    closed, _ = compat.trace_with_axis(run, "batch", size, args)
    options = rewrite.Options("batch", comm)
    return rewrite.program(closed, options, [("x", args[0])])


def test_jaxprs_show_of_a_bucket_a_few_words() -> None:
    x = jnp.ones(3)
    program = planned([Node("psum", 0, 0, True)], [0], 2)
    fingerprint = program.schedule.fingerprint

    def shown(rank: int, token: Any) -> str:
        program.comm.rank = rank
        jaxpr = jax.make_jaxpr(lambda v: program.run([v], token)[0])(x)
        return jaxpr.pretty_print(use_color=False)

    for name, token in (("bucket", None), ("chained_bucket", new_token())):
        text = shown(0, token)
        assert f"jaxcomm_{name}[" in text
        words = ("bucket=0/1", "op=sum", f"schedule={fingerprint[:12]}")
        assert set(words) <= set(text.split())
        assert "KiB" not in text and "LeafSpec" not in text
        assert shown(1, token) == text


def values_if_all_are_alike(program: Any, x: Any) -> list[Any]:
    """Run a planned program as on ranks that all hold the same `x`."""
    closed = jax.make_jaxpr(lambda v: program.run([v])[0])(x)
    jaxpr, env = closed.jaxpr, {}
    env.update(zip(jaxpr.constvars, closed.consts, strict=True))
    env[jaxpr.invars[0]] = x

    def read(var: Any) -> Any:
        return var.val if isinstance(var, compat.Literal) else env[var]

    for eqn in jaxpr.eqns:
        values = [read(var) for var in eqn.invars]
        if "schedule" in eqn.params:
            bucket = eqn.params["schedule"].buckets[eqn.params["index"]]
            by = program.comm.size if bucket.op == "sum" else 1
            count = len(bucket.leaves)  # what follows orders the calls
            values[:count] = [by * value for value in values[:count]]
        else:
            values = compat.eval_eqn(eqn, values)
        env.update(zip(eqn.outvars, values, strict=True))
    return [read(var) for var in jaxpr.outvars]


def depends(nodes: list[Node]) -> list[set[int]]:
    """For every node, the nodes that it depends on, also through others."""
    found: list[set[int]] = []
    for node in nodes:
        direct = {k - 1 for k in node.operands} - {-1}
        found.append(direct.union(*(found[k] for k in direct)))
    return found


def expected_op(nodes: list[Node], k: int) -> str:
    users = [user for user in nodes for i in user.operands if i == k + 1]
    if nodes[k].kind == "psum" and not nodes[k].returned:
        return "mean" if [user.kind for user in users] == ["share"] else "sum"
    return REDUCTIONS[nodes[k].kind]


@settings(max_examples=100, deadline=None)
@given(programs(), st.integers(2, 4), st.randoms(use_true_random=False))
# A sum that is shared out, and read back and reduced again: no mean.
@example(
    [
        Node("psum", 0, 0, False),
        Node("share", 1, 0, True),
        Node("psum", 1, 0, False),
        Node("share", 3, 0, True),
        Node("psum", 4, 0, True),
    ],
    3,
    random.Random(0),
)
@example([Node("psum", 0, 0, False), Node("part", 1, 0, True)], 2, random.Random(0))
def test_random_programs(nodes: list[Node], size: int, chance: random.Random) -> None:
    program = planned(nodes, list(range(len(nodes))), size)
    schedule = program.schedule
    collectives = [k for k, node in enumerate(nodes) if node.kind in REDUCTIONS]
    everywhere = sorted(i for bucket in schedule.buckets for i in bucket.leaves)
    assert everywhere == list(range(len(collectives)))
    # Leaves are numbered in the order of the equations.
    before = depends(nodes)
    place = {}
    for number, bucket in enumerate(schedule.buckets):
        for i in bucket.leaves:
            place[collectives[i]] = number
            assert bucket.op == expected_op(nodes, collectives[i])
    for k in collectives:
        for j in before[k] & set(collectives):
            # A bucket comes after all that it depends on: no cycle, no dependent pair.
            assert place[j] < place[k]

    # The same program with its equations in another order that respects them.
    left, order = set(range(len(nodes))), []
    while left:
        free = [
            k for k in sorted(left) if not left & {i - 1 for i in nodes[k].operands}
        ]
        order.append(chance.choice(free))
        left.remove(order[-1])
    other = planned(nodes, order, size)
    kinds = lambda s: sorted((b.stage, b.op, len(b.leaves)) for b in s.buckets)  # noqa: E731
    assert kinds(other.schedule) == kinds(schedule)
    # No ranks are needed to know what ranks that are all alike find.
    x = np.array([1.0, 2.0, 3.0])  # all values are positive: none cancels

    def alike(kind: str, value: Any) -> Any:
        return size * value if kind == "psum" else value

    want = computed(nodes, order, x, size, alike)
    for each in (program, other):
        got = values_if_all_are_alike(each, jnp.asarray(x, jnp.float32))
        for one, right in zip(got, want, strict=True):
            np.testing.assert_allclose(one, right, rtol=1e-5)


ORDINARY = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np, jaxcomm
from jax import lax
comm = jaxcomm.init()
cache = Path(sys.argv[1])
jax.config.update("jax_compilation_cache_dir", str(cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

@jaxcomm.data_parallel(donate_argnums=0, static_argnums=2)
def step(state, key, name):
    assert name == "static"
    noise = jax.random.normal(key, (300,))
    total = lax.psum(state["x"] + noise, "batch")
    half = lax.psum(total, "batch", axis_index_groups=[[0], [1]])
    i = lax.axis_index("batch")
    return {"x": half, "n": state["n"]}, lax.all_gather(i, "batch")

def state():
    return {"x": jnp.arange(300.0), "n": None}

key = jax.random.key(1)
text = step.lower(state(), key, "static").as_text()
texts = comm.all_gather_object(text)
assert texts[0] == texts[1]  # equal on all ranks: no pointer, no rank
compiled = step.lower(state(), key, "static").compile()
out, ranks = compiled(state(), key)  # and no token
assert jax.tree.structure(compiled.out_info) == jax.tree.structure((out, ranks))
again, _ = step(state(), key, "static")
np.testing.assert_array_equal(out["x"], again["x"])
np.testing.assert_array_equal(ranks, [0, 1])
assert step.trace(state(), key, "static").jaxpr is not None
given = state()
step(given, key, "static")
assert given["x"].is_deleted()
with jax.enable_x64(True):
    mean = jaxcomm.data_parallel(lambda x: lax.pmean(x, "batch"))
    wide = mean(np.float64(1 + comm.rank))
    assert wide.dtype == np.float64 and float(wide) == 1.5
sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
total = jaxcomm.data_parallel(lambda x: lax.psum(x, "batch"))
placed = jax.device_put(jnp.ones(3), sharding)
np.testing.assert_array_equal(total(placed), 2)


@jaxcomm.data_parallel
def talks(x):
    jax.debug.print("rank {i} of two", i=lax.axis_index("batch"))
    return lax.psum(x, "batch")

np.testing.assert_array_equal(talks(jnp.ones(3)), 2)
jax.effects_barrier()
comm.barrier()
print("entries", sorted(x.name for x in cache.glob("jit_step-*-cache")))
"""


def test_a_decorated_function_is_an_ordinary_jitted_one(job: Job, tmp_path) -> None:
    first = job(2, ORDINARY, str(tmp_path / "cache"))
    assert first.returncode == 0, first.stderr
    assert "rank 0 of two" in first.stdout and "rank 1 of two" in first.stdout
    entries = [x for x in first.stdout.splitlines() if x.startswith("entries")]
    # Equal programs have one entry.
    assert len(set(entries)) == 1 and entries[0].count("jit_step") == 1
    # A second job reads what the first compiled, and gets the same.
    second = job(2, ORDINARY, str(tmp_path / "cache"))
    assert second.returncode == 0, second.stderr
    assert [x for x in second.stdout.splitlines() if x.startswith("entries")] == entries


WAYS = """
import functools
import equinox as eqx, jax, jax.numpy as jnp, numpy as np, optax, jaxcomm
from flax import nnx
from flax.training import train_state
from jax import lax
comm = jaxcomm.init()
mine = jnp.full(4, 1.0 + comm.rank)
mean = np.full(4, 1.0 + (comm.size - 1) / 2)
same = np.testing.assert_allclose

def f(x, scale=1.0):
    return lax.pmean(x * scale, "batch")

same(jaxcomm.data_parallel(jax.jit(f))(mine), mean)
same(jax.jit(jaxcomm.data_parallel(f))(mine), mean)
same(jaxcomm.data_parallel(functools.partial(f, scale=2.0))(mine), 2 * mean)
same(jaxcomm.pmap(jax.jit(f))(mine[None]), mean[None])

class Trainer:
    def __init__(self, scale):
        self.scale = scale

    @functools.partial(jaxcomm.data_parallel, static_argnums=0)
    def step(self, x):
        return f(x, self.scale)

same(Trainer(3.0).step(mine), 3 * mean)

state = train_state.TrainState.create(
    apply_fn=lambda p, x: p["w"] * x, params={"w": jnp.ones(4)}, tx=optax.sgd(1.0)
)

@jaxcomm.data_parallel(donate_argnums=0)
def train(state, x):
    grads = jax.grad(lambda p: jnp.sum(state.apply_fn(p, x)))(state.params)
    return state.apply_gradients(grads=lax.pmean(grads, "batch"))

state = train(state, mine)
assert int(state.step) == 1
same(state.params["w"], 1 - mean)

model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
graph, params = nnx.split(model)

@jaxcomm.data_parallel
def gradients(params, x):
    loss = lambda p: jnp.sum(nnx.merge(graph, p)(x))
    return lax.pmean(jax.grad(loss)(params), "batch")

out = nnx.merge(graph, gradients(params, mine))
same(out.bias[...], np.ones(4))
same(out.kernel[...], np.outer(mean, np.ones(4)))

mlp = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))

@jaxcomm.data_parallel
def arrays(model_arrays, x):
    model = eqx.combine(model_arrays, static)
    grads = eqx.filter_grad(lambda m: jnp.sum(m(x) ** 2))(model)
    return lax.pmean(eqx.filter(grads, eqx.is_array), "batch")

model_arrays, static = eqx.partition(mlp, eqx.is_array)
jaxcomm.assert_replicated(arrays(model_arrays, mine))
print("all ways agree")
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_ways_to_decorate(job: Job, ranks: int) -> None:
    done = job(ranks, WAYS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all ways agree") == ranks


EFFECTS = """
import jax, jax.numpy as jnp, numpy as np, jaxcomm
from jax import lax
from jax.experimental import io_callback
comm = jaxcomm.init()
x = jnp.arange(3.0) + comm.rank
total = 2 * np.arange(3.0) + 1

@jaxcomm.data_parallel(axis_name="b")
def references(ref, x):
    g = lax.psum(x, "b")
    old = ref[...]
    ref[...] = g
    h = x * 2
    z = ref[...]
    # What is read back depends on the first sum, and the last on that.
    twice = lax.psum(z, "b")
    return old, z, lax.psum(h, "b"), twice, lax.psum(twice + 1, "b")

ref = jax.new_ref(x)
old, z, k, twice, thrice = references(ref, x)
np.testing.assert_array_equal(old, x)
for got in (z, ref[...]):
    np.testing.assert_array_equal(got, total)
for got in (k, twice):
    np.testing.assert_array_equal(got, 2 * total)
np.testing.assert_array_equal(thrice, 4 * total + 2)

log = []

@jaxcomm.data_parallel(axis_name="b")
def callbacks(x):
    def say(what, value):
        io_callback(lambda _: log.append(what), None, value, ordered=True)
    g = lax.psum(x, "b")
    say("first", g)
    h = jnp.sin(x)
    say("second", h)
    k = lax.psum(h, "b")
    say("third", k)
    return g, k

jax.block_until_ready(callbacks(x))
jax.effects_barrier()
assert log == ["first", "second", "third"], log
"""


def test_what_has_effects_keeps_its_order(job: Job) -> None:
    done = job(2, EFFECTS)
    assert done.returncode == 0, done.stderr
