"""Tables of docs/scaling.md, made from docs/scaling.json."""

from __future__ import annotations

import re
from typing import Any

from jaxcomm.simulate.experiment import DESIGNS

_MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str, found: dict[str, Any]) -> str:
    """Replace what stands between `<!-- table: NAME -->` and `<!-- end -->`."""
    return _MARKED.sub(lambda m: m[1] + _TABLES[m[2]](found) + m[3], page)


def rounded(tree: Any) -> Any:
    """Shorten floats to six significant digits, so that files stay small and stable."""
    if isinstance(tree, float):
        return float(f"{tree:.6g}")
    if isinstance(tree, dict):
        return {key: rounded(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [rounded(value) for value in tree]
    return tree


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def efficiency(found: dict[str, Any]) -> str:
    """Efficiency with its range, by workload and ranks."""
    rows = []
    for name, each in found["efficiency"].items():
        for ranks in (1536, 6000, 27600):
            mine = {r["design"]: r for r in each["results"] if r["ranks"] == ranks}
            cells = []
            for design in DESIGNS:
                low, high = mine[design]["efficiency_range"]
                cells.append(f"{mine[design]['efficiency']:.3f} ({low:.2f}-{high:.2f})")
            rows.append([f"{name}, {ranks:,}", *cells])
    return _table(["workload, ranks", *DESIGNS], rows)


def steps(found: dict[str, Any]) -> str:
    """What a step is made of at the largest size."""
    rows = []
    for name, each in found["efficiency"].items():
        for row in each["results"]:
            if row["ranks"] == 27600:
                numbers = [
                    f"{row[key]:,.2f}"
                    for key in ("step_ms", "control_ms", "waited_ms", "exposed_comm_ms")
                ]
                rows.append(
                    [
                        f"{name}, {row['design']}",
                        *numbers,
                        f"{row['messages_per_step']:,.0f}",
                        f"{row['once_ms']:,.2f}",
                        f"{row['energy_j'] / 1e6:,.2f}",
                    ]
                )
    head = ["27,600 ranks", "step, ms", "control plane works, ms"]
    head += ["a gradient waits, ms", "exposed, ms", "control messages a step"]
    return _table([*head, "once, ms", "MJ a step"], rows)


def validation(found: dict[str, Any]) -> str:
    """Published and predicted."""
    rows = [
        [
            row["anchor"],
            f"{row['published']:g}",
            f"{row['predicted']:.3f}",
            f"{row['low']:.3f} to {row['high']:.3f}",
            f"{row['error']:+.1%}",
            row["fitted_parameter"] or "none",
            row["note"],
        ]
        for row in found["validation"]
    ]
    head = [
        "anchor",
        "published",
        "model",
        "range",
        "error",
        "fitted parameter",
        "note",
    ]
    return _table(head, rows)


def order(found: dict[str, Any]) -> str:
    """Exposed communication by how far orders differ."""
    rows = [
        [
            f"{row['workload']}, {row['spread']:g}",
            *(f"{row['exposed_ms'][design]:.2f}" for design in DESIGNS),
        ]
        for row in found["order"]
    ]
    return _table(["workload, spread", *DESIGNS], rows)


def elsewhere(found: dict[str, Any]) -> str:
    """Efficiency on other machines."""
    rows = [
        [
            f"{row['machine']}, {row['ranks']:,} ranks, {row['workload']}",
            *(f"{r['efficiency']:.3f}" for r in row["results"]),
        ]
        for row in found["elsewhere"]
    ]
    return _table(["machine, workload", *DESIGNS], rows)


def parameters(found: dict[str, Any]) -> str:
    """Every parameter of Summit and STEMDL, with its source."""
    rows = [
        [
            p["name"],
            f"{p['value']:.3g}",
            f"{p['low']:.3g} to {p['high']:.3g}" if p["low"] < p["high"] else "",
            p["source"],
        ]
        for p in found["efficiency"]["stemdl"]["parameters"]
    ]
    return _table(["parameter (SI units)", "value", "range", "source"], rows)


_TABLES = {
    f.__name__: f for f in (efficiency, steps, validation, order, elsewhere, parameters)
}
