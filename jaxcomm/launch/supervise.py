"""`jaxcomm run`: see a job through to its end, and start it again if it fails."""

from __future__ import annotations

import dataclasses
import os
import secrets
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import Any

from jaxcomm.launch import notices, processes
from jaxcomm.launch.run import (
    Job,
    command_line,
    environment,
    on_this_host,
    started_by_mpiexec,
)

TIMED_OUT = 124
USAGE = 2  # as click and argparse end: the same command would fail again
_DUMP_SECONDS = 1.0
_COPY_SECONDS = 2.0  # for what was written before the job ended
_SEGMENTS_VARIABLE = "OMPI_MCA_btl_sm_backing_directory"


def run(job: Job) -> int:
    """Run the job to its end and return its exit code.

    SIGTERM and Ctrl-C are passed to the ranks, which have `job.grace` seconds to save
    and end; the code is then 0 if all ranks' is, else 128 + the signal. A second Ctrl-C
    ends them at once. After `job.timeout` seconds every rank writes the stacks of its
    threads to stderr, then the job ends with code 124.

    A job that failed is started again up to `job.max_restarts` times: not after one of
    those signals, the timeout, or exit code 2, which stands for wrong usage.

    Raises:
      LaunchError: it cannot be started.
    """
    end = None if job.timeout is None else time.monotonic() + job.timeout
    with _Signals() as signals:
        while True:
            began = time.monotonic()
            code = _attempt(job, signals, end)
            if signals.first is not None:
                return 0 if code == 0 else 128 + signals.first
            if code in (0, TIMED_OUT, USAGE) or job.attempt == job.max_restarts:
                return code
            job = dataclasses.replace(job, attempt=job.attempt + 1)
            _say(
                f"{' '.join(job.command)} ended with exit code {code} after "
                f"{time.monotonic() - began:.0f} s; restart {job.attempt} of "
                f"{job.max_restarts}"
            )


def _attempt(job: Job, signals: _Signals, end: float | None) -> int:
    """Start the job once; leaves nothing of it behind unless it succeeds."""
    token = secrets.token_hex(8)
    line, added = command_line(job), environment(job)
    filtered = started_by_mpiexec(job) and not job.verbose
    segments = processes.Segments(token)
    try:
        if segments.folder is not None and on_this_host(job):
            added[_SEGMENTS_VARIABLE] = str(segments.folder)
        process = subprocess.Popen(
            line,
            env={**os.environ, **added, processes.JOB_VARIABLE: token},
            stderr=subprocess.PIPE if filtered else None,
            start_new_session=True,
        )
        copy = process.stderr and notices.Copy(process.stderr, 2)
        try:
            code = _wait(process, token, job, signals, end, segments)
        except BaseException:
            _kill(process, token)
            raise
        finally:
            if copy:
                copy.join(_COPY_SECONDS)
        if code != 0:
            processes.end(token)
            segments.remove()
    finally:
        segments.close()
    return code if code >= 0 else 128 - code


def _wait(
    process: subprocess.Popen[bytes],
    token: str,
    job: Job,
    signals: _Signals,
    end: float | None,
    segments: processes.Segments,
) -> int:
    asked: float | None = None
    while True:
        try:
            return process.wait(timeout=0.1)
        except subprocess.TimeoutExpired:
            now = time.monotonic()
        segments.look()
        if signals.first is not None:
            if asked is None:
                asked = now
                _ask(process, token, signals.first, job.grace)
            if signals.at_once or now - asked > job.grace:
                return _kill(process, token)
        elif end is not None and now > end:
            _say(
                f"{' '.join(job.command)} still ran after {job.timeout:g} s on "
                f"{job.ranks} ranks; every rank's stacks follow, then the job ends"
            )
            processes.send(processes.ranks(token), signal.SIGUSR1)
            time.sleep(_DUMP_SECONDS)
            _kill(process, token)
            return TIMED_OUT


def _ask(
    process: subprocess.Popen[bytes], token: str, number: int, grace: float
) -> None:
    """Pass a signal on: to the ranks, because mpiexec would soon kill them.

    Ranks on other hosts hear of it from those here; where none is here, it is up to
    mpiexec.
    """
    ranks = processes.ranks(token)
    if not ranks:
        process.send_signal(number)
        return
    _say(
        f"{signal.Signals(number).name} goes to the ranks, which have {grace:g} s "
        "(--grace) to end; a second Ctrl-C ends them at once"
    )
    processes.send(ranks, number)


def _kill(process: subprocess.Popen[bytes], token: str) -> int:
    """End mpiexec and all it started; it gets a moment to do so itself."""
    process.terminate()
    try:
        process.wait(timeout=2.0)
    except subprocess.TimeoutExpired:
        process.kill()
    processes.end(token)
    return process.wait()


class _Signals:
    """Notes SIGTERM and SIGINT.

    Attributes:
      first: the first one; None before it.
      at_once: whether there was another Ctrl-C after it.
    """

    def __init__(self) -> None:
        self.first: int | None = None
        self.at_once = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.first is None:
            self.first = number
        elif number == signal.SIGINT:
            self.at_once = True


def _say(text: str) -> None:
    sys.stderr.write(f"jaxcomm: {text}\n")
    sys.stderr.flush()
