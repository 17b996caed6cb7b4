"""The STEMDL classifier: labels, split, patterns, scores, and ranks against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ase import Atoms
from click.testing import CliRunner

from stemdl.classification import classify, data, scores, space_groups, training
from stemdl.classification.network import NETWORKS
from stemdl.data.dataset import CacheError
from stemdl.physics import crystals
from stemdl.physics.optics import Optics
from stemdl.physics.symmetry import space_group
from stemdl.training import parameters
from tests.jobs import ROOT, launch_ranks

COMMAND = ("-m", "stemdl", "classify")
CONFIG = data.PatternConfig(train=16, test=8)
TINY = ("--samples", "16", "--test-samples", "8", "--network", "toy", "--steps", "5")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with CONFIG's patterns, simulated as three ranks would."""
    folder = tmp_path_factory.mktemp("patterns")
    for rank in range(3):
        assert list(data.ensure(CONFIG, folder, rank, 3))[-1] == 1.0
    return folder


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("Cu", 225),
        ("Si", 227),
        ("Fe", 229),
        ("Mg", 194),
        ("NaCl", 225),
        ("ZnS", 216),
        ("CsCl", 221),
        ("CaF2", 225),
        ("SrTiO3", 221),
        ("ZnO", 186),
    ],
)
def test_space_groups_are_those_of_the_textbook(name: str, number: int) -> None:
    assert space_group(crystals.crystals()[name]) == number


def test_a_cell_that_is_no_crystal_is_named() -> None:
    twice = Atoms("Cu2", positions=np.zeros((2, 3)), cell=[3, 3, 3], pbc=True)
    with pytest.raises(ValueError, match=r"space group of Cu2.*check its cell"):
        space_group(twice)


def test_every_group_is_trained_on_and_tested_and_no_material_is_both() -> None:
    train, test = space_groups.materials(False), space_groups.materials(True)
    assert train.keys() == test.keys() == set(space_groups.present())
    assert space_groups.present() == (136, 186, 194, 216, 221, 225, 227, 229)
    seen = {name for names in train.values() for name in names}
    unseen = {name for names in test.values() for name in names}
    assert not seen & unseen and unseen == space_groups.HELD_OUT
    # What the reconstruction never sees is not seen here either.
    assert set(crystals.HELD_OUT) < unseen
    # The only ones of groups 141, 167 and 205.
    alone = {"TiO2 anatase", "Al2O3", "FeS2"}
    assert alone == set(crystals.crystals()) - seen - unseen
    assert {space_group(crystals.crystals()[n]) for n in alone} == {
        141,
        167,
        205,
    }


def test_samples_go_round_groups_and_materials() -> None:
    config = data.PatternConfig(train=160, test=80)
    kinds = [config.kind(index) for index in range(config.samples)]
    for rows, held_out in ((kinds[:160], False), (kinds[160:], True)):
        numbers = [number for number, _ in rows]
        assert {numbers.count(n) for n in space_groups.present()} == {len(rows) // 8}
        for number, name in rows:
            assert name in space_groups.materials(held_out)[number]
    assert len(set(kinds)) == len(crystals.crystals()) - 3


def test_log_scaling() -> None:
    intensity = np.array([0, data.FLOOR, 1e-3, 1], np.float32)
    scaled = data.log_scaled(intensity)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, np.log([1, 2, 1001, 1_000_001]), rtol=1e-6)


def test_a_sample_is_the_same_whoever_simulates_it(cache: Path) -> None:
    train, test = data.load(CONFIG, cache)
    assert train.x.shape == (16, 3, 43, 43) and test.x.shape == (8, 3, 43, 43)
    assert train.x.dtype == np.float32 and train.y.dtype == np.int32
    assert (train.x.mean(), train.x.std()) == pytest.approx((0, 1), abs=1e-4)
    assert [(y, name) for y, name in zip(train.y, train.material, strict=True)] == [
        CONFIG.kind(index) for index in range(16)
    ]
    index = 18  # a held-out one
    pattern = data.simulate_sample(CONFIG, index)
    # No more than the beam, and most of it.
    assert np.all((pattern.sum((-2, -1)) > 0.8) & (pattern.sum((-2, -1)) < 1.001))
    scaled = data.log_scaled(pattern)
    line = np.polyfit(scaled.ravel(), test.x[index - 16].ravel(), 1)
    np.testing.assert_allclose(np.polyval(line, scaled), test.x[2], atol=1e-4)


