"""What simple methods reach on the same task: the yardsticks beside the network.

All are fitted to the training materials and scored on the held-out ones. The linear
maps get no augmentation; they are shared by all probes and see a probe's neighbours.
"""

from __future__ import annotations

import numpy as np

from dataset import Dataset
from scores import nrmse
from simulate.optics import Optics

VALIDATION_FRACTION = 0.2
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
"""Penalties that are tried, as fractions of the features' mean variance."""


def baselines(dataset: Dataset) -> dict[str, float]:
    """Score every baseline.

    Returns:
      Mean NRMSE over the held-out samples by name, weakest information first.
    """
    mean = np.broadcast_to(dataset.train_y.mean(0), dataset.test_y.shape)
    images = [
        virtual_images(dataset.amplitudes(x) ** 2, dataset.optics)
        for x in (dataset.train_x, dataset.test_x)
    ]
    patterns = [_binned(x) for x in (dataset.train_x, dataset.test_x)]
    return {
        "mean label": float(nrmse(mean, dataset.test_y).mean()),
        "best virtual image": _best_image(images[0], images[1], dataset),
        "ridge, virtual images": _linear_map(images[0], images[1], dataset),
        "ridge, 3x3 diffraction patterns": _linear_map(
            patterns[0], patterns[1], dataset
        ),
    }


def virtual_images(intensity: np.ndarray, optics: Optics) -> np.ndarray:
    """Images that a microscope's detectors would record during the scan.

    Args:
      intensity: (n, scan, scan, detector, detector).
      optics: relates detector pixels to angles.

    Returns:
      (n, scan, scan, 4) float32: bright field (below 0.3 of the aperture's angle),
      whole disk, annular bright field (0.5 to 1), annular dark field (above 1).
    """
    axis = np.arange(optics.detector) - optics.detector // 2
    angle = np.hypot(axis[:, None], axis) * optics.wavelength / optics.box
    angle /= optics.aperture_mrad * 1e-3
    regions = [angle < 0.3, angle < 1, (angle >= 0.5) & (angle < 1), angle >= 1]
    masks = np.stack(regions).reshape(len(regions), -1).astype(np.float32)
    return intensity.reshape(*intensity.shape[:3], -1) @ masks.T


def _best_image(train: np.ndarray, test: np.ndarray, dataset: Dataset) -> float:
    """Score the one image that, enlarged and with the best gain, fits best."""
    shape = dataset.train_y.shape[1:]

    def enlarged(images: np.ndarray) -> np.ndarray:
        image = _interpolate(images, shape[0])
        image = image - image.mean((-2, -1), keepdims=True)
        return image / np.maximum(image.std((-2, -1), keepdims=True), 1e-12)

    fitted = []
    for index in range(train.shape[-1]):
        image = enlarged(train[..., index])
        gain = np.mean(image * dataset.train_y)
        error = nrmse(gain * image, dataset.train_y).mean()
        fitted.append((error, index, gain))
    _, index, gain = min(fitted)
    return float(nrmse(gain * enlarged(test[..., index]), dataset.test_y).mean())


def _interpolate(images: np.ndarray, pixels: int) -> np.ndarray:
    """Enlarge (n, scan, scan) linearly to (n, pixels, pixels), held at the edges."""
    scan = images.shape[-1]
    centres = (np.arange(scan) + 0.5) / scan
    wanted = (np.arange(pixels) + 0.5) / pixels
    weights = np.stack([np.interp(wanted, centres, row) for row in np.eye(scan)])
    return weights.T @ images @ weights


def _binned(patterns: np.ndarray) -> np.ndarray:
    """Sum 25 x 25 detector pixels into 13 x 13, symmetric about the central one."""
    detector = patterns.shape[-1]
    half = np.arange(0, detector // 2, 2)
    starts = np.concatenate([half, [detector // 2], detector // 2 + 1 + half])
    binned = np.add.reduceat(patterns, starts, axis=-1)
    binned = np.add.reduceat(binned, starts, axis=-2)
    return binned.reshape(*patterns.shape[:3], -1)


def _linear_map(train: np.ndarray, test: np.ndarray, dataset: Dataset) -> float:
    """Ridge regression from 3 x 3 probes to the middle one's patch of the label.

    The penalty is chosen on the last training samples, which are then fitted too.

    Args:
      train: (n, scan, scan, features).
      test: as `train`, for the held-out samples.
      dataset: holds the labels.
    """
    spread = train.std((0, 1, 2)) + 1e-12
    centre = train.mean((0, 1, 2))
    train, test = ((x - centre) / spread for x in (train, test))
    fit = len(train) - max(1, int(VALIDATION_FRACTION * len(train)))
    scan = train.shape[1]
    # Normal equations add up, so the second fit reuses those of the first.
    first = _normal_equations(train[:fit], dataset.train_y[:fit])
    rest = _normal_equations(train[fit:], dataset.train_y[fit:])

    def solve(gram: np.ndarray, right: np.ndarray, ridge: float) -> np.ndarray:
        penalty = ridge * np.trace(gram) / len(gram)
        return np.linalg.solve(gram + penalty * np.eye(len(gram)), right)

    def score(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
        predicted = _from_patches(_neighbours(x) @ weights, scan)
        return float(nrmse(predicted, y).mean())

    ridge = min(
        RIDGES,
        key=lambda r: score(solve(*first, r), train[fit:], dataset.train_y[fit:]),
    )
    weights = solve(first[0] + rest[0], first[1] + rest[1], ridge)
    return score(weights, test, dataset.test_y)


def _normal_equations(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows, patches = _neighbours(x), _to_patches(y, x.shape[1])
    return rows.T @ rows, rows.T @ patches


def _neighbours(x: np.ndarray) -> np.ndarray:
    """Rows of features of 3 x 3 probes and a one; zeros stand beyond the scan."""
    n, scan = x.shape[:2]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    around = [padded[:, i : i + scan, j : j + scan] for i in range(3) for j in range(3)]
    ones = np.ones((n, scan, scan, 1), x.dtype)
    return np.concatenate([*around, ones], axis=-1).reshape(n * scan * scan, -1)


def _to_patches(labels: np.ndarray, scan: int) -> np.ndarray:
    """Cut (n, pixels, pixels) into rows, one per probe."""
    n, pixels = labels.shape[:2]
    side = pixels // scan
    patches = labels.reshape(n, scan, side, scan, side).transpose(0, 1, 3, 2, 4)
    return patches.reshape(n * scan * scan, side * side)


def _from_patches(rows: np.ndarray, scan: int) -> np.ndarray:
    """Undo `_to_patches`."""
    side = int(np.sqrt(rows.shape[-1]))
    patches = rows.reshape(-1, scan, scan, side, side).transpose(0, 1, 3, 2, 4)
    return patches.reshape(-1, scan * side, scan * side)
