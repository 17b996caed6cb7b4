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

from stemdl.classification import (
    classify,
    data,
    network,
    scores,
    space_groups,
    training,
)
from stemdl.classification.network import NETWORKS
from stemdl.data import augmentation
from stemdl.data.dataset import CacheError
from stemdl.physics import crystals, prototypes
from stemdl.physics.symmetry import space_group
from stemdl.training.backends import Devices
from tests.jobs import ROOT, launch_ranks

COMMAND = ("-m", "stemdl", "classify")
GROUPS = (136, 223)
CONFIG = data.PatternConfig(groups=GROUPS, materials=10, repeats=1)
TINY = (
    *("--group", "136", "--group", "223", "--materials", "10", "--repeats", "1"),
    *("--network", "toy", "--steps", "5"),
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with CONFIG's patterns, simulated as two ranks would."""
    folder = tmp_path_factory.mktemp("patterns")
    for rank in range(2):
        assert list(data.ensure(CONFIG, folder, rank, 2)) == [1.0]
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


def test_classes_of_space_groups() -> None:
    for number, system, laue, point in (
        (14, "monoclinic", "2/m", "2/m"),
        (62, "orthorhombic", "mmm", "mmm"),
        (122, "tetragonal", "4/mmm", "-42m"),
        (152, "trigonal", "-3m", "32"),
        (187, "hexagonal", "6/mmm", "-62m"),
        (198, "cubic", "m-3", "23"),
        (216, "cubic", "m-3m", "-43m"),
    ):
        assert space_groups.crystal_system(number) == system
        assert space_groups.laue_class(number) == laue
        # Settings of one group write its point group in two ways.
        found = space_groups.point_group(number)
        assert found in (point, {"-62m": "-6m2"}.get(point))
    assert all(space_groups.laue_class(number) for number in range(1, 231))


@pytest.mark.parametrize("rule", space_groups.RULES)
def test_a_split_has_no_material_twice(rule: str) -> None:
    for number in (194, 225, 230):
        types = [
            *(m.prototype for m in prototypes.group_materials(number, 20)),
            *([""] * 3),
        ]
        found = space_groups.split(number, types, rule)
        assert found[-3:] == ["textbook"] * 3
        assert set(found[:-3]) <= {"train", "validation", "test"}
        of_types = {
            name: {
                part for part, each in zip(found, types, strict=True) if each == name
            }
            for name in set(types) - {""}
        }
        if rule == "materials":
            # Every type is learned, and the test has two of ten materials.
            assert all("train" in parts for parts in of_types.values())
            assert (found.count("test"), found.count("validation")) == (4, 2)
        else:
            held_out = [name for name, parts in of_types.items() if "test" in parts]
            # Garnet is the only one of its group.
            assert len(held_out) == (number != 230)
            assert all(of_types[name] == {"test"} for name in held_out)


def test_textbook_crystals_are_in_groups_that_are_trained_on() -> None:
    textbook = space_groups.textbook()
    assert set(textbook) <= set(space_groups.present())
    assert sum(map(len, textbook.values())) == len(crystals.crystals())


def test_log_scaling() -> None:
    intensity = np.array([0, data.FLOOR, 1e-3, 1], np.float32)
    scaled = data.log_scaled(intensity)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, np.log([1, 2, 1001, 1_000_001]), rtol=1e-6)


def test_a_sample_is_the_same_whoever_simulates_it(cache: Path) -> None:
    parts = data.load(CONFIG, cache)
    assert {name: len(p.y) for name, p in parts.items()} == {
        "train": 14,
        "validation": 2,
        "test": 4,
        "textbook": 2,
    }
    train = parts["train"]
    assert train.x.shape == (14, 3, 43, 43)
    assert train.x.dtype == np.float32 and train.y.dtype == np.int32
    assert (train.x.mean(), train.x.std()) == pytest.approx((0, 1), abs=1e-4)
    assert parts["textbook"].material.tolist() == ["TiO2", "SnO2"]
    names = [name for part in parts.values() for name in part.material]
    assert len(set(names)) == len(names) == 22
    # The one of group 223 that is there last.
    name = train.material[-1]
    subjects = [subject for subject, _, _ in data.subjects(CONFIG, 223)]
    pattern = data.simulate_sample(CONFIG, 223, subjects.index(name), 0)
    # No more than the beam, and most of it.
    assert np.all((pattern.sum((-2, -1)) > 0.8) & (pattern.sum((-2, -1)) < 1.001))
    scaled = data.log_scaled(pattern)
    line = np.polyfit(scaled.ravel(), train.x[-1].ravel(), 1)
    # Stored in half precision.
    np.testing.assert_allclose(np.polyval(line, scaled), train.x[-1], atol=0.01)


