"""What lint says of limits that are not wrong, and how it sees Postfix's restriction lists."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from postmeter.limits_document import read_limits
from postmeter.lint import Finding, lint
from postmeter.settings import Listener, Settings
from postmeter.wiring import parse_postconf, read_postconf

EXAMPLE = Path(__file__).parents[2] / "deploy/examples/limits.yaml"
NOW_S = 1_800_000_000.0

BASE = "key: sasl_username, count: recipients"

# What `postconf -n -x` prints for the wiring that the README recommends.
MAIN = """\
queue_directory = /var/spool/postfix
postmeter = { inet:127.0.0.1:10040, timeout=10s }
smtpd_recipient_restrictions = reject_unlisted_recipient, check_policy_service { inet:127.0.0.1:10040, timeout=10s },\
 permit_mynetworks, check_policy_service inet:127.0.0.1:10023
smtpd_end_of_data_restrictions = check_policy_service inet:127.0.0.1:10040
"""


def findings(*limits: str, main: str | None = None, services: str = "", **given: object) -> list[Finding]:
    """What lint says of limits, `NAME: MAPPING` each in a line of its own from line 2 on."""
    read = read_limits("\n  ".join(["limits:", *limits]), "x.yaml")
    postfix = None if main is None else parse_postconf(main, services, "3.7.11\n")
    return lint(read, Settings(**given), postfix, NOW_S)  # type: ignore[arg-type]


def warnings(*limits: str, **given: object) -> list[str]:
    """The texts of the warnings alone."""
    return [found.text for found in findings(*limits, **given) if found.severity == "warning"]  # type: ignore[arg-type]


def test_the_example_is_without_blame() -> None:
    """With the wiring of the README."""
    limits = read_limits(EXAMPLE.read_text(), "limits.yaml")
    assert [] == lint(limits, Settings(), parse_postconf(MAIN, "", "3.7.11"), NOW_S)


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        (
            "{sasl_username: {present: false}}",
            "no sasl_username fulfils sasl_username: {present: false} and is a key (sasl_username)",
        ),
        ("{sender: {equal: a@x, glob: b*}}", "no sender fulfils sender: {equal: a@x, glob: b*}"),
        ("{sender: {equal: [a, b], not: [a, b]}}", "no sender fulfils sender: {equal: [a, b], not: [a, b]}"),
        ("{sender: a@x, sender_domain: y}", "no sender fulfils sender: a@x and sender_domain: y"),
        (
            "{sasl_domain: {present: false}, sasl_username: [a@x, b@y]}",
            "no sasl_username fulfils sasl_domain: {present: false} and sasl_username: [a@x, b@y]"
            " and is a key (sasl_username)",
        ),
        ("{protocol_state: RCPT}", "no protocol_state fulfils protocol_state: RCPT"),
        ("{sender: [a, b], recipient_count: {not: 1}}", None),
        ("{sasl_domain: {present: false}}", None),
        ("{protocol_state: {not: RCPT}, sender_domain: [x, y], sender: {glob: 'a*'}}", None),
    ],
)
def test_a_limit_that_can_never_match(match: str, expected: str | None) -> None:
    """Contradictions between conditions, with the key, and with the stage that charges."""
    text = f"x: can never match at END-OF-MESSAGE, where it is charged: {expected}; correct match"
    assert ([text] if expected else []) == warnings(f"x: {{{BASE}, max: {{1h: 5}}, match: {match}}}")


def test_what_is_never_so_at_rcpt() -> None:
    """There Postfix sends a recipient_count of 0."""
    limit = "x: {key: recipient_domain, count: messages, max: {1h: 5}, match: {recipient_count: 2}}"
    assert [
        "x: can never match at RCPT, where it is charged: no recipient_count fulfils recipient_count: 2; correct match"
    ] == warnings(limit)


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        (
            "{1h: 200, 24h: 5000}",
            "5000 per 24h is never reached: 200 per 1h lets at most 4800",
        ),
        (
            "{1h: 200, 24h: 200}",
            "200 per 1h is never reached: 200 per 24h lets at most 200",
        ),
        (
            "{40m: 200, 1h: 400}",
            "400 per 1h is never reached: 200 per 40m lets at most 400",
        ),
        ("{1h: 200, 24h: 4799}", None),
        ("{40m: 200, 1h: 399}", None),
    ],
)
def test_a_window_that_is_never_reached(windows: str, expected: str | None) -> None:
    """Because another window of the limit lets too little through."""
    text = f"x: {expected} through in that time; lower the one, or remove it"
    assert ([text] if expected else []) == warnings(f"x: {{{BASE}, max: {windows}}}")


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (
            "max: {1h: 5}",
            "max: {24h: 120}",
            ["y: 120 per 24h is never reached: 5 per 1h of x lets at most 120 through"],
        ),
        ("max: {24h: 9}", "max: {1h: 9}", ["y: 9 per 1h is never reached: 9 per 24h of x lets at most 9 through"]),
        ("max: {1h: 5}", "max: {1h: 5}", ["y: 5 per 1h is never reached: 5 per 1h of x lets at most 5 through"]),
        ("max: {1h: 5}", "max: {1h: 9}, match: {sender: a}", ["y: 9 per 1h is never reached: 5 per 1h of x lets at"]),
        ("max: {1h: 5}, match: {sender: a}", "max: {1h: 9}", []),
        ("max: {1h: 5}, exempt: [a]", "max: {1h: 9}", []),
        ("max: {1h: 5}, exempt: [{sender: a}]", "max: {1h: 9}", []),
        ("max: {1h: 5}, on_exceed: WARN much", "max: {1h: 9}", []),
        ("max: {1h: 5}, shadow: true", "max: {1h: 9}", []),
        ("max: {1h: 5}, overrides: {a: 7}", "max: {1h: 9}", ["y: 9 per 1h is never reached: 5 per 1h of x lets at"]),
    ],
)
def test_a_limit_that_another_one_hides(first: str, second: str, expected: list[str]) -> None:
    """If that one refuses everything before, for the same keys."""
    found = warnings(f"x: {{{BASE}, {first}}}", f"y: {{{BASE}, {second}}}")
    assert len(expected) == len(found)
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True))
    assert all(("except for keys with an override" in text) is ("overrides" in first) for text in found)


@pytest.mark.parametrize(
    ("given", "charge_at", "expected"),
    [
        (
            "on_exceed: 'PREPEND X-Over: 1'",
            "end-of-message",
            "x: Postfix ignores PREPEND at END-OF-MESSAGE, where this is charged; write defer, or WARN and a text",
        ),
        ("on_exceed: 'PREPEND X-Over: 1'", "rcpt", None),
        (
            "on_exceed: DUNNO",
            "end-of-message",
            "x: DUNNO lets all mail through; write shadow: true to have it logged, or defer",
        ),
        (
            "count: bytes",
            "rcpt",
            "x: bytes are counted at RCPT, where the size is only the client's claim; write charge_at: end-of-message",
        ),
    ],
)
def test_actions_and_counts_that_do_not_do_what_they_seem_to(given: str, charge_at: str, expected: str | None) -> None:
    """At the stage where the limit is charged."""
    count = "" if "count" in given else "count: messages, "
    found = warnings(f"x: {{key: sender, {count}max: {{1h: 5}}, {given}}}", charge_at=charge_at)
    assert ([expected] if expected else []) == found


def test_reminders() -> None:
    """Shadow limits, overrides that have ended, and keys that are exempt as well, in the line of their limit."""
    late = "{max: 9, until: 2020-01-01}"
    limit = f"x: {{{BASE}, max: {{1h: 5}}, shadow: true, exempt: [a], overrides: {{a: 7, b: {late}}}}}"
    assert [
        Finding(2, "note", "x: a is exempt, so that its override has no effect; remove one of them"),
        Finding(2, "note", "x: shadow: true, so it refuses nothing; remove it when you trust the limit"),
        Finding(2, "note", "x: the override of b has expired; remove it, or give it a later until"),
    ] == findings(limit)


def test_attributes_that_this_postfix_does_not_send_yet() -> None:
    """By its version; without a Postfix there is nothing to say."""
    limit = f"x: {{{BASE}, max: {{1h: 5}}, match: {{tls_sni: a, server_port: 587}}}}"
    text = "x: tls_sni is sent by Postfix 3.12 and later, this is 3.7; use another attribute"
    assert [text] == warnings(limit, main=MAIN)
    assert [] == warnings(limit)


# --- the restriction lists --------------------------------------------------------------------------------------------

PER_USER = f"x: {{{BASE}, max: {{1h: 5}}}}"
PER_RECIPIENT = "y: {key: recipient, count: messages, max: {1h: 5}}"
NOT_AT_END = (
    "x: charged at END-OF-MESSAGE, where Postfix does not ask this agent;"
    " add check_policy_service inet:127.0.0.1:10040 to smtpd_end_of_data_restrictions"
)
NOT_AT_RCPT = (
    "y: charged at RCPT, where Postfix does not ask this agent;"
    " add check_policy_service inet:127.0.0.1:10040 to smtpd_recipient_restrictions"
)


def test_stages_that_postfix_does_not_ask_at() -> None:
    """A limit needs the list of the stage that charges it, and only that."""
    assert [] == warnings(PER_USER, PER_RECIPIENT, main=MAIN)
    assert [NOT_AT_END, NOT_AT_RCPT] == warnings(PER_USER, PER_RECIPIENT, main="")
    assert [NOT_AT_END] == warnings(PER_USER, main=MAIN.replace("10040\n", "10041\n"))
    assert [] == warnings(PER_USER, main=MAIN.replace("10040\n", "10041\n"), charge_at="rcpt")
    assert [NOT_AT_RCPT] == warnings(PER_RECIPIENT, main=MAIN.replace("10040,", "10041,"))


@pytest.mark.parametrize(
    ("entry", "listener", "expected"),
    [
        ("inet:127.0.0.1:10040", Listener("127.0.0.1", 10040), True),
        ("inet:localhost:10040", Listener("127.0.0.1", 10040), True),
        ("inet:[::1]:10040", Listener("::1", 10040), True),
        ("inet:192.0.2.7:10040", Listener("0.0.0.0", 10040), True),
        ("inet:192.0.2.7:10040", Listener("127.0.0.1", 10040), False),
        ("inet:127.0.0.1:10041", Listener("127.0.0.1", 10040), False),
        ("unix:private/p", Listener(path=Path("/var/spool/postfix/private/p")), True),
        ("unix:/private/p", Listener(path=Path("/var/spool/postfix/private/p")), True),
        ("unix:/run/p", Listener(path=Path("/run/p")), True),
        ("unix:private/q", Listener(path=Path("/var/spool/postfix/private/p")), False),
        ("inet:127.0.0.1:10040", Listener(path=Path("/run/p")), False),
        ("unix:private/p", Listener("127.0.0.1", 10040), False),
    ],
)
@pytest.mark.parametrize(
    "form", ["check_policy_service {}", "a, check_policy_service,{},b", "check_policy_service {{ {}, x=1 }}"]
)
def test_entries_that_reach_a_listener(form: str, entry: str, listener: Listener, expected: bool) -> None:
    """In each form that Postfix takes; unix sockets lie under the queue directory, which may be smtpd's root."""
    postfix = parse_postconf(
        f"smtpd_data_restrictions = x\nsmtpd_end_of_data_restrictions = {form.format(entry)}", "", "3"
    )
    assert {"main.cf": () if expected else None} == postfix.asking("END-OF-MESSAGE", [listener])


