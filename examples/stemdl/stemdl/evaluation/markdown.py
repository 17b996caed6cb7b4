"""The report as a reader sees it, from what `report.json` holds and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from stemdl.evaluation import columns, similarity

_SCORES = {
    "nrmse_mean": "NRMSE mean",
    "nrmse_median": "median",
    "pearson_mean": "Pearson mean",
    "pearson_median": "median",
    "ssim_mean": "SSIM mean",
    "ssim_median": "median",
    "resolution_0.5_median_A": "FRC 0.5, Å",
    "resolution_1/7_median_A": "FRC 1/7, Å",
}

_COLUMNS = {
    "columns_found": "found",
    "columns_false": "false",
    "column_error_median_A": "error median, Å",
    "column_error_p95_A": "95th percentile, Å",
    "column_height_error_median": "height error",
}

_DEFINITIONS = f"""\
- **NRMSE**: root mean square error over root mean square truth; 0 is perfect, 1 is
  what predicting the mean scores.
- **Pearson**: correlation coefficient of the pixels.
- **SSIM**: structural similarity, Gaussian window of {similarity.SIGMA} pixels
  (11 x 11), data range that of the sample's truth.
- **FRC**: length at which the Fourier ring correlation with the truth first falls
  below 0.5, and below 1/7; Hann window, rings one Fourier pixel wide, the first passed
  over; "inf" if the second is below. Median over samples.
- **Atom column**: a local maximum, highest within {columns.SEPARATION} Å along each
  axis and more than {columns.THRESHOLD} standard deviations of the truth above its
  mean; its position by a quadratic fit to 3 x 3 pixels, its height by cubic splines.
  The same for truth and reconstruction.
- **Matched**: paired one to one within {columns.RADIUS} Å, as many as possible, then as
  close as possible.
- **Found**: matched true columns over all true columns. **False**: reconstructed
  columns without a partner over all reconstructed ones.
- **Error**: distance of the partners. **Height error**: |height ratio - 1|, heights
  above the truth's minimum; median. All over the columns of all samples together.
- **Border**: columns within {columns.BORDER} Å of the window's edge are not counted,
  but may be the partner of one that is.
- **R**: sum of |simulated - measured| over the sum of measured amplitudes."""

_LIMITS = """\
- One training, one seed: no spread between trainings.
- Truth and patterns come from one simulator, and the R factors use it again. The
  network inverts this simulator, not a microscope.
- Every structure type of the built-in held-out materials also occurs in training,
  in other materials.
- Labels are blurred and standardised: absolute potentials and columns closer than the
  blur are not tested.
- Noise is counting noise alone. Baselines were not fitted to it; the settings say
  whether the network was trained on it."""


def render(report: Mapping[str, Any]) -> str:
    """Write the report as Markdown.

    Args:
      report: what `report.json` holds.
    """
    methods, check = report["methods"], report["consistency"]
    thickness, doses = report["thickness"], report["dose"]
    materials = report["materials"]
    settings = {name: [str(value)] for name, value in report["settings"].items()}
    samples = len(report["samples"]["index"])
    parts = [
        "# Reconstruction of held-out materials",
        f"{samples} samples of {len(materials)} materials that were not trained on: "
        f"{', '.join(materials)}.",
        "![truth, reconstruction and difference](reconstruction.png)",
        "## Scores",
        table("method", _SCORES.values(), _rows(methods, _SCORES)),
        "![Fourier ring correlation](ring_correlation.png)",
        "## Atom columns",
        table("method", _COLUMNS.values(), _rows(methods, _COLUMNS)),
        "![columns marked](columns.png)",
        "![profiles through columns](profile.png)",
        "![column errors](column_errors.png)",
        "## Against thickness and dose",
        "NRMSE, mean over samples:",
        _against(
            {_range(b): (b["samples"], b["methods"]) for b in thickness},
            methods,
            "nrmse_mean",
        ),
        _against(
            {_dose(d): (samples, d["methods"]) for d in doses}, methods, "nrmse_mean"
        ),
        "Atom columns found:",
        _against(
            {_range(b): (b["samples"], b["methods"]) for b in thickness},
            methods,
            "columns_found",
        ),
        _against(
            {_dose(d): (samples, d["methods"]) for d in doses}, methods, "columns_found"
        ),
        "Atom columns false:",
        _against(
            {_dose(d): (samples, d["methods"]) for d in doses}, methods, "columns_false"
        ),
        "![NRMSE against thickness and dose](robustness.png)",
        "## By material",
        "NRMSE, mean over samples:",
        _against(
            {name: (m["samples"], m["methods"]) for name, m in materials.items()},
            methods,
            "nrmse_mean",
        ),
        "## Forward consistency",
        "Patterns simulated from a potential, compared with the measured ones, for the "
        f"{check['probes']} probes in the central half of the window of the first "
        f"{check['samples']} samples; the others' beams see the outside. A label tells "
        "neither scale, depth nor outside. Assumed: one gain per sample, fitted to its "
        "patterns; the potential spread evenly over the sample's slices; the window "
        "mirrored at its edges; the blur undone by a Wiener filter. The true label is "
        "thus the best that this check can show, a flat potential the worst; another "
        "sample's label is what a wrong crystal reaches by its gain alone.",
        table(
            "potential",
            ("R mean", "R median"),
            {
                name: [_text(check["r_mean"][name]), _text(check["r_median"][name])]
                for name in check["r_mean"]
            },
        ),
        "## Definitions",
        _DEFINITIONS,
        "## What it does not show",
        _LIMITS,
        "## Settings",
        table("setting", ("value",), settings),
        "![training loss](loss.png)",
    ]
    return "\n\n".join(parts) + "\n"


def table(corner: str, heads: Iterable[str], rows: Mapping[str, Iterable[str]]) -> str:
    """A Markdown table; rows by their first cell."""
    lines = [[corner, *heads], *([name, *cells] for name, cells in rows.items())]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rows(
    methods: Mapping[str, Mapping[str, Any]], names: Mapping[str, str]
) -> dict[str, list[str]]:
    return {m: [_text(found[name]) for name in names] for m, found in methods.items()}


def _against(
    groups: Mapping[str, tuple[int, Mapping[str, Any]]],
    methods: Iterable[str],
    score: str,
) -> str:
    """A table of one score: methods down, groups across."""
    heads = [f"{group} ({count})" for group, (count, _) in groups.items()]
    rows = {
        method: [_text(found[method][score]) for _, found in groups.values()]
        for method in methods
    }
    return table("method (samples)", heads, rows)


def _text(value: float | str | None) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.3f}"


def _range(thickness: Mapping[str, Any]) -> str:
    return f"{thickness['from_A']:g} to {thickness['to_A']:g} Å"


def _dose(dose: Mapping[str, Any]) -> str:
    electrons = dose["electrons_per_pattern"]
    return "no noise" if electrons == "inf" else f"{electrons:.0e} electrons"
