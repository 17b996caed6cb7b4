"""STEMDL's simulator against closed forms, symmetries and its own finer grids."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from scipy.integrate import quad
from scipy.special import j0, jv

from stemdl.data import dataset
from stemdl.physics import crystals, dose, multislice, potential
from stemdl.physics.crystals import Preparation, Specimen
from stemdl.physics.optics import Optics

OPTICS = Optics()
RIGID = Preparation(min_thickness=20, max_thickness=20, rms_displacement=0)


def probe(optics: Optics = OPTICS, at: float = 8.0) -> np.ndarray:
    return multislice.probes(optics, np.array([at]), np.array([at]))


def plane_wave(optics: Optics = OPTICS) -> np.ndarray:
    wave = np.zeros((1, optics.pixels, optics.pixels), np.complex64)
    wave[0, 0, 0] = 1
    return wave


def diffract(
    layers: list[np.ndarray],
    waves: np.ndarray,
    optics: Optics = OPTICS,
    **options: bool,
) -> np.ndarray:
    """Intensities behind these slices, float64."""
    stack = np.zeros((optics.max_slices, optics.pixels, optics.pixels), np.float32)
    stack[: len(layers)] = layers
    done = multislice.diffract(stack, np.int32(len(layers)), waves, optics, **options)
    return np.asarray(done, np.float64)


def potentials(specimen: Specimen, optics: Optics = OPTICS) -> list[np.ndarray]:
    filled = math.ceil(specimen.thickness / optics.slice_thickness)
    coefficients = potential.fourier_coefficients(specimen, optics)
    return list(potential.slices(coefficients)[:filled])


def projected(specimen: Specimen, optics: Optics = OPTICS) -> np.ndarray:
    return np.sum(potentials(specimen, optics), axis=0)


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).sum() / np.abs(wanted).sum())


def test_without_a_band_limit_no_electron_is_lost() -> None:
    thick = Preparation(min_thickness=40, max_thickness=40)
    gold = crystals.cut("Au", np.random.default_rng(1), OPTICS.box, preparation=thick)
    layers = potentials(gold)
    assert diffract(layers, probe(), band_limited=False).sum() == pytest.approx(
        1, abs=1e-4
    )
    assert diffract(layers, probe()).sum() < 0.99


def test_vacuum_leaves_the_disk_of_the_aperture() -> None:
    found = diffract([np.zeros((64, 64))] * 20, probe())[0]
    np.testing.assert_allclose(found, OPTICS.aperture() ** 2, atol=1e-7)
    # 20 mrad at 100 keV are 0.54 / A, and a pixel is 1 / 16 A.
    across = multislice.detector_crop(found, OPTICS.detector)[12]
    radius = 0.020 / 0.037014 * 16
    inside = np.abs(np.arange(-12, 13)) < radius - 0.5
    np.testing.assert_array_equal(across > 0.9 * across.max(), inside)


def test_a_thin_object_multiplies_the_probe_by_its_phase() -> None:
    layer = potentials(crystals.cut("MgO", np.random.default_rng(2), OPTICS.box))[0]
    found = diffract([layer], probe(), band_limited=False)[0]
    wave = np.fft.ifft2(probe()[0].astype(np.complex128))
    exit_wave = wave * np.exp(1j * OPTICS.interaction * np.asarray(layer, np.float64))
    np.testing.assert_allclose(found, np.abs(np.fft.fft2(exit_wave)) ** 2, atol=1e-7)


@pytest.mark.parametrize("phase", [0.02, 1.5])
def test_a_sinusoidal_grating_diffracts_into_bessel_orders(phase: float) -> None:
    # Jacobi and Anger: exp(i s cos x) = sum_n i^n J_n(s) exp(i n x).
    period = 10
    x = np.arange(64) / 64
    grating = phase / OPTICS.interaction * np.cos(2 * np.pi * period * x)
    layer = np.repeat(grating[:, None], 64, axis=1)
    wave = probe()[0]
    wanted = sum(
        1j**n * jv(n, phase) * np.roll(wave, n * period, axis=0) for n in range(-2, 3)
    )
    found = diffract([layer], probe(), band_limited=False)[0]
    # The orders left out.
    rest = 4 * jv(3, phase)
    np.testing.assert_allclose(found, np.abs(wanted) ** 2, atol=1e-6 + rest**2)
    if phase < 0.1:
        # A weak phase object: the disk at +g, which no other overlaps beyond 2 g - a.
        disk = np.roll(np.abs(wave) ** 2, period, axis=0)
        alone = np.zeros_like(disk)
        alone[10:15] = 1
        ratio = (found * alone).sum() / (disk * alone).sum()
        assert ratio == pytest.approx((phase / 2) ** 2, rel=2e-3)


def test_a_gaussian_beam_spreads_as_it_should() -> None:
    optics = Optics(slice_thickness=40)
    sigma, distance = 0.8, 3 * 40
    k2 = optics.radial_frequencies() ** 2
    wave = np.exp(-2 * (np.pi * sigma) ** 2 * k2) * optics.propagator() ** 3
    found = np.fft.fftshift(np.fft.ifft2(wave)) / optics.sampling**2
    x = (np.arange(64) - 32) * optics.sampling
    # Of exp(-r^2 / 2 s^2), s^2 grows by i lambda z / 2 pi.
    square = sigma**2 + 1j * optics.wavelength * distance / (2 * np.pi)
    along = np.exp(-(x**2) / (2 * square)) / np.sqrt(2 * np.pi * square)
    np.testing.assert_allclose(found, np.outer(along, along), atol=1e-6)


def test_overfocus_is_a_focus_before_the_specimen() -> None:
    rng = np.random.default_rng(3)
    layer = projected(crystals.cut("Si", rng, OPTICS.box))
    vacuum = np.zeros_like(layer)
    wanted = diffract([*[vacuum] * 15, layer], probe(at=7.3))
    over = dataclasses.replace(OPTICS, c1=15 * OPTICS.slice_thickness)
    under = dataclasses.replace(OPTICS, c1=-15 * OPTICS.slice_thickness)
    found = [diffract([layer], probe(optics, 7.3)) for optics in (over, under)]
    assert difference(found[0], wanted) < 1e-4
    assert difference(found[1], wanted) > 0.05


@pytest.mark.parametrize(
    "fields",
    [{"c1": 120.0}, {"c3": 1e5}, {"c5": 2e8}, {"astigmatism": 90.0}],
)
def test_rays_meet_the_specimen_where_geometry_says(fields: dict[str, Any]) -> None:
    optics = Optics(
        box=32, pixels=128, label_pixels=32, aperture_mrad=20, detector=41, **fields
    )
    angle, along, across = 15e-3, 1.0, 1.0
    if "astigmatism" in fields:
        optics = dataclasses.replace(optics, astigmatism_deg=90)
        along, across = -1.0, 1.0
    k = optics.frequencies()
    wave = multislice.probes(optics, np.array([16.0]), np.array([16.0]))[0]
    lens = wave / np.where(optics.aperture() > 0, optics.aperture(), 1)
    path = fields.get("c1", 0) * angle + fields.get("astigmatism", 0) * angle
    path += fields.get("c3", 0) * angle**3 + fields.get("c5", 0) * angle**5
    for axis, sign in ((0, along), (1, across)):
        # A narrow part of the beam around one ray.
        centre = np.zeros(2)
        centre[axis] = angle / optics.wavelength
        offset = np.hypot(k[:, None] - centre[0], k[None, :] - centre[1])
        ray = np.abs(np.fft.ifft2(lens * np.exp(-((offset / 0.06) ** 2)))) ** 2
        profile = ray.sum(1 - axis)
        place = (profile * np.arange(128)).sum() / profile.sum() * optics.sampling
        assert place - 16 == pytest.approx(sign * path, abs=0.08)


def error_of(fields: dict[str, Any], reference: np.ndarray) -> float:
    return difference(pattern(fields), reference)


def pattern(fields: dict[str, Any]) -> np.ndarray:
    """Patterns of four probes through 20 A of silicon on another grid."""
    optics = dataclasses.replace(Optics(probes=2, max_slices=40), **fields)
    specimen = crystals.cut("Si", np.random.default_rng(4), 16.0, preparation=RIGID)
    layers = np.stack(potentials(specimen, optics))
    stack = np.zeros((40, *layers.shape[1:]), np.float32)
    stack[: len(layers)] = layers
    return multislice.scan(stack, len(layers), optics).astype(np.float64)


def test_thinner_slices_and_finer_grids_converge() -> None:
    fine = pattern({"slice_thickness": 0.5})
    errors = [error_of({"slice_thickness": d}, fine) for d in (4.0, 2.0, 1.0)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[1] < 0.004 and errors[2] < 0.0012, errors
    fine = pattern({"pixels": 128, "label_pixels": 64})
    errors = [
        error_of({"pixels": n, "label_pixels": n // 2}, fine) for n in (44, 64, 96)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[1] < 0.015 and errors[2] < 0.0012, errors


def test_hydrogen_scatters_as_its_wave_function_says() -> None:
    s = np.array([1e-4, 0.2, 0.5, 1.0, 2.0])
    bohr = potential.BOHR_RADIUS
    exact = (1 - (1 + (2 * np.pi * bohr * s) ** 2) ** -2) / (8 * np.pi**2 * bohr * s**2)
    np.testing.assert_allclose(potential.scattering_factor("H", s), exact, rtol=0.01)


@pytest.mark.parametrize("symbol", ["O", "Au"])
def test_an_atom_has_the_projected_potential_of_its_form_factor(symbol: str) -> None:
    atom = Specimen(np.array([symbol]), np.array([[8.0, 8.0, 1.0]]), 2.0)
    coefficients = potential.fourier_coefficients(atom, OPTICS)[0]
    # Blurred like a label, by 0.35 A, or the grid would cut the cusp.
    blur = np.exp(-2 * (np.pi * 0.35 * OPTICS.radial_frequencies()) ** 2)
    found = potential.slices(coefficients * blur)[32, 32:44]

    def integrand(k: float, r: float) -> float:
        factor = potential.scattering_factor(symbol, np.array(k / 2))
        damping = math.exp(-2 * (math.pi * 0.35 * k) ** 2)
        return float(factor * damping * 2 * np.pi * k * j0(2 * np.pi * k * r))

    radii = np.arange(12) * OPTICS.sampling
    wanted = [
        potential.POTENTIAL_PER_FACTOR * quad(integrand, 0, 3, args=(r,), limit=200)[0]
        for r in radii
    ]
    np.testing.assert_allclose(found, wanted, atol=2e-3 * wanted[0])


def test_an_atom_that_moves_out_of_the_specimen_stays_in_its_last_slice() -> None:
    atoms = np.array([[8.0, 8.0, -0.1], [4.0, 4.0, 4.1]])
    specimen = Specimen(np.array(["Si", "Si"]), atoms, 3.98)
    first, second, *behind = potential.fourier_coefficients(specimen, OPTICS)
    # Their means are those of an atom each, and behind them there is nothing.
    assert first[0, 0] == second[0, 0] != 0
    assert not np.any(behind)


def test_counts_have_a_poisson_mean_and_variance() -> None:
    fractions = np.array([0.0, 2e-4, 0.01, 0.3], np.float32)
    electrons, draws = 1e3, 40_000
    found = dose.count(
        np.broadcast_to(fractions, (draws, 4)), electrons, np.random.default_rng(5)
    ).astype(np.float64)
    mean = fractions * electrons
    error = np.sqrt(mean / draws)
    assert np.all(np.abs(found.mean(0) * electrons - mean) <= 5 * error)
    # The variance of a sample variance of Poisson numbers is m (1 + 2 m) / n.
    spread = np.sqrt(mean * (1 + 2 * mean) / draws)
    variance = found.var(0) * electrons**2
    assert np.all(np.abs(variance - mean) <= 5 * spread)
    np.testing.assert_array_equal(
        dose.count(fractions, math.inf, np.random.default_rng(5)), fractions
    )
    with pytest.raises(ValueError, match="dose=0: give a positive"):
        dose.count(fractions, 0, np.random.default_rng(5))


def mirrored(specimen: Specimen) -> Specimen:
    positions = specimen.positions * [-1, 1, 1] + [OPTICS.box, 0, 0]
    return dataclasses.replace(specimen, positions=positions)


def test_a_mirrored_crystal_gives_mirrored_patterns() -> None:
    specimen = crystals.cut("GaAs", np.random.default_rng(6), OPTICS.box)
    found, other = (
        multislice.detector_crop(
            diffract(
                potentials(piece),
                multislice.probes(OPTICS, np.array([x]), np.array([9.0])),
            ),
            OPTICS.detector,
        )[0]
        for piece, x in ((specimen, 7.0), (mirrored(specimen), 9.0))
    )
    np.testing.assert_allclose(other, found[::-1], atol=1e-6)
    assert difference(found, found[::-1]) > 0.05


def test_only_weak_scattering_obeys_friedels_law() -> None:
    layer = projected(crystals.cut("GaAs", np.random.default_rng(7), OPTICS.box))

    def asymmetry(strength: float) -> float:
        whole = diffract([strength * layer], plane_wave())[0]
        found = multislice.detector_crop(whole, 25)
        found[12, 12] = 0
        return difference(found, found[::-1, ::-1])

    assert asymmetry(1e-3) < 0.01
    assert asymmetry(1.0) > 0.1


def test_frozen_phonons_weaken_reflections_like_debye_and_waller() -> None:
    optics = Optics(box=16.2, window=8.1)
    rng, rms, draws = np.random.default_rng(8), 0.12, 60
    cell = bulk("Al", a=4.05, cubic=True).repeat((4, 4, 1))
    symbols, rigid = np.array(cell.get_chemical_symbols()), cell.positions

    def intensity(positions: np.ndarray) -> np.ndarray:
        thin = Specimen(symbols, positions, 4.05)
        # So weak that every electron scatters once at most.
        layer = 0.02 * projected(thin, optics)
        return diffract([layer], plane_wave(optics), optics)[0]

    still = intensity(rigid)
    moving = [
        intensity(rigid + rng.normal(scale=rms, size=rigid.shape)) for _ in range(draws)
    ]
    # Reflections (200), (220), (400): g = n / 4.05 A is pixel 4 n.
    for at in ((8, 0), (8, 8), (16, 0)):
        g2 = (at[0] ** 2 + at[1] ** 2) / optics.box**2
        debye_waller = math.exp(-4 * (np.pi * rms) ** 2 * g2)
        # Diffuse scattering is under the reflections too.
        wanted = debye_waller + (1 - debye_waller) / len(rigid)
        found = np.mean(moving, axis=0)[at] / still[at]
        assert found == pytest.approx(wanted, rel=0.05), at
    # What they lose is between them.
    assert np.mean(moving, axis=0)[2, 2] > 1e3 * still[2, 2]


def test_a_sample_is_the_mean_of_its_frozen_phonons() -> None:
    still = dataset.DataConfig(train=2, test=1)
    moving = dataclasses.replace(still, preparation=Preparation(phonons=3))
    specimens = list(dataset.configurations_of(moving, 1))
    np.testing.assert_array_equal(
        specimens[0].positions, dataset.specimen_of(still, 1).positions
    )
    coefficients = [potential.fourier_coefficients(s, OPTICS) for s in specimens]
    filled = math.ceil(specimens[0].thickness / 2)
    scans = [multislice.scan(potential.slices(c), filled, OPTICS) for c in coefficients]
    amplitudes, label = dataset.simulate_sample(moving, 1)
    np.testing.assert_allclose(amplitudes**2, np.mean(scans, axis=0), atol=1e-7)
    wanted = potential.label(np.mean(coefficients, axis=0), OPTICS)
    np.testing.assert_allclose(label, wanted, atol=1e-5)
    assert difference(amplitudes, dataset.simulate_sample(still, 1)[0]) > 0.01


def test_mistilt_turns_the_crystal_and_nothing_else() -> None:
    largest, found = 30.0, []
    tilted = dataclasses.replace(RIGID, mistilt_mrad=largest)
    for seed in range(20):
        straight, turned = (
            crystals.cut("Cu", np.random.default_rng(seed), 16.0, preparation=each)
            for each in (RIGID, tilted)
        )
        assert straight.thickness == turned.thickness
        centre = np.array([8, 8, straight.thickness / 2])
        a, b = straight.positions - centre, turned.positions - centre
        apart = np.linalg.norm(a[:, None] - b[None], axis=-1)
        near = apart.argmin(1)
        pairs = apart.min(1) < 1.0
        # Kabsch: the rotation between atoms and their nearest ones.
        u, _, v = np.linalg.svd(a[pairs].T @ b[near[pairs]])
        turn = (u @ v).T
        np.testing.assert_allclose(
            b[near[pairs]], a[pairs] @ turn.T, atol=1e-9, err_msg=str(seed)
        )
        assert abs(turn[0, 1] - turn[1, 0]) < 1e-9
        found.append(1e3 * math.acos(min(1.0, turn[2, 2])))
    assert max(found) <= largest
    # Uniform in a disk: half of them beyond 0.71 of the largest.
    assert 0.5 < np.median(found) / largest < 0.9


def test_rutile_and_spinel_have_their_bonds() -> None:
    for name, bond in (("TiO2", 1.95), ("TiO2 anatase", 1.93), ("MgAl2O4", 1.92)):
        cell: Atoms = crystals.crystals()[name]
        distances = cell.get_all_distances(mic=True)
        nearest = distances[distances > 0].min()
        assert nearest == pytest.approx(bond, abs=0.015), name
