"""Talk to the native library's part over NCCL (C ABI, through ctypes)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import jax

from jaxcomm import native
from jaxcomm.errors import TransportUnavailableError

# Each on a GPU and on host memory (jaxcomm_nccl_host_*).
HANDLERS = ("all_reduce", "broadcast", "move", "rank")
# On a GPU also to be recorded into CUDA graphs (jaxcomm_nccl_graph_*).
RECORDED = ("all_reduce", "broadcast")
COUNTERS = ("calls", "nccl_collectives", "bytes", "agreements")
UNIQUE_ID_BYTES = 128
# Order and values of nccl.h.
OPS = {"sum": 0, "prod": 1, "max": 2, "min": 3, "avg": 4}

_TEXT_BYTES = 4096
_Key = ctypes.c_int64


def open_library(
    path: str, driver: str, ordinal: int, abort_after: float, *, host_memory: bool
) -> int:
    """Load a libnccl and register the handlers; return its version.

    Args:
      path: of the library.
      driver: path of CUDA's driver.
      ordinal: the device's number in this process.
      abort_after: seconds that a collective may run on the device; 0 for no limit.
      host_memory: whether the library reduces host memory, for arrays of the CPU.

    Raises:
      TransportUnavailableError: it cannot be used; says why.
    """
    library = native.load()
    library.jaxcomm_nccl_close.restype = None
    library.jaxcomm_nccl_refuse.restype = None
    _call(
        lambda text, size: library.jaxcomm_nccl_open(
            *(path.encode(), driver.encode(), ordinal),
            *(ctypes.c_double(abort_after), text, size),
        ),
        f"{path} cannot be used as NCCL",
    )
    for target in (*HANDLERS, *(f"graph_{name}" for name in RECORDED)):
        on_host = f"host_{target.removeprefix('graph_')}"
        symbol = getattr(library, f"jaxcomm_nccl_{on_host if host_memory else target}")
        jax.ffi.register_ffi_target(
            f"jaxcomm_nccl_{target}",
            jax.ffi.pycapsule(symbol),
            platform="cpu" if host_memory else "CUDA",
        )
    return library.jaxcomm_nccl_version()


def unique_id() -> bytes:
    """Return what names a new communicator; one rank asks, and gives it to all."""
    out = ctypes.create_string_buffer(UNIQUE_ID_BYTES)
    _call(
        lambda text, size: native.load().jaxcomm_nccl_unique_id(out, text, size),
        "no NCCL communicator can be made",
    )
    return out.raw


def join(key: int, unique: bytes, rank: int, size: int, timeout: float) -> None:
    """Make communicator `key`; all its ranks call it together."""
    _call(
        lambda text, room: native.load().jaxcomm_nccl_join(
            _Key(key), unique, rank, size, ctypes.c_double(timeout), text, room
        ),
        "the NCCL communicator could not be made",
    )


def split(
    key: int, part: int, color: int, rank: int, size: int, timeout: float
) -> None:
    """Make communicator `part` of the ranks of `key` that give the same color."""
    _call(
        lambda text, room: native.load().jaxcomm_nccl_split(
            *(_Key(key), _Key(part), color, rank, size),
            *(ctypes.c_double(timeout), text, room),
        ),
        "the NCCL communicator could not be divided",
    )


def refuse(key: int, text: str) -> None:
    """Let every call of a communicator fail from now on, with a text."""
    native.load().jaxcomm_nccl_refuse(_Key(key), text.encode())


def counters(key: int) -> dict[str, int]:
    """Return the counters of a communicator."""
    out = (ctypes.c_int64 * len(COUNTERS))()
    native.load().jaxcomm_nccl_counters(_Key(key), out)
    return dict(zip(COUNTERS, out, strict=True))


def close(seconds: float) -> None:
    """Finalise all communicators, in so many seconds; nothing may be under way."""
    native.load().jaxcomm_nccl_close(ctypes.c_double(seconds))


def _call(function: Callable[[Any, Any], int], what: str) -> None:
    text = ctypes.create_string_buffer(_TEXT_BYTES)
    if function(text, ctypes.c_int64(_TEXT_BYTES)) != 0:
        raise TransportUnavailableError(f"{what}: {text.value.decode()}")
