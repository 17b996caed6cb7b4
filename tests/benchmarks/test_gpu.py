"""The GPU machine's script, on the CPU: what it runs there is tested here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import report, sections
from benchmarks.gpu.sections import Machine, Section
from tests.jobs import ROOT

GPU_SH = ROOT / "benchmarks" / "gpu" / "gpu.sh"


def run(out: Path, *arguments: str, **env: str) -> tuple[int, dict[str, Any], str]:
    line = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    done = subprocess.run(
        line,
        cwd=ROOT,
        env={**os.environ, "OUT": str(out), **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    file = out / "gpu.json"
    result = json.loads(file.read_text()) if file.exists() else {}
    rows = {row["name"]: row for row in result.get("sections", [])}
    return done.returncode, rows, done.stderr


@pytest.mark.thorough
@pytest.mark.timeout(400)
def test_the_whole_of_the_first_call(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(GPU_SH), "--dry"],
        env={**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["built"].startswith(("pip", "c++"))
    rows = {row["name"]: row for row in result["sections"]}
    assert list(rows) == [s.name for s in sections.chosen("")]
    assert rows.pop("refused")["status"] == "skipped"
    assert {row["status"] for row in rows.values()} == {"ok"}, done.stderr
    (exact,) = rows["exact2"]["results"]
    assert exact["reductions"]["mean"]["float32"] == "ok"
    assert "kernel" in rows["mismatch"]["results"][0]["error"]
    (times,) = rows["time1"]["results"]
    assert times["ms"]["jaxcomm"] > 0 and times["ms"]["XLA's psum"] > 0
    (step,) = rows["step1 stemdl"]["results"]
    assert set(step["ms"]) == {"jax.jit", "jaxcomm", "jax.pmap"}
    assert all(rows[f"leave {when}"]["seconds"] < 40 for when in ("before", "after"))


@pytest.mark.thorough
def test_more_sections_run_over_mpi(tmp_path: Path) -> None:
    only = "cores,memory2,overlap2"
    code, rows, text = run(tmp_path, "--dry", "--only", only)
    assert code == 0, text
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(
        only.split(","), "ok"
    )
    ms = rows["overlap2"]["results"][0]["ms"]
    assert {"compute", "communication", "both"} <= set(ms)


@pytest.mark.thorough
def test_a_failed_section_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    wrong = {"JAXCOMM_STAGING_BYTES": "some"}
    code, rows, _ = run(tmp_path, "--dry", "--only", "exact1,time1", **wrong)
    assert code == 1
    assert [row["status"] for row in rows.values()] == ["failed", "failed"]
    assert "JAXCOMM_STAGING_BYTES" in rows["exact1"]["error"]
    # Times alone decide nothing.
    assert run(tmp_path, "--dry", "--only", "time1", **wrong)[0] == 0


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    code, rows, text = run(tmp_path, JAXCOMM_GPUS="0")
    assert (code, rows) == (2, {})
    assert "no GPU is visible" in text
    code, _, text = run(tmp_path, "--dry", "--only", "no-such-section")
    assert code == 2 and "no such section" in text


def machine(devices: str, version: str) -> Machine:
    nccl = {"path": "libnccl.so.2", "version": version}
    return Machine(False, "nccl", "distributed", devices.split(), nccl, mpi=True)


@pytest.mark.parametrize(
    ("name", "devices", "version", "why"),
    [
        ("exact2", "0", "2.30.4", ""),
        ("exact2", "0", "2.29.7", "2.30"),
        ("exact2", "0 1", "2.29.7", ""),
        ("exact1", "0", "2.29.7", ""),
        ("refused", "0 1", "2.30.4", "a GPU for each"),
    ],
)
def test_where_sections_can_run(
    name: str, devices: str, version: str, why: str
) -> None:
    (section,) = sections.chosen(name)
    found = sections.unfit(section, machine(devices, version))
    assert why in found and bool(why) == bool(found)


def test_two_ranks_on_one_gpu_and_on_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NCCL_MULTI_RANK_GPU_ENABLE", raising=False)
    monkeypatch.delenv("NCCL_MAX_CTAS", raising=False)
    section = Section("two", "exact", ranks=2)
    names = ("CUDA_VISIBLE_DEVICES", "XLA_CLIENT_MEM_FRACTION")
    names += ("NCCL_MULTI_RANK_GPU_ENABLE", "NCCL_MAX_CTAS", "BENCH_RANK")

    def environs(devices: str) -> list[list[str | None]]:
        found = sections.commands(section, machine(devices, "2.30.4"), tmp_path)
        return [[env.get(name) for name in names] for _, env in found]

    shared = ["0", "0.15", "1", "8"]
    assert environs("0") == [[*shared, "0"], [*shared, "1"]]
    assert environs("3 1") == [
        ["3", "0.30", None, None, "0"],
        ["1", "0.30", None, None, "1"],
    ]


def test_no_path_of_a_machine_is_kept() -> None:
    row = {"error": 'File "/any/where/step.py", line 3', "ms": [1.5, "a/b"]}
    kept = {"error": 'File "step.py", line 3', "ms": [1.5, "a/b"]}
    assert report.without_paths(row) == kept


def test_each_call_keeps_its_row() -> None:
    rows: list[dict[str, Any]] = []
    for call, status in ((1, "ok"), (2, "failed"), (2, "ok")):
        row = {"name": "time1", "call": call, "status": status}
        rows = report.with_row(rows, row)
    assert [(row["call"], row["status"]) for row in rows] == [(1, "ok"), (2, "ok")]


def test_the_script_is_one_that_bash_reads() -> None:
    subprocess.run(["bash", "-n", str(GPU_SH)], check=True)
