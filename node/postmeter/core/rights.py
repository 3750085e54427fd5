"""The rules of rights: how a cap holds cluster-wide with nobody asked at the moment of admitting.

Why no window of a meter ever admits more than `max`, whatever the network does. (README.md beside this file is longer.)

1. The base shares of a meter sum to at most `max` at any moment: roster.py.
2. A right is used by one node at a time. It is lent only out of the lender's own base, as far as the lender's own usage
   does not need it, and the lender stops using it, durably, before the answer leaves.
3. The borrower stops using it one lifetime after it *asked*, or when it gives it back. What it used it for leaves the
   window one window later. The lender uses it again when it was given back (the borrower gives back only what its
   usage does not need), or one lifetime + window + margin after it *granted*, which is after all that.
   Asking comes before granting, so no clock is ever compared with another one; only their rates must agree.
4. A node admits while usage <= base - lent + borrowed. When a loan ends or the base falls, usage may exceed that. Then
   the node admits nothing, and the lender still waits for exactly this usage. When the base falls because another one's
   rises, the excess is handed over as a loan from that other one, before it rises.
5. A crash loses borrowed rights (harmless) and usage that is not on the disk: at most K on every meter, which is taken
   to be used for one window (the toll).

A loan has two cells: the lender writes `amount` and lifetime, the borrower writes `returned`, which only grows. A loan
begins only as the answer to an open question, and a question is closed by its first answer and by any end of the
process: so an answer may arrive late, twice or in any order.

Nothing is kept of a meter that is idle: rights drift back to base, and its `Book` goes away.

    seek        somebody needs rights: ask for them         replenish   ask ahead of need, after a flush
    receive     a peer said something                       tend        now and then: renew, give back, repeat, forget
    follow      the roster, as it is in etcd                start       after Rights(...), before anything else
    change      a `max` was changed                         stored      records are durable

Every step takes the time (ms, own clock, never going back) and returns `Ready`: see effects.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush

from postmeter.core.effects import (
    Accepted,
    Answer,
    Ask,
    Before,
    Excess,
    Handover,
    Lent,
    LoanId,
    Message,
    Meter,
    Offer,
    Place,
    Put,
    Ready,
    Record,
    Renew,
    Return,
    Returned,
    Send,
    join,
)
from postmeter.core.meters import MetersId
from postmeter.core.roster import Members, Roster, order, transfers
from postmeter.core.shared import NEVER_MS, SharedLedger, SharedMeters

STANDING: Place = "standing"

# A search that brought nothing is not repeated before a peer expects to have something, but never sooner or later than:
PAUSE_MS_MIN = 20
PAUSE_MS_MAX = 2_000
# Answers that have not come after this are not waited for any longer: the next peers are asked.
WAVE_MS = 60
# How often nodes that may have got something are asked again.
ROUNDS_MAX = 3
# Handovers that are not acknowledged are repeated.
HANDOVER_REPEAT_MS = 500
# A loan is looked at this often in its lifetime: renewed after half of it, so there are three attempts left.
LOOKS_PER_LIFETIME = 8
# Bounds; beyond them nothing is lent or asked for, which is always safe.
BOOKS_MAX = 200_000
LOANS_MAX = 1_000_000
QUESTIONS_MAX = 100_000
ENTRIES_MAX = 1_000_000


@dataclass(slots=True)
class Borrowed:
    """A loan as its borrower sees it. `generation` is the handover that it came with, until that is accepted."""

    meter: Meter
    lender: str
    amount: int
    until_ms: int
    returned: int = 0
    acknowledged: int = 0
    generation: int = -1

    @property
    def left(self) -> int:
        """What may still be used of it."""
        return self.amount - self.returned


@dataclass(slots=True)
class Question:
    """An Ask that may still be answered."""

    meter: Meter
    lender: str
    asked_ms: int


@dataclass(slots=True)
class Search:
    """Peers are being asked, some first and then more, until the node could charge `amount`."""

    amount: int
    urgent: bool
    waves: int = 0
    until_ms: int = 0
    pause_ms: int = PAUSE_MS_MAX
    asked: set[str] = field(default_factory=set)
    waiting: set[LoanId] = field(default_factory=set)
    again: set[str] = field(default_factory=set)
    rounds: int = 0
    swept: bool = False


@dataclass(slots=True)
class Book:
    """What there is to know of the rights of one meter; exists only while there is something."""

    lent: dict[LoanId, Lent] = field(default_factory=dict)
    borrowed: dict[LoanId, Borrowed] = field(default_factory=dict)
    search: Search | None = None
    pause_until_ms: int = 0
    pause_ahead_until_ms: int = 0
    told_to_wait: dict[str, int] = field(default_factory=dict)
    due_ms: int = NEVER_MS

    def __bool__(self) -> bool:
        return bool(self.lent or self.borrowed or self.search or self.pause_ahead_until_ms or self.told_to_wait)

    @property
    def lent_sum(self) -> int:
        """What is lent, in the limit's unit."""
        return sum(lent.left for lent in self.lent.values())

    @property
    def borrowed_sum(self) -> int:
        """What is borrowed, in the limit's unit."""
        return sum(loan.left for loan in self.borrowed.values())


