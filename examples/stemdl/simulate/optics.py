"""The microscope: electron wavelength, grids and aperture.

One `Optics` fixes every shape of the simulation, so that each jitted function
compiles once. Lengths are in angstrom, spatial frequencies in 1/angstrom, potentials
in volts.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

REST_ENERGY_EV = 510_998.95
"""Rest energy of the electron (CODATA 2018)."""


@dataclasses.dataclass(frozen=True)
class Optics:
    """A 100 keV scanning microscope over a periodic 16 A box.

    Attributes:
      energy_ev: kinetic energy of the electrons.
      aperture_mrad: semi-angle of the convergent beam.
      box: side of the periodic square box.
      pixels: pixels along the box's side.
      slice_thickness: distance between the planes onto which the potential is
        projected.
      max_slices: slices that a potential array holds; thinner specimens leave the
        last ones empty.
      window: side of the central square that is scanned and reconstructed.
      probes: probe positions along the window's side.
      detector: detector pixels along a side; odd, so that the unscattered beam falls
        on a pixel and symmetries of the square are exact.
      label_pixels: pixels of the label along the window's side.
      label_sigma: standard deviation of the Gaussian that blurs the label.
    """

    energy_ev: float = 100e3
    aperture_mrad: float = 20.0
    box: float = 16.0
    pixels: int = 64
    slice_thickness: float = 2.0
    max_slices: int = 20
    window: float = 8.0
    probes: int = 4
    detector: int = 25
    label_pixels: int = 32
    label_sigma: float = 0.35

    @property
    def wavelength(self) -> float:
        """Relativistic wavelength in A; 12.398 keV A is hc (Kirkland 2010, eq. 2.5)."""
        energy = self.energy_ev
        return 12_398.4198 / math.sqrt(energy * (2 * REST_ENERGY_EV + energy))

    @property
    def interaction(self) -> float:
        """Interaction parameter sigma in rad / (V A) (Kirkland 2010, eq. 5.6)."""
        rest, energy = REST_ENERGY_EV, self.energy_ev
        relativistic = (rest + energy) / (2 * rest + energy)
        return 2 * math.pi / (self.wavelength * energy) * relativistic

    @property
    def sampling(self) -> float:
        """Distance between pixels of the box in A."""
        return self.box / self.pixels

    def frequencies(self) -> np.ndarray:
        """Spatial frequencies along one axis in FFT order: (pixels,) float64, 1/A."""
        return np.fft.fftfreq(self.pixels, self.sampling)

    def radial_frequencies(self) -> np.ndarray:
        """Length of the frequency vector: (pixels, pixels) float64, 1/A, FFT order."""
        k = self.frequencies()
        return np.hypot(k[:, None], k[None, :])

    def aperture(self) -> np.ndarray:
        """Amplitude of the beam in the aperture plane, an edge one pixel wide.

        Returns:
          (pixels, pixels) float64 in FFT order; the squares sum to 1.
        """
        radius = self.aperture_mrad * 1e-3 / self.wavelength
        distance = (radius - self.radial_frequencies()) * self.box
        amplitude = np.clip(distance + 0.5, 0.0, 1.0)
        return amplitude / np.sqrt(np.sum(amplitude**2))

    def propagator(self) -> np.ndarray:
        """Fresnel propagator over one slice, before any band limit.

        Returns:
          (pixels, pixels) complex128, exp(-i pi lambda dz k^2), FFT order.
        """
        k2 = self.radial_frequencies() ** 2
        return np.exp(-1j * np.pi * self.wavelength * self.slice_thickness * k2)

    def band_limit(self) -> np.ndarray:
        """Mask of frequencies below 2/3 of Nyquist, against wrap-around.

        Returns:
          (pixels, pixels) float64 of zeros and ones, FFT order.
        """
        nyquist = 0.5 / self.sampling
        return (self.radial_frequencies() < 2 / 3 * nyquist).astype(np.float64)

    def scan(self) -> np.ndarray:
        """Positions of the probes along one axis: centres of equal cells, in A."""
        step = self.window / self.probes
        return (self.box - self.window) / 2 + step * (np.arange(self.probes) + 0.5)
