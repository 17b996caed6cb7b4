"""What a transport is: how the buckets of a schedule become custom calls."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# JAX types its own functions in part.
from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm import compat, native
from jaxcomm.errors import TransportUnavailableError, UnsupportedDtypeError
from jaxcomm.planning import costs
from jaxcomm.planning.costs import CostModel

if TYPE_CHECKING:
    from jaxcomm.ranks.fabric import Fabric


@dataclasses.dataclass(frozen=True)
class Call:
    """One bucket's custom call, as static as its HLO.

    Attributes:
      comm: key of the communicator; the same on every rank.
      size: its number of ranks.
      op: as in `schedule.Bucket`.
      digest: 63 bits that name the schedule in the cross-rank check; 0 for none.
      bucket: the bucket's number in its schedule.
      site: which of the communicator's calls in the program it is.
      pack_bytes: leaves of at most this many bytes are packed.
      root: sending rank of a broadcast; -1 otherwise.
      wire: the 16-bit dtype that travels in place of float32, or "".
      permutation: (source, target) ranks of a permutation.
      partition: key of the communicator of this rank's subgroup, the same on every
        rank; 0 where all ranks take part together.
      groups: the subgroups, where there are any.
      algorithm: between hosts, as in `schedule.Bucket`.
    """

    comm: int
    size: int
    op: str
    digest: int
    bucket: int
    site: int
    pack_bytes: int
    root: int
    wire: str = ""
    permutation: tuple[tuple[int, int], ...] = ()
    partition: int = 0
    groups: tuple[tuple[int, ...], ...] = ()
    algorithm: str = ""

    @property
    def place(self) -> int:
        """Bucket and site in one number, which ranks compare: see core/callbacks.h.

        With the bucket alone, two calls of one schedule could be taken for each other.
        """
        return self.site << native.PLACE_BITS | self.bucket


def numbers(rows: Iterable[Iterable[int]]) -> np.ndarray:
    """Return rows of integers as one flat attribute."""
    return np.array([number for row in rows for number in row], np.int64)


def call_attributes(call: Call) -> dict[str, Any]:
    """Return what every collective's custom call says."""
    return {
        "comm": np.int64(call.comm),
        "schedule": np.int64(call.digest),
        "bucket": np.int64(call.place),
        "partition": np.int64(call.partition),
        "groups": numbers((len(group), *group) for group in call.groups),
    }


def emit(
    target: str,
    ctx: Any,
    values: Sequence[Any],
    attributes: dict[str, Any],
    aliased: Iterable[int],
) -> Sequence[Any]:
    """Emit a custom call, with the results of some numbers in their operands' place."""
    # A token has no buffer to alias.
    arrays = [i for i in aliased if hasattr(ctx.avals_in[i], "shape")]
    rule: Any = jax.ffi.ffi_lowering(
        target, has_side_effect=True, operand_output_aliases={i: i for i in arrays}
    )
    return rule(ctx, *values, **attributes)


def map_values(
    function: Callable[..., Sequence[Any]],
    ctx: Any,
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    values: Sequence[Any],
) -> Sequence[Any]:
    """Emit a function of arrays into the program, on IR values."""
    rule: Any = compat.mlir.lower_fun(function, multiple_results=True)
    return rule(ctx.replace(avals_in=avals_in, avals_out=avals_out), *values)


def local_result(call: Any, leaf: Any) -> Any:
    """Return what a call, or a bucket, gives where this rank is the only one."""
    if call.op == "all_gather":
        return leaf[None]
    if call.op == "reduce_scatter":
        return leaf[0]
    if call.op == "permute" and not call.permutation:
        return jnp.zeros_like(leaf)
    return leaf


# Collectives that move bytes, whatever they mean.
MOVES = ("broadcast", "all_gather", "all_to_all", "permute")


@dataclasses.dataclass(frozen=True)
class Group:
    """The ranks of a communicator, and what was said about how they reduce.

    Attributes:
      key: of the communicator; the same on every rank.
      fabric: who they are and how they talk on the host.
      whole: whether these are all ranks of the job.
      timeout: seconds that connecting may take.
      staging_bytes: size of the buffer that small leaves share.
      segment_bytes: how large leaves are divided.
      may_share_memory: whether ranks on one host may share memory.
    """

    key: int
    fabric: Fabric
    whole: bool
    timeout: float
    staging_bytes: int
    segment_bytes: int
    may_share_memory: bool


