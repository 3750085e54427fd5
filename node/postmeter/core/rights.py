"""The rules of rights: how a cap holds cluster-wide with nobody asked at the moment of admitting.

Why no window of a meter ever admits more than `max`, whatever the network does. (README.md beside this file is longer.)

1. The base shares of a meter sum to at most `max` at any moment: roster.py.
2. A right is used by one node at a time. It is lent only out of the lender's own base, and the lender stops using it,
   durably, before the answer leaves: lending.py.
3. The borrower admits nothing by it one lifetime after it *asked*, or when it gives it back: borrowing.py. What was
   admitted by it leaves the window one window later at most. The lender uses it again when it was given back (the
   borrower gives back only what no usage stands on), or one lifetime + window + margin after it *granted*, which is
   after all that. Asking comes before granting, so no clock is ever compared with another one; only their rates must
   agree.
4. A node admits while usage <= base - lent + borrowed. A loan that is over counts as borrowed for what was admitted by
   it, and only as long as that counts: loans.py. When the base falls because another one's rises, the excess is handed
   over as a loan from that other one, before it rises: handover.py.
5. A crash loses borrowed rights (harmless) and usage that is not on the disk: at most K on every meter, which is taken
   to be used for one window (the toll).

A loan has two cells: the lender writes `amount` and lifetime, the borrower writes `returned`, which only grows.

Nothing is kept of a meter that is idle: rights drift back to base, and its `Book` goes away.

    start       after Rights(...), before anything else     stop        after everything else
    seek        somebody needs rights: ask for them         replenish   ask ahead of need, after a flush
    receive     a peer said something                       tend        now and then: give back, repeat, forget
    follow      the roster, as it is in etcd                change      a `max` was changed

Every step takes the time (ms, own clock, never going back) and returns `Ready`: see effects.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from heapq import heapify, heappop

from postmeter.core.borrowing import Borrowing
from postmeter.core.effects import (
    Accepted,
    Answer,
    Ask,
    Before,
    Borrowed,
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
    Return,
    Returned,
    Send,
)
from postmeter.core.handover import STANDING, HandingOver
from postmeter.core.lending import Lending
from postmeter.core.loans import Book
from postmeter.core.shared import NEVER_MS, SharedLedger, SharedMeters
from postmeter.defaults import BOOKS_TENDED_MAX, HANDOVER_REPEAT_MS


class Rights(Lending, Borrowing, HandingOver):
    """The rights of one node. `incarnation` must be larger than that of any earlier start, durably.

    `records` are what earlier steps persisted. `alive_ms` is the last time that the node is known to have run while it
    was `confirmed`.
    """

    def __init__(
        self, ledger: SharedLedger, incarnation: int, records: Mapping[Place, Record] | None = None, alive_ms: int = 0
    ) -> None:
        super().__init__(ledger, incarnation)
        self._alive_ms = alive_ms
        self._repeat_ms = 0
        self._kept: dict[LoanId, Borrowed] = {}
        for where, record in (records or {}).items():
            self._load(where, record)
        ledger.opened = self._open
        for meters in self._meters():
            self._open(meters)

    def _load(self, where: Place, record: Record) -> None:
        if isinstance(record, Lent):
            self._set_lent(record)
        elif isinstance(record, Borrowed) and isinstance(where, LoanId):
            self._kept[where] = record
        elif isinstance(record, Handover) and isinstance(where, tuple) and isinstance(where[0], str):
            self.owed[where[0], record.generation] = record
        elif isinstance(record, Before):
            self._before[record.id, record.key] = record

    def _open(self, meters: SharedMeters) -> None:
        """Meters come into being: tell them what is lent and borrowed on them."""
        meters.wake = self._wake
        if not self.confirmed:
            meters.wake_at(self.spend_until_ms(meters))
        meters.before = {key: before for (id, key), before in self._before.items() if id == meters.id}
        for (id, key), book in self.books.items():
            if id == meters.id:
                meters.move(key, book.lent_sum - book.living_sum)
                meters.hold(key, sum(loan.covers is None for loan in book.borrowed.values()))
        for ends_ms, _ in self._ends.get(meters.id, ()):
            meters.wake_at(ends_ms)
        meters.refresh(self._now_ms)

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self, now_ms: int, clean: bool) -> Ready:
        """Begin to spend. After an unclean stop something may have been used that is not on the disk."""
        self._now_ms = now_ms
        if not clean:
            self.ledger.tolls_ms.append(now_ms)
            self.roster.unclean_ms = now_ms
            for meters in self._meters():
                meters.set_tolls(self.ledger.tolls_ms)
        self._refresh(now_ms)
        ready = Ready([Put(STANDING, self.roster.standing())])
        for id, loan in self._kept.items():
            known = self.ledger.shared(loan.meter[0])
            if known is not None:
                covers = known.cover(loan.meter[1], loan.left, now_ms, again=loan.covers or {})
                self._set_borrowed(id, replace(loan, covers=covers), now_ms)
            ready.persist.append(Put(id, None))
        self._kept.clear()
        return ready

    def stop(self, now_ms: int) -> Ready:
        """End all that is borrowed, and keep it for the next start: what it covers, and what is to be given back.

        The next start takes it off the disk before it says anything. Nothing may be charged or received any more.
        """
        ready = Ready()
        for id, loan in self._loans.items():
            if isinstance(loan, Borrowed):
                if loan.covers is None:
                    self._end(loan, now_ms)
                ready.persist.append(Put(id, loan))
        return ready

    # --- messages -----------------------------------------------------------------------------------------------------

    def receive(self, source: str, message: Message, now_ms: int) -> Ready:
        """A peer said something; who it is was checked."""
        match message:
            case Ask():
                return self._on_ask(source, message, now_ms)
            case Answer():
                return self._on_answer(source, message, now_ms)
            case Offer():
                return self._on_offer(message)
            case Return():
                return self._on_return(source, message, now_ms)
            case Returned():
                return self._on_returned(source, message)
            case Handover():
                return self._on_handover(source, message, now_ms)
            case Accepted():
                return self._on_accepted(source, message)

    # --- time ---------------------------------------------------------------------------------------------------------

    def _wake(self, meters: SharedMeters, now_ms: int) -> int:
        """End the loans on these meters that end by now. Returns when the next one does."""
        ends = self._ends.get(meters.id, [])
        while ends and ends[0][0] <= now_ms:
            loan = self._loans.get(heappop(ends)[1])
            if isinstance(loan, Borrowed) and loan.covers is None:
                self._end(loan, now_ms)
        wakes_ms = ends[0][0] if ends else NEVER_MS
        if self.confirmed or meters.suspended:
            return wakes_ms
        if now_ms >= self.spend_until_ms(meters):
            meters.suspended = True
            meters.refresh(now_ms)
            return wakes_ms
        return min(wakes_ms, self.spend_until_ms(meters))

    def spend_until_ms(self, meters: SharedMeters) -> int:
        """Without a look at the roster a node spends no longer than a loan would have lived: it may be removed."""
        return self._alive_ms + self.terms.lifetime_ms(meters.id.window_ms)

    def tend(self, now_ms: int) -> Ready:
        """What is due: to be called several times a second."""
        self._now_ms = now_ms
        for meters in self._meters():
            meters.tidy()
        changing = len(self.roster.generations) > 2 or self.roster.unclean_ms is not None
        if changing or any(len(meters.opens) > 1 for meters in self._meters()):
            self._let_go(now_ms)
        ready = Ready()
        if now_ms >= self._repeat_ms:
            self._repeat_ms = now_ms + HANDOVER_REPEAT_MS
            ready.send += [Send(node, handover) for (node, _), handover in self.owed.items()]
            ready.add(self._forget_changes(now_ms))
        self._close_questions(now_ms)
        self._forget_outdated()
        left = BOOKS_TENDED_MAX
        while left and self._due and self._due[0][0] <= now_ms:
            due_ms, meter = heappop(self._due)
            book = self.books.get(meter)
            if book is not None and book.due_ms == due_ms:
                book.due_ms = NEVER_MS
                ready.add(self._attend(meter, book, now_ms))
                left -= 1
        ready.add(self._adopt_announced(now_ms))
        return ready

    def _forget_outdated(self) -> None:
        """Of what is to be looked at, most may be outdated: there is an earlier look, or the loan is gone."""
        if len(self._due) > 2 * len(self.books) + BOOKS_TENDED_MAX:
            self._due = [(book.due_ms, meter) for meter, book in self.books.items()]
            heapify(self._due)
        for id, ends in self._ends.items():
            if len(ends) > 2 * len(self._loans) + BOOKS_TENDED_MAX:
                self._ends[id] = [(ends_ms, loan) for ends_ms, loan in ends if loan in self._loans]
                heapify(self._ends[id])

    def _attend(self, meter: Meter, book: Book, now_ms: int) -> Ready:
        """Look at one meter: what is over, what is given back, whom to ask next, and when to look again."""
        ready = Ready()
        meters = self.ledger.shared(meter[0])
        if meters is not None:
            meters.advance(now_ms)
        for lent in [lent for lent in book.lent.values() if lent.back_ms <= now_ms]:
            ready.add(self._drop_lent(lent))
        if book.search is not None and book.search.until_ms <= now_ms:
            ready.add(self._ask_more(meter, book, book.search, now_ms))
        book.told_to_wait = {node: until_ms for node, until_ms in book.told_to_wait.items() if until_ms > now_ms}
        if book.pause_ahead_until_ms <= now_ms:
            book.pause_ahead_until_ms = book.pause_until_ms = 0
        if book.borrowed:
            ready.add(self._look_after(meter, book, now_ms))
        self._forget(meter)
        if self.books.get(meter) is book:
            self._attend_at(meter, self._due_ms(book, now_ms))
        return ready

    def _due_ms(self, book: Book, now_ms: int) -> int:
        """When a meter is to be looked at again."""
        times_ms = [lent.back_ms for lent in book.lent.values()]
        times_ms += book.told_to_wait.values()
        times_ms += [self._look_ms(loan, now_ms) for loan in book.borrowed.values()]
        if book.pause_ahead_until_ms:
            times_ms.append(book.pause_ahead_until_ms)
        if book.search is not None:
            times_ms.append(book.search.until_ms)
        return min(times_ms)
