"""The trouble itself: it is what its name says, and it ends."""

from __future__ import annotations

from random import Random

import pytest

from .faults import ETCD, FAULTS, SHAPES, schedule
from .network import Network, cut

NODES = ["mx1", "mx2", "mx3", "mx4", "mx5"]


def test_cuts_are_what_their_names_say() -> None:
    """Of five nodes and etcd: who does not hear whom."""
    halves = SHAPES["halves"](NODES, Random(1))
    assert {2 * 2 * 4, 2 * 3 * 3} & {len(halves)}, "2 and 3 nodes, etcd with one of them"
    rest = SHAPES["rest"](NODES, Random(1))
    assert 2 * 5 == len(rest)
    ring = SHAPES["ring"](NODES, Random(1))
    assert (2 * 5, False) == (len(ring), any(ETCD in pair for pair in ring))
    assert all(3 == sum(source == node for source, _ in ring) + 1 for node in NODES), "each misses two"
    one_way = SHAPES["one-way"](NODES, Random(1))
    assert one_way
    assert not any((destination, source) in one_way for source, destination in one_way)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("nodes", [3, 5])
def test_all_is_well_at_the_end(fault: str, nodes: int) -> None:
    """The last event heals the network; who was killed or frozen was started or thawed before, each in turn."""
    for seed in range(100):
        events = schedule(fault, NODES[:nodes], Random(seed), 2.0, 26.0)
        assert ("drop", {}, 26.0) == (events[-1].what, events[-1].drops, events[-1].at_s)
        assert any(event.drops for event in events) or fault == "changing"
        spells = [event for event in events if event.what != "drop"]
        assert ["freeze", "kill", "kill"] == sorted(event.what for event in spells[::2])
        for down, up in zip(spells[::2], spells[1::2], strict=True):
            assert ({"kill": "start", "freeze": "thaw"}[down.what], down.node) == (up.what, up.node)


def test_the_network_can_be_cut_and_healed(machines: None) -> None:
    """A machine that is cut off hears nothing, and again everything afterwards; others are not concerned."""
    with Network(["mx1", "mx2", "mx3"]) as network:
        assert (True, True) == (network.reaches("mx1", "mx2"), network.reaches("mx3", "mx2"))
        network.drop(cut(["mx1"], ["mx2"]))
        assert (False, True) == (network.reaches("mx1", "mx2"), network.reaches("mx3", "mx2"))
        network.drop({("mx2", "mx3"): 100})
        assert (True, False) == (network.reaches("mx1", "mx2"), network.reaches("mx3", "mx2"))
        network.drop({})
        assert (True, True) == (network.reaches("mx1", "mx2"), network.reaches("mx3", "mx2"))
