"""What must always be true of rights, in one place. The simulator asks after every step, an agent now and then.

    check_node      one node: its books, its columns and its bounds
    check_cluster   several nodes at one moment: nothing is spent by two of them

Both raise AssertionError and say what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from postmeter.core.effects import Meter
from postmeter.core.loans import Borrowed
from postmeter.core.rights import Rights
from postmeter.defaults import BOOKS_MAX, LOANS_MAX, QUESTIONS_MAX


def check_node(rights: Rights) -> None:
    """The rights of one node do not contradict each other, and nothing grows without bound."""
    rights.roster.check_invariants()
    loans = 0
    for (id, key), book in rights.books.items():
        total = 0
        for loan_id, lent in book.lent.items():
            assert 0 < lent.left <= lent.amount, f"{key}: a loan of nothing"
            assert loan_id.borrower != rights.node, f"{key}: lent to itself"
            total += lent.left
        for loan_id, loan in book.borrowed.items():
            assert 0 <= loan.acknowledged <= loan.returned <= loan.amount, f"{key}: returned more than was lent"
            assert loan_id.borrower == rights.node != loan.lender, f"{key}: somebody else's loan"
            total -= loan.left if loan.covers is None else 0
        meters = rights.ledger.shared(id)
        if meters is not None:
            row = meters.row_of(key)
            moved = 0 if row is None else meters.moved.get(row, 0) + meters.covered(row)
            assert moved == total, f"{key}: the column says {moved}, the book {total}"
        loans += len(book.lent) + len(book.borrowed)
    assert loans == rights.loans_count, "every loan lies in one book"
    assert len(rights.books) <= BOOKS_MAX, "books are bounded"
    assert loans <= LOANS_MAX, "loans are bounded"
    assert len(rights.questions) <= QUESTIONS_MAX + len(rights.roster.members), "questions are bounded"
    assert all(node not in rights.roster.stopped for node, _ in rights.owed), "a stopped node is to take over something"


def check_cluster(nodes: Mapping[str, tuple[Rights, int]], meters: Iterable[Meter], max: Mapping[Meter, int]) -> None:
    """`nodes` are rights and the time on their clock; `max` is the largest one in force for a meter anywhere."""
    for meter in meters:
        bases = {name: _base(rights, meter, now_ms) for name, (rights, now_ms) in nodes.items()}
        assert sum(bases.values()) <= max[meter], f"{meter[1]}: the base shares {bases} sum to more than {max[meter]}"
        for name, (rights, now_ms) in nodes.items():
            book = rights.books.get(meter)
            for loan_id, loan in book.borrowed.items() if book is not None else ():
                lender = nodes.get(loan.lender)
                if lender is None or not loan.left or not loan.accepted or loan.until_ms <= now_ms:
                    continue
                theirs = lender[0].books.get(meter)
                lent = theirs.lent.get(loan_id) if theirs is not None else None
                assert lent is not None, f"{meter[1]}: {name} spends a loan that {loan.lender} does not know of"
                assert _fits(loan, lent.left), f"{meter[1]}: {loan.lender} took back what {name} still has"


def _base(rights: Rights, meter: Meter, now_ms: int) -> int:
    meters = rights.ledger.shared(meter[0])
    if meters is None or not meters.spends:
        return 0
    meters.advance(now_ms)
    return meters.base(meter[1])


def _fits(loan: Borrowed, left: int) -> bool:
    return loan.left <= left
