"""The node's part in the cluster: rights, what others say about theirs and about usage, and who waits for them.

    begin(roster, ...)          from when on this node takes part
    wants(decision, now_ms)     ask peers for the rights that a refused request lacks, and `wait` for them
    follow(...), change(...)    the roster has changed; the limits are about to
    charged(...)                what was charged, for the others to know, and to borrow ahead of need

Peers talk to it as link.Handler says. Every step of the core returns what must be stored and what is to be said:
`RecordKeeper` sees to both, in that order. What a peer is answered waits for the disk in the same way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import NoReturn

from postmeter.clock import Clock
from postmeter.core.committed import Committed
from postmeter.core.effects import Message, Meter, Place, Ready, Record, Send
from postmeter.core.meters import Meters, MetersId
from postmeter.core.policy import Decision
from postmeter.core.rights import Rights
from postmeter.core.roster import Members, Roster
from postmeter.core.shared import SharedLedger, SharedMeters
from postmeter.core.view import Digest, View
from postmeter.defaults import (
    BOOKS_LOOKED_AT_MAX,
    COMMITTED_INTERVAL_S,
    EXPIRE_ENTRIES_MAX,
    EXPIRE_PAUSE_S,
    FLUSH_ROWS_MAX,
    HEAR_MESSAGES_MAX,
    ISOLATED_S,
    RESUME_MAX,
    TEND_INTERVAL_S,
    TIDY_INTERVAL_S,
    WAITING_MAX,
)
from postmeter.link import Packet
from postmeter.packet import Contents
from postmeter.peer_port import Service
from postmeter.peers import Peers
from postmeter.record_keeper import RecordKeeper
from postmeter.settings import Settings
from postmeter.storage import Storage

Wanted = tuple[Meter, int]
"""A meter, and the amount that is to be charged on it."""


@dataclass(slots=True)
class _Waiting:
    """`resume` is called when `amount` could be charged, when that cannot be hoped for, and when the time is over."""

    amount: int
    resume: Callable[[], None]
    timer: asyncio.TimerHandle


class Cluster:
    """To `begin`, and to `run` in a task. Until it has begun `rights` is None, and nothing can be charged.

    `services` are called to add others to the port of the peers. `settled` is whether this node's shares are what they
    are to be after changes of the roster; `on_settled` is called when that changes.
    """

    def __init__(
        self,
        settings: Settings,
        ledger: SharedLedger,
        storage: Storage,
        clock: Clock,
        on_health: Callable[[str, str], None],
    ) -> None:
        assert settings.cluster is not None
        self.settings = settings.cluster
        self.rights: Rights | None = None
        self.view: View | None = None
        self.peers: Peers | None = None
        self.services: list[Service] = []
        self.settled = False
        self.on_settled: Callable[[], None] = lambda: None
        self._committed: Committed | None = None
        self._node_settings = settings
        self._ledger = ledger
        self._clock = clock
        self._on_health = on_health
        self._keeper = RecordKeeper(storage, clock, self._transmit, self._storage_changed, self.alive_ms)
        self._announced: Mapping[int, Members] = {}
        self._digests: dict[str, Digest] = {}
        self._waiting: dict[Meter, dict[int, _Waiting]] = {}
        self._waiting_count = self._waiting_number = 0
        self._reached_s = 0.0
        self._begun = asyncio.Event()
        self._peers_reason = "none has been reached yet"

    async def begin(
        self, roster: Roster, incarnation: int, records: Mapping[Place, Record], alive_ms: int, clean: bool
    ) -> None:
        """Take part, as the node of this roster. Raises ConfigError if peers cannot be listened to."""
        self.peers = Peers(self._node_settings, roster.node, incarnation, self, services=self.services)
        await self.peers.start()
        self._ledger.roster = roster
        self.view = View(roster.node, incarnation)
        self._ledger.total_seen = self.view.total
        self.rights = Rights(self._ledger, incarnation, records, alive_ms)
        self._committed = Committed(self.view)
        self.rights.committed_seen, self.rights.used_seen = self._committed.seen, self._committed.used
        self._keeper.carry_out(self.rights.start(self._clock.now_ms(), clean))
        self._reached_s = asyncio.get_running_loop().time()
        self._begun.set()

    async def stop(self) -> None:
        """Let peers hear no more of this node, and keep what is borrowed for the next start. `run` still runs."""
        if self.peers is not None and self.rights is not None:
            await self.peers.stop()
            self._keeper.carry_out(self.rights.stop(self._clock.now_ms()))
            await self._keeper.durable()

    def follow(
        self, generations: Mapping[int, Members], stopped: Iterable[str], addresses: Mapping[str, str], read_ms: int
    ) -> None:
        """The roster as it was in etcd at `read_ms` or later, and where nodes can be reached."""
        assert self.rights is not None
        self._announced = generations
        assert self.peers is not None
        self._keeper.carry_out(self.rights.follow(generations, stopped, self._clock.now_ms(), read_ms))
        self.peers.set_peers({node: at for node, at in addresses.items() if at and not self.refusal(node)})

    def change(self, id: MetersId, keys: Iterable[str | None]) -> None:
        """The `max` of these keys is about to be changed; None: of all that have none of their own."""
        if self.rights is not None:
            self._keeper.carry_out(self.rights.change(id, keys, self._clock.now_ms()))

    def charged(self, meters: Meters, slice: int, rows: list[int], amounts: list[int]) -> None:
        """These rows have been charged, and have so much in a slice by now."""
        if self.rights is None or self.view is None or not isinstance(meters, SharedMeters):
            return
        self._count(meters, slice, rows, amounts)
        self._keeper.carry_out(self.rights.replenish(meters, rows, self._clock.now_ms()))

    def _count(self, meters: Meters, slice: int, rows: list[int], amounts: list[int]) -> None:
        assert self.view is not None
        names = meters.keys.names
        sums = [(name, amount) for row, amount in zip(rows, amounts, strict=True) if (name := names[row]) is not None]
        self.view.count(meters.id, slice, sums, self._clock.now_ms())

    async def _count_all(self) -> None:
        """Tell what was used before this run."""
        for meters in list(self._ledger.meters.values()):
            for number in list(meters.numbers):
                rows = list(meters.rows(number))
                for start in range(0, len(rows), FLUSH_ROWS_MAX):
                    portion = rows[start : start + FLUSH_ROWS_MAX]
                    self._count(meters, number, portion, meters.sums(number, portion))
                    await asyncio.sleep(0)

    # --- the disk -----------------------------------------------------------------------------------------------------

    def alive_ms(self) -> int | None:
        """Now, if this node has seen since its start that it is in the roster."""
        return self._clock.now_ms() if self.rights is not None and self.rights.confirmed else None

    async def sign_of_life(self) -> int:
        """Store what time it is. Returns the time of the last entry on the disk."""
        return await self._keeper.sign_of_life()

    def _storage_changed(self, reason: str) -> None:
        self._on_health("storage", reason)

    def _transmit(self, sends: Iterable[Send]) -> None:
        by_node: dict[str, list[Message]] = {}
        for node, message in sends:
            by_node.setdefault(node, []).append(message)
        for node, messages in by_node.items():
            if self.peers is not None:
                self.peers.send(node, messages)

    def moved(self, id: MetersId, key: str) -> tuple[int, int]:
        """What this node has lent, and what it has borrowed, of a meter."""
        book = self.rights.books.get((id, key)) if self.rights is not None else None
        return (book.lent_sum, book.borrowed_sum) if book is not None else (0, 0)

    @property
    def may_borrow(self) -> bool:
        """Whether there is anybody who could lend something."""
        return self.rights is not None and self._ledger.spends and len(self.rights.roster.members) > 1

    def moved_parts(self) -> tuple[float, float]:
        """What is lent, and what is borrowed, as parts of this node's base shares of the meters where rights moved."""
        lent = borrowed = base = 0
        books = self.rights.books if self.rights is not None else {}
        for (id, key), book in islice(books.items(), BOOKS_LOOKED_AT_MAX):
            meters = self._ledger.shared(id)
            if meters is not None:
                lent, borrowed, base = lent + book.lent_sum, borrowed + book.borrowed_sum, base + meters.base(key)
        return lent / max(1, base), borrowed / max(1, base)

    # --- requests that wait for rights --------------------------------------------------------------------------------

    def wants(self, decision: Decision, now_ms: int) -> Wanted | None:
        """Ask peers for what a refused request lacks. Returns what to wait for; None if that is in vain."""
        lacking = [reading for reading in decision.exceeded if reading.refuses]
        if self.rights is None or any(reading.hopeless for reading in lacking) or self._waiting_count >= WAITING_MAX:
            return None
        wanted = [((reading.meters.id, reading.key), reading.amount) for reading in lacking]
        for meter, amount in wanted:
            self._keeper.carry_out(self.rights.seek(meter, amount, now_ms))
        return wanted[0] if all(self.rights.is_seeking(meter) for meter, _ in wanted) else None

    def wait(self, wanted: Wanted, timeout_ms: int, resume: Callable[[], None]) -> None:
        """Call `resume` when that could be charged, or cannot be hoped for, or after the time."""
        meter, amount = wanted
        number = self._waiting_number = self._waiting_number + 1
        timer = asyncio.get_running_loop().call_later(timeout_ms / 1000, self._resume, meter, number)
        self._waiting.setdefault(meter, {})[number] = _Waiting(amount, resume, timer)
        self._waiting_count += 1

    def _resume(self, meter: Meter, number: int) -> None:
        queue = self._waiting[meter]
        waiting = queue.pop(number)
        if not queue:
            del self._waiting[meter]
        self._waiting_count -= 1
        waiting.timer.cancel()
        waiting.resume()

    def _resume_some(self) -> None:
        """Whoever need not wait any longer goes on; not too many in one go."""
        left = RESUME_MAX
        for meter, queue in list(self._waiting.items()):
            for number, waiting in list(islice(queue.items(), left)):
                if not self._may_resume(meter, waiting.amount):
                    break
                self._resume(meter, number)
                left -= 1
        if not left:
            asyncio.get_running_loop().call_soon(self._resume_some)

    def _may_resume(self, meter: Meter, amount: int) -> bool:
        assert self.rights is not None
        return not self.rights.is_seeking(meter) or self.rights.spare(meter, self._clock.now_ms()) >= amount

    # --- peers --------------------------------------------------------------------------------------------------------

    def refusal(self, node: str) -> str:
        """Why nothing is taken from a node; "" if it is, or is about to be, in the cluster."""
        if self.rights is None:
            return "this node is not in the roster yet"
        roster = self.rights.roster
        if node in roster.stopped:
            return f"{node} was declared stopped"
        generations = [*roster.generations.values(), *self._announced.values()]
        return "" if any(node in members for members in generations) else f"{node} is not in the roster"

    def news(self, node: str) -> Contents:
        """What a peer is told when an exchange is due: what is known here, and what it lacks by what it has just said.

        By what it said in an earlier exchange it would be told once more what others have told it since.
        """
        return self._contents(self._digests.pop(node, None))

    async def receive(self, packet: Packet) -> Contents:
        """Take in what a peer says, and answer it."""
        assert self.rights is not None
        assert self.view is not None
        source, contents = packet.head.sender, packet.contents
        answers: list[Message] = []
        for start in range(0, len(contents.messages), HEAR_MESSAGES_MAX):
            for message in contents.messages[start : start + HEAR_MESSAGES_MAX]:
                ready = self.rights.receive(source, message, self._clock.now_ms())
                answers += [send.message for send in ready.send if send.to == source]
                self._keeper.carry_out(Ready(ready.persist, [send for send in ready.send if send.to != source]))
            self._resume_some()
            await asyncio.sleep(0)
        if contents.digest:
            await self._merge(contents)
        if packet.is_reply and contents.digest:
            self._digests[source] = contents.digest
        answer = self._contents(contents.digest) if contents.digest and not packet.is_reply else Contents()
        if await self._keeper.durable():
            # By the way that the questions came: the other way may be cut, and what is lent by an answer that is lost
            # is out of use for a lifetime and a window.
            answer.messages = answers
        return answer

    async def _merge(self, contents: Contents) -> None:
        assert self.view is not None
        assert self.peers is not None
        merging = self.view.merge(contents.digest, contents.portions, self._clock.now_ms())
        await self.peers.turns.take(lambda: next(merging, None) is not None)

    def _contents(self, known: Digest | None) -> Contents:
        assert self.view is not None
        now_ms = self._clock.now_ms()
        portions = self.view.delta(known, now_ms) if known is not None else iter(())
        first = next(portions, None)
        return Contents(digest=self.view.digest(now_ms), portions=chain([first], portions) if first else ())

    # --- now and then -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Tend the rights, forget old usage, and watch over the peers."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keeper.run())
            tasks.create_task(self._tend())
            tasks.create_task(self._gossip())
            tasks.create_task(self._tidy())

    async def _tend(self) -> NoReturn:
        while True:
            if self.rights is not None:
                self._keeper.carry_out(self.rights.tend(self._clock.now_ms()))
                self._resume_some()
            await asyncio.sleep(TEND_INTERVAL_S)

    async def _gossip(self) -> NoReturn:
        """Tell the view what was used, lent and borrowed here, and forget what is over."""
        await self._begun.wait()
        await self._count_all()
        assert self.rights is not None
        assert self.view is not None
        assert self._committed is not None
        while True:
            now_ms = self._clock.now_ms()
            changed = self.rights.take_changed(EXPIRE_ENTRIES_MAX)
            for (id, key), moved in changed.items():
                self._committed.note(id, key, moved, now_ms)
            more = len(changed) == EXPIRE_ENTRIES_MAX
            more |= self._committed.refresh(now_ms, EXPIRE_ENTRIES_MAX)
            more |= self.view.expire(now_ms, EXPIRE_ENTRIES_MAX)
            await asyncio.sleep(EXPIRE_PAUSE_S if more else COMMITTED_INTERVAL_S)

    async def _tidy(self) -> NoReturn:
        while True:
            self._look_after_peers()
            settled = self.rights is not None and self.rights.is_settled(self._clock.now_ms())
            if settled != self.settled:
                self.settled = settled
                self.on_settled()
            await asyncio.sleep(TIDY_INTERVAL_S)

    def _look_after_peers(self) -> None:
        """Tell who is not reached; with nobody for a while, the overdraft may be used."""
        if self.rights is None or self.peers is None:
            return
        now_s = asyncio.get_running_loop().time()
        others = [node for node in self.rights.roster.members if node != self.rights.node]
        reached = {state.node for state in self.peers.states() if state.reachable}
        if reached or not others:
            self._reached_s = now_s
        self._ledger.isolated = now_s - self._reached_s > ISOLATED_S
        missing = [node for node in others if node not in reached]
        reason = f"not reached: {', '.join(missing)}" if missing else self.peers.trouble
        if reason != self._peers_reason:
            self._peers_reason = reason
            self._on_health("peers", reason)
