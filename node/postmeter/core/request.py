"""A policy request: bytes in, attributes out.

    name=value NEWLINE ... NEWLINE

An smtpd sends the same attributes in the same order every time. So the names are learned once, as a *layout*, which is
a regular expression with a group for each value. Of a request that follows a known layout only the values that somebody
asks for are cut out. A request of an unknown layout is taken apart the slow way, with every check, and teaches its
layout.

A value may contain `=`, only the first one separates. Of an attribute that is given twice the first one counts. Bytes
that are not UTF-8 survive as surrogates. Derived attributes are `sasl_domain`, `sender_domain` and `recipient_domain`:
what follows the last `@`, in lower case.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from postmeter.defaults import ATTRIBUTES_MAX, LINE_CHARS_MAX, REQUEST_BYTES_MAX
from postmeter.errors import ProtocolError

END_OF_MESSAGE = "END-OF-MESSAGE"
STAGES = ("RCPT", "DATA", END_OF_MESSAGE)

DERIVED = {"sasl_domain": "sasl_username", "sender_domain": "sender", "recipient_domain": "recipient"}

# The attributes of Postfix 3.12 (SMTPD_POLICY_README), for telling an operator of a name that can never match.
KNOWN = frozenset(
    "request protocol_state protocol_name helo_name queue_id sender recipient recipient_count client_address"
    " client_name reverse_client_name instance sasl_method sasl_username sasl_sender size ccert_subject ccert_issuer"
    " ccert_fingerprint encryption_protocol encryption_cipher encryption_keysize etrn_domain stress"
    " ccert_pubkey_fingerprint client_port policy_context server_address server_port compatibility_level mail_version"
    " tls_sni".split()
)

# More would be a client that makes them up: one version of Postfix has one, of some 450 characters.
_LAYOUTS_MAX = 16
_LAYOUT_CHARS_MAX = 2_000


class Layout:
    """The names of a request's attributes. `places` tells where each stands, from 1 on; at 0 there is the whole text.

    Only those that the parser remembers are `learned`: the same names are the same object then. `match` gives the
    values of a text that follows a learned layout.
    """

    __slots__ = ("learned", "match", "places", "stage_place")

    def __init__(self, names: Sequence[str]) -> None:
        self.places: dict[str, int] = {}
        for place, name in enumerate(names, 1):
            self.places.setdefault(name, place)
        # Without a stage: some value that is no stage.
        self.stage_place = self.places.get("protocol_state", 0)
        self.learned = False
        self.match: Callable[[str], re.Match[str] | None] = lambda text: None

    def learn(self, names: Sequence[str]) -> None:
        """Match what has these names in this order, whatever its values, and is a policy request."""
        lines = [f"{re.escape(name)}=(.*+)\n" for name in names]
        lines[self.places["request"] - 1] = f"request=({_TYPE})\n"
        self.match = re.compile("".join([*lines, "\n"])).fullmatch
        self.learned = True


Values = re.Match[str] | Sequence[str]
Request = tuple[Values, Layout]
"""The values of one request, by their places, and whose they are."""


class Parser:
    """Makes requests out of bytes. Keeps the layouts that it has learned; the last one is tried first."""

    def __init__(self) -> None:
        self._learned: dict[tuple[str, ...], Layout] = {}
        self._last = Layout([])

    def parse(self, data: bytes) -> Request:
        """Check one request, from its first byte to its empty line. Raises ProtocolError with the reason."""
        text = data.decode("utf-8", "surrogateescape")
        layout = self._last
        values = layout.match(text)
        if values is None or len(data) > LINE_CHARS_MAX or "\0" in text:
            return self._take_apart(data, text)
        return values, layout

    def _take_apart(self, data: bytes, text: str) -> Request:
        if len(data) > REQUEST_BYTES_MAX:
            raise ProtocolError(f"request of more than {REQUEST_BYTES_MAX} bytes")
        names, values = _names_and_values(text[:-2].split("\n"))
        layout = self._learned.get(names) or Layout(names)
        if "request" not in layout.places or values[layout.places["request"]] != _TYPE:
            raise ProtocolError(f"request={_TYPE} is missing: this is no policy request of Postfix")
        if "\0" in text:
            raise ProtocolError("the request contains a NUL byte")
        if not layout.learned and len(self._learned) < _LAYOUTS_MAX and sum(map(len, names)) <= _LAYOUT_CHARS_MAX:
            layout.learn(names)
            self._learned[names] = layout
        if layout.learned:
            self._last = layout
        return values, layout


def single(name: str, value: str) -> Request:
    """A request of one attribute, for asking what a limit makes of a value. It is not checked."""
    return ["", value], Layout([name])


_TYPE = "smtpd_access_policy"


def _names_and_values(lines: list[str]) -> tuple[tuple[str, ...], list[str]]:
    if len(lines) > ATTRIBUTES_MAX:
        raise ProtocolError(f"request of {len(lines)} attributes, at most {ATTRIBUTES_MAX} are taken")
    names: list[str] = []
    values = [""]
    for number, line in enumerate(lines, 1):
        name, equals, value = line.partition("=")
        if not name or not equals:
            raise ProtocolError(f"line {number} is not name=value: {line[:80]!r}")
        if len(line) > LINE_CHARS_MAX:
            raise ProtocolError(f"line {number} has {len(line)} characters, at most {LINE_CHARS_MAX} are taken")
        names.append(name)
        values.append(value)
    return tuple(names), values


def attribute(name: str) -> Callable[[Request], str]:
    """A function that gives the attribute, or the derived attribute, of a request; "" if it is absent."""
    whole = DERIVED.get(name, name)

    def value(request: Request) -> str:
        values, layout = request
        place = layout.places.get(whole)
        return "" if place is None else values[place]

    def domain(request: Request) -> str:
        _, at, domain = value(request).rpartition("@")
        return domain.lower() if at else ""

    return value if whole == name else domain


def number(name: str) -> Callable[[Request], int]:
    """Like `attribute` for one that is a number of at most 18 digits; 0 if it is absent or empty.

    The function raises ProtocolError for anything else.
    """

    def value(request: Request) -> int:
        values, layout = request
        place = layout.places.get(name)
        text = "" if place is None else values[place]
        if len(text) <= 18 and text.isascii() and text.isdigit():
            return int(text)
        if text:
            raise ProtocolError(f"{name}={text[:40]!r} is not a number")
        return 0

    return value
