"""Who the ranks are: communicators, subgroups and host-side objects.

What connects the processes on the host is a *fabric* (`ranks.fabric`); what moves
arrays is a transport.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomm import native
from jaxcomm import settings as _settings
from jaxcomm.errors import BrokenCommunicatorError, InvalidOptionError
from jaxcomm.planning import costs as costmodel
from jaxcomm.planning.costs import CostModel
from jaxcomm.ranks import agreement
from jaxcomm.ranks import threads as _threads
from jaxcomm.ranks.fabric import Fabric, MpiFabric
from jaxcomm.ranks.shared_window import SharedWindow
from jaxcomm.settings import Settings
from jaxcomm.transports.base import Transport
from jaxcomm.transports.local import Local

log = logging.getLogger(__name__)

_connected: dict[int, Communicator] = {}

Groups = Sequence[Sequence[int]]


class Communicator:
    """A group of ranks, numbered from 0. Hashable, and equal on every rank.

    Attributes:
      rank: this process's number, 0 <= rank < size.
      size: number of ranks.
      local_rank: number among the ranks on this host.
      local_size: number of ranks on this host.
      transport: "local", "mpi", "mpi4jax" or "nccl".
      alone: whether its collectives are left out, because one rank needs none.
      timeout: seconds that the schedule check waits for the other ranks.
      staging_bytes: size of the buffer that small leaves share.
      topology: what a profile of `jaxcomm tune` holds for; "" without MPI.
      costs: the cost model that plans are made with.
      shared_memory: whether the ranks share memory, which is equal on all of them:
        where they are on one host, see each other's processes, and
        JAXCOMM_SHARED_MEMORY is not "off" on rank 0. Reductions go through it;
        mpi4jax's do not, but ranks meet there before each of its calls.
    """

    def __init__(
        self, lineage: str, transport: str, settings: Settings, fabric: Fabric
    ):
        self.transport = transport
        self.timeout = settings.timeout
        self.staging_bytes = settings.staging_bytes
        self.topology = ""
        self.costs = settings.costs
        self.shared_memory = False
        self.lineage = lineage
        # The key stands in compiled programs, so it must be equal on all ranks.
        digest = hashlib.sha256(lineage.encode()).digest()
        self.key = int.from_bytes(digest[:8], "big") >> 1
        self.rank, self.size = fabric.rank, fabric.size
        self.local_rank, self.local_size = fabric.local_rank, fabric.local_size
        self._fabric = fabric
        self._subgroups: dict[tuple[int, ...], Communicator | None] = {}
        self._others: list[Any] = []
        self._windows: list[Any] = []
        self._may_share = settings.shared_memory
        self._own_thread = self._ring = False
        # XLA leaves out its own collectives of one device too. (Over MPI one rank does
        # make its calls, which is how their cost is known.)
        self.alone = transport == "local" or (transport == "nccl" and self.size == 1)
        self.lowering: Transport = Local()
        if transport != "local":
            self._connect()

    def _connect(self) -> None:
        if self.lineage == "world":
            self._find_settings()
        if self.transport == "nccl":
            from jaxcomm.transports import nccl

            nccl.join(self.key, self._fabric, self.timeout)
            self.lowering = nccl.Nccl()
        else:
            # Where calls wait for a network, XLA's threads have better things to do.
            default = "off" if self.size == self.local_size else "on"
            self._ring = os.environ.get(_settings.OWN_THREAD_VARIABLE, default) == "on"
            # Else see `ranks.threads`.
            self._own_thread = self._ring or (
                self.lineage != "world" and _threads.run_programs()
            )
            self.shared_memory = self._create_native(
                self.key, self._mpi.data, self.costs.segment_bytes
            )
            self.lowering = _lowering(self.transport, self._mpi.data)
        agreement.connect(self.key, self._fabric.check, self.timeout)
        self._fabric.fault.listen(self._refuse)
        _connected[self.key] = self

    def _refuse(self, text: str) -> None:
        """Let every custom call fail from now on."""
        text = agreement.told(BrokenCommunicatorError(text))
        if self.transport == "nccl":
            from jaxcomm.native import nccl

            nccl.refuse(self.key, text)
        else:
            native.refuse(self.key, text)

    def check_usable(self) -> None:
        """Raise BrokenCommunicatorError if the ranks have lost each other before."""
        self._fabric.fault.check()

    @property
    def _mpi(self) -> MpiFabric:
        assert isinstance(self._fabric, MpiFabric)
        return self._fabric

    def _find_settings(self) -> None:
        """Read the profile on rank 0 and give it to all, so that all plan alike."""
        local_sizes = self.all_gather_object(self.local_size)
        self.topology = costmodel.topology(
            self.transport, self._fabric.name, local_sizes
        )
        default = costmodel.DEFAULT
        if self.transport == "nccl":
            default = costmodel.OVER_NCCL
        elif self.size != self.local_size:
            default = costmodel.BETWEEN_HOSTS
        found: tuple[Any, ...] = ()
        if self.rank == 0:
            try:
                costs = costmodel.find_profile(self.topology, default)
                shared = os.environ.get(_settings.SHARED_MEMORY_VARIABLE, "on") != "off"
                every = _settings.check_every()
                found = (costs.to_json(), self.staging_bytes, shared, every, "")
            except InvalidOptionError as error:
                found = (None, None, None, None, str(error))
        costs, self.staging_bytes, self._may_share, every, failure = (
            self.broadcast_object(found)
        )
        if failure:
            raise InvalidOptionError(failure)
        native.check_every_call(every)
        self.costs = CostModel.from_json(costs)
        if not self.costs.source.startswith("default") and self.rank == 0:
            log.info("plans follow the profile %s", self.costs.source)

    def subgroup(self, ranks: Sequence[int]) -> Communicator | None:
        """Return the communicator of some of this one's ranks.

        Every member must call it, in the same order as its other subgroups; other
        ranks may. Asking again for the same ranks returns the same communicator.

        One Python thread at a time may use a communicator: give each its own. Over MPI
        their programs run beside each other, as many as XLA has threads in a rank
        (`jaxcomm run --threads`); where a rank has one core, as many as you like, if
        `init` was called before anything else used JAX. One thread more is refused.
        Over mpi4jax only the thread that called `init` may use communicators.

        Args:
          ranks: distinct ranks of this communicator; their order numbers the new
            ranks.

        Returns:
          The communicator, or None on a rank that is not a member.

        Raises:
          InvalidOptionError: ranks are empty, repeated or out of range.
          ScheduleMismatchError: members give different ranks (over MPI).
          StallError: a member does not come within `timeout`.
          BrokenCommunicatorError: this communicator had a StallError before.
        """
        self.check_usable()
        members = tuple(int(r) for r in ranks)
        bad = [r for r in members if not 0 <= r < self.size]
        if not members or bad or len(set(members)) != len(members):
            raise InvalidOptionError(
                f"subgroup({list(members)}): give distinct ranks between 0 and "
                f"{self.size - 1}"
            )
        if members not in self._subgroups:
            self._subgroups[members] = self._make_subgroup(members)
        return self._subgroups[members]

    def _make_subgroup(self, members: tuple[int, ...]) -> Communicator | None:
        if self.rank not in members:
            return None
        lineage = f"{self.lineage}/{','.join(map(str, members))}"
        # Blocking calls: nothing else of ours may run beside them.
        wait_for_pending_work()
        fabric = self._fabric.subgroup(members, lineage)
        settings = Settings(
            self.timeout, self.staging_bytes, self.costs, self._may_share
        )
        return Communicator(lineage, self.transport, settings, fabric)

    def partition(self, groups: Groups) -> int:
        """Return the key of this rank's subgroup in a division of all ranks.

        The same on every rank. Nothing is created: the native library asks for that
        when a collective first needs it, and then all ranks are there.
        """
        text = f"{self.lineage}|{json.dumps(groups)}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def create_partition(self, key: int, groups: Sequence[Sequence[int]]) -> None:
        """Create the native communicator of this rank's subgroup; on XLA's thread."""
        number = next(k for k, group in enumerate(groups) if self.rank in group)
        members = groups[number]
        agreement.connect(key, self._fabric.check, self.timeout, whole=self.key)
        if self.transport == "nccl":
            from jaxcomm.native import nccl

            place = members.index(self.rank)
            nccl.split(self.key, key, number, place, len(members), self.timeout)
            return
        part = self._mpi.part(members)
        self._others.append(part)
        self._create_native(key, part, self.costs.segment_bytes)

    def barrier(self) -> None:
        """Wait until every rank is here (host side; not for use inside jit)."""
        self._fabric.host.barrier()

    def broadcast_object(self, obj: Any, root: int = 0) -> Any:
        """Return the root's Python object on every rank.

        Over MPI anything that can be pickled; where jax.distributed connects the ranks,
        numbers, texts, bytes, arrays of NumPy, and lists, tuples and dicts of them.
        """
        if not 0 <= root < self.size:
            raise InvalidOptionError(f"root={root}; give a rank below {self.size}")
        return self._fabric.host.broadcast(obj, root)

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Return every rank's Python object, in rank order; as `broadcast_object`."""
        return self._fabric.host.all_gather(obj)

    def duplicate(self, segment_bytes: int) -> int:
        """Return the key of a native communicator of the same ranks, for measuring.

        It differs in how large leaves are divided. All ranks call it together.
        """
        number = len(self._others)
        digest = hashlib.sha256(f"{self.lineage}#{number}".encode()).digest()
        key = int.from_bytes(digest[:8], "big") >> 1
        data = self._mpi.duplicate()
        self._others.append(data)
        self._create_native(key, data, segment_bytes)
        return key

    def _create_native(self, key: int, comm: Any, segment_bytes: int) -> bool:
        """Make some ranks known to the native library; tell if they share memory."""
        native.create_communicator(
            key,
            comm,
            staging_bytes=self.staging_bytes,
            segment_bytes=segment_bytes,
            own_thread=self._own_thread,
            ring=self._ring,
        )
        one_host = self.size == self.local_size
        if not (self._may_share and one_host and comm.Get_size() > 1):
            return False

        def attach(window: SharedWindow) -> None:
            native.share_memory(
                key, window.addresses, window.nbytes, crowded=window.crowded
            )

        window = SharedWindow(comm, min(self.staging_bytes, 3 * segment_bytes), attach)
        if window.failure:
            native.share_memory(key, [], 0, crowded=False)
            log.info("reductions go through MPI: %s", window.failure)
            return False
        self._windows.append(window)
        return True

    def counters(self) -> dict[str, int]:
        """Return what the native library counted on this communicator.

        `calls` are custom calls, `nanoseconds` the time inside those that have ended,
        with waiting for other ranks; `mpi_all_reduce` and `mpi_broadcast` the MPI calls
        they made. `segments` what went through shared memory instead, `moved` the
        leaves gathered, scattered, exchanged or permuted, `bytes` the payload, and
        `agreements` the schedule checks: the only control messages there are. Over
        NCCL, `nccl_collectives` are its calls. Empty for one rank alone.
        """
        if self.transport == "local":
            return {}
        if self.transport == "nccl":
            from jaxcomm.native import nccl

            return nccl.counters(self.key)
        return native.counters(self.key)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Communicator)
            and self.key == other.key
            and self.transport == other.transport
        )

    def __hash__(self) -> int:
        return self.key

    def __repr__(self) -> str:
        return (
            f"Communicator({self.lineage!r}, transport={self.transport!r}, "
            f"rank={self.rank}, size={self.size})"
        )


def _lowering(transport: str, data: Any) -> Transport:
    if transport == "mpi4jax":
        from jaxcomm.transports.mpi4jax import Mpi4jax

        return Mpi4jax(data)
    from jaxcomm.transports.mpi import Mpi

    return Mpi()


def answer_partition(key: int, partition: int, groups: list[list[int]]) -> str | None:
    """Create a partition that a custom call needs; return why not, or None."""
    try:
        _connected[key].create_partition(partition, groups)
    except Exception as error:  # nothing may escape into C
        return f"the subgroups {groups} could not be created: {error}"
    return None


def wait_for_pending_work() -> None:
    """Wait for all programs that were dispatched."""
    # MPI_Finalize must not run beside a custom call. A CPU device runs its programs
    # in the order of their dispatch, so when a new one is done, all are.
    try:
        jax.effects_barrier()
    except jax.errors.JaxRuntimeError as error:
        # It failed in another call, which has raised it or will.
        log.debug("a program has failed: %s", error)
    jax.block_until_ready(jnp.zeros(()) + 1)
