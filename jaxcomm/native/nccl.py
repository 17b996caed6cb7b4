"""Talk to the native library's part over NCCL (C ABI, through ctypes)."""

from __future__ import annotations

import ctypes

from jaxcomm.native.constants import NCCL_OPS
from jaxcomm.native.declarations import NCCL_HANDLERS, NCCL_RECORDED
from jaxcomm.native.library import call, constants, load, names, register

OPS = NCCL_OPS
# On a GPU also to be recorded into CUDA graphs (jaxcomm_nccl_graph_*).
RECORDED = NCCL_RECORDED


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
    library = load()
    call(
        library.jaxcomm_nccl_open,
        *(path.encode(), driver.encode(), ordinal, abort_after),
        what=f"{path} cannot be used as NCCL",
    )
    for target in (*NCCL_HANDLERS, *(f"graph_{name}" for name in RECORDED)):
        on_host = f"host_{target.removeprefix('graph_')}"
        symbol = f"jaxcomm_nccl_{on_host if host_memory else target}"
        platform = "cpu" if host_memory else "CUDA"
        register(f"jaxcomm_nccl_{target}", getattr(library, symbol), platform)
    return library.jaxcomm_nccl_version()


def unique_id() -> bytes:
    """Return what names a new communicator; one rank asks, and gives it to all."""
    out = ctypes.create_string_buffer(constants()["sizeof.NcclUniqueId"])
    what = "no NCCL communicator can be made"
    call(load().jaxcomm_nccl_unique_id, out, what=what)
    return out.raw


def join(key: int, unique: bytes, rank: int, size: int, timeout: float) -> None:
    """Make communicator `key`; all its ranks call it together."""
    what = "the NCCL communicator could not be made"
    call(load().jaxcomm_nccl_join, key, unique, rank, size, timeout, what=what)


def split(
    key: int, part: int, color: int, rank: int, size: int, timeout: float
) -> None:
    """Make communicator `part` of the ranks of `key` that give the same color."""
    call(
        load().jaxcomm_nccl_split,
        *(key, part, color, rank, size, timeout),
        what="the NCCL communicator could not be divided",
    )


def refuse(key: int, text: str) -> None:
    """Let every call of a communicator fail from now on, with a text."""
    load().jaxcomm_nccl_refuse(key, text.encode())


def counters(key: int) -> dict[str, int]:
    """Return the counters of a communicator."""
    columns = names("nccl_counter")
    out = (ctypes.c_int64 * len(columns))()
    load().jaxcomm_nccl_counters(key, out)
    return dict(zip(columns, out, strict=True))


def close(seconds: float) -> None:
    """Finalise all communicators, in so many seconds; nothing may be under way."""
    load().jaxcomm_nccl_close(seconds)
