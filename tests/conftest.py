"""Fixtures that start jobs of several ranks, and the order of the files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.jobs import Launch, launch_ranks

# Files of minutes begin first: of two workers, none is then left with one at the end.
LONG = (
    "test_conformance.py",
    "test_faults.py",
    "test_equality.py",
    "test_demo.py",
    "test_restart.py",
    "test_reduction.py",
    "test_clients.py",
    "test_named_axis.py",
    "test_library.py",
    "test_nccl.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture
def launch() -> Launch:
    """Return `launch_ranks`."""
    return launch_ranks


@pytest.fixture
def job(tmp_path: Path) -> Launch:
    """Return a function that runs a piece of Python text on some ranks."""

    def run(ranks: int, text: str, *arguments: str, **options: object):
        script = tmp_path / "script.py"
        script.write_text(text)
        return launch_ranks(ranks, [script, *arguments], **options)  # type: ignore[arg-type]

    return run
