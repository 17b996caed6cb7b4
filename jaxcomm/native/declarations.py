"""The C functions of the library, and what they take and return."""

from __future__ import annotations

from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_char_p,
    c_double,
    c_int,
    c_int64,
    c_uint64,
    c_void_p,
)
from typing import Any

from jaxcomm.native.constants import Event, MpiHandles, Where


class Constant(Structure):
    """A row of the table of constants (core/constants.cc)."""

    _fields_ = (("name", c_char_p), ("value", c_int64))


# What C asks Python (core/callbacks.h). Texts come as addresses, to be written to.
AGREE_FN = CFUNCTYPE(c_int, *[c_int64] * 4, c_void_p, c_int64)
DIFFER_FN = CFUNCTYPE(
    None, c_int64, POINTER(Where), c_int64, POINTER(Where), c_void_p, c_int64
)
PARTITION_FN = CFUNCTYPE(
    c_int, c_int64, c_int64, POINTER(c_int64), c_int64, c_void_p, c_int64
)

# Handlers of XLA's custom calls: of platform "cpu" over MPI and beside it, and of NCCL
# on a GPU, on a GPU for CUDA graphs, and on host memory.
HANDLERS = (
    "jaxcomm_mpi_all_reduce",
    "jaxcomm_mpi_broadcast",
    "jaxcomm_mpi_move",
    "jaxcomm_gate",
    "jaxcomm_mark",
    "jaxcomm_rank",
)
NCCL_HANDLERS = ("all_reduce", "broadcast", "move", "rank")
NCCL_RECORDED = ("all_reduce", "broadcast")
_NCCL_SYMBOLS = (
    *(f"jaxcomm_nccl_{name}" for name in NCCL_HANDLERS),
    *(f"jaxcomm_nccl_graph_{name}" for name in NCCL_RECORDED),
    *(f"jaxcomm_nccl_host_{name}" for name in NCCL_HANDLERS),
)

_INTS = POINTER(c_int64)
_ERROR = (c_char_p, c_int64)  # room for a text, and how much

# Of every function that Python calls: what it returns, and its parameters.
FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "jaxcomm_constants": (POINTER(Constant), ()),
    # Communicators over MPI (mpi/handlers.cc).
    "jaxcomm_open_mpi": (c_int, (c_char_p, c_int, POINTER(MpiHandles), *_ERROR)),
    "jaxcomm_create_communicator": (
        c_int,
        (c_int64, c_uint64, c_int, c_int, c_int64, c_int64, c_int, c_int, *_ERROR),
    ),
    "jaxcomm_share_memory": (
        c_int,
        (c_int64, POINTER(c_void_p), c_int64, c_int, *_ERROR),
    ),
    "jaxcomm_join_hosts": (
        c_int,
        (c_int64, POINTER(c_int), POINTER(c_void_p), c_int, c_int64, *_ERROR),
    ),
    "jaxcomm_op_handle": (c_uint64, (c_int, c_int)),
    "jaxcomm_kernels": (c_char_p, ()),
    "jaxcomm_lock_mpi": (None, ()),
    "jaxcomm_unlock_mpi": (None, ()),
    "jaxcomm_all_reduce_float": (
        c_int,
        (c_int64, c_void_p, c_int64, c_int64, *_ERROR),
    ),
    "jaxcomm_limit_pieces": (None, (c_int64, c_int64)),
    "jaxcomm_counters": (c_int, (c_int64, _INTS)),
    "jaxcomm_refuse": (None, (c_int64, c_char_p)),
    # What handlers ask (core/callbacks.h).
    "jaxcomm_set_agree": (None, (AGREE_FN, DIFFER_FN)),
    "jaxcomm_set_partition": (None, (PARTITION_FN,)),
    "jaxcomm_check_every_call": (None, (c_int,)),
    # What a process tells of itself (core/progress.cc, stacks.cc, timeline.h).
    "jaxcomm_progress": (c_int64, (_INTS, c_int64)),
    "jaxcomm_hash_at": (c_int, (c_int64, c_int64, _INTS)),
    "jaxcomm_native_stacks": (None, (c_double, c_char_p, c_int64)),
    "jaxcomm_unused_signal": (c_int, ()),
    "jaxcomm_dump_on_signal": (None, (c_int, c_char_p)),
    "jaxcomm_timeline_start": (None, ()),
    "jaxcomm_timeline_take": (c_int64, (POINTER(Event), c_int64)),
    # Its end (core/deadline.cc).
    "jaxcomm_set_deadline": (c_int, (c_double, c_char_p, c_int, *_ERROR)),
    "jaxcomm_lift_deadline": (None, ()),
    "jaxcomm_prepare_end": (c_int, (c_double, c_char_p, c_int, *_ERROR)),
    "jaxcomm_end": (None, ()),
    # Communicators over NCCL (nccl/nccl_handlers.cc).
    "jaxcomm_nccl_open": (c_int, (c_char_p, c_char_p, c_int, c_double, *_ERROR)),
    "jaxcomm_nccl_version": (c_int, ()),
    "jaxcomm_nccl_unique_id": (c_int, (c_char_p, *_ERROR)),
    "jaxcomm_nccl_join": (
        c_int,
        (c_int64, c_char_p, c_int, c_int, c_double, *_ERROR),
    ),
    "jaxcomm_nccl_split": (
        c_int,
        (c_int64, c_int64, c_int, c_int, c_int, c_double, *_ERROR),
    ),
    "jaxcomm_nccl_refuse": (None, (c_int64, c_char_p)),
    "jaxcomm_nccl_counters": (c_int, (c_int64, _INTS)),
    "jaxcomm_nccl_close": (None, (c_double,)),
    # For XLA to call: Python passes their addresses on.
    **dict.fromkeys((*HANDLERS, *_NCCL_SYMBOLS), (c_void_p, (c_void_p,))),
}
