"""Find a NCCL for this process, load it, and see that the ranks' go together."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# JAX types its own functions in part.
from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jaxcomm import settings
from jaxcomm.errors import InvalidOptionError, TransportUnavailableError
from jaxcomm.native import nccl

if TYPE_CHECKING:
    from jaxcomm.ranks.fabric import Fabric

SONAME = "libnccl.so.2"
OLDEST = 21800
# Since this version ranks may share a GPU, where it is allowed.
SHARED_GPU = 23000
LIBRARY_VARIABLE = "JAXCOMM_NCCL_LIBRARY"
# For a library that reduces host memory, as the tests' stand-in does.
HOST_MEMORY_VARIABLE = "JAXCOMM_NCCL_HOST_MEMORY"
MULTI_RANK_VARIABLE = "NCCL_MULTI_RANK_GPU_ENABLE"
DRIVER = "libcuda.so.1"
# Lets XLA record the calls into CUDA graphs.
GRAPHS_VARIABLE = "JAXCOMM_NCCL_GRAPHS"
# NCCL wants a collective to be recorded by all ranks or by none, and at the same time.
# XLA records again when buffers of this process move, whatever the other ranks do. That
# is harmless as long as recording needs no other rank: no registering of buffers with
# them, and no first connecting. Sends and receives connect when first used, and groups
# of ranks are divided then, so neither is recorded.
FOR_GRAPHS = {"NCCL_GRAPH_REGISTER": "0", "NCCL_RUNTIME_CONNECT": "0"}


@dataclasses.dataclass(frozen=True)
class Library:
    """A NCCL library.

    Attributes:
      path: its file, or the bare soname where the dynamic linker found it.
      version: such as "2.27.3".
    """

    path: str
    version: str


def find() -> Library | None:
    """Return the NCCL that JAX's CUDA plugin would load, or None.

    JAXCOMM_NCCL_LIBRARY comes first. A copy that is loaded already comes next; then the
    package `nvidia.nccl`, which the plugin's wheels bring; then the dynamic linker's.
    Loads the library into this process.
    """
    for path in _candidates():
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        number = ctypes.c_int()
        if library.ncclGetVersion(ctypes.byref(number)) == 0:
            return Library(path, version_text(number.value))
    return None


def _candidates() -> list[str]:
    if chosen := os.environ.get(LIBRARY_VARIABLE):
        return [chosen]
    candidates = [*loaded(), SONAME]
    if importlib.util.find_spec("nvidia") is not None:
        spec = importlib.util.find_spec("nvidia.nccl")
        folders = spec.submodule_search_locations if spec else None
        wheel = [Path(folder) / "lib" / SONAME for folder in folders or []]
        candidates[-1:-1] = [str(path) for path in wheel if path.exists()]
    return candidates


def loaded() -> list[str]:
    """Return the paths of the NCCL libraries mapped into this process."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = (line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines())
    found = (path for path in paths if re.search(r"/libnccl\.so[^/]*$", path))
    return list(dict.fromkeys(found))


def version_text(number: int) -> str:
    """Spell NCCL's version number (nccl.h: major * 10000 + minor * 100 + patch)."""
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def open_everywhere(fabric: Fabric, abort_after: float) -> None:
    """Load NCCL and see that the ranks' libraries and devices go together.

    Args:
      fabric: of the ranks.
      abort_after: seconds that a collective may run on the device before this process
        is ended; 0 for no limit.

    Raises:
      TransportUnavailableError: on every rank, with the cause and the remedy.
    """
    problem, version, device = "", 0, ""
    try:
        version = _open(abort_after)
        device = _uuid(ordinal())
    except (TransportUnavailableError, InvalidOptionError) as error:
        problem = str(error)
    # All ranks hear of one rank's trouble, or they would wait for it.
    mine = [problem, version, [socket.gethostname(), device], graphs_allowed()]
    found = fabric.host.all_gather(mine)
    problems = {rank: text for rank, (text, *_) in enumerate(found) if text}
    if problems:
        ranks = ", ".join(map(str, problems))
        first = next(iter(problems.values()))
        raise TransportUnavailableError(f"rank {ranks} of {fabric.size}: {first}")
    recording = [rank for rank, (*_, graphs) in enumerate(found) if graphs]
    if 0 < len(recording) < fabric.size:
        raise TransportUnavailableError(
            f"{GRAPHS_VARIABLE}=1 is set on ranks {', '.join(map(str, recording))} of "
            f"{fabric.size} only: set it on every rank or on none"
        )
    versions: dict[int, list[int]] = {}
    for rank, (_, number, *_) in enumerate(found):
        versions.setdefault(number, []).append(rank)
    if len(versions) > 1:
        text = "; ".join(
            f"NCCL {version_text(v)} on ranks {', '.join(map(str, r))}"
            for v, r in versions.items()
        )
        raise TransportUnavailableError(
            f"the ranks have different versions of NCCL: {text}. Install the same "
            "nvidia-nccl wheel, or load the same module, on all hosts"
        )
    _check_devices([tuple(place) for _, _, place, _ in found], version)


