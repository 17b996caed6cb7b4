"""Find, load and talk to the native library (C ABI, through ctypes).

The library holds the XLA FFI handlers. It is built without MPI; `bind_mpi` gives
it the entry points and handles of the MPI that mpi4py loaded into this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from jaxcomm.errors import TransportUnavailableError

if TYPE_CHECKING:
    from mpi4py import MPI

LIBRARY_NAME = "libjaxcomm_native.so"
# Another build of the library, such as one with sanitizers.
LIBRARY_VARIABLE = "JAXCOMM_NATIVE_LIBRARY"

# Order shared with core/types.h.
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
# Bits of a call's bucket; above them is its site (core/callbacks.h).
PLACE_BITS = 32
MOVES = ("all_gather", "reduce_scatter", "all_to_all", "permute")
HANDLERS = (
    "jaxcomm_mpi_all_reduce",
    "jaxcomm_mpi_broadcast",
    "jaxcomm_mpi_move",
    "jaxcomm_gate",
    "jaxcomm_mark",
    "jaxcomm_rank",
)
COUNTERS = (
    "calls",
    "nanoseconds",
    "mpi_all_reduce",
    "mpi_broadcast",
    "bytes",
    "agreements",
    "segments",
    "moved",
)
# Of a window of shared memory (node/node.h): flags, and three slots of at most this.
CONTROL_BYTES = 4096
SLOTS = 3
MAX_SLOT_BYTES = 512 << 10
_PROGRESS_COLUMNS = 5 + 2 * 4  # of core/progress.h
_STACKS_BYTES = 32 << 10  # of text at most

# The MPI type of the same size; 16-bit floats and booleans travel as integers, under
# operations that know better.
MPI_TYPES = {
    "float32": "FLOAT",
    "float64": "DOUBLE",
    "bfloat16": "UINT16_T",
    "float16": "UINT16_T",
    "bool": "UINT8_T",
    "complex64": "C_FLOAT_COMPLEX",
    "complex128": "C_DOUBLE_COMPLEX",
    **{
        f"{kind}{bits}": f"{kind.upper()}{bits}_T"
        for kind in ("int", "uint")
        for bits in (8, 16, 32, 64)
    },
}

AgreeCallback = Callable[[int, int, int, int], str | None]
DifferCallback = Callable[[int, tuple[int, int], int, tuple[int, int]], str]
PartitionCallback = Callable[[int, int, list[list[int]]], str | None]
_PARTITION_FN = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.POINTER(ctypes.c_int64),
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_int64,
)
_AGREE_FN = ctypes.CFUNCTYPE(
    ctypes.c_int,
    *[ctypes.c_int64] * 4,
    ctypes.c_void_p,
    ctypes.c_int64,
)


class _Where(ctypes.Structure):
    _fields_ = (("schedule", ctypes.c_int64), ("bucket", ctypes.c_int64))


_DIFFER_FN = ctypes.CFUNCTYPE(
    None,
    ctypes.c_int64,
    ctypes.POINTER(_Where),
    ctypes.c_int64,
    ctypes.POINTER(_Where),
    ctypes.c_void_p,
    ctypes.c_int64,
)


class _MpiHandles(ctypes.Structure):
    _fields_ = (
        ("dtype", ctypes.c_uint64 * len(DTYPES)),
        ("byte", ctypes.c_uint64),
        ("op", ctypes.c_uint64 * len(OPS)),
        ("in_place", ctypes.c_uint64),
        ("serialized", ctypes.c_uint64),
    )


def library_path() -> Path:
    """Return where the native library is.

    Raises:
      TransportUnavailableError: it was not built (a bare source tree).
    """
    if chosen := os.environ.get(LIBRARY_VARIABLE):
        return Path(chosen)
    # An editable install keeps sources and build products in two folders, and
    # both stand in the package's __path__.
    for folder in __path__:
        path = Path(folder) / LIBRARY_NAME
        if path.exists():
            return path
    raise TransportUnavailableError(
        f"{LIBRARY_NAME} is not beside the package; the native library has not been "
        "built. Install the package (`pip install .`, or `make setup` in a checkout)."
    )


@functools.cache
def load() -> ctypes.CDLL:
    """Load the library and register its handlers with XLA; once per process."""
    library = ctypes.CDLL(str(library_path()))
    for name in HANDLERS:
        capsule = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    library.jaxcomm_refuse.restype = None
    library.jaxcomm_set_agree.restype = None
    library.jaxcomm_timeline_start.restype = None
    library.jaxcomm_check_every_call.restype = None
    library.jaxcomm_lift_deadline.restype = None
    library.jaxcomm_progress.restype = ctypes.c_int64
    library.jaxcomm_native_stacks.restype = None
    library.jaxcomm_dump_on_signal.restype = None
    library.jaxcomm_timeline_take.restype = ctypes.c_int64
    library.jaxcomm_set_partition.restype = None
    library.jaxcomm_op_handle.restype = ctypes.c_uint64
    library.jaxcomm_kernels.restype = ctypes.c_char_p
    library.jaxcomm_lock_mpi.restype = None
    library.jaxcomm_unlock_mpi.restype = None
    return library


def bind_mpi(mpi: Any) -> None:
    """Give the library the MPI that `mpi` (the module mpi4py.MPI) has loaded.

    Raises:
      TransportUnavailableError: no libmpi is mapped into this process, or it lacks
        an entry point.
    """
    handles = _MpiHandles()
    for i, dtype in enumerate(DTYPES):
        handles.dtype[i] = _handle(mpi, getattr(mpi, MPI_TYPES[dtype]))
    for i, op in enumerate(OPS):
        handles.op[i] = _handle(mpi, getattr(mpi, op.upper()))
    handles.byte = _handle(mpi, mpi.BYTE)
    handles.in_place = int(mpi.IN_PLACE) & (2**64 - 1)
    handles.serialized = int(mpi.Query_thread() < mpi.THREAD_MULTIPLE)
    width = mpi._sizeof(mpi.Comm)
    failures = []
    for path in loaded_mpi_libraries():
        why = _told(
            load().jaxcomm_open_mpi, path.encode(), width, ctypes.byref(handles)
        )
        if not why:
            return
        failures.append(f"{path}: {why}")
    raise TransportUnavailableError(
        "mpi4py is imported, but no libmpi with the needed entry points is loaded: "
        + ("; ".join(failures) or "nothing like libmpi in the process's memory map")
    )


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

    _call(
        load().jaxcomm_create_communicator,
        ctypes.c_int64(key),
        ctypes.c_uint64(_handle(MPI, comm)),
        comm.Get_rank(),
        comm.Get_size(),
        ctypes.c_int64(staging_bytes),
        ctypes.c_int64(segment_bytes),
        int(own_thread),
        int(ring),
    )


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
    _call(
        load().jaxcomm_share_memory,
        ctypes.c_int64(key),
        (ctypes.c_void_p * len(windows))(*windows) if windows else None,
        ctypes.c_int64(nbytes),
        int(crowded),
    )


def op_handle(dtype: str, op: str) -> int:
    """Return the MPI_Op that reduces elements of `dtype`: MPI's own, or one of ours."""
    return load().jaxcomm_op_handle(DTYPES.index(dtype), OPS.index(op))


