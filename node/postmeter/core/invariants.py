"""What must always be true of rights, in one place. The simulator asks after every step.

    Watch           one node while it runs: its books, its columns, its bounds; what only grows, has grown
    check_cluster   several nodes at one moment: nothing is spent by two of them, nobody writes a foreign cell

Both raise AssertionError and say what is wrong. They look only: time does not go on by that, and no loan ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from postmeter.core.effects import Borrowed, LoanId, Meter
from postmeter.core.loans import Book
from postmeter.core.meters import UNLIMITED
from postmeter.core.rights import Rights
from postmeter.core.shared import NEVER_MS, SharedMeters
from postmeter.defaults import BOOKS_MAX, LOANS_MAX, QUESTIONS_MAX


class Excess(NamedTuple):
    """What is used beyond what may be, when the base, less the toll, was this and these loans were known.

    It grows when the base falls; and when loans that are over were to become part of one whose answer was lost.
    `changed_ms` tells changes of `max`: between two looks the base may have risen and fallen.
    """

    base: int
    changed_ms: int
    amount: int
    borrowed: set[LoanId]


class Watch:
    """Looks at one node, and remembers what it saw until the next look."""

    def __init__(self, rights: Rights) -> None:
        self.rights = rights
        self._returned: dict[tuple[LoanId, int], int] = {}
        self._handed: dict[str, int] = {}
        self._generation = -1
        self._excess: dict[Meter, Excess] = {}

    def check(self, tended_ms: int = 0) -> None:
        """The node does not contradict itself. `tended_ms`: when it was last tended; what was over then is gone."""
        rights = self.rights
        rights.roster.check_invariants()
        # A question that comes again after all was given back begins another loan of that name; nobody borrows it.
        returned: dict[tuple[LoanId, int], int] = {}
        excess: dict[Meter, Excess] = {}
        for meter, book in rights.books.items():
            _check_book(rights, meter, book, tended_ms)
            returned |= {(id, lent.back_ms): lent.returned for id, lent in book.lent.items()}
            returned |= {(id, loan.until_ms): loan.returned for id, loan in book.borrowed.items()}
            meters = rights.ledger.shared(meter[0])
            more = _excess(meters, meter[1], book) if meters is not None else None
            if more is not None:
                excess[meter] = more
        loans = sum(len(book.lent) + len(book.borrowed) for book in rights.books.values())
        assert loans == len(returned) == rights.loans_count, "every loan lies in one book"
        assert len(rights.books) <= BOOKS_MAX, "books are bounded"
        assert loans <= LOANS_MAX, "loans are bounded"
        assert len(rights.questions) <= QUESTIONS_MAX + len(rights.roster.members), "questions are bounded"
        assert all(question.until_ms > tended_ms for question in rights.questions.values()), "an old question is open"
        assert all(node not in rights.roster.stopped for node, _ in rights.owed), "owed to a stopped node"
        for loan_and_end, amount in returned.items():
            assert self._returned.get(loan_and_end, 0) <= amount, f"{loan_and_end[0]}: less is returned than before"
        if not self._roster_has_changed():
            for meter, now in excess.items():
                before = self._excess.get(meter, now)
                excused = now.base < before.base or now.borrowed != before.borrowed
                excused |= now.changed_ms != before.changed_ms
                assert excused or now.amount <= max(0, before.amount), f"{meter[1]}: {now.amount} used without rights"
        self._returned, self._excess = returned, excess

    def _roster_has_changed(self) -> bool:
        """Whether this node, or another one, has handed over since; neither takes anything back."""
        roster, generation, handed = self.rights.roster, self._generation, self._handed
        assert generation <= roster.generation, "an older generation was adopted"
        for node, number in handed.items():
            assert number <= roster.handed.get(node, -1), f"{node} has taken a handover back"
        self._generation, self._handed = roster.generation, dict(roster.handed)
        return (generation, handed) != (self._generation, self._handed)


def _check_book(rights: Rights, meter: Meter, book: Book, tended_ms: int) -> None:
    key = meter[1]
    assert book.due_ms < NEVER_MS, f"{key}: nobody looks after it any more"
    for id, lent in book.lent.items():
        assert 0 < lent.left <= lent.amount, f"{key}: a loan of nothing"
        assert id.borrower != rights.node, f"{key}: lent to itself"
        assert lent.back_ms > tended_ms, f"{key}: what is back counts as lent"
    for id, loan in book.borrowed.items():
        assert 0 <= loan.acknowledged <= loan.returned <= loan.amount, f"{key}: returned more than was lent"
        assert id.borrower == rights.node != loan.lender, f"{key}: somebody else's loan"
        assert rights.gone_ms(loan) + loan.lifetime_ms > tended_ms, f"{key}: a loan is kept that the lender has back"
    meters = rights.ledger.shared(meter[0])
    if meters is not None:
        row = meters.row_of(key)
        moved, total = 0, book.lent_sum - book.living_sum
        if row is not None:
            moved = meters.moved.get(row, 0) + meters.covered(row)
        assert moved == total, f"{key}: the column says {moved}, the book {total}"


def _excess(meters: SharedMeters, key: str, book: Book) -> Excess | None:
    """What is used without rights to it; None where that may be, because a handover plays a part or an overdraft."""
    row, base = meters.row_of(key), meters.base(key) - meters.toll(key)
    changed_ms = max((before.until_ms for of, before in meters.before.items() if of in (key, None)), default=0)
    if meters.overdraft or book.lent_sum > base or any(loan.generation >= 0 for loan in book.borrowed.values()):
        return None
    if row is None:
        return Excess(base, changed_ms, 0, set(book.borrowed))
    meters.settle(row)
    return Excess(base, changed_ms, meters.used[row] - base, set(book.borrowed))


def check_cluster(nodes: Mapping[str, tuple[Rights, int]], meters: Iterable[Meter], max: Mapping[Meter, int]) -> None:
    """`nodes` are rights and the time on their clock; `max` is the largest one in force for a meter anywhere."""
    for meter in meters:
        usable = {name: _usable(rights, meter, now_ms) for name, (rights, now_ms) in nodes.items()}
        assert sum(usable.values()) <= max[meter] or max[meter] >= UNLIMITED, (
            f"{meter[1]}: the rights {usable} sum to more than {max[meter]}"
        )
        for name, (rights, now_ms) in nodes.items():
            book = rights.books.get(meter)
            for id, loan in book.borrowed.items() if book is not None and _spends(rights, meter, now_ms) else ():
                if loan.lender in nodes and loan.left and _lives(loan, now_ms):
                    _check_loan(name, id, loan, nodes[loan.lender][0])


def _usable(rights: Rights, meter: Meter, now_ms: int) -> int:
    """What the node may use by now, if it is not used yet: its base that is not lent, and loans that live."""
    meters, book = rights.ledger.shared(meter[0]), rights.books.get(meter)
    if meters is None or not _spends(rights, meter, now_ms):
        return 0
    usable = meters.base(meter[1])
    if book is not None:
        usable -= book.lent_sum
        usable += sum(loan.left for loan in book.borrowed.values() if _lives(loan, now_ms))
    return max(0, usable)


def _lives(loan: Borrowed, now_ms: int) -> bool:
    return loan.covers is None and loan.until_ms > now_ms


def _spends(rights: Rights, meter: Meter, now_ms: int) -> bool:
    meters = rights.ledger.shared(meter[0])
    return meters is not None and meters.spends and (rights.confirmed or now_ms < rights.spend_until_ms(meters))


def _check_loan(name: str, id: LoanId, loan: Borrowed, lender: Rights) -> None:
    """A loan that lives. Of one that is over, or was given back, the lender may have begun another one of that name."""
    key, theirs = loan.meter[1], lender.books.get(loan.meter)
    lent = theirs.lent.get(id) if theirs is not None else None
    if lent is None:
        assert not loan.accepted, f"{key}: {name} spends a loan that {loan.lender} does not know of"
        return
    assert lent.amount == loan.amount, f"{key}: {name} has changed what {loan.lender} lent"
    assert loan.acknowledged <= lent.returned <= loan.returned, f"{key}: {loan.lender} took back what {name} still has"
