"""Nodes that tell another one how much their users have used: python -m tests.bench.pushing NODE ADDRESS LISTEN...

Each LISTEN (HOST:PORT) is a peer of its own, called peer1 and so on, with the real port and links of a node. One line
says that the node has answered all of them. Without being told to, they only say that they are there. Lines on standard
input:

    push RATE     tell so many updates of counters a second, all peers together, each to the node
    idle          no more; one line says how many the node has taken in since `push`

An update is a new amount of one of 10,000 users in the slice of now of a window of an hour; as many have one version as
a View gives one at most. What the node says it has used is acknowledged, but not read further: real peers have machines
of their own for that.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from unittest.mock import patch

import uvloop

from postmeter import speech
from postmeter.core.meters import MetersId
from postmeter.core.view import Changes, Known, Portion
from postmeter.defaults import SLICES_PER_WINDOW, VIEW_PORTION_ENTRIES
from postmeter.link import Packet
from postmeter.packet import Contents
from postmeter.peers import Peers
from postmeter.settings import ClusterSettings, Settings
from postmeter.v1 import peers_pb2 as pb

from .load import EVERYBODY

INCARNATION = 1
# A packet takes 32 kB.
PORTIONS_MAX = 14
METERS = MetersId("user-hour", "sasl_username", "recipients", 3_600_000)
USERS = [f"user{number:07}@dom{number % EVERYBODY.domains:04}.example.org" for number in range(EVERYBODY.users)]


class Pusher:
    """One peer: a Handler of postmeter.link. It has counted up to `version`, and the node knows all up to `taken`.

    A version has VIEW_PORTION_ENTRIES updates, and is told as a portion.
    """

    def __init__(self, name: str, pushers: list[Pusher]) -> None:
        self.name = name
        self._pushers = pushers
        self.version = 0
        self.taken = 0
        self._known: dict[str, Known] = {}
        self._rate = 0.0
        self._counted_s = 0.0

    def count(self, rate: float) -> None:
        """Count so many updates a second from now on. What the node does not know yet is not told any more."""
        self.version = self.taken
        self._rate, self._counted_s = rate, time.monotonic()

    def refusal(self, node: str) -> str:
        """Everybody is welcome."""
        return ""

    def news(self, node: str) -> Contents:
        """What the node lacks, as much as a packet may hold."""
        now_s = time.monotonic()
        new = int(self._rate * (now_s - self._counted_s) / VIEW_PORTION_ENTRIES)
        self.version += new
        self._counted_s += new * VIEW_PORTION_ENTRIES / self._rate if self._rate else 0
        end = min(self.version, self.taken + PORTIONS_MAX)
        portions = [self._portion(version) for version in range(self.taken + 1, end + 1)]
        return Contents(digest=self._digest(), portions=portions, more=end < self.version)

    async def receive(self, packet: Packet) -> Contents:
        """The node says how much it knows, and what it has used itself."""
        for portion in packet.contents.portions:
            before = self._known.get(portion.node, Known(portion.incarnation, 0, None))
            if portion.since <= before.version < portion.version:
                self._known[portion.node] = Known(portion.incarnation, portion.version, 0)
        known = packet.contents.digest.get(self.name)
        if known is not None:
            self.taken = known.version
            self.version = max(self.version, self.taken)
        return Contents() if packet.is_reply else Contents(digest=self._digest())

    def _digest(self) -> dict[str, Known]:
        """The peers have told each other, too: the node need not pass on to one what another one told it."""
        return self._known | {pusher.name: Known(INCARNATION, pusher.version, 0) for pusher in self._pushers}

    def _portion(self, version: int) -> Portion:
        """The next users, one after the other."""
        now_ms = int(time.monotonic() * 1000)
        slice_ms = -(-METERS.window_ms // SLICES_PER_WINDOW)
        entries = [(version, 0, now_ms // slice_ms, place, version) for place in range(VIEW_PORTION_ENTRIES)]
        keys = [USERS[(version * VIEW_PORTION_ENTRIES + place) % len(USERS)] for place in range(VIEW_PORTION_ENTRIES)]
        return Portion(self.name, INCARNATION, version - 1, version, now_ms, Changes([METERS], keys, entries))


def _read_portions(packet: pb.Packet) -> Iterator[Portion]:
    """Whose they are, and of which versions."""
    for told in packet.portions:
        yield Portion(told.node, told.incarnation, told.since, told.version, told.now_ms, Changes([], [], []))


async def main(node: str, address: str, listen: list[str]) -> None:
    """Until standard input ends."""
    pushers: list[Pusher] = []
    everybody = []
    for number, own in enumerate(listen, 1):
        pusher = Pusher(f"peer{number}", pushers)
        cluster = ClusterSettings(own, own)
        peers = Peers(Settings(cluster=cluster), pusher.name, INCARNATION, pusher)
        await peers.start()
        peers.set_peers({node: address})
        pushers.append(pusher)
        everybody.append(peers)
    while not all(state.reachable for peers in everybody for state in peers.states()):  # noqa: ASYNC110 - no such event
        await asyncio.sleep(0.2)
    print("ready", flush=True)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    before = 0
    while words := (await reader.readline()).decode().split():
        taken = sum(pusher.taken for pusher in pushers)
        for pusher in pushers:
            pusher.count(float(words[1]) / len(pushers) if words[0] == "push" else 0.0)
        if words[0] == "idle":
            print((taken - before) * VIEW_PORTION_ENTRIES, flush=True)
        before = taken
    for peers in everybody:
        await peers.stop()


if __name__ == "__main__":
    with patch.object(speech, "read_portions", _read_portions):
        uvloop.run(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
