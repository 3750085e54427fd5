"""What one node has lent and borrowed: the books, and what follows from them.

    Book        all that there is to know of one meter; exists only while there is something
    Loans       the books of a node: what can be used, what can be lent; loans begin, end, and are given back

The life of a loan, by the borrower's clock from when it asked: until `until_ms` the rights can be used like the node's
own. Then nothing more may be admitted by them. What was admitted by them still counts, and the lender waits for that:
so the loan *covers* it, slice by slice, until it has left the window, and nobody needs to say anything. What the loan
does not cover any more is given back when somebody wants it. The borrower forgets the loan at `gone_ms`, when the
lender has it back in any case.

lending.py, borrowing.py and handover.py are what nodes do with this; rights.py has all of it in one object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from heapq import heappush
from itertools import islice

from postmeter.core.effects import Borrowed, Lent, LoanId, Meter, Put, Ready, Return, Send
from postmeter.core.meters import MetersId
from postmeter.core.roster import Roster
from postmeter.core.shared import NEVER_MS, SharedLedger, SharedMeters
from postmeter.defaults import LOAN_LOOKS, LOANS_MAX, SEEK_PAUSE_MS_MAX


@dataclass(slots=True)
class Question:
    """An Ask that may still be answered, until `until_ms`. The loan would live `lifetime_ms` from `asked_ms`."""

    meter: Meter
    lender: str
    asked_ms: int
    until_ms: int
    lifetime_ms: int
    instead: tuple[LoanId, ...] = ()


@dataclass(slots=True)
class Search:
    """Peers are being asked, some first and then more, until the node could charge `amount`."""

    amount: int
    urgent: bool
    waves: int = 0
    until_ms: int = 0
    pause_ms: int = SEEK_PAUSE_MS_MAX
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
        """What is borrowed and has not been given back, whether it can be used or not."""
        return sum(loan.left for loan in self.borrowed.values())

    @property
    def living_sum(self) -> int:
        """What is borrowed and can be used."""
        return sum(loan.left for loan in self.borrowed.values() if loan.covers is None)


class Loans:
    """The books of one node.

    `incarnation` must be larger than that of any earlier start, durably. `confirmed`: this node has seen, since its
    start, that it is in the roster. `committed_seen` may be set to a function that tells for a meter what every node
    has `committed` as far as is known, {} if it is not; `used_seen` to one that tells what all others have used. They
    save questions, and no cap depends on them. What is committed may be out of date in both directions, so only what is
    used can be a reason to ask nobody.
    """

    def __init__(self, ledger: SharedLedger, incarnation: int) -> None:
        self.ledger = ledger
        self.roster: Roster = ledger.roster
        self.terms = ledger.terms
        self.node = self.roster.node
        self.incarnation = incarnation
        self.books: dict[Meter, Book] = {}
        self.questions: dict[LoanId, Question] = {}
        self.confirmed = False
        self.committed_seen: Callable[[MetersId, str], Mapping[str, int]] = lambda _, key: {}
        self.used_seen: Callable[[MetersId, str], int] = lambda _, key: 0
        self._changed: dict[Meter, None] = {}
        self._loans: dict[LoanId, Borrowed | Lent] = {}
        self._ends: dict[MetersId, list[tuple[int, LoanId]]] = {}
        self._due: list[tuple[int, Meter]] = []
        self._number = 0
        self._now_ms = 0

    # --- what there is ------------------------------------------------------------------------------------------------

    def spare(self, meter: Meter, now_ms: int) -> int:
        """What the node could still use or give away without an overdraft. Less than 0 if it must not use anything."""
        meters = self.ledger.shared(meter[0])
        if meters is None:
            return 0
        return meters.rights(meter[1], now_ms) - meters.usage(meters.row_of(meter[1]), now_ms)

    def lendable(self, meter: Meter, now_ms: int) -> int:
        """What the node has to spare, but nothing that it borrowed: only its own base, less the toll."""
        meters = self.ledger.shared(meter[0])
        if meters is None or not meters.spends:
            return 0
        book = self.books.get(meter)
        of_base = meters.base(meter[1]) - meters.toll(meter[1]) - (book.lent_sum if book is not None else 0)
        return max(0, min(self.spare(meter, now_ms), of_base))

    def committed(self, meter: Meter, now_ms: int) -> int:
        """Used or lent, less what is borrowed: what is not free of the node's base. Less than 0: it can give back."""
        meters, book = self.ledger.shared(meter[0]), self.books.get(meter)
        used = 0 if meters is None else meters.usage(meters.row_of(meter[1]), now_ms)
        return used + (book.lent_sum - book.borrowed_sum if book is not None else 0)

    def take_changed(self, most: int) -> dict[Meter, int]:
        """What is lent less what is borrowed, of up to so many meters where that has changed meanwhile."""
        changed = list(islice(self._changed, most))
        for meter in changed:
            del self._changed[meter]
        books = {meter: self.books.get(meter) for meter in changed}
        return {meter: book.lent_sum - book.borrowed_sum if book else 0 for meter, book in books.items()}

    def is_seeking(self, meter: Meter) -> bool:
        """Whether peers are being asked: waiting may help."""
        book = self.books.get(meter)
        return book is not None and book.search is not None

    @property
    def loans_count(self) -> int:
        """How many loans this node knows of, lent or borrowed."""
        return len(self._loans)

    # --- loans begin and end ------------------------------------------------------------------------------------------

    def _lend(self, id: LoanId, meter: Meter, amount: int, lifetime_ms: int, now_ms: int) -> Ready:
        """The rights are gone from now on, and for as long as the borrower or its usage can have them."""
        lent = Lent(id, meter, amount, now_ms + self.terms.wait_ms(meter[0].window_ms, lifetime_ms))
        self._move(meter, amount)
        self._set_lent(lent)
        return Ready([Put(id, lent)])

    def _set_lent(self, lent: Lent) -> None:
        self._changed[lent.meter] = None
        self._book(lent.meter).lent[lent.loan] = lent
        self._loans[lent.loan] = lent
        self._attend_at(lent.meter, lent.back_ms)

    def _drop_lent(self, lent: Lent) -> Ready:
        self._changed[lent.meter] = None
        self._move(lent.meter, -lent.left)
        del self._loans[lent.loan], self.books[lent.meter].lent[lent.loan]
        self._forget(lent.meter)
        return Ready([Put(lent.loan, None)])

    def _borrow(self, id: LoanId, loan: Borrowed) -> None:
        meters = self.ledger.shared(loan.meter[0])
        if meters is None or len(self._loans) >= LOANS_MAX:
            return
        heappush(self._ends.setdefault(loan.meter[0], []), (loan.until_ms, id))
        meters.hold(loan.meter[1], 1)
        meters.move(loan.meter[1], -loan.left)
        meters.wake_at(loan.until_ms)
        self._set_borrowed(id, loan, loan.until_ms)

    def _set_borrowed(self, id: LoanId, loan: Borrowed, now_ms: int) -> None:
        self._changed[loan.meter] = None
        self._book(loan.meter).borrowed[id] = loan
        self._loans[id] = loan
        self._attend_at(loan.meter, self._look_ms(loan, now_ms))

    def _end(self, loan: Borrowed, now_ms: int) -> None:
        """Nothing more may be admitted by a loan. It covers what was."""
        meters = self.ledger.shared(loan.meter[0])
        loan.covers = {}
        if meters is not None:
            meters.move(loan.meter[1], loan.left)
            loan.covers = meters.cover(loan.meter[1], loan.left - self._held_by(loan), now_ms)
            meters.hold(loan.meter[1], -1)

    def _merge(self, ids: Iterable[LoanId]) -> None:
        """These loans, which are over, have become part of another one."""
        for id in ids:
            loan = self._loans.get(id)
            if isinstance(loan, Borrowed) and loan.covers is not None:
                meters = self.ledger.shared(loan.meter[0])
                if meters is not None:
                    meters.uncover(loan.meter[1], loan.covers)
                self._drop_borrowed(id, loan)

    def _held(self, meter: Meter) -> int:
        """What is lent and stands on loans that came with handovers, because the base has fallen."""
        meters, book = self.ledger.shared(meter[0]), self.books.get(meter)
        return max(0, book.lent_sum - meters.base(meter[1])) if meters is not None and book is not None else 0

    def _held_by(self, loan: Borrowed) -> int:
        """What of that stands on this loan."""
        if loan.generation < 0:
            return 0
        return max(0, self._held(loan.meter) - self._handed_over(loan.meter, loan))

    def _handed_over(self, meter: Meter, but: Borrowed | None = None) -> int:
        """What came with handovers, and no usage stands on."""
        book = self.books.get(meter)
        loans = book.borrowed.values() if book is not None else ()
        return sum(loan.free(0) for loan in loans if loan.generation >= 0 and loan is not but)

    def _drop_borrowed(self, id: LoanId, loan: Borrowed) -> None:
        meters = self.ledger.shared(loan.meter[0])
        if meters is not None and loan.covers is None:
            meters.hold(loan.meter[1], -1)
        self._changed[loan.meter] = None
        del self._loans[id], self.books[loan.meter].borrowed[id]
        self._forget(loan.meter)

    def _unneeded(self, meter: Meter, now_ms: int, keep: int = 0) -> dict[LoanId, int]:
        """What no usage stands on: of loans that are over, and of those that live all but `keep`."""
        meters, book = self.ledger.shared(meter[0]), self.books.get(meter)
        if meters is None or book is None or not book.borrowed:
            return {}
        unused, oldest = self.spare(meter, now_ms) - keep, meters.oldest(now_ms)
        held = self._held(meter)
        unneeded: dict[LoanId, int] = {}
        for id, loan in book.borrowed.items():
            amount = loan.free(oldest)
            if loan.generation >= 0:
                amount, held = amount - held, max(0, held - amount)
            if loan.covers is None:
                amount = min(amount, unused)
                unused -= max(0, amount)
            if amount > 0 and loan.accepted:
                unneeded[id] = amount
        return unneeded

    def _give_back(self, meter: Meter, amounts: Mapping[LoanId, int]) -> Ready:
        """Give borrowed rights back to their owners."""
        ready = Ready()
        for id, amount in amounts.items():
            loan = self.books[meter].borrowed[id]
            loan.returned += amount
            self._changed[meter] = None
            if loan.covers is None:
                self._move(meter, amount)
            ready.send.append(Send(loan.lender, Return(id, loan.returned)))
        return ready

    # --- bookkeeping --------------------------------------------------------------------------------------------------

    def _meters(self) -> list[SharedMeters]:
        return [meters for meters in self.ledger.meters.values() if isinstance(meters, SharedMeters)]

    def _lifetime_ms(self, meter: Meter) -> int:
        return self.terms.lifetime_ms(meter[0].window_ms)

    def gone_ms(self, loan: Borrowed) -> int:
        """When the lender has it back for certain, whatever the two clocks do."""
        wait_ms = self.terms.wait_ms(loan.meter[0].window_ms, loan.lifetime_ms)
        return loan.asked_ms + wait_ms + 2 * self.terms.stretch_ms(wait_ms) + self.terms.margin_ms

    def _look_ms(self, loan: Borrowed, now_ms: int) -> int:
        """When to look at a loan. The same moments for all that are alike, so that what is due goes in one message."""
        if loan.covers is not None and loan.acknowledged == loan.returned:
            return self.gone_ms(loan)
        lifetime_ms = loan.lifetime_ms if loan.covers is None else self._lifetime_ms(loan.meter)
        every_ms = max(1, lifetime_ms // LOAN_LOOKS)
        return min(self.gone_ms(loan), (max(now_ms, loan.until_ms) // every_ms + 1) * every_ms)

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

    def _move(self, meter: Meter, amount: int) -> None:
        meters = self.ledger.shared(meter[0])
        if meters is not None and amount:
            meters.move(meter[1], amount)

    def _attend_at(self, meter: Meter, at_ms: int) -> None:
        """Have `tend` look at a meter at that time, or earlier."""
        book = self._book(meter)
        if at_ms < book.due_ms:
            book.due_ms = at_ms
            heappush(self._due, (at_ms, meter))
