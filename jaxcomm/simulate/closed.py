"""Closed forms of what the simulator plays, where there are any.

They exist to be compared with it: tests ask for agreement within 5% where they apply,
which each says. Those of trees apply to four ranks and more on nodes of 2, 4 or 8: with
six, as on Summit, partners of one distance are sometimes neighbours in a node and
sometimes not, and the formulas are bounds, up to a sixth too high. Those of the
gradient all-reduces are in `collectives`, as the simulator uses them itself.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from jaxcomm.simulate.machines import Machine


def _hop(machine: Machine, ranks: int, distance: int) -> float:
    """Latency of a round in which partners are so far apart, the slowest pair's."""
    local = min(ranks, machine.ranks_per_node)
    inside = ranks <= local or local % (2 * distance) == 0
    return machine["control_node_latency" if inside else "control_latency"]


def _rounds(ranks: int) -> int:
    """Rounds of a binomial tree: the most ones in the binary form of any rank."""
    return ranks.bit_length() - 1


def small_all_reduce(machine: Machine, ranks: int) -> float:
    """Recursive doubling of a few bytes, all ranks entering together, in seconds.

    Applies where the bytes' own time is small against a hop. Ranks beyond a power of
    two cost a hop before and one after, to a neighbour: then this is a bound, less than
    a hop too high, as not everybody takes both.
    """
    if ranks == 1:
        return 0.0
    rest = ranks - (1 << _rounds(ranks))
    total = 2 * _hop(machine, ranks, 1) if rest else 0.0
    for k in range(_rounds(ranks)):
        # Ranks move up to fill the gaps, which doubles the distance of some partners.
        distance = (2 << k) if rest else (1 << k)
        aligned = rest % (2 << k) == 0
        total += _hop(machine, ranks, distance if aligned else ranks)
    return total


def gather_tree(machine: Machine, ranks: int, nbytes: int) -> float:
    """Every rank's few bytes to rank 0 along a binomial tree, in seconds."""
    hops = sum(_hop(machine, ranks, 1 << k) for k in range(_rounds(ranks)))
    return hops + (ranks - 1) * nbytes / machine["control_bandwidth"]


def gather_linear(machine: Machine, ranks: int) -> float:
    """One small message from each rank to rank 0, in seconds.

    Rank 0 is busy from the first arrival on, or waits for the first from another node.
    """
    if ranks == 1:
        return 0.0
    each = machine["root_message"]
    end = machine["control_node_latency"] + (ranks - 1) * each
    others = ranks - machine.ranks_per_node
    if others > 0:
        end = max(end, machine["control_latency"] + others * each)
    return end


def broadcast(machine: Machine, ranks: int, nbytes: float) -> float:
    """Rank 0's bytes to all along a binomial tree, whole at every hop, in seconds.

    Applies to powers of two, and to few bytes in any case.
    """
    if ranks == 1:
        return 0.0
    far = machine["control_latency"] + nbytes / machine["control_bandwidth"]
    near = machine["control_node_latency"] + nbytes / machine["response_bandwidth"]
    inside = min(ranks, machine.ranks_per_node).bit_length() - 1
    return inside * near + (_rounds(ranks) - inside) * far


def fixed_end(ready: Sequence[float], seconds: Sequence[float]) -> float:
    """End of the last bucket, for buckets reduced in one order.

    Unrolls begin[k] = max(ready[k], end[k - 1]): whoever is waited for longest, and all
    that comes after.

        end = max over k of (ready[k] + seconds[k] + ... + seconds[last])

    Args:
      ready: when each bucket is ready on all ranks.
      seconds: how long each takes.
    """
    return max(ready[k] + sum(seconds[k:]) for k in range(len(ready)))


def slowest_of(ranks: int) -> float:
    """Expected maximum of standard normal numbers (Blom, 1958), in deviations."""
    if ranks == 1:
        return 0.0
    return statistics.NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))


def straggling(machine: Machine, ranks: int) -> float:
    """Expected computation of the slowest rank over the median device's.

    Applies without `leaf_spread`; averages over many jobs, as devices stay the same
    within one.
    """
    spread = (machine["rank_spread"] ** 2 + machine["step_spread"] ** 2) ** 0.5
    return 1 + spread * slowest_of(ranks)


def mean_wait(cycle_seconds: float, wake: float, coordination: float) -> float:
    """Mean time from a tensor's being ready everywhere to its release, in seconds.

    Half a cycle, as long as it really is, passes until the thread looks again; then a
    round. Applies where cycles
    are longer than rounds and tensors become ready at times that have nothing to do
    with the cycles.
    """
    return (cycle_seconds + wake) / 2 + coordination
