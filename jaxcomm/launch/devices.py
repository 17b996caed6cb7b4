"""Which GPUs a host has, and which one is a rank's own.

Looks at files and variables only: no JAX, no CUDA. A process sees the devices that
CUDA_VISIBLE_DEVICES names, in that order, when CUDA starts in it; later changes count
for nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
COUNT_VARIABLE = "JAXCOMM_GPUS"
BINDING_VARIABLE = "JAXCOMM_GPU_BINDING"
# Ordinals among the visible. Left to itself, jax.distributed takes the local rank.
ORDINALS_VARIABLE = "JAX_LOCAL_DEVICE_IDS"
# XLA reads either name of this, and refuses both.
MEMORY_VARIABLE = "XLA_CLIENT_MEM_FRACTION"
MEMORY_VARIABLES = (MEMORY_VARIABLE, "XLA_PYTHON_CLIENT_MEM_FRACTION")
# Of one device, what XLA takes at once where nothing else is said.
_MEMORY = 0.75
LOCAL_RANK_VARIABLES = (
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "SLURM_LOCALID",
)
_LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


def present(
    environ: Mapping[str, str] = os.environ,
    driver: Path = Path("/proc/driver/nvidia"),
    files: Path = Path("/dev"),
) -> int:
    """Return how many NVIDIA GPUs this host (or container) has.

    The driver lists all of the host's; a container has device files for its own only,
    and before CUDA first runs there may be none. JAXCOMM_GPUS overrides both.
    """
    given = environ.get(COUNT_VARIABLE, "")
    if given.isdigit():
        return int(given)
    listed = len(list(driver.glob("gpus/*")))
    here = len(list(files.glob("nvidia[0-9]*")))
    return min(listed, here) if listed and here else max(listed, here)


def visible(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the devices that CUDA would show, by the names CUDA_VISIBLE_DEVICES takes.

    Ordinals, GPU UUIDs or MIG ids. As CUDA does, the list ends at the first entry that
    names no device ("-1", "").
    """
    count = present(environ)
    if VISIBLE_VARIABLE not in environ:
        return [str(ordinal) for ordinal in range(count)]
    found: list[str] = []
    for name in environ[VISIBLE_VARIABLE].split(","):
        name = name.strip()
        if not (name.isdigit() or name.startswith(("GPU-", "MIG-"))):
            break
        found.append(name)
    return found if count else []


def wanted(environ: Mapping[str, str] = os.environ) -> bool:
    """Tell whether JAX may use a GPU here, by JAX_PLATFORMS."""
    platforms = environ.get("JAX_PLATFORMS", "").lower().split(",")
    return platforms == [""] or bool({"cuda", "gpu"} & set(platforms))


def own(local_rank: int, devices: list[str]) -> str | None:
    """Return the device of the local rank, or None without devices.

    Ranks take turns where there are fewer devices than ranks.
    """
    return devices[local_rank % len(devices)] if devices else None


def sharers(local_rank: int, local_size: int, devices: list[str]) -> int:
    """Return how many of a host's ranks have the same device as this one."""
    if not devices:
        return 1
    return max(1, len(range(local_rank % len(devices), local_size, len(devices))))


def settings(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that give this rank one device; empty where none is due.

    Nothing is due without a GPU, with JAX_PLATFORMS=cpu or JAXCOMM_GPU_BINDING=off; a
    list of one device stays as it is. Ranks that share a device share its memory too,
    unless the user has divided it.
    """
    if environ.get(BINDING_VARIABLE) == "off" or not wanted(environ):
        return {}
    devices = visible(environ)
    local_rank = _number(environ, LOCAL_RANK_VARIABLES, 0)
    local_size = _number(environ, _LOCAL_SIZES, 1)
    mine = own(local_rank, devices)
    if mine is None:
        return {}
    added = {VISIBLE_VARIABLE: mine}
    if ORDINALS_VARIABLE not in environ:
        added[ORDINALS_VARIABLE] = "0"
    together = sharers(local_rank, local_size, devices)
    if together > 1 and not any(name in environ for name in MEMORY_VARIABLES):
        added[MEMORY_VARIABLE] = f"{_MEMORY / together:.3f}"
    return added


def _number(environ: Mapping[str, str], names: tuple[str, ...], default: int) -> int:
    found = [environ[name] for name in names if environ.get(name, "").isdigit()]
    return int(found[0]) if found else default
