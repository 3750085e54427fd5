"""What Postfix is told, in words: access(5) actions with the operator's text filled in.

An answer is one line of valid UTF-8 without control characters, whatever a client put into a key.
"""

from __future__ import annotations

from typing import Literal

from postmeter.core.limits import ACTIONS, Limit, duration_text
from postmeter.defaults import REPLY_CHARS_MAX

Effect = Literal["refuse", "divert", "pass"]

_PASSING = frozenset({"WARN", "INFO", "PREPEND", "BCC", "FILTER", "DUNNO"})
_DIVERTING = frozenset({"HOLD", "DISCARD", "REDIRECT"})


def effect(action: str) -> Effect:
    """What an action does to the mail: `refuse` it, `divert` it from its recipients, or let it `pass`."""
    verb = ACTIONS.get(action, action).split(None, 1)[0].upper()
    if verb in _PASSING:
        return "pass"
    return "divert" if verb in _DIVERTING else "refuse"


def is_temporary(action: str) -> bool:
    """Whether the action asks the client to try again."""
    text = ACTIONS.get(action, action).upper()
    return text.startswith(("4", "DEFER"))


def fill(limit: Limit, key: str, used: int, max: int, window_ms: int, wait_ms: int) -> str:
    """The action of an exceeded limit."""
    template = limit.text if limit.action in ACTIONS else limit.action
    text = template.format(
        limit=limit.name,
        key=key,
        used=amount_text(limit.count, used),
        max=amount_text(limit.count, max),
        count=limit.count,
        per=duration_text(window_ms),
        wait=duration_text(wait_ms),
    )
    return one_line(f"{ACTIONS[limit.action]} {text}" if limit.action in ACTIONS else text)


def fill_never(limit: Limit, key: str, amount: int, max: int, window_ms: int) -> str:
    """The action for a charge that is larger than `max`: trying again is of no use, and the client is told so."""
    if max == 0:
        return one_line(f"550 5.7.1 {limit.name}: {key} is blocked")
    return one_line(
        f"550 5.7.1 {limit.name}: {amount_text(limit.count, amount)} {limit.count} at once can never be accepted,"
        f" {key} may use {amount_text(limit.count, max)} per {duration_text(window_ms)}"
    )


def amount_text(count: str, amount: int) -> str:
    """An amount as people write it: bytes with a decimal unit, anything else as a plain number."""
    if count != "bytes" or amount < 1_000:
        return str(amount)
    size = float(amount)
    for unit in ("kB", "MB", "GB", "TB", "PB"):
        size /= 1_000
        if size < 999.95 or unit == "PB":
            break
    return f"{size:.1f}".removesuffix(".0") + unit


def one_line(text: str) -> str:
    """Valid UTF-8, printable, and short enough for an SMTP reply."""
    clean = text.encode("utf-8", "replace").decode()
    return "".join(char if char.isprintable() else "?" for char in clean)[:REPLY_CHARS_MAX]
