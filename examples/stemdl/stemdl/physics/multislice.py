"""Convergent-beam electron diffraction by the multislice method, in JAX.

Cowley and Moodie, Acta Cryst. 10 (1957) 609; the equations as in Kirkland, Advanced
Computing in Electron Microscopy (2010), chapter 6. All in float32 and complex64.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from stemdl.physics.optics import Optics


def probes(optics: Optics, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Waves of focused probes in the aperture plane.

    Args:
      optics: grid, aperture and aberrations.
      x: positions along the first axis, (n,), in A.
      y: positions along the second axis, (n,), in A.

    Returns:
      (n, pixels, pixels) complex64, FFT order, each of total intensity 1.
    """
    k = optics.frequencies()
    shift_x = np.exp(-2j * np.pi * np.outer(x, k))
    shift_y = np.exp(-2j * np.pi * np.outer(y, k))
    lens = optics.aperture() * np.exp(-1j * optics.aberration())
    waves = lens * shift_x[:, :, None] * shift_y[:, None, :]
    return waves.astype(np.complex64)


@functools.partial(jax.jit, static_argnames=("optics", "band_limited"))
def diffract(
    potential: jax.Array,
    slices: jax.Array | int,
    waves: jax.Array,
    optics: Optics,
    band_limited: bool = True,
) -> jax.Array:
    """Send waves through a specimen and record their diffraction patterns.

    Per slice: multiply by the transmission exp(i sigma v) in real space, then by the
    Fresnel propagator in reciprocal space. Both are cut at 2/3 of Nyquist, which
    keeps their product from wrapping around; what scatters beyond is lost.

    Args:
      potential: (max_slices, pixels, pixels) float32 projected potentials in V A.
      slices: how many of them to pass; traced, so that one program serves all
        thicknesses.
      waves: (n, pixels, pixels) complex64 in the aperture plane, FFT order.
      optics: grid and energy; static.
      band_limited: switch the cut off to check that intensity is conserved; static.

    Returns:
      (n, pixels, pixels) float32 intensities, FFT order.
    """
    mask = optics.band_limit() if band_limited else np.ones((optics.pixels,) * 2)
    propagator = jnp.asarray(optics.propagator() * mask, jnp.complex64)
    mask = jnp.asarray(mask, jnp.float32)

    transmission = jnp.exp(1j * jnp.float32(optics.interaction) * potential)
    if band_limited:
        transmission = jnp.fft.ifft2(mask * jnp.fft.fft2(transmission))

    def pass_slice(index: jax.Array, wave: jax.Array) -> jax.Array:
        exit_wave = transmission[index] * jnp.fft.ifft2(wave)
        return propagator * jnp.fft.fft2(exit_wave)

    waves = jax.lax.fori_loop(0, slices, pass_slice, waves)
    return jnp.abs(waves) ** 2


def scan(potential: np.ndarray, slices: int, optics: Optics) -> np.ndarray:
    """Diffraction patterns over the scanned window, cropped to the detector.

    Args:
      potential: (max_slices, pixels, pixels) float32 in V A.
      slices: how many of them the specimen fills.
      optics: grid, probes and detector.

    Returns:
      (probes, probes, detector, detector) float32 fractions of the beam. Scan axes
      and detector axes share their directions; the unscattered beam is centred.
    """
    x, y = np.meshgrid(optics.scan(), optics.scan(), indexing="ij")
    waves = probes(optics, x.ravel(), y.ravel())
    intensity = np.asarray(diffract(potential, np.int32(slices), waves, optics))
    pattern = detector_crop(intensity, optics.detector)
    return pattern.reshape(optics.probes, optics.probes, *pattern.shape[1:])


def detector_crop(intensity: np.ndarray, detector: int) -> np.ndarray:
    """Shift the zero frequency to the middle and keep a central odd square."""
    shifted = np.fft.fftshift(intensity, axes=(-2, -1))
    centre = intensity.shape[-1] // 2
    keep = slice(centre - detector // 2, centre + detector // 2 + 1)
    return np.ascontiguousarray(shifted[..., keep, keep])
