"""Nodes that tell another one how much their users have used: python -m tests.bench.pushing NODE ADDRESS LISTEN...

Each LISTEN (HOST:PORT) is a peer of its own, called peer1 and so on, with the real port and links of a node. Without
being told to, they only say that they are there. Lines on standard input:

    push RATE     tell so many updates of counters a second, all peers together, each to the node
    idle          no more; one line says how many were told, and how many of them the node has taken in

An update is a new amount of one of 10,000 users in the slice of now of a window of an hour.
"""

from __future__ import annotations

import asyncio
import sys
import time

import uvloop

from postmeter.core.meters import MetersId
from postmeter.core.view import Known, Portion
from postmeter.defaults import SLICES_PER_WINDOW, VIEW_PORTION_ENTRIES_MAX
from postmeter.link import Packet
from postmeter.packet import Contents
from postmeter.peers import Peers
from postmeter.settings import ClusterSettings, Settings

from .load import EVERYBODY

INCARNATION = 1
EXCHANGE_INTERVAL_MS = 200
METERS = MetersId("user-hour", "sasl_username", "recipients", 3_600_000)
USERS = [f"user{number:07}@dom{number % EVERYBODY.domains:04}.example.org" for number in range(EVERYBODY.users)]


class Pusher:
    """One peer: a Handler of postmeter.link. `rate` is in updates a second."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rate = 0.0
        self.version = 0
        self.taken = 0
        self._told_s = time.monotonic()

    def refusal(self, node: str) -> str:
        """Everybody is welcome."""
        return ""

    def news(self, node: str) -> Contents:
        """What has become due since the last time."""
        now_s = time.monotonic()
        due, self._told_s = int(self.rate * (now_s - self._told_s)), now_s
        portions = []
        while due > 0:
            portions.append(self._portion(min(due, VIEW_PORTION_ENTRIES_MAX)))
            due -= VIEW_PORTION_ENTRIES_MAX
        return Contents(digest=self._digest(), portions=portions)

    async def receive(self, packet: Packet) -> Contents:
        """The node says how much of it has arrived."""
        known = packet.contents.digest.get(self.name)
        if known is not None:
            self.taken = known.version
        return Contents() if packet.is_reply else Contents(digest=self._digest())

    def _digest(self) -> dict[str, Known]:
        return {self.name: Known(INCARNATION, self.version, 0)}

    def _portion(self, length: int) -> Portion:
        """The next users, one after the other."""
        since, now_ms = self.version, int(time.monotonic() * 1000)
        self.version += length
        slice_ms = -(-METERS.window_ms // SLICES_PER_WINDOW)
        entries = [
            (version, 0, now_ms // slice_ms, place, version)
            for place, version in enumerate(range(since + 1, self.version + 1))
        ]
        keys = [USERS[version % len(USERS)] for version, *_ in entries]
        return Portion(self.name, INCARNATION, since, self.version, now_ms, [METERS], keys, entries)


async def main(node: str, address: str, listen: list[str]) -> None:
    """Until standard input ends."""
    pushers = []
    for number, own in enumerate(listen, 1):
        pusher = Pusher(f"peer{number}")
        cluster = ClusterSettings(own, own, exchange_interval_ms=EXCHANGE_INTERVAL_MS)
        peers = Peers(Settings(cluster=cluster), pusher.name, INCARNATION, pusher)
        await peers.start()
        peers.set_peers({node: address})
        pushers.append(pusher)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    before = 0
    while words := (await reader.readline()).decode().split():
        for pusher in pushers:
            pusher.rate = float(words[1]) / len(pushers) if words[0] == "push" else 0.0
        if words[0] == "idle":
            # The last packets are on their way.
            await asyncio.sleep(5 * EXCHANGE_INTERVAL_MS / 1000)
            told, taken = sum(pusher.version for pusher in pushers), sum(pusher.taken for pusher in pushers)
            print(told - before, taken - before, flush=True)
            before = told


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
