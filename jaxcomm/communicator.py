"""Who the ranks are: `init`, communicators, subgroups and host-side objects.

What connects the processes on the host is a *fabric* (`_fabric`); what moves arrays is
a transport.
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
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomm import _compat, agreement, costmodel, native, timeline, watchdog
from jaxcomm._fabric import Alone, Fabric, KeyValueFabric, MpiFabric
from jaxcomm._window import SharedWindow
from jaxcomm.costmodel import CostModel
from jaxcomm.errors import InvalidOptionError, TransportUnavailableError
from jaxcomm.transports.base import Transport
from jaxcomm.transports.local import Local

log = logging.getLogger(__name__)

STAGING_VARIABLE = "JAXCOMM_STAGING_BYTES"
SHARED_MEMORY_VARIABLE = "JAXCOMM_SHARED_MEMORY"
OWN_THREAD_VARIABLE = "JAXCOMM_OWN_THREAD"
CHECK_VARIABLE = "JAXCOMM_CHECK"
CHECKS = ("once", "every")
TRANSPORTS = ("auto", "local", "mpi", "mpi4jax", "nccl", "xla")
DEFAULT_TIMEOUT = 600.0
STAGING_BYTES = 8 << 20
_MIN_STAGING = 4096

_lock = threading.RLock()
_world: Communicator | None = None
_forked = False
_at_exit: list[Callable[[], None]] = []
_connected: dict[int, Communicator] = {}

Groups = Sequence[Sequence[int]]


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
      transport: "local", "mpi", "mpi4jax" or "nccl".
      timeout: seconds that the schedule check waits for the other ranks.
      staging_bytes: size of the buffer that small leaves share.
      topology: what a profile of `jaxcomm tune` holds for; "" without MPI.
      costs: the cost model that plans are made with.
      shared_memory: whether reductions go through memory that the ranks share, as
        they do where all are on one host (and JAXCOMM_SHARED_MEMORY is not "off").
    """

    def __init__(
        self, lineage: str, transport: str, settings: _Settings, fabric: Fabric
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
        self.rank, self.size = fabric.rank, fabric.size
        self.local_rank, self.local_size = fabric.local_rank, fabric.local_size
        self._fabric = fabric
        self._subgroups: dict[tuple[int, ...], Communicator | None] = {}
        self._others: list[Any] = []
        self._windows: list[Any] = []
        self._own_thread = False
        self.lowering: Transport = Local()
        if transport != "local":
            self._connect()

    def _connect(self) -> None:
        if self.lineage == "world":
            self._find_settings()
        one_host = 1 < self.size == self.local_size
        self.shared_memory &= one_host and self.transport == "mpi"
        if self.transport == "nccl":
            from jaxcomm.transports import nccl

            nccl.join(self.key, self._fabric, self.timeout)
            self.lowering = nccl.Nccl()
        else:
            # Where calls wait for a network, XLA's threads have better things to do.
            default = "off" if self.size == self.local_size else "on"
            self._own_thread = os.environ.get(OWN_THREAD_VARIABLE, default) == "on"
            self._create_native(self.key, self._mpi.data, self.costs.segment_bytes)
            self.lowering = _lowering(self.transport, self._mpi.data)
        agreement.connect(self.key, self._fabric.check, self.timeout)
        _connected[self.key] = self

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
                shared = os.environ.get(SHARED_MEMORY_VARIABLE, "on") != "off"
                every = _check_every()
                found = (costs.to_json(), self.staging_bytes, shared, every, "")
            except InvalidOptionError as error:
                found = (None, None, None, None, str(error))
        costs, self.staging_bytes, self.shared_memory, every, failure = (
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
        ranks may. Asking again for the same ranks returns the same communicator. One
        thread at a time may use a communicator: give each its own.

        Args:
          ranks: distinct ranks of this communicator; their order numbers the new
            ranks.

        Returns:
          The communicator, or None on a rank that is not a member.

        Raises:
          InvalidOptionError: ranks are empty, repeated or out of range.
          ScheduleMismatchError: members give different ranks (over MPI).
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
        # Blocking calls: nothing else of ours may run beside them.
        _wait_for_pending_work()
        fabric = self._fabric.subgroup(members, lineage)
        settings = _Settings(self.timeout, self.staging_bytes, self.costs)
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


def init(
    transport: str = "auto",
    *,
    timeout: float | None = None,
    staging_bytes: int | None = None,
    warn_after: float | None = None,
    abort_after: float | None = None,
) -> Communicator:
    """Connect this process to the other ranks; the first use of anything does it too.

    Args:
      transport: "auto" takes, when the process was launched as one of several ranks,
        NCCL if JAX runs on a GPU and MPI if not; else "local". "local", "mpi",
        "mpi4jax" and "nccl" insist. Under "nccl" the processes find each other by
        jax.distributed where it is initialised, else by MPI. "xla" is refused in this
        version, with the reason.
      timeout: seconds that the one-time schedule check waits for the other ranks
        before it raises StallError; 600 unless given.
      staging_bytes: size of the buffer that small leaves share, per communicator; 8 MiB
        or JAXCOMM_STAGING_BYTES unless given. Rank 0's value holds for all.
      warn_after: seconds after which a rank that waits in a collective over MPI says
        so in the log; JAXCOMM_WARN_AFTER or 60 unless given, 0 for never.
      abort_after: seconds after which the job ends, with a report of which ranks wait
        in which bucket, which have not come and where their Python is, and which do
        not answer; JAXCOMM_ABORT_AFTER or 600 unless given, 0 for never. Where both
        are 0, which all ranks must say alike, nothing watches.

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
        if _forked:
            raise TransportUnavailableError(
                "this process was forked from one that uses jaxcomm; it has no MPI "
                "and no rank of its own. Reduce in the parent, or start processes that "
                "do with multiprocessing's 'spawn' or 'forkserver'."
            )
        if _world is None:
            settings = _Settings(
                timeout or DEFAULT_TIMEOUT, _staging_bytes(staging_bytes)
            )
            limits = (
                _seconds("warn_after", warn_after, watchdog.WARN_AFTER),
                _seconds("abort_after", abort_after, watchdog.ABORT_AFTER),
            )
            _world = _start(transport, settings, limits)
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


def _check_every() -> bool:
    check = os.environ.get(CHECK_VARIABLE, "once")
    if check not in CHECKS:
        raise InvalidOptionError(
            f"{CHECK_VARIABLE}: {check!r}; give 'once' to compare every schedule "
            "across ranks when it first runs, or 'every' for every call, to debug"
        )
    return check == "every"


def _seconds(name: str, given: float | None, default: float) -> float:
    variable = f"JAXCOMM_{name.upper()}"
    value: Any = os.environ.get(variable, default) if given is None else given
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if not seconds >= 0:
        where = variable if given is None else f"init({name}=...)"
        raise InvalidOptionError(
            f"{where}: {value!r}; give a time in seconds, or 0 for never"
        )
    return seconds


def _start(
    transport: str, settings: _Settings, limits: tuple[float, float]
) -> Communicator:
    launched = launched_ranks()
    if transport == "auto":
        transport = _automatic(launched, settings)
    if transport == "local":
        return Communicator("world", "local", settings, Alone())
    if transport == "xla":
        importlib.import_module("jaxcomm.transports.xla").connect()
    late = (
        f"jaxcomm: this process (host {socket.gethostname()}) has waited "
        f"{limits[1]:g} s in init for the other ranks, so the job ends: one of them "
        "has not started, was stopped, or is stuck before init. JAXCOMM_ABORT_AFTER "
        "sets the time.\n"
    )
    with native.deadline(limits[1], late, watchdog.STALLED):
        return _connect(transport, launched, settings, limits)


def _connect(
    transport: str, launched: int, settings: _Settings, limits: tuple[float, float]
) -> Communicator:
    fabric = _fabric(transport, launched, settings)
    native.set_agree(agreement.answer, agreement.differ)
    native.set_partition(_answer_partition)
    if transport == "nccl":
        importlib.import_module("jaxcomm.transports.nccl").prepare(fabric)
    else:
        native.bind_mpi(sys.modules["mpi4py.MPI"])
    comm = Communicator("world", transport, settings, fabric)
    if comm.size > 1:
        from jaxcomm.launch import abort

        abort.install_excepthook()
    if timeline.wanted():
        native.timeline_start()
        atexit.register(_write_timeline, comm)
    if comm.size > 1 and isinstance(fabric, MpiFabric) and any(limits):
        watch = watchdog.Watchdog(fabric.duplicate(), fabric.host, *limits)
        atexit.register(watch.stop)
        _at_exit.append(watch.stop)
    atexit.register(_wait_for_pending_work)  # runs first
    os.register_at_fork(after_in_child=_leave_to_parent)
    return comm


def _leave_to_parent() -> None:
    """In a forked process: neither MPI nor XLA's threads are its own."""
    global _world, _forked
    _world, _forked = None, True
    for call in (_wait_for_pending_work, _write_timeline, *_at_exit):
        atexit.unregister(call)


def _automatic(launched: int, settings: _Settings) -> str:
    """Choose a transport: NCCL on GPUs, MPI elsewhere, none for one rank."""
    mpi_ready = "mpi4py.MPI" in sys.modules and _mpi_size() > 1
    distributed = _compat.distributed_client()
    several = launched > 1 or mpi_ready
    several |= distributed is not None and distributed.num_processes > 1
    if several and jax.default_backend() == "gpu":
        return "nccl"
    return "mpi" if launched > 1 or mpi_ready else "local"


def _fabric(transport: str, launched: int, settings: _Settings) -> Fabric:
    """Connect the processes: over MPI, or for NCCL also by jax.distributed or alone."""
    if transport == "nccl":
        fabric = KeyValueFabric.world(settings.timeout)
        if fabric is not None:
            return fabric
        if launched == 1 and "mpi4py.MPI" not in sys.modules:
            return Alone()
    mpi = _import_mpi(transport, launched)
    if launched > 1 and mpi.COMM_WORLD.Get_size() == 1:
        raise TransportUnavailableError(
            f"the launcher started {launched} ranks, but each of them is alone in its "
            "MPI world: the launcher and the MPI library that mpi4py loads do not "
            "match. Use the mpiexec of that library (`jaxcomm doctor` shows both); "
            "under Slurm try `srun --mpi=pmix`, or on GPUs call "
            "jax.distributed.initialize() before jaxcomm.init()."
        )
    return MpiFabric(mpi.COMM_WORLD, settings.timeout)


def _lowering(transport: str, data: Any) -> Transport:
    if transport == "mpi4jax":
        from jaxcomm.transports.mpi4jax import Mpi4jax

        return Mpi4jax(data)
    from jaxcomm.transports.mpi import Mpi

    return Mpi()


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
