"""What coordination costs: messages between nodes by number of nodes, for senders who stay and senders who roam.

40 senders may use 200 in ten minutes. Of every ten, one wants more than that, two want half of it, seven a twentieth.
`busy`: ten senders who all want more than their max, the worst case. A packet is what one step of a node says to
another one at once; an agent sends no more than that.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from postmeter.core.effects import Meter
from postmeter.core.meters import MetersId
from tests.simulation.script import Step, play
from tests.simulation.world import Setting, World

NODES = (2, 3, 5, 10, 30, 100)
WINDOW_MS = 600_000
MAX = 200
WANTED = (1.3, 0.5, 0.5, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05)


@dataclass(frozen=True)
class Cost:
    """Counts of one run."""

    nodes: int
    way: str
    admitted: int
    asks: int
    packets: int
    messages: int

    def __str__(self) -> str:
        per = max(1, self.admitted)
        return (
            f"{self.nodes:4} nodes, {self.way:14} {self.admitted:6,} admitted, {1000 * self.asks / per:6.0f} asked per"
            f" 1,000, {self.packets / per:5.2f} packets and {self.messages / per:5.2f} messages per admitted one"
        )


class SeeingWorld(World):
    """What a node sees of others' usage is a second old: the gossip."""

    def committed_seen(self, id: MetersId, key: str) -> dict[str, int]:
        """What each node had used or lent, less what it had borrowed."""
        if self.t_ms >= self._seen_until_ms:
            self._seen.clear()
            self._seen_until_ms = self.t_ms + 1_000
        if (id, key) not in self._seen:
            self._seen[id, key] = self._look(id, key)
        return self._seen[id, key]

    _seen_until_ms = 0.0
    _seen: dict[Meter, dict[str, int]]

    def _look(self, id: MetersId, key: str) -> dict[str, int]:
        usage = {}
        for host in self.hosts.values():
            meters = host.ledger.meters[id]
            row = meters.keys.rows.get(key)
            if row is not None:
                meters.usage(row, host.now_ms())
                usage[host.name] = meters.used[row]
        return usage


def measure(nodes: int, way: str, senders: int = 40, windows: float = 1.5) -> Cost:
    """`way` is sticky or roaming, and busy or not."""
    random = Random(nodes)
    limits = (("user", "sasl_username", WINDOW_MS, MAX),)
    world = SeeingWorld(Setting(nodes, limits, WINDOW_MS // 4, 1_000, 0, 2_000, 250, 1, 0, 0, 1))
    world._seen = {}
    for host in world.hosts.values():
        host.rights.committed_seen = world.committed_seen
    names, users = list(world.hosts), [f"user{number}@a" for number in range(senders)]
    weights = [1.3 if "busy" in way else WANTED[number % len(WANTED)] for number in range(senders)]
    homes = {user: random.choice(names) for user in users}
    total = int(sum(weights) * MAX * windows)
    for _ in range(total):
        user = random.choices(users, weights)[0]
        name = homes[user] if "sticky" in way else random.choice(names)
        world.advance(random.expovariate(total / (WINDOW_MS * windows)))
        play(world, Step(0, "send", (name, user, "1")))
    counts = world.totals
    messages = sum(counts[name] for name in ("Ask", "Answer", "Offer", "Renew", "Return", "Returned"))
    return Cost(nodes, way, counts["admitted"], counts["Ask"], counts["packets"], messages)
