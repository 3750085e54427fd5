"""What a borrower does: asks those who can probably help, then others, and gives back what it does not need.

A node short of rights begins a search. It asks in waves: a few who can probably help, then more of them, or all if
nothing is known; those who were heard to have got something; at last, if somebody waits, some others. A loan begins
only as the answer to an open question. A question is closed by its first answer, by its age, and by a restart, because
the numbers of questions contain the incarnation: so an answer may arrive late, twice or in any order.

Asked for is what is needed now and as much as was used of late, so that who sends much from one node asks seldom, and
who roams takes little to where it will not be needed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import islice

from postmeter.core.effects import Answer, Ask, Borrowed, LoanId, Meter, Offer, Ready, Return, Returned, Send, join
from postmeter.core.loans import Book, Loans, Question, Search
from postmeter.core.meters import UNLIMITED
from postmeter.core.roster import order, share
from postmeter.core.shared import SharedMeters
from postmeter.defaults import (
    BOOKS_MAX,
    LOAN_MORE_PART,
    LOAN_MORE_USED_MIN,
    MERGED_MAX,
    QUESTIONS_MAX,
    SEEK_PAUSE_MS_MIN,
    SEEK_ROUNDS_MAX,
    SEEK_SWEEP_MAX,
    SEEK_WAVE_MS,
)


class Borrowing(Loans):
    """The rights of a node, as those see them who need some."""

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
        paused = now_ms < (book.pause_until_ms if urgent else book.pause_ahead_until_ms)
        paused = paused and not self._unneeded(meter, now_ms, keep=amount)
        room = self._unused(meters, meter[1], now_ms) if urgent else self._room(meters, meter[1], now_ms)
        if paused or spare >= amount or amount > room:
            self._forget(meter)
            return Ready()
        book.search = Search(amount, urgent)
        return self._ask_more(meter, book, book.search, now_ms)

    def replenish(self, meters: SharedMeters, rows: Iterable[int], now_ms: int) -> Ready:
        """Borrow ahead of need where less than a quarter of the allowance is left; `rows` were charged of late."""
        steps = []
        for row in rows:
            key = meters.keys.names[row]
            if key is None or 4 * meters.used[row] <= 3 * meters.quick_max:
                continue
            allowance = meters.rights(key, now_ms)
            if 4 * (allowance - meters.usage(row, now_ms)) <= max(0, allowance):
                meter = (meters.id, key)
                more = self._more(meter, now_ms)
                if more > 0:
                    steps.append(self.seek(meter, more, now_ms, urgent=False))
        return join(steps)

    def _more(self, meter: Meter, now_ms: int) -> int:
        """What to borrow for the messages to come, if most are sent through this node: as many as of late.

        Who roams will probably send the next one through another node.
        """
        meters, key = self.ledger.shared(meter[0]), meter[1]
        if meters is None:
            return 0
        row, top, room = meters.row_of(key), meters.max_of(key), self._room(meters, key, now_ms)
        recent = meters.recent(row, self.terms.lifetime_ms(meters.id.window_ms), now_ms)
        if recent < LOAN_MORE_USED_MIN or 2 * meters.usage(row, now_ms) < top - room:
            return 0
        return max(0, min(max(recent, top // LOAN_MORE_PART), room))

    def _room(self, meters: SharedMeters, key: str, now_ms: int) -> int:
        """What nobody has committed of `max` in the whole cluster, as far as is known."""
        seen = self.committed_seen(meters.id, key)
        if not seen:
            return meters.max_of(key) - meters.usage(meters.row_of(key), now_ms)
        others = sum(committed for node, committed in seen.items() if node != self.node)
        return meters.max_of(key) - others - self.committed((meters.id, key), now_ms)

    def _unused(self, meters: SharedMeters, key: str, now_ms: int) -> int:
        """What nobody has used of `max` in the whole cluster, as far as is known: it may be less, but not more."""
        return meters.max_of(key) - self.used_seen(meters.id, key) - meters.usage(meters.row_of(key), now_ms)

    # --- a search -----------------------------------------------------------------------------------------------------

    def _ask_more(self, meter: Meter, book: Book, search: Search, now_ms: int) -> Ready:
        """The next wave of a search, or its end."""
        short = search.amount - self.spare(meter, now_ms)
        over = self._unneeded(meter, now_ms, keep=search.amount)
        peers = self._whom_to_ask(meter, search, short, over) if short > 0 else []
        if not peers or len(self.questions) >= QUESTIONS_MAX:
            book.search = None
            if short > 0:
                book.pause_ahead_until_ms = now_ms + search.pause_ms
                book.pause_until_ms = book.pause_ahead_until_ms if search.urgent else 0
                self._attend_at(meter, book.pause_ahead_until_ms)
            self._forget(meter)
            return Ready()
        search.waves += 1
        search.until_ms = now_ms + SEEK_WAVE_MS
        self._attend_at(meter, search.until_ms)
        more = self._more(meter, now_ms)
        ready = Ready()
        if not more:
            ready = self._give_back(meter, {id: over[id] for id in over if book.borrowed[id].lender in peers})
        for peer in peers:
            id, instead = self._new_loan(), self._to_merge(book, peer) if more else ()
            brief = search.urgent and not more
            brief_ms = self.terms.now_lifetime_ms(meter[0].window_ms)
            lifetime_ms = brief_ms if brief else self._lifetime_ms(meter)
            search.asked.add(peer)
            search.waiting.add(id)
            self.questions[id] = Question(meter, peer, now_ms, now_ms + brief_ms, lifetime_ms, instead)
            amount = short + more // len(peers)
            ready.send.append(Send(peer, Ask(id, meter, amount, search.urgent, now_ms, lifetime_ms, instead)))
        return ready

    @staticmethod
    def _to_merge(book: Book, lender: str) -> tuple[LoanId, ...]:
        """Loans that are over: in a new one they can be used again, as what they stand for leaves the window."""
        over = (id for id, loan in book.borrowed.items() if loan.lender == lender and loan.may_be_merged)
        return tuple(islice(over, MERGED_MAX))

    def _whom_to_ask(self, meter: Meter, search: Search, short: int, over: Mapping[LoanId, int]) -> list[str]:
        """First as many peers as will probably do, then the others, then those who may have got something meanwhile.

        At last some others, if somebody waits: rights may have been on their way from one node to another.
        """
        if self.node not in self.roster.members:
            return []
        seen = self.committed_seen(*meter)
        spares = self._expected(meter, seen)
        for id, amount in over.items():
            spares[self.books[meter].borrowed[id].lender] += amount
        peers = [node for node in spares if node != self.node and node not in self.roster.stopped]
        peers.sort(key=lambda node: -spares[node])
        left = [node for node in peers if node not in search.asked]
        again = sorted(search.again - {self.node})
        if seen:
            probable = [node for node in left if spares[node] > (0 if search.urgent else 1)]
            found = self._next_round(search, again) or _enough(probable, spares, short << search.waves // 2)
            return found or self._sweep(search, peers)
        if left:
            return left if search.urgent and search.waves else _enough(left, spares, short << search.waves)
        if again:
            return self._next_round(search, again)
        return self._sweep(search, peers)

    @staticmethod
    def _sweep(search: Search, peers: list[str]) -> list[str]:
        """Some, once, if somebody waits: first those who were not asked, and of these who may have most."""
        if not search.urgent or search.swept:
            return []
        search.swept = True
        return sorted(peers, key=search.asked.__contains__)[:SEEK_SWEEP_MAX]

    @staticmethod
    def _next_round(search: Search, again: list[str]) -> list[str]:
        search.again = set()
        search.rounds += bool(again)
        return again if search.rounds < SEEK_ROUNDS_MAX else []

    def _expected(self, meter: Meter, seen: Mapping[str, int]) -> defaultdict[str, int]:
        """What each node can probably lend; the first is another one for each node that asks."""
        members, meters = self.roster.members, self.ledger.shared(meter[0])
        top = meters.max_of(meter[1]) if meters is not None else 0
        ordered = order(meter, members)
        place = ordered.index(self.node)
        rotated = (*ordered[place:], *ordered[:place])
        return defaultdict(int, {node: share(top, members, node, meter) - seen.get(node, 0) for node in rotated})

    # --- answers ------------------------------------------------------------------------------------------------------

    def _on_answer(self, source: str, answer: Answer, now_ms: int) -> Ready:
        question = self.questions.get(answer.loan)
        if question is None or question.lender != source or question.asked_ms != answer.asked_ms:
            return Ready()
        del self.questions[answer.loan]
        if answer.amount > 0 and question.until_ms > now_ms:
            self._merge(question.instead)
            loan = Borrowed(question.meter, source, answer.amount, question.asked_ms, question.lifetime_ms)
            self._borrow(answer.loan, loan)
        return self._heard(question.meter, answer, now_ms)

    def _heard(self, meter: Meter, answer: Answer, now_ms: int) -> Ready:
        """Go on with a search, if this was its last open question."""
        book = self.books.get(meter)
        if book is None or book.search is None or answer.loan not in book.search.waiting:
            return Ready()
        search = book.search
        search.waiting.discard(answer.loan)
        search.again.update(answer.again)
        if answer.wait_ms:
            search.pause_ms = max(SEEK_PAUSE_MS_MIN, min(search.pause_ms, answer.wait_ms))
        if search.waiting and self.spare(meter, now_ms) < search.amount:
            return Ready()
        return self._ask_more(meter, book, search, now_ms)

    def _on_offer(self, offer: Offer) -> Ready:
        book = self.books.get(offer.meter)
        if book is not None:
            book.pause_until_ms = 0
        return Ready()

    def _close_questions(self, now_ms: int) -> None:
        """Forget questions whose answers could begin no loan any more."""
        for id in [id for id, question in self.questions.items() if question.until_ms <= now_ms]:
            del self.questions[id]

    # --- giving back --------------------------------------------------------------------------------------------------

    def _look_after(self, meter: Meter, book: Book, now_ms: int) -> Ready:
        """Give back what is left of loans that are over, and say again what was not acknowledged.

        What usage stood on until lately is given back only when somebody asks: soon its owner has it in any case.
        """
        over = self._unneeded(meter, now_ms, keep=UNLIMITED)
        over = {id: amount for id, amount in over.items() if not book.borrowed[id].covers}
        ready = self._give_back(meter, over)
        if over:
            book.pause_until_ms = 0
        for id, loan in list(book.borrowed.items()):
            if self.gone_ms(loan) <= now_ms:
                self._drop_borrowed(id, loan)
            elif loan.acknowledged < loan.returned and id not in over:
                ready.send.append(Send(loan.lender, Return(id, loan.returned)))
        return ready

    def _on_returned(self, source: str, message: Returned) -> Ready:
        loan = self._loans.get(message.loan)
        if isinstance(loan, Borrowed) and loan.lender == source:
            loan.acknowledged = max(loan.acknowledged, min(message.returned, loan.returned))
            if loan.acknowledged == loan.amount:
                self._drop_borrowed(message.loan, loan)
        return Ready()


def _enough(nodes: list[str], spares: Mapping[str, int], amount: int) -> list[str]:
    """The first of these nodes, as many as together probably have the amount."""
    expected = 0
    for count, node in enumerate(nodes, 1):
        expected += max(0, spares[node])
        if expected >= amount:
            return nodes[:count]
    return nodes
