"""How processes find each other and talk on the host: MPI, jax.distributed, or alone.

Internal to `communicator`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import numpy as np

from jaxcomm import compat, settings
from jaxcomm.errors import ScheduleMismatchError
from jaxcomm.ranks import subgroups
from jaxcomm.ranks.fault import Fault
from jaxcomm.ranks.hosts.mpi import HostChannel


class Channel(Protocol):
    """Exchanges objects between ranks; all call it in the same order."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def fault(self) -> Fault: ...
    def barrier(self) -> None: ...
    def broadcast(self, obj: Any, root: int) -> Any: ...
    def all_gather(self, obj: Any) -> list[Any]: ...
    def reduce_min(self, send: np.ndarray, timeout: float, what: str) -> np.ndarray: ...


class Fabric(Protocol):
    """Some ranks and what connects them.

    Attributes:
      rank: this process's number.
      size: how many there are.
      local_rank: number among those on this host.
      local_size: how many are on this host.
      hosts: every rank's host, numbered in the order of their first ranks.
      name: what it is and which version; the same on every rank.
      host: for objects of users and of `init`.
      check: for the one-time schedule check, which runs on XLA's threads.
      fault: of both: where one has lost the other ranks, neither is used again.
    """

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def local_rank(self) -> int: ...
    @property
    def local_size(self) -> int: ...
    @property
    def hosts(self) -> tuple[int, ...]: ...
    @property
    def name(self) -> str: ...
    @property
    def host(self) -> Channel: ...
    @property
    def check(self) -> Channel: ...
    @property
    def fault(self) -> Fault: ...

    def subgroup(self, members: Sequence[int], lineage: str) -> Fabric:
        """Connect some of the ranks; only they call it."""
        ...


def numbered(hosts: Sequence[Hashable]) -> tuple[int, ...]:
    """Return the ranks' hosts as numbers from 0, in the order of their first ranks."""
    order = list(dict.fromkeys(hosts))
    return tuple(order.index(host) for host in hosts)


class AloneChannel:
    """One rank: everything is there already."""

    rank, size = 0, 1

    def __init__(self, fault: Fault):
        self.fault = fault

    def barrier(self) -> None:
        pass

    def broadcast(self, obj: Any, root: int) -> Any:
        return obj

    def all_gather(self, obj: Any) -> list[Any]:
        return [obj]

    def reduce_min(self, send: np.ndarray, timeout: float, what: str) -> np.ndarray:
        return send


class Alone:
    """One process, started by itself."""

    rank, size, local_rank, local_size, hosts = 0, 1, 0, 1, (0,)
    name = "one process"

    def __init__(self) -> None:
        self.fault = Fault()
        self.host = self.check = AloneChannel(self.fault)

    def subgroup(self, members: Sequence[int], lineage: str) -> Fabric:
        return Alone()


class MpiFabric:
    """The ranks of an MPI communicator.

    Attributes:
      data: communicator of the custom calls.
      control: of `check`.
    """

    def __init__(self, comm: Any, timeout: float):
        from mpi4py import MPI

        self._timeout = timeout
        self._lost: ScheduleMismatchError | None = None
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        if pretended := os.environ.get(settings.TEST_HOSTS_VARIABLE):
            node = comm.Split(int(pretended.split(",")[MPI.COMM_WORLD.Get_rank()]))
        else:
            node = comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank, self.local_size = node.Get_rank(), node.Get_size()
        self.hosts = numbered(comm.allgather(node.bcast(self.rank)))
        node.Free()
        self.name = MPI.Get_library_version().splitlines()[0].strip(" \0")
        # Traffic of different kinds never meets.
        self.data, self.control, self._host = comm.Dup(), comm.Dup(), comm.Dup()
        self.fault = Fault()
        self.host = HostChannel(self._host, self.fault)
        self.check = HostChannel(self.control, self.fault)
        self._comparison = subgroups.Comparison(
            self._host,
            self.host.turn,
            lambda done, what: self.check.wait(done, timeout, what),
        )
        # An MPI failure becomes a Python exception, never MPI_Abort.
        self.data.Set_errhandler(MPI.ERRORS_RETURN)

    def subgroup(self, members: Sequence[int], lineage: str) -> MpiFabric:
        if self._lost is not None:  # messages may be left that nobody received
            raise self._lost
        try:
            with self.fault.guard():
                self._comparison.compare(members)
        except ScheduleMismatchError as error:
            self._lost = error
            raise
        group = self._host.Get_group().Incl(list(members))
        return MpiFabric(self._host.Create_group(group), self._timeout)

    def duplicate(self) -> Any:
        """Return another MPI communicator of the same ranks."""
        return self._host.Dup()

    def on_this_host(self, comm: Any, hosts: Sequence[int]) -> Any:
        """Return an MPI communicator of the ranks of `comm` that share this host.

        Args:
          comm: an MPI communicator, as of `part`; all its ranks call this.
          hosts: its ranks' hosts.
        """
        with self.host.turn():
            return comm.Split(hosts[comm.Get_rank()], comm.Get_rank())

    def part(self, members: Sequence[int]) -> Any:
        """Return an MPI communicator of some ranks; for XLA's threads."""
        # All members are here, and other threads hold the turn for moments only.
        with self.host.turn():
            return self.control.Create_group(
                self.control.Get_group().Incl(list(members))
            )


class KeyValueFabric:
    """Processes of jax.distributed, which talk through its key-value store."""

    def __init__(self, members: Sequence[int], lineage: str, timeout: float):
        from jaxcomm.ranks.hosts.keyvalue import KeyValueChannel

        self._members, self._timeout = tuple(members), timeout
        self.fault = Fault()
        self.host = KeyValueChannel(f"{lineage}|host", members, timeout, self.fault)
        self.check = KeyValueChannel(f"{lineage}|check", members, timeout, self.fault)
        self.rank, self.size = self.host.rank, self.host.size
        self.hosts = numbered(self.host.all_gather(socket.gethostname()))
        host = self.hosts[self.rank]
        self.local_rank = self.hosts[: self.rank].count(host)
        self.local_size = self.hosts.count(host)
        self.name = "jax.distributed"

    @classmethod
    def world(cls, timeout: float) -> KeyValueFabric | None:
        """Connect all processes; None where jax.distributed does not run."""
        found = compat.distributed_client()
        if found is None or found.num_processes < 2:
            return None
        return cls(range(found.num_processes), "world", timeout)

    def subgroup(self, members: Sequence[int], lineage: str) -> KeyValueFabric:
        chosen = [self._members[rank] for rank in members]
        return KeyValueFabric(chosen, lineage, self._timeout)