def _open(abort_after: float) -> int:
    if not _on_host():
        _check_backend()
    if graphs_allowed():
        if settings.check_every():
            raise InvalidOptionError(
                f"{settings.CHECK_VARIABLE}=every compares every call, and with "
                f"{GRAPHS_VARIABLE}=1 CUDA graphs replay calls that nobody sees: "
                "leave one of them out"
            )
        for name, value in FOR_GRAPHS.items():
            os.environ.setdefault(name, value)
    copies = loaded()
    if len(copies) > 1:
        raise TransportUnavailableError(
            f"two copies of NCCL are loaded: {' and '.join(copies)}; they corrupt each "
            "other's communicators. Let all packages use one: remove the "
            "nvidia-nccl-cu12 or -cu13 wheel that JAX does not need, or set "
            f"{LIBRARY_VARIABLE} to the copy that JAX uses"
        )
    library = find()
    if library is None:
        where = os.environ.get(LIBRARY_VARIABLE, SONAME)
        raise TransportUnavailableError(
            f"transport 'nccl' finds no NCCL ({where}). Install JAX with its CUDA "
            "plugin (pip install 'jax[cuda13]'), or set "
            f"{LIBRARY_VARIABLE}=/path/to/{SONAME}"
        )
    # A library that reduces host memory brings its own driver.
    driver = library.path if _on_host() else DRIVER
    version = nccl.open_library(
        library.path, driver, ordinal(), abort_after, host_memory=_on_host()
    )
    if version < OLDEST:
        raise TransportUnavailableError(
            f"NCCL {library.version} ({library.path}) is too old: jaxcomm needs "
            f"{version_text(OLDEST)} or newer. Upgrade the nvidia-nccl wheel"
        )
    return version


def _check_backend() -> None:
    backend = jax.default_backend()
    if backend != "gpu":
        raise TransportUnavailableError(
            f"transport 'nccl' moves arrays of NVIDIA GPUs, but JAX runs on "
            f"{backend!r}: install the CUDA plugin (pip install 'jax[cuda13]') and "
            "leave JAX_PLATFORMS unset, or use transport='mpi'"
        )
    devices: list[Any] = jax.local_devices()
    if len(devices) > 1:
        raise TransportUnavailableError(
            f"this process sees {len(devices)} GPUs and jaxcomm drives one per "
            "process: start as many processes as GPUs with `jaxcomm run`, which gives "
            "each its own, or set CUDA_VISIBLE_DEVICES for each "
            "(srun --gpus-per-task=1)"
        )


def _on_host() -> bool:
    return os.environ.get(HOST_MEMORY_VARIABLE) == "1"


def graphs_allowed() -> bool:
    """Tell whether the environment lets XLA record the calls into CUDA graphs."""
    return os.environ.get(GRAPHS_VARIABLE) == "1"


def ordinal() -> int:
    """Return the number of this process's device among those that CUDA shows it."""
    devices: list[Any] = [] if _on_host() else jax.local_devices()
    return devices[0].local_hardware_id if devices else 0


def _uuid(ordinal: int) -> str:
    """Ask the driver for the UUID of a device, as nvidia-smi spells it.

    Ordinals would not do: under Slurm every task may see its own GPU as number 0. Of a
    part of a GPU (MIG) this is the part's own.
    """
    found = find()
    device, uuid = ctypes.c_int(), ctypes.create_string_buffer(16)
    try:
        driver = ctypes.CDLL(found.path if _on_host() and found else DRIVER)
        codes = (
            driver.cuInit(0),
            driver.cuDeviceGet(ctypes.byref(device), ordinal),
            driver.cuDeviceGetUuid_v2(uuid, device),
        )
    except (OSError, AttributeError) as error:
        codes = (str(error),)
    if any(codes):
        raise TransportUnavailableError(
            f"the CUDA driver gives no UUID of GPU {ordinal}: {codes}. nvidia-smi -L "
            "shows whether the driver works, and `jaxcomm doctor` which one is found"
        )
    digits = uuid.raw.hex()
    parts = (digits[a:b] for a, b in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))
    return f"GPU-{'-'.join(parts)}"


def _check_devices(places: Sequence[tuple[Any, ...]], version: int) -> None:
    ranks: dict[tuple[Any, ...], list[int]] = {}
    for rank, place in enumerate(places):
        ranks.setdefault(place, []).append(rank)
    shared = {place: r for place, r in ranks.items() if len(r) > 1}
    if not shared:
        return
    (host, device), several = next(iter(shared.items()))
    text = (
        f"ranks {', '.join(map(str, several))} share {device} of {host}, and NCCL "
        f"{version_text(version)} "
    )
    if version < SHARED_GPU:
        raise TransportUnavailableError(
            f"{text}allows one rank per GPU. Start as many ranks as GPUs, or use NCCL "
            f"{version_text(SHARED_GPU)} or newer with {MULTI_RANK_VARIABLE}=1"
        )
    if os.environ.get(MULTI_RANK_VARIABLE) != "1":
        raise TransportUnavailableError(
            f"{text}allows that only with {MULTI_RANK_VARIABLE}=1. Start as many ranks "
            "as GPUs, or set it on every rank"
        )
