"""Limits as an operator writes them, made into `Limit`. `read_limits` for a file, `read_limit` for the mapping of one.

    limits:
      per-user:                         # a name of letters, digits, `_`, `.`, `-`
        key: sasl_username              # whom it counts; several: [sasl_username, recipient_domain];
                                        # addresses by network: {client_address: {ipv4: 32, ipv6: 64}}
        count: recipients               # messages, recipients or bytes
        max: {1h: 200, 24h: 1000}       # by window; for one window also  max: 200  and  per: 1h
        match:                          # only requests for which all of this holds; without it, every request
          sasl_username: {present: true}
          client_address: {not: {cidr: [10.0.0.0/8]}}
        on_exceed: defer                # or reject, hold, any access(5) action: "421 4.7.1 {key}: slow down"
        text: "{limit}: {key} used {used} of {max}; try again in {wait}"
        shadow: false                   # true: only log what would have happened
        overdraft: 10%                  # a node that is cut off from all others may use so much more than its share
        exempt: [newsletter@example.org, {client_address: {cidr: 192.0.2.0/24}}]
        overrides:                      # another max for one key
          big@example.org: {1h: 500}    # the other windows stay; with one window, just a number
          boss@example.org: unlimited
          evil@example.org: blocked
          fair@example.org: {max: {24h: 5000}, until: 2027-01-31, note: the fair, author: kim}
        note: after the break-in in May # both are only shown
        author: kim

Windows are written 90s, 90m, 24h, 7d. Sizes are bytes, or decimal as disks and mail clients count them (kB, MB, GB, TB:
25MB is 25,000,000), or binary (KiB, MiB, GiB, TiB: 25MiB is 26,214,400). `until` is the first moment after the
override, or a day that is its last one, in UTC unless it has an offset, so that all nodes agree. Keys are folded as
requests are: lower case, addresses to their network.

What stands under `match` and `exempt` is described in conditions_document.py, `on_exceed` and `text` in
answers_document.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from functools import lru_cache, partial
from ipaddress import ip_network

from postmeter.answers_document import read_action, read_template
from postmeter.conditions_document import read_conditions
from postmeter.core.conditions import Condition
from postmeter.core.limits import (
    ACTIONS,
    ADDRESS_ATTRIBUTES,
    TEXT,
    Count,
    Key,
    KeyPart,
    Limit,
    Override,
    duration_text,
)
from postmeter.core.meters import UNLIMITED
from postmeter.core.request import DERIVED, KNOWN, Request, single
from postmeter.defaults import LIMITS_MAX, WINDOW_MS_MAX, WINDOW_MS_MIN
from postmeter.documents import (
    Node,
    Problems,
    RefusedError,
    attempt,
    boolean,
    choice,
    compose,
    fields,
    listed,
    mapping,
    nearest,
    quote,
    scalar,
    take,
)

# More would not be told from no limit at all: a petabyte.
AMOUNT_MAX = 10**15

_REQUIRED = {"key": "key: sasl_username", "count": "count: recipients", "max": "max: {1h: 200, 24h: 1000}"}
_KNOWN = (
    *_REQUIRED,
    *("per", "match", "on_exceed", "text", "shadow", "overdraft", "exempt", "overrides", "note", "author"),
)
_NAME = re.compile("[a-z0-9][a-z0-9_.-]{0,63}")
_COUNTS: tuple[Count, ...] = ("messages", "recipients", "bytes")

# What tells senders apart. The other attributes differ with every message, or are alike for all of them.
_KEYS = frozenset(
    "sasl_username sasl_domain sasl_sender sasl_method sender sender_domain recipient recipient_domain client_address"
    " client_name reverse_client_name helo_name server_address server_port policy_context ccert_subject ccert_issuer"
    " ccert_fingerprint ccert_pubkey_fingerprint tls_sni".split()
)

_Exempt = tuple[frozenset[str], tuple[tuple[Condition, ...], ...]]
_NO_EXEMPT: _Exempt = (frozenset(), ())

_NUMBER = "write a number such as 200, or {1h: 200, 24h: 1000}"
_SIZE = "write a size such as 25MB, or {1h: 25MB, 24h: 100MB}"
_SIZE_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{ending}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for ending, base in (("B", 1000), ("IB", 1024))
}
_WINDOW = "write a window such as 90s, 90m, 24h or 7d"
_WINDOW_UNITS_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_WORDS = {"unlimited": UNLIMITED, "blocked": 0}


def read_limits(text: str, source: str) -> list[Limit]:
    """The limits of a file, in its order. Raises ConfigError with all problems."""
    problems = Problems(source)
    entries = fields(compose(text, problems), ("limits",), {"limits": "limits: and below it, indented, the limits"})
    limits: list[Limit] = take(entries, "limits", _limits, [])
    problems.check()
    return limits


def read_limit(name: str, node: Node) -> Limit:
    """One limit. Its problems are noted where the node's are; it is of use only if there are none."""
    if not _NAME.fullmatch(name):
        node.refuse(f"{quote(name)} is no name for a limit", "write at most 64 of a-z, 0-9, _ . - such as per-user")
    entries = fields(node, _KNOWN, _REQUIRED)
    count = take(entries, "count", choice(_COUNTS), None)
    key = take(entries, "key", _key, Key(()))
    windows = _windows(entries, count)
    exempt_keys, exempt = take(entries, "exempt", partial(_exempt, key=key), _NO_EXEMPT)
    limit = Limit(
        name=name,
        key=key,
        count=count or "messages",
        windows=windows,
        match=take(entries, "match", read_conditions, ()),
        exempt_keys=exempt_keys,
        exempt=exempt,
        action=take(entries, "on_exceed", read_action, "defer"),
        text=take(entries, "text", read_template, TEXT),
        shadow=take(entries, "shadow", boolean, False),
        overdraft=take(entries, "overdraft", _part, 0.0),
        overrides=take(entries, "overrides", partial(_overrides, key=key, windows=windows, count=count), {}),
        note=take(entries, "note", _remark, ""),
        author=take(entries, "author", _remark, ""),
        line=node.line,
    )
    if limit.count == "bytes" and limit.needs_recipient:
        wrong = "cannot be bytes with recipients in key or conditions: at RCPT the size is only the client's claim"
        entries["count"].refuse(wrong, "write recipients or messages, or remove them there")
    if "text" in entries and limit.action not in ACTIONS:
        entries["text"].refuse("is not used beside this on_exceed", "put the text into on_exceed, and remove this one")
    return limit


