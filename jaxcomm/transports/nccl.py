"""Transport `nccl`: one custom call per bucket, on XLA's stream."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.util
import os
import re
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcomm import compat, settings
from jaxcomm.errors import (
    InvalidOptionError,
    TransportUnavailableError,
    UnsupportedDtypeError,
)
from jaxcomm.transports.base import (
    Call,
    call_attributes,
    check_dtype,
    emit,
    map_values,
    numbers,
)

if TYPE_CHECKING:
    from jaxcomm.ranks.fabric import Fabric

SONAME = "libnccl.so.2"
OLDEST = 21800
# Since this version ranks may share a GPU, where it is allowed.
SHARED_GPU = 23000
LIBRARY_VARIABLE = "JAXCOMM_NCCL_LIBRARY"
# For a library that reduces host memory, as the tests' stand-in does.
HOST_MEMORY_VARIABLE = "JAXCOMM_NCCL_HOST_MEMORY"
MULTI_RANK_VARIABLE = "NCCL_MULTI_RANK_GPU_ENABLE"
DRIVER = "libcuda.so.1"
# Lets XLA record the calls into CUDA graphs.
GRAPHS_VARIABLE = "JAXCOMM_NCCL_GRAPHS"
# NCCL wants a collective to be recorded by all ranks or by none, and at the same time.
# XLA records again when buffers of this process move, whatever the other ranks do. That
# is harmless as long as recording needs no other rank: no registering of buffers with
# them, and no first connecting. Sends and receives connect when first used, and groups
# of ranks are divided then, so neither is recorded.
FOR_GRAPHS = {"NCCL_GRAPH_REGISTER": "0", "NCCL_RUNTIME_CONNECT": "0"}
CLOSE_SECONDS = 10.0

_in_graphs = False


@dataclasses.dataclass(frozen=True)
class Library:
    """A NCCL library.

    Attributes:
      path: its file, or the bare soname where the dynamic linker found it.
      version: such as "2.27.3".
    """

    path: str
    version: str


def find() -> Library | None:
    """Return the NCCL that JAX's CUDA plugin would load, or None.

    JAXCOMM_NCCL_LIBRARY comes first. A copy that is loaded already comes next; then the
    package `nvidia.nccl`, which the plugin's wheels bring; then the dynamic linker's.
    Loads the library into this process.
    """
    for path in _candidates():
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        number = ctypes.c_int()
        if library.ncclGetVersion(ctypes.byref(number)) == 0:
            return Library(path, version_text(number.value))
    return None


def _candidates() -> list[str]:
    if chosen := os.environ.get(LIBRARY_VARIABLE):
        return [chosen]
    candidates = [*loaded(), SONAME]
    if importlib.util.find_spec("nvidia") is not None:
        spec = importlib.util.find_spec("nvidia.nccl")
        folders = spec.submodule_search_locations if spec else None
        wheel = [Path(folder) / "lib" / SONAME for folder in folders or []]
        candidates[-1:-1] = [str(path) for path in wheel if path.exists()]
    return candidates


def loaded() -> list[str]:
    """Return the paths of the NCCL libraries mapped into this process."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = (line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines())
    found = (path for path in paths if re.search(r"/libnccl\.so[^/]*$", path))
    return list(dict.fromkeys(found))


def version_text(number: int) -> str:
    """Spell NCCL's version number (nccl.h: major * 10000 + minor * 100 + patch)."""
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def prepare(fabric: Fabric, abort_after: float) -> None:
    """Load NCCL and see that the ranks' libraries and devices go together.

    Args:
      fabric: of the ranks.
      abort_after: seconds that a collective may run on the device before this process
        is ended; 0 for no limit.

    Raises:
      TransportUnavailableError: on every rank, with the cause and the remedy.
    """
    problem, version, device = "", 0, ""
    try:
        version = _open(abort_after)
        device = _uuid(_ordinal())
    except (TransportUnavailableError, InvalidOptionError) as error:
        problem = str(error)
    # All ranks hear of one rank's trouble, or they would wait for it.
    mine = [problem, version, [socket.gethostname(), device], in_graphs()]
    found = fabric.host.all_gather(mine)
    problems = {rank: text for rank, (text, *_) in enumerate(found) if text}
    if problems:
        ranks = ", ".join(map(str, problems))
        first = next(iter(problems.values()))
        raise TransportUnavailableError(f"rank {ranks} of {fabric.size}: {first}")
    recording = [rank for rank, (*_, graphs) in enumerate(found) if graphs]
    if 0 < len(recording) < fabric.size:
        raise TransportUnavailableError(
            f"{GRAPHS_VARIABLE}=1 is set on ranks {', '.join(map(str, recording))} of "
            f"{fabric.size} only: set it on every rank or on none"
        )
    versions: dict[int, list[int]] = {}
    for rank, (_, number, *_) in enumerate(found):
        versions.setdefault(number, []).append(rank)
    if len(versions) > 1:
        text = "; ".join(
            f"NCCL {version_text(v)} on ranks {', '.join(map(str, r))}"
            for v, r in versions.items()
        )
        raise TransportUnavailableError(
            f"the ranks have different versions of NCCL: {text}. Install the same "
            "nvidia-nccl wheel, or load the same module, on all hosts"
        )
    _check_devices([tuple(place) for _, _, place, _ in found], version)


