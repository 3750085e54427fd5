"""Single steps of the rights core; what many of them add up to is shown by tests/simulation."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import postmeter.core.rights
from postmeter.core.effects import Answer, Ask, Borrowed, LoanId, Put, Ready, Return, Returned, Send
from postmeter.core.identity import Identity, is_impostor, refusal
from postmeter.core.invariants import Watch
from postmeter.core.meters import MetersId
from postmeter.core.rights import Rights
from postmeter.core.roster import Roster
from postmeter.core.shared import SharedLedger, SharedMeters, Terms
from postmeter.defaults import BOOKS_TENDED_MAX, SEEK_SWEEP_MAX

HOUR_MS = 3_600_000
ID = MetersId("user", "sasl_username", "messages", HOUR_MS)
METER = (ID, "alice@example.com")
NOW_MS = 10 * HOUR_MS


def node(name: str, max: int = 10, members: tuple[str, ...] = ("a", "b")) -> tuple[Rights, SharedMeters]:
    """One of these nodes, started, with one meter."""
    ledger = SharedLedger(Roster(name, {1: members}, 0, {}), Terms())
    rights = Rights(ledger, 1, alive_ms=NOW_MS)
    meters = ledger.open(ID)
    assert isinstance(meters, SharedMeters)
    meters.set_max(max, {})
    rights.start(NOW_MS, clean=True)
    rights.follow({1: members}, (), NOW_MS)
    return rights, meters


def use(meters: SharedMeters, amount: int, now_ms: int = NOW_MS) -> None:
    """Charge the meter."""
    meters.advance(now_ms)
    meters.charge(meters.keys.open(METER[1]), METER[1], amount)


def ask(rights: Rights, amount: int) -> Ask:
    """The question that the node asks when it needs so much."""
    (send,) = rights.seek(METER, amount, NOW_MS).send
    assert isinstance(send.message, Ask)
    return send.message


def borrow(borrower: Rights, amount: int) -> Ask:
    """Let node "a" have so much, with what "b" lends. Returns the question."""
    question = ask(borrower, amount)
    (answer,) = node("b")[0].receive("a", question, NOW_MS).send
    borrower.receive("b", answer.message, NOW_MS)
    return question


def test_untouched_meter_has_its_base_share_and_no_state() -> None:
    """Half of `max` on each of two nodes, and nothing is kept."""
    rights, meters = node("a")
    assert 5 == rights.spare(METER, NOW_MS)
    assert not rights.books
    assert not meters.keys.rows


def test_a_clean_stop_loses_nothing_that_was_borrowed() -> None:
    """After the next start the loan covers what was used, what is left of it is given back, and the disk forgets it."""
    borrower, meters = node("a")
    question = borrow(borrower, 8)
    use(meters, 2)
    kept = {place: record for place, record in borrower.stop(NOW_MS).persist if record is not None}

    ledger = SharedLedger(borrower.roster, Terms())
    borrower = Rights(ledger, 2, kept, alive_ms=NOW_MS)
    again = ledger.open(ID)
    assert isinstance(again, SharedMeters)
    again.set_max(10, {})
    use(again, 2)
    assert Put(question.loan, None) in borrower.start(NOW_MS, clean=True).persist
    Watch(borrower).check()
    assert 5 == borrower.spare(METER, NOW_MS)
    urgent = Ask(LoanId("b", 1, 1), METER, 6, True, NOW_MS, 1000)
    assert Send("b", Return(question.loan, 1)) in borrower.receive("b", urgent, NOW_MS).send


def test_a_loan_that_ends_in_the_stop_covers_what_was_used() -> None:
    """Nobody looked at the time since it was over: the stop ends it, and not twice."""
    borrower, meters = node("a")
    question = borrow(borrower, 8)
    use(meters, 3)
    (put,) = borrower.stop(NOW_MS + question.lifetime_ms).persist
    assert isinstance(put.record, Borrowed)
    assert 3 == sum((put.record.covers or {}).values())


def test_old_reasons_to_look_at_a_meter_are_forgotten() -> None:
    """However often somebody is told to wait while a loan lasts for long."""
    lender, _ = node("a")
    for number in range(700):
        now_ms = NOW_MS + 5_000 * number
        question = Ask(LoanId("b", 1, number), METER, 10, True, now_ms, Terms().lifetime_ms(HOUR_MS))
        lender.receive("b", question, now_ms)
        lender.tend(now_ms + 3_000)
    assert 1 == lender.loans_count
    assert len(lender._due) <= 2 * len(lender.books) + BOOKS_TENDED_MAX + 2


def test_meters_are_looked_after_in_portions() -> None:
    """However many loans are over at the same moment, others run in between."""
    lender, _ = node("a")
    for number in range(BOOKS_TENDED_MAX + 50):
        question = Ask(LoanId("b", 1, number), (ID, f"user{number}"), 2, True, NOW_MS, 1_000)
        lender.receive("b", question, NOW_MS)
    assert BOOKS_TENDED_MAX + 50 == lender.loans_count
    back_ms = NOW_MS + Terms().wait_ms(HOUR_MS, 1_000)
    lender.tend(back_ms)
    assert 50 == lender.loans_count
    lender.tend(back_ms)
    assert 0 == lender.loans_count


def test_nothing_is_left_of_a_limit_that_is_gone() -> None:
    """Rows that were kept for what is lent are free when its meters are retired; if it comes back, it is lent still."""
    lender, meters = node("b")
    lender.receive("a", ask(node("a")[0], 7), NOW_MS)
    lender.ledger.retain([])
    lender.ledger.expire(NOW_MS, 100)
    assert not meters.keys.rows
    again = lender.ledger.open(ID)
    again.set_max(10, {})
    assert 3 == lender.spare(METER, NOW_MS)


def test_loan_is_persisted_before_the_answer() -> None:
    """The record of the loan is in the same step as the answer, to be durable first."""
    lender, _ = node("b")
    question = ask(node("a")[0], 7)
    ready = lender.receive("a", question, NOW_MS)
    assert [question.loan] == [put.where for put in ready.persist]
    assert [Send("a", Answer(question.loan, 2, NOW_MS))] == ready.send
    assert 3 == lender.spare(METER, NOW_MS)


def test_question_asked_twice_is_answered_once() -> None:
    """A repeated message lends nothing more."""
    lender, _ = node("b")
    question = ask(node("a")[0], 7)
    lender.receive("a", question, NOW_MS)
    assert Ready() == lender.receive("a", question, NOW_MS)


def test_answer_without_question_is_nothing() -> None:
    """Late, repeated and invented answers begin no loan."""
    borrower, _ = node("a")
    borrower.receive("b", Answer(LoanId("a", 1, 99), 5, NOW_MS), NOW_MS)
    assert 5 == borrower.spare(METER, NOW_MS)


def test_loan_ends_to_the_millisecond() -> None:
    """Nothing needs to look after it: asking for the allowance does."""
    borrower, meters = node("a")
    question = ask(borrower, 7)
    borrower.receive("b", Answer(question.loan, 2, NOW_MS), NOW_MS + 5)
    lifetime_ms = question.lifetime_ms
    assert 7 == meters.allowance(METER[1], NOW_MS + lifetime_ms - 1)
    assert 5 == meters.allowance(METER[1], NOW_MS + lifetime_ms)


def test_lender_keeps_what_its_usage_stands_on() -> None:
    """Of a base of 5, 4 are used: 1 can be lent."""
    lender, meters = node("b")
    use(meters, 4)
    assert 1 == lender.lendable(METER, NOW_MS)


def test_column_stays_one_comparison() -> None:
    """What is lent lies in the column of usage, so that used + amount <= least share is still the whole question."""
    lender, meters = node("b")
    lender.receive("a", ask(node("a")[0], 8), NOW_MS)
    assert [3] == [meters.used[row] for row in meters.keys.rows.values()]
    assert 0 == meters.usage(meters.row_of(METER[1]), NOW_MS)


def test_idle_meter_leaves_nothing_behind() -> None:
    """Rights go home, both sides forget."""
    borrower, theirs = node("a")
    lender, ours = node("b")
    question = ask(borrower, 7)
    for send in lender.receive("a", question, NOW_MS).send:
        borrower.receive("b", send.message, NOW_MS)
    later_ms = NOW_MS + Terms().lifetime_ms(HOUR_MS) // 8 + 1
    (back,) = borrower.tend(later_ms).send
    assert Send("b", Return(question.loan, 2)) == back
    (thanks,) = lender.receive("a", back.message, later_ms).send
    assert Returned(question.loan, 2) == thanks.message
    borrower.receive("b", thanks.message, later_ms)
    for rights, meters in ((borrower, theirs), (lender, ours)):
        rights.tend(later_ms)
        Watch(rights).check()
        assert [] == [*rights.books, *meters.keys.rows, *meters.moved]


def test_hopeless_charge_asks_nobody() -> None:
    """More than `max` cannot be collected from anybody."""
    rights, _ = node("a")
    assert Ready() == rights.seek(METER, 11, NOW_MS)


def test_overdraft_only_while_cut_off() -> None:
    """A fraction of the share on top of the allowance, and nothing of it is lent."""
    rights, meters = node("a")
    meters.overdraft = 0.5
    assert 5 == meters.allowance(METER[1], NOW_MS)
    rights.ledger.isolated = True
    assert 7 == meters.allowance(METER[1], NOW_MS)
    assert 5 == rights.lendable(METER, NOW_MS)


def test_loan_that_is_over_covers_what_was_admitted_by_it() -> None:
    """It counts as borrowed as long as the usage counts: the node is not in debt, and nothing can be used again."""
    borrower, meters = node("a")
    question = ask(borrower, 7)
    borrower.receive("b", Answer(question.loan, 2, NOW_MS), NOW_MS)
    use(meters, 7)
    over_ms = NOW_MS + question.lifetime_ms
    assert 0 == borrower.spare(METER, over_ms)
    freed_ms = meters.freed_ms(NOW_MS // meters.slice_ms)
    assert 0 == borrower.spare(METER, freed_ms - 1)
    assert 5 == borrower.spare(METER, freed_ms)
    Watch(borrower).check()


def test_loans_that_are_over_become_part_of_the_next_one() -> None:
    """The lender puts them into one; nothing of its base is lent twice."""
    borrower, meters = node("a", 40)
    lender, theirs = node("b", 40)
    use(theirs, 15)
    use(meters, 20)
    first = ask(borrower, 1)
    for send in lender.receive("a", first, NOW_MS).send:
        borrower.receive("b", send.message, NOW_MS)
    assert 5 == borrower.spare(METER, NOW_MS)
    over_ms = NOW_MS + first.lifetime_ms
    use(meters, 5, over_ms - 1)
    (send,) = borrower.seek(METER, 1, over_ms).send
    assert isinstance(send.message, Ask)
    assert (first.loan,) == send.message.instead
    ready = lender.receive("a", send.message, over_ms)
    assert [first.loan, send.message.loan] == [put.where for put in ready.persist]
    (answer,) = ready.send
    borrower.receive("b", answer.message, over_ms)
    assert [send.message.loan] == list(borrower.books[METER].borrowed) == list(lender.books[METER].lent)
    assert (5, 5) == (borrower.books[METER].borrowed_sum, lender.books[METER].lent_sum)
    for rights in (borrower, lender):
        Watch(rights).check()


def test_question_is_for_what_is_needed_even_if_others_seem_to_have_all() -> None:
    """What is heard of others is late, and may add up to more than there is; nobody asks for less than nothing."""
    borrower, meters = node("a", 40)
    borrower.receive("b", Answer(ask(borrower, 30).loan, 10, NOW_MS), NOW_MS)
    use(meters, 30)
    borrower.committed_seen = lambda _, key: {"b": 25}
    assert 1 == ask(borrower, 1).amount


def test_few_are_asked_when_nobody_is_known_to_have_anything() -> None:
    """Of a hundred nodes that have committed all, some are asked all the same: what is known of them is late."""
    members = tuple(f"n{number:03}" for number in range(100))
    borrower, meters = node("n000", 200, members)
    borrower.committed_seen = lambda _, key: dict.fromkeys(members, 26)
    use(meters, borrower.spare(METER, NOW_MS))
    assert SEEK_SWEEP_MAX == len(asked_in_vain(borrower))
    assert not borrower.is_seeking(METER)


def test_who_seemed_to_have_something_and_has_not_is_not_asked_twice() -> None:
    """Those are asked at last who did not seem to have anything."""
    members = tuple(f"n{number:03}" for number in range(100))
    borrower, meters = node("n000", 200, members)
    committed = {name: 0 if 0 < number <= 20 else 26 for number, name in enumerate(members)}
    borrower.committed_seen = lambda _, key: committed
    use(meters, borrower.spare(METER, NOW_MS))
    asked = asked_in_vain(borrower)
    assert 20 + SEEK_SWEEP_MAX == len(asked) == len(set(asked))


def asked_in_vain(borrower: Rights) -> list[str]:
    """Let everybody say no whom a node asks for one right; returns who they were."""
    asked, sends = [], borrower.seek(METER, 1, NOW_MS).send
    while sends:
        asked += [send.to for send in sends]
        answers = [
            borrower.receive(send.to, Answer(send.message.loan, 0, NOW_MS), NOW_MS)
            for send in sends
            if isinstance(send.message, Ask)
        ]
        sends = [send for ready in answers for send in ready.send]
    return asked


def test_question_for_less_than_nothing_frees_nothing() -> None:
    """What becomes part of another loan stays lent: the borrower's usage stands on it."""
    lender, _ = node("b", 40)
    first = ask(node("a", 40)[0], 25)
    lender.receive("a", first, NOW_MS)
    again = replace(first, loan=first.loan._replace(number=9), amount=-3, instead=(first.loan,))
    (answer,) = lender.receive("a", again, NOW_MS).send
    assert isinstance(answer.message, Answer)
    assert 5 == answer.message.amount == lender.books[METER].lent_sum


