"""Communicators as the handlers know them, over MPI and in memory of one host."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxcomm.native.library import call, constants, load, names
from jaxcomm.native.mpi import handle

if TYPE_CHECKING:
    from mpi4py import MPI


def create_communicator(
    key: int,
    comm: MPI.Comm,
    *,
    staging_bytes: int,
    segment_bytes: int,
    own_thread: bool,
    ring: bool,
) -> None:
    """Make MPI communicator `comm` known to the handlers under `key`.

    With `own_thread`, in which ranks may differ, calls that wait for other ranks do so
    on a thread of the communicator's own. With `ring`, large leaves go around a ring.
    """
    from mpi4py import MPI

    call(
        load().jaxcomm_create_communicator,
        key,
        handle(MPI, comm),
        comm.Get_rank(),
        comm.Get_size(),
        staging_bytes,
        segment_bytes,
        own_thread,
        ring,
    )


def window_bytes(budget: int) -> int:
    """Return the size of a rank's window whose slots take at most `budget` bytes.

    It is for `share_memory`.
    """
    found = constants()
    slots, most = found["window.slots"], found["window.max_slot_bytes"]
    return found["window.control_bytes"] + slots * min(budget // slots, most)


def tiers_window_bytes(budget: int, segment_bytes: int) -> int:
    """Return the same for `join_hosts`, with slots for segments of at most a size."""
    found = constants()
    slots = found["tiers.slots"]
    slot = min(budget // slots, segment_bytes, found["tiers.max_slot_bytes"])
    return found["tiers.control_bytes"] + slots * slot


def share_memory(
    key: int, windows: Sequence[int], nbytes: int, *, crowded: bool
) -> None:
    """Let the ranks of communicator `key` reduce through memory they share.

    Args:
      key: a communicator whose ranks are all on this host.
      windows: addresses of all ranks' zero-filled windows, in rank order; none of them
        to let the ranks make MPI calls again.
      nbytes: size of a window.
      crowded: whether there are more ranks than cores.
    """
    call(
        load().jaxcomm_share_memory,
        key,
        (ctypes.c_void_p * len(windows))(*windows) if windows else None,
        nbytes,
        crowded,
    )


def join_hosts(
    key: int, hosts: Sequence[int], windows: Sequence[int], nbytes: int
) -> None:
    """Let the ranks of communicator `key`, on several hosts, reduce in two tiers.

    Args:
      key: a communicator whose ranks are on several hosts.
      hosts: every rank's host, numbered in the order of their first ranks.
      windows: addresses of the zero-filled windows of this host's ranks, in rank order;
        none of them to let the ranks go one way all together again.
      nbytes: size of a window.
    """
    call(
        load().jaxcomm_join_hosts,
        key,
        (ctypes.c_int * len(hosts))(*hosts),
        (ctypes.c_void_p * len(windows))(*windows) if windows else None,
        len(windows),
        nbytes,
    )


def refuse(key: int, text: str) -> None:
    """Let every call of a communicator fail from now on, with a text."""
    load().jaxcomm_refuse(key, text.encode())


def counters(key: int) -> dict[str, int]:
    """Return the counters of a communicator: calls, MPI calls by kind, bytes."""
    columns = names("counter")
    out = (ctypes.c_int64 * len(columns))()
    load().jaxcomm_counters(key, out)
    return dict(zip(columns, out, strict=True))


def kernels() -> str:
    """Return the instruction set that was chosen: "baseline", "avx2" or "avx512"."""
    return load().jaxcomm_kernels().decode()


def all_reduce_array(key: int, data: Any, pack_bytes: int) -> None:
    """Average a float32 array in place, as a bucket's call does; for measuring."""
    call(load().jaxcomm_all_reduce_float, key, data.ctypes.data, data.size, pack_bytes)
