"""Everything around the nodes: true time, the network, etcd, and the one who counts.

The count is as dumb as it can be: every admitted message with its true time, added up over the last window. It knows
nothing of rights. `Broken` is raised when it exceeds the largest `max` in force.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from heapq import heapify, heappop, heappush
from random import Random
from typing import NamedTuple

from postmeter.core.effects import Message, Meter, Place, Record, Send
from postmeter.core.identity import Identity, refusal
from postmeter.core.invariants import check_cluster
from postmeter.core.meters import UNLIMITED, MetersId
from postmeter.core.rights import Rights
from postmeter.core.roster import Members, Roster
from postmeter.core.shared import SharedLedger, Terms
from tests.simulation.allowed import Allowed
from tests.simulation.gossip import Exchange, Turn
from tests.simulation.host import Host

THOROUGH_EVERY = 10
"""So many checks after one another look at what was charged; then one looks at everything."""


class Broken(AssertionError):  # noqa: N818 - it is what the simulator looks for
    """A guarantee does not hold."""


class Setting(NamedTuple):
    """What a world begins with. Times in ms; `limits` maps a name to (attribute, window, max)."""

    nodes: int
    limits: tuple[tuple[str, str, int, int], ...]
    lifetime_ms: int
    drift_ppm: int
    overdraft: float
    tick_ms: int
    borrow_timeout_ms: int
    delay_ms: int
    loss: float
    twice: float
    seed: int
    gossip_ms: int = 0
    """How often views are exchanged; 0: never, and nodes know nothing of each other's usage."""


