"""The MPI of this process, as the library calls it.

The library is built without MPI; `bind_mpi` gives it the entry points and handles of
the MPI that mpi4py loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxcomm.errors import TransportUnavailableError
from jaxcomm.native.constants import DTYPES, OPS, MpiHandles
from jaxcomm.native.library import load, told

# The MPI type of the same size; 16-bit floats and booleans travel as integers, under
# operations that know better.
MPI_TYPES = {
    "float32": "FLOAT",
    "float64": "DOUBLE",
    "bfloat16": "UINT16_T",
    "float16": "UINT16_T",
    "bool": "UINT8_T",
    "complex64": "C_FLOAT_COMPLEX",
    "complex128": "C_DOUBLE_COMPLEX",
    **{
        f"{kind}{bits}": f"{kind.upper()}{bits}_T"
        for kind in ("int", "uint")
        for bits in (8, 16, 32, 64)
    },
}


def bind_mpi(mpi: Any) -> None:
    """Give the library the MPI that `mpi` (the module mpi4py.MPI) has loaded.

    Raises:
      TransportUnavailableError: no libmpi is mapped into this process, or it lacks
        an entry point.
    """
    handles = MpiHandles()
    for i, dtype in enumerate(DTYPES):
        handles.dtype[i] = handle(mpi, getattr(mpi, MPI_TYPES[dtype]))
    for i, op in enumerate(OPS):
        handles.op[i] = handle(mpi, getattr(mpi, op.upper()))
    handles.byte = handle(mpi, mpi.BYTE)
    handles.in_place = int(mpi.IN_PLACE) & (2**64 - 1)
    handles.serialized = int(mpi.Query_thread() < mpi.THREAD_MULTIPLE)
    width = mpi._sizeof(mpi.Comm)
    failures = []
    for path in loaded_mpi_libraries():
        why = told(load().jaxcomm_open_mpi, path.encode(), width, ctypes.byref(handles))
        if not why:
            return
        failures.append(f"{path}: {why}")
    raise TransportUnavailableError(
        "mpi4py is imported, but no libmpi with the needed entry points is loaded: "
        + ("; ".join(failures) or "nothing like libmpi in the process's memory map")
    )


def op_handle(dtype: str, op: str) -> int:
    """Return the MPI_Op that reduces elements of `dtype`: MPI's own, or one of ours."""
    return load().jaxcomm_op_handle(DTYPES.index(dtype), OPS.index(op))


@contextlib.contextmanager
def mpi_turn() -> Iterator[None]:
    """Hold the lock of MPI_THREAD_SERIALIZED; make no blocking call in it."""
    load().jaxcomm_lock_mpi()
    try:
        yield
    finally:
        load().jaxcomm_unlock_mpi()


def handle(mpi: Any, thing: Any) -> int:
    """Return MPI's handle of an object of mpi4py."""
    return mpi._handleof(thing) & (2**64 - 1)


def loaded_mpi_libraries() -> list[str]:
    """Return the paths of the MPI libraries mapped into this process.

    libmpi is loaded with local scope, so a global dlsym does not see it.
    """
    pattern = re.compile(r"/lib(p?mpi|mpich|mpi_\w+)[^/]*\.so[^/]*$")
    paths: dict[str, None] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if pattern.search(path):
            paths[path] = None
    return list(paths)
