"""Who the ranks are: `init`, communicators, subgroups and host-side objects.

Over MPI every communicator owns three MPI communicators, so that traffic of
different kinds never meets: `data` for the custom calls, `control` for the one-time
schedule check, which runs on XLA's threads, and `host` for Python objects.
"""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomm import agreement, costmodel, native, timeline
from jaxcomm._host import HostChannel
from jaxcomm._window import SharedWindow
from jaxcomm.costmodel import CostModel
from jaxcomm.errors import InvalidOptionError, TransportUnavailableError
from jaxcomm.transports.base import Transport
from jaxcomm.transports.local import Local

log = logging.getLogger(__name__)

STAGING_VARIABLE = "JAXCOMM_STAGING_BYTES"
SHARED_MEMORY_VARIABLE = "JAXCOMM_SHARED_MEMORY"
OWN_THREAD_VARIABLE = "JAXCOMM_OWN_THREAD"
TRANSPORTS = ("auto", "local", "mpi", "mpi4jax", "nccl", "xla")
DEFAULT_TIMEOUT = 600.0
STAGING_BYTES = 8 << 20
_MIN_STAGING = 4096

_lock = threading.RLock()
_world: Communicator | None = None
_connected: dict[int, Communicator] = {}

Groups = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class _MpiComms:
    data: Any
    control: Any
    host: Any
    channel: HostChannel


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What `init` was given and found; the same on every rank, subgroups included."""

    timeout: float = DEFAULT_TIMEOUT
    staging_bytes: int = STAGING_BYTES
    costs: CostModel = costmodel.DEFAULT
    shared_memory: bool = True


class Communicator:
    """A group of ranks, numbered from 0. Hashable, and equal on every rank.

    Attributes:
      rank: this process's number, 0 <= rank < size.
      size: number of ranks.
      local_rank: number among the ranks on this host.
      local_size: number of ranks on this host.
      transport: "local", "mpi" or "mpi4jax".
      timeout: seconds that the schedule check waits for the other ranks.
      staging_bytes: size of the buffer that small leaves share.
      topology: what a profile of `jaxcomm tune` holds for; "" without MPI.
      costs: the cost model that plans are made with.
      shared_memory: whether reductions go through memory that the ranks share, as
        they do where all are on one host (and JAXCOMM_SHARED_MEMORY is not "off").
    """

    def __init__(
        self,
        lineage: str,
        transport: str,
        settings: _Settings,
        comm: Any | None = None,
    ):
        self.transport = transport
        self.timeout = settings.timeout
        self.staging_bytes = settings.staging_bytes
        self.topology = ""
        self.costs = settings.costs
        self.shared_memory = settings.shared_memory
        self.lineage = lineage
        # The key stands in compiled programs, so it must be equal on all ranks.
        digest = hashlib.sha256(lineage.encode()).digest()
        self.key = int.from_bytes(digest[:8], "big") >> 1
        self.rank, self.size = 0, 1
        self.local_rank, self.local_size = 0, 1
        self._subgroups: dict[tuple[int, ...], Communicator | None] = {}
        self._comms: _MpiComms | None = None
        self._others: list[Any] = []
        self._windows: list[Any] = []
        self._own_thread = False
        self.lowering: Transport = Local()
        if comm is not None:
            self._connect(comm)

    def _connect(self, comm: Any) -> None:
        from mpi4py import MPI

        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        node = comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank, self.local_size = node.Get_rank(), node.Get_size()
        node.Free()
        host = comm.Dup()
        self._comms = _MpiComms(comm.Dup(), comm.Dup(), host, HostChannel(host))
        # An MPI failure becomes a Python exception, never MPI_Abort.
        self._comms.data.Set_errhandler(MPI.ERRORS_RETURN)
        if self.lineage == "world":
            self._find_settings()
        one_host = 1 < self.size == self.local_size
        self.shared_memory &= one_host and self.transport == "mpi"
        # Where calls wait for a network, XLA's threads have better things to do.
        default = "off" if self.size == self.local_size else "on"
        self._own_thread = os.environ.get(OWN_THREAD_VARIABLE, default) == "on"
        self._create_native(self.key, self._comms.data, self.costs.segment_bytes)
        agreement.connect(self.key, HostChannel(self._comms.control), self.timeout)
        _connected[self.key] = self
        if self.transport == "mpi4jax":
            from jaxcomm.transports.mpi4jax import Mpi4jax

            self.lowering = Mpi4jax(self._comms.data)
        else:
            from jaxcomm.transports.mpi import Mpi

            self.lowering = Mpi()

    def _find_settings(self) -> None:
        """Read the profile on rank 0 and give it to all, so that all plan alike."""
        from mpi4py import MPI

        assert self._comms is not None
        library = MPI.Get_library_version().splitlines()[0].strip(" \0")
        local_sizes = self.all_gather_object(self.local_size)
        self.topology = costmodel.topology(self.transport, library, local_sizes)
        found: tuple[Any, ...] = ()
        if self.rank == 0:
            try:
                costs = costmodel.find_profile(
                    self.topology,
                    costmodel.DEFAULT
                    if self.size == self.local_size
                    else costmodel.BETWEEN_HOSTS,
                )
                shared = os.environ.get(SHARED_MEMORY_VARIABLE, "on") != "off"
                found = (costs, self.staging_bytes, shared, "")
            except InvalidOptionError as error:
                found = (None, None, None, str(error))
        settings = self.broadcast_object(found)
        self.costs, self.staging_bytes, self.shared_memory, failure = settings
        if failure:
            raise InvalidOptionError(failure)
        if not self.costs.source.startswith("default") and self.rank == 0:
            log.info("plans follow the profile %s", self.costs.source)

    def subgroup(self, ranks: Sequence[int]) -> Communicator | None:
        """Return the communicator of some of this one's ranks.

        Every member must call it, in the same order as its other subgroups; other
        ranks may. Asking again for the same ranks returns the same communicator.

        Args:
          ranks: distinct ranks of this communicator; their order numbers the new
            ranks.

        Returns:
          The communicator, or None on a rank that is not a member.

        Raises:
          InvalidOptionError: ranks are empty, repeated or out of range.
        """
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
        comm = None
        if self._comms is not None:
            # Blocking calls of MPI itself: nothing else of ours may run beside them.
            _wait_for_pending_work()
            group = self._comms.host.Get_group().Incl(list(members))
            comm = self._comms.host.Create_group(group)
        settings = _Settings(self.timeout, self.staging_bytes, self.costs)
        return Communicator(lineage, self.transport, settings, comm)

    def partition(self, groups: Groups) -> int:
        """Return the key of this rank's subgroup in a division of all ranks.

        The same on every rank. Nothing is created: the native library asks for that
        when a collective first needs it, and then all ranks are there.
        """
        text = f"{self.lineage}|{json.dumps(groups)}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def create_partition(self, key: int, groups: Sequence[Sequence[int]]) -> None:
        """Create the native communicator of this rank's subgroup; on XLA's thread."""
        assert self._comms is not None
        control = self._comms.control
        members = next(group for group in groups if self.rank in group)
        # All members are here, and other threads hold the turn for moments only.
        with self._comms.channel.turn():
            part = control.Create_group(control.Get_group().Incl(list(members)))
            self._others.append(part)
            self._create_native(key, part, self.costs.segment_bytes)

    def barrier(self) -> None:
        """Wait until every rank is here (host side; not for use inside jit)."""
        if self._comms is not None:
            self._comms.channel.barrier()

    def broadcast_object(self, obj: Any, root: int = 0) -> Any:
        """Return the root's picklable Python object on every rank."""
        if not 0 <= root < self.size:
            raise InvalidOptionError(f"root={root}; give a rank below {self.size}")
        return obj if self._comms is None else self._comms.channel.broadcast(obj, root)

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Return every rank's picklable Python object, in rank order."""
        return [obj] if self._comms is None else self._comms.channel.all_gather(obj)

    def duplicate(self, segment_bytes: int) -> int:
        """Return the key of a native communicator of the same ranks, for measuring.

        It differs in how large leaves are divided. All ranks call it together.
        """
        assert self._comms is not None
        number = len(self._others)
        digest = hashlib.sha256(f"{self.lineage}#{number}".encode()).digest()
        key = int.from_bytes(digest[:8], "big") >> 1
        data = self._comms.host.Dup()
        self._others.append(data)
        self._create_native(key, data, segment_bytes)
        return key

    def _create_native(self, key: int, comm: Any, segment_bytes: int) -> None:
        native.create_communicator(
            key,
            comm,
            staging_bytes=self.staging_bytes,
            segment_bytes=segment_bytes,
            own_thread=self._own_thread,
        )
        if self.shared_memory:
            window = SharedWindow(comm, min(self.staging_bytes, 3 * segment_bytes))
            self._windows.append(window)
            if window.addresses:
                native.share_memory(
                    key, window.addresses, window.nbytes, crowded=window.crowded
                )
            else:
                self.shared_memory = False
                log.info("reductions go through MPI: %s", window.failure)

    def counters(self) -> dict[str, int]:
        """Return what the native library counted on this communicator.

        `calls` are custom calls, `mpi_all_reduce` and `mpi_broadcast` the MPI calls
        they made, `segments` what went through shared memory instead, `moved` the
        leaves gathered, scattered, exchanged or permuted, `bytes` the payload, and
        `agreements` the schedule checks: the only control messages there are. Empty
        without MPI.
        """
        return {} if self._comms is None else native.counters(self.key)

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