def test_held_out_prototypes_are_not_trained_on(cache: Path) -> None:
    parts = data.load(CONFIG, cache, "prototypes")
    seen, unseen = (set(parts[name].prototype) for name in ("train", "test"))
    assert not seen & unseen and len(unseen) == len(GROUPS)


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
    for number in GROUPS:
        path = CONFIG.path(cache, number)
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = CONFIG.path(tmp_path, 136)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(CacheError, match=rf"{path.name} is not a readable.*delete it"):
        data.load(CONFIG, tmp_path)
    path.write_bytes(CONFIG.path(cache, 223).read_bytes())
    with pytest.raises(CacheError, match=rf"{path.name} holds other.*found .*223"):
        data.load(CONFIG, tmp_path)
    with pytest.raises(ValueError, match=r"materials=9, repeats=2: give 10 or more"):
        data.PatternConfig(materials=9)
    with pytest.raises(ValueError, match=r"groups=\[3\]: no prototypes; .* 225"):
        data.PatternConfig(groups=(3, 225))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch", "15"), "--batch 15 exceeds the 14 training samples"),
        (("--group", "2"), "groups=[2]: no prototypes"),
        (("--lr", "0"), "'--lr': 0.0 is not in the range"),
        (("--network", "resnet50"), "'--network': 'resnet50' is not one of"),
    ],
)
def test_bad_options_are_named(
    options: tuple[str, ...], message: str, cache: Path
) -> None:
    arguments = [*TINY, "--backend", "pmap", "--data", str(cache), *options]
    done = CliRunner().invoke(classify.main, arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def test_scores() -> None:
    truth = np.array([225, 225, 216, 216])
    found = scores.score(truth, np.array([225, 227, 216, 225]))
    # F1 of 216: 2 / 3, of 225: 1 / 2. Nothing here is a 227.
    assert found == pytest.approx({"top1": 0.5, "macro_f1": (2 / 3 + 1 / 2) / 2})
    logits = np.zeros((4, space_groups.OUTPUTS))
    logits[:, 230] = 1
    logits[np.arange(4), truth] = [2, 2, 0.5, 2]
    scored = scores.score_logits(logits, truth)
    assert (scored["top1"], scored["top5"]) == (0.75, 1)
    train = np.array([225, 216, 216])
    majority = scores.most_frequent(train, truth)
    assert majority == pytest.approx({"top1": 0.5, "macro_f1": 1 / 3})


def test_baselines_tell_what_radii_tell() -> None:
    rng = np.random.default_rng(0)
    distance = np.hypot(*(np.indices((9, 9)) - 4))
    y = np.array([225, 216] * 10, np.int32)
    x = np.exp(-((distance[None, None] - y[:, None, None, None] % 5) ** 2) / 2)
    x = np.repeat(x, 3, 1) + 0.1 * rng.normal(size=(20, 3, 9, 9))
    flat = np.broadcast_to(x.mean((0, 1)), x.shape)
    names = np.full(20, "")

    def found(patterns: np.ndarray) -> set[float]:
        seen, unseen = (
            data.Patterns(patterns[rows], y[rows], names[rows], names[rows])
            for rows in (slice(10), slice(10, None))
        )
        figures = scores.baselines(seen, unseen, {"test": unseen})
        assert len(figures) == 4
        return {figure["test"]["top1"] for figure in figures.values()}

    assert found(x) == {1.0}
    assert found(flat) == {0.5}
    rings = scores.radial_profiles(distance)
    np.testing.assert_allclose(rings, np.arange(4), atol=0.25)


def test_errors_are_explained() -> None:
    truth = np.array([225, 225, 216, 194])
    said = scores.explain(truth, np.array([225, 229, 227, 0]))
    assert said["errors"] == 0.75
    # Both answers that are space groups are cubic ones of the Laue class m-3m.
    assert said["of_errors_right"] == pytest.approx(
        {"crystal_system": 1, "laue_class": 1, "point_group": 0.5}
    )
    assert said["of_all_pairs_right"]["crystal_system"] == pytest.approx(2 / 6)
    assert said["f1_of_group"] == pytest.approx({"194": 0, "216": 0, "225": 2 / 3})
    assert said["commonest"][0] == {
        "truth": 225,
        "taken_for": 229,
        "share": 0.5,
        "point_groups": ["m-3m", "m-3m"],
    }


def test_rings_turn_with_the_pattern() -> None:
    x, y = np.indices((21, 21)) - 10.0
    pattern = x + 2 * y
    angle = 2 * np.pi * np.arange(network.ANGLES) / network.ANGLES
    wanted = np.arange(11)[:, None] * (np.cos(angle) + 2 * np.sin(angle))
    np.testing.assert_allclose(network.rings(pattern), wanted, atol=1e-9)
    quarter = network.rings(np.rot90(pattern))
    np.testing.assert_allclose(
        quarter, np.roll(wanted, network.ANGLES // 4, -1), atol=1e-9
    )


def test_the_spectral_network_does_not_see_turns_and_mirrors() -> None:
    model = NETWORKS["toy"]
    x = np.random.default_rng(0).normal(size=(2, 3, 43, 43)).astype(np.float32)
    variables = model.init(jax.random.key(0), x)

    def logits(patterns: np.ndarray) -> np.ndarray:
        return np.asarray(model.apply(variables, patterns))

    once = logits(x)
    for symmetry in range(augmentation.SYMMETRIES):
        turned = augmentation.transform_label(x, symmetry)
        np.testing.assert_allclose(logits(turned), once, atol=1e-3)
    around = np.random.default_rng(1).normal(size=(5, network.ANGLES))
    phase = network.fourier(np.roll(around, 3, -1))
    np.testing.assert_allclose(
        np.hypot(*phase), np.hypot(*network.fourier(around)), atol=1e-9
    )
    wanted = np.fft.rfft(around)[:, : network.ORDERS] / network.ANGLES
    np.testing.assert_allclose(
        network.fourier(around), [wanted.real, wanted.imag], atol=1e-9
    )
    # Projections are told apart.
    assert np.abs(logits(x[:, ::-1]) - once).max() > 1e-2


def test_resnet18_is_the_published_one_but_for_stem_and_outputs() -> None:
    x = jax.ShapeDtypeStruct((1, 3, 43, 43), np.float32)
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
    with np.load(one / "params.npz") as first, np.load(two / "params.npz") as second:
        assert first.files == second.files
        for key in first.files:
            # Not relative to each leaf: some are zero but for rounding, such as means
            # of what a layer makes of standardised values, and Adam enlarges rounding.
            np.testing.assert_allclose(first[key], second[key], atol=1e-8, err_msg=key)


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
    assert together["gradients"] == 12
    assert planned["leaves"] == 12 + 2 * 4 + 1
    assert 1 <= planned["buckets_with_gradients"] < planned["buckets"]
    assert (on_two_ranks / "confusion.png").stat().st_size > 10_000
    assert together["materials"] == {
        "train": 14, "validation": 2, "test": 4, "textbook": 2
    }  # fmt: skip
    assert set(together["scores"]["network"]) == set(space_groups.SPLITS)


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


def test_projections_of_one_material_are_mixed() -> None:
    x = np.arange(6.0)[:, None, None, None] + np.zeros((6, 3, 5, 5))
    names = np.array(["a", "a", "a", "b", "b", "c"])
    patterns = data.Patterns(x, np.arange(6, dtype=np.int32), names, names)
    backend = Devices()
    drawn = [
        (int(i), pattern)
        for _, (batch, rows) in zip(
            range(40), training.batches(patterns, backend, 6, 0), strict=False
        )
        for pattern, i in zip(batch[0], rows[0], strict=True)
    ]
    mixed = {tuple(pattern[:, 0, 0].astype(int)) for _, pattern in drawn}
    assert len(mixed) > 20 and (5, 5, 5) in mixed
    for i, pattern in drawn:
        assert {names[int(value)] for value in pattern.flat} == {names[i]}
