"""The examples' clients run under both backends and agree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.jobs import ROOT

pytestmark = pytest.mark.long

CLIENTS = ROOT / "examples" / "clients"


@pytest.mark.parametrize(
    "name", [pytest.param("mlp", marks=pytest.mark.thorough), "transformer"]
)
def test_client_agrees_with_pmap(name: str, tmp_path: Path) -> None:
    script = [str(CLIENTS / f"{name}.py"), "--steps", "4", "--backend"]
    launch = ["-m", "jaxcomm", "run", "-n", "2", "--timeout", "120"]
    for line in ([*script, "pmap"], [*launch, *script, "jaxcomm"]):
        done = subprocess.run(
            [sys.executable, *line],
            cwd=tmp_path,
            env={**os.environ, "JAXCOMM_PROFILE": "off"},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    out = tmp_path / "out" / "clients"
    one, other = (np.load(out / f"{name}-{b}.npz") for b in ("pmap", "jaxcomm"))
    assert (out / f"{name}.png").exists()
    names = sorted(set(one) - {"losses", "seconds"})
    flat = [np.concatenate([np.ravel(f[n]) for n in names]) for f in (one, other)]
    gap = np.linalg.norm(flat[1] - flat[0]) / np.linalg.norm(flat[0])
    assert gap <= 1e-6, gap
