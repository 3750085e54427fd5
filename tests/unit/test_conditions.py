"""Conditions on attributes: what holds for which value."""

from __future__ import annotations

import re

import pytest

from postmeter.core import conditions
from postmeter.core.conditions import Condition, Predicate, compile_all, parse_address
from tests.unit.support import request

GOT = ["", "Alice@Example.com", "bob@example.net", "192.0.2.7", "::ffff:192.0.2.7", "2001:db8::7", "unknown"]


@pytest.mark.parametrize(
    ("predicate", "holds_for"),
    [
        (conditions.equal("alice@example.com"), ["Alice@Example.com"]),
        (conditions.equal("ALICE@EXAMPLE.COM", "unknown"), ["Alice@Example.com", "unknown"]),
        (conditions.equal(""), [""]),
        (conditions.glob("*@EXAMPLE.*"), ["Alice@Example.com", "bob@example.net"]),
        (conditions.glob("*@example.c"), []),
        (conditions.glob("???@example.[nx]et"), ["bob@example.net"]),
        (conditions.regex("@example[.]com$"), ["Alice@Example.com"]),
        (conditions.regex("^$"), [""]),
        (conditions.cidr(["192.0.2.0/24"]), ["192.0.2.7", "::ffff:192.0.2.7"]),
        (conditions.cidr(["2001:db8::/32", "10.0.0.0/8"]), ["2001:db8::7"]),
        (conditions.cidr(["::/0"]), ["2001:db8::7"]),
        (conditions.present(True), GOT[1:]),
        (conditions.present(False), [""]),
        (conditions.negate(conditions.present(True)), [""]),
        (conditions.any_of([conditions.present(False), conditions.equal("unknown")]), ["", "unknown"]),
        (conditions.all_of([conditions.glob("*.*"), conditions.negate(conditions.glob("*@*"))]), GOT[3:5]),
        (conditions.any_of([]), []),
        (conditions.all_of([]), GOT),
    ],
)
def test_what_holds(predicate: Predicate, holds_for: list[str]) -> None:
    """Case never matters; a glob means the whole value, a regular expression any part; an absent value is ""."""
    assert holds_for == [got for got in GOT if predicate(got)]


def test_what_cannot_be_read_is_refused_when_it_is_made() -> None:
    """Not when mail comes: an expression that is none, and networks that are none."""
    with pytest.raises(re.error):
        conditions.regex("(")
    for wrong in ("192.0.2.7/24", "192.0.2.0/33", "example.com"):
        with pytest.raises(ValueError, match=wrong.split("/")[0]):
            conditions.cidr([wrong])


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:DB8:0::7", "2001:db8::7"),
        ("unknown", "None"),
        ("", "None"),
        ("192.0.2.7/24", "None"),
        ("192.0.2.07", "None"),
        ("192.0.2.7\n", "None"),
    ],
)
def test_addresses(text: str, address: str) -> None:
    """As Postfix writes them; IPv4 in IPv6 is IPv4, so that a client has one meter and not two."""
    assert address == str(parse_address(text))


def test_a_pattern_of_a_hostile_value_takes_no_time() -> None:
    """A glob is tried on values of 4,000 characters without trying every way to split them."""
    assert not conditions.glob("*a*a*a*a*a*b")("a" * 4_000)


def test_conditions_of_a_request_must_all_hold() -> None:
    """Several are asked one after the other, none are not asked at all, and derived attributes are as good."""
    inside = Condition("sasl_domain", "example.com", conditions.equal("example.com"))
    signed = Condition("sasl_username", "present: true", conditions.present(True))
    nobody = Condition("ccert_subject", "present: true", conditions.present(True))
    assert compile_all([]) is None
    for several, wanted in (([inside], True), ([inside, signed], True), ([inside, nobody], False), ([nobody], False)):
        hold = compile_all(several)
        assert hold is not None
        assert wanted == hold(request())