def test_changed_override_costs_one_record_however_many_there_are() -> None:
    """The earlier `max` of that key is remembered until nobody can be using by it, and nothing of the others."""
    rights, meters = node("a")
    meters.set_max(10, {f"user{number}": 5 for number in range(1_000)})
    (put,) = rights.change(ID, ["user7"], NOW_MS).persist
    meters.set_override("user7", 2)
    assert ("before", ID, "user7") == put.where
    assert [5, 5, 10] == [meters.ceiling(key, NOW_MS) for key in ("user7", "user8", "nobody")]
    over_ms = NOW_MS + rights.terms.longest_wait_ms(HOUR_MS)
    assert [put.where] == [put.where for put in rights.tend(over_ms).persist if put.record is None]
    assert 2 == meters.ceiling("user7", over_ms)


def test_earlier_max_of_all_counts_for_who_has_none_of_his_own() -> None:
    """Also for a key that had one until lately: the larger of what it had."""
    rights, meters = node("a")
    meters.set_max(10, {"alice": 50, "bob": 5})
    rights.change(ID, [None], NOW_MS)
    meters.set_max(3, {"alice": 50, "bob": 5})
    rights.change(ID, ["alice"], NOW_MS)
    meters.set_override("alice", None)
    assert [50, 5, 10] == [meters.ceiling(key, NOW_MS) for key in ("alice", "bob", "nobody")]


