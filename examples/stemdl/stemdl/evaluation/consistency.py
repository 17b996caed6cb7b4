"""Do the patterns follow from the reconstruction? They are simulated from it again.

A label has lost its scale, its depth and its outside, so these are assumed: one gain
per sample, fitted to the sample's own patterns; the potential spread evenly over the
sample's slices; the window mirrored at its edges into the rest of the box. The label's
blur is undone as far as it can be. What the true label reaches is therefore the best
that this check can show.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize_scalar

from stemdl.physics import multislice
from stemdl.physics.optics import Optics

PHASES = np.geomspace(0.02, 8, 12)
"""Gains tried first, as standard deviations of the whole specimen's phase in rad."""

WIENER = 0.01
"""Power of noise over signal that undoing the blur reckons with. It was chosen on the
true labels: less, and they fit better still, but errors of a reconstruction grow."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """How well one label explains one sample's patterns.

    Attributes:
      r: R factor of the amplitudes; 0 is perfect.
      gain: potential of a label of 1, projected through the specimen, in V A.
    """

    r: float
    gain: float


def r_factor(simulated: np.ndarray, observed: np.ndarray) -> float:
    """Sum of |difference| over the sum of the observed amplitudes."""
    return float(np.abs(simulated - observed).sum() / observed.sum())


def central(optics: Optics) -> np.ndarray:
    """Indices of the scan lines in the window's central half.

    The others' beams see more of the mirrored outside, and are left out.
    """
    distance = np.abs(optics.scan() - optics.box / 2)
    return np.flatnonzero(distance <= optics.window / 4)


def simulate(label: np.ndarray, slices: int, gain: float, optics: Optics) -> np.ndarray:
    """Patterns of the central probes, as `multislice.scan` orders them.

    Args:
      label: (label_pixels, label_pixels), a truth or a reconstruction; all of 0 for a
        flat potential.
      slices: that the specimen fills.
      gain: see `Fit`.
      optics: the microscope.

    Returns:
      (k, k, detector, detector) float32 amplitudes.
    """
    # Label pixels are centred, the box's own lie at corners: moving the probes by half
    # a pixel the other way needs no interpolation of the potential.
    lines = optics.scan()[central(optics)] - optics.sampling / 2
    x, y = np.meshgrid(lines, lines, indexing="ij")
    waves = multislice.probes(optics, x.ravel(), y.ravel())
    image = _whole(label, optics) * (gain / slices)
    potential = np.zeros((optics.max_slices, optics.pixels, optics.pixels), np.float32)
    potential[:slices] = image
    passed = multislice.diffract(jnp.asarray(potential), slices, waves, optics)
    intensity = np.asarray(passed)
    patterns = np.sqrt(multislice.detector_crop(intensity, optics.detector))
    return patterns.reshape(len(lines), len(lines), *patterns.shape[1:])


def _whole(label: np.ndarray, optics: Optics) -> np.ndarray:
    """Fill the box with a label's mirror images, and undo the blur (Wiener filter)."""
    rim = (optics.pixels - optics.label_pixels) // 2
    image = np.pad(label, rim, mode="symmetric")
    k2 = optics.radial_frequencies() ** 2
    blur = np.exp(-2 * (np.pi * optics.label_sigma) ** 2 * k2)
    sharper = blur * (1 + WIENER) / (blur**2 + WIENER)
    return np.fft.ifft2(np.fft.fft2(image) * sharper).real


def fit(label: np.ndarray, slices: int, observed: np.ndarray, optics: Optics) -> Fit:
    """Fit the gain and return the R factor that is left.

    Args:
      label: (label_pixels, label_pixels).
      slices: that the specimen fills.
      observed: (scan, scan, detector, detector) amplitudes of the whole scan.
      optics: the microscope.
    """
    measured = observed_centre(observed, optics)

    def r(logarithm: float) -> float:
        gain = float(np.exp(logarithm))
        return r_factor(simulate(label, slices, gain, optics), measured)

    tried = np.log(PHASES / optics.interaction)
    step = tried[1] - tried[0]
    start = min(tried, key=r)
    bounds = (start - step, start + step)
    best = minimize_scalar(r, bounds=bounds, method="bounded", options={"xatol": 0.02})
    return Fit(r=float(best.fun), gain=float(np.exp(best.x)))  # pyright: ignore


def flat(observed: np.ndarray, optics: Optics) -> float:
    """R factor of a flat potential: the worst that an explanation should do."""
    label = np.zeros((optics.label_pixels,) * 2, np.float32)
    return r_factor(simulate(label, 1, 1.0, optics), observed_centre(observed, optics))


def observed_centre(observed: np.ndarray, optics: Optics) -> np.ndarray:
    """The patterns of the central probes out of a whole scan's."""
    lines = central(optics)
    return observed[np.ix_(lines, lines)]
