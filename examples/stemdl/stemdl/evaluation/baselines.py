"""What simple methods reach on the same task: the yardsticks beside the network.

All are fitted to the training materials and tested on the held-out ones. They get no
augmentation.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from stemdl.data.dataset import Dataset
from stemdl.evaluation import ridge
from stemdl.evaluation.metrics import nrmse
from stemdl.physics.optics import Optics

Predictor = Callable[[np.ndarray], np.ndarray]
"""From (n, scan, scan, detector, detector) standardised amplitudes to potentials
(n, pixels, pixels) in the labels' units, both float32."""

STRONGEST = "ridge, 3x3 full diffraction patterns"


def baselines(dataset: Dataset) -> dict[str, float]:
    """Score every baseline.

    Returns:
      Mean NRMSE over the held-out samples by name, weakest information first.
    """
    return {
        name: float(nrmse(predict(dataset.test_x), dataset.test_y).mean())
        for name, predict in fit(dataset).items()
    }


def fit(dataset: Dataset, strongest: bool = False) -> dict[str, Predictor]:
    """Fit every baseline to the training samples.

    Args:
      dataset: its training samples are used, no others.
      strongest: fit the linear map from unbinned patterns too, which takes a minute
        and, with 25 x 25 detector pixels, a gigabyte.

    Returns:
      What reconstructs, by name, weakest information first.
    """

    def mean(x: np.ndarray) -> np.ndarray:
        return np.repeat(average[None], len(x), axis=0)

    def images(x: np.ndarray) -> np.ndarray:
        return virtual_images(dataset.amplitudes(x) ** 2, dataset.optics)

    average = dataset.train_y.mean(0)
    seen = images(dataset.train_x)
    fitted: dict[str, Predictor] = {
        "mean label": mean,
        "best virtual image": _after(images, _best_image(seen, dataset.train_y)),
        "ridge, virtual images": _after(images, ridge.fit(seen, dataset.train_y)),
        "ridge, 3x3 diffraction patterns": _after(
            _binned, ridge.fit(_binned(dataset.train_x), dataset.train_y)
        ),
    }
    if strongest:
        full = ridge.fit(_flat(dataset.train_x), dataset.train_y)
        fitted[STRONGEST] = _after(_flat, full)
    return fitted


def virtual_images(intensity: np.ndarray, optics: Optics) -> np.ndarray:
    """Images that a microscope's detectors would record during the scan.

    Args:
      intensity: (n, scan, scan, detector, detector).
      optics: relates detector pixels to angles.

    Returns:
      (n, scan, scan, 6) float32: bright field (below 0.3 of the aperture's angle),
      whole disk, annular bright field (0.5 to 1), annular dark field (above 1), and
      the centre of mass along both axes in units of the aperture's angle (differential
      phase contrast).
    """
    axis = np.arange(optics.detector) - optics.detector // 2
    axis = axis * optics.wavelength / optics.box / (optics.aperture_mrad * 1e-3)
    angle = np.hypot(axis[:, None], axis)
    regions = [angle < 0.3, angle < 1, (angle >= 0.5) & (angle < 1), angle >= 1]
    moments = np.meshgrid(axis, axis, indexing="ij")
    masks = np.stack([*regions, np.ones_like(angle), *moments])
    masks = masks.reshape(len(masks), -1).astype(np.float32)
    images = intensity.reshape(*intensity.shape[:3], -1) @ masks.T
    total = np.maximum(images[..., 4:5], np.finfo(np.float32).tiny)
    return np.concatenate([images[..., :4], images[..., 5:] / total], axis=-1)


def _after(features: Predictor, predict: Predictor) -> Predictor:
    return lambda x: predict(features(x))


def _best_image(train: np.ndarray, labels: np.ndarray) -> Predictor:
    """The one image that, enlarged and with the best gain, fits best."""
    pixels = labels.shape[-1]

    def enlarged(images: np.ndarray) -> np.ndarray:
        image = _interpolate(images, pixels)
        image = image - image.mean((-2, -1), keepdims=True)
        return image / np.maximum(image.std((-2, -1), keepdims=True), 1e-12)

    fitted = []
    for index in range(train.shape[-1]):
        image = enlarged(train[..., index])
        gain = np.mean(image * labels)
        fitted.append((nrmse(gain * image, labels).mean(), index, gain))
    _, index, gain = min(fitted)
    return lambda images: gain * enlarged(images[..., index])


def _interpolate(images: np.ndarray, pixels: int) -> np.ndarray:
    """Enlarge (n, scan, scan) linearly to (n, pixels, pixels), held at the edges."""
    scan = images.shape[-1]
    centres = (np.arange(scan) + 0.5) / scan
    wanted = (np.arange(pixels) + 0.5) / pixels
    weights = np.stack([np.interp(wanted, centres, row) for row in np.eye(scan)])
    return (weights.T @ images @ weights).astype(np.float32)


def _flat(patterns: np.ndarray) -> np.ndarray:
    return patterns.reshape(*patterns.shape[:3], -1)


def _binned(patterns: np.ndarray) -> np.ndarray:
    """Sum 25 x 25 detector pixels into 13 x 13, symmetric about the central one."""
    detector = patterns.shape[-1]
    half = np.arange(0, detector // 2, 2)
    starts = np.concatenate([half, [detector // 2], detector // 2 + 1 + half])
    binned = np.add.reduceat(patterns, starts, axis=-1)
    binned = np.add.reduceat(binned, starts, axis=-2)
    return _flat(binned)
