"""Schedules and the planner: pure data, pure functions."""

from __future__ import annotations

import json
import subprocess
import sys
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcomm
from jaxcomm.errors import InvalidOptionError
from jaxcomm.planning import planner, schedule
from jaxcomm.planning.schedule import Bucket, LeafSpec, Schedule


@st.composite
def leaf_lists(draw: st.DrawFn) -> tuple[LeafSpec, ...]:
    count = draw(st.integers(0, 40))
    return tuple(
        LeafSpec(
            path=f"['p{i}']",
            shape=tuple(draw(st.lists(st.integers(0, 300), max_size=2))),
            dtype=draw(st.sampled_from(["float32", "float64", "int32"])),
            order=draw(st.integers(0, 50)),
        )
        for i in range(count)
    )


OPTIONS = st.one_of(
    st.builds(lambda n: {"groups": n}, st.integers(1, 50)),
    st.builds(lambda n: {"bucket_bytes": n}, st.integers(1, 10**6)),
    st.just({"groups": lambda path: path[-3]}),
    st.just({"groups": ["1", "2"]}),
    st.just({}),
)


@given(leaf_lists(), OPTIONS)
def test_every_leaf_is_in_exactly_one_bucket_of_its_dtype(leaves, options):
    schedule = planner.make_schedule(leaves, op="sum", size=2, **options)
    members = [i for bucket in schedule.buckets for i in bucket.leaves]
    assert sorted(members) == list(range(len(leaves)))
    for bucket in schedule.buckets:
        assert {leaves[i].dtype for i in bucket.leaves} == {bucket.dtype}
    ready = [max(leaves[i].order for i in b.leaves) for b in schedule.buckets]
    assert ready == sorted(ready)


@given(leaf_lists(), OPTIONS)
def test_json_round_trip(leaves, options):
    schedule = planner.make_schedule(leaves, op="mean", size=3, **options)
    again = Schedule.from_json(schedule.to_json())
    assert again == schedule
    assert again.fingerprint == schedule.fingerprint
    assert hash(again) == hash(schedule)
    assert schedule.diff(again) == ""


@given(leaf_lists(), st.lists(st.integers(0, 3), min_size=40, max_size=40))
def test_stages_are_never_mixed_and_come_in_order(leaves, stages):
    stages = tuple(stages[: len(leaves)])
    schedule = planner.make_schedule(leaves, op="sum", size=2, stages=stages)
    for bucket in schedule.buckets:
        assert {stages[i] for i in bucket.leaves} == {bucket.stage}
    order = [bucket.stage for bucket in schedule.buckets]
    assert order == sorted(order)


@given(leaf_lists(), st.integers(1, 50))
def test_a_named_group_is_one_bucket_per_dtype(leaves, count):
    schedule = planner.make_schedule(leaves, op="sum", size=2, groups=count)
    for dtype in {leaf.dtype for leaf in leaves}:
        members = [leaf for leaf in leaves if leaf.dtype == dtype]
        buckets = [b for b in schedule.buckets if b.dtype == dtype]
        assert len(buckets) == min(count, len(members))
    labelled = planner.make_schedule(
        leaves, op="sum", size=2, groups=lambda path: len(path)
    )
    kinds = {(len(leaf.path), leaf.dtype) for leaf in leaves}
    assert len(labelled.buckets) == len(kinds)


def test_buckets_respect_their_size():
    leaves = tuple(LeafSpec(f"[{i}]", (1000,), "float32", i) for i in range(10))
    schedule = planner.make_schedule(leaves, op="sum", size=2, bucket_bytes=8000)
    assert [b.leaves for b in schedule.buckets] == [
        (0, 1), (2, 3), (4, 5), (6, 7), (8, 9),
    ]  # fmt: skip


def test_cache_counts_hits():
    jaxcomm.cache_clear()
    tree = {"a": jax.ShapeDtypeStruct((3,), jnp.float32), "b": jnp.ones((2, 2))}
    first = jaxcomm.plan(tree, size=2)
    assert jaxcomm.plan(tree, size=2) is first
    info = jaxcomm.cache_info()
    assert (info.hits, info.misses, info.currsize) == (1, 1, 1)
    assert jaxcomm.plan(tree, size=4) is not first
    assert jaxcomm.plan(tree, op="sum", size=2).fingerprint != first.fingerprint


def test_cache_clear_forgets_the_plans_of_calls_too():
    tree = {"a": jnp.ones(5), "b": jnp.ones((2, 3))}
    expected = jaxcomm.all_reduce(tree)
    for call in (jaxcomm.all_reduce, jaxcomm.broadcast):
        call(tree)
        jaxcomm.cache_clear()
        assert jaxcomm.cache_info().misses == 0
        jax.tree.map(np.testing.assert_array_equal, call(tree), expected)
        assert jaxcomm.cache_info().misses == 1, call
        jax.tree.map(np.testing.assert_array_equal, call(tree), expected)
        assert jaxcomm.cache_info().misses == 1, call


WITHOUT_JAX = """
import sys
for name in ("jax", "jaxlib", "ml_dtypes", "rich"):
    sys.modules[name] = None  # cannot be imported
from jaxcomm.planning import planner
from jaxcomm.planning.schedule import LeafSpec
assert planner.wire_name("bfloat16") == "bfloat16"
try:
    planner.wire_name("bfloat17")
except planner.InvalidOptionError as error:
    assert "wire_dtype='bfloat17'" in str(error)
leaves = (LeafSpec("a", (3,), "float32", 0), LeafSpec("b", (4,), "bfloat16", 1))
schedule = planner.make_schedule(leaves, op="sum", size=2, wire_dtype="bfloat16")
assert repr(schedule).startswith("schedule ") and schedule._repr_html_()
print([bucket.wire for bucket in schedule.buckets], schedule.wire_nbytes)
"""


