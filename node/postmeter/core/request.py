"""A policy request: bytes in, attributes out.

    name=value NEWLINE ... NEWLINE

An smtpd sends the same attributes in the same order every time. So the names are learned once, as a *layout*, and of a
request that follows a known layout only the values are looked at. A request of an unknown layout is taken apart the
slow way, with every check, and teaches its layout.

A value may contain `=`, only the first one separates. Of an attribute that is given twice the first one counts. Bytes
that are not UTF-8 survive as surrogates. Derived attributes are `sasl_domain`, `sender_domain` and `recipient_domain`:
what follows the last `@`, in lower case.
"""

from __future__ import annotations

from collections.abc import Callable

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

# More would be a client that makes them up: one version of Postfix has one.
_LAYOUTS_MAX = 16


class Layout:
    """The names of a request's attributes, in their order. `places` tells where each stands.

    Only those that the parser remembers are `learned`: the same names are the same object then.
    """

    __slots__ = ("learned", "places", "prefixes", "prefixes_chars", "stage_place")

    def __init__(self, prefixes: list[str], places: dict[str, int]) -> None:
        self.prefixes = prefixes
        self.prefixes_chars = len("\n".join(prefixes))
        self.places = places
        # Without a stage: some value that is no stage.
        self.stage_place = places.get("protocol_state", places["request"])
        self.learned = False


Request = tuple[list[str], Layout]
"""The values of one request, and whose they are."""


class Parser:
    """Makes requests out of bytes. Keeps the layouts that it has learned."""

    def __init__(self) -> None:
        self._learned: dict[tuple[str, ...], Layout] = {}
        self._last: dict[int, Layout] = {}

    def parse(self, data: bytes) -> Request:
        """Check one request, from its first byte to its empty line. Raises ProtocolError with the reason."""
        text = data[:-2].decode("utf-8", "surrogateescape")
        lines = text.split("\n")
        layout = self._last.get(len(lines))
        if layout is None or len(data) > LINE_CHARS_MAX:
            if len(data) > REQUEST_BYTES_MAX:
                raise ProtocolError(f"request of more than {REQUEST_BYTES_MAX} bytes")
            layout = self._learn(lines)
        values = list(map(str.removeprefix, lines, layout.prefixes))
        # A line that did not begin as it should is still as long as it was.
        if len("".join(values)) + layout.prefixes_chars != len(text):
            layout = self._learn(lines)
            values = list(map(str.removeprefix, lines, layout.prefixes))
        if values[layout.places["request"]] != _TYPE:
            raise ProtocolError(_NO_REQUEST)
        if "\0" in text:
            raise ProtocolError("the request contains a NUL byte")
        return values, layout

    def _learn(self, lines: list[str]) -> Layout:
        layout = _layout(lines)
        names = tuple(layout.prefixes)
        if names not in self._learned:
            if len(self._learned) >= _LAYOUTS_MAX:
                return layout
            layout.learned = True
            self._learned[names] = layout
        self._last[len(lines)] = self._learned[names]
        return self._learned[names]


def single(name: str, value: str) -> Request:
    """A request of one attribute, for asking what a limit makes of a value. It is not checked."""
    return [value], Layout([f"{name}="], {name: 0, "request": 0})


_TYPE = "smtpd_access_policy"
_NO_REQUEST = f"request={_TYPE} is missing: this is no policy request of Postfix"


def _layout(lines: list[str]) -> Layout:
    if len(lines) > ATTRIBUTES_MAX:
        raise ProtocolError(f"request of {len(lines)} attributes, at most {ATTRIBUTES_MAX} are taken")
    prefixes: list[str] = []
    places: dict[str, int] = {}
    for place, line in enumerate(lines):
        name, equals, _ = line.partition("=")
        if not name or not equals:
            raise ProtocolError(f"line {place + 1} is not name=value: {line[:80]!r}")
        if len(line) > LINE_CHARS_MAX:
            raise ProtocolError(f"line {place + 1} has {len(line)} characters, at most {LINE_CHARS_MAX} are taken")
        prefixes.append(f"{name}=")
        places.setdefault(name, place)
    if "request" not in places:
        raise ProtocolError(_NO_REQUEST)
    return Layout(prefixes, places)


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
