"""The communicators of a process, found by the key that stands in compiled programs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxcomm.planning.schedule import Schedule
from jaxcomm.ranks import agreement

if TYPE_CHECKING:
    from jaxcomm.ranks.communicator import Communicator


class Registry:
    """All communicators that descend from one; answers what their custom calls ask."""

    def __init__(self) -> None:
        # By its own key, and by the keys of the partitions into which it was divided.
        self._communicators: dict[int, Communicator] = {}

    def add(self, key: int, comm: Communicator) -> None:
        """Find a communicator by a key from now on."""
        self._communicators[key] = comm

    def schedule_of(self, key: int, digest: int) -> Schedule | None:
        """Return a schedule that was traced in this process."""
        comm = self._communicators.get(key)
        return comm.agreement.schedule_of(digest) if comm else None

    def describe(self, key: int, digest: int, place: int) -> str:
        """Say in words what a call reduces."""
        return agreement.describe(self.schedule_of(key, digest), place)

    def agree(self, key: int, digest: int, bucket: int, number: int) -> str | None:
        """Compare a schedule across ranks: see `Agreement.answer`."""
        return self._communicators[key].agreement.answer(digest, bucket, number)

    def differ(
        self, key: int, own: tuple[int, int], rank: int, other: tuple[int, int]
    ) -> str:
        """Return the error of ranks that met in different calls."""
        return self._communicators[key].agreement.differ(own, rank, other)

    def partition(self, key: int, part: int, groups: list[list[int]]) -> str | None:
        """Create a partition that a custom call needs; return why not, or None."""
        try:
            self._communicators[key].create_partition(part, groups)
        except Exception as error:  # nothing may escape into C
            return f"the subgroups {groups} could not be created: {error}"
        return None
