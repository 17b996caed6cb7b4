"""Transport `nccl`: one custom call per bucket, on XLA's stream."""

# pyright: strict, reportUnknownMemberType=false
# JAX types its own functions in part.
from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm.errors import UnsupportedDtypeError
from jaxcomm.native import nccl
from jaxcomm.planning import costs
from jaxcomm.planning.costs import CostModel
from jaxcomm.transports.base import Call, Group, Transport, call_attributes
from jaxcomm.transports.nccl import library, lowering

if TYPE_CHECKING:
    from jaxcomm.ranks.fabric import Fabric

CLOSE_SECONDS = 10.0


class Nccl(Transport):
    """NCCL through jaxcomm's own custom call."""

    name = "nccl"
    # On the CPU: a library that reduces host memory, as the tests' stand-in does.
    platforms = frozenset({"cuda", "cpu"})
    automatic_for = frozenset({"gpu"})
    needs_mpi = False
    # XLA leaves out its own collectives of one device too. (Over MPI one rank does make
    # its calls, which is how their cost is known.)
    calls_when_alone = False
    one_thread = (
        "whose calls share the GPU's stream: ranks could have them there in different "
        "orders, and wait for each other for ever. Make all calls from the thread that "
        "called jaxcomm.init()."
    )
    marks_operands = False
    rank_target = "jaxcomm_nccl_rank"

    def __init__(self, *, graphs: bool = False) -> None:
        self._graphs = graphs  # whether XLA may record calls into CUDA graphs
        self._key, self._timeout = 0, 0.0

    def default_costs(self, *, one_host: bool) -> CostModel:
        """Return what was measured on one GPU."""
        return costs.OVER_NCCL

    @property
    def counts_every_call(self) -> bool:
        """A CUDA graph replays calls that nobody counts, on each rank as XLA likes."""
        return not self._graphs

    def open(self, fabric: Fabric, abort_after: float) -> None:
        """Load NCCL and see that the ranks' libraries and devices go together."""
        library.open_everywhere(fabric, abort_after)
        self._graphs = library.graphs_allowed()

    def close(self) -> None:
        """Let NCCL finish what it sends."""
        nccl.close(CLOSE_SECONDS)

    def for_subgroup(self) -> Transport:
        """Return one that is recorded as this one is."""
        return Nccl(graphs=self._graphs)

    def connect(self, group: Group) -> None:
        """Make the NCCL communicator of a group and use it once.

        The first use connects the ranks and takes memory, which must not happen while a
        CUDA graph is recorded or beside a collective of another communicator.
        """
        self._key, self._timeout = group.key, group.timeout
        rank, size = group.fabric.rank, group.fabric.size
        unique = nccl.unique_id() if rank == 0 else b""
        unique = group.fabric.host.broadcast(unique, 0)
        nccl.join(group.key, unique, rank, size, group.timeout)
        call = Call(
            group.key, size, "sum", digest=0, bucket=0, site=0, pack_bytes=0, root=-1
        )
        first_use: Any = jax.jit(functools.partial(_warm_up, call=call))
        jax.block_until_ready(first_use())

    def split(self, key: int, members: Sequence[int], color: int, place: int) -> None:
        """Divide the NCCL communicator."""
        nccl.split(self._key, key, color, place, len(members), self._timeout)

    def refuse(self, text: str) -> None:
        """Let the native library refuse every call."""
        nccl.refuse(self._key, text)

    def counters(self) -> dict[str, int]:
        """Return the native communicator's counters."""
        return nccl.counters(self._key)

    def check(self, op: str, dtype: str, path: str) -> None:
        """Raise UnsupportedDtypeError for a reduction that has no meaning."""
        super().check(op, dtype, path)
        if op == "prod" and dtype.startswith("complex"):
            raise UnsupportedDtypeError(
                f"leaf {path}: NCCL multiplies no complex numbers; reduce the sum of "
                "their logarithms, or use transport='mpi'"
            )

    def lower(self, ctx: Any, call: Call, values: Sequence[Any]) -> Sequence[Any]:
        """Emit the custom call, between conversions to and from what NCCL knows."""
        return lowering.lower(ctx, call, values, graphs=self._graphs)


def _warm_up(call: Call) -> Any:
    attributes = {**call_attributes(call), "op": np.int64(0)}
    leaf, token = jnp.zeros(1, np.float32), jnp.zeros((), np.uint32)
    kinds = [jax.typeof(leaf), jax.typeof(token)]
    run = jax.ffi.ffi_call("jaxcomm_nccl_all_reduce", kinds, has_side_effect=True)
    return run(leaf, token, **attributes)
