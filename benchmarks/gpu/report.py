"""What is kept of the sections in gpu.json."""

from __future__ import annotations

import re
from typing import Any


def without_paths(found: Any) -> Any:
    """Keep of paths, in all texts, the file's name: the rest is this machine's."""
    if isinstance(found, str):
        return re.sub(r"(?<![\w.])(?:/[\w.+-]+)+/(?=[\w.+-])", "", found)
    if isinstance(found, list):
        return [without_paths(each) for each in found]
    if isinstance(found, dict):
        return {key: without_paths(value) for key, value in found.items()}
    return found


def with_row(rows: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """Add a section's row, in place of one that the same call made before."""
    key = row["name"], row["call"]
    return [*(old for old in rows if (old["name"], old["call"]) != key), row]
