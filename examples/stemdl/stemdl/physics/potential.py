"""From atoms to projected potentials.

Electron scattering factors follow from X-ray form factors through the Mott-Bethe
relation, so the only table needed is the X-ray one: D. Waasmaier and A. Kirfel,
Acta Cryst. A51 (1995) 416-431, as the `periodictable` package ships it.
"""

from __future__ import annotations

import functools

import numpy as np
from periodictable.cromermann import getCMformula

from stemdl.physics.crystals import Specimen
from stemdl.physics.optics import Optics, SettingError

BOHR_RADIUS = 0.529177
"""In angstrom."""

POTENTIAL_PER_FACTOR = 47.8776
"""h^2 / (2 pi m e) in V A^2: potential of a unit scattering factor (in A)."""


def scattering_factor(symbol: str, s: np.ndarray) -> np.ndarray:
    """Electron scattering factor of a neutral atom, first Born approximation.

    Mott-Bethe: f_e(s) = (Z - f_x(s)) / (8 pi^2 a_0 s^2), where 1 / (8 pi^2 a_0) is
    m e^2 / (8 pi eps_0 h^2) = 0.023934 / A. With f_x(s) = c + sum a exp(-b s^2) and
    its own f_x(0) in place of Z, from which it differs by less than 0.1 %, the
    quotient is sum a (1 - exp(-b s^2)) / s^2: regular, with the limit sum a b.

    Args:
      symbol: chemical symbol.
      s: half the spatial frequency, sin(theta) / lambda, in 1/A; any shape.

    Returns:
      f_e in A, the shape of `s`; without the relativistic mass factor, which
      `Optics.interaction` holds.

    Raises:
      SettingError: there is no such element, or no form factor of it.
    """
    try:
        formula = getCMformula(symbol)
    except KeyError:
        raise SettingError(
            f"no form factor of {symbol!r}; they reach from H to Cf"
        ) from None
    s2 = np.asarray(s, np.float64)[..., None] ** 2
    limit = formula.a * formula.b
    with np.errstate(invalid="ignore"):
        quotient = np.where(s2 > 0, formula.a * -np.expm1(-formula.b * s2) / s2, limit)
    return quotient.sum(-1) / (8 * np.pi**2 * BOHR_RADIUS)


@functools.lru_cache
def _form_factor(symbol: str, optics: Optics) -> np.ndarray:
    """Potential of one atom at the origin as Fourier coefficients: V A^2, float32."""
    k = optics.radial_frequencies()
    potential = POTENTIAL_PER_FACTOR * scattering_factor(symbol, k / 2)
    # The Nyquist row has no partner of opposite sign: without it mirrored crystals
    # give exactly mirrored potentials.
    nyquist = optics.pixels // 2
    potential[nyquist, :] = 0.0
    potential[:, nyquist] = 0.0
    return potential.astype(np.float32)


def fourier_coefficients(specimen: Specimen, optics: Optics) -> np.ndarray:
    """Fourier coefficients of each slice's projected potential.

    Args:
      specimen: atoms in the box, n of them.
      optics: the grid.

    Returns:
      (max_slices, pixels, pixels) complex64 in V A: v(x) = sum_k c_k exp(2 pi i k x).
      Slices behind the specimen are zero.

    Raises:
      SettingError: the specimen is thicker than all slices.
    """
    most = optics.max_slices * optics.slice_thickness
    if specimen.thickness > most:
        raise SettingError(
            f"a specimen of {specimen.thickness:.1f} A is thicker than "
            f"optics.max_slices={optics.max_slices} slices, {most:g} A: raise it"
        )
    k = optics.frequencies()
    phase_x, phase_y = (
        np.exp(-2j * np.pi * np.outer(k, specimen.positions[:, axis])).astype(
            np.complex64
        )
        for axis in (0, 1)
    )
    depth = np.floor(specimen.positions[:, 2] / optics.slice_thickness).astype(int)
    # An atom that its displacement takes out of the specimen stays in its outer slice.
    last = int(np.ceil(specimen.thickness / optics.slice_thickness)) - 1
    depth = np.clip(depth, 0, last)
    coefficients = np.zeros(
        (optics.max_slices, optics.pixels, optics.pixels), np.complex64
    )
    for symbol in np.unique(specimen.symbols):
        factor = _form_factor(str(symbol), optics)
        for index in np.unique(depth[specimen.symbols == symbol]):
            atoms = (specimen.symbols == symbol) & (depth == index)
            # A structure factor over a grid is an outer product per atom, summed. The
            # matrices are too small for BLAS threads, which pinned workers would pay
            # for dearly; einsum starts none.
            structure = np.einsum("xa,ya->xy", phase_x[:, atoms], phase_y[:, atoms])
            coefficients[index] += factor * structure
    return coefficients / np.float32(optics.box**2)


def slices(coefficients: np.ndarray) -> np.ndarray:
    """Projected potential of each slice, on the box's pixels: float32, V A."""
    pixels = coefficients.shape[-1]
    return np.fft.ifft2(coefficients).real.astype(np.float32) * np.float32(pixels**2)


def label(coefficients: np.ndarray, optics: Optics) -> np.ndarray:
    """What the network shall find: the whole potential in the scanned window.

    Projected along the beam, blurred by a Gaussian, sampled at the centres of pixels
    (the box's own samples lie at pixel corners; half a pixel off, symmetries of the
    square would not map labels to labels) and standardised.

    Args:
      coefficients: as `fourier_coefficients` returns.
      optics: the grid, whose label pixels are as large as the box's.

    Returns:
      (label_pixels, label_pixels) float32 of mean 0 and variance 1; zeros for vacuum.
    """
    k = optics.frequencies()
    blur = np.exp(-2 * (np.pi * optics.label_sigma * k) ** 2)
    axis = blur * np.exp(1j * np.pi * k * optics.sampling)
    total = coefficients.sum(0) * np.outer(axis, axis)
    image = np.fft.ifft2(total).real
    start = (optics.pixels - optics.label_pixels) // 2
    window = image[start:, start:][: optics.label_pixels, : optics.label_pixels]
    window = window - window.mean()
    spread = window.std()
    return (window / spread if spread > 0 else window).astype(np.float32)