def read_override(node: Node, windows: Collection[int], count: Count | None) -> Override:
    """An override of a limit with these windows. Raises RefusedError, or notes its problems where the node's are."""
    maxes = partial(_maxes, windows=windows, count=count)
    if not isinstance(node.value, dict) or any(name[:1].isdigit() for name in node.value):
        return Override(maxes(node))
    entries = fields(node, ("max", "until", "note", "author"), {"max": "max: 1000"})
    return Override(
        max=take(entries, "max", maxes, {}),
        until_s=take(entries, "until", _until, None),
        note=take(entries, "note", _remark, ""),
        author=take(entries, "author", _remark, ""),
    )


def fold(key: Key, text: str) -> str:
    """A key as it will be cut from requests. Raises RefusedError."""
    texts = text.split(",") if len(key.parts) > 1 else [text]
    if key.parts and len(texts) != len(key.parts):
        names = ",".join(part.attribute for part in key.parts)
        raise RefusedError(f"{quote(text)} is not one value each of {names}", "write them joined by commas")
    return ",".join(_fold_part(part, value) for part, value in zip(key.parts, texts, strict=False))


def _limits(node: Node) -> list[Limit]:
    entries = mapping(node)
    if len(entries) > LIMITS_MAX:
        raise RefusedError(f"has {len(entries)} limits", f"write at most {LIMITS_MAX}")
    return [read_limit(name, entry) for name, entry in entries.items()]


# --- whom it counts ---------------------------------------------------------------------------------------------------


def _key(node: Node) -> Key:
    parts = tuple(_key_part(item) for item in listed(node))
    if len({part.attribute for part in parts}) < len(parts):
        raise RefusedError("names an attribute twice", "write each once")
    return Key(parts)


