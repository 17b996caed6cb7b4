"""Transport of a single rank: every collective is the identity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxcomm.transports.base import Call, Group, Transport


class Local(Transport):
    """One rank: nothing travels.

    It refuses what several ranks would refuse, so that code stays portable.
    """

    name = "local"
    connects = False
    needs_mpi = False
    calls_when_alone = False

    def connect(self, group: Group) -> None:
        """There is nobody else."""

    def split(self, key: int, members: Sequence[int], color: int, place: int) -> None:
        """There is nobody to part from."""

    def lower(self, ctx: Any, call: Call, values: Sequence[Any]) -> Sequence[Any]:
        """Return the operands."""
        return values
