"""Changes of the roster and of limits: shares fall at once, and rise when nobody can be spending by the old ones.

A node that adopts a generation tells every other node of the old and the new one: I spend by this now (Handover). What
it has used or lent beyond its new share stays with it as a loan from those whose share rises, and they deduct it before
they rise. Who lends how much is a pure function of `max`, old and new roster, and meter (roster.transfers).

Such a loan is over from the beginning: it covers, and nothing more is admitted by it. Its time counts as if it had been
asked for when the roster was read: a node that is stopped after that is waited for long enough, by everybody who may
get its share. So a reading is worth nothing when it is older than a loan may live.

    follow      the roster, as it is in etcd        change      a `max` was changed
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from postmeter.core.effects import Accepted, Before, Borrowed, Excess, Handover, Place, Put, Ready, Send
from postmeter.core.loans import Loans
from postmeter.core.meters import UNLIMITED, MetersId
from postmeter.core.roster import Members, transfers
from postmeter.core.shared import NEVER_MS, SharedLedger, SharedMeters

STANDING: Place = "standing"


class HandingOver(Loans):
    """The rights of a node, as nodes come and go and limits change.

    `owed` are the handovers that were not accepted yet, by (receiver, generation).
    """

    def __init__(self, ledger: SharedLedger, incarnation: int) -> None:
        super().__init__(ledger, incarnation)
        self.owed: dict[tuple[str, int], Handover] = {}
        self._before: dict[tuple[MetersId, str | None], Before] = {}
        self._announced: dict[int, Members] = {}
        self._read_ms = 0

    # --- the roster ---------------------------------------------------------------------------------------------------

    def follow(
        self, generations: Mapping[int, Members], stopped: Iterable[str], now_ms: int, read_ms: int | None = None
    ) -> Ready:
        """The roster as it is in etcd, asked for at `read_ms` (None: now). Adopt what is new as soon as may be.

        To be called now and then while anything is new: what was read too long ago is not adopted any more.
        """
        self._now_ms = now_ms
        news = [node for node in stopped if self.roster.stop(node, now_ms)]
        self._announced = {
            number: members for number, members in generations.items() if number > self.roster.generation
        }
        self._read_ms = now_ms if read_ms is None else read_ms
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

    def _adopt_announced(self, now_ms: int) -> Ready:
        ready = Ready()
        while now_ms < self._old_ms() and self.roster.may_adopt(now_ms, self._longest(self.terms.toll_wait_ms)):
            members = self._announced.pop(self.roster.generation + 1, None)
            if members is None:
                break
            ready.add(self._adopt(self.roster.generation + 1, members, now_ms))
        return ready

    def _old_ms(self) -> int:
        """When the last reading is too old to adopt anything."""
        lifetimes_ms = (self.terms.lifetime_ms(meters.id.window_ms) for meters in self._meters())
        return self._read_ms + min(lifetimes_ms, default=NEVER_MS)

    def _adopt(self, number: int, members: Members, now_ms: int) -> Ready:
        """Spend by the next generation, and hand over to the others what is used or lent beyond that."""
        old = self.roster.members
        others = self.roster.adopt(number, members)
        self._refresh(now_ms)
        excess: dict[str, list[Excess]] = {node: [] for node in others}
        for meters in self._meters():
            for key in sorted(self._exceeding(meters)):
                self._hand_over(meters, key, old, excess, now_ms)
        since_ms = -1 if self.roster.unclean_ms is None else now_ms - self.roster.unclean_ms
        ready = Ready([Put(STANDING, self.roster.standing())])
        for node, entries in excess.items():
            handover = Handover(number, tuple(entries), since_ms)
            self.owed[node, number] = handover
            ready.persist.append(Put((node, number), handover))
            ready.send.append(Send(node, handover))
        return ready

    def _exceeding(self, meters: SharedMeters) -> set[str]:
        """Keys that may have more used or lent than the new share; all that are in use if shares differ."""
        least = max(0, meters.quick_max)
        names = (meters.keys.names[row] for row, used in enumerate(meters.used) if used > least)
        lent = {key for (id, key), book in self.books.items() if id == meters.id and book.lent}
        return lent.union(name for name in names if name is not None)

    def _hand_over(
        self, meters: SharedMeters, key: str, old: Members, excess: dict[str, list[Excess]], now_ms: int
    ) -> None:
        """Borrow the excess of one meter from those whose share of it rises, as far as this node's falls.

        If `max` was lowered of late, its rises lie elsewhere than those of the earlier one. Others may go by either, so
        those whose share of the new one rises deduct the excess, too; nobody uses that.
        """
        meter = (meters.id, key)
        beyond = max(-self.spare(meter, now_ms), self._held(meter)) - self._handed_over(meter)
        if beyond <= 0:
            return
        number, lifetime_ms = self.roster.generation, self._lifetime_ms(meter)
        ceiling = meters.ceiling(key, now_ms)
        for top in sorted({ceiling, meters.max_of(key)}, reverse=True):
            left = beyond
            for (giver, taker), part in transfers(top, old, self.roster.members, meter).items():
                amount = min(left, part)
                if giver != self.node or taker not in excess or amount <= 0:
                    continue
                left -= amount
                loan = self._new_loan()
                excess[taker].append(Excess(loan, meter, amount))
                if top == ceiling:
                    borrowed = Borrowed(
                        meter, taker, amount, self._read_ms, lifetime_ms, generation=number, accepted=False
                    )
                    self._borrow(loan, borrowed)
                    self._end(borrowed, now_ms)

    def _on_handover(self, source: str, handover: Handover, now_ms: int) -> Ready:
        number = handover.generation
        if number > self.roster.generation:
            return Ready()
        ready = Ready()
        if not self.roster.knows(source, number):
            for loan, meter, amount in ((excess.loan, excess.meter, excess.amount) for excess in handover.excess):
                ready.add(self._lend(loan, meter, amount, self._lifetime_ms(meter), now_ms))
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
                loan.accepted = True
        return Ready([Put((source, message.generation), None)])

    def change(self, id: MetersId, keys: Iterable[str | None], now_ms: int) -> Ready:
        """To be called just before the `max` of these keys is changed (None: of all that have none of their own)."""
        meters, ready = self.ledger.shared(id), Ready()
        if meters is None or not (meters.max or meters.overrides):
            return ready
        until_ms, changed = now_ms + self.terms.longest_wait_ms(id.window_ms), set(keys)
        if None in changed:
            changed |= {key for key in meters.before if key not in meters.overrides}
        for key in changed:
            top = meters.max if key is None else meters.max_of(key)
            before = Before(id, key, until_ms, max(meters.earlier(key, now_ms), top if top < UNLIMITED else 0))
            self._before[id, key] = meters.before[key] = before
            ready.persist.append(Put(("before", id, key), before))
        return ready

    def _forget_changes(self, now_ms: int) -> Ready:
        """Nobody can be using by an earlier `max` any more."""
        over = [where for where, before in self._before.items() if before.until_ms <= now_ms]
        for id, key in over:
            del self._before[id, key]
            meters = self.ledger.shared(id)
            if meters is not None:
                del meters.before[key]
        return Ready([Put(("before", *where), None) for where in over])

    def _let_go(self, now_ms: int) -> None:
        """Forget unclean starts and generations that no longer matter; shares may rise by that."""
        longest_ms = self._longest(self.terms.toll_wait_ms)
        if self.roster.unclean_ms is not None and now_ms - self.roster.unclean_ms > longest_ms:
            self.roster.unclean_ms = None
        self.roster.prune(now_ms, self._longest(self.terms.stopped_wait_ms), longest_ms)
        self._refresh(now_ms)

    def is_settled(self, now_ms: int) -> bool:
        """Whether nobody can be spending by an older generation any more: shares are what they are to be."""
        waits_ms = self._longest(self.terms.stopped_wait_ms), self._longest(self.terms.toll_wait_ms)
        return len(self.roster.open(now_ms, *waits_ms)) == 1

    def _longest(self, wait_ms: Callable[[int], int]) -> int:
        return max((wait_ms(meters.id.window_ms) for meters in self._meters()), default=0)

    def _refresh(self, now_ms: int) -> None:
        """Work out base shares anew: the roster has changed, or somebody counts as gone by now."""
        self.ledger.spends = self.roster.is_member
        for meters in self._meters():
            meters.refresh(now_ms)
