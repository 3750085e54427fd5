"""What is suspicious in limits that are not wrong: what can never match or never bind, and what Postfix never asks.

`lint` takes everything it needs as arguments: how Postfix is set up comes from wiring.py, None if that is not known. A
*warning* is about something that does not do what it seems to; a *note* is a reminder.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from postmeter.core.answer import effect
from postmeter.core.conditions import Condition
from postmeter.core.limits import Key, Limit, duration_text
from postmeter.core.request import DERIVED, END_OF_MESSAGE, Request, attribute, single
from postmeter.settings import Settings
from postmeter.wiring import LISTS, PostfixStages

# Attributes that came after Postfix 2.3, and the version that they came with.
SINCE = {
    "stress": (2, 5),
    "ccert_pubkey_fingerprint": (2, 9),
    "client_port": (3, 0),
    "policy_context": (3, 1),
    "server_address": (3, 2),
    "server_port": (3, 2),
    "compatibility_level": (3, 8),
    "mail_version": (3, 8),
    "tls_sni": (3, 12),
}


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """Something to look at, in a line of the limits file."""

    line: int
    severity: Literal["warning", "note"]
    text: str


def lint(limits: Sequence[Limit], settings: Settings, postfix: PostfixStages | None, now_s: float) -> list[Finding]:
    """All findings, by line. `now_s` is the time in seconds since 1970."""
    found = []
    for limit in limits:
        stage = _stage(limit, settings)
        warnings = [*_never(limit, stage), *_action(limit, stage), *_unreached(limit, limits)]
        if postfix:
            warnings += _too_old(limit, postfix.version)
        found += [Finding(limit.line, "warning", f"{limit.name}: {text}") for text in warnings]
        found += [Finding(limit.line, "note", f"{limit.name}: {text}") for text in _reminders(limit, now_s)]
    if postfix:
        found += _not_asked(limits, settings, postfix)
    return sorted(found)


def _stage(limit: Limit, settings: Settings) -> str:
    """Where the limit is charged."""
    return "RCPT" if settings.charge_at == "rcpt" or limit.needs_recipient else END_OF_MESSAGE


def _never(limit: Limit, stage: str) -> Iterator[str]:
    """Attributes of which no value fulfils `match` and gives a key."""
    for name in dict.fromkeys(_base(condition.attribute) for condition in limit.match):
        asked = [condition for condition in limit.match if _base(condition.attribute) == name]
        cuts = [Key((part,)).compile() for part in limit.key.parts if _base(part.attribute) == name]
        values = _values(name, asked, stage)
        if values is None:
            continue
        requests = [single(name, value) for value in values]
        if not any(_fulfils(request, asked) and all(cut(request) for cut in cuts) for request in requests):
            wanted = " and ".join(f"{condition.attribute}: {condition.written}" for condition in asked)
            key = f" and is a key ({limit.key})" if cuts else ""
            yield f"can never match at {stage}, where it is charged: no {name} fulfils {wanted}{key}; correct match"


def _base(name: str) -> str:
    return DERIVED.get(name, name)


def _values(name: str, asked: Sequence[Condition], stage: str) -> Collection[str] | None:
    """The values that an attribute can have if the conditions hold; None if there is no telling."""
    if name == "protocol_state":
        return (stage,)
    if name == "recipient_count" and stage == "RCPT":
        return ("0",)
    own = [condition for condition in asked if condition.attribute == name]
    values = (own or asked)[0].values
    return values if own or values is None else [f"x@{value}" if value else "x" for value in values]


def _fulfils(request: Request, asked: Sequence[Condition]) -> bool:
    return all(condition.holds(attribute(condition.attribute)(request)) for condition in asked)


def _action(limit: Limit, stage: str) -> Iterator[str]:
    verb = limit.action.split()[0].upper()
    if verb == "PREPEND" and stage == END_OF_MESSAGE:
        yield f"Postfix ignores PREPEND at {stage}, where this is charged; write defer, or WARN and a text"
    if verb == "DUNNO":
        yield "DUNNO lets all mail through; write shadow: true to have it logged, or defer"
    if stage == "RCPT" and limit.count == "bytes":
        yield "bytes are counted at RCPT, where the size is only the client's claim; write charge_at: end-of-message"


def _unreached(limit: Limit, limits: Sequence[Limit]) -> Iterator[str]:
    """Windows of a limit that never bind, because another one lets too little through."""
    before = limits[: limits.index(limit)]
    windows = [(other, *window) for other in limits if _covers(other, limit) for window in other.windows.items()]
    for window_ms, most in limit.windows.items():
        for other, other_ms, other_most in windows:
            through = -(-window_ms // other_ms) * other_most
            twins = (window_ms, most) == (other_ms, other_most) and other not in before
            if through <= most and not twins:
                yield (
                    f"{most} per {duration_text(window_ms)} is never reached: {other_most} per"
                    f" {duration_text(other_ms)}{'' if other is limit else f' of {other.name}'} lets at most {through}"
                    f" through in that time{', except for keys with an override' if other.overrides else ''};"
                    " lower the one, or remove it"
                )
                break


def _covers(other: Limit, limit: Limit) -> bool:
    """Whether `other` counts and refuses all that `limit` counts, for the same keys."""
    return (
        (other.key, other.count) == (limit.key, limit.count)
        and set(other.match) <= set(limit.match)
        and other.exempt_keys <= limit.exempt_keys
        and set(other.exempt) <= set(limit.exempt)
        and not other.shadow
        and effect(other.action) == "refuse"
    )


def _too_old(limit: Limit, version: tuple[int, ...]) -> Iterator[str]:
    conditions = [*limit.match, *(condition for several in limit.exempt for condition in several)]
    names = [*(condition.attribute for condition in conditions), *(part.attribute for part in limit.key.parts)]
    for name in dict.fromkeys(names):
        if name in SINCE and () < version < SINCE[name]:
            since, runs = (".".join(map(str, several)) for several in (SINCE[name], version))
            yield f"{name} is sent by Postfix {since} and later, this is {runs}; use another attribute"


def _reminders(limit: Limit, now_s: float) -> Iterator[str]:
    if limit.shadow:
        yield "shadow: true, so it refuses nothing; remove it when you trust the limit"
    for key, override in limit.overrides.items():
        if override.until_s is not None and override.until_s <= now_s:
            yield f"the override of {key} has expired; remove it, or give it a later until"
        if key in limit.exempt_keys:
            yield f"{key} is exempt, so that its override has no effect; remove one of them"


def _not_asked(limits: Sequence[Limit], settings: Settings, postfix: PostfixStages) -> Iterator[Finding]:
    """Stages at which limits are charged, and Postfix does not ask this agent for all mail."""
    for stage, lists in LISTS.items():
        charged = [limit for limit in limits if _stage(limit, settings) == stage]
        if not charged:
            continue
        line, names = charged[0].line, ", ".join(limit.name for limit in charged)
        asking = postfix.asking(stage, settings.listen)
        entry = f"check_policy_service {postfix.endpoint(settings.listen[0])}"
        if not any(permits is not None for permits in asking.values()):
            text = f"charged at {stage}, where Postfix does not ask this agent; add {entry} to {lists[0]}"
            yield Finding(line, "warning", f"{names}: {text}")
        for place, permits in asking.items():
            if permits:
                text = f"{place} does not ask for mail that {' or '.join(permits)} lets pass; put {entry} ahead of it"
                yield Finding(line, "warning", f"{names}: {text}")
            elif permits is None and asking["main.cf"] is not None:
                text = f"mail through {place} of master.cf is not counted; add {entry} to its {lists[0]}"
                yield Finding(line, "note", f"{names}: {text}")
