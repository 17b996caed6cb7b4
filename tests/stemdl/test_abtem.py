"""STEMDL's simulator beside abTEM, on the same potentials and waves.

abTEM is under the GPL: nothing but this test imports it, and only where it happens to
be installed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stemdl.physics import crystals, multislice
from stemdl.physics.crystals import Preparation
from stemdl.physics.optics import Optics
from tests.stemdl.test_physics import difference, potentials

abtem: Any = pytest.importorskip("abtem")

pytestmark = [
    pytest.mark.thorough,
    # Of abTEM's dependencies, and none of our business.
    pytest.mark.filterwarnings("ignore"),
]

THICK = Preparation(min_thickness=40, max_thickness=40)
SHARP = {"antialias.cutoff": 2 / 3, "antialias.taper": 0.0}


def waves(optics: Optics) -> np.ndarray:
    return multislice.probes(optics, np.array([7.0, 8.5]), np.array([8.0, 9.1]))


def real_space(optics: Optics, array: np.ndarray) -> Any:
    return abtem.Waves(
        np.fft.ifft2(array).astype(np.complex64),
        energy=optics.energy_ev,
        extent=optics.box,
        ensemble_axes_metadata=[abtem.core.axes.OrdinalAxis(values=(0, 1))],
    )


def both(material: str, pixels: int, **settings: float) -> tuple[np.ndarray, ...]:
    """Intensities behind 40 A of a crystal, ours and abTEM's."""
    optics = Optics(pixels=pixels, label_pixels=pixels // 2)
    rng = np.random.default_rng(9)
    specimen = crystals.cut(material, rng, optics.box, preparation=THICK)
    layers = np.stack(potentials(specimen, optics))
    ours = multislice.diffract(layers, np.int32(len(layers)), waves(optics), optics)
    with abtem.config.set(settings):
        slices = abtem.PotentialArray(
            layers, slice_thickness=optics.slice_thickness, extent=optics.box
        )
        done = real_space(optics, waves(optics)).multislice(slices).compute()
    return np.asarray(ours), np.abs(np.fft.fft2(done.array)) ** 2


@pytest.mark.parametrize("material", ["Si", "SrTiO3", "Au"])
@pytest.mark.parametrize("pixels", [64, 128])
def test_abtem_finds_the_same_patterns(material: str, pixels: int) -> None:
    assert difference(*both(material, pixels, **SHARP)) < 1e-5


@pytest.mark.parametrize(
    ("material", "coarse", "fine"),
    [("Si", 0.01, 1e-3), ("SrTiO3", 0.02, 0.002), ("Au", 0.06, 0.02)],
)
def test_abtems_taper_of_the_band_limit_is_all_the_difference(
    material: str, coarse: float, fine: float
) -> None:
    # By default abTEM lets its band limit fade over 0.01 / sampling; ours is a step.
    # The more scatters up to there, the more it matters.
    errors = [difference(*both(material, pixels)) for pixels in (64, 128)]
    assert 1e-3 < errors[0] < coarse
    assert 1e-4 < errors[1] < fine


def test_abtems_aberrations_have_the_same_signs() -> None:
    fields: dict[str, Any] = {"c1": -80.0, "c3": 2e5, "c5": 1e8, "astigmatism": 40.0}
    still = Optics(box=32, pixels=128)
    ours = Optics(box=32, pixels=128, astigmatism_deg=25, **fields)
    lens = abtem.CTF(
        energy=still.energy_ev,
        C10=fields["c1"],
        C30=fields["c3"],
        C50=fields["c5"],
        C12=fields["astigmatism"],
        phi12=np.deg2rad(25),
    )
    theirs = real_space(still, waves(still)).apply_ctf(lens).compute().array
    wanted = real_space(ours, waves(ours)).array
    assert difference(theirs, wanted) < 1e-4
