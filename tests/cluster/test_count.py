"""The judge of the runs: it blames what certainly went wrong, and nothing else."""

from __future__ import annotations

from itertools import count
from random import Random

from .count import Meter, Reply, Verdict, first_full, most_admitted, refused_wrongly

USER: Meter = ("per-user", "a@one.test")
DOMAIN: Meter = ("per-domain", "one.test")
WINDOW_S = 10.0


def reply(asked_s: float, answered_s: float, verdict: Verdict = "admitted", amount: int = 1) -> Reply:
    return Reply("mx1", (USER, DOMAIN), amount, asked_s, answered_s, verdict)


def wrong(replies: list[Reply], user_max: int, domain_max: int = 100) -> list[Reply]:
    return refused_wrongly(replies, {USER: user_max, DOMAIN: domain_max}, counted_s=WINDOW_S)


def test_admissions_of_one_window_are_added_up() -> None:
    """Amounts count, refusals and lost requests do not, and the worst window is found wherever it begins."""
    replies = [reply(0, 0, amount=9), reply(11, 11, amount=2), reply(15, 15, "refused"), reply(16, 16, "lost")]
    assert 12 == most_admitted([*replies, reply(20, 20, amount=7), reply(21, 21, amount=3)], WINDOW_S)


def test_admissions_that_may_lie_further_apart_are_not_added_up() -> None:
    """The first may have been decided before the window, and the last one after it: no blame."""
    assert 1 == most_admitted([reply(0, 3), reply(9, 10.1)], WINDOW_S)
    assert 2 == most_admitted([reply(0, 3), reply(9, 10)], WINDOW_S)


def test_a_slow_admission_does_not_hide_the_fast_ones_after_it() -> None:
    """The window is looked for at each admission."""
    assert 2 == most_admitted([reply(0, 50), reply(1, 2), reply(3, 4)], WINDOW_S)


def test_a_full_window_is_found_where_it_begins() -> None:
    """The first of them; none where there is always one lacking."""
    replies = [reply(0, 0), reply(11, 11), reply(15, 15), reply(30, 30), reply(31, 31)]
    assert 11 == first_full(replies, 2, WINDOW_S)
    assert first_full(replies, 3, WINDOW_S) is None


def test_no_schedule_within_the_cap_is_blamed() -> None:
    """Decisions at most 5 in any window, seen through random delays, are never counted as more."""
    chance = Random(1)
    for _ in range(200):
        decided = [0.0]
        for number in count(1):
            earliest = decided[-1] if number < 5 else max(decided[-1], decided[-5] + WINDOW_S + 0.001)
            decided.append(earliest + chance.expovariate(1))
            if len(decided) == 60:
                break
        seen = [reply(at - chance.expovariate(1), at + chance.expovariate(1)) for at in decided]
        assert most_admitted(seen, WINDOW_S) <= 5


def test_a_refusal_with_room_is_wrong() -> None:
    """What was answered longer ago than it counts is no reason to refuse."""
    refused = reply(12, 12, "refused")
    assert [refused] == wrong([reply(0, 1), reply(8, 8), refused], user_max=2)


def test_a_refusal_is_right_if_there_may_have_been_no_room() -> None:
    """What may have counted still, or already, and what was lost, speak for the agent."""
    refused = reply(12, 14, "refused")
    assert [] == wrong([reply(0, 2), reply(8, 8), refused], user_max=2)
    assert [] == wrong([reply(8, 8), reply(13, 15), refused], user_max=2)
    assert [] == wrong([reply(8, 8), reply(9, 11, "lost"), refused], user_max=2)
    assert [refused] == wrong([reply(8, 8), reply(14.5, 15), refused], user_max=2)


def test_a_refusal_is_right_if_any_of_its_meters_may_have_been_full() -> None:
    """A request falls under all its limits."""
    refused = reply(12, 12, "refused", amount=2)
    assert [] == wrong([reply(8, 8), refused], user_max=10, domain_max=2)
    assert [refused] == wrong([reply(8, 8), refused], user_max=10, domain_max=3)
