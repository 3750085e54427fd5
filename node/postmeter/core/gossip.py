"""Whom to exchange the usage view with, and when.

    rounds = Rounds(random.shuffle, interval_ms, peers_max)
    peer = rounds.next(peers, now_ms)       whom to exchange with now; None if it is not time yet, or there is nobody
    rounds.due_ms                           when to ask again

A round lasts `interval_ms`. In it a node begins an exchange with up to `peers_max` others, one after another at even
distances: asked in turn, none sends what the one before has just brought (asked all at once, each entry came 2.5 to 4.4
times). Where there are more peers than that, the next round goes on with those that are left: everybody has had a turn
before anybody has another one, in an order that is new each time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from postmeter.defaults import EXCHANGE_INTERVAL_MS, EXCHANGE_PEERS


class Rounds:
    """The rounds of one node. `shuffle` puts a list into a random order, in place."""

    def __init__(
        self,
        shuffle: Callable[[list[str]], None],
        interval_ms: int = EXCHANGE_INTERVAL_MS,
        peers_max: int = EXCHANGE_PEERS,
    ) -> None:
        self.due_ms = 0
        self._shuffle = shuffle
        self._interval_ms = interval_ms
        self._peers_max = peers_max
        self._left: list[str] = []

    def next(self, peers: Collection[str], now_ms: int) -> str | None:
        """One of `peers`, the other nodes that can be reached as far as is known."""
        if now_ms < self.due_ms:
            return None
        self.due_ms = now_ms + self._interval_ms // max(1, min(len(peers), self._peers_max))
        self._left = [peer for peer in self._left if peer in peers]
        if not self._left:
            self._left = sorted(peers)
            self._shuffle(self._left)
        return self._left.pop() if self._left else None