def init(
    transport: str = "auto",
    *,
    timeout: float | None = None,
    staging_bytes: int | None = None,
) -> Communicator:
    """Connect this process to the other ranks; the first use of anything does it too.

    Args:
      transport: "auto" takes MPI when the process was launched as one of several
        ranks, else "local"; "local", "mpi" and "mpi4jax" insist. "nccl" and "xla"
        are refused in this version, with the reason.
      timeout: seconds that the one-time schedule check waits for the other ranks
        before it raises StallError; 600 unless given.
      staging_bytes: size of the buffer that small leaves share, per communicator; 8 MiB
        or JAXCOMM_STAGING_BYTES unless given. Rank 0's value holds for all.

    Returns:
      The communicator of all ranks; the same object at every call.

    Raises:
      TransportUnavailableError: what was asked for cannot be used; says why.
      InvalidOptionError: the transport is unknown, or `init` was called before with
        other arguments.
    """
    global _world
    if transport not in TRANSPORTS:
        raise InvalidOptionError(
            f"transport={transport!r}; use one of {', '.join(TRANSPORTS)}"
        )
    if timeout is not None and not timeout > 0:
        raise InvalidOptionError(
            f"timeout={timeout!r}; give a positive time in seconds"
        )
    with _lock:
        if _world is None:
            settings = _Settings(
                timeout or DEFAULT_TIMEOUT, _staging_bytes(staging_bytes)
            )
            _world = _start(transport, settings)
            log.debug("%r", _world)
        elif transport not in ("auto", _world.transport):
            raise InvalidOptionError(
                f"init(transport={transport!r}), but this process already uses "
                f"{_world.transport!r}; call init once, before anything else of jaxcomm"
            )
        elif timeout not in (None, _world.timeout):
            raise InvalidOptionError(
                f"init(timeout={timeout}), but it was set to {_world.timeout} before; "
                "call init once, before anything else of jaxcomm"
            )
        elif staging_bytes not in (None, _world.staging_bytes):
            raise InvalidOptionError(
                f"init(staging_bytes={staging_bytes}), but it was set to "
                f"{_world.staging_bytes} before; call init once, before anything else "
                "of jaxcomm"
            )
        return _world


