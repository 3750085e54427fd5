"""The decision: stages, charges, all or none, repeats, shadow, and what Postfix is told."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postmeter.core.conditions import Condition, cidr, equal, present
from postmeter.core.limits import Key, KeyPart, Override
from postmeter.core.meters import UNLIMITED, Ledger
from postmeter.core.policy import Decision, Policy, Repeats
from postmeter.errors import ProtocolError
from tests.unit.support import DAY_MS, HOUR_MS, key, limit, policy, request

NOW_MS = 10 * DAY_MS


def used(made: Policy, name: str = "per-user", who: str = "alice@example.com") -> int:
    """What `who` has used on the first window of a limit."""
    meters = next(meters for id, meters in made._ledger.meters.items() if id.limit == name)
    return meters.usage(meters.keys.row(who), NOW_MS)


def send(made: Policy, now_ms: int = NOW_MS, **given: object) -> Decision:
    """One message at its end."""
    return made.decide(request(**given), now_ms)


def test_charges_at_the_end_and_looks_before() -> None:
    """RCPT and DATA change nothing, END-OF-MESSAGE costs its recipients, and what does not fit is refused at each."""
    made = policy(limit())
    for stage in ("RCPT", "DATA"):
        assert "DUNNO" == send(made, protocol_state=stage, recipient_count=0).action
    assert 0 == used(made)
    assert "DUNNO" == send(made, recipient_count=19).action
    assert 19 == used(made)
    assert not send(made, protocol_state="RCPT", recipient_count=0).refused
    assert send(made, protocol_state="DATA", recipient_count=2).refused
    assert send(made, recipient_count=2).refused
    assert 19 == used(made)


@pytest.mark.parametrize("stage", ["VRFY", "ETRN", "CONNECT", "EHLO", "HELO", "MAIL", "", "nonsense"])
def test_other_stages_are_never_counted(stage: str) -> None:
    """VRFY runs through the recipient restrictions, too: it is let through and costs nothing."""
    made = policy(limit(windows={HOUR_MS: 0}))
    assert Decision("DUNNO") == send(made, protocol_state=stage)


def test_the_refusal_says_who_what_and_when() -> None:
    """The 21st recipient is deferred with the limit, the key, the numbers and the time to wait."""
    made = policy(limit())
    for _ in range(20):
        assert "DUNNO" == send(made).action
    refusal = send(made, now_ms=NOW_MS + 1)
    assert refusal.refused
    assert (
        "450 4.7.1 per-user: alice@example.com has used 20 of 20 recipients per 1h, try again in 1h 1m"
        == refusal.action
    )
    assert "DUNNO" == send(made, sasl_username="bob@example.com").action


def test_refused_mail_is_charged_nowhere() -> None:
    """All limits or none: what one limit refuses costs nothing on the others, whichever stands first."""
    for order in (1, -1):
        limits = [limit("a", windows={HOUR_MS: 100}), limit("b", windows={HOUR_MS: 1, DAY_MS: 5})][::order]
        made = policy(*limits)
        assert not send(made).refused
        assert send(made).refused
        assert [1, 1] == [used(made, "a"), used(made, "b")]


def test_a_charge_that_can_never_fit_is_refused_for_good() -> None:
    """More recipients than max: trying again is of no use, so the answer is permanent, even while something is used."""
    made = policy(limit())
    send(made)
    action = send(made, recipient_count=21).action
    assert (
        "550 5.7.1 per-user: 21 recipients at once can never be accepted, alice@example.com may use 20 per 1h" == action
    )
    assert send(made, recipient_count=20).action.startswith("450 4.7.1 ")


def test_of_several_windows_the_longest_wait_is_told() -> None:
    """With the hour and the day used up, the client is told to come back when both let it in."""
    made = policy(limit(windows={HOUR_MS: 1, DAY_MS: 1}))
    send(made)
    assert send(made).action.endswith("of 1 recipients per 24h, try again in 24h 24m")


@pytest.mark.parametrize(
    ("count", "given", "cost"),
    [
        ("messages", {"recipient_count": 7, "size": 900}, 1),
        ("recipients", {"recipient_count": 7, "size": 900}, 7),
        ("recipients", {"recipient_count": 0}, 1),
        ("recipients", {"recipient_count": ""}, 1),
        ("bytes", {"recipient_count": 7, "size": 900}, 900),
        ("bytes", {"size": 0}, 0),
    ],
)
def test_what_a_message_costs(count: str, given: Mapping[str, int | str], cost: int) -> None:
    """A message costs 1 message, its accepted recipients, or its bytes."""
    made = policy(limit(count=count, windows={HOUR_MS: 10_000}))
    made.decide(request(**given), NOW_MS)
    assert cost == used(made)


def test_a_repeated_request_is_charged_once() -> None:
    """Postfix asks again after a lost reply: the same instance is recognised, an empty one never is."""
    made = policy(limit())
    for _ in range(3):
        assert not send(made, instance="1a.2b.3c.0", recipient_count=15).refused
    assert 15 == used(made)
    send(made, instance="1a.2b.3c.1")
    send(made)
    send(made)
    assert 18 == used(made)


def test_a_mark_that_is_forgotten_makes_room() -> None:
    """The other one of its pair of places is kept beside the next."""
    repeats, first, second, third = Repeats(), 1 << 40, 2 << 40, 3 << 40
    for forgotten, kept in ((first, second), (second, first)):
        repeats.add(kept)
        repeats.add(forgotten)
        repeats.forget(forgotten)
        repeats.add(third)
        assert [True, True, False] == [mark in repeats for mark in (kept, third, forgotten)]
        repeats.forget(third)
        repeats.forget(kept)
    assert 0 not in repeats


def test_a_repeat_of_what_was_refused_is_decided_anew() -> None:
    """Only what was charged is recognised: a refused message that fits later is charged then."""
    made = policy(limit())
    send(made, recipient_count=20)
    assert send(made, instance="i").refused
    assert not send(made, now_ms=NOW_MS + 2 * HOUR_MS, instance="i").refused


def test_data_may_come_again_with_more_recipients() -> None:
    """A rejected DATA does not end the transaction: under the same instance the larger count is looked at."""
    made = policy(limit())
    assert not send(made, protocol_state="DATA", instance="i", recipient_count=20).refused
    assert send(made, protocol_state="DATA", instance="i", recipient_count=21).refused
    assert not send(made, instance="i", recipient_count=20).refused


def test_without_its_key_a_limit_does_not_apply() -> None:
    """On port 25 there is no sasl_username: no limit by user, and no meter for nobody."""
    made = policy(limit(windows={HOUR_MS: 0}))
    assert "DUNNO" == send(made, sasl_username="").action
    assert {} == next(iter(made._ledger.meters.values())).keys.rows


def test_each_spelling_of_a_login_is_the_same_key() -> None:
    """Alice and ALICE are one sender."""
    made = policy(limit())
    send(made, sasl_username="Alice@Example.COM")
    assert 1 == used(made)


@pytest.mark.parametrize(
    ("address", "counted"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("unknown", None),
        ("", None),
    ],
)
def test_client_addresses_are_networks(address: str, counted: str | None) -> None:
    """IPv6 clients share a /64, IPv4 clients stand alone, and what is no address is nobody."""
    made = policy(limit(key=key("client_address")))
    send(made, client_address=address)
    assert ([counted] if counted else []) == list(made._ledger.keys("client_address/32/64").rows)


def test_a_key_of_several_attributes() -> None:
    """Each pair is counted by itself, and a missing part means that nobody is."""
    made = policy(limit(key=Key((KeyPart("sasl_username"), KeyPart("sender_domain")))))
    send(made)
    send(made, sender="Alice@Other.Example")
    send(made, sender="")
    rows = made._ledger.keys("sasl_username,sender_domain").rows
    assert ["alice@example.com,example.com", "alice@example.com,other.example"] == list(rows)


@pytest.mark.parametrize(
    "who",
    [
        "",
        "nobody",
        "@",
        "A@B@C.Example",
        "x@" + "D" * 600,
        "Y" * 600,
        "\u0130@" + "\u0130" * 600,
        "\u03a3@\u039f\u03a3",
    ],
)
def test_the_quick_path_cuts_keys_as_the_readings_do(who: str) -> None:
    """Whatever is in a login, what is charged is the key that a refusal names; and there is no meter for nobody."""
    made = policy(limit(), limit("domain", key=key("sasl_domain")))
    asked = request(sasl_username=who)
    readings = [reading for _, _, several in made.explain(asked, NOW_MS) for reading in several]
    made.decide(asked, NOW_MS)
    assert [reading.key for reading in readings] == [key for kind in made._ledger.kinds.values() for key in kind.rows]


def test_without_its_key_a_limit_does_not_apply_even_if_there_is_no_more_room() -> None:
    """When all rows are taken, new keys are counted together, and what has no key is still not counted."""
    made = policy(limit(), ledger=Ledger(keys_max=1))
    for who in ("alice@example.com", "bob@example.com", ""):
        send(made, sasl_username=who)
    assert [1, 1] == list(next(iter(made._ledger.meters.values())).used)


def test_match_and_exempt() -> None:
    """A limit covers only what all its conditions match, and nobody who is exempt by key or by conditions."""
    inside = Condition("client_address", "cidr: 192.0.2.0/24", cidr(["192.0.2.0/24"]))
    signed_in = Condition("sasl_username", "present: true", present(True))
    bounce = Condition("sender", "postmaster@example.com", equal("postmaster@example.com"))
    made = policy(
        limit(match=(inside, signed_in), exempt_keys=frozenset({"list@example.com"}), exempt=((bounce,),)),
    )
    send(made, client_address="198.51.100.1")
    send(made, sasl_username="list@example.com")
    send(made, sender="Postmaster@Example.com")
    assert 0 == used(made)
    send(made)
    assert 1 == used(made)


def test_overrides() -> None:
    """Another max for one key until its date: more, unlimited, or blocked, which is refused for good."""
    window = {HOUR_MS: 20}
    overrides = {
        "big@example.com": Override({HOUR_MS: 30}),
        "boss@example.com": Override({HOUR_MS: UNLIMITED}),
        "evil@example.com": Override({HOUR_MS: 0}),
        "once@example.com": Override({HOUR_MS: 30}, until_s=1000.0),
    }
    made = policy(limit(windows=window, overrides=overrides))
    assert 1000.0 == made.apply_overrides(999.0)
    assert [False, False, True, False] == [send(made, sasl_username=k, recipient_count=30).refused for k in overrides]
    assert "550 5.7.1 per-user: evil@example.com is blocked" == send(made, sasl_username="evil@example.com").action
    assert float("inf") == made.apply_overrides(1000.0)
    assert send(made, sasl_username="once@example.com").refused


def test_shadow_changes_nothing() -> None:
    """A limit in shadow reports what it would have done, and neither refuses nor keeps others from counting."""
    made = policy(limit("new", windows={HOUR_MS: 1}, shadow=True), limit())
    send(made)
    decision = send(made)
    assert ("DUNNO", False) == (decision.action, decision.refused)
    assert ["new"] == [reading.limit.name for reading in decision.exceeded]
    assert [1, 2] == [used(made, "new"), used(made)]


@pytest.mark.parametrize(
    ("action", "told", "refused", "at_rcpt", "charged"),
    [
        ("reject", "550 5.7.1 over", True, True, 1),
        ("hold", "HOLD over", True, False, 1),
        ("WARN {key}", "WARN alice@example.com", False, False, 2),
        ("DISCARD", "DISCARD", True, False, 1),
        ("421 4.7.1 {limit}", "421 4.7.1 a", True, True, 1),
    ],
)
def test_what_an_action_does(action: str, told: str, refused: bool, at_rcpt: bool, charged: int) -> None:
    """A refusal is given early; what diverts or marks the mail waits for the end; passing mail is charged elsewhere."""
    made = policy(limit("a", windows={HOUR_MS: 1}, action=action, text="over"), limit())
    send(made)
    assert at_rcpt == (send(made, protocol_state="RCPT").action != "DUNNO")
    decision = send(made)
    assert (told, refused) == (decision.action, decision.refused)
    assert charged == used(made)


def test_limits_that_need_the_recipient_charge_at_rcpt() -> None:
    """At the end `recipient` may be empty: a limit by recipient_domain is charged once for every recipient at RCPT."""
    made = policy(limit(key=key("recipient_domain"), windows={HOUR_MS: 2}), limit("user"))
    for number in (1, 2):
        for _ in range(2):
            who = f"r{number}@example.net"
            assert not send(made, protocol_state="RCPT", instance="i", recipient=who, recipient_count=0).refused
    assert send(made, protocol_state="RCPT", instance="i", recipient="r3@example.net").refused
    assert not send(made, instance="i", recipient="", recipient_count=2).refused
    assert [2, 2] == [used(made, who="example.net"), used(made, "user")]


def test_charging_at_rcpt_counts_a_message_once() -> None:
    """With charge_at rcpt three recipients of one transaction are one message, and nothing is counted at the end."""
    made = policy(limit(count="messages"), limit("r"), charge_at="rcpt")
    for number in range(3):
        send(made, protocol_state="RCPT", instance="i", recipient=f"r{number}@example.net", recipient_count=0)
    send(made, instance="i", recipient_count=3)
    send(made, protocol_state="RCPT", instance="j", recipient_count=0)
    assert [2, 4] == [used(made), used(made, "r")]


def test_a_charge_that_must_reach_the_disk_is_held() -> None:
    """Beyond 5 % of max unflushed the decision is held; taken back, it is as if it had not been asked."""
    made = policy(limit())
    assert send(made, instance="a").held is None
    held = send(made, instance="b", recipient_count=5)
    assert held.held is not None
    assert 6 == used(made)
    repeat = send(made, instance="b", recipient_count=5)
    assert () == repeat.held
    made.undo(held)
    assert 1 == used(made)
    assert send(made, instance="b", recipient_count=5).held


def test_nothing_is_answered_unflushed_before_the_ledger_says_so() -> None:
    """Until the disk says that the stop mark is off, every charge is held."""
    ledger = Ledger()
    made = policy(limit(), ledger=ledger)
    ledger.answer_unflushed = False
    assert send(made).held is not None


def test_answers_are_one_clean_line() -> None:
    """Control characters, bytes that are not UTF-8, and length: nothing from a client breaks the protocol."""
    made = policy(limit(windows={HOUR_MS: 0}, action="450 4.7.1 {key}"))
    action = send(made, sasl_username="a\r\x1b[31m\udcff" + "x" * 3000).action
    assert "550 5.7.1 per-user: a??[31m?" == action.replace("x", "")
    assert len(action) <= 400


@pytest.mark.parametrize("value", ["-1", "1e3", "x", "9" * 19, "٣"])
def test_numbers_are_numbers(value: str) -> None:
    """A recipient_count that is no number is the client's fault."""
    with pytest.raises(ProtocolError, match="recipient_count"):
        send(policy(limit()), recipient_count=value)