def _open(abort_after: float) -> int:
    from jaxcomm.native import nccl

    if not _on_host():
        _check_backend()
    global _in_graphs
    _in_graphs = os.environ.get(GRAPHS_VARIABLE) == "1"
    if _in_graphs:
        if settings.check_every():
            raise InvalidOptionError(
                f"{settings.CHECK_VARIABLE}=every compares every call, and with "
                f"{GRAPHS_VARIABLE}=1 CUDA graphs replay calls that nobody sees: "
                "leave one of them out"
            )
        for name, value in FOR_GRAPHS.items():
            os.environ.setdefault(name, value)
    copies = loaded()
    if len(copies) > 1:
        raise TransportUnavailableError(
            f"two copies of NCCL are loaded: {' and '.join(copies)}; they corrupt each "
            "other's communicators. Let all packages use one: remove the "
            "nvidia-nccl-cu12 or -cu13 wheel that JAX does not need, or set "
            f"{LIBRARY_VARIABLE} to the copy that JAX uses"
        )
    library = find()
    if library is None:
        where = os.environ.get(LIBRARY_VARIABLE, SONAME)
        raise TransportUnavailableError(
            f"transport 'nccl' finds no NCCL ({where}). Install JAX with its CUDA "
            "plugin (pip install 'jax[cuda13]'), or set "
            f"{LIBRARY_VARIABLE}=/path/to/{SONAME}"
        )
    # A library that reduces host memory brings its own driver.
    driver = library.path if _on_host() else DRIVER
    version = nccl.open_library(
        library.path, driver, _ordinal(), abort_after, host_memory=_on_host()
    )
    if version < OLDEST:
        raise TransportUnavailableError(
            f"NCCL {library.version} ({library.path}) is too old: jaxcomm needs "
            f"{version_text(OLDEST)} or newer. Upgrade the nvidia-nccl wheel"
        )
    return version


def _check_backend() -> None:
    backend = jax.default_backend()
    if backend != "gpu":
        raise TransportUnavailableError(
            f"transport 'nccl' moves arrays of NVIDIA GPUs, but JAX runs on "
            f"{backend!r}: install the CUDA plugin (pip install 'jax[cuda13]') and "
            "leave JAX_PLATFORMS unset, or use transport='mpi'"
        )
    devices = jax.local_devices()
    if len(devices) > 1:
        raise TransportUnavailableError(
            f"this process sees {len(devices)} GPUs and jaxcomm drives one per "
            "process: start as many processes as GPUs with `jaxcomm run`, which gives "
            "each its own, or set CUDA_VISIBLE_DEVICES for each "
            "(srun --gpus-per-task=1)"
        )


def _on_host() -> bool:
    return os.environ.get(HOST_MEMORY_VARIABLE) == "1"


def in_graphs() -> bool:
    """Tell whether XLA may record the calls into CUDA graphs, as said in `init`."""
    return _in_graphs


def _ordinal() -> int:
    """Return the number of this process's device among those that CUDA shows it."""
    return 0 if _on_host() else jax.local_devices()[0].local_hardware_id


def _uuid(ordinal: int) -> str:
    """Ask the driver for the UUID of a device, as nvidia-smi spells it.

    Ordinals would not do: under Slurm every task may see its own GPU as number 0. Of a
    part of a GPU (MIG) this is the part's own.
    """
    found = find()
    device, uuid = ctypes.c_int(), ctypes.create_string_buffer(16)
    try:
        driver = ctypes.CDLL(found.path if _on_host() and found else DRIVER)
        codes = (
            driver.cuInit(0),
            driver.cuDeviceGet(ctypes.byref(device), ordinal),
            driver.cuDeviceGetUuid_v2(uuid, device),
        )
    except (OSError, AttributeError) as error:
        codes = (str(error),)
    if any(codes):
        raise TransportUnavailableError(
            f"the CUDA driver gives no UUID of GPU {ordinal}: {codes}. nvidia-smi -L "
            "shows whether the driver works, and `jaxcomm doctor` which one is found"
        )
    digits = uuid.raw.hex()
    parts = (digits[a:b] for a, b in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))
    return f"GPU-{'-'.join(parts)}"