def world() -> Communicator:
    """Return the communicator of all ranks; initialise if need be."""
    return _world if _world is not None else init()


def rank() -> int:
    """Return this process's rank, a plain int, constant while tracing."""
    return world().rank


def size() -> int:
    """Return the number of ranks, a plain int, constant while tracing."""
    return world().size


def local_rank() -> int:
    """Return this process's rank among those on the same host."""
    return world().local_rank


def local_size() -> int:
    """Return the number of ranks on this host."""
    return world().local_size


def launched_ranks() -> int:
    """Return how many ranks the launcher's environment speaks of; 1 without one.

    Open MPI, PMIx and Hydra (MPICH, Intel MPI) set their own variables. Slurm's
    stand in every batch script too, and count only inside a step, that is under
    srun.
    """
    names = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS"]
    if "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ:
        names.append("SLURM_STEP_NUM_TASKS")
    found = [os.environ.get(name, "") for name in names]
    return max([int(text) for text in found if text.isdigit()], default=1)


def _staging_bytes(given: int | None) -> int:
    text = str(STAGING_BYTES if given is None else given)
    name = "init(staging_bytes=...)"
    if given is None and STAGING_VARIABLE in os.environ:
        text, name = os.environ[STAGING_VARIABLE], STAGING_VARIABLE
    if not text.isdigit() or int(text) < _MIN_STAGING:
        raise InvalidOptionError(
            f"{name}: {text!r}; give a number of bytes, at least {_MIN_STAGING}"
        )
    return int(text) // 16 * 16  # whole elements of every dtype


