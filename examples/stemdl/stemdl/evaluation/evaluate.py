"""Score a trained network on materials it has never seen, and draw what it sees.

python -m stemdl evaluate --run out/stemdl --out out/stemdl/evaluation
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np

from jaxcomm import terminal
from stemdl import config
from stemdl.config import Config
from stemdl.data import augmentation, loading, manifest
from stemdl.data.cache import data_config, data_option
from stemdl.data.dataset import CacheError, DataConfig, Dataset, load
from stemdl.evaluation import baselines, figures, report
from stemdl.evaluation.baselines import Predictor
from stemdl.evaluation.metrics import nrmse, pearson
from stemdl.model.network import StemNet
from stemdl.training import monitor, parameters, recipe


def reconstruct(model: StemNet, params_file: Path, patterns: np.ndarray) -> np.ndarray:
    """Run a trained network.

    Args:
      model: the network.
      params_file: as `stemdl train` writes it.
      patterns: (n, scan, scan, detector, detector) standardised amplitudes.

    Returns:
      (n, pixels, pixels) float32 potentials.
    """
    return _network(model, params_file, patterns[:1])(patterns)


def evaluate(dataset: Dataset, run: Path, out: Path) -> dict[str, float]:
    """Score the held-out samples and draw both figures.

    Args:
      dataset: what the network was trained on and is tested on.
      run: directory with `params.npz`, `config.toml` and `train.json`.
      out: directory for `reconstruction.png` and `loss.png`.

    Returns:
      "nrmse" and "pearson", means over held-out samples.
    """
    trained = json.loads((run / "train.json").read_text())
    settings = config.load(run / "config.toml").network
    model = recipe.build(settings, dataset.test_y.shape[-1])
    predicted = reconstruct(model, run / "params.npz", dataset.test_x)
    figures.draw_reconstructions(out / "reconstruction.png", dataset, predicted)
    figures.draw_losses(out / "loss.png", trained["losses"])
    return {
        "nrmse": float(nrmse(predicted, dataset.test_y).mean()),
        "pearson": float(pearson(predicted, dataset.test_y).mean()),
    }


def _network(model: StemNet, params_file: Path, example: np.ndarray) -> Predictor:
    shapes = jax.eval_shape(model.init, jax.random.key(0), example)
    variables = parameters.load(params_file, shapes)
    return functools.partial(monitor.Predictor(model), variables)


def _cached(samples: int, directory: Path) -> tuple[DataConfig, Dataset]:
    wanted = data_config(samples)
    return wanted, load(wanted, directory)


def _sharded(directory: Path) -> tuple[DataConfig, Dataset]:
    """The data set of a manifest, and what it was simulated from."""
    simulated = DataConfig.from_json(manifest.read(directory).config)
    return simulated, loading.load(directory)


def _require_same(run: Path, trained: Any, found: Any, field: str = "") -> None:
    """Refuse data that are not those of the training, but for what is held out.

    Patterns are standardised by the training's, and what it was trained on must not be
    held out here; whether held-out crystals are others, the data set has checked.
    """
    if trained == found:
        return
    if isinstance(trained, dict) and isinstance(found, dict):
        for key in sorted(trained.keys() | found.keys()):
            if field or key not in ("test", "held_out_cifs"):
                name = f"{field}.{key}".lstrip(".")
                _require_same(run, trained.get(key), found.get(key), name)
        return
    raise click.UsageError(
        f"--run {run} was trained on other data than these: {field or 'data'} was "
        f"{trained!r:.200} and is {found!r:.200}; give the --shards or the --samples "
        "that it was trained on"
    )


def _settings(
    run: Path,
    resolved: Config,
    trained: dict[str, Any],
    data: DataConfig,
    orientations: bool,
) -> dict[str, Any]:
    """What the report says of the run."""
    optics, prepared = data.optics, data.preparation
    versions, noise = config.versions(), resolved.noise
    doses = f"{noise.least_dose:g} to {noise.most_dose:g} electrons per pattern"
    return {
        "run": str(run),
        "network": resolved.network.name,
        "loss": resolved.loss.name,
        "precision": resolved.precision.compute,
        "trained on noise": doses if noise.least_dose else "none",
        "orientations averaged": augmentation.SYMMETRIES if orientations else 1,
        "seed": resolved.training.seed,
        "steps": trained["steps"],
        "batch": resolved.training.batch,
        "ranks": trained["ranks"],
        "backend": trained["backend"],
        "training samples": data.train,
        "held-out samples": data.test,
        "microscope": (
            f"{optics.energy_ev / 1e3:g} kV, {optics.aperture_mrad:g} mrad, "
            f"{optics.probes} x {optics.probes} probes over {optics.window:g} Å, "
            f"{optics.sampling:g} Å pixels, "
            f"C1 {optics.c1:g} Å, C3 {optics.c3:g} Å, C5 {optics.c5:g} Å, "
            f"astigmatism {optics.astigmatism:g} Å"
        ),
        "specimens": (
            f"{prepared.min_thickness:g} to {prepared.max_thickness:g} Å, "
            f"mistilt up to {prepared.mistilt_mrad:g} mrad, "
            f"displacements of {prepared.rms_displacement:g} Å, "
            f"{prepared.phonons} phonon configurations"
        ),
        "versions": ", ".join(f"{name} {v}" for name, v in versions.items()),
    }


@click.command(context_settings=terminal.HELP)
@click.option(
    "--run",
    type=click.Path(path_type=Path),
    default="out/stemdl",
    show_default=True,
    help="what `stemdl train` has written",
)
@click.option("--samples", type=int, help="training samples  [default: the run's]")
@data_option
@click.option(
    "--shards",
    "shards_dir",
    type=click.Path(path_type=Path),
    help="evaluate on what `stemdl simulate` has written here, instead of --data",
)
@click.option(
    "--strongest",
    is_flag=True,
    help="add the strongest linear map, from unbinned patterns; takes a minute",
)
@click.option(
    "--orientations",
    is_flag=True,
    help="let the network see each sample in eight orientations, and average; takes "
    "eight times as long",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="for the report  [default: RUN/evaluation]",
)
def main(
    run: Path,
    samples: int | None,
    data_dir: Path,
    shards_dir: Path | None,
    strongest: bool,
    orientations: bool,
    out: Path | None,
) -> None:
    """Score a run beside linear baselines.

    It writes report.md, report.json and pictures.
    """
    console = terminal.console(stderr=True)
    out = out or run / "evaluation"
    for name in ("params.npz", "config.toml", "train.json"):
        if not (run / name).exists():
            raise click.UsageError(
                f"--run {run}: {run / name} does not exist; `stemdl train` "
                "writes it when it ends"
            )
    if shards_dir is not None and samples is not None:
        raise click.UsageError("--samples is about --data; shards tell their number")
    try:
        resolved = config.load(run / "config.toml")
        if shards_dir is None:
            data, dataset = _cached(samples or resolved.training.samples, data_dir)
        else:
            data, dataset = _sharded(shards_dir)
        model = recipe.build(resolved.network, dataset.test_y.shape[-1])
        network = _network(model, run / "params.npz", dataset.test_x[:1])
    except (CacheError, FileNotFoundError, manifest.ShardError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    trained = json.loads((run / "train.json").read_text())
    _require_same(run, trained.get("data"), json.loads(data.to_json()))
    settings = _settings(run, resolved, trained, data, orientations)
    if orientations:
        network = functools.partial(augmentation.averaged, network)
    with console.status("fitting baselines") as status:
        methods = baselines.fit(dataset, strongest) | {report.NETWORK: network}
        out.mkdir(parents=True, exist_ok=True)
        found = report.write(
            out, dataset, data, methods, settings, trained["losses"], status.update
        )
    for name, scored in found["methods"].items():
        console.print(f"{name}: NRMSE {scored['nrmse_mean']:.3f}", highlight=False)
    console.print(f"Report and pictures: {out / 'report.md'}", highlight=False)
