"""What Python and the library must agree on.

Python knows these before there is a library: they are compared when it is loaded
(`library.constants`). All else that both need is read from it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

# Raised with every change of a C function's parameters or of what they mean, together
# with kAbi in core/api.h.
ABI = 2
# In the order of the enumerations of core/types.h.
DTYPES = (
    "float32",
    "float64",
    "bfloat16",
    "float16",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
    "complex64",
    "complex128",
)
OPS = ("sum", "min", "max", "prod")
MOVES = ("all_gather", "reduce_scatter", "all_to_all", "permute")
ALGORITHMS = ("ring", "pairwise", "doubling")
# Order and values of nccl.h.
NCCL_OPS = {"sum": 0, "prod": 1, "max": 2, "min": 3, "avg": 4}
# Bits of a call's bucket; above them is its site (core/callbacks.h).
PLACE_BITS = 32
# The exit code of a job that ranks cannot finish.
STALLED = 70


class MpiHandles(ctypes.Structure):
    """The handles of an MPI library (mpi/mpi_binding.h)."""

    _fields_ = (
        ("dtype", ctypes.c_uint64 * len(DTYPES)),
        ("byte", ctypes.c_uint64),
        ("op", ctypes.c_uint64 * len(OPS)),
        ("in_place", ctypes.c_uint64),
        ("serialized", ctypes.c_uint64),
    )


class Where(ctypes.Structure):
    """Where a rank is in its program (core/callbacks.h)."""

    _fields_ = (("schedule", ctypes.c_int64), ("bucket", ctypes.c_int64))


# A row of the timeline (core/timeline.h).
Event = ctypes.c_int64 * 6


def differences(found: Mapping[str, int]) -> list[str]:
    """Return in words how a library's constants differ from Python's.

    Args:
      found: the library's, by their names in core/constants.cc.
    """
    own = {
        "abi": ABI,
        "place_bits": PLACE_BITS,
        "exit.stalled": STALLED,
        "sizeof.MpiHandles": ctypes.sizeof(MpiHandles),
        "sizeof.Where": ctypes.sizeof(Where),
        "sizeof.Event": ctypes.sizeof(Event),
        **{f"nccl_op.{name}": value for name, value in NCCL_OPS.items()},
    }
    groups = {"dtype": DTYPES, "op": OPS, "move": MOVES, "algorithm": ALGORITHMS}
    for group, names in groups.items():
        own.update({f"{group}.{name}": k for k, name in enumerate(names)})
    # A member that only the library has makes a difference too.
    compared = {name.partition(".")[0] for name in own if "sizeof" not in name}
    names = dict.fromkeys([*own, *found])
    return [
        f"{name} is {found.get(name, 'unknown')} in the library and "
        f"{own.get(name, 'unknown')} in Python"
        for name in names
        if (name in own or name.partition(".")[0] in compared)
        and found.get(name) != own.get(name)
    ]
