"""The usage view of one simulated node: fed with what it charges, and exchanged over the simulated network.

An exchange is three messages, any of which may be lost: a digest; a digest, and what the first one lacks; what the
other one lacks, if that is anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from postmeter.core.committed import Committed
from postmeter.core.gossip import Rounds
from postmeter.core.meters import Meters
from postmeter.core.view import Digest, Portion, View

if TYPE_CHECKING:
    from tests.simulation.host import Host

PORTIONS_MAX = 40
"""In one message."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """`step` 1 asks, 2 answers and asks back, 3 answers."""

    step: int
    digest: Digest
    portions: list[Portion]


@dataclass(frozen=True, slots=True)
class Turn:
    """To itself: time for the next exchange. `incarnation` tells that the node has not started anew since."""

    incarnation: int


class Gossip:
    """What a node knows of the others, while it runs."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.view = View(host.name, host.disk.incarnation)
        self.committed = Committed(self.view)
        self.rounds = Rounds(host.world.random.shuffle, host.world.gossip_ms, host.world.gossip_peers_max)
        for meters in host.ledger.meters.values():
            for number in meters.numbers:
                self.count(meters, number, list(meters.rows(number)))
        self._turn = Turn(host.disk.incarnation)
        host.world.remind(host.name, self._turn, 0)

    def count(self, meters: Meters, number: int, rows: list[int]) -> None:
        """These rows were charged."""
        named = zip(map(meters.keys.names.__getitem__, rows), meters.sums(number, rows), strict=True)
        sums = [(name, amount) for name, amount in named if name is not None]
        self.view.count(meters.id, number, sums, self.host.now_ms())

    def tend(self) -> None:
        """Say what was lent and borrowed, and forget what is over."""
        now_ms = self.host.now_ms()
        for (id, key), moved in self.host.rights.take_changed(1 << 20).items():
            self.committed.note(id, key, moved, now_ms)
        self.committed.refresh(now_ms, 500)
        self.view.expire(now_ms, 500)

    def hear(self, source: str, message: Exchange | Turn) -> None:
        """The next step of an exchange, or the first one of the next."""
        if isinstance(message, Turn):
            if message == self._turn:
                self._begin()
            return
        if source in self.host.rights.roster.stopped:
            return
        now_ms = self.host.now_ms()
        for _ in self.view.merge(message.digest, message.portions, now_ms):
            pass
        portions = list(islice(self.view.delta(message.digest, now_ms), PORTIONS_MAX)) if message.step < 3 else []
        if message.step == 1 or portions:
            self._send(source, Exchange(message.step + 1, self.view.digest(now_ms), portions))

    def _begin(self) -> None:
        host, now_ms = self.host, self.host.now_ms()
        peer = self.rounds.next(host.peers, now_ms)
        host.world.remind(host.name, self._turn, (self.rounds.due_ms - now_ms) / host.rate)
        if peer is not None:
            self._send(peer, Exchange(1, self.view.digest(now_ms), []))

    def _send(self, to: str, message: Exchange) -> None:
        self.host.burn()
        self.host.world.post(self.host.name, to, message)
