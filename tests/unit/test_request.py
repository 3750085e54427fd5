"""The parser against a dumb twin that takes every request apart from the beginning, and what it refuses."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postmeter.core.request import DERIVED, Parser, Request, attribute, number
from postmeter.defaults import ATTRIBUTES_MAX, LINE_CHARS_MAX, REQUEST_BYTES_MAX
from postmeter.errors import ProtocolError
from tests.unit.support import message

TYPE = "smtpd_access_policy"


def dumb_parse(data: bytes) -> dict[str, str] | None:
    """The attributes, by the rules as they are written; None if the request is to be refused."""
    if len(data) > REQUEST_BYTES_MAX:
        return None
    lines = data.decode("utf-8", "surrogateescape").removesuffix("\n\n").split("\n")
    found: dict[str, str] = {}
    for line in lines:
        name, equals, value = line.partition("=")
        if not (name and equals) or len(line) > LINE_CHARS_MAX:
            return None
        found.setdefault(name, value)
    well_formed = found.get("request") == TYPE and "\0" not in "".join(lines) and len(lines) <= ATTRIBUTES_MAX
    return found if well_formed else None


def clever_parse(parser: Parser, data: bytes) -> Request | None:
    """What the parser makes of it; None if it refuses it."""
    try:
        return parser.parse(data)
    except ProtocolError:
        return None


def lines(*given: str, type: str = TYPE) -> bytes:
    """A request of these lines, behind the one that says what it is."""
    return ("\n".join([f"request={type}", *given]) + "\n\n").encode("utf-8", "surrogateescape")


# Few names and values, so that layouts are met again, nearly met, and mixed up.
NAMES = ["request", "sender", "sende", "sasl_username", "s", "protocol_state", "=", "", "size=", "ä", "\udcff"]
VALUES = [
    "",
    TYPE,
    "=",
    "a=b",
    "alice@example.com",
    "ä",
    "\udcff\udc80",
    "\0",
    "request=",
    "x" * LINE_CHARS_MAX,
    "\r",
    " ",
]
one_line = st.one_of(
    st.tuples(st.sampled_from(NAMES), st.sampled_from(["=", "=", "=", "=", ""]), st.sampled_from(VALUES)).map("".join),
    st.text(st.sampled_from("ab=\r \x00ä"), max_size=6),
)
any_request = st.tuples(
    st.sampled_from([[f"request={TYPE}"], [f"request={TYPE}"], []]), st.lists(one_line, max_size=7)
).map(lambda parts: ("\n".join([*parts[0], *parts[1]]) + "\n\n").encode("utf-8", "surrogateescape"))


@given(st.lists(any_request, max_size=8))
@settings(max_examples=200, deadline=None)
def test_the_parser_equals_the_twin(requests: list[bytes]) -> None:
    """Whatever was parsed before, every request is taken or refused, and every attribute read, as the twin does it."""
    parser = Parser()
    for data in requests:
        wanted, got = dumb_parse(data), clever_parse(parser, data)
        assert (wanted is None) == (got is None)
        if wanted is not None and got is not None:
            for name in [*NAMES, "absent"]:
                assert wanted.get(name, "") == attribute(name)(got)


@given(
    st.lists(
        st.sampled_from([("s.nder", "request", "size"), ("request", "s.nder", "size"), ("request", "s.nder", "s.nder")])
    ),
    st.lists(
        st.tuples(
            st.sampled_from(["s.nder", "sender"]), st.sampled_from([TYPE, TYPE, TYPE, ""]), st.sampled_from(VALUES)
        )
    ),
)
@settings(max_examples=200, deadline=None)
def test_what_follows_a_known_layout_is_checked_like_the_first_of_it(
    known: list[tuple[str, ...]], requests: list[tuple[str, str, str]]
) -> None:
    """Whichever layouts were learned, no type, value or similar name slips through."""
    parser = Parser()
    for names in known:
        parser.parse("".join(f"{name}={TYPE}\n" for name in names).encode() + b"\n")
    for sender, type, value in requests:
        data = f"request={type}\n{sender}={value}\nsize=1\n\n".encode("utf-8", "surrogateescape")
        wanted, got = dumb_parse(data), clever_parse(parser, data)
        assert (wanted is None) == (got is None)
        if wanted is not None and got is not None:
            assert wanted == {name: attribute(name)(got) for name in wanted}


@given(st.permutations(["request", "sender", "sasl_username", "size", "instance"]), st.lists(st.integers(0, 40)))
@settings(max_examples=200, deadline=None)
def test_a_layout_is_never_taken_for_another(names: list[str], order: list[int]) -> None:
    """Requests with the same number of lines, in any order of any names, are told apart."""
    parser = Parser()
    for turn in [0, *order, 0]:
        turned = names[turn % len(names) :] + names[: turn % len(names)]
        values = {name: TYPE if name == "request" else f"{name}{turn}" for name in turned}
        parsed = parser.parse(("".join(f"{name}={value}\n" for name, value in values.items()) + "\n").encode())
        assert values == {name: attribute(name)(parsed) for name in names}


def test_a_line_splits_at_its_first_equals_sign() -> None:
    """SRS and VERP senders hold equals signs, and keep them."""
    parsed = Parser().parse(message(sender="SRS0=Xy=8z=example.net=bob@example.com", recipient="list-bob=a=b@x.test"))
    assert "SRS0=Xy=8z=example.net=bob@example.com" == attribute("sender")(parsed)
    assert "list-bob=a=b@x.test" == attribute("recipient")(parsed)


def test_absent_and_empty_attributes_are_alike() -> None:
    """An older Postfix sends fewer attributes, and many are empty: both read as "", and as 0 where a number is due."""
    parsed = Parser().parse(lines("sender=", "size="))
    assert ["", "", ""] == [attribute(name)(parsed) for name in ("sender", "sasl_username", "sender_domain")]
    assert [0, 0] == [number(name)(parsed) for name in ("size", "recipient_count")]


def test_unknown_attributes_do_no_harm() -> None:
    """What a later Postfix may add is passed over."""
    parsed = Parser().parse(message(tls_of_tomorrow="yes=1", **{"x-y z": ""}))
    assert "yes=1" == attribute("tls_of_tomorrow")(parsed)
    assert "alice@example.com" == attribute("sasl_username")(parsed)


def test_of_a_duplicate_the_first_counts() -> None:
    """A second sasl_username does not change whom the mail is counted for, whether the layout is new or known."""
    parser = Parser()
    for _ in range(2):
        parsed = parser.parse(lines("sasl_username=alice", "sasl_username=bob", f"request={TYPE}x"))
        assert "alice" == attribute("sasl_username")(parsed)


def test_bytes_that_are_not_utf8_survive() -> None:
    """They are read as surrogates, and written out they are the same bytes again."""
    data = b"request=smtpd_access_policy\nsender=\xff\xe4\xed\xa0\x80\xf0\x9f\n\n"
    sender = attribute("sender")(Parser().parse(data))
    assert b"\xff\xe4\xed\xa0\x80\xf0\x9f" == sender.encode("utf-8", "surrogateescape")


@pytest.mark.parametrize(
    ("username", "domain"),
    [
        ("alice@Example.COM", "example.com"),
        ('"a@b"@example.com', "example.com"),
        ("alice", ""),
        ("alice@", ""),
        ("@example.com", "example.com"),
        ("", ""),
        ("alice@\udcff", "\udcff"),
    ],
)
def test_derived_domains(username: str, domain: str) -> None:
    """A domain is what follows the last @, in lower case; without one there is none."""
    for derived, whole in DERIVED.items():
        parsed = Parser().parse(lines(f"{whole}={username}"))
        assert domain == attribute(derived)(parsed)
    assert "" == attribute("sasl_domain")(Parser().parse(lines()))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\n\n", r"line 1 is not name=value: ''"),
        (b"\nrequest=smtpd_access_policy\n\n", r"line 1 is not name=value: ''"),
        (b"GET / HTTP/1.0\r\nHost: x\r\n\r\n\n\n", r"line 1 is not name=value: 'GET / HTTP/1\.0\\r'"),
        (lines("sender"), r"line 2 is not name=value: 'sender'"),
        (lines("=alice"), r"line 2 is not name=value: '=alice'"),
        (lines("a=1", "b" * 5000), r"line 3 is not name=value: 'b{80}'$"),
        (lines("sender=" + "a" * LINE_CHARS_MAX), rf"line 2 has {LINE_CHARS_MAX + 7} characters, at most"),
        (lines(*["a="] * ATTRIBUTES_MAX), rf"request of {ATTRIBUTES_MAX + 1} attributes, at most"),
        (lines(*["a=" + "x" * 4000] * 10), rf"request of more than {REQUEST_BYTES_MAX} bytes"),
        (lines("sender=a\0b"), r"contains a NUL byte"),
        (lines("\0=a"), r"contains a NUL byte"),
        (lines(type="junk"), r"request=smtpd_access_policy is missing"),
        (lines(type=TYPE + "\r"), r"request=smtpd_access_policy is missing"),
        (b"sender=alice\n\n", r"request=smtpd_access_policy is missing"),
        (b"Request=smtpd_access_policy\n\n", r"request=smtpd_access_policy is missing"),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, bytes) else None,
)
def test_malformed_requests_are_refused_with_the_reason(data: bytes, reason: str) -> None:
    """The reason names the line and what is wrong, also for a parser that knows a layout with as many lines."""
    for parser in (Parser(), Parser()):
        with pytest.raises(ProtocolError, match=reason):
            parser.parse(data)
        known = [f"a{number}=" for number in range(data.count(b"\n") - 2)]
        if len(known) < ATTRIBUTES_MAX - 1:
            parser.parse(lines(*known))
            with pytest.raises(ProtocolError, match=reason):
                parser.parse(data)


def test_the_largest_request_is_taken() -> None:
    """As many attributes, as long a line, and as many bytes as are allowed; and not one byte more."""
    longest = "b=" + "x" * (LINE_CHARS_MAX - 2)
    parsed = Parser().parse(lines(longest, *["a=1"] * (ATTRIBUTES_MAX - 2)))
    assert longest[2:] == attribute("b")(parsed)
    rest = REQUEST_BYTES_MAX - len(lines(*[longest] * 7, ""))
    data = lines(*[longest] * 7, "c=" + "x" * (rest - 2))
    assert REQUEST_BYTES_MAX == len(data)
    Parser().parse(data)
    with pytest.raises(ProtocolError, match="request of more than"):
        Parser().parse(data.replace(b"c=", b"c=x"))


def test_characters_are_counted_not_bytes() -> None:
    """A line of LINE_CHARS_MAX characters of four bytes each is taken."""
    parsed = Parser().parse(lines("b=" + "\U0001f4ee" * (LINE_CHARS_MAX - 2)))
    assert LINE_CHARS_MAX - 2 == len(attribute("b")(parsed))


def test_a_client_that_makes_up_layouts_does_not_fill_the_memory() -> None:
    """However many layouts are seen, a few are kept, and all requests are still read."""
    parser = Parser()
    for count in range(ATTRIBUTES_MAX - 1):
        for _ in range(2):
            parsed = parser.parse(lines(*(f"a{place}={count}" for place in range(count)), type=TYPE))
            assert str(count) * bool(count) == attribute("a0")(parsed)
    assert 16 == len(parser._learned)


def test_a_layout_is_learned_once() -> None:
    """The same names give the same layout, whatever came between, and a request that follows it is matched by it."""
    parser = Parser()
    layouts = [parser.parse(lines(f"{name}=1"))[1] for name in ("a", "b", "a", "b")]
    assert layouts[:2] == layouts[2:]
    values, layout = parser.parse(lines("b=2"))
    assert layouts[1] is layout
    assert isinstance(values, re.Match)


def test_a_layout_of_long_names_is_not_learned() -> None:
    """An expression for names as long as the whole request would take long to make."""
    assert not Parser().parse(lines("x" * 4000 + "=1"))[1].learned


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("007", 7), ("9" * 18, 10**18 - 1)])
def test_numbers(text: str, value: int) -> None:
    """Up to 18 digits, which every counter can hold."""
    assert value == number("size")(Parser().parse(lines(f"size={text}")))


@pytest.mark.parametrize("text", ["-1", "+1", "1 ", "1e3", "0x1", "1_000", "²", "٣", "9" * 19, "\udcff"])
def test_what_is_no_number(text: str) -> None:
    """Whatever else int() would take is refused, with the attribute's name."""
    with pytest.raises(ProtocolError, match="size="):
        number("size")(Parser().parse(lines(f"size={text}")))
