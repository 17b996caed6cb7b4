"""What the doctor says about GPUs and NCCL, which this test gives it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxcomm.launch import doctor_gpu
from jaxcomm.launch.finding import Finding

VARIABLES = ("LD_LIBRARY_PATH", "LD_PRELOAD", "CUDA_VISIBLE_DEVICES", "JAXCOMM_GPUS")
Library = Callable[..., Path]


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "JAXCOMM_NCCL_LIBRARY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def library(tmp_path: Path) -> Library:
    """Return a function that makes a library that only knows its version."""

    def make(folder: str, version: int, soname: bool = True) -> Path:
        source, out = tmp_path / "version.cc", tmp_path / folder / "libnccl.so.2"
        out.parent.mkdir()
        body = f"{{ *out = {version}; return 0; }}"
        source.write_text(f'extern "C" int ncclGetVersion(int* out) {body}')
        line = ["c++", "-shared", "-fPIC", "-o", str(out), str(source)]
        line += ["-Wl,-soname,libnccl.so.2"] if soname else []
        subprocess.run(line, check=True)
        return out

    return make


def rows() -> dict[str, Finding]:
    return {row.what: row for row in doctor_gpu.rows()}


def test_a_machine_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXCOMM_GPUS", "0")
    assert rows()["GPUs"].status == "ok"
    assert rows()["GPUs"].found.startswith("none")
    assert "GPU driver" not in rows()


def test_what_a_gpu_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXCOMM_GPUS", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    found = rows()
    assert "2 here" in found["GPUs"].found and "visible: 1" in found["GPUs"].found
    if found["GPU driver"].status == "missing":  # as where no driver is
        assert "libcuda.so.1" in found["GPU driver"].found
        assert "install the driver" in found["GPU driver"].remedy
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    hidden = rows()["GPUs"]
    assert hidden.status == "warn" and "unset" in hidden.remedy


@pytest.mark.parametrize(
    ("number", "status", "text"),
    [
        (21705, "missing", "2.17.5"),
        (21801, "ok", "one rank per GPU"),
        (23004, "ok", "several ranks per GPU if NCCL_MULTI_RANK_GPU_ENABLE=1"),
    ],
)
def test_what_a_version_can_do(
    library: Library,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    status: str,
    text: str,
) -> None:
    path = library("one", number)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(path.parent))
    found = rows()["NCCL"]
    if str(path) not in found.found:
        pytest.skip(f"this machine has an NCCL that comes first: {found.found}")
    assert found.status == status
    assert text in found.found
    assert bool(found.remedy) == (status == "missing")


def test_a_second_copy_installed(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [str(library(name, 23000).parent) for name in ("one", "two")]
    monkeypatch.setenv("LD_LIBRARY_PATH", ":".join(folders))
    found = rows()["NCCL copies"]
    assert found.status == "warn"
    assert f"{folders[1]}/libnccl.so.2" in found.found
    assert "LD_LIBRARY_PATH" in found.remedy


def test_a_second_copy_loaded(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = library("one", 23000, soname=False)
    second = library("two", 23000)
    monkeypatch.setenv("LD_PRELOAD", f"{first} {second}")
    found = rows()["NCCL copies"]
    assert found.status == "missing"
    assert str(first) in found.found and str(second) in found.found
    assert "LD_PRELOAD" in found.remedy


def test_two_wheels_overwrite_each_other() -> None:
    wheels = ["nvidia-nccl-cu12 2.30.4", "nvidia-nccl-cu13 2.32.3"]
    seen = {"loaded": ["/a/libnccl.so.2"], "wheels": wheels, "installed": []}
    (found,) = doctor_gpu._copies("/a/libnccl.so.2", seen)
    assert found.status == "warn" and "nvidia-nccl-cu12" in found.found