@pytest.mark.parametrize(
    ("zone", "spacing"), [((0, 0, 1), 3.615 / 2), ((1, 1, 1), 3.615 / 3**0.5)]
)
def test_a_zone_may_be_given(zone: tuple[int, int, int], spacing: float) -> None:
    """Atoms of fcc copper lie in planes across the beam, so far apart."""
    cut = crystals.cut("Cu", np.random.default_rng(0), 16.0, zone)

    def order(period: float) -> float:
        return abs(np.exp(2j * np.pi * cut.positions[:, 2] / period).mean())

    assert order(spacing) > 0.9 > 0.5 > order(1.1 * spacing)


def test_bad_caches_and_configurations_are_named(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"simulate it with .*stemdl classify"):
        data.load(CONFIG, tmp_path)
    for part in range(data.PARTS):
        path = CONFIG.path(cache, part)
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = CONFIG.path(tmp_path, 3)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(CacheError, match=rf"{path.name} is not a readable.*delete it"):
        data.load(CONFIG, tmp_path)
    path.write_bytes(CONFIG.path(cache, 4).read_bytes())
    with pytest.raises(CacheError, match=rf"{path.name} holds other.*found part 4 of"):
        data.load(CONFIG, tmp_path)
    with pytest.raises(ValueError, match=r"optics\.probes=4.*give 1"):
        data.PatternConfig(optics=Optics())
    with pytest.raises(ValueError, match=r"train=0, test=280: give one"):
        data.PatternConfig(train=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch", "49"), "--batch 49 exceeds the 48 training patterns"),
        (("--lr", "0"), "'--lr': 0.0 is not in the range"),
        (("--network", "resnet50"), "'--network': 'resnet50' is not one of"),
    ],
)
def test_bad_options_are_named(options: tuple[str, ...], message: str) -> None:
    done = CliRunner().invoke(classify.main, [*TINY, "--backend", "pmap", *options])
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def test_scores() -> None:
    truth = np.array([225, 225, 216, 216])
    found = scores.score(truth, np.array([225, 227, 216, 225]))
    # F1 of 216: 2 / 3, of 225: 1 / 2. Nothing here is a 227.
    assert found == pytest.approx({"top1": 0.5, "macro_f1": (2 / 3 + 1 / 2) / 2})
    logits = np.zeros((4, 3, space_groups.OUTPUTS))
    logits[:, 0, 227] = 1
    logits[np.arange(4), 1, truth] = logits[np.arange(4), 2, truth] = 0.6
    scored = scores.score_logits(logits, truth)
    # The mean over projections decides, and the first of them is outvoted.
    assert scored["top1"] == 1
    assert scored["top1_of_each_projection"] == [0, 1, 1]
    train = np.array([225, 216, 216])
    majority = scores.most_frequent(train, truth)
    assert majority == pytest.approx({"top1": 0.5, "macro_f1": 1 / 3})


def test_the_forest_tells_what_radii_tell() -> None:
    rng = np.random.default_rng(0)
    distance = np.hypot(*(np.indices((9, 9)) - 4))
    y = np.array([225, 216] * 10, np.int32)
    x = np.exp(-((distance[None, None] - y[:, None, None, None] % 5) ** 2) / 2)
    x = np.repeat(x, 3, 1) + 0.1 * rng.normal(size=(20, 3, 9, 9))
    assert scores.radial_forest(x[:10], y[:10], x[10:], y[10:])["top1"] == 1
    flat = np.broadcast_to(x.mean((0, 1)), x.shape)
    assert scores.radial_forest(flat[:10], y[:10], flat[10:], y[10:])["top1"] == 0.5
    rings = scores.radial_profiles(distance)
    np.testing.assert_allclose(rings, np.arange(4), atol=0.25)


