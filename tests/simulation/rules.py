"""One switch for every rule: `off(name)` takes the rule out of the shipped code while the context lasts.

Each is a patch of the method that holds the rule, as small as it can be made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from postmeter.core.effects import Answer, Borrowed, Lent, LoanId, Ready
from postmeter.core.loans import Question
from postmeter.core.meters import Meters
from postmeter.core.rights import Rights
from postmeter.core.roster import Roster
from postmeter.core.shared import NEVER_MS, SharedMeters, Terms
from tests.simulation.host import Host
from tests.simulation.world import World


@dataclass(frozen=True)
class Rule:
    """What a rule says, and the patches (object, attribute, replacement) that turn it off."""

    text: str
    patches: tuple[tuple[Any, str, Any], ...]


@contextmanager
def off(name: str) -> Iterator[None]:
    """Without this rule."""
    with ExitStack() as stack:
        for owner, attribute, replacement in RULES[name].patches:
            stack.enter_context(patch.object(owner, attribute, replacement))
        yield


def _rule(text: str, *patches: tuple[Any, str, Any]) -> Rule:
    return Rule(text, patches)


def _lifetime_only(self: Terms, window_ms: int, lifetime_ms: int) -> int:
    return lifetime_ms + self.margin_ms


def _no_margin(self: Terms, window_ms: int, lifetime_ms: int) -> int:
    return lifetime_ms + window_ms


_start = Rights.start
_on_ask = Rights._on_ask
_hear = Roster.hear


def _send_first(self: Host, ready: Ready) -> None:
    self.send_all(ready)
    if ready.persist:
        self.persist(ready)


def _end_when_over(self: Rights, loan: Borrowed, now_ms: int) -> None:
    if loan.until_ms <= now_ms:
        _end(self, loan, now_ms)


_end = Rights._end


def _nothing_exceeds(self: Rights, meters: SharedMeters) -> list[str]:
    return []


def _newest_only(self: Roster, now_ms: int, wait_ms: int, toll_wait_ms: int) -> list[tuple[str, ...]]:
    return [self.members]


def _gone_at_once(self: Roster, node: str, number: int, now_ms: int, wait_ms: int, toll_wait_ms: int) -> bool:
    if node in self.stopped or node == self.node:
        return False
    return self.handed.get(node, self.born) <= number or self._lingers(node, now_ms, toll_wait_ms)


def _answer_without_question(self: Rights, source: str, answer: Answer, now_ms: int) -> Ready:
    """Any answer with something in it makes a loan, whether it is asked for or over."""
    if answer.loan.borrower == self.node and answer.loan not in self._loans and answer.loan not in self.questions:
        meter = _METERS.get((self.node, answer.loan))
        if meter is not None:
            self.questions[answer.loan] = Question(meter, source, answer.asked_ms, NEVER_MS, self._lifetime_ms(meter))
    if answer.loan in self.questions:
        _METERS[self.node, answer.loan] = self.questions[answer.loan].meter
    return _on_answer(self, source, answer, now_ms)


_METERS: dict[Any, Any] = {}
_on_answer = Rights._on_answer


def _numbers_begin_again(self: Rights) -> LoanId:
    self._number += 1
    return LoanId(self.node, 0, self._number)


def _from_the_answer(self: Rights, source: str, answer: Answer, now_ms: int) -> Ready:
    question = self.questions.get(answer.loan)
    if question is not None:
        question.asked_ms = now_ms
    return _on_answer(self, source, replace(answer, asked_ms=now_ms), now_ms)


def _never_hold(self: SharedMeters, key: str, loans: int) -> None:
    return


def _lend_for_anything(self: Rights, meter: Any, lifetime_ms: int) -> bool:
    return True


def _nothing_held(self: Rights, meter: Any) -> int:
    return 0


def _cover_anything(self: SharedMeters, key: str, amount: int, now_ms: int) -> dict[int, int]:
    """As if the newest slice held all that the loan was of."""
    row = self.row_of(key)
    if row is None or amount <= 0:
        return {}
    rows = self.covers.setdefault(self.slice, {})
    rows[row] = rows.get(row, 0) + amount
    self.move(key, -amount)
    return {self.slice: amount}


def _adopt_at_once(self: Roster, now_ms: int, toll_wait_ms: int) -> bool:
    return self.node in self.members


def _returns_add_up(self: Rights, source: str, id: LoanId, returned: int) -> Ready:
    lent = self._loans.get(id)
    if not isinstance(lent, Lent) or id.borrower != source or returned <= 0:
        return Ready()
    return _repay(self, source, id, min(lent.amount, lent.returned + returned))


_repay = Rights._repay


def _not_by_the_clock(self: SharedMeters, at_ms: int) -> None:
    return


def _end_when_tended(self: Rights, now_ms: int) -> Ready:
    for meters in self._meters():
        self._wake(meters, now_ms)
    return _tend(self, now_ms)


_tend = Rights.tend


def _spend_for_ever(self: Rights, meters: SharedMeters) -> int:
    return 1 << 62


def _lend_all_that_is_spare(self: Rights, meter: Any, now_ms: int) -> int:
    meters = self.ledger.shared(meter[0])
    return max(0, self.spare(meter, now_ms)) if meters is not None and meters.spends else 0


def _never_refused(self: World, stored: Any, registered: Any) -> str:
    return ""


def _hear_no_toll(self: Roster, node: str, generation: int, toll: Any) -> None:
    _hear(self, node, generation, None)


def _forget_before(self: Rights, id: Any, keys: Any, now_ms: int) -> Ready:
    return Ready()


def _wait_for_nobody_who_left(self: Roster, now_ms: int, toll_wait_ms: int) -> bool:
    before = self.generations.get(self.generation - 1, ())
    living = [node for node in before if node != self.node and node not in self.stopped]
    return self.node in self.members and all(self.handed.get(node, -1) >= self.generation for node in living)


def _clean_start(self: Rights, now_ms: int, clean: bool) -> Ready:
    return _start(self, now_ms, True)


def _spends_though_removed(self: Rights, now_ms: int) -> None:
    _refresh_all(self, now_ms)
    self.ledger.spends = True


_refresh_all = Rights._refresh


def _never_old(self: Rights) -> int:
    return NEVER_MS


def _any_shares(self: SharedMeters, key: str, max: int, members: tuple[str, ...]) -> int:
    """The remainder goes to the first nodes by name, but each node believes that it is first."""
    return -(-max // len(members)) if self.ledger.roster.node in members else 0


RULES: dict[str, Rule] = {
    "lender waits for the window, too": _rule(
        "the lender counts a loan as gone for lifetime + window", (Terms, "wait_ms", _lifetime_only)
    ),
    "lender waits for slow clocks": _rule("... + margin for the rate of clocks", (Terms, "wait_ms", _no_margin)),
    "window is stretched": _rule(
        "own usage counts a little longer than a window, in case the own clock is fast",
        (SharedMeters, "oldest", Meters.oldest),
    ),
    "toll after a crash": _rule("after an unclean stop K more counts as used", (Rights, "start", _clean_start)),
    "at most K unflushed": _rule(
        "at most K admissions may be answered before they are on the disk",
        (SharedMeters, "must_wait", lambda self, key, row: False),
    ),
    "loans durable before the reply": _rule("persist, then send", (Host, "_do", _send_first)),
    "excess at handover": _rule(
        "what is used beyond the new share is handed over as a loan",
        (Rights, "_exceeding", _nothing_exceeds),
    ),
    "rises only when older generations are closed": _rule(
        "base is the smallest share of all open generations", (Roster, "open", _newest_only)
    ),
    "stopped nodes linger": _rule(
        "a stopped node counts as gone only after the wait", (Roster, "_spends", _gone_at_once)
    ),
    "stopped nodes are waited for a lifetime longer": _rule(
        "... that is two lifetimes, because what is lent may stand on what was handed over to it",
        (Terms, "stopped_wait_ms", Terms.longest_wait_ms),
    ),
    "newcomers hear of stopped nodes": _rule(
        "who joins knows the generations with stopped nodes until a member is settled",
        (World, "_is_settled", lambda self: True),
    ),
    "ended loans stay ended": _rule(
        "a loan begins only by an open question", (Rights, "_on_answer", _answer_without_question)
    ),
    "questions of an earlier life are void": _rule(
        "loans are numbered within an incarnation", (Rights, "_new_loan", _numbers_begin_again)
    ),
    "borrower's clock starts when it asks": _rule(
        "the lifetime runs from the question, not from the answer", (Rights, "_on_answer", _from_the_answer)
    ),
    "rows are kept while loans live": _rule(
        "a decision sees what is lent, even when a loan ends in it", (SharedMeters, "hold", _never_hold)
    ),
    "loans only out of base": _rule("what is borrowed is not lent on", (Rights, "lendable", _lend_all_that_is_spare)),
    "no merging of what base does not cover": _rule(
        "a lender whose base has fallen below what it lent puts no loans that are over into a new one",
        (Rights, "_may_lend_for", _lend_for_anything),
    ),
    "what is lent stands on handover loans": _rule(
        "what is lent beyond the new share is handed over, and its loan is kept until that is back",
        (Rights, "_held", _nothing_held),
    ),
    "handed over is only what was used or lent": _rule(
        "nothing more can be admitted by what came with a handover",
        (Rights, "_end", _end_when_over),
    ),
    "loans cover only what was admitted": _rule(
        "a loan that is over counts as borrowed only for usage, and as long as that counts",
        (SharedMeters, "cover", _cover_anything),
    ),
    "adopt only when the change before is complete": _rule(
        "a generation is adopted when all living members of the one before the current have handed over",
        (Roster, "may_adopt", _adopt_at_once),
    ),
    "returned is a total": _rule("returned is merged by maximum, not added", (Rights, "_repay", _returns_add_up)),
    "loans end to the millisecond": _rule(
        "a loan ends by the clock, not when somebody looks",
        (SharedMeters, "wake_at", _not_by_the_clock),
        (Rights, "tend", _end_when_tended),
    ),
    "unconfirmed nodes stop spending": _rule(
        "after a start, without the roster, nothing is spent one lifetime after the last sign of life",
        (Rights, "spend_until_ms", _spend_for_ever),
    ),
    "removed nodes admit nothing": _rule(
        "a node that is not in the roster spends nothing", (Rights, "_refresh", _spends_though_removed)
    ),
    "old state is refused": _rule("state from a backup does not start", (World, "refuses", _never_refused)),
    "tolls keep generations open": _rule(
        "a node that does not know what it used counts as spending by the older generation",
        (Roster, "hear", _hear_no_toll),
    ),
    "earlier max counts at handover": _rule(
        "excess is worked out with the largest recent max", (Rights, "change", _forget_before)
    ),
    "wait for tolls of those who left": _rule(
        "nothing is adopted while one who left does not know what it used",
        (Roster, "may_adopt", _wait_for_nobody_who_left),
    ),
    "one order for the remainder": _rule("shares sum to max", (SharedMeters, "share", _any_shares)),
    "old readings are not adopted": _rule(
        "what was read of the roster longer ago than a loan lives is not adopted", (Rights, "_old_ms", _never_old)
    ),
}
