"""What the doctor finds: a row each; and looks that cannot end the doctor itself."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

SECONDS = 60


@dataclasses.dataclass(frozen=True)
class Finding:
    """One row.

    Attributes:
      what: the part looked at.
      status: "ok", "warn" (works, could be better), "missing" (cannot be used).
      found: what was found.
      remedy: what to do, or "".
    """

    what: str
    status: str
    found: str
    remedy: str = ""


def look(text: str) -> tuple[dict | None, str]:
    """Run a piece of Python that prints JSON; return it, or why it failed.

    It runs in a process of its own, with a time limit.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", text],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer within {SECONDS} s"
    try:
        return json.loads(done.stdout.strip().splitlines()[-1]), ""
    except (IndexError, ValueError):
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return None, (lines or [f"exit code {done.returncode}"])[-1][:300]
