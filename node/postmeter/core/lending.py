"""What a lender does: answers questions, takes back what is given back, and tells those whom it had to refuse.

It lends only as the answer to a question, only what it has to spare, and only out of its own base: what it borrowed it
gives back to its owner, where the asker finds it. A loan is durable before the answer leaves.
"""

from __future__ import annotations

from dataclasses import replace

from postmeter.core.effects import Answer, Ask, Lent, LoanId, Meter, Offer, Put, Ready, Return, Returned, Send
from postmeter.core.loans import Loans
from postmeter.defaults import LOANS_MAX, SEEK_PAUSE_MS_MAX


class Lending(Loans):
    """The rights of a node, as those see them who borrow from it."""

    def _on_ask(self, source: str, ask: Ask, now_ms: int) -> Ready:
        if ask.loan in self._loans or ask.loan.borrower != source:
            return Ready()
        earlier = [self._loans[id] for id in ask.instead if id.borrower == source and id in self._loans]
        merged = [lent for lent in earlier if isinstance(lent, Lent) and lent.meter == ask.meter]
        ready, can = Ready(), self.lendable(ask.meter, now_ms)
        if len(self._loans) >= LOANS_MAX or not self._may_lend_for(ask.meter, ask.lifetime_ms):
            can, merged = 0, []
        more = max(0, min(ask.amount, can if ask.urgent else can // 2))
        if ask.urgent and more < ask.amount:
            ready = self._give_back(ask.meter, self._unneeded(ask.meter, now_ms, keep=can))
        again = {to for to, _ in ready.send} | ({self.node} if self.is_seeking(ask.meter) else set())
        amount, wait_ms = more + sum(lent.left for lent in merged), 0
        if amount > 0:
            for lent in merged:
                ready.add(self._drop_lent(lent))
            ready.add(self._lend(ask.loan, ask.meter, amount, ask.lifetime_ms, now_ms))
        if not more:
            wait_ms = min(SEEK_PAUSE_MS_MAX, self._expected_ms(ask.meter, now_ms))
            self._tell_to_wait(source, ask.meter, now_ms + wait_ms)
        ready.send.append(Send(source, Answer(ask.loan, amount, ask.asked_ms, wait_ms, tuple(sorted(again)))))
        return ready

    def _may_lend_for(self, meter: Meter, lifetime_ms: int) -> bool:
        """Not longer than is usual, and nothing while more is lent than the base covers.

        The base has fallen then. What a handover lent for that ends, and nothing that rests on it must outlive it.
        """
        return lifetime_ms <= self._lifetime_ms(meter) and not self._held(meter)

    def _expected_ms(self, meter: Meter, now_ms: int) -> int:
        """How long until this node may have something to lend, if nobody gives anything back."""
        meters, book = self.ledger.shared(meter[0]), self.books.get(meter)
        times = [lent.back_ms for lent in book.lent.values()] if book is not None else []
        if meters is not None:
            times += [meters.freed_ms(number) for number, _ in meters.slices(meters.row_of(meter[1]), now_ms)[:1]]
        return max(0, min(times, default=now_ms + SEEK_PAUSE_MS_MAX) - now_ms)

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
        self._move(lent.meter, less.left - lent.left)
        if less.left:
            self._set_lent(less)
            return Ready([Put(id, less)])
        return self._drop_lent(less)
