"""The doctor's rows about GPUs and NCCL. Nothing here starts CUDA."""

from __future__ import annotations

import os
from pathlib import Path

from jaxcomm.launch import devices
from jaxcomm.launch.finding import Finding, look

# ncclCommSplit came with 2.18, and jaxcomm's subgroups are made by it.
OLDEST_NCCL = (2, 18)
# nccl.h of 2.30 and src/init.cc: NCCL_MULTI_RANK_GPU_ENABLE.
_SHARED_GPU = (2, 30)
_DRIVER = Path("/proc/driver/nvidia")

_LOOK_AT_DRIVER = """
import ctypes, json
ctypes.CDLL("libcuda.so.1")
print(json.dumps({}))
"""
# Loads what the transport would, then asks the kernel and the linker what there is.
_LOOK_AT_NCCL = """
import ctypes, dataclasses, importlib.metadata, json, os, pathlib, subprocess
from jaxcomm.transports.nccl import library
found = library.find()
maps = pathlib.Path("/proc/self/maps").read_text().splitlines()
loaded = {p for line in maps if "libnccl.so" in (p := line.rpartition(" ")[2])}
def linked():
    for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":"):
        yield from pathlib.Path(folder).glob("libnccl.so*") if folder else ()
    try:
        done = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True)
    except OSError:
        return
    for line in done.stdout.splitlines():
        if line.strip().startswith("libnccl.so"):
            yield pathlib.Path(line.rpartition("=> ")[2])
installed, wheels = {os.path.realpath(p) for p in linked()}, []
for wheel in importlib.metadata.distributions():
    name = wheel.metadata["Name"] or ""
    if name.startswith("nvidia-nccl-"):
        wheels.append(f"{name} {wheel.version}")
        for file in wheel.files or ():
            if file.name.startswith("libnccl.so"):
                installed.add(os.path.realpath(wheel.locate_file(file)))
print(json.dumps({"found": dataclasses.asdict(found) if found else None,
                  "loaded": sorted(loaded), "wheels": sorted(set(wheels)),
                  "installed": sorted(p for p in installed if os.path.exists(p))}))
"""


def rows() -> list[Finding]:
    """Return the rows; on a machine without GPUs they say so."""
    gpus = _gpus()
    return [*gpus, *_nccl()]


def _gpus() -> list[Finding]:
    count = devices.present()
    seen, error = look(_LOOK_AT_DRIVER)
    version = _driver_version()
    if not count:
        remedy = f"if there are some, {devices.COUNT_VARIABLE}=N says how many"
        found = "none (no device files)"
        return [Finding("GPUs", "ok", found, "" if seen is None else remedy)]
    shown = devices.visible()
    text = f"{count} here ({', '.join(_models()) or 'model unknown'})"
    text += f"; visible: {', '.join(shown) or 'none'}"
    remedy = (
        "" if shown else f"{devices.VISIBLE_VARIABLE} hides them; unset it to use them"
    )
    found = [Finding("GPUs", "ok" if shown else "warn", text, remedy)]
    if seen is None:
        remedy = "install the driver; in a container, its NVIDIA runtime brings it"
        return [*found, Finding("GPU driver", "missing", error, remedy)]
    return [*found, Finding("GPU driver", "ok", f"libcuda.so.1; {version}")]


def _models() -> list[str]:
    """Name the GPUs as the driver does, each kind once."""
    names = []
    for file in sorted(_DRIVER.glob("gpus/*/information")):
        lines = [line.partition(":") for line in file.read_text().splitlines()]
        names += [value.strip() for name, _, value in lines if name == "Model"]
    return list(dict.fromkeys(names))


def _driver_version() -> str:
    file = _DRIVER / "version"
    first = file.read_text().splitlines()[0] if file.exists() else ""
    return first.partition(":")[2].strip() or "version unknown"


def _nccl() -> list[Finding]:
    seen, error = look(_LOOK_AT_NCCL)
    needed = bool(devices.present())
    if seen is None or seen["found"] is None:
        remedy = "pip install 'jax[cuda13]' brings NCCL" if needed else ""
        text = error or "none"
        return [Finding("NCCL", "missing" if needed else "ok", text, remedy)]
    path, version = seen["found"]["path"], seen["found"]["version"]
    # The linker may have found it by its bare name.
    path = path if os.path.isabs(path) else next(iter(seen["loaded"]), path)
    found = _ability(version, path)
    return [found, *_copies(os.path.realpath(path), seen)]


def _ability(version: str, path: str) -> Finding:
    """Say what a version can do."""
    number = tuple(int(part) for part in version.split(".")[:2])
    text = f"{version} ({path})"
    if number < OLDEST_NCCL:
        oldest = ".".join(map(str, OLDEST_NCCL))
        remedy = (
            f"{oldest} is needed (ncclCommSplit): pip install -U the wheel JAX uses"
        )
        return Finding("NCCL", "missing", text, remedy)
    if number < _SHARED_GPU:
        text += "; subgroups; one rank per GPU (several from 2.30)"
    else:
        text += "; subgroups; several ranks per GPU if NCCL_MULTI_RANK_GPU_ENABLE=1"
    return Finding("NCCL", "ok", text)


def _copies(used: str, seen: dict) -> list[Finding]:
    """Report other NCCL libraries: two in one process corrupt each other's objects."""
    loaded = {os.path.realpath(path) for path in seen["loaded"]}
    if len(loaded) > 1:
        remedy = (
            "two in one process do not work together: unset LD_PRELOAD and "
            "JAXCOMM_NCCL_LIBRARY, or point them at the one that JAX loads"
        )
        return [Finding("NCCL copies", "missing", _listed(loaded), remedy)]
    wheels = seen["wheels"]
    if len(wheels) > 1:
        remedy = "they overwrite each other's files: pip uninstall the one for another "
        remedy += "CUDA than JAX's plugin, then reinstall the other"
        return [Finding("NCCL copies", "warn", ", ".join(wheels), remedy)]
    others = set(seen["installed"]) - {used}
    if others:
        remedy = (
            "JAX must load the one above: take their folders off LD_LIBRARY_PATH or "
            "uninstall them, or point JAXCOMM_NCCL_LIBRARY at the one that JAX loads"
        )
        return [Finding("NCCL copies", "warn", f"also {_listed(others)}", remedy)]
    return []


def _listed(paths: set[str]) -> str:
    return ", ".join(sorted(paths))
