"""The microscope: electron wavelength, grids, aperture and aberrations.

One `Optics` fixes every shape of the simulation, so that each jitted function
compiles once. Lengths are in angstrom, spatial frequencies in 1/angstrom, potentials
in volts. Waves travel as exp(+2 pi i k r), so that free space multiplies by
exp(-i pi lambda z k^2) and aberrations by exp(-i chi).
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

REST_ENERGY_EV = 510_998.95
"""Rest energy of the electron (CODATA 2018)."""


class SettingError(ValueError):
    """A setting that cannot be simulated; names it, the cause and the remedy."""


@dataclasses.dataclass(frozen=True)
class Optics:
    """A 100 keV scanning microscope over a periodic 16 A box.

    Attributes:
      energy_ev: kinetic energy of the electrons.
      aperture_mrad: semi-angle of the convergent beam.
      box: side of the periodic square box.
      pixels: pixels along the box's side; even.
      slice_thickness: distance between the planes onto which the potential is
        projected.
      max_slices: slices that a potential array holds; thinner specimens leave the
        last ones empty.
      window: side of the central square that is scanned and reconstructed.
      probes: probe positions along the window's side.
      detector: detector pixels along a side, each 1 / box wide; odd, so that the
        unscattered beam falls on a pixel and symmetries of the square are exact. Its
        corners may lie beyond the band limit, where nothing arrives.
      label_pixels: pixels of the label along the window's side; even.
      label_sigma: standard deviation of the Gaussian that blurs the label.
      c1: defocus of the probe; positive is overfocus, the focus lying before the
        specimen.
      c3: third-order spherical aberration; 1 mm is 1e7.
      c5: fifth-order spherical aberration.
      astigmatism: two-fold: the focus is c1 + astigmatism along its axis, and
        c1 - astigmatism across.
      astigmatism_deg: of that axis, from the first axis of the scan to the second.

    Raises:
      SettingError: a field is out of range, or the grid cannot hold what it asks for.
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
    c1: float = 0.0
    c3: float = 0.0
    c5: float = 0.0
    astigmatism: float = 0.0
    astigmatism_deg: float = 0.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            signed = name in ("c1", "c3", "c5", "astigmatism", "astigmatism_deg")
            if not math.isfinite(value) or (not signed and value <= 0):
                raise SettingError(
                    f"optics.{name}={value}: give a "
                    + ("finite number" if signed else "positive number")
                )
        limit = 2 / 3 * 0.5 / self.sampling
        limits = (
            f"the band limit, {1e3 * limit * self.wavelength:.1f} mrad at a sampling "
            f"of {self.sampling:g} A: "
        )
        radius = self.aperture_mrad * 1e-3 / self.wavelength + 0.5 / self.box
        if radius >= limit:
            raise SettingError(
                f"optics.aperture_mrad={self.aperture_mrad} reaches {limits}"
                "lower it or raise optics.pixels"
            )
        if self.detector % 2 == 0:
            raise SettingError(f"optics.detector={self.detector}: give an odd number")
        for name in ("pixels", "label_pixels"):
            if getattr(self, name) % 2:
                raise SettingError(
                    f"optics.{name}={getattr(self, name)}: give an even number, so "
                    "that the window lies in the middle of the box"
                )
        edge = (self.detector // 2) / self.box
        if edge >= limit:
            raise SettingError(
                f"optics.detector={self.detector} pixels reach to "
                f"{1e3 * edge * self.wavelength:.1f} mrad, {limits}"
                "lower it or raise optics.pixels"
            )
        if self.window > self.box:
            raise SettingError(
                f"optics.window={self.window} A is larger than optics.box={self.box} A"
            )
        if not math.isclose(self.window / self.label_pixels, self.sampling):
            raise SettingError(
                f"optics.label_pixels={self.label_pixels} over a window of "
                f"{self.window} A do not match the box's sampling of {self.sampling} "
                "A: window / label_pixels must be box / pixels"
            )
        self.require_room(0)

    def require_room(self, depth: float) -> None:
        """Refuse a probe that is wider than the box around the window.

        Args:
          depth: below the entrance surface, in A.

        Raises:
          SettingError: it is.
        """
        spread, margin = self._probe_radius(depth), (self.box - self.window) / 2
        if spread > margin:
            raise SettingError(
                f"optics.c1={self.c1}, c3={self.c3}, c5={self.c5}, "
                f"astigmatism={self.astigmatism} spread the probe over a radius of "
                f"{spread:.1f} A at a depth of {depth:g} A; around the window the box "
                f"has {margin:g} A: lower them, optics.aperture_mrad or "
                "preparation.max_thickness, or enlarge optics.box (and pixels)"
            )

    def _probe_radius(self, depth: float) -> float:
        """Distance of geometrical optics' outermost ray from the axis, in A."""
        angle = np.linspace(0, self.aperture_mrad * 1e-3, 257)
        rays = [
            (self.c1 + depth + sign * self.astigmatism) * angle
            + self.c3 * angle**3
            + self.c5 * angle**5
            for sign in (-1, 1)
        ]
        return float(np.abs(rays).max())

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

    def aberration(self) -> np.ndarray:
        """Aberration phase chi; the lens multiplies a wave by exp(-i chi).

        chi = 2 pi / lambda (a^2 (C1 + A1 cos 2 (phi - phi_A1)) / 2 + C3 a^4 / 4 +
        C5 a^6 / 6) at the angle a = lambda k and the azimuth phi: the coefficients of
        Krivanek et al., Ultramicroscopy 78 (1999) 1. A ray at angle a so meets the
        specimen at C1 a + C3 a^3 + C5 a^5 from the axis.

        Returns:
          (pixels, pixels) float64 in rad, FFT order.
        """
        k = self.frequencies()
        azimuth = np.arctan2(k[None, :], k[:, None])
        axis = math.radians(self.astigmatism_deg)
        focus = self.c1 + self.astigmatism * np.cos(2 * (azimuth - axis))
        angle = self.wavelength * self.radial_frequencies()
        path = focus * angle**2 / 2 + self.c3 * angle**4 / 4 + self.c5 * angle**6 / 6
        return 2 * math.pi / self.wavelength * path

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