def test_explain_names_the_reason() -> None:
    """For each limit: why it does not apply, or how it stands; and nothing is charged."""
    outside = Condition("client_address", "not: {cidr: 192.0.2.0/24}", lambda got: not cidr(["192.0.2.0/24"])(got))
    made = policy(
        limit("a"),
        limit("b", match=(outside,)),
        limit("c", key=key("sasl_domain"), exempt_keys=frozenset({"example.com"})),
        limit("d", key=key("recipient_domain")),
        limit("e", key=key("helo_name")),
    )
    explained = made.explain(request(), NOW_MS)
    assert [
        "",
        "does not match: client_address is '192.0.2.7', wanted: not: {cidr: 192.0.2.0/24}",
        "example.com is exempt",
        "is charged at RCPT and not asked at END-OF-MESSAGE",
        "the request has no helo_name",
    ] == [why_not for _, why_not, _ in explained]
    [reading] = explained[0][2]
    assert (0, 20, 1, 0) == (reading.used, reading.max, reading.amount, reading.wait_ms)
    assert 0 == used(made, "a")


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["alice@example.com", "bob@example.com", "carol@other.example"]),
            st.integers(1, 12),
            st.integers(0, 20 * 60_000),
            st.booleans(),
        ),
        max_size=80,
    )
)
@settings(max_examples=200, deadline=None)
def test_the_quick_path_decides_as_the_readings_say(steps: list[tuple[str, int, int, bool]]) -> None:
    """Whatever is sent, `decide` refuses exactly if the readings say so, and charges exactly what it lets through."""
    made = policy(
        limit("hour", windows={HOUR_MS: 20, DAY_MS: 60}, overrides={"bob@example.com": Override({HOUR_MS: 5})}),
        limit("domain", key=key("sasl_domain"), windows={HOUR_MS: 30}),
    )
    now_ms = NOW_MS
    admitted: list[tuple[int, str, int]] = []
    for who, recipients, passed_ms, expire in steps:
        now_ms += passed_ms
        asked = request(sasl_username=who, recipient_count=recipients)
        readings = [reading for _, _, several in made.explain(asked, now_ms) for reading in several]
        decision = made.decide(asked, now_ms)
        assert decision.refused == any(reading.exceeded for reading in readings)
        if not decision.refused:
            admitted.append((now_ms, who, recipients))
        if expire:
            made._ledger.expire(now_ms, 3)
    for who, most in (("alice@example.com", 20), ("bob@example.com", 5), ("carol@other.example", 20)):
        for start_ms, _, _ in admitted:
            within = (n for at_ms, whose, n in admitted if whose == who and start_ms <= at_ms < start_ms + HOUR_MS)
            assert sum(within) <= most
