"""Collectives message by message against closed forms; no message is lost."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from jaxcomm.simulate import closed, collectives, control, machines
from jaxcomm.simulate.messages import Hosts
from jaxcomm.simulate.negotiation import Negotiation

SUMMIT = machines.load("summit")
SIZES = [1, 2, 3, 8, 48, 64, 100, 1536, 6000, 27600]
COLLECTIVES = ["gather_tree", "broadcast", "all_reduce"]


def data_hosts(wire: collectives.Wire, ranks: int) -> Hosts:
    return Hosts(
        *(ranks, wire.ranks_per_node, wire.network_latency, wire.node_latency),
        *(wire.network_bandwidth, wire.node_bandwidth),
    )


def one_level(ranks_per_node: int) -> collectives.Wire:
    wire = dataclasses.replace(collectives.wire(SUMMIT), call_latency=0.0)
    return dataclasses.replace(wire, ranks_per_node=ranks_per_node)


@pytest.mark.parametrize("ranks", [2, 8, 64])
@pytest.mark.parametrize("ranks_per_node", [1, 64])
@pytest.mark.parametrize("nbytes", [0, 1 << 12, 1 << 27])
@pytest.mark.parametrize("algorithm", ["ring", "halving-doubling"])
def test_all_reduce_forms_on_one_level(
    algorithm: str, nbytes: int, ranks_per_node: int, ranks: int
) -> None:
    wire = one_level(ranks_per_node)
    hosts = data_hosts(wire, ranks)
    played = getattr(hosts, algorithm.replace("-", "_"))(hosts.start(), nbytes).max()
    formula = collectives.all_reduce_seconds(wire, ranks, nbytes, algorithm)
    assert played == pytest.approx(formula, rel=0.05)
    assert hosts.count.conserved


@pytest.mark.parametrize("ranks", [6, 24, 96, 600])
def test_ring_and_tree_latency_on_nodes_of_six(ranks: int) -> None:
    wire = one_level(6)
    for algorithm in ("ring", "tree"):
        hosts = data_hosts(wire, ranks)
        played = getattr(hosts, algorithm)(hosts.start(), 0).max()
        formula = collectives.all_reduce_seconds(wire, ranks, 0, algorithm)
        assert played == pytest.approx(formula, rel=0.05)


@pytest.mark.parametrize("ranks", [24, 96, 300])
def test_ring_hides_latency_between_nodes_only_in_part(ranks: int) -> None:
    # A ring through nodes overlaps hops with bytes: the formula's sum is a bound.
    wire, nbytes = one_level(6), 1 << 27
    hosts = data_hosts(wire, ranks)
    played = hosts.ring(hosts.start(), nbytes).max()
    latency = collectives.all_reduce_seconds(wire, ranks, 0, "ring")
    both = collectives.all_reduce_seconds(wire, ranks, nbytes, "ring")
    assert 0.99 * max(latency, both - latency) < played < 1.01 * both


def test_limits_of_all_reduce_forms() -> None:
    wire, many = collectives.wire(SUMMIT), 1 << 40
    for algorithm in ("ring", "tree", "hierarchical"):
        # At infinite size each node sends everything in and out once.
        seconds = collectives.all_reduce_seconds(wire, 27600, many, algorithm)
        assert 2 * many / wire.network_bandwidth <= 1.01 * seconds
        assert collectives.all_reduce_seconds(wire, 1, many, algorithm) == 0
    small = {
        name: collectives.all_reduce_seconds(wire, 27600, 8, name)
        for name in collectives.ALGORITHMS
    }
    # Latency grows with N around a ring and with log N in all others.
    assert min(small, key=lambda name: -small[name]) == "ring"
    assert small["ring"] > 100 * small["tree"]


@pytest.mark.parametrize("machine", ["dgx-h100", "ethernet"])
@pytest.mark.parametrize("ranks", [n for n in SIZES if n not in (3, 48)])
def test_control_forms(machine: str, ranks: int) -> None:
    where = machines.load(machine)
    plane = Negotiation(where, ranks)

    def played(kind: str, nbytes: int) -> float:
        hosts = plane.hosts()
        start = hosts.start()
        if kind == "gather_linear":
            return hosts.gather_linear(start, np.full(ranks, nbytes)).max()
        return getattr(hosts, kind)(start, nbytes).max()

    expected = {
        "all_reduce": closed.small_all_reduce(where, ranks),
        "gather_tree": closed.gather_tree(where, ranks, 4),
        "gather_linear": closed.gather_linear(where, ranks),
        "broadcast": closed.broadcast(where, ranks, 4),
    }
    if ranks & (ranks - 1):
        # A bound, at most a hop too high.
        bound, hop = expected.pop("all_reduce"), where["control_latency"]
        assert bound - hop < played("all_reduce", 4) < 1.001 * bound
    for kind, formula in expected.items():
        assert played(kind, 4) == pytest.approx(formula, rel=0.05, abs=1e-12), kind


@pytest.mark.parametrize("ranks", SIZES)
@pytest.mark.parametrize("kind", COLLECTIVES)
def test_no_message_is_lost(kind: str, ranks: int) -> None:
    hosts = Negotiation(SUMMIT, ranks).hosts()
    getattr(hosts, kind)(hosts.start(), 8)
    count = hosts.count
    assert count.conserved
    rounds = math.floor(math.log2(ranks))
    if kind == "all_reduce":
        power = 1 << rounds
        assert count.sent.sum() == power * rounds + 2 * (ranks - power)
    else:
        assert count.sent.sum() == ranks - 1
    if kind == "gather_tree":
        assert count.bytes_received[0] == 8 * (ranks - 1)


def test_a_lost_message_is_noticed() -> None:
    hosts = Negotiation(SUMMIT, 8).hosts()
    hosts.broadcast(hosts.start(), 8)
    hosts.count.received[3] -= 1
    assert not hosts.count.conserved


def test_who_enters_late_leaves_late() -> None:
    hosts = Negotiation(SUMMIT, 100).hosts()
    times = hosts.start()
    times[77] = 1.0
    for kind in ("all_reduce", "gather_tree"):
        assert getattr(hosts, kind)(times, 8)[0] > 1.0
    # Nobody waits for a leaf of the broadcast's tree.
    assert np.sort(hosts.broadcast(times, 8))[-2] < 1e-3


def test_messages_agree_with_the_count_from_horovods_code() -> None:
    ranks, tensors = 1024, 33
    coordinator, cache, static = control.designs(ranks, tensors)
    plane = Negotiation(SUMMIT, ranks)
    assert plane.coordinate(0, 0, 0)[1] == coordinator.per_step
    assert plane.intersect(tensors, 0)[1] == cache.per_step
    assert plane.agree()[1] == static.once


def test_control_traffic() -> None:
    coordinator, cache, static = control.designs(6000, 160)
    # Within the size of what rank 0 sends itself of the figure for Horovod's code.
    assert coordinator.bytes_into_rank_0 == pytest.approx(127e6, rel=0.01)
    assert cache.bytes_into_rank_0 == 24 * 13
    assert (static.per_step, static.rounds_per_step) == (0, 0)
    assert [t.per_step for t in control.designs(1, 5)] == [0, 0, 0]