def test_the_planner_needs_no_jax():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_JAX],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['bfloat16', ''] 14\n"


def test_sizes_are_those_of_ml_dtypes():
    for name, size in schedule._ITEM_BYTES.items():
        assert np.dtype(getattr(ml_dtypes, name)).itemsize == size, name


def test_schedule_is_the_same_in_every_process():
    text = (
        "import jaxcomm, jax.numpy as jnp\n"
        "tree = {k: jnp.ones((len(k), 3)) for k in ('bb', 'a', 'cccc')}\n"
        "print(jaxcomm.plan(tree, size=2, groups=['a', 'b']).to_json())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", text],
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
            timeout=150,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(outputs) == 1
    assert json.loads(outputs.pop())["size"] == 2


def test_diff_names_the_leaf():
    def plan(**shapes: int) -> Schedule:
        leaves = {k: jnp.ones(n) for k, n in shapes.items()}
        return jaxcomm.plan(leaves, size=2)

    assert plan(a=3, b=4).diff(plan(a=3, b=5)) == (
        "leaf ['b'] float32[4] against ['b'] float32[5]"
    )
    assert "['c'] float32[1] only there" in plan(a=1, b=1).diff(plan(a=1, b=1, c=1))
    one = plan(a=3)
    assert "op mean against max" in one.diff(
        jaxcomm.plan({"a": jnp.ones(3)}, op="max", size=2)
    )
    assert "2 ranks against 4" in one.diff(jaxcomm.plan({"a": jnp.ones(3)}, size=4))


def test_explain_is_a_table():
    text = jaxcomm.plan({"w": jnp.ones((300, 300)), "b": jnp.ones(3)}, size=2).explain()
    title, head, *rows = text.splitlines()
    assert "2 leaves, 360,012 bytes" in title
    assert head.split()[:4] == ["bucket", "stage", "op", "dtype"]
    assert len(rows) >= 1


def test_the_algorithm_between_hosts_is_part_of_the_schedule():
    leaf = LeafSpec("a", (10,), "float32", 0)
    one, four = (
        planner.make_schedule((leaf,), op="sum", size=8, hosts=h) for h in (1, 4)
    )
    assert (one.buckets[0].algorithm, four.buckets[0].algorithm) == ("", "doubling")
    assert one.fingerprint != four.fingerprint
    assert Schedule.from_json(four.to_json()) == four
    assert "algorithm  against doubling" in one.diff(four)
    assert "doubling" in four.explain() and "algorithm" not in one.explain()
    moved = planner.make_schedule((leaf,), op="broadcast", size=8, hosts=4)
    assert moved.buckets[0].algorithm == ""


def cells(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


@given(leaf_lists(), OPTIONS)
def test_a_schedule_shows_itself_as_its_table(leaves, options):
    schedule = planner.make_schedule(leaves, op="sum", size=2, **options)
    shown, whole = cells(repr(schedule)), cells(schedule.explain())
    assert cells(str(schedule)) == shown
    assert len(shown) <= 25
    if len(schedule.buckets) <= 21:
        assert repr(schedule) == schedule.explain()
    else:
        assert shown[:12] == whole[:12]
        assert shown[-10:] == whole[-10:]
        assert shown[12][0] == f"({len(schedule.buckets) - 20}"
        assert len(shown) == 23


@given(leaf_lists(), st.text(st.characters(codec="utf-8", exclude_categories=["C"])))
def test_notebooks_get_the_same_table(leaves, label):
    schedule = planner.make_schedule(
        leaves, op="sum", size=2, groups=lambda path: label + path
    )
    table = ElementTree.fromstring(schedule._repr_html_())
    assert {e.tag for e in table.iter()} <= {
        "table", "caption", "thead", "tbody", "tr", "th", "td",
    }  # fmt: skip
    assert {name for e in table.iter() for name in e.attrib} <= {"colspan"}
    title, head, *_ = schedule.explain().splitlines()
    assert table.findtext("caption") == title
    assert [e.text for e in table.iter("th")] == head.split()
    found = [[e.text or "" for e in row] for row in table.iterfind("tbody/tr")]
    assert len(found) <= 21
    for row in found:
        if len(row) == 1:
            assert row == [f"{len(schedule.buckets) - 20} buckets left out; "
                           "explain() shows all"]  # fmt: skip
        else:
            bucket = schedule.buckets[int(row[0])]
            assert row[2:4] == [bucket.op, bucket.dtype]
            assert row[-1] == bucket.label


def test_what_is_no_schedule_can_be_shown():
    nobody = Schedule((), (Bucket("sum", "float32", (0,), 0),), 2)
    leaf = LeafSpec("a", (1,), "floating", 0)
    no_dtype = Schedule((leaf,), (Bucket("sum", "floating", (0,), 0),), 2)
    for broken in (nobody, no_dtype):
        assert "Bucket(op='sum'" in repr(broken)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 99}', '{"format": 1, "leaves": [1]}'],
)
def test_a_bad_file_is_refused(text):
    with pytest.raises(InvalidOptionError, match="schedule"):
        Schedule.from_json(text)


def test_a_bucket_of_unknown_leaves_is_refused():
    schedule = Schedule((), (Bucket("sum", "float32", (0,), 0),), 2)
    with pytest.raises(InvalidOptionError, match="does not exist"):
        Schedule.from_json(schedule.to_json())
