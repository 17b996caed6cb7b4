"""Whether two ranks have made the same calls, looked at now and then, beside them.

Every communicator keeps a running hash of its calls (core/progress.h). A rank tells
the next one some of its hashes, and that one compares them with its own. Internal to
`watchdog`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxcomm import native

Marks = Mapping[int, Sequence[tuple[int, int]]]  # by communicator: (number, hash)
_PENDING = 1024


class History:
    """What this rank tells the next one, and what it has heard from the one before."""

    def __init__(self) -> None:
        self._told: dict[int, int] = {}
        self._pending: dict[tuple[int, int], int] = {}
        self._agreed: dict[int, int] = {}

    def news(self) -> Marks:
        """Return hashes of communicators that have made calls since the last time."""
        found = {}
        for row in native.progress():
            if row.calls != self._told.get(row.key, 0):
                self._told[row.key] = row.calls
                found[row.key] = [mark for mark in row.marks if mark[0] > 0]
        return found

    def hear(self, marks: Marks) -> None:
        """Take note of another rank's hashes."""
        for key, calls in marks.items():
            self._pending.update(((key, number), value) for number, value in calls)
        while len(self._pending) > _PENDING:
            del self._pending[next(iter(self._pending))]

    def difference(self) -> str | None:
        """Compare what was heard; say where the first that differs is, if one does."""
        made = {row.key: row.calls for row in native.progress()}
        for (key, number), value in list(self._pending.items()):
            if number > made.get(key, number):
                continue  # this rank will get there
            del self._pending[key, number]
            own = native.hash_at(key, number)
            if own == value:
                self._agreed[key] = max(number, self._agreed.get(key, 0))
            elif own is not None:
                first = self._agreed.get(key, 0) + 1
                return f"between call {first} and call {number}"
        return None
