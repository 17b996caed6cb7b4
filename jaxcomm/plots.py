"""Matplotlib, where something is to be drawn."""

from __future__ import annotations

from typing import Any

from jaxcomm.errors import InvalidOptionError


def pyplot() -> Any:
    """Import matplotlib for files, or say how to get it."""
    try:
        import matplotlib
    except ImportError as error:
        raise InvalidOptionError(
            "--plot needs matplotlib: pip install matplotlib"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
