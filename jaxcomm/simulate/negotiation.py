"""What one round of negotiation costs, played message by message.

The steps are those of Horovod's `Controller::ComputeResponseList` (`control` counts
them). Rank 0's and the other ranks' work on requests and responses comes on top.
"""

from __future__ import annotations

import math

import numpy as np

from jaxcomm.simulate.control import REQUEST_BYTES, STATUS_BITS
from jaxcomm.simulate.machines import Machine
from jaxcomm.simulate.messages import Hosts

# A serialised Response: one 4-byte device for every rank, and for every tensor its name
# and size. A list's own frame.
DEVICE_BYTES = 4
TENSOR_BYTES = 62
FRAME_BYTES = 24


class Negotiation:
    """The control plane of a machine for a number of ranks."""

    def __init__(self, machine: Machine, ranks: int):
        self.machine = machine
        self.ranks = ranks
        self.wake = machine["wake_seconds"]
        self._played: dict[tuple[str, int], tuple[float, int]] = {}

    def hosts(self) -> Hosts:
        """The machine's hosts, with nothing sent yet."""
        m = self.machine
        # Memory is what bounds a message inside a node.
        return Hosts(
            self.ranks,
            m.ranks_per_node,
            m["control_latency"],
            m["control_node_latency"],
            m["control_bandwidth"],
            m["response_bandwidth"],
            m["root_message"],
        )

    def _play(self, kind: str, nbytes: int) -> tuple[float, int]:
        """Seconds and messages of a collective that all ranks enter together."""
        if (kind, nbytes) not in self._played:
            hosts = self.hosts()
            start = hosts.start()
            if kind == "gatherv":
                sizes = np.full(self.ranks, nbytes, np.int64)
                end = hosts.gather_linear(start, sizes)
            else:
                end = getattr(hosts, kind)(start, nbytes)
            if not hosts.count.conserved:
                raise RuntimeError(f"{kind}: a message was lost")
            self._played[kind, nbytes] = float(end.max()), int(hosts.count.sent.sum())
        return self._played[kind, nbytes]

    def intersect(self, tensors: int, released: int) -> tuple[float, int]:
        """Time and messages of one bit-vector round of the response cache.

        Args:
          tensors: cached tensors, a bit each.
          released: tensors found common to all ranks, whose responses are copied.
        """
        words = math.ceil((tensors + STATUS_BITS) / 64)
        seconds, messages = self._play("all_reduce", 8 * words)
        # Copied out of the cache, and its devices compared: the speed is that of both.
        copied = released * self._response_bytes(1, 1)
        return seconds + copied / self.machine["response_bandwidth"], messages

    def coordinate(
        self, requests: int, released: int, responses: int
    ) -> tuple[float, int]:
        """Time and messages of one round through rank 0.

        Args:
          requests: new requests of all ranks together.
          released: tensors that have become ready on all ranks.
          responses: fused responses that they make.

        Returns:
          Seconds from entering the round until every rank knows the responses.
        """
        m = self.machine
        parts = [
            self._play("gather_tree", 4),
            self._play("gatherv", FRAME_BYTES),
            self._play("broadcast", 4),
        ]
        answer = FRAME_BYTES
        if responses:
            answer += self._response_bytes(responses, released)
        parts.append(self._play("broadcast", answer))
        seconds = sum(s for s, _ in parts)
        # What arrives from rank 0's own node is small change.
        seconds += requests * REQUEST_BYTES / m["control_bandwidth"]
        seconds += requests * m["request_seconds"]
        seconds += answer / m["response_bandwidth"]
        return seconds, sum(n for _, n in parts)

    def coordinate_tree(
        self, requests: int, released: int, responses: int, radix: int
    ) -> tuple[float, int]:
        """As `coordinate`, but through a tree: no rank hears from more than `radix`.

        Each inner rank reads its children's requests, merges them and passes on one
        per tensor, which is what Kurth et al. (SC'18) put between Horovod's ranks.
        """
        m = self.machine
        depth = max(math.ceil(math.log(self.ranks, radix)), 1) if self.ranks > 1 else 0
        level = m["control_latency"] + radix * m["root_message"]
        level += radix * requests / self.ranks * m["request_seconds"]
        answer = FRAME_BYTES
        if responses:
            answer += self._response_bytes(responses, released)
        down = m["control_latency"] + radix * answer / m["control_bandwidth"]
        return depth * (level + down), 2 * (self.ranks - 1)

    def agree(self, nbytes: int = 64) -> tuple[float, int]:
        """Time and messages of jaxcomm's one comparison of fingerprints."""
        return self._play("all_reduce", nbytes)

    def _response_bytes(self, responses: int, tensors: int) -> int:
        return responses * DEVICE_BYTES * self.ranks + tensors * TENSOR_BYTES
