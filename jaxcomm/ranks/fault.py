"""What ends the use of a communicator: its ranks have lost each other.

A wait that was given up leaves messages under way, and what this rank sent next could
be taken for them. So it sends nothing more.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator

from jaxcomm.errors import BrokenCommunicatorError, JaxcommError, StallError


class Fault:
    """The first such failure of a communicator; all its channels share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._text = ""  # of the errors that follow; "" while all is well
        self._listeners: list[Callable[[str], None]] = []  # called once, by `set`

    def listen(self, listener: Callable[[str], None]) -> None:
        """Call `listener`, once, with the text of the errors that will follow."""
        self._listeners.append(listener)

    def set(self, error: JaxcommError) -> None:
        """Refuse all use from now on; only the first failure counts."""
        with self._lock:
            if self._text:
                return
            self._text = (
                "this communicator can no longer be used: its ranks have lost each "
                "other, and what is sent now could be taken for something else. Start "
                f"the job again. What happened first: {type(error).__name__}: {error}"
            )
        for listener in self._listeners:
            listener(self._text)

    def check(self) -> None:
        """Raise BrokenCommunicatorError if there has been a failure."""
        if self._text:
            raise BrokenCommunicatorError(self._text)

    @contextlib.contextmanager
    def guard(self) -> Generator[None]:
        """Check first, and let the end of a wait be the failure."""
        self.check()
        try:
            yield
        except StallError as error:
            self.set(error)
            raise
        except KeyboardInterrupt:
            self.set(StallError("a wait for the other ranks was interrupted"))
            raise