def kernels() -> str:
    """Return the instruction set that was chosen: "baseline", "avx2" or "avx512"."""
    return load().jaxcomm_kernels().decode()


@contextlib.contextmanager
def mpi_turn() -> Iterator[None]:
    """Hold the lock of MPI_THREAD_SERIALIZED; make no blocking call in it."""
    load().jaxcomm_lock_mpi()
    try:
        yield
    finally:
        load().jaxcomm_unlock_mpi()


def all_reduce_array(key: int, data: Any, pack_bytes: int) -> None:
    """Average a float32 array in place, as a bucket's call does; for measuring."""
    _call(
        load().jaxcomm_all_reduce_float,
        ctypes.c_int64(key),
        ctypes.c_void_p(data.ctypes.data),
        ctypes.c_int64(data.size),
        ctypes.c_int64(pack_bytes),
    )


def set_agree(agree: AgreeCallback, differ: DifferCallback) -> None:
    """Let the handlers compare ranks, and describe how they differ.

    Args:
      agree: called with a communicator's key, a schedule's digest, and where every
        call is checked the bucket and the call's number, else -1 for both. Returns
        None when all ranks agree, else the text of the error to raise.
      differ: called with a communicator's key, (schedule, bucket) of this rank's call,
        another rank and that one's (schedule, bucket); returns the text of the error.
    """

    def ask(
        key: int, digest: int, bucket: int, number: int, text: int, capacity: int
    ) -> int:
        return _answer(lambda: agree(key, digest, bucket, number), text, capacity)

    def explain(
        key: int, own: Any, rank: int, other: Any, text: int, capacity: int
    ) -> None:
        places = [(w[0].schedule, w[0].bucket) for w in (own, other)]
        _answer(lambda: differ(key, places[0], rank, places[1]), text, capacity)

    keep = (_AGREE_FN(ask), _DIFFER_FN(explain))
    set_agree.keep = keep  # type: ignore[attr-defined]  # C holds them
    load().jaxcomm_set_agree(*keep)


