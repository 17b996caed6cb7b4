"""Limits of time that hold also where the interpreter is held."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

from jaxcomm.native.library import call, load


@contextlib.contextmanager
def deadline(seconds: float, text: str, code: int) -> Iterator[None]:
    """End this process unless the block is left in time; 0 seconds for never.

    Also where the interpreter is held, as it is during MPI_Init.

    Args:
      seconds: from now.
      text: for standard error.
      code: the process's exit code.
    """
    if seconds > 0:
        call(load().jaxcomm_set_deadline, seconds, text.encode(), code)
    try:
        yield
    finally:
        load().jaxcomm_lift_deadline()


def deadline_at_end(seconds: float, text: str, code: int) -> None:
    """End this process if it does not end by itself, that long after Python has.

    MPI_Finalize waits for all ranks, and for ever for one that was stopped.

    Args:
      seconds: from the end of the interpreter; not 0.
      text: for standard error.
      code: the process's exit code.
    """
    library = load()
    call(library.jaxcomm_prepare_end, seconds, text.encode(), code)
    # Called before what was registered earlier, as mpi4py's MPI_Finalize was.
    ctypes.pythonapi.Py_AtExit(ctypes.cast(library.jaxcomm_end, ctypes.c_void_p))