def _key_part(node: Node) -> KeyPart:
    right = "write a name such as sasl_username, a list of names, or {client_address: {ipv4: 32, ipv6: 64}}"
    if not isinstance(node.value, dict):
        return KeyPart(_key_name(scalar(node, right)))
    if len(node.value) != 1:
        raise RefusedError("is a mapping of several names", right)
    [(name, bits)] = node.value.items()
    if _key_name(name) not in ADDRESS_ATTRIBUTES:
        raise RefusedError(f"{name} is no address and has no networks", f"write just {name}")
    entries = fields(bits, ("ipv4", "ipv6"))
    whole = KeyPart(name)
    ipv4 = take(entries, "ipv4", partial(_bits, most=32), whole.ipv4)
    return KeyPart(name, ipv4, take(entries, "ipv6", partial(_bits, most=128), whole.ipv6))


def _key_name(name: str) -> str:
    if name in _KEYS:
        return name
    if name in KNOWN:
        raise RefusedError(f"{name} does not tell who sends", f"write one of {', '.join(sorted(_KEYS))}")
    raise RefusedError(f"{quote(name)} is unknown", nearest(name, _KEYS))


def _bits(node: Node, most: int) -> int:
    right = f"write the bits of the network, 1 to {most}"
    text = scalar(node, right).removeprefix("/")
    if not re.fullmatch("[0-9]{1,3}", text) or not 1 <= int(text) <= most:
        raise RefusedError(f"{quote(text)} is no prefix length", right)
    return int(text)


@lru_cache(maxsize=LIMITS_MAX)
def _cut(part: KeyPart) -> Callable[[Request], str]:
    return Key((part,)).compile()


def _fold_part(part: KeyPart, text: str) -> str:
    name, value, bits = part.attribute, text, ""
    if name in ADDRESS_ATTRIBUTES:
        value, _, bits = text.partition("/")
    elif name in DERIVED:
        name, value = DERIVED[name], f"@{text}"
    folded = _cut(part)(single(name, value))
    if not folded or (part.attribute in DERIVED and "@" in text):
        raise RefusedError(f"{quote(text)} is no {part.attribute}", "write it as the requests have it")
    if bits and bits != str(ip_network(folded).prefixlen):
        raise RefusedError(f"{quote(text)} is not a network that this limit counts", f"write {folded}")
    return folded


def _exempt(node: Node, key: Key) -> _Exempt:
    keys: list[str] = []
    several: list[tuple[Condition, ...]] = []
    for item in listed(node) if node.value else ():
        if isinstance(item.value, dict):
            several.append(attempt(item, read_conditions, ()))
        else:
            keys.append(attempt(item, lambda item: fold(key, scalar(item, "write a key, or conditions")), ""))
    return frozenset(keys), tuple(several)


# --- how much ---------------------------------------------------------------------------------------------------------


def duration_ms(text: str) -> int:
    """A window, such as `90m` or `1h 30m`. Raises RefusedError."""
    if not re.fullmatch("(?:[0-9]{1,9} ?[smhd] ?)+", text):
        raise RefusedError(f"{quote(text)} is no length of time", _WINDOW)
    length_ms = sum(int(number) * _WINDOW_UNITS_MS[unit] for number, unit in re.findall("([0-9]+) ?([smhd])", text))
    if not WINDOW_MS_MIN <= length_ms <= WINDOW_MS_MAX:
        right = f"write {duration_text(WINDOW_MS_MIN)} to {duration_text(WINDOW_MS_MAX)}"
        raise RefusedError(f"{quote(text)} is too {'short' if length_ms < WINDOW_MS_MIN else 'long'}", right)
    return length_ms