def refuse(key: int, text: str) -> None:
    """Let every call of a communicator fail from now on, with a text."""
    load().jaxcomm_refuse(ctypes.c_int64(key), text.encode())


def check_every_call(every: bool) -> None:
    """Compare every call across ranks before it is made, or every schedule once."""
    load().jaxcomm_check_every_call(int(every))


def set_partition(callback: PartitionCallback) -> None:
    """Let the handlers ask `callback(communicator, partition, groups)` for a subgroup.

    It creates communicator `partition` of this rank's group, and returns None or the
    text of an error.
    """

    def call(
        key: int, partition: int, numbers: Any, length: int, text: int, capacity: int
    ) -> int:
        rows, at = [], 0
        while at < length:
            rows.append([int(r) for r in numbers[at + 1 : at + 1 + numbers[at]]])
            at += 1 + numbers[at]
        return _answer(lambda: callback(key, partition, rows), text, capacity)

    set_partition.keep = _PARTITION_FN(call)  # type: ignore[attr-defined]
    load().jaxcomm_set_partition(set_partition.keep)  # type: ignore[attr-defined]


def _answer(ask: Callable[[], str | None], text: int, capacity: int) -> int:
    """Give C the text of an error, if there is one; return whether there is."""
    try:
        message = ask()
    except BaseException as error:  # C would take it for consent, Ctrl-C as well
        message = f"jaxcomm: {type(error).__name__}: {error}"
    if message is None:
        return 0
    raw = message.encode()[: capacity - 1]
    raw = raw.decode(errors="ignore").encode() + b"\0"  # whole characters
    ctypes.memmove(text, raw, len(raw))
    return 1


def _told(function: Any, *arguments: Any) -> str:
    """Call a function that may say what went wrong; return that, or ""."""
    text = ctypes.create_string_buffer(1024)
    failed = function(*arguments, text, ctypes.c_int64(len(text)))
    return text.value.decode(errors="replace") if failed else ""


def _call(function: Any, *arguments: Any) -> None:
    if why := _told(function, *arguments):
        raise TransportUnavailableError(why)


def counters(key: int) -> dict[str, int]:
    """Return the counters of a communicator: calls, MPI calls by kind, bytes."""
    out = (ctypes.c_int64 * len(COUNTERS))()
    load().jaxcomm_counters(ctypes.c_int64(key), out)
    return dict(zip(COUNTERS, out, strict=True))


@contextlib.contextmanager
def deadline(seconds: float, text: str, code: int) -> Iterator[None]:
    """End this process unless the block is left in time; 0 seconds for never.

    Also where the interpreter is held, as it is during MPI_Init.

    Args:
      seconds: from now.
      text: for standard error.
      code: the process's exit code.
    """
    if seconds > 0:
        _call(
            load().jaxcomm_set_deadline, ctypes.c_double(seconds), text.encode(), code
        )
    try:
        yield
    finally:
        load().jaxcomm_lift_deadline()


