"""The processes that a job has on this host, and what they may leave behind."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

# In the environment of every process of a job on this host, however it is related.
JOB_VARIABLE = "JAXCOMM_JOB"

# Segments that MPI and NCCL unlink only when they end in order.
_SEGMENTS = ("sm_segment.", "vader_segment.", "mpich_", "nccl-")
_SHARED_MEMORY = Path("/dev/shm")
_END_SECONDS = 10.0


def of_job(token: str) -> list[int]:
    """Return the job's processes on this host, wherever they hang in the tree."""
    wanted = f"{JOB_VARIABLE}={token}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        # Another user's processes cannot be read, and one that has ended is empty.
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def ranks(token: str) -> list[int]:
    """Return the processes that are ranks: workers, without what these have forked."""
    workers = {pid for pid in of_job(token) if _is_worker(pid)}
    return [pid for pid in workers if _parent(pid) not in workers]


def send(pids: list[int], number: int) -> None:
    """Send a signal to processes of which some may have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def end(token: str) -> None:
    """Kill all that is left of a job and wait until it has gone."""
    limit = time.monotonic() + _END_SECONDS
    while pids := of_job(token):
        send(pids, signal.SIGKILL)
        if time.monotonic() > limit:
            return  # one waits in the kernel; there is nothing more to do
        time.sleep(0.02)


def remove_segments(since: float) -> None:
    """Remove shared memory that MPI or NCCL made after `since` and nobody has open.

    A segment of another job of this user is open in that job, and stays.
    """
    found = [path for path in _segments() if _made_after(path, since)]
    if found:
        used = set(_open_files())
        for path in found:
            if str(path) not in used:
                path.unlink(missing_ok=True)


def _segments() -> Iterator[Path]:
    with contextlib.suppress(OSError):
        for path in _SHARED_MEMORY.iterdir():
            if path.name.startswith(_SEGMENTS):
                yield path


def _made_after(path: Path, since: float) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    return status.st_uid == os.geteuid() and status.st_mtime >= since


def _open_files() -> Iterator[str]:
    """Yield what this user's processes have mapped or open in shared memory."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for line in (folder / "maps").read_text().splitlines():
                if "/dev/shm/" in line:
                    yield line[line.index("/dev/shm/") :].removesuffix(" (deleted)")
            for link in (folder / "fd").iterdir():
                with contextlib.suppress(OSError):
                    yield os.readlink(link)


def _is_worker(pid: int) -> bool:
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"jaxcomm.launch.worker" in line and b"python" in line.split(b"\0")[0]


def _parent(pid: int) -> int:
    try:
        # The command's name may hold spaces and brackets; the rest does not.
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[1])
