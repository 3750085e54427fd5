"""The roster in etcd: what it looks like, and which changes may be made to it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from postmeter.core.identity import machine_of, next_name
from postmeter.core.roster import Roster
from postmeter.errors import ConfigError
from postmeter.roster_document import RosterDocument, first_roster, read_roster

THREE = RosterDocument({4: ("mx1", "mx2"), 5: ("mx1", "mx2", "mx3")}, ("mx0",), "mx3 joined")
ALL_FOLLOW = dict.fromkeys(("mx1", "mx2", "mx3"), 5)


def test_it_is_read_as_it_was_written() -> None:
    """The text in etcd says everything."""
    assert THREE == read_roster(THREE.text())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"generations": {"1": ["mx1"]}}', "cannot be read"),
        ('{"generations": {"1": ["MX 1"]}, "stopped": []}', "is no name of a node"),
        ('{"generations": {"1": "mx1"}, "stopped": []}', "is no list of different nodes"),
        ('{"generations": {"1": ["mx1", "mx1"]}, "stopped": []}', "is no list of different nodes"),
        ('{"generations": {"1": ["mx1", ["mx2"]]}, "stopped": []}', "is no name of a node"),
        ('{"generations": {}, "stopped": []}', "are not consecutive"),
        ('{"generations": {"1": ["mx1"], "3": ["mx2"]}, "stopped": []}', "are not consecutive"),
        ('{"generations": {"0": ["mx1"]}, "stopped": []}', "are not consecutive"),
    ],
)
def test_a_damaged_one_is_refused(text: str, complaint: str) -> None:
    """Whatever somebody put there by hand; it says what to do."""
    with pytest.raises(ConfigError, match=complaint) as caught:
        read_roster(text)
    assert "restore" in str(caught.value)


def test_nodes_join_one_after_the_other() -> None:
    """Each change makes the next generation, and forgets what nobody needs any more."""
    one = first_roster("mx1")
    two = one.joined("mx2", {"mx1": 1}, settled=True)
    three = two.joined("mx3", {"mx1": 2, "mx2": 2}, settled=True)
    assert {1: ("mx1",), 2: ("mx1", "mx2")} == two.generations
    assert {2: ("mx1", "mx2"), 3: ("mx1", "mx2", "mx3")} == three.generations
    assert (2, 3) == (three.born("mx3"), three.generation)


def test_a_node_joins_once() -> None:
    """Neither one that is in the roster nor one that was declared stopped."""
    for node in ("mx1", "mx0"):
        with pytest.raises(ConfigError, match="a node joins once"):
            THREE.joined(node, ALL_FOLLOW, settled=True)


def test_a_change_waits_for_the_one_before() -> None:
    """Every living node that the last change concerns has to follow it; the message says whom to look for."""
    behind = ALL_FOLLOW | {"mx2": 4}
    with pytest.raises(
        ConfigError, match=r"has not followed the last change yet .*: mx2 \(generation 5\).*node remove mx2"
    ):
        THREE.joined("mx4", behind, settled=True)
    with pytest.raises(ConfigError, match=r"has not followed .*: mx2 \("):
        THREE.drained("mx1", behind, settled=True)
    drained = THREE.drained("mx1", ALL_FOLLOW, settled=True)
    with pytest.raises(ConfigError, match=r"has not followed .*: mx1 \(generation 6\)"):
        drained.joined("mx4", {"mx2": 6, "mx3": 6, "mx1": 5}, settled=True)
    assert drained.joined("mx4", {"mx2": 6, "mx3": 6, "mx1": 6}, settled=True)


def test_a_dead_node_is_removed_at_any_time() -> None:
    """Also while a change is under way that it does not follow; generations that others need are kept."""
    removed = THREE.drained("mx1", ALL_FOLLOW, settled=True).removed("mx2", ALL_FOLLOW, settled=False)
    assert {5: ("mx1", "mx2", "mx3"), 6: ("mx2", "mx3"), 7: ("mx3",)} == removed.generations
    assert ("mx0", "mx2") == removed.stopped
    assert {"mx1", "mx3"} == removed.concerned


def test_nobody_joins_before_a_drained_node_has_followed() -> None:
    """Though all are gone that it would have to tell: it may go on spending, and the newcomer would not hear of it."""
    alone = (
        THREE.drained("mx1", ALL_FOLLOW, settled=True)
        .removed("mx2", ALL_FOLLOW, settled=False)
        .removed("mx3", ALL_FOLLOW, settled=False)
    )
    assert () == alone.members
    with pytest.raises(ConfigError, match=r"has not followed .*: mx1 \(generation 6\).*node remove mx1"):
        alone.joined("mx4", ALL_FOLLOW, settled=True)
    assert ("mx4",) == alone.joined("mx4", ALL_FOLLOW | {"mx1": 6}, settled=True).members
    assert ("mx4",) == alone.removed("mx1", ALL_FOLLOW, settled=False).joined("mx4", ALL_FOLLOW, settled=True).members


def test_a_newcomer_hears_of_stopped_nodes_until_somebody_is_settled() -> None:
    """What they have used may still count: it waits for that, as the others do."""
    removed = THREE.removed("mx3", ALL_FOLLOW, settled=True)
    assert {5: ("mx1", "mx2", "mx3"), 6: ("mx1", "mx2")} == removed.generations
    follow = {"mx1": 6, "mx2": 6}
    for settled, generations in ((False, [5, 6, 7]), (True, [6, 7])):
        joined = removed.joined("mx4", follow, settled)
        assert generations == list(joined.generations)
        newcomer = Roster("mx4", joined.generations, joined.born("mx4"), {"mx0": 0, "mx3": 0})
        for node in ("mx1", "mx2"):
            newcomer.hear(node, 7, None)
        assert ([joined.members] if settled else [THREE.members, joined.members]) == newcomer.open(50, 100, 0)
        assert [joined.members] == newcomer.open(100, 100, 0)


def test_a_stopped_node_that_is_a_member_again_is_removed() -> None:
    """An older roster was restored: it is named once, and not in the newest generation any more."""
    removed = replace(THREE, stopped=("mx0", "mx3")).removed("mx3", ALL_FOLLOW, settled=True)
    assert (("mx1", "mx2"), ("mx0", "mx3")) == (removed.members, removed.stopped)
    assert removed == read_roster(removed.text())


def test_a_node_that_dies_while_it_is_drained_can_be_removed() -> None:
    """It is out of the newest generation, but others wait for its handover: it is declared stopped."""
    drained = THREE.drained("mx1", ALL_FOLLOW, settled=True)
    removed = drained.removed("mx1", ALL_FOLLOW, settled=False)
    assert (drained.generations, ("mx0", "mx1")) == (removed.generations, removed.stopped)


def test_who_is_unknown_is_not_removed() -> None:
    """A name that was mistyped changes nothing."""
    unknown = "is not in the roster; there are mx1, mx2, mx3"
    for node in ("mx9", "mx0"):
        with pytest.raises(ConfigError, match=unknown):
            THREE.removed(node, ALL_FOLLOW, settled=False)
        with pytest.raises(ConfigError, match=unknown):
            THREE.drained(node, ALL_FOLLOW, settled=True)


def test_removals_are_bounded() -> None:
    """A list that nobody follows does not grow for ever."""
    roster = first_roster("n0")
    for number in range(1, 60):
        roster = roster.joined(f"n{number}", dict.fromkeys(roster.members, roster.generation), settled=True)
    for number in range(48):
        roster = roster.removed(f"n{number}", ALL_FOLLOW, settled=False)
    with pytest.raises(ConfigError, match="changes are under way"):
        roster.removed("n48", ALL_FOLLOW, settled=False)
    assert len(json.loads(roster.text())["generations"]) == 50


def test_a_machine_comes_back_under_another_name() -> None:
    """Never under one that it had."""
    assert "mx1" == next_name("mx1", ["mx2", "mx10"])
    assert "mx1~2" == next_name("mx1", ["mx1", "mx2~7"])
    assert "mx1~4" == next_name("mx1", ["mx1~3", "mx1"])
    assert "mx1" == machine_of("mx1~4")
