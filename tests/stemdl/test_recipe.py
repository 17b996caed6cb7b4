"""The STEMDL example's network and recipe: shapes, formulas, configuration, ranks."""

from __future__ import annotations

import math
import types
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomm.simulate import networks
from stemdl import config
from stemdl.config import Config, Network, Optimizer, Schedule
from stemdl.data import augmentation, dataset
from stemdl.data.cache import data_config
from stemdl.model import losses
from stemdl.model.network import NETWORKS, StemNet, scope_of, scopes
from stemdl.training import optimizer, recipe, train
from stemdl.training.precision import LossScale
from tests.jobs import ROOT, launch_ranks


def shapes(model: StemNet, scan: int, detector: int) -> tuple[Any, tuple[int, ...]]:
    """Shapes of parameters and output, without memory for either."""
    x = jax.ShapeDtypeStruct((1, scan, scan, detector, detector), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    return variables["params"], jax.eval_shape(model.apply, variables, x).shape


def test_summit_is_the_network_of_the_run_leaf_for_leaf() -> None:
    params, output = shapes(NETWORKS["summit"], 32, 512)
    leaves = jax.tree.leaves(params)
    assert (len(leaves), sum(leaf.size for leaf in leaves)) == (33, 232_794_112)
    assert output == (1, 512, 512)
    # The simulator's list of the same network was written for itself.
    wanted = networks.shapes(networks.stemdl())
    assert sorted(leaf.shape for leaf in leaves) == sorted(wanted.values())
    sizes = {
        scope: sorted(math.prod(shape) for shape in layer_shapes)
        for scope, layer_shapes in grouped(networks.stemdl()).items()
    }
    ours: dict[str, list[int]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        scope = scope_of(jax.tree_util.keystr(path))
        assert scope is not None
        ours.setdefault(scope, []).append(leaf.size)
    assert len(ours) == 15 == len(scopes(params))
    assert sorted(map(sorted, ours.values())) == sorted(sizes.values())


def grouped(layers: list[networks.Layer]) -> dict[str, list[tuple[int, ...]]]:
    found: dict[str, list[tuple[int, ...]]] = {}
    for layer in layers:
        found.setdefault(layer.scope, []).extend(layer.leaves.values())
    return found


@pytest.mark.parametrize(
    ("name", "scan", "detector", "millions"),
    [("tiny", 4, 32, 0.10), ("small", 8, 64, 0.41), ("medium", 8, 128, 15.2)],
)
def test_smaller_networks_differ_in_sizes_alone(
    name: str, scan: int, detector: int, millions: float
) -> None:
    model = recipe.build(Network(name=name, layout="probes"), detector)
    params, output = shapes(model, scan, detector)
    leaves = jax.tree.leaves(params)
    assert (len(leaves), len(scopes(params))) == (33, 15)
    assert sum(leaf.size for leaf in leaves) / 1e6 == pytest.approx(millions, rel=0.02)
    assert output == (1, detector, detector)
    # freq2space adds a kernel and a bias, in a scope of their own.
    params, output = shapes(recipe.build(Network(name=name), 8 * scan), scan, 25)
    assert (len(jax.tree.leaves(params)), len(scopes(params))) == (35, 16)
    assert output == (1, 8 * scan, 8 * scan)


def test_the_published_layout_keeps_the_symmetries_of_the_square() -> None:
    x = np.random.default_rng(0).normal(size=(1, 2, 2, 5, 5)).astype(np.float32)
    model = StemNet(layout="probes", pixels=8)

    def image(patterns: np.ndarray) -> np.ndarray:
        found = model.apply({}, jnp.asarray(patterns), method="_image")
        return np.asarray(found)[0].transpose(2, 0, 1)

    for symmetry in range(augmentation.SYMMETRIES):
        # The detector's axes look to it like a label's.
        turned = augmentation.transform_label(x, symmetry)
        wanted = augmentation.transform_label(image(x), symmetry)
        np.testing.assert_allclose(image(turned), wanted, rtol=1e-5, atol=1e-6)


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pixels=20.*multiple of 8"):
        shapes(NETWORKS["tiny"].clone(pixels=20, layout="probes"), 4, 25)
    with pytest.raises(ValueError, match=r"layout='fourier'; use one of freq2space"):
        shapes(NETWORKS["tiny"].clone(pixels=32, layout="fourier"), 4, 25)


def test_checkpointing_changes_memory_and_not_the_network() -> None:
    plain: Any = StemNet(growth=2, layers=(1, 2, 1))
    x = jax.ShapeDtypeStruct((1, 4, 4, 9, 9), np.float32)
    trees, convolutions = [], []
    for model in (plain, plain.clone(checkpoint=True)):
        trees.append(jax.eval_shape(model.init, jax.random.key(0), x))
        gradient = jax.grad(lambda p, x, m=model: jnp.sum(m.apply(p, x)))
        program = str(jax.make_jaxpr(gradient)(trees[-1], x))
        convolutions.append(program.count("conv_general_dilated["))
    # Parameters are drawn by their names, so that they are the same ones.
    assert trees[0] == trees[1]
    # A block's last layer is followed by another: the first is computed once more.
    assert convolutions[1] > convolutions[0]


def test_losses() -> None:
    rng = np.random.default_rng(0)
    predicted, labels = rng.normal(size=(2, 3, 4, 4)).astype(np.float32)
    d = (predicted - labels).reshape(3, -1)
    pairs = (d[:, :, None] - d[:, None, :]) ** 2
    wanted = {
        "mse": (d**2).mean(),
        "mae": np.abs(d).mean(),
        "pairwise": pairs.sum() / (3 * 16 * 15),
        "huber": np.where(np.abs(d) < 0.5, d**2 / 2, 0.5 * (np.abs(d) - 0.25)).mean(),
    }
    assert set(wanted) == set(losses.NAMES)
    for name, value in wanted.items():
        loss = losses.named(name, huber_delta=0.5)
        assert float(loss(predicted, labels)) == pytest.approx(value, rel=1e-5), name
    down, across = (np.diff(predicted - labels, axis=axis) for axis in (1, 2))
    rough = losses.named("mse", gradient_weight=2.0)(predicted, labels)
    more = 2 * ((down**2).mean() + (across**2).mean())
    assert float(rough) == pytest.approx(wanted["mse"] + more, rel=1e-4)
    offset = losses.pairwise(predicted + 3, labels)
    assert float(offset) == pytest.approx(wanted["pairwise"], rel=1e-4)


@pytest.mark.parametrize("clip_to", [None, 0.1])
def test_larc_goes_by_scopes(clip_to: float | None) -> None:
    def full(count: int, value: float) -> np.ndarray:
        return np.full(count, value, np.float32)

    params = {
        "Conv_0": {"bias": full(1, 3.0), "kernel": full(2, 4.0)},
        "DenseBlock_0": {"Conv_0": {"kernel": full(4, 0.001)}},
        "DenseBlock_1": {"Conv_0": {"kernel": full(4, 0)}},
    }
    grads = jax.tree.map(np.ones_like, params)
    rate = None if clip_to is None else optax.constant_schedule(clip_to)
    tx = optimizer.scale_by_larc(0.02, 1e-6, rate)
    scaled: Any = tx.update(grads, tx.init(params), params)[0]
    first = 0.02 * math.sqrt(9 + 2 * 16) / math.sqrt(3) / (clip_to or 1)
    second = 0.02 * 0.002 / 2 / (clip_to or 1)
    for leaf in scaled["Conv_0"].values():
        np.testing.assert_allclose(leaf, min(first, 1), rtol=1e-5)
    np.testing.assert_allclose(
        scaled["DenseBlock_0"]["Conv_0"]["kernel"], second, rtol=1e-5
    )
    np.testing.assert_allclose(
        scaled["DenseBlock_1"]["Conv_0"]["kernel"], 1e-7, rtol=1e-5
    )


def test_learning_rates() -> None:
    staircase = Schedule(
        name="staircase", warm_up_steps=10, times_ranks=True, decay_steps=5
    )
    rate = optimizer.learning_rate(Optimizer(lr=0.01), staircase, 100, 8)
    found = [np.asarray(rate(step)) for step in (0, 5, 10, 14, 15, 20)]
    assert found == pytest.approx([0.008, 0.044, 0.08, 0.08, 0.04, 0.02], rel=1e-5)
    capped = optimizer.learning_rate(Optimizer(lr=0.01), staircase, 100, 27_600)
    assert np.asarray(capped(10)) == pytest.approx(1)
    # What the demo has always trained with, whatever the number of ranks.
    rate = optimizer.learning_rate(Optimizer(), Schedule(), 1600, 2)
    found = [np.asarray(rate(step)) for step in (0, 30, 1600)]
    assert found == pytest.approx([1e-4, 3e-3, 6e-5], rel=1e-5)


def test_the_loss_scale_backs_off_and_grows() -> None:
    scale = LossScale(jnp.float32(4), jnp.int32(0), jnp.int32(0))
    seen = []
    for finite in (False, True, True, True, False, False, False, False):
        scale = scale.after(jnp.bool_(finite), growth_interval=2)
        seen.append((float(scale.scale), int(scale.clean), int(scale.skipped)))
    assert [value for value, _, _ in seen] == [2, 2, 4, 4, 2, 1, 1, 1]
    assert [clean for _, clean, _ in seen] == [0, 1, 0, 1, 0, 0, 0, 0]
    assert seen[-1][2] == 5


def test_scopes_by_any_of_a_leafs_names() -> None:
    for path in (
        "['DenseBlock_3']['Conv_0']['kernel']",
        "['params']['DenseBlock_3']['Conv_0']['kernel']",
        "[0].params['DenseBlock_3']['Conv_0']['kernel']",
    ):
        assert scope_of(path) == "DenseBlock_3"
    assert scope_of("normalization.py:128 (maybe_distributed_mean)") is None
    assert scope_of("[0].batch_stats['TransitionDown_0']['mean']") is None
    with pytest.raises(ValueError, match="is not a parameter"):
        scopes({"step": np.zeros(())})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optimiser]\nlr = 1.0", r"optimiser\.lr is in no section.*optimizer"),
        ("[optimizer]\nrate = 1.0", r"optimizer\.rate is unknown; .*lr, momentum"),
        ("[optimizer]\nlr = 'high'", r"optimizer\.lr='high' is of type str; .*float"),
        ("[training]\nbatch = 2.5", r"training\.batch=2\.5 is of type float; .*int"),
        ("[training]\nfloat64 = 1", r"training\.float64=1 is of type int; .*bool"),
        ("[training]\nbatch = true", r"training\.batch=True is of type bool"),
        ("[optimizer]\nlr = -1.0", r"optimizer\.lr=-1\.0; .* from 0 to 10"),
        ("[optimizer]\nlr = nan", r"optimizer\.lr=nan; give a number"),
        ("[loss]\nname = 'l2'", r"loss\.name='l2'; use one of mse, pairwise"),
        ("lr = 1.0", r"lr is outside a section; the sections are training"),
        ("[training\n", "is no readable TOML file"),
        ("[training]\naccumulate = 3", r"accumulate=3 does not divide .*batch=16"),
        ("[training]\nsamples = 3", r"default: training\.batch=16 exceeds .*=3"),
        (
            "[training]\nfloat64 = true\n[precision]\ncompute = 'float16'",
            r"precision\.compute='float16' contradicts training\.float64",
        ),
    ],
)
def test_what_a_file_gets_wrong_is_named(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(config.SettingError, match=message) as caught:
        config.load(path)
    assert str(caught.value).startswith(("default", str(path)))


def test_what_overrides_what(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("[training]\nsteps = 5\nbatch = 8\nseed = 3\n")
    sets = ["training.batch=12", "loss.name=huber", "optimizer.lr=1"]
    resolved = config.load(path, sets, {"training.seed": 4})
    training = resolved.training
    assert (training.steps, training.batch, training.seed) == (5, 12, 4)
    assert (resolved.loss.name, resolved.optimizer.lr) == ("huber", 1.0)
    assert resolved.network == Config().network
    path.write_text(resolved.to_toml())
    assert config.load(path) == resolved
    with pytest.raises(config.SettingError, match=r"--set loss=mae: loss is unknown"):
        config.load(None, ["loss=mae"])
    with pytest.raises(config.SettingError, match=r"write section\.key=value"):
        config.load(None, ["loss"])


def test_what_does_not_go_with_the_ranks_or_backend() -> None:
    def check(name: str, size: int, *assignments: str) -> None:
        backend: Any = types.SimpleNamespace(name=name, size=size)
        train._check(config.load(None, assignments), backend)

    check("jaxcomm", 4, "training.accumulate=4", "communication.groups=scopes")
    check("pmap", 2, "training.accumulate=4")
    with pytest.raises(click.UsageError, match=r"batch 16 does not divide over 3"):
        check("jaxcomm", 3)
    with pytest.raises(click.UsageError, match=r"over 4 .* in 8 parts each"):
        check("jaxcomm", 4, "training.accumulate=8")
    with pytest.raises(click.UsageError, match=r"\[communication\] .* --backend pmap"):
        check("pmap", 2, "communication.wire_dtype=float16")


def test_the_recipes_that_come_along_are_valid() -> None:
    files = list((ROOT / "examples" / "stemdl" / "recipes").glob("*.toml"))
    assert files
    for path in files:
        config.load(path)


@pytest.mark.timeout(300)
def test_on_two_ranks(tmp_path: Path) -> None:
    """All that needs ranks, in one job: see recipe_ranks.py."""
    wanted, rng = data_config(8), np.random.default_rng(0)
    probes, pixels = wanted.optics.probes, wanted.optics.label_pixels
    x = rng.random((wanted.samples, probes, probes, 25, 25), np.float32)
    y = rng.normal(size=(wanted.samples, pixels, pixels)).astype(np.float32)
    y[3, 5, 5] = np.nan
    names = np.array([wanted.material(k) for k in range(wanted.samples)])
    arrays = {"amplitudes": x, "labels": y, "material": names}
    dataset.save(wanted, arrays, tmp_path)
    text = '[training]\nsamples = 8\nbatch = 4\n[network]\nname = "toy"\n'
    (tmp_path / "recipe.toml").write_text(text + '[communication]\ngroups = "scopes"\n')
    program = ["-m", "tests.stemdl.recipe_ranks", tmp_path]
    done = launch_ranks(2, program, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    for check in (
        "overflow_on_one_rank_skips_on_both",
        "accumulation_equals_one_large_batch",
        "groups_and_wire",
        "accumulation_with_batch_statistics_and_larc",
    ):
        assert done.stdout.count(f"passed {check}") == 2, check

    # Sample 3 has a pixel that is no number, and a loss that is none on both ranks.
    out = tmp_path / "out"
    kept = sorted(out.glob("nonfinite-*.npz"))
    assert len(kept) == 2 and done.stdout.count(": the loss of step") == 2
    found = []
    for rank, path in enumerate(kept):
        with np.load(path) as batch:
            step, samples = int(batch["step"]), batch["samples"].tolist()
            bad = ~np.isfinite(batch["labels"]).all((-2, -1))
            assert batch["patterns"].shape == (2, probes, probes, 25, 25)
        assert path.name == f"nonfinite-step{step}-rank{rank}.npz"
        # Each tells all: the first that ends takes the others with it.
        assert done.stdout.count(f"rank {rank} had samples {samples}") == 2
        found += [sample for sample, is_bad in zip(samples, bad, strict=True) if is_bad]
    assert found == [3] and "of these [3] hold infinite" in done.stdout

    resolved = config.load(out / "config.toml")
    assert (resolved.training.steps, resolved.training.accumulate) == (12, 2)
    assert resolved.network.name == "toy"
    assert '"jaxcomm"' in (out / "versions.json").read_text()
    # The real network's gradients, in a bucket for each scope.
    schedule = (out / "schedule.txt").read_text()
    for scope in ("Conv_0", "TransitionDown_0", "DenseBlock_2", "ConvTranspose_0"):
        assert schedule.count(f"  {scope}\n") == 1, schedule
