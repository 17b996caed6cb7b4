"""Standard error of a job, without what Open MPI adds when a rank ends it.

A dozen lines between rules say that MPI_ABORT was called, or that a process has failed.
jaxcomm's own report says which rank, and why; it should not be looked for above them.
"""

from __future__ import annotations

import os
import threading
from typing import IO

RULE = b"-" * 74
NOTICES = (
    b"MPI_ABORT was invoked on rank",
    b"prterun has exited due to process rank",
    b"prterun detected that one or more processes exited with non-zero status",
)


class Filter:
    """Takes the notices out of a stream; everything else passes at once."""

    def __init__(self) -> None:
        self._pending = b""  # of a line that may yet be a rule
        self._at_start = True  # of a line
        self._rule = b""  # a rule that was held back: the next line says whose it is
        self._inside = False  # a notice
        self._after = False  # a notice, where Open MPI leaves a NUL

    def feed(self, data: bytes) -> bytes:
        """Return what of the stream so far can be shown and was not yet."""
        out, rest = [], self._pending + data
        self._pending = b""
        while rest:
            line, newline, rest = rest.partition(b"\n")
            whole = bool(newline)
            if self._after:
                line, self._after = line.lstrip(b"\0"), False
                if not line and not whole:
                    self._after = True
                    break
            if self._inside:
                if not whole:
                    self._pending = line
                elif line.rstrip(b"\r") == RULE:
                    self._inside, self._after = False, True
                continue
            if self._rule:
                if not whole and any(text.startswith(line) for text in NOTICES):
                    self._pending = line
                    continue
                if line.startswith(NOTICES):
                    self._inside, self._rule = True, b""
                    if not whole:
                        self._pending = line
                    continue
                out.append(self._rule)
                self._rule = b""
            text = line.rstrip(b"\r")
            if self._at_start and whole and text == RULE:
                self._rule = line + newline
                continue
            if self._at_start and not whole and RULE.startswith(text):
                self._pending = line
                continue
            out.append(line + newline)
            self._at_start = whole
        return b"".join(out)

    def end(self) -> bytes:
        """Return what was held back when the stream has ended."""
        return b"" if self._inside else self._rule + self._pending


class Copy:
    """Copies a pipe to a file descriptor, filtered, on a thread of its own."""

    def __init__(self, source: IO[bytes], target: int):
        self._source, self._target = source, target
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        notices = Filter()
        while data := os.read(self._source.fileno(), 1 << 16):
            self._write(notices.feed(data))
        self._write(notices.end())

    def _write(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(self._target, data) :]
        except BrokenPipeError:
            pass  # nobody reads any more; the ranks must not wait for that

    def join(self, seconds: float) -> None:
        """Wait until all is copied; less long where somebody keeps the pipe open."""
        self._thread.join(seconds)
