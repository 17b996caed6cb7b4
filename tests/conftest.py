"""Start jobs of several ranks, each with a time limit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

Launch = Callable[..., "subprocess.CompletedProcess[str]"]


def launch_ranks(
    ranks: int,
    command: Sequence[str | Path],
    *,
    timeout: float = 120,
    options: Sequence[str] = (),
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `jaxcomm run`; after `timeout` it dumps all stacks and exits with 124."""
    line = [sys.executable, "-m", "jaxcomm", "run", "-n", str(ranks)]
    line += ["--timeout", str(timeout), *options, *map(str, command)]
    return subprocess.run(
        line,
        cwd=ROOT,
        # Plans must not depend on what was tuned on this machine.
        env={**os.environ, "JAXCOMM_PROFILE": "off", **(env or {})},
        capture_output=True,
        text=True,
        # The launcher's own limit comes first; this one only guards the guard.
        timeout=timeout + 30,
        check=False,
    )


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
