"""Score a trained network on materials it has never seen, and draw what it sees.

python examples/stemdl/evaluate.py --run out/stemdl
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import jax
import numpy as np
from rich.console import Console

import checkpoint
import config
import figures
import recipe
from baselines import baselines
from dataset import Dataset, load
from network import StemNet
from scores import nrmse, pearson
from simulate_cache import data_config, data_option

BATCH = 40


def reconstruct(model: StemNet, params_file: Path, patterns: np.ndarray) -> np.ndarray:
    """Run a trained network.

    Args:
      model: the network.
      params_file: as `train.py` writes it.
      patterns: (n, scan, scan, detector, detector) standardised amplitudes.

    Returns:
      (n, pixels, pixels) float32 potentials.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0), patterns[:1])
    variables = checkpoint.load(params_file, shapes)
    apply = jax.jit(model.apply)
    return np.concatenate(
        [
            np.asarray(apply(variables, patterns[start : start + BATCH]))
            for start in range(0, len(patterns), BATCH)
        ]
    )


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


@click.command()
@click.option(
    "--run", type=click.Path(path_type=Path), default="out/stemdl", show_default=True
)
@click.option("--samples", default=1500, show_default=True, help="as in training")
@data_option
def main(run: Path, samples: int, data_dir: Path) -> None:
    """Score a run beside linear baselines and draw its reconstructions."""
    console = Console()
    dataset = load(data_config(samples), data_dir)
    result = evaluate(dataset, run, run)
    console.print(f"network: NRMSE {result['nrmse']:.3f}, r {result['pearson']:.3f}")
    for name, score in baselines(dataset).items():
        console.print(f"{name}: NRMSE {score:.3f}")


if __name__ == "__main__":
    main()
