"""Making requests and limits in a line."""

from __future__ import annotations

from typing import Any

from postmeter.core.limits import Key, KeyPart, Limit
from postmeter.core.meters import Ledger
from postmeter.core.policy import Policy, Repeats
from postmeter.core.request import Parser, Request
from postmeter.core.rule import ChargeAt

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS

_parser = Parser()


def key(*names: str) -> Key:
    """A key of plain attributes."""
    return Key(tuple(KeyPart(name) for name in names))


def limit(name: str = "per-user", /, **given: Any) -> Limit:
    """A limit of 20 recipients an hour for a user, but for what is given."""
    given.setdefault("key", key("sasl_username"))
    given.setdefault("count", "recipients")
    given.setdefault("windows", {HOUR_MS: 20})
    return Limit(name, **given)


def message(**given: object) -> bytes:
    """A request as Postfix sends it at the end of a message, but for what is given."""
    attributes = {
        "request": "smtpd_access_policy",
        "protocol_state": "END-OF-MESSAGE",
        "client_address": "192.0.2.7",
        "sender": "alice@example.com",
        "recipient": "bob@example.net",
        "recipient_count": 1,
        "instance": "",
        "size": 1000,
        "sasl_username": "alice@example.com",
        **given,
    }
    return "".join(f"{name}={value}\n" for name, value in attributes.items()).encode(errors="surrogateescape") + b"\n"


def request(**given: object) -> Request:
    """`message`, parsed."""
    return _parser.parse(message(**given))


def policy(*limits: Limit, ledger: Ledger | None = None, charge_at: ChargeAt = "end-of-message") -> Policy:
    """Limits in force, answering without waiting for a disk as far as a crash may cost it."""
    ledger = ledger or Ledger()
    ledger.answer_unflushed = True
    made = Policy(limits, ledger, charge_at, Repeats())
    ledger.retain(made.ids)
    made.apply_overrides(0)
    return made