def _check_devices(places: Sequence[tuple[Any, ...]], version: int) -> None:
    ranks: dict[tuple[Any, ...], list[int]] = {}
    for rank, place in enumerate(places):
        ranks.setdefault(place, []).append(rank)
    shared = {place: r for place, r in ranks.items() if len(r) > 1}
    if not shared:
        return
    (host, device), several = next(iter(shared.items()))
    text = (
        f"ranks {', '.join(map(str, several))} share {device} of {host}, and NCCL "
        f"{version_text(version)} "
    )
    if version < SHARED_GPU:
        raise TransportUnavailableError(
            f"{text}allows one rank per GPU. Start as many ranks as GPUs, or use NCCL "
            f"{version_text(SHARED_GPU)} or newer with {MULTI_RANK_VARIABLE}=1"
        )
    if os.environ.get(MULTI_RANK_VARIABLE) != "1":
        raise TransportUnavailableError(
            f"{text}allows that only with {MULTI_RANK_VARIABLE}=1. Start as many ranks "
            "as GPUs, or set it on every rank"
        )


def close() -> None:
    """Let NCCL finish what it sends, at the end of the process."""
    from jaxcomm.native import nccl

    nccl.close(CLOSE_SECONDS)


def join(key: int, fabric: Fabric, timeout: float) -> None:
    """Make the NCCL communicator of a fabric's ranks and use it once.

    The first use connects the ranks and takes memory, which must not happen while a
    CUDA graph is recorded or beside a collective of another communicator.
    """
    from jaxcomm.native import nccl

    unique = nccl.unique_id() if fabric.rank == 0 else b""
    nccl.join(key, fabric.host.broadcast(unique, 0), fabric.rank, fabric.size, timeout)
    call = Call(
        key, fabric.size, "sum", digest=0, bucket=0, site=0, pack_bytes=0, root=-1
    )
    jax.block_until_ready(jax.jit(functools.partial(_warm_up, call=call))())


def _warm_up(call: Call) -> Any:
    attributes = {**call_attributes(call), "op": np.int64(0)}
    leaf, token = jnp.zeros(1, np.float32), jnp.zeros((), np.uint32)
    kinds = [jax.typeof(leaf), jax.typeof(token)]
    run = jax.ffi.ffi_call("jaxcomm_nccl_all_reduce", kinds, has_side_effect=True)
    return run(leaf, token, **attributes)


_NARROW = {"int16": "int32", "uint16": "uint32"}


