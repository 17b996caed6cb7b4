"""End the whole job when one rank fails, with that rank's traceback shown once."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

_AFTER_RANK_0 = 1.0
_OURS = str(Path(__file__).resolve().parents[1]) + os.sep
# Each launcher's name for rank and size; first one set wins.
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS")


def install_excepthook() -> None:
    """Let an uncaught exception end the job, for scripts without our launcher.

    Without it the failing rank would wait in MPI_Finalize for ranks that wait for it.
    """
    previous = sys.excepthook
    if getattr(previous, "ends_job", False):
        return

    def hook(
        kind: type[BaseException], error: BaseException, tb: TracebackType | None
    ) -> Any:
        if mpi_running() is None and _distributed() is None:
            return previous(kind, error, tb)
        report(error, tb)
        end_job(130 if issubclass(kind, KeyboardInterrupt) else 1)

    hook.ends_job = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def report(error: BaseException, tb: TracebackType | None) -> None:
    """Write one rank's traceback to stderr in one piece, headed by who it is."""
    rank, size = _variable(_RANK_VARIABLES, "0"), _variable(_SIZE_VARIABLES, "1")
    if mpi_running() is None and (found := _distributed()) is not None:
        rank, size = str(found.process_id), str(found.num_processes)
    who = f"rank {rank} of {size}"
    told = traceback.TracebackException(type(error), error, tb)
    if os.environ.get("JAX_TRACEBACK_FILTERING") != "off":
        _hide_machinery(told, error)
    lines = list(told.format())
    # The exception itself: notes, as JAX adds one, come after it.
    summary = f"{type(error).__name__}: {error}".partition("\n")[0]
    if rank != "0" and "ScheduleMismatchError" in summary:
        # Rank 0 has the same to say, and ends the job.
        time.sleep(_AFTER_RANK_0)
    head = f"jaxcomm: {who} failed (host {socket.gethostname()}): {summary}\n"
    sys.stdout.flush()
    sys.stderr.write(head + "".join(lines))
    sys.stderr.flush()


def _hide_machinery(
    told: traceback.TracebackException, error: BaseException | None
) -> None:
    """Leave out frames of jaxcomm and JAX between a user's lines, as JAX does its own.

    They merely call what is the user's. An error that jaxcomm did not mean to raise
    keeps them all.
    """
    while told is not None and error is not None:
        places = [_is_machinery(frame.filename) for frame in told.stack]
        ours = bool(told.stack) and told.stack[-1].filename.startswith(_OURS)
        meant = type(error).__module__ == "jaxcomm.errors"
        if not all(places) and (meant or not ours):
            shown = zip(told.stack, places, strict=True)
            told.stack[:] = [frame for frame, hidden in shown if not hidden]
        inner = (told.__cause__, error.__cause__)
        if told.__cause__ is None:
            inner = (told.__context__, error.__context__)
        if inner[0] is None:
            return
        told, error = inner[0], inner[1]


def _is_machinery(file: str) -> bool:
    return file.startswith(_OURS) or f"{os.sep}jax{os.sep}_src{os.sep}" in file


def end_job(code: int) -> None:
    """End all ranks with an exit code; returns only where this process is alone.

    Of ranks that jax.distributed connects, only this one ends, and at once: JAX's own
    exit would wait for the others. They find out when they next wait for it, and srun
    ends them before if it is told to (--kill-on-bad-exit).
    """
    mpi = mpi_running()
    if mpi is not None and mpi.COMM_WORLD.Get_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        mpi.COMM_WORLD.Abort(code)
    elif mpi is None and _distributed() is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _distributed() -> Any | None:
    """Return jax.distributed's client where it connects several processes."""
    if "jax" not in sys.modules:
        return None
    from jaxcomm import compat

    found = compat.distributed_client()
    return found if found is not None and found.num_processes > 1 else None


def mpi_running() -> Any | None:
    """Return mpi4py.MPI if it is imported and between Init and Finalize."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized():
        return None
    return mpi


def _variable(names: tuple[str, ...], default: str) -> str:
    return next((os.environ[name] for name in names if name in os.environ), default)
