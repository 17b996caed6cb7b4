"""Fixtures that start jobs of several ranks, and the order of the files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.jobs import Launch, launch_ranks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with long files: of two workers, none is left with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture
def launch() -> Launch:
    """Return `launch_ranks`."""
    return launch_ranks


@pytest.fixture
def job(tmp_path: Path) -> Launch:
    """Return a function that runs a piece of Python text on some ranks."""

    def run(ranks: int | None, text: str, *arguments: str, **options: object):
        script = tmp_path / "script.py"
        script.write_text(text)
        return launch_ranks(ranks, [script, *arguments], **options)  # type: ignore[arg-type]

    return run