def _amount(node: Node, count: Count | None, also: str = "") -> int:
    right = (_SIZE if count == "bytes" else _NUMBER) + also
    text = scalar(node, right)
    match = re.fullmatch("([0-9]{1,16}(?:[.][0-9]{1,3})?) ?((?:[KMGT]I?)?B)?", text.upper())
    if not match or ("." in match[1] and not match[2]):
        raise RefusedError(f"{quote(text)} is not a {'size' if count == 'bytes' else 'number'}", right)
    if match[2] and count in ("messages", "recipients"):
        raise RefusedError(f"{quote(text)} is a size, and the limit counts {count}", "write a number, or count: bytes")
    amount = int(Decimal(match[1]) * _SIZE_UNITS[match[2] or ""])
    if not 1 <= amount <= AMOUNT_MAX:
        raise RefusedError(f"{quote(text)} is out of range", f"write 1 to {AMOUNT_MAX}")
    return amount


def _part(node: Node) -> float:
    """A part of a whole, such as `10%`."""
    right = "write a part such as 10%, at most 100%"
    text = scalar(node, right)
    match = re.fullmatch("([0-9]{1,3}(?:[.][0-9]{1,3})?) ?%", text)
    if not match or float(match[1]) > 100:
        raise RefusedError(f"{quote(text)} is no part of a whole", right)
    return float(match[1]) / 100


def _share(node: Node, count: Count | None) -> int:
    """The max of an override: a number or a word."""
    if isinstance(node.value, str) and node.value.lower() in _WORDS:
        return _WORDS[node.value.lower()]
    return _amount(node, count, also=", or unlimited, or blocked")


def _windows(entries: Mapping[str, Node], count: Count | None) -> dict[int, int]:
    node, per = entries.get("max"), entries.get("per")
    if node is None:
        return {}
    amount = partial(_amount, count=count)
    if isinstance(node.value, dict):
        if per:
            per.refuse("stands beside a max that has its own windows", "remove it")
        return attempt(node, partial(_by_window, amount=amount), {})
    if per is None:
        node.refuse("has no window", "write per: 1h below it")
    most = attempt(node, amount, 0)
    window_ms = take(entries, "per", lambda per: duration_ms(scalar(per, _WINDOW)), 0)
    return {window_ms: most} if window_ms else {}


def _by_window(node: Node, amount: Callable[[Node], int]) -> dict[int, int]:
    found: dict[int, int] = {}
    for entry in mapping(node).values():
        window_ms = attempt(entry, lambda entry: duration_ms(entry.name), 0)
        if window_ms and window_ms in found:
            entry.refuse("is a window that stands there already", "remove one of them")
        found[window_ms] = attempt(entry, amount, 0)
    if not found:
        raise RefusedError("is empty", _NUMBER)
    return dict(sorted(found.items()))


def _overrides(node: Node, key: Key, windows: Collection[int], count: Count | None) -> dict[str, Override]:
    found: dict[str, Override] = {}
    for entry in mapping(node).values():
        folded = attempt(entry, lambda entry: fold(key, entry.name), "")
        if folded and folded in found:
            entry.refuse("is a key that stands there already, in another spelling", "remove one of them")
        found[folded] = attempt(entry, partial(read_override, windows=windows, count=count), Override({}))
    return found


def _maxes(node: Node, windows: Collection[int], count: Count | None) -> dict[int, int]:
    if not isinstance(node.value, dict):
        most = _share(node, count)
        if len(windows) > 1 and most not in _WORDS.values():
            example = ", ".join(f"{duration_text(window_ms)}: {node.value}" for window_ms in windows)
            raise RefusedError("is one number for a limit of several windows", f"write {{{example}}}")
        return dict.fromkeys(windows, most)
    found = _by_window(node, partial(_share, count=count))
    for window_ms in found:
        if windows and window_ms not in windows:
            right = f"write one of {', '.join(map(duration_text, windows))}"
            raise RefusedError(f"the limit has no window of {duration_text(window_ms)}", right)
    return found


def _until(node: Node) -> float:
    right = "write a day such as 2027-01-31, or a time such as 2027-01-31 18:00+01:00"
    text = scalar(node, right)
    try:
        if ":" not in text:
            return (datetime.combine(date.fromisoformat(text), time(), UTC) + timedelta(days=1)).timestamp()
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise RefusedError(f"{quote(text)} is no date", right) from None


def _remark(node: Node) -> str:
    return scalar(node, "write some words, or remove it")