def deadline_at_end(seconds: float, text: str, code: int) -> None:
    """End this process if it does not end by itself, that long after Python has.

    MPI_Finalize waits for all ranks, and for ever for one that was stopped.

    Args:
      seconds: from the end of the interpreter; not 0.
      text: for standard error.
      code: the process's exit code.
    """
    library = load()
    _call(library.jaxcomm_prepare_end, ctypes.c_double(seconds), text.encode(), code)
    # Called before what was registered earlier, as mpi4py's MPI_Finalize was.
    ctypes.pythonapi.Py_AtExit(ctypes.cast(library.jaxcomm_end, ctypes.c_void_p))


def bucket_of(place: int) -> int:
    """Return the bucket of a call's place; -1 stays -1."""
    return place if place < 0 else place & ((1 << PLACE_BITS) - 1)


class Progress(NamedTuple):
    """How far a communicator is.

    Attributes:
      key: of the communicator.
      calls: how many custom calls have begun.
      schedule: digest of the last one's schedule.
      bucket: its number in that.
      entered: when it began, in ns of time.monotonic_ns(); 0 where it has ended.
      marks: (number, hash of the calls up to it) of some calls, the last one first.
    """

    key: int
    calls: int
    schedule: int
    bucket: int
    entered: int
    marks: tuple[tuple[int, int], ...]


def progress() -> list[Progress]:
    """Return how far every communicator of this process is."""
    count = 64
    while True:
        rows = (ctypes.c_int64 * _PROGRESS_COLUMNS * count)()
        count = load().jaxcomm_progress(rows, ctypes.c_int64(len(rows)))
        if count <= len(rows):
            break
    return [
        Progress(*row[:5], marks=tuple(zip(row[5::2], row[6::2], strict=True)))
        for row in map(list, rows[:count])
    ]


def hash_at(key: int, number: int) -> int | None:
    """Return the hash of a communicator's calls up to one; None if it is not known."""
    found = ctypes.c_int64()
    known = load().jaxcomm_hash_at(
        ctypes.c_int64(key), ctypes.c_int64(number), ctypes.byref(found)
    )
    return found.value if known else None


def stacks(seconds: float = 0.5) -> str:
    """Return where all other threads of this process are, in native code.

    Each is interrupted by a signal for a moment. The text names threads, with the
    functions and files of their innermost frames; it is some KB long.

    Args:
      seconds: to wait for threads that do not answer.
    """
    text = ctypes.create_string_buffer(_STACKS_BYTES)
    load().jaxcomm_native_stacks(
        ctypes.c_double(seconds), text, ctypes.c_int64(len(text))
    )
    return text.value.decode(errors="replace")


def dump_on_signal(head: str) -> int:
    """Let this process write its stacks to standard error when it gets a signal.

    Also where a thread holds the interpreter for good.

    Args:
      head: what stands above the native ones.

    Returns:
      The signal, which nobody used; 0 if all are in use.
    """
    number = load().jaxcomm_unused_signal()
    if number:
        faulthandler.register(number, file=2, all_threads=True)
        load().jaxcomm_dump_on_signal(number, head.encode())
    return number


def timeline_start() -> None:
    """Record from now on when collectives begin and end."""
    load().jaxcomm_timeline_start()


def timeline_take() -> list[tuple[int, ...]]:
    """Return what was recorded, and forget it.

    Each event is (communicator, schedule, bucket, kind, start, end): kind 0 says that
    the operands are there, 1 is the collective; times are nanoseconds of the host's
    monotonic clock.
    """
    found: list[tuple[int, ...]] = []
    events = (ctypes.c_int64 * 6 * 4096)()
    while count := load().jaxcomm_timeline_take(events, ctypes.c_int64(len(events))):
        found += [tuple(events[k]) for k in range(count)]
    return found


def _handle(mpi: Any, thing: Any) -> int:
    return mpi._handleof(thing) & (2**64 - 1)


def loaded_mpi_libraries() -> list[str]:
    """Return the paths of the MPI libraries mapped into this process.

    libmpi is loaded with local scope, so a global dlsym does not see it.
    """
    pattern = re.compile(r"/lib(p?mpi|mpich|mpi_\w+)[^/]*\.so[^/]*$")
    paths: dict[str, None] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if pattern.search(path):
            paths[path] = None
    return list(paths)
