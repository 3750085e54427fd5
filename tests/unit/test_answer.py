"""What Postfix is told, as one line that it understands."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postmeter.core.answer import amount_text, effect, fill, fill_never, is_temporary, one_line
from postmeter.core.limits import ACTIONS, PLACEHOLDERS, duration_text
from postmeter.defaults import REPLY_CHARS_MAX
from tests.unit.support import DAY_MS, HOUR_MS, limit


@pytest.mark.parametrize(
    ("action", "does"),
    [
        ("defer", "refuse"),
        ("reject", "refuse"),
        ("450 4.7.1 slow down", "refuse"),
        ("DEFER_IF_PERMIT later", "refuse"),
        ("521", "refuse"),
        ("hold", "divert"),
        ("HOLD too much", "divert"),
        ("discard", "divert"),
        ("REDIRECT abuse@example.com", "divert"),
        ("warn {key}", "pass"),
        ("PREPEND X-Rate: {used}", "pass"),
        ("BCC abuse@example.com", "pass"),
        ("DUNNO", "pass"),
    ],
)
def test_what_an_action_does_to_the_mail(action: str, does: str) -> None:
    """An action refuses the mail, diverts it, or lets it pass; case does not matter, as it does not for Postfix."""
    assert does == effect(action)


@pytest.mark.parametrize(
    ("action", "temporary"),
    [
        ("defer", True),
        ("421 4.7.1 {key}", True),
        ("defer_if_permit", True),
        ("DEFER", True),
        ("reject", False),
        ("hold", False),
        ("550 5.7.1 no", False),
        ("DISCARD", False),
    ],
)
def test_which_actions_ask_to_try_again(action: str, temporary: bool) -> None:
    """4NN and DEFER do: for a charge that can never fit they become a permanent refusal."""
    assert temporary == is_temporary(action)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {},
            "450 4.7.1 per-user: alice has used 19 of 20 recipients per 1h, try again in 1m 30s",
        ),
        (
            {"count": "bytes", "text": "{used}/{max} {count}"},
            "450 4.7.1 19/20 bytes",
        ),
        ({"action": "reject", "text": "no"}, "550 5.7.1 no"),
        ({"action": "hold", "text": "{key} {{used}}"}, "HOLD alice {used}"),
        ({"action": "421 4.7.1 {limit} {per} {wait}", "text": "unused"}, "421 4.7.1 per-user 1h 1m 30s"),
        ({"action": "DISCARD"}, "DISCARD"),
    ],
)
def test_the_text_is_filled_in(given: dict[str, str], told: str) -> None:
    """A code is put before the operator's text; an access(5) action is sent as written, with its placeholders."""
    assert told == fill(limit(**given), "alice", 19, 20, HOUR_MS, 90_000)


def test_every_placeholder_is_known() -> None:
    """What the manual says may stand in a text can be filled in."""
    text = " ".join(f"{{{name}}}" for name in PLACEHOLDERS)
    assert "450 4.7.1 per-user alice 1 2 recipients 24h 1h" == fill(limit(text=text), "alice", 1, 2, DAY_MS, HOUR_MS)


def test_a_key_is_no_template() -> None:
    """Braces in what a client sends are sent back as they are."""
    assert "450 4.7.1 {max}{0}{}" == fill(limit(text="{key}"), "{max}{0}{}", 1, 2, HOUR_MS, 1)


def test_what_can_never_fit() -> None:
    """It is said what was asked and what may be used; one who may use nothing is blocked."""
    asked = fill_never(limit(count="bytes"), "alice", 26_000_000, 25_000_000, HOUR_MS)
    assert "550 5.7.1 per-user: 26MB bytes at once can never be accepted, alice may use 25MB per 1h" == asked
    assert "550 5.7.1 per-user: alice is blocked" == fill_never(limit(), "alice", 1, 0, HOUR_MS)


@pytest.mark.parametrize(
    ("count", "amount", "text"),
    [
        ("recipients", 25_000_000, "25000000"),
        ("bytes", 999, "999"),
        ("bytes", 1_000, "1kB"),
        ("bytes", 1_550, "1.6kB"),
        ("bytes", 999_949, "999.9kB"),
        ("bytes", 999_950, "1MB"),
        ("bytes", 25_000_000, "25MB"),
        ("bytes", 3_200_000_000, "3.2GB"),
        ("bytes", 10**18, "1000PB"),
    ],
)
def test_amounts_as_people_write_them(count: str, amount: int, text: str) -> None:
    """Bytes with a decimal unit and at most one digit behind the point, as the limits file takes them."""
    assert text == amount_text(count, amount)


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0, "0s"),
        (1, "1s"),
        (90_000, "1m 30s"),
        (HOUR_MS, "1h"),
        (HOUR_MS + 59_001, "1h 1m"),
        (DAY_MS, "24h"),
        (48 * HOUR_MS, "48h"),
        (7 * DAY_MS, "7d"),
        (7 * DAY_MS + HOUR_MS, "7d 1h"),
        (48 * HOUR_MS + 1, "2d"),
    ],
)
def test_durations_as_people_write_them(ms: int, text: str) -> None:
    """Rounded up to the second, so that who comes back then is let in; beyond two days full hours are told."""
    assert text == duration_text(ms)


@given(st.text(), st.sampled_from([*ACTIONS, "421 4.7.1 {key}"]))
def test_answers_are_one_clean_line(key: str, action: str) -> None:
    """Whatever a key holds, the answer is printable, on one line, valid UTF-8, and short."""
    told = fill(limit(action=action, text="{key} too much"), key, 1, 2, HOUR_MS, 1)
    assert told.isprintable()
    assert len(told.encode()) <= 4 * REPLY_CHARS_MAX
    assert len(told) <= REPLY_CHARS_MAX
    assert told.startswith(ACTIONS.get(action, "421 4.7.1"))


def test_what_cannot_be_sent_becomes_question_marks() -> None:
    """Control characters, line breaks of any kind, and bytes that are not UTF-8."""
    assert "a?b?c?d?e??" == one_line("a\rb\nc\x1bd\u2028e\udcff\x00")