class Rights:
    """The rights of one node. `incarnation` must be larger than that of any earlier start, durably.

    `records` are what earlier steps persisted. `alive_ms` is the last time that the node is known to have run while it
    was `confirmed`: while it had seen, since its start, that it is in the roster. `committed_seen` may be set to a
    function that tells for a meter what every node has committed (usage + lent - borrowed) as far as is known, {} if it
    is not; `used_seen` to one that tells what all others have used. They save questions, and no cap depends on them.
    What is committed may be out of date in both directions, so only what is used can be a reason to ask nobody.
    """

    def __init__(
        self, ledger: SharedLedger, incarnation: int, records: Mapping[Place, Record] | None = None, alive_ms: int = 0
    ) -> None:
        self.ledger = ledger
        self.roster: Roster = ledger.roster
        self.terms = ledger.terms
        self.node = self.roster.node
        self.incarnation = incarnation
        self.books: dict[Meter, Book] = {}
        self.owed: dict[tuple[str, int], Handover] = {}
        self.questions: dict[LoanId, Question] = {}
        self.confirmed = False
        self.committed_seen: Callable[[MetersId, str], Mapping[str, int]] = lambda _, key: {}
        self.used_seen: Callable[[MetersId, str], int] = lambda _, key: 0
        self._alive_ms = alive_ms
        self._durable = self.roster.generation
        self._announced: dict[int, Members] = {}
        self._loans: dict[LoanId, Borrowed | Lent] = {}
        self._ends: dict[MetersId, list[tuple[int, LoanId]]] = {}
        self._due: list[tuple[int, Meter]] = []
        self._before: dict[MetersId, Before] = {}
        self._number = 0
        self._repeat_ms = 0
        self._now_ms = 0
        for where, record in (records or {}).items():
            self._load(where, record)
        ledger.opened = self._open
        for meters in ledger.meters.values():
            if isinstance(meters, SharedMeters):
                self._open(meters)

    def _load(self, where: Place, record: Record) -> None:
        if isinstance(record, Lent):
            self._book(record.meter).lent[record.loan] = record
            self._loans[record.loan] = record
            self._attend_at(record.meter, 0)
        elif isinstance(record, Handover) and isinstance(where, tuple) and isinstance(where[0], str):
            self.owed[where[0], record.generation] = record
        elif isinstance(record, Before):
            self._before[record.id] = record

    def _open(self, meters: SharedMeters) -> None:
        """Meters come into being: tell them what is lent and borrowed on them."""
        meters.wake = self._wake
        if not self.confirmed:
            meters.wake_at(self._spend_until_ms(meters))
        if meters.id in self._before:
            meters.before.append(self._before[meters.id])
        for (id, key), book in self.books.items():
            if id == meters.id:
                meters.move(key, book.lent_sum - book.borrowed_sum)
        for ends_ms, _ in self._ends.get(meters.id, ()):
            meters.wake_at(ends_ms)
        meters.refresh(self._now_ms)

    def start(self, now_ms: int, clean: bool) -> Ready:
        """Begin to spend. After an unclean stop something may have been used that is not on the disk."""
        self._now_ms = now_ms
        ready = Ready([Put(STANDING, None)])
        if not clean:
            self.ledger.tolls_ms.append(now_ms)
            self.roster.unclean_ms = now_ms
            for meters in self._meters():
                meters.set_tolls(self.ledger.tolls_ms)
        ready.persist[0] = Put(STANDING, self.roster.standing())
        self._refresh(now_ms)
        return ready

    def stored(self, puts: Iterable[Put]) -> None:
        """These are durable."""
        for where, record in puts:
            if where == STANDING and record is not None and not isinstance(record, Lent | Handover | Before):
                self._durable = max(self._durable, record.generations[-1][0])

    # --- what there is ------------------------------------------------------------------------------------------------

    def spare(self, meter: Meter, now_ms: int) -> int:
        """What the node could still use or give away without an overdraft. Less than 0 if it must not use anything."""
        meters = self.ledger.shared(meter[0])
        if meters is None:
            return 0
        return meters.rights(meter[1], now_ms) - meters.usage(meters.row_of(meter[1]), now_ms)

    def lendable(self, meter: Meter, now_ms: int) -> int:
        """What of its own base the node has neither lent nor needs for its own usage."""
        meters = self.ledger.shared(meter[0])
        if meters is None or not (self.confirmed and meters.spends):
            return 0
        key, book = meter[1], self.books.get(meter) or Book()
        used = meters.usage(meters.row_of(key), now_ms) + meters.toll(key)
        of_base = meters.base(key) - book.lent_sum - max(0, used - book.borrowed_sum)
        return max(0, min(self.spare(meter, now_ms), of_base))

    def is_seeking(self, meter: Meter) -> bool:
        """Whether peers are being asked: waiting may help."""
        book = self.books.get(meter)
        return book is not None and book.search is not None

    @property
    def loans_count(self) -> int:
        """How many loans this node knows of, lent or borrowed."""
        return len(self._loans)

    # --- borrowing ----------------------------------------------------------------------------------------------------

    def seek(self, meter: Meter, amount: int, now_ms: int, urgent: bool = True) -> Ready:
        """Ask peers until `amount` can be charged; not while a search that brought nothing has its pause."""
        meters = self.ledger.shared(meter[0])
        if meters is None or not meters.spends or amount > meters.max_of(meter[1]) or len(self.books) >= BOOKS_MAX:
            return Ready()
        spare = self.spare(meter, now_ms)
        book = self._book(meter)
        if book.search is not None:
            if urgent:
                book.search.amount = max(amount, book.search.amount if book.search.urgent else 0)
                book.search.urgent = True
            return Ready()
        if now_ms < (book.pause_until_ms if urgent else book.pause_ahead_until_ms) or spare >= amount:
            self._forget(meter)
            return Ready()
        if amount > (self._unused(meters, meter[1], now_ms) if urgent else self._room(meters, meter[1], now_ms)):
            self._forget(meter)
            return Ready()
        book.search = Search(amount, urgent)
        return self._ask_more(meter, book, book.search, now_ms)

    def _room(self, meters: SharedMeters, key: str, now_ms: int) -> int:
        """What nobody has committed of `max` in the whole cluster, as far as is known."""
        seen, row = self.committed_seen(meters.id, key), meters.row_of(key)
        others = sum(committed for node, committed in seen.items() if node != self.node)
        own = 0 if row is None else meters.usage(row, now_ms) + meters.moved.get(row, 0)
        return meters.max_of(key) - others - own

    def _unused(self, meters: SharedMeters, key: str, now_ms: int) -> int:
        """What nobody has used of `max` in the whole cluster, as far as is known: it may be less, but not more."""
        return meters.max_of(key) - self.used_seen(meters.id, key) - meters.usage(meters.row_of(key), now_ms)

    def replenish(self, meters: SharedMeters, rows: Iterable[int], now_ms: int) -> Ready:
        """Borrow ahead of need where less than a quarter of the allowance is left; `rows` were charged of late."""
        steps = []
        for row in rows:
            key = meters.keys.names[row]
            if key is None or 4 * meters.used[row] <= 3 * meters.quick_max:
                continue
            allowance = meters.rights(key, now_ms)
            used = meters.usage(row, now_ms)
            room = self._room(meters, key, now_ms)
            wanted = min(max(1, allowance // 2), room // 2)
            if room > len(self.roster.members) and 4 * (allowance - used) <= max(0, allowance):
                steps.append(self.seek((meters.id, key), wanted, now_ms, urgent=False))
        return join(steps)

    def _ask_more(self, meter: Meter, book: Book, search: Search, now_ms: int) -> Ready:
        """The next wave of a search, or its end."""
        short = search.amount - self.spare(meter, now_ms)
        peers = self._whom_to_ask(meter, search, short) if short > 0 else []
        if not peers or len(self.questions) >= QUESTIONS_MAX:
            book.search = None
            if short > 0:
                book.pause_ahead_until_ms = now_ms + search.pause_ms
                book.pause_until_ms = book.pause_ahead_until_ms if search.urgent else 0
                self._attend_at(meter, book.pause_ahead_until_ms)
            self._forget(meter)
            return Ready()
        ready = Ready()
        search.waves += 1
        search.until_ms = now_ms + WAVE_MS
        self._attend_at(meter, search.until_ms)
        for peer in peers:
            loan = self._new_loan()
            search.asked.add(peer)
            search.waiting.add(loan)
            self.questions[loan] = Question(meter, peer, now_ms)
            ready.send.append(Send(peer, Ask(loan, meter, short, search.urgent, now_ms)))
        return ready

    def _whom_to_ask(self, meter: Meter, search: Search, short: int) -> list[str]:
        """First as many peers as will probably do, then the others, then those who may have got something meanwhile.

        At last all once more, if somebody waits: rights may have been on their way from one node to another.
        """
        meters = self.ledger.shared(meter[0])
        members = self.roster.members
        if meters is None or self.node not in members:
            return []
        spares, seen = self._expected(meters, meter, members), bool(self.committed_seen(*meter))
        peers = [node for node in spares if node != self.node and node not in self.roster.stopped]
        likely = [node for node in peers if spares[node] > 0] if seen else peers
        left = [node for node in likely if node not in search.asked]
        if left and search.urgent and search.waves:
            return left
        enough = 0
        for count, node in enumerate(left, 1):
            enough += max(0, spares[node])
            if enough >= short << search.waves:
                return left[:count]
        if left:
            return left
        again, search.again = sorted(search.again - {self.node}), set()
        search.rounds += 1
        if again and search.rounds < ROUNDS_MAX:
            return again
        if search.urgent and not search.swept:
            search.swept = True
            return peers
        return []

    def _expected(self, meters: SharedMeters, meter: Meter, members: Members) -> dict[str, int]:
        """What each node can probably lend, the largest first; among equals each node begins with another one."""
        ordered = order(meter, members)
        place = ordered.index(self.node)
        part, rest = divmod(meters.max_of(meter[1]), len(members))
        seen = self.committed_seen(*meter)
        spares = {node: part + (at < rest) - seen.get(node, 0) for at, node in enumerate(ordered) if at >= place}
        spares |= {node: part + (at < rest) - seen.get(node, 0) for at, node in enumerate(ordered[:place])}
        return dict(sorted(spares.items(), key=lambda item: -item[1]))

    def _on_answer(self, source: str, answer: Answer, now_ms: int) -> Ready:
        loan = self._loans.get(answer.loan)
        if isinstance(loan, Borrowed):
            if loan.lender == source and answer.asked_ms <= now_ms and loan.until_ms > now_ms:
                loan.until_ms = max(loan.until_ms, answer.asked_ms + self._lifetime_ms(loan.meter))
            return Ready()
        question = self.questions.get(answer.loan)
        if question is None or question.lender != source:
            return Ready()
        del self.questions[answer.loan]
        until_ms = question.asked_ms + self._lifetime_ms(question.meter)
        if answer.amount > 0 and until_ms > now_ms:
            self._borrow(answer.loan, Borrowed(question.meter, source, answer.amount, until_ms), now_ms)
        return self._heard(question.meter, answer, now_ms)

    def _heard(self, meter: Meter, answer: Answer, now_ms: int) -> Ready:
        """Go on with a search, if this was its last open question."""
        book = self.books.get(meter)
        if book is None or book.search is None or answer.loan not in book.search.waiting:
            return Ready()
        search = book.search
        search.waiting.discard(answer.loan)
        search.again.update(answer.again)
        if not answer.amount:
            search.pause_ms = max(PAUSE_MS_MIN, min(search.pause_ms, answer.wait_ms))
        if search.waiting and self.spare(meter, now_ms) < search.amount:
            return Ready()
        return self._ask_more(meter, book, search, now_ms)

    def _borrow(self, id: LoanId, loan: Borrowed, now_ms: int) -> None:
        meters = self.ledger.shared(loan.meter[0])
        if meters is None or len(self._loans) >= LOANS_MAX:
            return
        self._book(loan.meter).borrowed[id] = loan
        self._loans[id] = loan
        heappush(self._ends.setdefault(loan.meter[0], []), (loan.until_ms, id))
        meters.move(loan.meter[1], -loan.left)
        meters.wake_at(loan.until_ms)
        self._attend_at(loan.meter, self._next_look_ms(loan.meter, now_ms))

    # --- lending ------------------------------------------------------------------------------------------------------

    def _on_ask(self, source: str, ask: Ask, now_ms: int) -> Ready:
        if ask.loan in self._loans or ask.loan.borrower != source:
            return Ready()
        home = self._give_back(ask.meter, now_ms, ends=False) if ask.urgent else Ready()
        can = self.lendable(ask.meter, now_ms)
        amount = min(can, max(ask.amount, can // 2))
        if source in self.roster.stopped or len(self._loans) >= LOANS_MAX:
            amount = 0
        if amount <= 0:
            again = {to for to, _ in home.send} | ({self.node} if self.is_seeking(ask.meter) else set())
            wait_ms = min(PAUSE_MS_MAX, self._expected_ms(ask.meter, now_ms))
            self._tell_to_wait(source, ask.meter, now_ms + wait_ms)
            home.send.append(Send(source, Answer(ask.loan, 0, ask.asked_ms, wait_ms, tuple(sorted(again)))))
            return home
        home.add(self._lend(ask.loan, ask.meter, amount, now_ms))
        home.send.append(Send(source, Answer(ask.loan, amount, ask.asked_ms)))
        return home

    def _tell_to_wait(self, node: str, meter: Meter, until_ms: int) -> None:
        """Remember whom to tell if something comes back earlier; only where something may."""
        book = self.books.get(meter)
        if book is not None and (book.lent or book.borrowed):
            book.told_to_wait[node] = until_ms
            self._attend_at(meter, until_ms)

    def _offer(self, meter: Meter, now_ms: int) -> Ready:
        book = self.books.get(meter)
        if book is None or not book.told_to_wait or not self.lendable(meter, now_ms):
            return Ready()
        told, book.told_to_wait = book.told_to_wait, {}
        return Ready(send=[Send(node, Offer(meter)) for node, until_ms in told.items() if until_ms > now_ms])

    def _on_offer(self, offer: Offer) -> Ready:
        book = self.books.get(offer.meter)
        if book is not None:
            book.pause_until_ms = 0
        return Ready()

    def _lend(self, id: LoanId, meter: Meter, amount: int, now_ms: int) -> Ready:
        """The rights are gone from now on, and for as long as the borrower or its usage can have them."""
        lent = Lent(id, meter, amount, now_ms + self.terms.wait_ms(meter[0].window_ms))
        meters = self.ledger.shared(meter[0])
        if meters is not None:
            meters.move(meter[1], amount)
        self._set_lent(lent)
        self._attend_at(meter, lent.back_ms)
        return Ready([Put(id, lent)])

    def _set_lent(self, lent: Lent) -> None:
        self._book(lent.meter).lent[lent.loan] = lent
        self._loans[lent.loan] = lent

    def _on_renew(self, source: str, renew: Renew, now_ms: int) -> Ready:
        ready = self._repay(source, renew.loan, renew.returned)
        lent = self._loans.get(renew.loan)
        if not isinstance(lent, Lent) or lent.loan.borrower != source or lent.back_ms <= now_ms:
            return ready
        if not self._covers(lent.meter, now_ms):
            return ready
        lent = replace(lent, back_ms=now_ms + self.terms.wait_ms(lent.meter[0].window_ms))
        self._set_lent(lent)
        ready.persist.append(Put(lent.loan, lent))
        ready.send.append(Send(source, Answer(lent.loan, lent.amount, renew.asked_ms)))
        return ready

    def _covers(self, meter: Meter, now_ms: int) -> bool:
        """Whether all that is lent on a meter is lent out of the own base, as it is now.

        It may have fallen: by a lower `max`, or by a handover. What was borrowed for the excess then ends, and a loan
        that rests on it must not outlive it.
        """
        meters = self.ledger.shared(meter[0])
        if meters is None or not self.confirmed:
            return False
        meters.advance(now_ms)
        return self._book(meter).lent_sum <= meters.base(meter[1])

    def _on_return(self, source: str, message: Return, now_ms: int) -> Ready:
        lent = self._loans.get(message.loan)
        ready = self._repay(source, message.loan, message.returned)
        ready.send.append(Send(source, Returned(message.loan, message.returned)))
        if lent is not None:
            ready.add(self._offer(lent.meter, now_ms))
        return ready

    def _repay(self, source: str, id: LoanId, returned: int) -> Ready:
        """Rights come back. The loan is forgotten when all have."""
        lent = self._loans.get(id)
        if not isinstance(lent, Lent) or id.borrower != source or returned <= lent.returned:
            return Ready()
        less = replace(lent, returned=min(lent.amount, returned))
        self._moved(lent.meter, less.left - lent.left)
        if less.left:
            self._set_lent(less)
            return Ready([Put(id, less)])
        return self._drop_lent(less)

    def _drop_lent(self, lent: Lent) -> Ready:
        self._moved(lent.meter, -lent.left)
        del self._loans[lent.loan], self.books[lent.meter].lent[lent.loan]
        self._forget(lent.meter)
        return Ready([Put(lent.loan, None)])

    def _expected_ms(self, meter: Meter, now_ms: int) -> int:
        """How long until this node may have something to lend, if nobody gives anything back."""
        meters, book = self.ledger.shared(meter[0]), self.books.get(meter) or Book()
        times = [lent.back_ms for lent in book.lent.values()]
        if meters is not None:
            times += [meters.freed_ms(number) for number, _ in meters.slices(meters.row_of(meter[1]), now_ms)[:1]]
        return max(0, min(times, default=now_ms + PAUSE_MS_MAX) - now_ms)

    # --- giving back --------------------------------------------------------------------------------------------------

    def _give_back(self, meter: Meter, now_ms: int, ends: bool, keep: int = 0) -> Ready:
        """Give unused borrowed rights back to their owners, but `keep`. With `ends` only those that end soon."""
        book, ready = self.books.get(meter), Ready()
        if book is None:
            return ready
        soon_ms = now_ms + self._lifetime_ms(meter) // 2 if ends else NEVER_MS
        unused = self.spare(meter, now_ms) - keep
        for id, loan in book.borrowed.items():
            amount = min(loan.left, unused)
            if amount > 0 and loan.until_ms <= soon_ms and loan.generation < 0:
                unused -= amount
                loan.returned += amount
                self._moved(meter, amount)
                ready.send.append(Send(loan.lender, Return(id, loan.returned)))
        return ready

    def _on_returned(self, source: str, message: Returned) -> Ready:
        loan = self._loans.get(message.loan)
        if isinstance(loan, Borrowed) and loan.lender == source:
            loan.acknowledged = max(loan.acknowledged, min(message.returned, loan.returned))
            if loan.acknowledged == loan.amount:
                self._end(message.loan, loan)
        return Ready()

    def _end(self, id: LoanId, loan: Borrowed) -> None:
        """The loan is over for the borrower, for good."""
        self._moved(loan.meter, loan.left)
        del self._loans[id], self.books[loan.meter].borrowed[id]
        self._forget(loan.meter)

    def _wake(self, meters: SharedMeters, now_ms: int) -> int:
        """End the loans on these meters that end by now. Returns when the next one does."""
        ends = self._ends.get(meters.id, [])
        while ends and ends[0][0] <= now_ms:
            _, id = heappop(ends)
            loan = self._loans.get(id)
            if not isinstance(loan, Borrowed):
                continue
            if loan.until_ms <= now_ms:
                self._end(id, loan)
            else:
                heappush(ends, (loan.until_ms, id))
        wakes_ms = ends[0][0] if ends else NEVER_MS
        if self.confirmed or meters.suspended:
            return wakes_ms
        if now_ms >= self._spend_until_ms(meters):
            meters.suspended = True
            meters.refresh(now_ms)
            return wakes_ms
        return min(wakes_ms, self._spend_until_ms(meters))

    def _spend_until_ms(self, meters: SharedMeters) -> int:
        """Without a look at the roster a node spends no longer than a loan would have lived: it may be removed."""
        return self._alive_ms + self.terms.lifetime_ms(meters.id.window_ms)

    # --- now and then -------------------------------------------------------------------------------------------------

    def tend(self, now_ms: int) -> Ready:
        """What is due: to be called several times a second."""
        self._now_ms = now_ms
        for meters in self._meters():
            meters.tidy()
        if len(self.roster.generations) > 1 or self.roster.unclean_ms is not None or self._before:
            self._let_go(now_ms)
        ready = Ready()
        if now_ms >= self._repeat_ms:
            self._repeat_ms = now_ms + HANDOVER_REPEAT_MS
            ready.send += [Send(node, handover) for (node, _), handover in self.owed.items()]
        self._close_questions(now_ms)
        while self._due and self._due[0][0] <= now_ms:
            due_ms, meter = heappop(self._due)
            book = self.books.get(meter)
            if book is not None and book.due_ms == due_ms:
                book.due_ms = NEVER_MS
                ready.add(self._attend(meter, book, now_ms))
        ready.add(self._adopt_announced(now_ms))
        for id in [id for id, before in self._before.items() if before.until_ms <= now_ms]:
            del self._before[id]
            ready.persist.append(Put(("before", id), None))
        return ready

    def _close_questions(self, now_ms: int) -> None:
        """Forget questions whose answers could begin no loan any more; the oldest lie first."""
        for id, question in list(self.questions.items()):
            if question.asked_ms + self._lifetime_ms(question.meter) > now_ms:
                break
            del self.questions[id]

    def _let_go(self, now_ms: int) -> None:
        """Forget unclean starts, earlier limits and generations that no longer matter; shares may rise by that."""
        longest_ms = self._longest(self.terms.toll_wait_ms)
        if self.roster.unclean_ms is not None and now_ms - self.roster.unclean_ms > longest_ms:
            self.roster.unclean_ms = None
        self.roster.prune(now_ms, self._longest(self.terms.wait_ms), longest_ms)
        self._refresh(now_ms)

    def _attend(self, meter: Meter, book: Book, now_ms: int) -> Ready:
        """Look at one meter: what ends, what is renewed, what is given back, whom to ask next."""
        ready = Ready()
        for lent in [lent for lent in book.lent.values() if lent.back_ms <= now_ms]:
            ready.add(self._drop_lent(lent))
        for id, ended in [(id, loan) for id, loan in book.borrowed.items() if loan.until_ms <= now_ms]:
            self._end(id, ended)
        search = book.search
        if search is not None and search.until_ms <= now_ms:
            ready.add(self._ask_more(meter, book, search, now_ms))
        for node in [node for node, until_ms in book.told_to_wait.items() if until_ms <= now_ms]:
            del book.told_to_wait[node]
        if book.pause_ahead_until_ms <= now_ms:
            book.pause_ahead_until_ms = book.pause_until_ms = 0
        if book.borrowed:
            ready.add(self._renew(meter, book, now_ms))
            self._attend_at(meter, self._next_look_ms(meter, now_ms))
        times_ms = [
            *(lent.back_ms for lent in book.lent.values()),
            *book.told_to_wait.values(),
            book.pause_ahead_until_ms,
        ]
        for at_ms in times_ms:
            if at_ms:
                self._attend_at(meter, at_ms)
        if book.search is not None:
            self._attend_at(meter, book.search.until_ms)
        self._forget(meter)
        return ready

    def _renew(self, meter: Meter, book: Book, now_ms: int) -> Ready:
        """Give back what is not needed, all if the meter is idle; renew the rest in the second half of its life."""
        meters = self.ledger.shared(meter[0])
        if meters is None:
            return Ready()
        used = meters.usage(meters.row_of(meter[1]), now_ms)
        keep = meters.rights(meter[1], now_ms) // 4 if used else 0
        ready = self._give_back(meter, now_ms, ends=bool(used), keep=max(0, keep))
        half_ms = self._lifetime_ms(meter) // 2
        told = {send.message.loan for send in ready.send if isinstance(send.message, Return)}
        for id, loan in book.borrowed.items():
            if loan.left and loan.until_ms <= now_ms + half_ms and loan.generation < 0:
                ready.send.append(Send(loan.lender, Renew(id, loan.returned, now_ms)))
            elif loan.acknowledged < loan.returned and id not in told:
                ready.send.append(Send(loan.lender, Return(id, loan.returned)))
        return ready

    def _next_look_ms(self, meter: Meter, now_ms: int) -> int:
        """The same moments for all meters of one window, so that what is due for a peer goes in one message."""
        every_ms = max(1, self._lifetime_ms(meter) // LOOKS_PER_LIFETIME)
        return (now_ms // every_ms + 1) * every_ms

    # --- the roster ---------------------------------------------------------------------------------------------------

    def follow(self, generations: Mapping[int, Members], stopped: Iterable[str], now_ms: int) -> Ready:
        """The roster as it is in etcd: adopt what is new as soon as may be, and trust the base share again."""
        self._now_ms = now_ms
        news = [node for node in stopped if self.roster.stop(node, now_ms)]
        for node in news:
            self._bury(node)
        self._announced = {
            number: members for number, members in generations.items() if number > self.roster.generation
        }
        if not self.confirmed:
            self.confirmed = True
            for meters in self._meters():
                meters.suspended = False
        ready = Ready([Put(STANDING, self.roster.standing())]) if news else Ready()
        ready.persist += [Put(where, None) for where in self.owed if where[0] in news]
        self.owed = {where: handover for where, handover in self.owed.items() if where[0] not in news}
        ready.add(self._adopt_announced(now_ms))
        self._refresh(now_ms)
        return ready

    def _bury(self, node: str) -> None:
        """A node is stopped for good: what it was to take over from this one it never will."""
        for id, loan in list(self._loans.items()):
            if isinstance(loan, Borrowed) and loan.lender == node and loan.generation >= 0:
                self._end(id, loan)

    def _adopt_announced(self, now_ms: int) -> Ready:
        ready = Ready()
        while self._announced and self.roster.may_adopt(now_ms, self._longest(self.terms.toll_wait_ms)):
            members = self._announced.pop(self.roster.generation + 1, None)
            if members is None:
                break
            ready.add(self._adopt(self.roster.generation + 1, members, now_ms))
        return ready

    def _adopt(self, number: int, members: Members, now_ms: int) -> Ready:
        """Spend by the next generation, and hand over to the others what is used or lent beyond that."""
        old = self.roster.members
        others = self.roster.adopt(number, members)
        self._refresh(now_ms)
        excess: dict[str, list[Excess]] = {node: [] for node in others}
        for meters in self._meters():
            for key in self._exceeding(meters):
                self._hand_over(meters, key, old, excess, now_ms)
        since_ms = -1 if self.roster.unclean_ms is None else now_ms - self.roster.unclean_ms
        ready = Ready([Put(STANDING, self.roster.standing())])
        for node, entries in excess.items():
            handover = Handover(number, tuple(entries), since_ms)
            self.owed[node, number] = handover
            ready.persist.append(Put((node, number), handover))
            ready.send.append(Send(node, handover))
        return ready

    @staticmethod
    def _exceeding(meters: SharedMeters) -> list[str]:
        """Keys that may have more used or lent than the new share; all that are in use if shares differ."""
        least = max(0, meters.quick_max)
        rows = [row for row, used in enumerate(meters.used) if used > least]
        return [name for row in rows if (name := meters.keys.names[row]) is not None]

    def _hand_over(
        self, meters: SharedMeters, key: str, old: Members, excess: dict[str, list[Excess]], now_ms: int
    ) -> None:
        """Borrow the excess of one meter from those whose share of it rises, as far as this node's falls."""
        meter = (meters.id, key)
        left = -self.spare(meter, now_ms)
        if left <= 0:
            return
        ceiling = meters.ceiling(key, now_ms)
        for (giver, taker), part in transfers(ceiling, old, self.roster.members, meter).items():
            amount = min(left, part)
            if giver != self.node or taker not in excess or amount <= 0:
                continue
            left -= amount
            loan = self._new_loan()
            excess[taker].append(Excess(loan, meter, amount))
            until_ms = now_ms + self._lifetime_ms(meter)
            self._borrow(loan, Borrowed(meter, taker, amount, until_ms, generation=self.roster.generation), now_ms)

    def _on_handover(self, source: str, handover: Handover, now_ms: int) -> Ready:
        number = handover.generation
        if number > min(self.roster.generation, self._durable):
            return Ready()
        ready = Ready()
        if not self.roster.knows(source, number):
            for loan, meter, amount in ((excess.loan, excess.meter, excess.amount) for excess in handover.excess):
                ready.add(self._lend(loan, meter, amount, now_ms))
            self.roster.hear(source, number, now_ms - handover.unclean_ms if handover.unclean_ms >= 0 else None)
            ready.persist.append(Put(STANDING, self.roster.standing()))
            self._refresh(now_ms)
        ready.send.append(Send(source, Accepted(number)))
        ready.add(self._adopt_announced(now_ms))
        return ready

    def _on_accepted(self, source: str, message: Accepted) -> Ready:
        if self.owed.pop((source, message.generation), None) is None:
            return Ready()
        for loan in self._loans.values():
            if isinstance(loan, Borrowed) and loan.lender == source and loan.generation == message.generation:
                loan.generation = -1
        return Ready([Put((source, message.generation), None)])

    def change(self, id: MetersId, now_ms: int) -> Ready:
        """To be called just before `max` or the overrides of these meters are changed: remember them for a while."""
        meters = self.ledger.shared(id)
        if meters is None or not meters.max:
            return Ready()
        until_ms = now_ms + self.terms.wait_ms(id.window_ms)
        earlier = self._before.get(id)
        max_before, overrides = meters.max, dict(meters.overrides)
        if earlier is not None:
            max_before = max(max_before, earlier.max)
            for key, other in earlier.overrides:
                overrides[key] = max(overrides.get(key, 0), other)
        before = Before(id, until_ms, max_before, tuple(sorted(overrides.items())))
        self._before[id] = before
        meters.before = [before]
        return Ready([Put(("before", id), before)])

    # --- receiving ----------------------------------------------------------------------------------------------------

    def receive(self, source: str, message: Message, now_ms: int) -> Ready:
        """A peer said something; who it is was checked."""
        match message:
            case Ask():
                return self._on_ask(source, message, now_ms)
            case Answer():
                return self._on_answer(source, message, now_ms)
            case Offer():
                return self._on_offer(message)
            case Renew():
                return self._on_renew(source, message, now_ms)
            case Return():
                return self._on_return(source, message, now_ms)
            case Returned():
                return self._on_returned(source, message)
            case Handover():
                return self._on_handover(source, message, now_ms)
            case Accepted():
                return self._on_accepted(source, message)

    # --- bookkeeping --------------------------------------------------------------------------------------------------

    def _meters(self) -> list[SharedMeters]:
        return [meters for meters in self.ledger.meters.values() if isinstance(meters, SharedMeters)]

    def _longest(self, wait_ms: Callable[[int], int]) -> int:
        return max((wait_ms(meters.id.window_ms) for meters in self._meters()), default=0)

    def _lifetime_ms(self, meter: Meter) -> int:
        return self.terms.lifetime_ms(meter[0].window_ms)

    def _new_loan(self) -> LoanId:
        self._number += 1
        return LoanId(self.node, self.incarnation, self._number)

    def _book(self, meter: Meter) -> Book:
        book = self.books.get(meter)
        if book is None:
            book = self.books[meter] = Book()
        return book

    def _forget(self, meter: Meter) -> None:
        """Keep nothing of a meter about which there is nothing to know."""
        if not self.books.get(meter, True):
            del self.books[meter]

    def _moved(self, meter: Meter, amount: int) -> None:
        meters = self.ledger.shared(meter[0])
        if meters is not None and amount:
            meters.move(meter[1], amount)

    def _attend_at(self, meter: Meter, at_ms: int) -> None:
        book = self._book(meter)
        if at_ms < book.due_ms:
            book.due_ms = at_ms
            heappush(self._due, (at_ms, meter))

    def _refresh(self, now_ms: int) -> None:
        """Work out base shares anew: the roster has changed, or somebody counts as gone by now."""
        self.ledger.spends = self.roster.is_member
        for meters in self._meters():
            meters.refresh(now_ms)
