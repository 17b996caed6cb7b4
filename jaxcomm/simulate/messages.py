"""Collectives played message by message: who sends what to whom, and when.

The state of a collective is one array of times, an entry per rank, and every round is a
few array operations, so 27,600 ranks take milliseconds. Messages are counted at both
ends, where they are sent and where they are received. `closed` has the formulas.
"""

from __future__ import annotations

import dataclasses

import numpy as np

Times = np.ndarray


@dataclasses.dataclass
class Count:
    """Messages and bytes of every rank, at both ends.

    Attributes:
      sent: messages that each rank sent, shape (ranks,).
      received: messages that each rank received.
      bytes_sent: bytes that each rank sent.
      bytes_received: bytes that each rank received.
    """

    sent: np.ndarray
    received: np.ndarray
    bytes_sent: np.ndarray
    bytes_received: np.ndarray

    @property
    def conserved(self) -> bool:
        """Whether every message and byte that was sent has been received."""
        return (
            self.sent.sum() == self.received.sum()
            and self.bytes_sent.sum() == self.bytes_received.sum()
        )


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Messages under way; `free` is when each one's sender may send again."""

    source: np.ndarray
    to: np.ndarray
    free: np.ndarray
    arrival: np.ndarray
    nbytes: np.ndarray


class Hosts:
    """Ranks on nodes, and the messages between them.

    Args:
      ranks: number of ranks, filling one node after another.
      ranks_per_node: ranks that share a node.
      latency: seconds of a message between nodes.
      node_latency: seconds of a message inside a node.
      bandwidth: bytes per second that leave a node, shared by those that leave it at
        the same time.
      node_bandwidth: bytes per second of a message inside a node.
      root_message: seconds that a rank needs for each of many messages sent to it.
    """

    def __init__(
        self,
        ranks: int,
        ranks_per_node: int,
        latency: float,
        node_latency: float,
        bandwidth: float,
        node_bandwidth: float,
        root_message: float = 0.0,
    ):
        self.ranks = ranks
        self.node = np.arange(ranks) // ranks_per_node
        self.latency, self.node_latency = latency, node_latency
        self.bandwidth, self.node_bandwidth = bandwidth, node_bandwidth
        self.root_message = root_message
        zeros = [np.zeros(ranks, np.int64) for _ in range(4)]
        self.count = Count(*zeros)

    def start(self) -> Times:
        """All ranks at time 0."""
        return np.zeros(self.ranks)

    def _send(
        self, source: np.ndarray, to: np.ndarray, nbytes: np.ndarray, times: Times
    ) -> _Batch:
        np.add.at(self.count.sent, source, 1)
        np.add.at(self.count.bytes_sent, source, nbytes)
        inside = self.node[source] == self.node[to]
        leaving = np.bincount(self.node[source[~inside]], minlength=self.node[-1] + 1)
        shared = self.bandwidth / np.maximum(leaving[self.node[source]], 1)
        wire = nbytes / np.where(inside, self.node_bandwidth, shared)
        latency = np.where(inside, self.node_latency, self.latency)
        free = times[source] + wire
        return _Batch(source, to, free, free + latency, nbytes)

    def _receive(self, batch: _Batch, times: Times) -> Times:
        np.add.at(self.count.received, batch.to, 1)
        np.add.at(self.count.bytes_received, batch.to, batch.nbytes)
        after = times.copy()
        after[batch.source] = batch.free
        np.maximum.at(after, batch.to, batch.arrival)
        return after

    def _exchange(
        self, source: np.ndarray, to: np.ndarray, nbytes: float, times: Times
    ) -> Times:
        """One round: every source sends once; the receivers wait."""
        size = np.full(len(source), round(nbytes), np.int64)
        return self._receive(self._send(source, to, size, times), times)

    def gather_linear(self, times: Times, nbytes: np.ndarray) -> Times:
        """Every rank sends its bytes to rank 0, who takes one message at a time.

        Args:
          times: when each rank enters.
          nbytes: bytes that each rank sends, shape (ranks,); rank 0's stay.

        Returns:
          When each rank leaves: rank 0 after the last message. A sender does not wait
          for the root.
        """
        if self.ranks == 1:
            return times
        source = np.arange(1, self.ranks)
        batch = self._send(source, np.zeros_like(source), nbytes[1:], times)
        after = self._receive(batch, times)
        # Served in the order of arrival, each for `root_message`:
        # end[k] = max(arrival[k], end[k - 1]) + cost.
        arrival = np.maximum(np.sort(batch.arrival), times[0])
        place = np.arange(len(arrival)) * self.root_message
        after[0] = (np.maximum.accumulate(arrival - place) + place)[-1]
        after[0] += self.root_message
        return after

    def gather_tree(self, times: Times, nbytes: int) -> Times:
        """Every rank's `nbytes` go to rank 0 along a binomial tree."""
        distance = 1
        while distance < self.ranks:
            source = np.arange(distance, self.ranks, 2 * distance)
            parts = np.minimum(distance, self.ranks - source) * nbytes
            batch = self._send(source, source - distance, parts, times)
            times = self._receive(batch, times)
            distance *= 2
        return times

    def broadcast(self, times: Times, nbytes: float) -> Times:
        """Rank 0's bytes go to all along a binomial tree, whole at every hop."""
        distance = 1 << max(self.ranks - 1, 0).bit_length()
        while distance > 1:
            half = distance // 2
            source = np.arange(0, self.ranks - half, distance)
            times = self._exchange(source, source + half, nbytes, times)
            distance = half
        return times

    def all_reduce(self, times: Times, nbytes: float) -> Times:
        """Recursive doubling: what MPI does for a few bytes.

        Ranks beyond a power of two hand their part to a neighbour and get the result
        at the end.
        """
        return self._doubling(times, nbytes, lambda distance: nbytes, both_ways=False)

    def halving_doubling(self, times: Times, nbytes: float) -> Times:
        """Recursive halving, then doubling: parts of half the size in every round."""
        power = 1 << (self.ranks.bit_length() - 1)
        part = lambda distance: nbytes / (2 * distance) if power > 1 else 0  # noqa: E731
        return self._doubling(times, nbytes, part, both_ways=True)

    def _doubling(self, times: Times, nbytes: float, part, both_ways: bool) -> Times:
        power = 1 << (self.ranks.bit_length() - 1)
        rest = self.ranks - power
        extra = np.arange(0, 2 * rest, 2)
        if rest:
            times = self._exchange(extra, extra + 1, nbytes, times)
        core = np.concatenate([extra + 1, np.arange(2 * rest, self.ranks)])
        place = np.arange(power)
        distances = [1 << k for k in range(power.bit_length() - 1)]
        for distance in [*distances, *(reversed(distances) if both_ways else ())]:
            to = core[place ^ distance]
            times = self._exchange(core, to, part(distance), times)
        if rest:
            times = self._exchange(extra + 1, extra, nbytes, times)
        return times

    def ring(self, times: Times, nbytes: float) -> Times:
        """A ring: 2 (N - 1) rounds of an N-th of the bytes."""
        source = np.arange(self.ranks)
        to = (source + 1) % self.ranks
        for _ in range(2 * (self.ranks - 1)):
            times = self._exchange(source, to, nbytes / self.ranks, times)
        return times

    def tree(self, times: Times, nbytes: float) -> Times:
        """Chains inside nodes and a binomial tree between their first ranks, and back.

        Messages travel whole; NCCL cuts them into pieces that overlap.
        """
        heads = np.flatnonzero(np.diff(self.node, prepend=-1))
        sizes = np.bincount(self.node)
        edges: list[tuple[np.ndarray, np.ndarray]] = []
        for k in range(int(sizes.max()) - 1, 0, -1):
            source = heads[sizes > k] + k
            edges.append((source, source - 1))
        distance = 1
        while distance < len(heads):
            source = np.arange(distance, len(heads), 2 * distance)
            edges.append((heads[source], heads[source - distance]))
            distance *= 2
        for source, to in edges:
            times = self._exchange(source, to, nbytes, times)
        for source, to in reversed(edges):
            times = self._exchange(to, source, nbytes, times)
        return times