def test_resnet18_is_the_published_one_but_for_stem_and_outputs() -> None:
    x = jax.ShapeDtypeStruct((1, 43, 43), np.float32)
    shapes = jax.eval_shape(NETWORKS["resnet18"].init, jax.random.key(0), x)["params"]
    leaves = jax.tree.leaves(shapes)
    # torchvision's resnet18 has 62 parameters too, 11,689,512 elements in all.
    stem, outputs = (49 * 3 - 9) * 64, (1000 - space_groups.OUTPUTS) * 513
    assert len(leaves) == 62
    assert sum(leaf.size for leaf in leaves) == 11_689_512 - stem - outputs


def test_the_rate_goes_by_the_global_batch() -> None:
    gradient: Any = {"w": np.ones(1, np.float32)}

    def first_update(batch: int) -> float:
        tx = training.optimizer(1e-3, batch, 1000)
        updates: Any = tx.update(gradient, tx.init(gradient), gradient)[0]
        return float(updates["w"][0])

    # At 32 a rank: 1e-3 times the ranks, after a warm-up of 100 steps. The decay adds
    # WEIGHT_DECAY of the weight, 1, to Adam's own 1.
    for ranks in (1, 4):
        wanted = -ranks * 1e-3 / 100 * (1 + training.WEIGHT_DECAY)
        assert first_update(32 * ranks) == pytest.approx(wanted, rel=1e-4)


OPTIONS = (*TINY, "--batch", "8", "--float64")


def on_ranks(ranks: int, cache: Path, out: Path) -> dict[str, Any]:
    done = launch_ranks(ranks, [*COMMAND, *OPTIONS, "--data", cache, "--out", out])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((out / "classify.json").read_text())


@pytest.fixture(scope="module")
def on_two_ranks(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two")
    on_ranks(2, cache, out)
    return out


def assert_same_training(one: Path, two: Path) -> None:
    reports = [json.loads((path / "classify.json").read_text()) for path in (one, two)]
    losses = [report["losses"] for report in reports]
    assert len(set(losses[0])) == 5
    np.testing.assert_allclose(*losses, rtol=1e-10)
    difference = parameters.max_relative_difference(
        one / "params.npz", two / "params.npz"
    )
    assert difference < 1e-10


@pytest.mark.thorough
def test_two_ranks_train_as_one_device(
    on_two_ranks: Path, cache: Path, tmp_path: Path
) -> None:
    # In this process, which has imported everything: a launch would cost ten seconds.
    arguments = [*OPTIONS, "--backend", "pmap", "--data", cache, "--out", tmp_path]
    try:
        classify.main.main([str(a) for a in arguments], standalone_mode=False)
    finally:
        jax.config.update("jax_enable_x64", False)
    assert_same_training(tmp_path, on_two_ranks)
    alone = json.loads((tmp_path / "classify.json").read_text())
    together = json.loads((on_two_ranks / "classify.json").read_text())
    assert (alone["ranks"], together["ranks"]) == (1, 2)
    assert alone["schedule"] is None
    planned = together["schedule"]
    # Each normalisation reduces once forward and once backward, and then the loss.
    assert together["gradients"] == 11
    assert planned["leaves"] == 11 + 2 * 3 + 1
    assert 1 <= planned["buckets_with_gradients"] < planned["buckets"]
    assert (on_two_ranks / "confusion.png").stat().st_size > 10_000
    assert together["chance"] == pytest.approx(1 / 8)
    assert set(together["held_out"]) <= space_groups.HELD_OUT


@pytest.mark.thorough
def test_one_rank_and_two_devices_train_alike(
    on_two_ranks: Path, cache: Path, tmp_path: Path
) -> None:
    on_ranks(1, cache, tmp_path / "rank")
    assert_same_training(tmp_path / "rank", on_two_ranks)
    devices = "--xla_force_host_platform_device_count=2"
    flags = f"{os.environ['XLA_FLAGS']} {devices}"
    command = [sys.executable, *COMMAND, *OPTIONS, "--backend", "pmap"]
    command += ["--data", cache, "--out", tmp_path / "devices"]
    environment = os.environ | {"XLA_FLAGS": flags}
    subprocess.run(command, env=environment, check=True, timeout=120, cwd=ROOT)
    assert_same_training(tmp_path / "devices", on_two_ranks)
