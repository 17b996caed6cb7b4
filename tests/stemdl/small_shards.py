"""A small sharded data set of random samples, for tests and for their ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console

import jaxcomm
from stemdl.data import dataset, loading, manifest, simulation
from stemdl.data.cache import data_config
from stemdl.training.backends import Devices

CONFIG = data_config(8)
BATCH, SEED = 4, 3


def random_sample(
    config: dataset.DataConfig, index: int
) -> tuple[np.ndarray, np.ndarray]:
    rng, optics = np.random.default_rng([config.seed, index]), config.optics
    shape = (optics.probes, optics.probes, optics.detector, optics.detector)
    label = rng.normal(size=(optics.label_pixels, optics.label_pixels))
    return rng.random(shape, np.float32), label.astype(np.float32)


def produce(directory: Path, count: int = 2) -> manifest.Manifest:
    console = Console(quiet=True)
    return simulation.produce(
        CONFIG, directory, count, jaxcomm.world(), console, random_sample
    )


def open_source(directory: Path, **options: object) -> loading.Source:
    backend = Devices()
    arguments = {"stage": None, "backend": backend, "batch": BATCH, "seed": SEED}
    return loading.open_source(directory, **{**arguments, **options})  # type: ignore[arg-type]
