"""The processes that a job has on this host, and what they may leave behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

# In the environment of every process of a job on this host, however it is related.
JOB_VARIABLE = "JAXCOMM_JOB"

# Segments that MPI and NCCL unlink only when they end in order.
_SEGMENTS = ("sm_segment.", "vader_segment.", "mpich_", "nccl-")
_SHARED_MEMORY = Path("/dev/shm")
_FIRST_LOOK, _LAST_LOOK = 0.5, 60.0  # seconds between looks at what a job uses
_END_SECONDS = 10.0


def of_job(token: str) -> list[int]:
    """Return the job's processes on this host, wherever they hang in the tree."""
    # Another user's processes cannot be read, and one that has ended is empty.
    return [
        process.pid
        for process in psutil.process_iter(["environ"])
        if (process.info["environ"] or {}).get(JOB_VARIABLE) == token
    ]


def ranks(token: str) -> list[int]:
    """Return the processes that are ranks: workers, without what these have forked."""
    workers = {}
    for pid in of_job(token):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            process = psutil.Process(pid)
            line = process.cmdline()
            if "jaxcomm.launch.worker" in line and "python" in line[0]:
                workers[pid] = process.ppid()
    return [pid for pid, parent in workers.items() if parent not in workers]


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


class Segments:
    """The shared memory of one job on this host, to be removed when it has failed.

    Only what processes of the job were seen to use is removed. A segment that nobody
    here has open may belong to a container that shares /dev/shm and whose processes
    cannot be seen.

    Attributes:
      folder: for segments of this job alone; None where /dev/shm cannot be used.
    """

    def __init__(self, token: str):
        self._token = token
        self._seen: dict[Path, tuple[int, int]] = {}
        self._next, self._pause = 0.0, _FIRST_LOOK
        self.folder: Path | None = _SHARED_MEMORY / f"jaxcomm-{token}"
        try:
            self.folder.mkdir(mode=0o700)
        except OSError:
            self.folder = None

    def look(self) -> None:
        """Note what the job uses now, ever less often: most is made at the start."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self._pause
        self._pause = min(2 * self._pause, _LAST_LOOK)
        for path in map(Path, _open_files(of_job(self._token))):
            if path.name.startswith(_SEGMENTS) and (found := _identity(path)):
                self._seen[path] = found

    def remove(self) -> None:
        """Remove what was noted and nobody has open, once the job has ended."""
        used = set(_open_files(psutil.pids())) if self._seen else set[str]()
        for path, identity in self._seen.items():
            if str(path) not in used and _identity(path) == identity:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the job's own folder."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _open_files(pids: list[int]) -> Iterator[str]:
    """Yield what processes of this user have mapped or open in shared memory.

    psutil reads how much of every mapping is in memory too, which halts a large process
    for a while.
    """
    for pid in pids:
        folder = Path(f"/proc/{pid}")
        with contextlib.suppress(OSError):
            for line in (folder / "maps").read_text().splitlines():
                if "/dev/shm/" in line:
                    yield line[line.index("/dev/shm/") :].removesuffix(" (deleted)")
            for link in (folder / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if (target := os.readlink(link)).startswith("/dev/shm/"):
                        yield target
