"""Ending a job on request: all ranks agree after which step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

from jaxcomm.errors import InvalidOptionError
from jaxcomm.ranks.communicator import Communicator
from jaxcomm.startup import world


class Stop:
    """Turns SIGTERM and SIGINT into a question that a training loop asks.

    From its construction on, the first of these signals ends nothing: it is noted, and
    `requested` tells all ranks of it at the same step, so that they save together. A
    second SIGINT (Ctrl-C) does what it did before, for one who does not want to wait.

    The agreement is one exchange of the hosts in every `every` steps, in which each
    rank waits until all have come that far in their loops: tens of microseconds within
    a host. A signal is thus answered after at most `every` steps. There is no other
    message.

    Attributes:
      received: whether this process has had a signal; the other ranks may not know yet.

    Example:
      >>> with jaxcomm.checkpoint.Stop(every=10) as stop:
      ...     for step in range(1, 101):
      ...         if step == 13 and jaxcomm.rank() == 0:
      ...             signal.raise_signal(signal.SIGTERM)  # as a scheduler does
      ...         if stop.requested(step):
      ...             break
      >>> step
      20
    """

    def __init__(
        self,
        *,
        every: int = 10,
        signals: Sequence[int] = (signal.SIGTERM, signal.SIGINT),
        comm: Communicator | None = None,
    ):
        """Take over the signals; in the main thread.

        Args:
          every: the ranks ask each other after each step whose number it divides.
          signals: what counts as a request.
          comm: the ranks that agree; all by default.

        Raises:
          InvalidOptionError: `every` is not a positive integer, or this is not the
            main thread.
        """
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise InvalidOptionError(f"every={every!r}; give a number of steps, from 1")
        if threading.current_thread() is not threading.main_thread():
            raise InvalidOptionError(
                "Stop takes over signals: make it in the main thread"
            )
        self._every, self._comm = every, comm or world()
        self._agreed = False
        self.received = False
        self._previous: dict[int, Any] = {
            number: signal.signal(number, self._note) for number in signals
        }

    def requested(self, step: int) -> bool:
        """Return whether to end after this step; the same on every rank.

        All ranks call it after every step.

        Args:
          step: number of steps done, equal on all ranks.
        """
        if not self._agreed and step % self._every == 0:
            self._agreed = any(self._comm.all_gather_object(self.received))
        return self._agreed

    def close(self) -> None:
        """Give the signals back to whoever had them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __enter__(self) -> Stop:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        # SIGTERM may come twice: from a scheduler, and from its launcher as well.
        if self.received and number == signal.SIGINT:
            self.close()
            signal.raise_signal(number)
        self.received = True
