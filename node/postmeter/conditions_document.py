"""Conditions as an operator writes them, under `match` and `exempt`, made into `Condition`.

    match:
      sasl_username: {present: true}                            # a mapping of operators: all of them hold
      sender_domain: [example.org, {glob: "*.example.org"}]     # a list: one of them holds
      client_address: {not: {cidr: [10.0.0.0/8]}}
      policy_context: submission                                # a value: equality

The operators:

    equal       a value or a list; of an address, any spelling
    glob        a pattern or a list: `*`, `?`, `[...]`; for the value as a whole
    regex       an expression or a list; found anywhere in the value, unless it has `^` and `$`
    cidr        a network or a list; for addresses only
    present     true or false; an absent attribute is an empty one
    not         a condition, nested at most CONDITION_DEPTH_MAX deep
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from postmeter.core import conditions
from postmeter.core.conditions import Condition, Predicate, parse_address
from postmeter.core.limits import ADDRESS_ATTRIBUTES
from postmeter.core.request import DERIVED, KNOWN
from postmeter.defaults import CONDITION_DEPTH_MAX
from postmeter.documents import (
    Node,
    RefusedError,
    attempt,
    boolean,
    fields,
    listed,
    mapping,
    nearest,
    printable,
    quote,
    scalar,
)

T = TypeVar("T")

_OPERATORS = ("equal", "glob", "regex", "cidr", "present", "not")
_ATTRIBUTES = KNOWN | DERIVED.keys()

_Test = tuple[Predicate, frozenset[str] | None]
"""`holds` and `values` of a condition."""

_FAILED: _Test = (conditions.all_of(()), None)


def read_conditions(node: Node) -> tuple[Condition, ...]:
    """A mapping of attributes to conditions."""
    if not mapping(node):
        raise RefusedError("has no condition", "write one such as sasl_username: {present: true}, or remove it")
    found = [attempt(entry, _condition, None) for entry in mapping(node).values()]
    return tuple(condition for condition in found if condition)


def _condition(node: Node) -> Condition:
    if node.name not in _ATTRIBUTES:
        raise RefusedError(f"{quote(node.name)} is no attribute of a request", nearest(node.name, _ATTRIBUTES))
    holds, values = _test(node, node.name, 0)
    return Condition(node.name, _written(node), holds, values)


def _test(node: Node, name: str, depth: int) -> _Test:
    if depth > CONDITION_DEPTH_MAX:
        raise RefusedError(f"not is nested more than {CONDITION_DEPTH_MAX} deep", "write it with fewer")
    if isinstance(node.value, dict) and node.value:
        entries = fields(node, _OPERATORS).values()
        return _all([attempt(entry, partial(_operator, name=name, depth=depth), _FAILED) for entry in entries])
    if isinstance(node.value, list) and any(isinstance(item.value, dict) for item in node.value):
        return _any([attempt(item, partial(_test, name=name, depth=depth), _FAILED) for item in node.value])
    return _equal(node, name)


def _operator(node: Node, name: str, depth: int) -> _Test:
    """The test that an operator makes of its operand, the node."""
    if node.name == "equal":
        return _equal(node, name)
    if node.name == "present":
        wanted = boolean(node)
        return conditions.present(wanted), None if wanted else frozenset({""})
    if node.name == "not":
        return conditions.negate(_test(node, name, depth + 1)[0]), None
    if node.name == "cidr":
        if name not in ADDRESS_ATTRIBUTES:
            raise RefusedError(f"{name} is no address", f"use glob, or cidr with {' or '.join(ADDRESS_ATTRIBUTES)}")
        return conditions.cidr(_each(node, _network)), None
    return _any([(holds, None) for holds in _each(node, _glob if node.name == "glob" else _regex)])


def _equal(node: Node, name: str) -> _Test:
    values = _each(node, partial(_value, name=name))
    return conditions.equal(*values), frozenset(value.lower() for value in values)


def _value(node: Node, name: str) -> str:
    text = scalar(node, "write a value, or {present: false} if there must be none")
    if name in DERIVED and "@" in text:
        raise RefusedError(f"{quote(text)} is no domain", "write what is behind the @")
    if name not in ADDRESS_ATTRIBUTES:
        return text
    address = parse_address(text)
    if address is None:
        raise RefusedError(f"{quote(text)} is no address", "write one, or a network such as {cidr: 192.0.2.0/24}")
    return str(address)


def _network(node: Node) -> str:
    right = "write one such as 192.0.2.0/24 or 2001:db8::/32"
    text = scalar(node, right)
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise RefusedError(f"{quote(text)} is no network", right) from None
    if parse_address(text.partition("/")[0]) != parse_address(str(network.network_address)):
        raise RefusedError(f"{quote(text)} has bits set behind its prefix", f"write {network}")
    if network.version == 6 and network.prefixlen >= 96 and network.network_address.ipv4_mapped:
        right = f"write {network.network_address.ipv4_mapped}/{network.prefixlen - 96}"
        raise RefusedError(f"{quote(text)} never matches, such addresses count as IPv4", right)
    return str(network)


def _glob(node: Node) -> Predicate:
    return conditions.glob(scalar(node, "write a pattern such as *@example.org, in quotes"))


def _regex(node: Node) -> Predicate:
    text = scalar(node, "write a regular expression such as ^noreply@")
    try:
        return conditions.regex(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise RefusedError(f"{quote(text)} is no regular expression: {error}", "correct it, or use glob") from None


def _each(node: Node, reader: Callable[[Node], T]) -> list[T]:
    found = (attempt(item, reader, None) for item in listed(node))
    return [value for value in found if value is not None]


def _any(tests: list[_Test]) -> _Test:
    if len(tests) == 1:
        return tests[0]
    values = [several for _, several in tests if several is not None]
    all_known = len(values) == len(tests)
    return conditions.any_of(holds for holds, _ in tests), frozenset().union(*values) if all_known else None


def _all(tests: list[_Test]) -> _Test:
    if len(tests) == 1:
        return tests[0]
    values = [several for _, several in tests if several is not None]
    return conditions.all_of(holds for holds, _ in tests), frozenset.intersection(*values) if values else None


def _written(node: Node) -> str:
    """The condition in one line."""
    if isinstance(node.value, str):
        return printable(node.value)
    if isinstance(node.value, list):
        return f"[{', '.join(map(_written, node.value))}]"
    return f"{{{', '.join(f'{name}: {_written(entry)}' for name, entry in node.value.items())}}}"
