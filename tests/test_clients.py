"""The examples' clients run in their ways, and agree with pmap."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.jobs import ROOT

pytestmark = pytest.mark.long

CLIENTS = ROOT / "examples" / "clients"
ALL = ["pmap", "jaxcomm", "shard_map", "jaxcomm-shard_map"]


def run(script: Sequence[str], ways: Sequence[str], cwd: Path) -> None:
    line = [str(CLIENTS / script[0]), *script[1:], "--steps", "4", "--backend"]
    launch = ["-m", "jaxcomm", "run", "-n", "2", "--timeout", "180"]
    for way in ways:
        start = launch if way.startswith("jaxcomm") else []
        done = subprocess.run(
            [sys.executable, *start, *line, way],
            cwd=cwd,
            env={**os.environ, "JAXCOMM_PROFILE": "off"},
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def parameters(name: str, way: str, cwd: Path) -> dict[str, np.ndarray]:
    return dict(np.load(cwd / "out" / "clients" / f"{name}-{way}.npz"))


def assert_agree(name: str, ways: Sequence[str], cwd: Path) -> None:
    assert (cwd / "out" / "clients" / f"{name}.png").exists()
    theirs, *others = (parameters(name, way, cwd) for way in ways)
    names = sorted(set(theirs) - {"losses", "seconds"})
    for mine in others:
        assert set(mine) == set(theirs)
        for leaves in (["losses"], names):
            one, other = (
                np.concatenate([np.ravel(found[leaf]) for leaf in leaves])
                for found in (theirs, mine)
            )
            gap = np.linalg.norm(other - one) / np.linalg.norm(one)
            assert gap <= 1e-6, gap


@pytest.mark.parametrize(
    "name", ["mlp", pytest.param("transformer", marks=pytest.mark.thorough)]
)
def test_client_agrees_with_pmap(name: str, tmp_path: Path) -> None:
    ways = ("pmap", "jaxcomm")
    run([f"{name}.py"], ways, tmp_path)
    assert_agree(name, ways, tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "ways"),
    [
        ("actor_critic", ["--x64"], ["pmap", "jaxcomm-shard_map"]),
        pytest.param("actor_critic", ["--x64"], ALL, marks=pytest.mark.thorough),
        pytest.param("vit", [], ALL, marks=pytest.mark.thorough),
        pytest.param("language_model", [], ALL, marks=pytest.mark.thorough),
    ],
    ids=["actor_critic-2", "actor_critic", "vit", "language_model"],
)
def test_ways_agree(
    name: str, options: list[str], ways: list[str], tmp_path: Path
) -> None:
    run([f"{name}.py", *options], ways, tmp_path)
    assert_agree(f"{name}-x64" if options else name, ways, tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("way", ALL)
def test_resumed_is_the_same(way: str, tmp_path: Path) -> None:
    for script in (["language_model.py"], ["language_model.py", "--resume"]):
        run(script, [way], tmp_path)
    whole, resumed = (
        parameters(name, way, tmp_path)
        for name in ("language_model", "language_model-resumed")
    )
    np.testing.assert_array_equal(resumed.pop("losses"), whole.pop("losses")[2:])
    for leaf in whole.keys() - {"seconds"}:
        np.testing.assert_array_equal(resumed[leaf], whole[leaf], err_msg=leaf)
