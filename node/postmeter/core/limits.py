"""What an operator wants, as plain values. Whoever makes them has checked them: see `limits_document.py`.

Limit       a named rule: which requests it covers, whom it counts, what it counts, `max` per window, what to answer
Key         whom a limit counts: one or more attributes of the request
Override    another `max` for one key of a limit
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv4Address, ip_network
from typing import Literal

from postmeter.core.conditions import Condition, parse_address
from postmeter.core.request import DERIVED, Request, attribute
from postmeter.defaults import KEY_CHARS_MAX

Count = Literal["messages", "recipients", "bytes"]

# What may stand in the text of an answer, and what it becomes.
PLACEHOLDERS = {
    "limit": "the limit's name",
    "key": "who is counted",
    "used": "used within the window",
    "max": "what may be used within the window",
    "count": "messages, recipients or bytes",
    "per": "the window, such as 1h",
    "wait": "the time until the same request would be accepted",
}
TEXT = "{limit}: {key} has used {used} of {max} {count} per {per}, try again in {wait}"

# What `on_exceed` may say beside a verbatim access(5) action, and what the text is put behind.
ACTIONS = {"defer": "450 4.7.1", "reject": "550 5.7.1", "hold": "HOLD"}

ADDRESS_ATTRIBUTES = ("client_address", "server_address")


@dataclass(frozen=True, slots=True)
class KeyPart:
    """One attribute of a key; addresses are cut to a network of `ipv4` or `ipv6` bits."""

    attribute: str
    ipv4: int = 32
    ipv6: int = 64

    def __str__(self) -> str:
        if self.attribute in ADDRESS_ATTRIBUTES:
            return f"{self.attribute}/{self.ipv4}/{self.ipv6}"
        return self.attribute


@dataclass(frozen=True, slots=True)
class Key:
    """Whom a limit counts. `str(key)` identifies what is counted: keys with the same text share their rows."""

    parts: tuple[KeyPart, ...]

    def __str__(self) -> str:
        return ",".join(map(str, self.parts))

    @property
    def needs_recipient(self) -> bool:
        """Whether the key is known only while Postfix asks about one recipient."""
        return any(needs_recipient(part.attribute) for part in self.parts)

    def compile(self) -> Callable[[Request], str]:
        """A function of a parsed request: the key in lower case, several parts joined by commas; "" if one is empty."""
        cuts = [_cut_part(part) for part in self.parts]
        if len(cuts) == 1:
            return cuts[0]

        def cut(request: Request) -> str:
            values = [cut_part(request) for cut_part in cuts]
            return ",".join(values) if all(values) else ""

        return cut


@dataclass(frozen=True, slots=True)
class Override:
    """Another `max` by window length (ms) for one key; UNLIMITED, or 0 for blocked. In force before `until_s`.

    `until_s` is in seconds since 1970, None for ever.
    """

    max: Mapping[int, int]
    until_s: float | None = None
    note: str = ""
    author: str = ""


@dataclass(frozen=True, slots=True)
class Limit:
    """A named rule. `windows` maps the length in ms to `max`; `exempt` are lists of conditions that must all hold.

    `action` is one of ACTIONS or an access(5) action that is sent as it is, placeholders filled in. `overdraft` is the
    part of its base share that a node may exceed its allowance by while it reaches none of its peers: 0 to 1.
    """

    name: str
    key: Key
    count: Count
    windows: Mapping[int, int]
    match: tuple[Condition, ...] = ()
    exempt_keys: frozenset[str] = frozenset()
    exempt: tuple[tuple[Condition, ...], ...] = ()
    action: str = "defer"
    text: str = TEXT
    shadow: bool = False
    overdraft: float = 0.0
    overrides: Mapping[str, Override] = field(default_factory=dict)
    note: str = ""
    author: str = ""
    line: int = field(default=0, compare=False)

    @property
    def needs_recipient(self) -> bool:
        """Whether the limit can be charged at RCPT only: elsewhere `recipient` is empty if there are several."""
        conditions = [*self.match, *(condition for several in self.exempt for condition in several)]
        return self.key.needs_recipient or any(needs_recipient(condition.attribute) for condition in conditions)


def needs_recipient(name: str) -> bool:
    """Whether the attribute is, or derives from, `recipient`."""
    return DERIVED.get(name, name) == "recipient"


def _cut_part(part: KeyPart) -> Callable[[Request], str]:
    cut = attribute(part.attribute)
    if part.attribute not in ADDRESS_ATTRIBUTES:
        return lambda request: cut(request).lower()[:KEY_CHARS_MAX]

    @lru_cache(maxsize=10_000)
    def network(value: str) -> str:
        address = parse_address(value)
        if address is None:
            return ""
        bits = part.ipv4 if isinstance(address, IPv4Address) else part.ipv6
        if bits == address.max_prefixlen:
            return str(address)
        return str(ip_network((address, bits), strict=False))

    return lambda request: network(cut(request))


def duration_text(ms: int) -> str:
    """A duration as people write it: `90s` is `1m 30s`, `24h` stays, `7d` stays. Rounded up to the second."""
    seconds = -(-ms // 1000)
    units = {"d": 86_400, "h": 3_600} if seconds > 48 * 3_600 else {"h": 3_600, "m": 60, "s": 1}
    parts = []
    for unit, length in units.items():
        amount, seconds = divmod(seconds, length)
        if amount:
            parts.append(f"{amount}{unit}")
    return " ".join(parts) or "0s"