class World:
    """A cluster and its surroundings. `patient`: clients who wait are tried again after every message."""

    rights_class = Rights
    patient = False
    gossip_peers_max = 2

    def __init__(self, setting: Setting, story: list[str] | None = None) -> None:
        self.setting = setting
        self.random = Random(setting.seed)
        self.t_ms = 0.0
        self.story = story
        self.limits = {name: (attribute, window_ms) for name, attribute, window_ms, _ in setting.limits}
        self.allowed = Allowed({name: max for name, _, _, max in setting.limits})
        self.window_ms_max = max(window_ms for _, window_ms in self.limits.values())
        self.terms = Terms(setting.lifetime_ms, setting.drift_ppm, 5, 1 << 20, max(250, setting.lifetime_ms // 4))
        self.overdraft, self.tick_ms = setting.overdraft, setting.tick_ms
        self.borrow_timeout_ms = setting.borrow_timeout_ms
        self.delay_ms, self.loss, self.twice = setting.delay_ms, setting.loss, setting.twice
        self.gossip_ms = setting.gossip_ms
        # etcd
        names = tuple(f"n{number}" for number in range(1, setting.nodes + 1))
        self.generations: dict[int, Members] = {1: names}
        self._kept = 1
        self.stopped: list[str] = []
        self.registered: dict[str, Identity] = {}
        # the network
        self.cuts: set[tuple[str, str]] = set()
        self._wire: list[tuple[float, int, str, str, Message | Exchange | Turn]] = []
        self._posted = 0
        self._packets: set[tuple[float, str, str]] = set()
        # the count
        self.counts: dict[Meter, deque[tuple[float, int]]] = {}
        self.sums: Counter[Meter] = Counter()
        self.near = self.full = False
        self._earlier: list[tuple[str, Allowed, float]] = []
        self.totals: Counter[str] = Counter()
        self._meters: dict[str, list[Meter]] = {}
        self._touched: set[Meter] = set()
        self._checks = 0
        self.acted: set[Host] = set()
        self.hosts: dict[str, Host] = {}
        for name in names:
            self._add(name, 0)
        self.settle()

    def _add(self, name: str, born: int) -> None:
        drift = self.terms.drift_ppm / 1e6
        rate = 1 + self.random.choice((-drift, drift, self.random.uniform(-drift, drift)))
        offset_ms = self.random.randrange(1_000_000)
        # It learns of the stopped nodes now, by its own clock.
        stopped = dict.fromkeys(self.stopped, int(offset_ms + rate * self.t_ms))
        generations = {number: members for number, members in self.generations.items() if number >= self._kept}
        self.hosts[name] = Host(self, name, Roster(name, generations, born, stopped), rate, offset_ms)
        self.hosts[name].start()

    def make_rights(
        self, ledger: SharedLedger, incarnation: int, records: Mapping[Place, Record], alive_ms: int
    ) -> Rights:
        """The rights of a node that starts."""
        return self.rights_class(ledger, incarnation, records, alive_ms)

    def started(self, host: Host) -> None:
        """A node has started."""

    # --- etcd ---------------------------------------------------------------------------------------------------------

    def sees_etcd(self, name: str) -> bool:
        """Whether a node reaches etcd."""
        return (name, "etcd") not in self.cuts

    def refuses(self, stored: Identity, registered: Identity | None) -> str:
        """Why a node must not start from its disk."""
        return refusal(stored, "", registered, False)

    @property
    def members(self) -> Members:
        """The newest generation."""
        return self.generations[max(self.generations)]

    def _propose(self, members: Iterable[str]) -> None:
        """One more generation. Who joins hears of those before only while no member is settled."""
        if self._is_settled():
            self._kept = max(self.generations)
        self.generations[max(self.generations) + 1] = tuple(sorted(members))

    def _is_settled(self) -> bool:
        """Whether some member says that nobody can be spending by a generation before the newest."""
        up = [host for host in self.hosts.values() if host.up and host.generation == max(self.generations)]
        return any(host.name in self.members and host.rights.is_settled(host.now_ms()) for host in up)

    def join(self, name: str) -> None:
        """A new node comes into the roster."""
        if name in self.hosts or len(self.members) >= 5:
            return
        self._propose((*self.members, name))
        self._add(name, max(self.generations) - 1)

    def drain(self, name: str) -> None:
        """The operator takes a living node out of the roster."""
        if name in self.members and len(self.members) > 1:
            self._propose(member for member in self.members if member != name)

    def remove(self, name: str) -> None:
        """The machine is down, the operator says so."""
        if name in self.members and len(self.members) > 1 and not self._knows_last_of_who_leaves(name):
            self.hosts[name].crash()
            self.stopped.append(name)
            # It may come back for a moment without seeing etcd, and go by the limits that it has.
            self.leaves_behind(self.hosts[name].disk.allowed)
            self._propose(member for member in self.members if member != name)

    def _knows_last_of_who_leaves(self, name: str) -> bool:
        """Whether nobody would be left who can tell a newcomer of a node that was drained and has not followed.

        Here nodes join at any time. In the product none does while there is such a node (roster_document.py).
        """
        dropped = {
            number: host
            for number, members in self.generations.items()
            for host in map(self.hosts.__getitem__, set(self.generations.get(number - 1, ())) - set(members))
            if host.name not in self.stopped and host.generation < number
        }
        return any(
            not any(other not in (*self.stopped, name, host.name) for other in self.generations[number])
            for number, host in dropped.items()
        )

    # --- time and the network -----------------------------------------------------------------------------------------

    def post(self, source: str, to: str, message: Message | Exchange) -> None:
        """A message goes on its way: none, one or two arrive."""
        random = self.random
        self.totals[type(message).__name__] += 1
        copies = 1
        if self.loss and random.random() < self.loss:
            copies = 0
        elif self.twice and random.random() < self.twice:
            copies = 2
        for copy in range(copies):
            delay_ms = 1 + random.random() * self.delay_ms
            if copy or (self.twice and random.random() < 0.03):
                delay_ms *= random.choice((1, 3, 30, 100))
            self._posted += 1
            heappush(self._wire, (self.t_ms + delay_ms, self._posted, source, to, message))

    def remind(self, name: str, turn: Turn, after_ms: float) -> None:
        """Give it back to the node after a while."""
        self._posted += 1
        heappush(self._wire, (self.t_ms + after_ms, self._posted, name, name, turn))

    def count_packets(self, source: str, sends: list[Send]) -> None:
        """What one node says to another at one moment travels together."""
        packets = {(self.t_ms, source, send.to) for send in sends}
        self.totals["packets"] += len(packets - self._packets)
        self._packets = {packet for packet in self._packets | packets if packet[0] == self.t_ms}

    def advance(self, by_ms: float) -> None:
        """Let time pass: deliver what arrives, and let nodes tick."""
        until_ms = self.t_ms + by_ms
        while True:
            tick_ms, ticking = until_ms, None
            for host in self.hosts.values():
                if host.up and host.next_tick_ms < tick_ms:
                    tick_ms, ticking = host.next_tick_ms, host
            if self._wire and self._wire[0][0] <= tick_ms:
                at_ms, _, source, to, message = heappop(self._wire)
                self.t_ms = max(self.t_ms, at_ms)
                self._deliver(source, to, message)
            elif ticking is not None:
                self.t_ms = max(self.t_ms, tick_ms)
                self._tick(ticking)
            else:
                break
        self.t_ms = until_ms

    @property
    def under_way_ms(self) -> float:
        """How long until the last message that is under way arrives."""
        return max((at_ms for at_ms, *_, message in self._wire if not isinstance(message, Turn)), default=0) - self.t_ms

    def skip(self, by_ms: float) -> None:
        """Much later: nothing is under way, and nothing has happened meanwhile."""
        self._wire = [posted for posted in self._wire if isinstance(posted[4], Turn)]
        heapify(self._wire)
        self.t_ms += by_ms

    def _deliver(self, source: str, to: str, message: Message | Exchange | Turn) -> None:
        host = self.hosts.get(to)
        if host is None or not host.up or (source, to) in self.cuts:
            return
        if host.paused_until_ms > self.t_ms:
            host.mail.append((source, message))
            return
        if self.story is not None and not isinstance(message, Turn):
            self.note(f"  {to} hears {source}: {tell(message)}")
        host.hear(source, message)

    def _tick(self, host: Host) -> None:
        if host.paused_until_ms > self.t_ms:
            host.next_tick_ms = host.paused_until_ms
            return
        mail, host.mail = host.mail, []
        for source, message in mail:
            if host.up:
                host.hear(source, message)
        if host.up:
            host.tick()
        if host.up and self.random.random() < 0.5:
            host.follow()

    def settle(self) -> None:
        """Let the nodes see etcd once."""
        for host in self.hosts.values():
            if host.up:
                host.follow()

    # --- the count ----------------------------------------------------------------------------------------------------

    def meters_of(self, user: str) -> list[Meter]:
        """What a message of the user is counted on."""
        if user not in self._meters:
            keys = {"sasl_username": user, "sasl_domain": user.partition("@")[2]}
            self._meters[user] = [
                (MetersId(name, attribute, "recipients", window_ms), keys[attribute])
                for name, (attribute, window_ms) in self.limits.items()
            ]
        return self._meters[user]

    def admitted(self, host: Host, user: str, amount: int) -> None:
        """A node let a message through."""
        self.totals["admitted"] += 1
        self.note(f"  {host.name} admits {user} {amount}")
        for meter in self.meters_of(user):
            assert host.has_rights(meter), f"{host.name} admits {meter[1]} beyond its allowance"
            self._touched.add(meter)
            self._count(meter, amount)

    def refused(self, host: Host, user: str, amount: int, asked_ms: float) -> None:
        """A node refused a message, `asked_ms` is when the client came."""
        self.totals["refused"] += 1
        self.note(f"  {host.name} refuses {user} {amount}")

    def leaves_behind(self, allowed: Allowed) -> None:
        """No node goes by these limits any more: what it admitted and lent by them stays for a while."""
        for name, (_, window_ms) in self.limits.items():
            wait_ms = self.terms.longest_wait_ms(window_ms)
            self._earlier.append((name, allowed, self.t_ms + wait_ms * (1 + 2 * self.terms.drift_ppm / 1e6)))

    def cap(self, meter: Meter) -> int:
        """The largest `max` in force: at any node, or by which something may have been admitted within the window.

        A node that was declared stopped may come back, not see etcd, and still take a key for unlimited.
        """
        self._earlier = [earlier for earlier in self._earlier if earlier[2] > self.t_ms]
        values = [allowed.max_of(meter) for name, allowed, _ in self._earlier if name == meter[0].limit]
        for host in self.hosts.values():
            max_there = host.disk.allowed.max_of(meter)
            if host.name not in self.stopped or max_there >= UNLIMITED:
                values.append(max_there)
        return int(max([self.allowed.max_of(meter), *values]) * (1 + self.overdraft))

    def _count(self, meter: Meter, amount: int) -> None:
        """Raise Broken if the window that ends now has more than its cap."""
        window = self.counts.setdefault(meter, deque())
        window.append((self.t_ms, amount))
        self.sums[meter] += amount
        while window[0][0] <= self.t_ms - meter[0].window_ms:
            self.sums[meter] -= window.popleft()[1]
        used, cap, now_max = self.sums[meter], self.cap(meter), self.allowed.max_of(meter)
        if used > cap:
            raise Broken(f"{meter[0].limit} / {meter[1]}: {used} admitted within a window, the cap is {cap}")
        self.near |= 10 * used >= 9 * now_max > 0
        self.full |= used == now_max

    def check(self) -> None:
        """Raise AssertionError if two nodes have the same right on a meter that was charged since the last check.

        Now and then, because that takes longer: all meters, and the nodes, each for itself.
        """
        if not self.acted:
            return
        self._checks += 1
        thorough = not self._checks % THOROUGH_EVERY
        nodes = {host.name: (host.rights, host.now_ms()) for host in self.hosts.values() if host.up}
        if thorough:
            self._touched.update(*(host.rights.books for host in self.hosts.values() if host.up))
        check_cluster(nodes, self._touched, {meter: self.cap(meter) for meter in self._touched})
        self._touched.clear()
        if not thorough:
            return
        for host in self.acted:
            if host.up:
                host.check()
        self.acted.clear()

    def note(self, line: str) -> None:
        """Tell what happens, if somebody wants to know."""
        if self.story is not None:
            self.story.append(f"{self.t_ms:8.0f} {line}")


def tell(message: Message | Exchange) -> str:
    """A message in short."""
    fields = [name for name in ("amount", "returned", "generation", "asked_ms", "step") if hasattr(message, name)]
    loan = getattr(message, "loan", None)
    about = f" {loan.borrower}.{loan.incarnation}.{loan.number}" if loan is not None else ""
    return f"{type(message).__name__}{about} " + " ".join(f"{name}={getattr(message, name)}" for name in fields)