def _start(transport: str, settings: _Settings) -> Communicator:
    launched = launched_ranks()
    if transport == "auto":
        mpi_ready = "mpi4py.MPI" in sys.modules and _mpi_size() > 1
        transport = "mpi" if launched > 1 or mpi_ready else "local"
    if transport == "local":
        return Communicator("world", "local", settings)
    if transport in ("nccl", "xla"):
        importlib.import_module(f"jaxcomm.transports.{transport}").connect()

    mpi = _import_mpi(transport, launched)
    if launched > 1 and mpi.COMM_WORLD.Get_size() == 1:
        raise TransportUnavailableError(
            f"the launcher started {launched} ranks, but each of them is alone in its "
            "MPI world: the launcher and the MPI library that mpi4py loads do not "
            "match. Use the mpiexec of that library (`jaxcomm doctor` shows both); "
            "under Slurm try `srun --mpi=pmix`."
        )
    native.load()
    native.bind_mpi(mpi)
    native.set_agree(agreement.answer)
    native.set_partition(_answer_partition)
    comm = Communicator("world", transport, settings, mpi.COMM_WORLD)
    if comm.size > 1:
        from jaxcomm.launch import abort

        abort.install_excepthook()
    if timeline.wanted():
        native.timeline_start()
        atexit.register(_write_timeline, comm)
    atexit.register(_wait_for_pending_work)  # runs first
    return comm


def _answer_partition(key: int, partition: int, groups: list[list[int]]) -> str | None:
    try:
        _connected[key].create_partition(partition, groups)
    except Exception as error:  # nothing may escape into C
        return f"the subgroups {groups} could not be created: {error}"
    return None


def _import_mpi(transport: str, launched: int) -> Any:
    remedy = (
        "Install it with `pip install 'jaxcomm[mpi]'`, or mpi4py against your "
        "cluster's MPI; `jaxcomm doctor` shows what is found."
    )
    why = f"transport {transport!r}"
    if launched > 1:
        why += f" (this process is one of {launched} ranks)"
    if importlib.util.find_spec("mpi4py") is None:
        raise TransportUnavailableError(
            f"{why} needs mpi4py, which is missing. {remedy}"
        )
    try:
        from mpi4py import MPI
    except Exception as error:  # RuntimeError or ImportError: no usable libmpi
        raise TransportUnavailableError(
            f"{why}: mpi4py found no usable MPI library: {error}. {remedy}"
        ) from error
    if not MPI.Is_initialized() or MPI.Is_finalized():
        raise TransportUnavailableError(
            f"{why}: MPI is not initialised, or already finalised; leave mpi4py's "
            "automatic initialisation on, or call MPI.Init_thread() before jaxcomm"
        )
    least, name = MPI.THREAD_SERIALIZED, "MPI_THREAD_SERIALIZED"
    if transport == "mpi4jax":  # its calls cannot take turns
        least, name = MPI.THREAD_MULTIPLE, "MPI_THREAD_MULTIPLE"
    if MPI.Query_thread() < least:
        raise TransportUnavailableError(
            f"{why}: MPI runs with a thread level below {name}, and the custom calls "
            "run on XLA's threads. Leave mpi4py.rc.thread_level at 'multiple', and "
            "check that the MPI library was built with threads."
        )
    return MPI


def _mpi_size() -> int:
    from mpi4py import MPI

    ready = MPI.Is_initialized() and not MPI.Is_finalized()
    return MPI.COMM_WORLD.Get_size() if ready else 1


def _write_timeline(comm: Communicator) -> None:
    events = comm.all_gather_object(native.timeline_take())
    if comm.rank == 0:
        timeline.write(events)


def _wait_for_pending_work() -> None:
    # MPI_Finalize must not run beside a custom call. A CPU device runs its programs
    # in the order of their dispatch, so when a new one is done, all are.
    jax.effects_barrier()
    jax.block_until_ready(jnp.zeros(()) + 1)
