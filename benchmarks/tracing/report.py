"""The tracing benchmark's table."""

from __future__ import annotations

from typing import Any

OURS, PASS = "jaxcomm.data_parallel", "of it, the pass"


def markdown(result: dict[str, Any]) -> str:
    """The result as a table."""
    times = result["times_ms"]
    median = {name: summary["median"] for name, summary in times.items()}
    lines = [
        f"ResNet-50's training step, {result['buckets']} buckets, {result['date']}, "
        f"medians of {times[OURS]['samples']}.",
        "",
        "| trace and lower | ms | jaxcomm / it |",
        "|---|--:|--:|",
    ]
    for name, ms in median.items():
        ratio = "" if name in (OURS, PASS) else f"{median[OURS] / ms:.2f}"
        lines.append(f"| {name} | {ms:.0f} | {ratio} |")
    return "\n".join(lines) + "\n"
