"""Shares, and when a generation is open."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from postmeter.core.meters import UNLIMITED, MetersId
from postmeter.core.roster import Roster, order, share, transfers

NODES = tuple(f"n{number}" for number in range(8))
METER = (MetersId("user", "sasl_username", "messages", 3_600_000), "alice@example.com")
members = st.sets(st.sampled_from(NODES), min_size=1).map(lambda some: tuple(sorted(some)))
keys = st.text(max_size=5).map(lambda key: (METER[0], key))


@given(st.integers(0, 1_000), members, keys)
def test_shares_sum_to_max(max: int, roster: tuple[str, ...], meter: tuple[MetersId, str]) -> None:
    """Nothing is lost and nothing is given twice; who is not a member has nothing."""
    assert max == sum(share(max, roster, node, meter) for node in NODES)


@given(st.integers(0, 1_000), st.integers(0, 1_000), members, keys)
def test_shares_grow_with_max(low: int, high: int, roster: tuple[str, ...], meter: tuple[MetersId, str]) -> None:
    """So nodes may learn of another `max` in any order."""
    low, high = sorted((low, high))
    assert all(share(low, roster, node, meter) <= share(high, roster, node, meter) for node in roster)


@given(st.integers(0, 1_000), members, members, keys)
def test_transfers_make_new_shares_of_old(
    max: int, old: tuple[str, ...], new: tuple[str, ...], meter: tuple[MetersId, str]
) -> None:
    """What every node gives and takes is the difference of its shares."""
    moved = transfers(max, old, new, meter)
    for node in NODES:
        gives = sum(amount for (giver, _), amount in moved.items() if giver == node)
        takes = sum(amount for (_, taker), amount in moved.items() if taker == node)
        assert share(max, new, node, meter) == share(max, old, node, meter) - gives + takes


def test_unlimited_is_not_divided() -> None:
    """Every node has all of it."""
    assert [UNLIMITED] * 3 == [share(UNLIMITED, NODES[:3], node, METER) for node in NODES[:3]]


def test_order_outlives_a_join() -> None:
    """A node that comes does not change the order of the others."""
    assert order(METER, NODES[:5]) == tuple(node for node in order(METER, NODES) if node in NODES[:5])


def test_generation_stays_open_until_all_have_handed_over() -> None:
    """A member who still may spend by the old generation keeps it open."""
    roster = Roster("n0", {1: NODES[:3]}, 0, {})
    roster.adopt(2, NODES[:4])
    roster.hear("n1", 2, None)
    assert [NODES[:3], NODES[:4]] == roster.open(0, 100, 100)
    roster.hear("n2", 2, None)
    assert [NODES[:4]] == roster.open(0, 100, 100)


def test_stopped_node_keeps_it_open_for_the_wait() -> None:
    """It counts as gone when its usage and its loans are."""
    roster = Roster("n0", {1: NODES[:2]}, 0, {})
    roster.stop("n1", 1_000)
    roster.adopt(2, NODES[:1])
    assert 2 == len(roster.open(1_099, 100, 50))
    assert 1 == len(roster.open(1_100, 100, 50))


def test_who_does_not_know_what_it_used_keeps_it_open() -> None:
    """For one window after its start."""
    roster = Roster("n0", {1: NODES[:2]}, 0, {})
    roster.adopt(2, NODES[:3])
    roster.hear("n1", 2, 1_000)
    assert 2 == len(roster.open(1_049, 100, 50))
    assert 1 == len(roster.open(1_050, 100, 50))


def test_next_change_waits_for_the_one_before() -> None:
    """A generation is adopted when the living of the one before the current have handed over."""
    roster = Roster("n0", {1: NODES[:3]}, 0, {})
    roster.adopt(2, NODES[:4])
    assert not roster.may_adopt(0, 100)
    roster.hear("n1", 2, None)
    roster.stop("n2", 0)
    assert roster.may_adopt(0, 100)


def test_roster_survives_the_disk() -> None:
    """What is stored is read again as it was."""
    roster = Roster("n0", {1: NODES[:3]}, 0, {"n7": 5})
    roster.adopt(2, NODES[:4])
    roster.hear("n1", 2, 17)
    assert roster.standing() == Roster.restore(roster.standing()).standing()