class Transport(abc.ABC):
    """How the buckets of one communicator move. It knows ranks and arrays, no pytrees.

    A transport is a subclass in this folder, named in `transports.find`. There is one
    object for each communicator: that of all ranks is opened and connected, and those
    of subgroups are made from it by `for_subgroup` and connected.

    Attributes:
      name: what `jaxcomm.init` calls it.
      platforms: of XLA, of the programs in which its calls may stand.
      automatic_for: backends of JAX for which several ranks use it unless told.
      connects: whether it connects processes at all.
      needs_mpi: whether the processes must have found each other by MPI.
      concurrent_mpi_calls: whether MPI must run at MPI_THREAD_MULTIPLE.
      calls_when_alone: whether one rank makes its calls too.
      waits_in_pool: whether its calls wait for other ranks on threads of XLA's.
      one_thread: why one Python thread must make all calls, and what to do instead;
        "" where several may.
      marks_operands: whether a timeline can record when a bucket's operands are there.
      rank_target: custom call that gives the rank.
      shared_memory: whether the connected ranks reduce through memory they share.
      two_tiers: whether they are on several hosts, those of each share memory, and
        what is reduced there is exchanged between hosts.
    """

    name: ClassVar[str]
    platforms: ClassVar[frozenset[str]] = frozenset({"cpu"})
    automatic_for: ClassVar[frozenset[str]] = frozenset()
    connects: ClassVar[bool] = True
    needs_mpi: ClassVar[bool] = True
    concurrent_mpi_calls: ClassVar[bool] = False
    calls_when_alone: ClassVar[bool] = True
    waits_in_pool: ClassVar[bool] = False
    one_thread: ClassVar[str] = ""
    marks_operands: ClassVar[bool] = True
    rank_target: ClassVar[str] = "jaxcomm_rank"
    shared_memory: bool = False
    two_tiers: bool = False

    def default_costs(self, *, one_host: bool) -> CostModel:
        """Return the cost model of ranks that no profile was measured for."""
        return costs.DEFAULT if one_host else costs.BETWEEN_HOSTS

    @property
    def counts_every_call(self) -> bool:
        """Whether calls are counted when they are made, as the watchdog needs."""
        return True

    def open(self, fabric: Fabric, abort_after: float) -> None:  # noqa: B027
        """Find and load what all communicators need; all ranks call it, once.

        Args:
          fabric: of all ranks.
          abort_after: seconds that a collective may last; 0 for no limit.

        Raises:
          TransportUnavailableError: on every rank, with the cause and the remedy.
        """

    def close(self) -> None:  # noqa: B027
        """Finish what is under way, at the end of the process."""

    def for_subgroup(self) -> Transport:
        """Return the transport of a communicator of some of the ranks."""
        return type(self)()

    @abc.abstractmethod
    def connect(self, group: Group) -> None:
        """Connect a communicator's ranks; they call it together."""

    @abc.abstractmethod
    def split(self, key: int, members: Sequence[int], color: int, place: int) -> None:
        """Make the native communicator of a part of the ranks; on XLA's thread.

        Args:
          key: of the new communicator.
          members: its ranks, numbered as here.
          color: the number of the part, of those into which all ranks are divided.
          place: this rank's number in the part.
        """

    def duplicate(self, key: int, segment_bytes: int) -> None:
        """Make another native communicator of the same ranks, for measuring.

        Args:
          key: of the new one.
          segment_bytes: how it divides large leaves.

        Raises:
          TransportUnavailableError: this transport is not measured.
        """
        raise TransportUnavailableError(
            f"tuning measures MPI and shared memory; over {self.name!r} set "
            "bucket_bytes, or use transport='mpi'"
        )

    def refuse(self, text: str) -> None:  # noqa: B027
        """Let every custom call fail from now on, with a text."""

    def counters(self) -> dict[str, int]:
        """Return what the native library counted."""
        return {}

    def check(self, op: str, dtype: str, path: str) -> None:
        """Raise UnsupportedDtypeError if a leaf cannot be reduced this way."""
        check_dtype(self.name, op, dtype, path)

    @abc.abstractmethod
    def lower(self, ctx: Any, call: Call, values: Sequence[Any]) -> Sequence[Any]:
        """Emit the bucket's custom calls.

        Args:
          ctx: JAX's lowering context; its last aval is the token's.
          call: what to do.
          values: IR values of the leaves and, last, of the token, which is either
            an HLO token (ordered effect) or a uint32 scalar (ordered by data).

        Returns:
          As many IR values, in the same order.
        """


_NUMBERS = {
    "float32",
    "float64",
    "bfloat16",
    "float16",
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
}
_COMPLEX = {"complex64", "complex128"}
# JAX's types of less than a byte: several elements may share one.
_SUB_BYTE = {"int2", "int4", "uint2", "uint4", "float4_e2m1fn"}
_MEANINGFUL = {
    "sum": _NUMBERS | _COMPLEX,
    "reduce_scatter": _NUMBERS | _COMPLEX,
    "mean": _NUMBERS | _COMPLEX,
    "prod": _NUMBERS | _COMPLEX,
    # Of booleans: all and any.
    "min": _NUMBERS | {"bool"},
    "max": _NUMBERS | {"bool"},
}


def check_dtype(transport: str, op: str, dtype: str, path: str) -> None:
    """Raise UnsupportedDtypeError where op and dtype make no sense together."""
    if dtype not in _SUB_BYTE and (op in MOVES or dtype in _MEANINGFUL[op]):
        return
    if dtype in _SUB_BYTE:
        why = "its elements share bytes; cast the leaf to int8 or wider"
    elif dtype == "bool":
        why = "use op='max' (any) or op='min' (all), or cast the leaf to an integer"
    elif dtype in _COMPLEX:
        why = "complex numbers have no order; reduce abs, real or imag"
    else:
        why = f"transport {transport!r} has no such type; cast the leaf first"
    raise UnsupportedDtypeError(
        f"leaf {path}: dtype {dtype} cannot travel with op={op!r}: {why}."
    )
