"""Questions about one attribute's value, as `match` and `exempt` ask them: equality, glob, regex, cidr, present, not.

All of them ignore case, as Postfix's own tables do. An absent attribute has the value "".
"""

from __future__ import annotations

import fnmatch
import ipaddress
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from postmeter.core.request import Request, attribute

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Predicate = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Condition:
    """`holds(value)` for the value of `attribute`. `written` is what the operator wrote, in one line.

    `values` are the only values (in lower case) for which it can hold, where that is known.
    """

    attribute: str
    written: str
    holds: Predicate = field(compare=False)
    values: frozenset[str] | None = None


def equal(*values: str) -> Predicate:
    """The value is one of these."""
    wanted = frozenset(value.lower() for value in values)
    return lambda got: got.lower() in wanted


def glob(pattern: str) -> Predicate:
    """The value as a whole matches a shell pattern: `*`, `?`, `[...]`."""
    match = re.compile(fnmatch.translate(pattern.lower())).match
    return lambda got: match(got.lower()) is not None


def regex(pattern: str) -> Predicate:
    """The expression is found somewhere in the value. Raises re.error."""
    search = re.compile(pattern, re.IGNORECASE).search
    return lambda got: search(got) is not None


def cidr(networks: Iterable[str]) -> Predicate:
    """The value is an address within one of the networks. Raises ValueError."""
    nets = [ipaddress.ip_network(network) for network in networks]

    def holds(got: str) -> bool:
        address = parse_address(got)
        return address is not None and any(address in net for net in nets)

    return holds


def present(wanted: bool) -> Predicate:
    """The value is not empty, or is."""
    return lambda got: bool(got) is wanted


def negate(predicate: Predicate) -> Predicate:
    """The predicate does not hold."""
    return lambda got: not predicate(got)


def any_of(predicates: Iterable[Predicate]) -> Predicate:
    """At least one of them holds."""
    several = tuple(predicates)
    return lambda got: any(predicate(got) for predicate in several)


def all_of(predicates: Iterable[Predicate]) -> Predicate:
    """All of them hold."""
    several = tuple(predicates)
    return lambda got: all(predicate(got) for predicate in several)


def parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An address as Postfix writes it; an IPv4 address mapped into IPv6 becomes IPv4 again. None if it is none."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def compile_all(conditions: Iterable[Condition]) -> Callable[[Request], bool] | None:
    """One function of a parsed request that says whether all conditions hold; None if there are none to ask."""
    asked = [(attribute(condition.attribute), condition.holds) for condition in conditions]
    if not asked:
        return None
    if len(asked) == 1:
        [(cut, holds)] = asked
        return lambda request: holds(cut(request))
    return lambda request: all(holds(cut(request)) for cut, holds in asked)