def test_the_entry_to_add_is_written_for_postfix() -> None:
    """A socket under the queue directory without it, as a chrooted smtpd needs."""
    postfix = parse_postconf("", "", "")
    assert "unix:private/p" == postfix.endpoint(Listener(path=Path("/var/spool/postfix/private/p")))
    assert "unix:/run/p" == postfix.endpoint(Listener(path=Path("/run/p")))
    assert "inet:[::1]:1" == postfix.endpoint(Listener("::1", 1))


def test_restriction_classes_are_looked_into() -> None:
    """A list may name one in place of the entry."""
    main = (
        "smtpd_restriction_classes = limits, other\nlimits = check_policy_service inet:127.0.0.1:10040\n"
        "smtpd_end_of_data_restrictions = limits"
    )
    assert [] == warnings(PER_USER, main=main)
    assert [NOT_AT_END] == warnings(PER_USER, main=main.replace("= limits, other", "= other"))


def test_permits_ahead_of_the_agent() -> None:
    """What a restriction before it lets pass is never asked about: a common mistake with logins."""
    lists = "permit_mynetworks permit_sasl_authenticated, check_policy_service inet:127.0.0.1:10040"
    main = f"smtpd_recipient_restrictions = check_client_access hash:/etc/permit, {lists}"
    text = (
        "y: main.cf does not ask for mail that permit_mynetworks or permit_sasl_authenticated lets pass;"
        " put check_policy_service inet:127.0.0.1:10040 ahead of it"
    )
    assert [text] == warnings(PER_RECIPIENT, main=main)


