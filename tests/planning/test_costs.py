"""The cost model, its profiles, and the commands `plan` and `tune`."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcomm.errors import InvalidOptionError
from jaxcomm.planning import costs as costmodel
from jaxcomm.planning import planner
from jaxcomm.planning.costs import DEFAULT, CostModel
from jaxcomm.planning.schedule import LeafSpec
from tests.jobs import ROOT

SLOW_NETWORK = CostModel(
    call=1e-6,
    curve=((8, 200e-6), (65536, 300e-6), (1 << 20, 1e-3)),
    copy_bandwidth=24e9,
    segment_bytes=1 << 20,
    source="slow network",
)

models = st.builds(
    CostModel,
    call=st.floats(1e-7, 1e-4),
    curve=st.lists(st.floats(1e-7, 1e-3), min_size=3, max_size=8).map(
        lambda times: tuple((8 << (2 * k), t) for k, t in enumerate(sorted(times)))
    ),
    copy_bandwidth=st.floats(1e8, 1e11),
    segment_bytes=st.integers(4096, 1 << 24),
)


def command(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "jaxcomm", *arguments]
    done = subprocess.run(
        line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_curve_passes_through_its_points() -> None:
    for nbytes, seconds in DEFAULT.curve:
        assert DEFAULT.message_seconds(nbytes) == pytest.approx(seconds)
    assert DEFAULT.message_seconds(0) == DEFAULT.curve[0][1]
    times = [DEFAULT.message_seconds(n) for n in range(0, 5_000_000, 9973)]
    assert times == sorted(times)


def test_a_slower_network_packs_more_and_makes_larger_buckets() -> None:
    assert SLOW_NETWORK.pack_bytes > DEFAULT.pack_bytes
    assert SLOW_NETWORK.bucket_bytes > DEFAULT.bucket_bytes


def test_the_time_of_a_bucket_is_that_of_its_messages_and_copies() -> None:
    model = CostModel(
        call=3.0, curve=((0, 1.0), (100, 2.0)), copy_bandwidth=10.0, segment_bytes=50
    )
    # Two segments and half of one; 20 bytes that are packed and unpacked.
    assert model.bucket_seconds([125], 0) == pytest.approx(3 + 2 * 1.5 + 1.25)
    assert model.bucket_seconds([], 20) == pytest.approx(3 + 1.2 + 20 / 10)
    assert model.bucket_seconds([50, 10], 20) == pytest.approx(3 + 1.5 + 1.1 + 3.2)


@given(models)
def test_any_model_gives_usable_sizes(model: CostModel) -> None:
    assert 1 <= model.pack_bytes <= 2 * model.segment_bytes
    assert model.bucket_bytes >= 0
    assert model.bucket_seconds([10_000, 123], 77) > 0
    assert CostModel.from_json(model.to_json()) == model


@given(models, st.lists(st.integers(0, 10**7), max_size=60))
def test_any_model_plans_every_leaf_once(model: CostModel, counts: list[int]) -> None:
    leaves = tuple(LeafSpec(f"[{i}]", (n,), "float32", i) for i, n in enumerate(counts))
    schedule = planner.make_schedule(leaves, op="mean", size=2, costs=model)
    found = sorted(i for bucket in schedule.buckets for i in bucket.leaves)
    assert found == list(range(len(leaves)))


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:40],
        lambda text: "",
        lambda text: text.replace('"format": 1', '"format": 9'),
        lambda text: text.replace(f'"call": {DEFAULT.call}', '"call": -1'),
        lambda text: text.replace(str(DEFAULT.curve[0][1]), "NaN"),
        lambda text: text.replace('"segment_bytes": 1048576', '"segment_bytes": 1'),
        lambda text: text.replace('"curve"', '"curves"'),
        lambda text: "[" + text + "]",
    ],
)
def test_a_damaged_profile_is_refused_and_kept(
    damage: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "profile.json"
    text = damage(DEFAULT.to_json())
    assert text != DEFAULT.to_json()
    path.write_text(text)
    monkeypatch.setenv(costmodel.PROFILE_VARIABLE, str(path))
    with pytest.raises(InvalidOptionError, match=r"profile\.json.*jaxcomm tune"):
        costmodel.find_profile("key")
    assert path.read_text() == text


def test_where_profiles_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(costmodel.PROFILE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert costmodel.find_profile("key") is DEFAULT
    path = costmodel.profile_path("key")
    assert path is not None
    costmodel.save_profile(SLOW_NETWORK, path)
    assert costmodel.find_profile("key") == SLOW_NETWORK
    assert [p.name for p in path.parent.iterdir()] == ["key.json"]
    monkeypatch.setenv(costmodel.PROFILE_VARIABLE, "off")
    assert costmodel.find_profile("key") is DEFAULT
    monkeypatch.setenv(costmodel.PROFILE_VARIABLE, str(tmp_path / "none.json"))
    with pytest.raises(InvalidOptionError, match=r"JAXCOMM_PROFILE=.*none\.json"):
        costmodel.find_profile("key")


def test_topology_names_what_matters() -> None:
    one = costmodel.topology("mpi", "Open MPI v5", [2, 2])
    assert one == costmodel.topology("mpi", "Open MPI v5", [2, 2])
    others = {
        costmodel.topology("mpi", "Open MPI v5", [1, 1]),
        costmodel.topology("mpi", "Open MPI v4", [2, 2]),
        costmodel.topology("mpi4jax", "Open MPI v5", [2, 2]),
        costmodel.topology("mpi", "Open MPI v5", [4, 4, 4, 4]),
    }
    assert len(others | {one}) == 5


SHAPES = {
    "kernel": {"shape": [1000, 1000]},
    "layers": [{"shape": [10], "dtype": "bfloat16"}, {"shape": []}],
}


def test_plan_command(tmp_path: Path) -> None:
    shapes, plot = tmp_path / "shapes.json", tmp_path / "plan.png"
    shapes.write_text(json.dumps(SHAPES))
    table = command("plan", "--shapes", str(shapes), "-n", "8", "--plot", str(plot))
    assert "3 leaves, 4,000,024 bytes, 3 buckets, 8 ranks" in table.stdout
    assert "['kernel']" in table.stdout and " us " in table.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    profile = tmp_path / "profile.json"
    costmodel.save_profile(SLOW_NETWORK, profile)
    both = [
        json.loads(command("plan", "--shapes", str(shapes), "--json", *extra).stdout)
        for extra in ([], ["--profile", str(profile)])
    ]
    assert both[1]["costs"]["source"] == "slow network"
    slow, fast = (sum(b["predicted_us"] for b in one["buckets"]) for one in both[::-1])
    assert slow > fast
    assert both[0]["fingerprint"] != both[1]["fingerprint"]


def test_plan_command_of_a_function(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jaxcomm", "plan", "benchmarks.common.trees:resnet50"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "161 leaves, 102,228,128 bytes" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "either MODULE:FUNCTION or --shapes"),
        (["trees"], "MODULE:FUNCTION"),
        (["no_such_module:f"], "no_such_module"),
        (["--shapes", "nowhere.json"], "nowhere.json"),
        (["--shapes", "{bad}"], "['layers'][1].*shape"),
        (["--shapes", "{good}", "--bucket-bytes", "-1"], "bucket_bytes=-1"),
        (["--shapes", "{good}", "--groups", "0"], "groups=0"),
        (["--shapes", "{good}", "--op", "average"], "op='average'"),
        (["--shapes", "{good}", "--wire-dtype", "float16"], "['layers'][0]"),
        (["--shapes", "{good}", "--profile", "nowhere.json"], "nowhere.json"),
    ],
)
def test_plan_command_refuses(tmp_path: Path, arguments: list[str], says: str) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(SHAPES))
    bad.write_text(json.dumps({"layers": [{"shape": [1]}, {"shape": [-3]}]}))
    filled = [a.format(good=good, bad=bad) for a in arguments]
    line = [sys.executable, "-m", "jaxcomm", "plan", *filled]
    done = subprocess.run(
        line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    for part in says.split(".*"):
        assert part in done.stderr


USES_PROFILE = """
import jax.numpy as jnp, jaxcomm
comm = jaxcomm.init()
schedule = jaxcomm.plan([jnp.ones(3)])
assert dict(schedule.options)["costs"] == comm.costs.source == comm.topology
assert len(set(comm.all_gather_object(schedule.to_json()))) == 1
assert float(jaxcomm.all_reduce(jnp.ones(300_000), op="sum")[7]) == comm.size
"""


def test_tune_writes_a_profile_that_later_jobs_use(
    tmp_path: Path, job: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    plot = tmp_path / "tune.png"
    env = {"XDG_CACHE_HOME": str(tmp_path)}
    line = ["tune", "-n", "2", "--repeats", "1", "--json", "--plot", str(plot)]
    done = subprocess.run(
        [sys.executable, "-m", "jaxcomm", *line],
        cwd=ROOT,
        env=clean_environment(env),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    model = CostModel.from_json(Path(found["profile"]).read_text())
    assert model.source == found["source"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    used = job(2, USES_PROFILE, env={**env, costmodel.PROFILE_VARIABLE: ""})
    assert used.returncode == 0, used.stderr
    # A damaged profile ends the job with its name, on every rank alike.
    Path(found["profile"]).write_text("{")
    ended = job(2, USES_PROFILE, env={**env, costmodel.PROFILE_VARIABLE: ""})
    assert ended.returncode != 0
    assert found["profile"] in ended.stderr


def clean_environment(added: dict[str, str]) -> dict[str, str]:
    import os

    return {
        **{k: v for k, v in os.environ.items() if k != costmodel.PROFILE_VARIABLE},
        **added,
    }


def test_tuning_one_rank_says_how() -> None:
    done = command("tune", code=1)
    assert "jaxcomm tune -n 2" in done.stderr


def test_profiles_decide_schedules() -> None:
    leaves = tuple(LeafSpec(f"[{i}]", (40_000,), "float32", i) for i in range(64))
    plans = {
        planner.make_schedule(leaves, op="mean", size=2, costs=model).fingerprint
        for model in (DEFAULT, SLOW_NETWORK, dataclasses.replace(DEFAULT, source="x"))
    }
    assert len(plans) == 3


def test_small_buckets_are_doubled_between_hosts_and_large_ones_are_not() -> None:
    for model in (costmodel.BETWEEN_HOSTS, SLOW_NETWORK):
        for hosts in (4, 8, 64, 4608):
            assert model.algorithm(8, hosts) == "doubling", hosts
            assert model.algorithm(1 << 30, hosts) == "pairwise", hosts
        # One exchange of all there is.
        assert {model.algorithm(8 << k, 2) for k in range(28)} == {"doubling"}
    small = costmodel.BETWEEN_HOSTS.between_hosts_seconds("doubling", 8, 4096)
    assert small < 14 * costmodel.BETWEEN_HOSTS.curve[0][1]
