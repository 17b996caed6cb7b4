"""JAX's own view of the job: `jax.distributed`, over addresses that MPI exchanged.

Without it each rank's JAX believes to be alone: `process_index()` is 0 and
`device_count()` 1 everywhere. It must start before JAX's backend does, on all ranks or
on none, so the ranks first tell each other what they found.

JAX's coordination service runs beside rank 0 (`coordination`), so that no rank's end is
another's. What the ranks tell each other when they end or fail goes over MPI.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import ipaddress
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import psutil

from jaxcomm import compat
from jaxcomm.errors import InvalidOptionError
from jaxcomm.ranks import coordination
from jaxcomm.ranks.fabric import MpiFabric

log = logging.getLogger(__name__)

_LOOPBACK = "127.0.0.1"
_CONNECT_SECONDS = 60

LYING = (
    "jax.process_index(), process_count(), device_count() and devices(), and libraries "
    "that ask them (orbax, grain, tfds), answer as if each rank were alone"
)


@dataclasses.dataclass(frozen=True)
class _Found:
    """What one rank found before anything is decided."""

    mode: str
    backend: bool  # whether JAX has made its backend already
    known: tuple[int, int] | None  # jax.distributed's (process_id, num_processes)
    local_size: int
    interfaces: tuple[str, ...]  # this host's addresses, as "10.0.0.1/24"
    preset: str  # JAX_COORDINATOR_ADDRESS


class Service:
    """The process that runs JAX's coordination service; see `coordination`."""

    def __init__(self) -> None:
        # It outlives this rank, and what kills a job's process groups.
        self._process = subprocess.Popen(
            [sys.executable, "-P", coordination.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )

    def serve(self, address: str, ranks: int) -> None:
        """Listen on `address`, "host:port"; return when it does.

        Raises:
          OSError: it cannot.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{address} {ranks}\n")
        self._process.stdin.flush()
        if self._process.stdout.readline() != "ready\n":
            raise OSError(f"JAX's coordination service did not start on {address}")

    def close(self) -> None:
        """Let it end when the last rank has gone, which nobody waits for."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.returncode = 0  # else Popen warns that it still runs


def expected_service(mode: str) -> Service | None:
    """Start the service early, where the launcher says that this is rank 0."""
    names = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")
    rank = next((os.environ[name] for name in names if name in os.environ), "")
    wanted = mode == "on" and rank == "0" and not compat.backends_initialized()
    return Service() if wanted else None


def introduce(fabric: MpiFabric, mode: str, service: Service | None) -> Place | None:
    """Tell JAX which process of how many this is; all ranks call it.

    Args:
      fabric: all ranks.
      mode: one of `settings.DISTRIBUTED`; equal on all ranks.
      service: what `expected_service` has started.

    Returns:
      What is to be left at the end; None where JAX was not told.

    Raises:
      InvalidOptionError: the ranks have different modes; raised on all.
    """
    known = compat.distributed_client()
    found: list[_Found] = fabric.host.all_gather(
        _Found(
            mode,
            compat.backends_initialized(),
            known and (known.process_id, known.num_processes),
            fabric.local_size,
            tuple(_interfaces()),
            os.environ.get("JAX_COORDINATOR_ADDRESS", ""),
        )
    )
    if not _agreed(found, fabric.rank):
        if service is not None:
            service.close()
        return None
    address = _LOOPBACK
    if any(rank.local_size < fabric.size for rank in found):
        address = shared_address([rank.interfaces for rank in found])
    error = coordinator = ""
    if fabric.rank == 0:
        coordinator = found[0].preset
        # Kept until the service is bound to the same port, so nobody else takes it.
        with socket.socket() as reserved:
            try:
                if not coordinator:
                    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                    reserved.bind((address, 0))
                    coordinator = f"{address}:{reserved.getsockname()[1]}"
                service = service or Service()
                service.serve(coordinator, fabric.size)
            except OSError as caught:
                error = str(caught)
    coordinator, error = fabric.host.broadcast((coordinator, error), 0)
    errors = fabric.host.all_gather(error or _join(coordinator, fabric))
    place = Place(service)
    if any(errors):
        place.leave()
        first = next(rank for rank, error in enumerate(errors) if error)
        _say(
            fabric.rank,
            f"rank {first} could not join jax.distributed ({errors[first]})",
            "JAX_COORDINATOR_ADDRESS=host:port says where rank 0 can be reached",
        )
    return None if any(errors) else place


class Place:
    """JAX's among the ranks."""

    def __init__(self, service: Service | None):
        # Held: its pipe tells the service that rank 0 is still there.
        self._service = service

    def leave(self) -> None:
        """Leave jax.distributed, without waiting for others: MPI_Finalize does."""
        compat.leave_distributed()
        if self._service is not None:
            self._service.close()


@functools.cache
def check_known(rank: int, size: int) -> None:
    """Warn, once, where JAX believes to be alone and is not."""
    if size > 1 and compat.process_count() == 1 and rank == 0:
        log.warning(
            "This job has %d ranks, and JAX believes to be alone: %s. Use "
            "jaxcomm.rank() and jaxcomm.size() instead, or call jaxcomm.init() before "
            "anything else of JAX and without distributed=False.",
            size,
            LYING,
        )


def shared_address(interfaces: Sequence[Sequence[str]]) -> str:
    """Choose the address of rank 0 that the others can reach.

    Args:
      interfaces: for each rank its host's addresses, as "10.0.0.1/24".

    Returns:
      The one in whose network most ranks have an address of their own.
    """
    own = [ipaddress.ip_interface(text) for text in interfaces[0]]
    if not own:
        return socket.gethostbyname(socket.gethostname())

    def reaches(candidate: Any) -> int:
        return sum(
            any(ipaddress.ip_interface(text).ip in candidate.network for text in rank)
            for rank in interfaces
        )

    return str(max(own, key=reaches).ip)


def _interfaces() -> Iterator[str]:
    """Yield this host's IPv4 addresses, but not the loopback's."""
    up = psutil.net_if_stats()
    for name, addresses in psutil.net_if_addrs().items():
        for a in addresses:
            if a.family != socket.AF_INET or not a.netmask:
                continue
            if ipaddress.ip_address(a.address).is_loopback or not up[name].isup:
                continue
            yield f"{a.address}/{a.netmask}"


def _agreed(found: Sequence[_Found], rank: int) -> bool:
    """Tell whether jax.distributed is to be started; say why not where it should be."""
    modes = [each.mode for each in found]
    if len(set(modes)) > 1:
        raise InvalidOptionError(
            f"init(distributed=...) or JAXCOMM_DISTRIBUTED differs between ranks: "
            f"{modes}; give all the same"
        )
    if modes[0] == "off" or len(found) == 1:
        return False
    right = [each.known == (k, len(found)) for k, each in enumerate(found)]
    if all(right):
        return False
    started = [k for k, each in enumerate(found) if each.known]
    if started:
        # The first rank that is not as it should be.
        k = right.index(False)
        _say(
            rank,
            "jax.distributed was initialised before jaxcomm.init(), and "
            + (
                "rank {} is process {} of {} there".format(k, *known)
                if (known := found[k].known)
                else f"not on rank {k}"
            ),
            "leave that to jaxcomm.init(), or give it the ranks' own numbers",
        )
        return False
    running = [k for k, each in enumerate(found) if each.backend]
    if running:
        _say(
            rank,
            f"JAX was already running on rank {running[0]} when jaxcomm.init() was "
            "called",
            "call jaxcomm.init() before the first use of JAX's arrays or devices",
        )
    return not running


def _say(rank: int, why: str, remedy: str) -> None:
    if rank == 0:
        log.warning(
            "JAX does not know its place among the ranks: %s. %s. To change that, %s; "
            "JAXCOMM_DISTRIBUTED=off leaves it so on purpose.",
            why,
            LYING,
            remedy,
        )


def _join(coordinator: str, fabric: MpiFabric) -> str:
    """Connect JAX to the service and make its backends; return what went wrong."""
    try:
        with _without_proxies():
            compat.join_distributed(
                coordinator, fabric.rank, fabric.size, _CONNECT_SECONDS
            )
            with compat.gloo_listens_on(_source(coordinator.rpartition(":")[0])):
                compat.start_backends()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


def _source(host: str) -> str:
    """Return this host's address on the way to another; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((host, 9))
        return way.getsockname()[0]


@contextlib.contextmanager
def _without_proxies() -> Generator[None]:
    """Hide proxies from gRPC, which would ask them for the ranks' own addresses."""
    kept = {k: v for k, v in os.environ.items() if k.lower().endswith("_proxy")}
    for name in kept:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(kept)