def test_services_with_lists_of_their_own() -> None:
    """One of them may be the only one to ask; one that does not ask where all others do is worth a note."""
    own = "submission/inet/smtpd_end_of_data_restrictions ="
    asks = f"{own} check_policy_service inet:127.0.0.1:10040\nsubmission/inet/syslog_name = x"
    assert [] == findings(PER_USER, main="", services=asks)
    note = (
        "x: mail through submission/inet of master.cf is not counted;"
        " add check_policy_service inet:127.0.0.1:10040 to its smtpd_end_of_data_restrictions"
    )
    assert [Finding(2, "note", note)] == findings(PER_USER, main=MAIN, services=own)


@pytest.mark.skipif(shutil.which("postconf", path="/usr/sbin") is None, reason="there is no Postfix here")
def test_a_real_postconf_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With variables, comments, continued lines, and both forms of -o in master.cf."""
    (tmp_path / "main.cf").write_text(
        "compatibility_level = 3.6\n"
        "postmeter = { inet:127.0.0.1:10040, timeout=10s }\n"
        "mine = check_policy_service $postmeter\n"
        "smtpd_end_of_data_restrictions =\n  # limits\n  ${mine}\n  permit\n"
    )
    (tmp_path / "master.cf").write_text(
        "smtp inet n - y - - smtpd\n"
        "submission inet n - y - - smtpd\n"
        "  -o smtpd_recipient_restrictions=permit_mynetworks,$mine\n"
        "  -o { smtpd_end_of_data_restrictions = permit, permit }\n"
        "10025 inet n - y - - smtpd -o syslog_name=x\n"
    )
    monkeypatch.setenv("MAIL_CONFIG", str(tmp_path))
    postfix = read_postconf()
    assert postfix is not None
    assert postfix.version >= (3, 7)
    listen = Settings().listen
    assert {"main.cf": (), "submission/inet": None} == postfix.asking("END-OF-MESSAGE", listen)
    assert {"main.cf": None, "submission/inet": ("permit_mynetworks",)} == postfix.asking("RCPT", listen)


@pytest.mark.parametrize("script", ["exit 1", "exec sleep 60", "printf '\\377'"])
def test_a_postconf_that_does_not_answer_is_no_postfix(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it fails, hangs, or says nonsense."""
    (tmp_path / "postconf").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "postconf").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("postmeter.wiring._POSTCONF_S_MAX", 0.5)
    assert read_postconf() is None
