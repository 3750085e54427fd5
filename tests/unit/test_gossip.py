"""Whom to exchange with, and what becomes of it."""

from __future__ import annotations

import random

import pytest

from postmeter.core.gossip import Rounds
from postmeter.core.view import View
from tests.unit.test_view import USER_HOUR, gossip, held

PEERS = [f"n{number}" for number in range(1, 10)]


def turns(rounds: Rounds, peers: list[str], until_ms: int) -> list[tuple[int, str]]:
    """When it was whose turn, asked every millisecond."""
    asked = ((now_ms, rounds.next(peers, now_ms)) for now_ms in range(until_ms))
    return [(now_ms, peer) for now_ms, peer in asked if peer is not None]


@pytest.mark.parametrize(
    ("peers_count", "peers_max", "pace_ms"), [(1, 3, 1000), (2, 3, 500), (9, 3, 333), (9, 20, 111)]
)
def test_one_after_another(peers_count: int, peers_max: int, pace_ms: int) -> None:
    """Within a round there are as many exchanges as there may be, at even distances."""
    taken = turns(Rounds(random.Random(1).shuffle, 1000, peers_max), PEERS[:peers_count], 3000)
    assert list(range(0, 3000, pace_ms)) == [now_ms for now_ms, _ in taken]


def test_everybody_has_a_turn_before_anybody_has_another_one() -> None:
    """However few a round are, in an order that is new each time."""
    taken = [peer for _, peer in turns(Rounds(random.Random(1).shuffle, 1000, 2), PEERS, 18_000)]
    orders = [taken[start : start + 9] for start in range(0, 36, 9)]
    assert [PEERS] * 4 == [sorted(order) for order in orders]
    assert 4 == len(set(map(tuple, orders)))


def test_peers_come_and_go() -> None:
    """Who has gone is not chosen, who has come is chosen in the next order at the latest."""
    rounds = Rounds(random.Random(1).shuffle, 1000, 1)
    first = rounds.next(PEERS, 0)
    left = [peer for peer in PEERS[2:] if peer != first]
    taken = {rounds.next([*left, "new"], now_ms) for now_ms in range(1000, 20_000, 1000)}
    assert {*left, "new"} == taken


def test_nobody_there() -> None:
    """Alone there is nobody to choose; who comes is chosen a round later."""
    rounds = Rounds(random.Random(1).shuffle, 1000, 3)
    assert [None, None, "n1"] == [
        rounds.next(peers, now_ms) for peers, now_ms in (([], 0), (["n1"], 999), (["n1"], 1000))
    ]


@pytest.mark.parametrize(("nodes", "rounds_max"), [(2, 1), (5, 2), (10, 2), (30, 4)])
def test_every_entry_reaches_every_node_once(nodes: int, rounds_max: int) -> None:
    """Because nodes ask in turn; and all views agree within a few rounds."""
    rnd = random.Random(nodes)
    views = {f"n{at}": View(f"n{at}", 1) for at in range(nodes)}
    rounds = {name: Rounds(rnd.shuffle, 1000, 3) for name in views}
    for at, view in enumerate(views.values()):
        view.count(USER_HOUR, 0, [(f"user{at}.{number}", 1) for number in range(5)], 0)
    entries = 0
    for now_ms in range(rounds_max * 1000):
        for name, view in views.items():
            peer = rounds[name].next([other for other in views if other != name], now_ms)
            if peer is not None:
                entries += gossip(view, views[peer], now_ms) + gossip(views[peer], view, now_ms)
    assert all(held(view) == held(views["n0"]) for view in views.values())
    assert 5 * nodes * (nodes - 1) == entries
