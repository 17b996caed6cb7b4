"""Who the ranks are: communicators, subgroups and host-side objects.

What connects the processes on the host is a *fabric* (`ranks.fabric`); what moves
arrays is a transport.
"""

# pyright: strict, reportUnknownMemberType=false
# JAX types its own functions in part.
from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomm import compat, native
from jaxcomm import settings as _settings
from jaxcomm.errors import BrokenCommunicatorError, InvalidOptionError
from jaxcomm.planning import costs as costmodel
from jaxcomm.planning.costs import CostModel
from jaxcomm.ranks import agreement
from jaxcomm.ranks.agreement import Agreement
from jaxcomm.ranks.fabric import Fabric
from jaxcomm.ranks.registry import Registry
from jaxcomm.settings import Settings
from jaxcomm.transports.base import Group, Transport

log = logging.getLogger(__name__)

Groups = Sequence[Sequence[int]]


class Communicator:
    """A group of ranks, numbered from 0. Hashable, and equal on every rank.

    `jaxcomm.world` returns that of all ranks, and `subgroup` makes others.

    Attributes:
      rank: this process's number, 0 <= rank < size.
      size: number of ranks.
      local_rank: number among the ranks on this host.
      local_size: number of ranks on this host.
      hosts: number of hosts.
      transport: "local", "mpi", "mpi4jax" or "nccl".
      backend: the transport itself.
      alone: whether its collectives are left out, because one rank needs none.
      timeout: seconds that the schedule check waits for the other ranks.
      staging_bytes: size of the buffer that small leaves share.
      topology: what a profile of `jaxcomm tune` holds for; "" without MPI.
      costs: the cost model that plans are made with.
      agreement: the schedules of its calls, and how ranks compare them.
      registry: finds it, and its relatives, by their keys.
      checked: fingerprints of schedules that ran outside jit.

    Example:
      >>> comm = jaxcomm.world()
      >>> comm.all_gather_object(comm.rank) == list(range(comm.size))
      True
      >>> first = comm.subgroup([0])  # None on the other ranks
      >>> (first is None) == (comm.rank > 0)
      True
    """

    def __init__(
        self,
        lineage: str,
        backend: Transport,
        settings: Settings,
        fabric: Fabric,
        registry: Registry | None = None,
    ):
        """Connect the ranks of a fabric; they all call it together.

        Args:
          lineage: "world", or which ranks of which communicator these are; the same on
            every rank.
          backend: opened, and not connected yet.
          settings: of `init`.
          fabric: the ranks.
          registry: of the communicator from which this one is made.
        """
        self.backend = backend
        self.transport = backend.name
        self.timeout = settings.timeout
        self.staging_bytes = settings.staging_bytes
        self.topology = ""
        self.costs = settings.costs
        self.lineage = lineage
        # The key stands in compiled programs, so it must be equal on all ranks.
        self.key = _key(lineage)
        self.rank, self.size = fabric.rank, fabric.size
        self.local_rank, self.local_size = fabric.local_rank, fabric.local_size
        self.hosts = len(set(fabric.hosts))
        self.alone = self.size == 1 and not backend.calls_when_alone
        self.registry = Registry() if registry is None else registry
        self.agreement = Agreement(self.key, fabric.check, self.timeout, self.transport)
        # Fingerprints of schedules that have run outside jit, and so were compared.
        self.checked: set[str] = set()
        self._fabric = fabric
        # By members: what `subgroup` has returned.
        self._subgroups: dict[tuple[int, ...], Communicator | None] = {}
        self._duplicates = 0  # how many there are: their keys differ by it
        self._may_share_memory = settings.shared_memory
        if backend.connects:
            self._connect()

    def _connect(self) -> None:
        whole = self.lineage == "world"
        if whole:
            self._find_settings()
        self.backend.connect(
            Group(
                key=self.key,
                fabric=self._fabric,
                whole=whole,
                timeout=self.timeout,
                staging_bytes=self.staging_bytes,
                segment_bytes=self.costs.segment_bytes,
                may_share_memory=self._may_share_memory,
            )
        )
        self._fabric.fault.listen(
            lambda text: self.backend.refuse(
                agreement.told(BrokenCommunicatorError(text))
            )
        )
        self.registry.add(self.key, self)

    @property
    def shared_memory(self) -> bool:
        """Whether the ranks share memory, which is equal on all of them.

        They do where they are on one host, see each other's processes, and
        JAXCOMM_SHARED_MEMORY is not "off" on rank 0. Reductions go through it;
        mpi4jax's do not, but ranks meet there before each of its calls.
        """
        return self.backend.shared_memory

    @property
    def tier_hosts(self) -> int:
        """Between how many hosts plans choose how a bucket moves; 1 for no choice.

        There is one where ranks of a host share memory and exchange sums with other
        hosts, which is equal on all ranks.
        """
        return self.hosts if self.backend.two_tiers else 1

    def check_usable(self) -> None:
        """Raise BrokenCommunicatorError if the ranks have lost each other before."""
        self._fabric.fault.check()

    def _find_settings(self) -> None:
        """Read the profile on rank 0 and give it to all, so that all plan alike."""
        local_sizes = self.all_gather_object(self.local_size)
        self.topology = costmodel.topology(
            self.transport, self._fabric.name, local_sizes
        )
        default = self.backend.default_costs(one_host=self.size == self.local_size)
        found: tuple[Any, ...] = ()
        if self.rank == 0:
            try:
                costs = costmodel.find_profile(self.topology, default)
                shared = os.environ.get(_settings.SHARED_MEMORY_VARIABLE, "on") != "off"
                every = _settings.check_every()
                found = (costs.to_json(), self.staging_bytes, shared, every, "")
            except InvalidOptionError as error:
                found = (None, None, None, None, str(error))
        costs, self.staging_bytes, self._may_share_memory, every, failure = (
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

        Example:
          >>> comm = jaxcomm.world()
          >>> backward = comm.subgroup(range(comm.size)[::-1])
          >>> backward.rank + comm.rank == comm.size - 1
          True
          >>> jaxcomm.all_reduce(jnp.ones(3), comm=backward)
          Array([1., 1., 1.], dtype=float32)
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
            self.timeout, self.staging_bytes, self.costs, self._may_share_memory
        )
        return Communicator(
            lineage, self.backend.for_subgroup(), settings, fabric, self.registry
        )

    def partition(self, groups: Groups) -> int:
        """Return the key of this rank's subgroup in a division of all ranks.

        The same on every rank. Nothing is created: the native library asks for that
        when a collective first needs it, and then all ranks are there.
        """
        return _key(f"{self.lineage}|{json.dumps(groups)}")

    def create_partition(self, key: int, groups: Sequence[Sequence[int]]) -> None:
        """Create the native communicator of this rank's subgroup; on XLA's thread."""
        color = next(k for k, group in enumerate(groups) if self.rank in group)
        members = groups[color]
        self.registry.add(key, self)
        self.backend.split(key, members, color, members.index(self.rank))

    def barrier(self) -> None:
        """Wait until every rank is here (host side; not for use inside jit)."""
        self._fabric.host.barrier()

    def broadcast_object(self, obj: Any, root: int = 0) -> Any:
        """Return the root's Python object on every rank.

        Over MPI anything that can be pickled; where jax.distributed connects the ranks,
        numbers, texts, bytes, arrays of NumPy, and lists, tuples and dicts of them.

        Raises:
          InvalidOptionError: `root` is not a rank of this communicator.
          StallError: a rank does not come within `timeout` (by jax.distributed).
          BrokenCommunicatorError: this communicator had a StallError before.

        Example:
          >>> comm = jaxcomm.world()
          >>> comm.broadcast_object({"seed": 3 + comm.rank})
          {'seed': 3}
        """
        if not 0 <= root < self.size:
            raise InvalidOptionError(f"root={root}; give a rank below {self.size}")
        return self._fabric.host.broadcast(obj, root)

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Return every rank's Python object, in rank order; as `broadcast_object`.

        Example:
          >>> comm = jaxcomm.world()
          >>> sizes = comm.all_gather_object(comm.size)
          >>> sizes == [comm.size] * comm.size
          True
        """
        return self._fabric.host.all_gather(obj)

    def duplicate(self, segment_bytes: int) -> int:
        """Return the key of a native communicator of the same ranks, for measuring.

        It differs in how large leaves are divided. All ranks call it together.
        """
        self._duplicates += 1
        key = _key(f"{self.lineage}#{self._duplicates}")
        self.backend.duplicate(key, segment_bytes)
        return key

    def counters(self) -> dict[str, int]:
        """Return what the native library counted on this communicator.

        `calls` are custom calls, `nanoseconds` the time inside those that have ended,
        with waiting for other ranks; `mpi_all_reduce` and `mpi_broadcast` the MPI calls
        they made. `segments` what went through shared memory or around a ring
        instead, `messages` what this rank sent to other hosts for them, and `sent` its
        bytes, `moved` the leaves gathered, scattered, exchanged or permuted, `bytes`
        the payload, and `agreements` the schedule checks: the only control messages
        there are. Over NCCL, `nccl_collectives` are its calls. Empty for one rank
        alone.
        """
        return self.backend.counters()

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
            f"rank={self.rank}, size={self.size}, hosts={self.hosts})"
        )


def _key(text: str) -> int:
    """Return 63 bits that name what a text says, as an HLO attribute."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def wait_for_pending_work() -> None:
    """Wait for all programs that were dispatched."""
    # MPI_Finalize must not run beside a custom call. A CPU device runs its programs
    # in the order of their dispatch, so when a new one is done, all are.
    try:
        jax.effects_barrier()
    except compat.JaxRuntimeError as error:
        # It failed in another call, which has raised it or will.
        log.debug("a program has failed: %s", error)
    jax.block_until_ready(jnp.zeros(()) + 1)
