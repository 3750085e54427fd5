"""What every node has committed, told with the usage view."""

from __future__ import annotations

from postmeter.core.committed import Committed
from postmeter.core.view import View
from postmeter.defaults import VIEW_KEEP_MS, VIEW_LOANS_MS
from tests.unit.test_view import USER_DAY, USER_HOUR, assert_empty, drain, gossip, held

MINUTE_MS = 60_000


def pair() -> tuple[Committed, View, Committed, View]:
    """Two nodes, and what they see."""
    views = View("a", 1), View("b", 1)
    return Committed(views[0]), views[0], Committed(views[1]), views[1]


def test_committed_is_used_and_lent_less_borrowed() -> None:
    """By node, on the node itself and on others; each window and key for itself."""
    a, view_a, b, view_b = pair()
    view_a.count(USER_HOUR, 0, [("alice", 5), ("bob", 3)], 0)
    a.note(USER_HOUR, "alice", 10, 0)
    b.note(USER_HOUR, "alice", -10, 0)
    a.note(USER_DAY, "alice", 2, 0)
    gossip(view_a, view_b)
    gossip(view_b, view_a)
    for committed in (a, b):
        assert {"a": 15, "b": -10} == committed.seen(USER_HOUR, "alice")
        assert {"a": 3} == committed.seen(USER_HOUR, "bob")
        assert {"a": 2} == committed.seen(USER_DAY, "alice")
        assert {} == committed.seen(USER_DAY, "bob")
    assert [0, 5] == [committed.used(USER_HOUR, "alice") for committed in (a, b)]


def test_loans_are_no_usage() -> None:
    """Neither the totals nor the top know of them."""
    a, view_a, _, _ = pair()
    a.note(USER_HOUR, "alice", 10, 0)
    assert (0, [], {}) == (
        view_a.total(USER_HOUR, "alice"),
        view_a.top(USER_HOUR, 9),
        view_a.usage(USER_HOUR, "alice"),
    )


def test_a_change_replaces_what_was_said_before() -> None:
    """Sooner or later, in either direction, and to nothing at all."""
    a, view_a, b, view_b = pair()
    for minute, moved in enumerate((10, 7, 7, -3, -4, 0, 0, 1, 0)):
        a.note(USER_HOUR, "alice", moved, minute * MINUTE_MS // 12)
        gossip(view_b, view_a, minute * MINUTE_MS // 12)
        assert moved == b.seen(USER_HOUR, "alice").get("a", 0)
    now_ms = MINUTE_MS + 2 * VIEW_LOANS_MS
    for view in (view_a, view_b):
        drain(view, now_ms)
        assert 0 == view.entries_held


def test_what_holds_is_said_again() -> None:
    """A loan that lasts is known as long as it does, and forgotten when its node is silent."""
    a, view_a, b, view_b = pair()
    for number in range(5):
        a.note(USER_HOUR, f"user{number}", 10, number)
    for now_ms in range(0, 5 * VIEW_LOANS_MS, VIEW_LOANS_MS // 4):
        while a.refresh(now_ms, 2):
            pass
        drain(view_a, now_ms)
        drain(view_b, now_ms)
        gossip(view_b, view_a, now_ms)
        assert [{"a": 10}] * 5 == [b.seen(USER_HOUR, f"user{number}") for number in range(5)]
        assert len(held(view_b)) <= 15
    drain(view_b, 6 * VIEW_LOANS_MS + VIEW_KEEP_MS)
    assert_empty(view_b)
