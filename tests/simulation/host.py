"""One simulated node: the shipped core, a disk that survives crashes, and a clock of its own.

What is not the core's is kept as dumb as possible. A *fuse* counts effects (a transaction on the disk, a message, an
answer to a client) and kills the node when it has burnt down, so that a crash falls between any two of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING

from postmeter.core.effects import Answer, Message, Meter, Place, Ready, Record, Return, Standing
from postmeter.core.handover import STANDING
from postmeter.core.identity import Identity
from postmeter.core.invariants import Watch
from postmeter.core.meters import MetersId
from postmeter.core.policy import Policy, Repeats
from postmeter.core.request import Parser, Request
from postmeter.core.rights import Rights
from postmeter.core.roster import Roster
from postmeter.core.shared import SharedLedger, SharedMeters
from tests.simulation.allowed import Allowed
from tests.simulation.gossip import Exchange, Gossip, Turn

if TYPE_CHECKING:
    from tests.simulation.world import World


class Crashed(Exception):  # noqa: N818 - it is no error of the program
    """The power is off."""


@dataclass
class Disk:
    """What survives a crash."""

    incarnation: int
    records: dict[Place, Record]
    allowed: Allowed
    usage: dict[MetersId, dict[tuple[int, str], int]] = field(default_factory=dict)
    tolls_ms: list[int] = field(default_factory=list)
    clean: bool = True
    alive_ms: int = 0


@dataclass(slots=True)
class Waiting:
    """A client that waits for its node to borrow."""

    user: str
    amount: int
    until_ms: float
    asked_ms: float


_parser = Parser()


@cache
def request_of(user: str, amount: int) -> Request:
    """A message at the end of its data, with no instance: nobody takes it for a repeat."""
    lines = ["request=smtpd_access_policy", "protocol_state=END-OF-MESSAGE", "instance=", f"sasl_username={user}"]
    return _parser.parse("\n".join([*lines, f"recipient_count={amount}", "", ""]).encode())


class Host:
    """A node of a `World`. `rate` and `offset_ms` make its clock out of the true time."""

    def __init__(self, world: World, name: str, roster: Roster, rate: float, offset_ms: int) -> None:
        self.world = world
        self.name = name
        self.rate = rate
        self.offset_ms = offset_ms
        self.up = False
        self.paused_until_ms = 0.0
        self.mail: list[tuple[str, Message | Exchange | Turn]] = []
        self.fuse = -1
        self.next_tick_ms = 0.0
        self.waiting: list[Waiting] = []
        self.disk = Disk(0, {STANDING: roster.standing()}, world.allowed.copy())
        self.backup: Disk | None = None
        self.rights: Rights
        self.watch: Watch
        self.tended_ms = 0
        self.ledger: SharedLedger
        self.policy: Policy
        self.gossip: Gossip | None = None
        self.peers = set(roster.members) - {name}

    def now_ms(self) -> int:
        """The node's clock."""
        return int(self.offset_ms + self.rate * self.world.t_ms)

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin with what is on the disk."""
        registered = self.world.registered.get(self.name)
        if self.world.refuses(self.identity(), registered if self.world.sees_etcd(self.name) else None):
            self.world.note(f"{self.name} is refused: its state is old")
            return
        now_ms = self.now_ms()
        self.disk.incarnation += 1
        self.tended_ms = 0
        standing = self.disk.records[STANDING]
        assert isinstance(standing, Standing)
        self.ledger = SharedLedger(Roster.restore(standing), self.world.terms)
        self.ledger.tolls_ms = [at_ms for at_ms in self.disk.tolls_ms if now_ms - at_ms < 2 * self.world.window_ms_max]
        self.rights = self.world.make_rights(self.ledger, self.disk.incarnation, self.disk.records, self.disk.alive_ms)
        self.watch = Watch(self.rights)
        for id, usage in self.disk.usage.items():
            meters = self.ledger.restore(id)
            oldest = meters.oldest(now_ms)
            for (number, key), amount in usage.items():
                if number >= oldest:
                    meters.load(number, meters.keys.open(key), amount)
        self.up = True
        self.fuse = -1
        self.waiting.clear()
        self._set_limits(self.disk.allowed, now_ms)
        self._do(self.rights.start(now_ms, self.disk.clean))
        self.next_tick_ms = self.world.t_ms
        self.follow()
        if self.up and self.world.gossip_ms:
            self.gossip = Gossip(self)
            self.rights.committed_seen = self.gossip.committed.seen
            self.rights.used_seen = self.gossip.committed.used
        self.world.started(self)

    @property
    def generation(self) -> int:
        """The generation that it has adopted."""
        standing = self.disk.records[STANDING]
        assert isinstance(standing, Standing)
        return max(number for number, _ in standing.generations)

    def identity(self) -> Identity:
        """What the disk says."""
        return Identity(self.name, self.disk.incarnation, self.disk.alive_ms, "")

    def _set_limits(self, allowed: Allowed, now_ms: int) -> None:
        limits = allowed.limits(self.world.limits, self.world.overdraft)
        self.policy = Policy(limits, self.ledger, "end-of-message", Repeats())
        self.policy.apply_overrides(0, partial(self._changing, now_ms))

    def _changing(self, now_ms: int, id: MetersId, keys: Iterable[str | None]) -> None:
        self._do(self.rights.change(id, keys, now_ms))

    def crash(self) -> None:
        """Everything that is not on the disk is gone."""
        self.up = False
        self.fuse = -1
        self.gossip = None
        self.mail.clear()
        self.waiting.clear()
        self.paused_until_ms = 0

    def stop(self) -> None:
        """A clean stop."""
        self._guard(self._stop)
        if self.up:
            self.crash()

    def _stop(self) -> None:
        self._flush(clean=True)
        self._do(self.rights.stop(self.now_ms()))

    # --- what happens to it -------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """The node's own pace: flush, borrow ahead, tend."""
        self.next_tick_ms = self.world.t_ms + self.world.tick_ms
        self._guard(self._tick)

    def _tick(self) -> None:
        now_ms = self.now_ms()
        for meters, rows in self._flush():
            self._do(self.rights.replenish(meters, rows, now_ms))
        self.ledger.expire(now_ms, 500)
        self._do(self.rights.tend(now_ms))
        self.tended_ms = now_ms
        if self.gossip is not None:
            self.gossip.tend()
        self.waiting = [waiting for waiting in self.waiting if not self._gives_up(waiting)]

    def _gives_up(self, waiting: Waiting) -> bool:
        if waiting.until_ms > self.world.t_ms:
            return False
        self.world.refused(self, waiting.user, waiting.amount, waiting.asked_ms)
        return True

    def follow(self) -> None:
        """Look at etcd, if it can be seen."""
        if self.world.sees_etcd(self.name):
            self._guard(self._follow)

    def _follow(self) -> None:
        world, now_ms = self.world, self.now_ms()
        world.registered[self.name] = self.identity()
        self.peers = {*world.members} - {self.name, *world.stopped}
        if self.disk.allowed != world.allowed:
            self._follow_limits(world.allowed.copy(), now_ms)
        self._do(self.rights.follow(world.generations, world.stopped, now_ms))

    def _follow_limits(self, allowed: Allowed, now_ms: int) -> None:
        """As an agent does: overrides that change alone are put into the meters one by one."""
        before = self.disk.allowed
        if allowed.max != before.max:
            self._set_limits(allowed, now_ms)
        else:
            changes = allowed.overrides_since(before, self.world.limits)
            self.policy.change_overrides(changes, partial(self._changing, now_ms))
        self.world.leaves_behind(before)
        self.disk.allowed = allowed

    def hear(self, source: str, message: Message | Exchange | Turn) -> None:
        """A message arrives."""
        if isinstance(message, Exchange | Turn):
            gossip = self.gossip
            if gossip is not None:
                self._guard(lambda: gossip.hear(source, message))
        else:
            self._guard(lambda: self._hear(source, message))

    def _hear(self, source: str, message: Message) -> None:
        self._do(self.rights.receive(source, message, self.now_ms()))
        brings = isinstance(message, Return) or (isinstance(message, Answer) and message.amount)
        if self.waiting and (brings or self.world.patient):
            again, self.waiting = self.waiting, []
            for waiting in again:
                if not self._gives_up(waiting):
                    self._request(waiting)

    def send(self, user: str, amount: int) -> None:
        """A client sends a message to so many recipients."""
        t_ms = self.world.t_ms
        self._guard(lambda: self._request(Waiting(user, amount, t_ms + self.world.borrow_timeout_ms, t_ms)))

    def _request(self, waiting: Waiting) -> None:
        now_ms = self.now_ms()
        decision = self.policy.decide(request_of(waiting.user, waiting.amount), now_ms)
        if not decision.refused:
            if decision.held is not None:
                self._flush()
            self.burn()
            self.world.admitted(self, waiting.user, waiting.amount)
            return
        seeking = False
        for reading in decision.exceeded:
            if reading.refuses and not reading.hopeless:
                meter = (reading.meters.id, reading.key)
                self._do(self.rights.seek(meter, reading.amount, now_ms))
                seeking |= self.rights.is_seeking(meter)
        hopeless = any(reading.hopeless for reading in decision.exceeded)
        if seeking and not hopeless and waiting.until_ms > self.world.t_ms:
            self.waiting.append(waiting)
        else:
            self.world.refused(self, waiting.user, waiting.amount, waiting.asked_ms)

    def idle(self) -> None:
        """Nothing was charged for long: the state is marked clean."""
        self._guard(lambda: self._flush(clean=True))

    # --- effects ------------------------------------------------------------------------------------------------------

    def _guard(self, act: object) -> None:
        assert callable(act)
        try:
            act()
        except Crashed:
            self.world.note(f"{self.name} crashes")
            self.crash()
        self.world.acted.add(self)

    def burn(self) -> None:
        """One effect is about to happen; or the power fails before it."""
        if self.fuse == 0:
            raise Crashed
        if self.fuse > 0:
            self.fuse -= 1

    def _do(self, ready: Ready) -> None:
        if ready.persist:
            self.persist(ready)
        if ready.send:
            self.send_all(ready)

    def send_all(self, ready: Ready) -> None:
        """Each message is an effect."""
        self.world.count_packets(self.name, ready.send)
        for to, message in ready.send:
            self.burn()
            self.world.post(self.name, to, message)

    def persist(self, ready: Ready) -> None:
        """One transaction."""
        self.burn()
        for where, record in ready.persist:
            if record is None:
                self.disk.records.pop(where, None)
            else:
                self.disk.records[where] = record
        self._sign_of_life()

    def _sign_of_life(self) -> None:
        if self.rights.confirmed:
            self.disk.alive_ms = self.now_ms()

    def _flush(self, clean: bool = False) -> list[tuple[SharedMeters, set[int]]]:
        """Bring usage to the disk. Returns the rows that were charged."""
        charged = []
        taken = [(meters, meters.take_unflushed()) for meters in self.ledger.meters.values()]
        if clean or any(batches for _, batches in taken):
            self.burn()
            self.disk.clean = clean
            self.disk.tolls_ms = list(self.ledger.tolls_ms)
            self._sign_of_life()
            self.ledger.answer_unflushed = not clean
        for meters, batches in taken:
            stored = self.disk.usage.setdefault(meters.id, {})
            charged_rows = {row for batch in batches for row in batch.rows}
            for row in charged_rows:
                key = meters.keys.names[row]
                if key is not None:
                    stored.update(((number, key), amount) for number, amount in meters.slices(row, self.now_ms()))
            meters.flushed(batches)
            if self.gossip is not None:
                for batch in batches:
                    self.gossip.count(meters, batch.slice, batch.rows)
            if batches:
                assert isinstance(meters, SharedMeters)
                charged.append((meters, charged_rows))
        return charged

    def back_up(self) -> None:
        """Copy the disk."""
        self.backup = copy.deepcopy(self.disk)

    def restore_backup(self) -> None:
        """Start from the copy, if the node has registered since."""
        registered = self.world.registered.get(self.name)
        if self.up or self.backup is None or registered is None or not self.world.sees_etcd(self.name):
            return
        if (self.backup.incarnation, self.backup.alive_ms) < (registered.incarnation, registered.written_ms):
            kept, self.disk = self.disk, copy.deepcopy(self.backup)
            self.start()
            if not self.up:
                self.disk = kept

    def has_rights(self, meter: Meter) -> bool:
        """Whether usage is within the allowance, as a closer look shows: a decision compares one column."""
        meters, now_ms = self.ledger.shared(meter[0]), self.now_ms()
        assert meters is not None
        return meters.usage(meters.row_of(meter[1]), now_ms) <= meters.allowance(meter[1], now_ms)

    def check(self) -> None:
        """Nothing contradicts itself, in memory and on the disk."""
        self.watch.check(self.tended_ms)
        records, owed = self.disk.records, self.rights.owed
        lent = {id: lent for book in self.rights.books.values() for id, lent in book.lent.items()}
        assert lent.items() <= records.items(), f"{self.name}: what is lent is not on the disk"
        assert owed.items() <= records.items(), f"{self.name}: what is owed is not on the disk"
        changed = sum(len(meters.before) for meters in self.ledger.meters.values() if isinstance(meters, SharedMeters))
        assert len(records) <= 1 + len(lent) + len(owed) + changed, f"{self.name}: the disk keeps more"
