"""The native library, which holds the XLA FFI handlers (C ABI, through ctypes)."""

from __future__ import annotations

from jaxcomm.native.callbacks import check_every_call, set_agree, set_partition
from jaxcomm.native.communicators import (
    all_reduce_array,
    counters,
    create_communicator,
    join_hosts,
    kernels,
    refuse,
    share_memory,
    tiers_window_bytes,
    window_bytes,
)
from jaxcomm.native.constants import (
    ALGORITHMS,
    DTYPES,
    MOVES,
    OPS,
    PLACE_BITS,
    STALLED,
)
from jaxcomm.native.deadlines import deadline, deadline_at_end
from jaxcomm.native.library import library_path, load
from jaxcomm.native.mpi import (
    MPI_TYPES,
    bind_mpi,
    loaded_mpi_libraries,
    mpi_turn,
    op_handle,
)
from jaxcomm.native.reports import (
    Progress,
    bucket_of,
    dump_on_signal,
    hash_at,
    progress,
    stacks,
    timeline_start,
    timeline_take,
)

__all__ = [
    "ALGORITHMS",
    "DTYPES",
    "MOVES",
    "MPI_TYPES",
    "OPS",
    "PLACE_BITS",
    "STALLED",
    "Progress",
    "all_reduce_array",
    "bind_mpi",
    "bucket_of",
    "check_every_call",
    "counters",
    "create_communicator",
    "deadline",
    "deadline_at_end",
    "dump_on_signal",
    "hash_at",
    "join_hosts",
    "kernels",
    "library_path",
    "load",
    "loaded_mpi_libraries",
    "mpi_turn",
    "op_handle",
    "progress",
    "refuse",
    "set_agree",
    "set_partition",
    "share_memory",
    "stacks",
    "tiers_window_bytes",
    "timeline_start",
    "timeline_take",
    "window_bytes",
]
