"""What nodes say to each other and store, at random, for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from postmeter.core.effects import (
    Accepted,
    Answer,
    Ask,
    Before,
    Borrowed,
    Excess,
    Handover,
    Lent,
    LoanId,
    Offer,
    Return,
    Returned,
    Standing,
)
from postmeter.core.meters import MetersId
from postmeter.core.view import Changes, Known, Portion
from postmeter.messages import NUMBER_MAX, HandoverPart
from postmeter.packet import Head

numbers = st.integers(0, NUMBER_MAX - 1) | st.integers(0, 300)
node_names = st.sampled_from(["mx1", "mx2", "mx-3.example.com"])
# Also what is not UTF-8, as requests are decoded.
keys = st.text(max_size=8) | st.binary(max_size=8).map(lambda key: key.decode("utf-8", "surrogateescape"))
ids = st.builds(
    MetersId,
    st.sampled_from(["per-user", "per-domain"]),
    st.sampled_from(["sasl_username", "client_address/24/64"]),
    st.sampled_from(["messages", "recipients", "bytes"]),
    st.integers(1, NUMBER_MAX - 1),
)
meters = st.tuples(ids, keys)
loans = st.builds(LoanId, node_names, numbers, numbers)
excess = st.lists(st.builds(Excess, loans, meters, numbers), max_size=5).map(tuple)
unclean = numbers | st.just(-1)

handovers = st.builds(Handover, numbers, excess, unclean)
parts = st.integers(2, 20_000).flatmap(
    lambda count: st.builds(HandoverPart, numbers, unclean, st.integers(0, count - 1), st.just(count), excess)
)
messages = (
    st.builds(Ask, loans, meters, numbers, st.booleans(), numbers, numbers, st.lists(loans, max_size=3).map(tuple))
    | st.builds(Answer, loans, numbers, numbers, numbers, st.lists(node_names, max_size=3).map(tuple))
    | st.builds(Offer, meters)
    | st.builds(Return, loans, numbers)
    | st.builds(Returned, loans, numbers)
    | st.builds(Accepted, numbers)
    | handovers
    | parts
)

digests = st.dictionaries(node_names, st.builds(Known, numbers, numbers, st.none() | st.integers(0, NUMBER_MAX - 2)))


@st.composite
def _portions(draw: st.DrawFn) -> Portion:
    since, *versions = sorted(draw(st.lists(numbers, min_size=1, max_size=20)))
    versions = [version for version in versions if version > since]
    tables = draw(st.lists(ids, min_size=1, max_size=3)), draw(st.lists(keys, min_size=1, max_size=3))
    places = [st.integers(0, len(table) - 1) for table in tables]
    entries = [(version, draw(places[0]), draw(numbers), draw(places[1]), draw(numbers)) for version in versions]
    newest = max([since, *versions])
    return Portion(draw(node_names), draw(numbers), since, newest, draw(numbers), Changes(*tables, entries))


portions = _portions()

heads = st.builds(
    Head,
    sender=node_names,
    receiver=node_names,
    incarnation=numbers,
    version=st.sampled_from(["", "0.1.0"]),
    wall_ms=numbers,
    protocol_oldest=st.integers(0, 9),
    protocol_newest=st.integers(0, 9),
)

pairs = st.lists(st.tuples(node_names, st.integers(-1, NUMBER_MAX)), max_size=3).map(tuple)
records = (
    st.builds(Lent, loans, meters, numbers, numbers, numbers)
    | st.builds(
        Borrowed,
        meters,
        node_names,
        numbers,
        numbers,
        numbers,
        returned=numbers,
        acknowledged=numbers,
        generation=numbers | st.just(-1),
        accepted=st.booleans(),
        covers=st.dictionaries(numbers, numbers, max_size=3),
    )
    | st.builds(
        Standing,
        node_names,
        st.lists(st.tuples(numbers, st.lists(node_names, max_size=3).map(tuple)), max_size=3).map(tuple),
        st.integers(-1, 9),
        pairs,
        pairs,
        pairs,
        st.none() | numbers,
    )
    | handovers
    | st.builds(Before, ids, st.none() | keys, numbers, numbers)
)
places = (
    loans
    | st.tuples(node_names, numbers)
    | st.tuples(st.just("before"), st.builds(MetersId, st.text(), st.text(), st.text(), numbers), st.none() | st.text())
    | st.just("standing")
)