def test_roster_that_was_read_long_ago_is_not_adopted() -> None:
    """Somebody may have been declared stopped since, and others may have begun to wait for it."""
    rights, _ = node("a", 12)
    generations = {1: ("a", "b"), 2: ("a", "b", "c")}
    lifetime_ms = Terms().lifetime_ms(HOUR_MS)
    rights.follow(generations, (), NOW_MS + lifetime_ms, read_ms=NOW_MS)
    assert 1 == rights.roster.generation
    rights.follow(generations, (), NOW_MS + lifetime_ms, read_ms=NOW_MS + 1)
    assert 2 == rights.roster.generation


def test_old_and_foreign_state_is_refused() -> None:
    """State that is older than what etcd knows, of another machine, or in use."""
    stored = Identity("a", 3, 500, "m1")
    assert "" == refusal(stored, "m1", stored, alive=False)
    assert "" == refusal(stored, "m1", None, alive=False)
    assert "older" in refusal(stored, "m1", replace(stored, incarnation=4), alive=False)
    assert "older" in refusal(stored, "m1", replace(stored, written_ms=501), alive=False)
    assert "another machine" in refusal(stored, "m2", stored, alive=False)
    assert "another process" in refusal(stored, "m1", stored, alive=True)
    assert is_impostor(stored, replace(stored, incarnation=4))


def test_core_is_pure() -> None:
    """No event loop, no clock, no randomness, no sockets and no files in the core."""
    forbidden = {"asyncio", "grpc", "os", "time", "random", "socket", "logging", "pathlib", "threading"}
    for path in Path(postmeter.core.rights.__file__).parent.glob("*.py"):
        for item in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in item.names] if isinstance(item, ast.Import) else []
            names += [item.module or ""] if isinstance(item, ast.ImportFrom) else []
            assert not forbidden & {name.partition(".")[0] for name in names}, path.name
