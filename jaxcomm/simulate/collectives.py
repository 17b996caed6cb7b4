"""How long an all-reduce takes: closed forms of latency and bandwidth.

All are of the form  hops x latency + bytes / bandwidth, after Thakur, Rabenseifner and
Gropp (2005) for one level of network, with the two levels of a cluster of nodes as
NCCL's tuner (src/graph/tuning.cc) has them. `messages` plays the same algorithms
message by message; tests compare the two.
"""

from __future__ import annotations

import dataclasses
import functools
import math

from jaxcomm.simulate.machines import Machine

ALGORITHMS = ("ring", "tree", "halving-doubling", "hierarchical")


@dataclasses.dataclass(frozen=True)
class Wire:
    """What an all-reduce needs to know of a machine, per second and per byte.

    Attributes:
      ranks_per_node: ranks that share a node.
      network_latency: seconds of a hop between nodes.
      node_latency: seconds of a hop inside a node.
      call_latency: seconds before the first byte.
      network_bandwidth: bytes per second that a node sends.
      node_bandwidth: bytes per second that a rank sends inside its node.
    """

    ranks_per_node: int
    network_latency: float
    node_latency: float
    call_latency: float
    network_bandwidth: float
    node_bandwidth: float


def wire(machine: Machine) -> Wire:
    """Take the data plane from a machine."""
    return Wire(
        machine.ranks_per_node,
        machine["network_latency"],
        machine["node_latency"],
        machine["call_latency"],
        machine["network_bandwidth"] * machine["network_share"],
        machine["node_bandwidth"],
    )


def all_reduce_seconds(wire: Wire, ranks: int, nbytes: float, algorithm: str) -> float:
    """Time of one all-reduce whose ranks all begin at once.

    Args:
      wire: the network.
      ranks: number of ranks, filling one node after another.
      nbytes: bytes that every rank contributes.
      algorithm: one of `ALGORITHMS`.

    Returns:
      Seconds; 0 for one rank, who has nothing to do.
    """
    if ranks == 1:
        return 0.0
    return wire.call_latency + _FORMS[algorithm](wire, ranks, nbytes)


def fastest(
    wire: Wire, ranks: int, nbytes: float, algorithms: tuple[str, ...] = ALGORITHMS
) -> tuple[float, str]:
    """Time of the fastest algorithm, and its name."""
    return min((all_reduce_seconds(wire, ranks, nbytes, a), a) for a in algorithms)


def _nodes(wire: Wire, ranks: int) -> int:
    return -(-ranks // wire.ranks_per_node)


def _slowest_link(wire: Wire, ranks: int, local: int) -> float:
    """Bandwidth of a path that crosses every node once, in and out."""
    links = [wire.node_bandwidth] if local > 1 else []
    if _nodes(wire, ranks) > 1:
        links.append(wire.network_bandwidth)
    return min(links)


def _ring(wire: Wire, ranks: int, nbytes: float) -> float:
    # A piece goes almost twice around: 2 (N - 1) hops, two per node between nodes.
    nodes = _nodes(wire, ranks)
    hops = 2 * (ranks - 1)
    between = min(2 * nodes, hops) if nodes > 1 else 0
    latency = between * wire.network_latency + (hops - between) * wire.node_latency
    local = min(ranks, wire.ranks_per_node)
    share = 2 * (ranks - 1) / ranks
    return latency + share * nbytes / _slowest_link(wire, ranks, local)


def _tree(wire: Wire, ranks: int, nbytes: float) -> float:
    # Up and down: a chain inside each node, a binary tree between them. Two trees, each
    # with half of the bytes, make every node send what a ring's node sends.
    nodes = _nodes(wire, ranks)
    local = min(ranks, wire.ranks_per_node)
    latency = (local - 1) * wire.node_latency
    latency += (nodes.bit_length() - 1) * wire.network_latency
    return 2 * latency + 2 * nbytes / _slowest_link(wire, ranks, local)


def _halving_doubling(wire: Wire, ranks: int, nbytes: float) -> float:
    # Ranks beyond a power of two hand all they have to a partner first and get the
    # result last. Where nodes do not hold a power of two, partners of every distance
    # may be on different nodes.
    power = 1 << (ranks.bit_length() - 1)
    local = min(ranks, wire.ranks_per_node)
    seconds = 0.0
    for k in range(power.bit_length() - 1):
        distance, part = 1 << k, nbytes / (2 << k)
        inside = local % (2 * distance) == 0 or ranks <= local
        # All ranks of a node send at once and share its port.
        bandwidth = wire.node_bandwidth if inside else wire.network_bandwidth / local
        latency = wire.node_latency if inside else wire.network_latency
        seconds += 2 * (latency + part / bandwidth)
    if power < ranks:
        inside = local > 1
        bandwidth = wire.node_bandwidth if inside else wire.network_bandwidth
        latency = wire.node_latency if inside else wire.network_latency
        seconds += 2 * (latency + nbytes / bandwidth)
    return seconds


def _hierarchical(wire: Wire, ranks: int, nbytes: float) -> float:
    # Reduce-scatter in the node, all-reduce of every part between nodes at the same
    # time, all-gather in the node (Horovod's NCCLHierarchicalAllreduce).
    nodes, local = _nodes(wire, ranks), min(ranks, wire.ranks_per_node)
    inside = 2 * (local - 1) * wire.node_latency
    inside += 2 * (local - 1) / local * nbytes / wire.node_bandwidth
    rounds = 2 * math.ceil(math.log2(nodes)) * wire.network_latency
    share = 2 * (nodes - 1) / nodes
    return inside + rounds + share * nbytes / wire.network_bandwidth


_FORMS = {
    "ring": _ring,
    "tree": _tree,
    "halving-doubling": _halving_doubling,
    "hierarchical": _hierarchical,
}


@functools.lru_cache(maxsize=4096)
def cached_fastest(
    wire: Wire, ranks: int, nbytes: float, algorithms: tuple[str, ...]
) -> float:
    """Seconds of `fastest`, remembered: steps repeat the same buckets."""
    return fastest(wire, ranks, nbytes, algorithms)[0]
