"""The tracing benchmark's table."""

from __future__ import annotations

import statistics
from typing import Any

OURS, PASS = "jaxcomm.data_parallel", "of it, the pass"


def markdown(result: dict[str, Any]) -> str:
    """The result as a table."""
    median = {
        name: statistics.median(times) for name, times in result["samples_ms"].items()
    }
    lines = [
        f"ResNet-50's training step, {result['buckets']} buckets, {result['date']}, "
        f"medians of {len(result['samples_ms'][OURS])}.",
        "",
        "| trace and lower | ms | jaxcomm / it |",
        "|---|--:|--:|",
    ]
    for name, ms in median.items():
        ratio = "" if name in (OURS, PASS) else f"{median[OURS] / ms:.2f}"
        lines.append(f"| {name} | {ms:.0f} | {ratio} |")
    return "\n".join(lines) + "\n"
