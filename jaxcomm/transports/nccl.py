"""Transport `nccl`: finds the NCCL that JAX uses. Custom calls are not built yet."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
from pathlib import Path
from typing import NoReturn

from jaxcomm.errors import TransportUnavailableError

SONAME = "libnccl.so.2"


@dataclasses.dataclass(frozen=True)
class Nccl:
    """A NCCL library.

    Attributes:
      path: its file, or the bare soname where the dynamic linker found it.
      version: such as "2.27.3".
    """

    path: str
    version: str


def find() -> Nccl | None:
    """Return the NCCL that JAX's CUDA plugin would load, or None.

    The plugin's wheels bring NCCL as the package `nvidia.nccl`; without it the
    dynamic linker decides. Loads the library into this process.
    """
    candidates = [SONAME]
    if importlib.util.find_spec("nvidia") is not None:
        spec = importlib.util.find_spec("nvidia.nccl")
        folders = spec.submodule_search_locations if spec else None
        wheel = [Path(folder) / "lib" / SONAME for folder in folders or []]
        candidates = [str(path) for path in wheel if path.exists()] + candidates
    for path in candidates:
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        number = ctypes.c_int()
        if library.ncclGetVersion(ctypes.byref(number)) == 0:
            return Nccl(path, version_text(number.value))
    return None


def version_text(number: int) -> str:
    """Spell NCCL's version number (nccl.h: major * 10000 + minor * 100 + patch)."""
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def connect() -> NoReturn:
    """Refuse, saying what was found.

    Raises:
      TransportUnavailableError: always, in this version.
    """
    found = find()
    where = f"NCCL {found.version} is here ({found.path})" if found else "no NCCL here"
    raise TransportUnavailableError(
        f"transport 'nccl' is not built in this version of jaxcomm ({where}). "
        "Use transport='mpi' with JAX_PLATFORMS=cpu."
    )
