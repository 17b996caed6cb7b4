"""Transport `mpi`: one variadic custom call per bucket, in the native library."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from jaxcomm import compat, native, settings
from jaxcomm.transports.base import (
    Call,
    Group,
    Transport,
    call_attributes,
    emit,
    numbers,
)
from jaxcomm.transports.shared_window import SharedWindow

if TYPE_CHECKING:
    from jaxcomm.ranks.fabric import Fabric, MpiFabric


log = logging.getLogger(__name__)


class Mpi(Transport):
    """MPI through jaxcomm's own custom call."""

    name = "mpi"
    waits_in_pool = True

    def __init__(self) -> None:
        # MPI communicators and shared memory that the native library uses: they live
        # as long as this does.
        self._communicators: list[Any] = []
        self._windows: list[SharedWindow] = []
        self._group: Group | None = None
        self._own_thread = self._ring = False

    @property
    def group(self) -> Group:
        """The ranks that `connect` was given."""
        assert self._group is not None
        return self._group

    @property
    def fabric(self) -> MpiFabric:
        """What connects them."""
        return cast("MpiFabric", self.group.fabric)

    def open(self, fabric: Fabric, abort_after: float) -> None:
        """Bind the MPI that mpi4py has loaded."""
        native.bind_mpi(sys.modules["mpi4py.MPI"])

    def connect(self, group: Group) -> None:
        """Make the communicator known to the native library."""
        self._group = group
        one_host = group.fabric.size == group.fabric.local_size
        # Where calls wait for a network, XLA's threads have better things to do.
        default = "off" if one_host else "on"
        self._ring = os.environ.get(settings.OWN_THREAD_VARIABLE, default) == "on"
        # Where the calling thread runs a program, see `ranks.threads`.
        self._own_thread = self._ring or (
            not group.whole and not compat.async_dispatch()
        )
        self.shared_memory, self.two_tiers = self._create(
            group.key, self.fabric.data, self.fabric.hosts, group.segment_bytes
        )

    def split(self, key: int, members: Sequence[int], color: int, place: int) -> None:
        """Make an MPI communicator of a part, and the native one."""
        found = [self.fabric.hosts[rank] for rank in members]
        order = list(dict.fromkeys(found))  # of their first ranks
        hosts = [order.index(host) for host in found]
        self._create(key, self.fabric.part(members), hosts, self.group.segment_bytes)

    def duplicate(self, key: int, segment_bytes: int) -> None:
        """Make a native communicator with other segments."""
        self._create(key, self.fabric.duplicate(), self.fabric.hosts, segment_bytes)

    def _create(
        self, key: int, comm: Any, hosts: Sequence[int], segment_bytes: int
    ) -> tuple[bool, bool]:
        """Make some ranks known to the native library, and memory that they share.

        Returns:
          As `shared_memory` and `two_tiers`.
        """
        self._communicators.append(comm)
        native.create_communicator(
            key,
            comm,
            staging_bytes=self.group.staging_bytes,
            segment_bytes=segment_bytes,
            own_thread=self._own_thread,
            ring=self._ring,
        )
        count = max(hosts) + 1
        if not self.group.may_share_memory or count == len(hosts):
            return False, False
        return (
            (self._share_memory(key, comm, segment_bytes), False)
            if count == 1
            else (False, self._join_hosts(key, comm, hosts, segment_bytes))
        )

    def _share_memory(self, key: int, comm: Any, segment_bytes: int) -> bool:
        """Let ranks of one host reduce through memory; tell if they do."""

        def attach(window: SharedWindow) -> None:
            native.share_memory(
                key, window.addresses, window.nbytes, crowded=window.crowded
            )

        budget = min(self.group.staging_bytes, 3 * segment_bytes)
        window = SharedWindow(comm, native.window_bytes(budget), attach)
        if window.failure:
            native.share_memory(key, [], 0, crowded=False)
            log.info("reductions go through MPI: %s", window.failure)
            return False
        self._windows.append(window)
        return True

    def _join_hosts(
        self, key: int, comm: Any, hosts: Sequence[int], message_bytes: int
    ) -> bool:
        """Let ranks of several hosts reduce in two tiers; tell if they do."""
        local = self.fabric.on_this_host(comm, hosts)
        self._communicators.append(local)

        def attach(window: SharedWindow) -> None:
            native.join_hosts(key, hosts, window.addresses, window.nbytes)

        # A segment is divided into a part for each lane, and that into blocks.
        count = len(set(hosts))
        lanes = min(map(list(hosts).count, set(hosts)))
        blocks = lanes * (1 if count == 2 else count)
        nbytes = native.tiers_window_bytes(
            self.group.staging_bytes, blocks * message_bytes
        )
        window = SharedWindow(local, nbytes, attach)
        # On all hosts, or on none.
        failures: list[str] = comm.allgather(window.failure)
        failure = next(filter(None, failures), "")
        if failure:
            native.join_hosts(key, hosts, [], 0)
            log.info("reductions go through MPI: %s", failure)
            return False
        self._windows.append(window)
        return True

    def refuse(self, text: str) -> None:
        """Let the native library refuse every call."""
        native.refuse(self.group.key, text)

    def counters(self) -> dict[str, int]:
        """Return the native communicator's counters."""
        return native.counters(self.group.key)

    def lower(self, ctx: Any, call: Call, values: Sequence[Any]) -> Sequence[Any]:
        """Emit one custom call; where shapes allow, results alias operands."""
        attributes = call_attributes(call)
        if call.op in native.MOVES:
            # No aliases but the token's: what is received has another shape or order.
            attributes["move"] = np.int64(native.MOVES.index(call.op))
            attributes["divisor"] = np.int64(1)
            attributes["permutation"] = numbers(call.permutation)
            last = len(values) - 1
            return emit("jaxcomm_mpi_move", ctx, values, attributes, [last])
        if call.op == "broadcast":
            attributes["root"] = np.int64(call.root)
            return in_place_call("jaxcomm_mpi_broadcast", ctx, values, attributes)
        op = "sum" if call.op == "mean" else call.op
        attributes["op"] = np.int64(native.OPS.index(op))
        attributes["divisor"] = np.int64(call.size if call.op == "mean" else 1)
        attributes["pack_bytes"] = np.int64(call.pack_bytes)
        wire = native.DTYPES.index(call.wire) if call.wire else -1
        attributes["wire"] = np.int64(wire)
        algorithm = native.ALGORITHMS.index(call.algorithm or "pairwise")
        attributes["algorithm"] = np.int64(algorithm)
        return in_place_call("jaxcomm_mpi_all_reduce", ctx, values, attributes)


def in_place_call(
    target: str, ctx: Any, values: Sequence[Any], attributes: dict[str, Any]
) -> Sequence[Any]:
    """Emit a custom call on `values` with every result aliased to its operand."""
    return emit(target, ctx, values, attributes, range(len(values)))