class Nccl:
    """NCCL through jaxcomm's own custom call."""

    name = "nccl"

    def check(self, op: str, dtype: str, path: str) -> None:
        """Raise UnsupportedDtypeError for a reduction that has no meaning."""
        check_dtype(self.name, op, dtype, path)
        if op == "prod" and dtype.startswith("complex"):
            raise UnsupportedDtypeError(
                f"leaf {path}: NCCL multiplies no complex numbers; reduce the sum of "
                "their logarithms, or use transport='mpi'"
            )

    def lower(self, ctx: Any, call: Call, values: Sequence[Any]) -> Sequence[Any]:
        """Emit the custom call, between conversions to and from what NCCL knows."""
        attributes = call_attributes(call)
        ranks = call.size
        if call.op in ("broadcast", "all_gather", "all_to_all", "permute"):
            if call.op == "broadcast":
                attributes["root"] = np.int64(call.root)
                target, aliased = "broadcast", range(len(values))
            else:
                _describe_move(attributes, call)
                target, aliased = "move", [len(values) - 1]
            return emit(_target(target, call), ctx, values, attributes, aliased)

        if call.op == "reduce_scatter":
            _describe_move(attributes, call)
            return self._reduce(ctx, call, values, "move", attributes, pack_bytes=0)
        average = call.op == "mean" and _averages(_travelling(ctx, call), ranks)
        op = "avg" if average else {"mean": "sum"}.get(call.op, call.op)
        attributes["op"] = np.int64(_op_number(op))
        divide = call.op == "mean" and not average
        return self._reduce(
            ctx,
            call,
            values,
            "all_reduce",
            attributes,
            pack_bytes=call.pack_bytes,
            divide=divide,
        )

    def _reduce(
        self,
        ctx: Any,
        call: Call,
        values: Sequence[Any],
        target: str,
        attributes: dict[str, Any],
        *,
        pack_bytes: int,
        divide: bool = False,
    ) -> Sequence[Any]:
        """Emit a reduction between what XLA does before and after it.

        Small leaves are written one after the other, all are converted to what travels,
        and back again; the mean's division is XLA's where it is not NCCL's.
        """
        *leaves, token = ctx.avals_in
        *results, _ = ctx.avals_out
        travels = _travelling(ctx, call)
        kind = np.dtype(travels) if travels != "bfloat16" else np.dtype(jnp.bfloat16)
        small = [
            i
            for i, leaf in enumerate(leaves)
            if leaf.size and leaf.size * kind.itemsize <= pack_bytes
        ]
        small = small if len(small) > 1 else []
        alone = [i for i in range(len(leaves)) if i not in small]
        if not small and not divide and leaves and leaves[0].dtype == kind:
            return emit(
                _target(target, call),
                ctx,
                values,
                attributes,
                [len(leaves)] if target == "move" else range(len(values)),
            )

        def before(*xs: Any) -> list[Any]:
            xs = tuple(x.astype(kind) for x in xs)
            packed = [jnp.concatenate([xs[i].ravel() for i in small])] if small else []
            return [*packed, *(xs[i] for i in alone)]

        def finish(x: Any, like: Any) -> Any:
            x = x.reshape(like.shape).astype(like.dtype)
            if not divide:
                return x
            by = jnp.asarray(call.size, like.dtype)
            # Integers are rounded toward zero.
            return lax.div(x, by) if jnp.issubdtype(x.dtype, jnp.integer) else x / by

        def after(*xs: Any) -> list[Any]:
            parts: dict[int, Any] = {}
            if small:
                ends = np.cumsum([leaves[i].size for i in small])[:-1]
                parts = dict(zip(small, jnp.split(xs[0], ends), strict=True))
                xs = xs[1:]
            parts |= dict(zip(alone, xs, strict=True))
            return [finish(parts[i], like) for i, like in enumerate(results)]

        arrays = _abstract(before, leaves)
        reduced = (
            [compat.shaped_array(leaf.shape, kind) for leaf in results]
            if not small
            else arrays
        )
        operands = map_values(before, ctx, leaves, arrays, values[:-1])
        inner = ctx.replace(avals_in=[*arrays, token], avals_out=[*reduced, token])
        *out, ordered = emit(
            _target(target, call),
            inner,
            [*operands, values[-1]],
            attributes,
            [len(arrays)] if target == "move" else range(len(arrays) + 1),
        )
        return [*map_values(after, ctx, reduced, results, out), ordered]


def _travelling(ctx: Any, call: Call) -> str:
    """The dtype that NCCL gets of a bucket's leaves, which have one dtype."""
    leaves = ctx.avals_in[:-1]
    dtype = str(leaves[0].dtype) if leaves else "float32"
    return call.wire or _NARROW.get(dtype, dtype)


def _abstract(function: Callable[..., Any], avals: Sequence[Any]) -> list[Any]:
    kinds = jax.eval_shape(
        function, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals)
    )
    return [compat.shaped_array(kind.shape, kind.dtype) for kind in kinds]


def _target(collective: str, call: Call) -> str:
    from jaxcomm.native import nccl

    recorded = in_graphs() and collective in nccl.RECORDED and not call.partition
    return f"jaxcomm_nccl_{'graph_' if recorded else ''}{collective}"


def _averages(dtype: str, ranks: int) -> bool:
    """Tell whether NCCL's own average is the sum divided by the number of ranks.

    It multiplies by the inverse, rounded to the dtype: exact for powers of two. Sums of
    float16 might be infinite where their mean is not, so there it is taken anyway.
    """
    if dtype == "float16":
        return True
    power = ranks & (ranks - 1) == 0
    return power and dtype in ("bfloat16", "float32", "float64")


def _op_number(op: str) -> int:
    from jaxcomm.native import nccl

    return nccl.OPS[op]


def _describe_move(attributes: dict[str, Any], call: Call) -> None:
    from jaxcomm import native

    attributes["move"] = np.int64(native.MOVES.index(call.op))
    attributes["ranks"] = np.int64(call.size)
    attributes["permutation"] = numbers(call.permutation)
