"""What coordination costs, by number of nodes, for senders who stay and senders who roam.

40 senders may use 200 in an hour. Of every ten, one wants more than that, two want half of it, seven a twentieth.
`busy`: ten senders who all want more than their max, the worst case. A packet is what one step of a node says to
another one at once; an agent sends no more than that.

Gossip has two costs. Digests are exchanged at a fixed pace, however much mail there is: bytes per node and second.
What was used goes to every other node: bytes per admitted message, as an agent encodes them. Here some three messages a
second are admitted in the whole cluster; the more there are, the more they share of the names that go with them. A
round is EXCHANGE_INTERVAL_MS; counted are the rounds from the last message until every node knows of it and all before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import Pool
from random import Random

from postmeter.core.effects import Message
from postmeter.core.view import Digest, Portion
from postmeter.defaults import EXCHANGE_INTERVAL_MS, EXCHANGE_PEERS
from postmeter.packet import Draft, Head
from tests.simulation.gossip import Exchange
from tests.simulation.script import Step, play
from tests.simulation.world import Setting, World

NODES = (2, 3, 5, 10, 30, 100)
WAYS = ("sticky", "roaming", "sticky busy", "roaming busy")
WINDOW_MS = 3_600_000
MAX = 200
WANTED = (1.3, 0.5, 0.5, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05)
ROUNDS_MAX = 30
ENCODED_PART = 8
"""One of so many exchanges is encoded, to know its length."""


@dataclass(frozen=True)
class Cost:
    """Counts of one run."""

    nodes: int
    way: str
    seconds: float
    admitted: int
    asks: int
    packets: int
    messages: int
    exchanges: int
    digest_bytes: int
    entry_bytes: int
    rounds: int

    def __str__(self) -> str:
        per, node_s = max(1, self.admitted), self.nodes * self.seconds
        return (
            f"{self.nodes:5}  {self.way:12} {self.admitted:8,} {1000 * self.asks / per:10.0f}"
            f" {self.packets / per:11.2f} {self.messages / per:9.2f} {self.entry_bytes / per:11.0f}"
            f" {self.exchanges / node_s:13.1f} {self.digest_bytes / node_s:11.0f} {self.rounds:8}"
        )


HEADING = """\
                              per 1,000            per admitted message       gossip, node and second   rounds until
nodes  senders      admitted  loan requests  packets messages gossip bytes     messages digest bytes  all agree"""


class CostWorld(World):
    """Measures what is exchanged."""

    gossip_peers_max = EXCHANGE_PEERS

    def __init__(self, setting: Setting) -> None:
        self.digest_bytes = 0
        self.entry_bytes = 0
        super().__init__(setting)

    def post(self, source: str, to: str, message: Message | Exchange) -> None:
        """A message goes on its way."""
        super().post(source, to, message)
        if isinstance(message, Exchange) and self._posted % ENCODED_PART == 0:
            digest_bytes = encoded_bytes(source, to, message.digest, [])
            self.digest_bytes += ENCODED_PART * digest_bytes
            if message.portions:
                whole_bytes = encoded_bytes(source, to, message.digest, message.portions)
                self.entry_bytes += ENCODED_PART * (whole_bytes - digest_bytes)

    def rounds_until_all_agree(self) -> int:
        """How many rounds it takes until everybody knows what everybody knows of itself now."""
        views = {name: host.gossip.view for name, host in self.hosts.items() if host.gossip is not None}
        told = {name: view.digest(0)[name].version for name, view in views.items()}
        for rounds in range(ROUNDS_MAX):
            digests = [view.digest(0) for view in views.values()]
            if all(name in digest and digest[name].version >= told[name] for digest in digests for name in told):
                return rounds
            self.advance(self.gossip_ms)
        return ROUNDS_MAX


def encoded_bytes(source: str, to: str, digest: Digest, portions: list[Portion]) -> int:
    """How long a packet of this is."""
    draft = Draft(Head(f"mail-{source}", f"mail-{to}", 1, "1.0.0", 1_700_000_000_000))
    draft.add_digest(digest)
    for portion in portions:
        draft.add_portion(portion)
    return len(draft.finish())


def measure(nodes: int, way: str, senders: int = 40, windows: float = 1.5) -> Cost:
    """`way` is sticky or roaming, and busy or not."""
    random = Random(nodes)
    limits = (("user", "sasl_username", WINDOW_MS, MAX),)
    world = CostWorld(Setting(nodes, limits, WINDOW_MS // 4, 1_000, 0, 500, 250, 1, 0, 0, 1, EXCHANGE_INTERVAL_MS))
    names, users = list(world.hosts), [f"user{number}@a" for number in range(10 if "busy" in way else senders)]
    weights = [1.3 if "busy" in way else WANTED[number % len(WANTED)] for number in range(len(users))]
    homes = {user: random.choice(names) for user in users}
    total = int(sum(weights) * MAX * windows)
    for _ in range(total):
        user = random.choices(users, weights)[0]
        name = homes[user] if "sticky" in way else random.choice(names)
        world.advance(random.expovariate(total / (WINDOW_MS * windows)))
        play(world, Step(0, "send", (name, user, "1")))
    counts, seconds = world.totals.copy(), world.t_ms / 1000
    sizes = world.digest_bytes, world.entry_bytes
    messages = sum(counts[name] for name in ("Ask", "Answer", "Offer", "Renew", "Return", "Returned"))
    world.advance(world.tick_ms)
    return Cost(
        nodes,
        way,
        seconds,
        counts["admitted"],
        counts["Ask"],
        counts["packets"],
        messages,
        counts["Exchange"],
        *sizes,
        world.rounds_until_all_agree(),
    )


def measure_all(nodes: Iterable[int], jobs: int) -> Iterator[Cost]:
    """Clusters of these sizes, in all ways, on so many processes."""
    with Pool(jobs) as pool:
        yield from pool.imap(_measure, [(size, way) for size in nodes for way in WAYS])


def _measure(args: tuple[int, str]) -> Cost:
    return measure(*args)
