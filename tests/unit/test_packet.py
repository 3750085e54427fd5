"""Packets: what is written is what is read, and what cannot be is refused in words."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postmeter.core.effects import Ask, Excess, Handover, LoanId, Offer, Return
from postmeter.core.meters import MetersId
from postmeter.core.view import Changes, Known, Portion
from postmeter.defaults import (
    HANDOVER_PART_LOANS_MAX,
    HANDOVER_PARTS_MAX,
    KEY_CHARS_MAX,
    METERS_NAME_CHARS_MAX,
    PACKET_BYTES,
    PACKET_BYTES_MAX,
    PACKET_MESSAGES_MAX,
    PEER_KEY_BYTES_MAX,
    VIEW_NODES_MAX,
    VIEW_PORTION_ENTRIES_MAX,
)
from postmeter.errors import PeerError
from postmeter.messages import NUMBER_MAX, HandoverPart, Parts, Spoken, split
from postmeter.packet import (
    TEXT_CHARS_MAX,
    Draft,
    Head,
    parse,
    read_digest,
    read_head,
    read_messages,
    read_portions,
)
from postmeter.v1 import peers_pb2 as pb
from tests.unit.cluster_strategies import digests, heads, messages, portions

HEAD = Head("mx1", "mx2", 7, "0.1.0", 1_800_000_000_000)
USER_HOUR = MetersId("per-user", "sasl_username", "recipients", 3_600_000)
ALICE = (USER_HOUR, "alice@example.com")
LOAN = LoanId("mx1", 7, 1)


def example() -> pb.Packet:
    """A packet of everything."""
    draft = Draft(HEAD)
    draft.add_message(Ask(LOAN, ALICE, 5, True, 1000, 60_000))
    draft.add_message(Handover(2, (Excess(LOAN, ALICE, 5),), 60))
    draft.add_digest({"mx1": Known(7, 9, 0), "mx2": Known(3, 4, None)})
    draft.add_portion(
        Portion("mx1", 7, 4, 9, 1000, Changes([USER_HOUR], ["alice", "bob"], [(5, 0, 1, 0, 2), (9, 0, 1, 1, 3)]))
    )
    return parse(draft.finish())


def read(packet: pb.Packet) -> None:
    """Read all there is."""
    read_head(packet)
    read_messages(packet)
    read_digest(packet)
    list(read_portions(packet))


@given(heads, st.lists(messages, max_size=5), digests, st.lists(portions, max_size=3))
def test_what_is_written_is_what_is_read(
    head: Head, said: list[Spoken], known: dict[str, Known], changed: list[Portion]
) -> None:
    """Everything that may be in a packet, with all keys that Postfix may send."""
    draft = Draft(head)
    for message in said:
        draft.add_message(message)
    draft.add_digest(known)
    for portion in changed:
        draft.add_portion(portion)
    packet = parse(draft.finish())
    assert head == read_head(packet)
    assert said == read_messages(packet)
    assert known == read_digest(packet)
    assert changed == list(read_portions(packet))


def test_names_travel_once() -> None:
    """However many messages are about a meter."""
    draft = Draft(HEAD)
    for number in range(PACKET_MESSAGES_MAX):
        draft.add_message(Ask(LoanId("mx1", 7, number), ALICE, 5, True, 1000, 60_000))
    assert 1 == draft.finish().count(b"alice")


@given(st.binary())
def test_garbage_is_refused(data: bytes) -> None:
    """With a PeerError, and nothing else."""
    with suppress(PeerError):
        read(parse(data))


def test_packets_that_were_changed_on_the_way_are_read_or_refused() -> None:
    """Bytes changed, cut out and doubled at random; nothing but PeerError is raised."""
    die = random.Random(1)
    good = example().SerializeToString()
    refused = 0
    for _ in range(20_000):
        data = bytearray(good)
        for _ in range(die.randint(1, 4)):
            place = die.randrange(len(data))
            data[place : place + die.choice([0, 1, 1, 1, 5])] = die.choice([b"", b"\0", b"\xff", die.randbytes(2)])
        try:
            read(parse(bytes(data)))
        except PeerError:
            refused += 1
    assert 2_000 < refused < 20_000


def _set(path: str, value: object) -> Callable[[pb.Packet], None]:
    """Set one field: `messages[0].ask.amount`; a list in place of a column."""

    def change(packet: pb.Packet) -> None:
        *steps, last = path.replace("[", ".").replace("]", "").split(".")
        target = packet
        for step in steps:
            target = target[int(step)] if step.isdigit() else getattr(target, step)  # type: ignore[index]
        if isinstance(value, list):
            del getattr(target, last)[:]
            getattr(target, last).extend(value)
        else:
            setattr(target, last, value)

    return change


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("sender", "", "'' is no name of a node"),
        ("sender", "mx1\n", r"'mx1\n' is no name of a node"),
        ("receiver", "192.0.2.1", "'192.0.2.1' is no name of a node"),
        ("version", "x" * (TEXT_CHARS_MAX + 1), "the name of a version is not text of up to 100 characters"),
        ("version", "\x1b[2J", "the name of a version is not text of up to 100 characters"),
        ("wall_ms", NUMBER_MAX, f"a time is {NUMBER_MAX}, not 0 to 2^62"),
        ("tables.nodes", ["-"], "'-' is no name of a node"),
        (
            "tables.nodes",
            ["a"] * (VIEW_NODES_MAX + 1),
            "tables have 1001 nodes and 1 others, more than can be referred",
        ),
        ("tables.keys", [b""] * 301, "tables have 1 nodes and 301 others, more than can be referred to"),
        ("tables.keys", [b"x" * (PEER_KEY_BYTES_MAX + 1)], "a key has 65537 bytes, more than 65536"),
        ("tables.meters[0].limit", "", "the limit of meters has 0 characters, not 1 to 1000"),
        ("tables.meters[0].count", "x" * (METERS_NAME_CHARS_MAX + 1), "the count of meters has 1001 characters, not 1"),
        ("tables.meters[0].window_ms", 0, "a window has no length"),
        ("messages[0].ask.loan.borrower", 1, "place 1 is not in the table of 1 nodes"),
        ("messages[0].ask.loan.number", NUMBER_MAX, f"the number of a loan is {NUMBER_MAX}, not 0 to 2^62"),
        ("messages[0].ask.meters", 1, "place 1 is not in the table of 1 meters"),
        ("messages[0].ask.key", 1, "place 1 is not in the table of 1 keys"),
        ("messages[0].ask.amount", (1 << 64) - 1, f"an amount is {(1 << 64) - 1}, not 0 to 2^62"),
        ("messages[1].handover.parts", 1, None),
        ("messages[1].handover.part", 1, "a handover has part 1 of 0"),
        ("messages[1].handover.parts", HANDOVER_PARTS_MAX + 1, "a handover has part 0 of 20001"),
        ("messages[1].handover.keys", [1], "one of the places of keys is 1, which should be below 1"),
        ("messages[1].handover.amounts", [], "there are 0 amounts beside 1 others"),
        ("messages[1].handover.amounts", [NUMBER_MAX], f"one of the amounts is {NUMBER_MAX}, which should be below"),
        ("messages[1].handover.numbers", [1] * 201, "a handover has 201 loans, more than 200 in one part"),
        ("digest.nodes", ["mx1", "MX2"], "'MX2' is no name of a node"),
        ("digest.nodes", ["mx1"] * (VIEW_NODES_MAX + 1), "a digest has 1001 nodes, more than 1000"),
        ("digest.versions", [1], "there are 1 versions beside 2 others"),
        ("digest.ages_ms", [0, NUMBER_MAX], f"one of the ages is {NUMBER_MAX}, which should be below {NUMBER_MAX}"),
        ("portions[0].node", "", "'' is no name of a node"),
        ("portions[0].versions", [9, 5], "the versions of a portion do not ascend from 4 to 9"),
        ("portions[0].versions", [4, 9], "the versions of a portion do not ascend from 4 to 9"),
        ("portions[0].versions", [5, 10], "one of the versions is 10, which should be below 10"),
        ("portions[0].since", 10, "the versions of a portion do not ascend from 10 to 9"),
        ("portions[0].versions", [5] * (VIEW_PORTION_ENTRIES_MAX + 1), "a portion has 201 entries, more than 200"),
        ("portions[0].tables.keys", [b"x"] * 201, "tables have 0 nodes and 201 others, more than can be referred to"),
        ("portions[0].tables.keys", [b"x"], "one of the places of keys is 1, which should be below 1"),
        ("portions[0].meters", [0, 1], "one of the places of meters is 1, which should be below 1"),
        ("portions[0].slices", [1], "there are 1 slices beside 2 others"),
        ("portions[0].amounts", [1, NUMBER_MAX], f"one of the amounts is {NUMBER_MAX}, which should be below"),
        ("portions[0].now_ms", NUMBER_MAX, f"a time is {NUMBER_MAX}, not 0 to 2^62"),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(path: str, value: object, expected: str | None) -> None:
    """One mistake in a good packet; None where it is none."""
    packet = example()
    read(packet)
    _set(path, value)(packet)
    if expected is None:
        read(packet)
        return
    with pytest.raises(PeerError) as caught:
        read(packet)
    assert str(caught.value).startswith(expected)


def test_too_many_messages_are_refused() -> None:
    """So that reading them never takes long."""
    packet = example()
    packet.messages.extend([packet.messages[0]] * (PACKET_MESSAGES_MAX - 1))
    with pytest.raises(PeerError, match="there are 101 messages in a packet, more than 100"):
        read_messages(packet)


def test_what_a_later_version_says_besides_is_ignored() -> None:
    """Messages of unknown kinds, and unknown fields anywhere."""
    field_100 = b"\xa2\x06\x03new"
    packet = example()
    expected = read_messages(packet)
    packet.messages.insert(1, pb.RightsMessage.FromString(field_100))
    packet.messages[0].ask.MergeFromString(field_100)
    packet.portions[0].MergeFromString(field_100)
    packet = parse(packet.SerializeToString() + field_100)
    read(packet)
    assert expected == read_messages(packet)


def test_a_packet_is_full_long_before_it_is_too_large() -> None:
    """By its bytes, or by its messages."""
    draft = Draft(HEAD)
    for number in range(PACKET_MESSAGES_MAX):
        assert not draft.full
        draft.add_message(Return(LoanId("mx1", 7, number), 1))
    assert draft.full
    draft = Draft(HEAD)
    while not draft.full:
        draft.add_message(Offer((USER_HOUR, random.Random(1).randbytes(5_000).decode("latin1"))))
        draft.add_portion(Portion("mx1", 7, 0, 1, 0, Changes([USER_HOUR], ["x" * 500], [(1, 0, 0, 0, 1)])))
    assert PACKET_BYTES <= len(draft.finish()) < PACKET_BYTES + 20_000


def test_a_portion_of_the_longest_keys_fits() -> None:
    """Behind whatever just did not make the packet full; it was made of as many entries as a portion may have."""
    draft = Draft(HEAD)
    for number in range(PACKET_BYTES // 5_000):
        draft.add_message(Offer((USER_HOUR, str(number) + 5_000 * "x")))
    assert not draft.full
    keys = [chr(0x10000 + number) * KEY_CHARS_MAX for number in range(VIEW_PORTION_ENTRIES_MAX)]
    entries = [(1, 0, NUMBER_MAX - 1, at, NUMBER_MAX - 1) for at in range(len(keys))]
    draft.add_portion(Portion("mx1", 7, 0, 1, 0, Changes([USER_HOUR], keys, entries)))
    assert PACKET_BYTES_MAX * 3 // 4 < len(draft.finish()) < PACKET_BYTES_MAX


def test_usage_by_keys_that_are_too_long_is_not_passed_on() -> None:
    """But the others of the portion are, and it still says that nothing else has changed."""
    long = "x" * (KEY_CHARS_MAX + 1)
    draft = Draft(HEAD)
    entries = [(1, 0, 1, 0, 5), (1, 0, 1, 1, 6), (2, 0, 1, 2, 7), (3, 0, 1, 3, 8)]
    draft.add_portion(Portion("mx1", 7, 0, 4, 0, Changes([USER_HOUR], [long, "alice", long + "y", "bob"], entries)))
    [portion] = read_portions(parse(draft.finish()))
    assert (4, [(1, 0, 1, 1, 6), (3, 0, 1, 3, 8)]) == (portion.version, portion.changes.entries)
    assert "alice" == portion.changes.keys[1]


def test_a_long_handover_travels_in_parts() -> None:
    """Each fits into a packet, and any order and repetition of them gives the whole."""
    excess = tuple(Excess(LoanId("mx1", 7, at), (USER_HOUR, "k" * (at % 500)), at) for at in range(1_001))
    handover = Handover(3, excess, 60)
    spoken = split(handover)
    for part in spoken:
        assert isinstance(part, HandoverPart)
        assert len(part.excess) <= HANDOVER_PART_LOANS_MAX
        draft = Draft(HEAD)
        draft.add_message(part)
        assert draft.full
        assert [part] == read_messages(parse(draft.finish()))
    joined = [Parts().add(part) for part in spoken if isinstance(part, HandoverPart)]
    assert [None] * len(spoken) == joined
    several = [part for part in spoken * 2 if isinstance(part, HandoverPart)]
    random.Random(1).shuffle(several)
    parts = Parts()
    assert handover in [parts.add(part) for part in several]


def test_a_short_handover_is_one_message() -> None:
    """Also an empty one."""
    excess = tuple(Excess(LoanId("mx1", 7, at), ALICE, at) for at in range(HANDOVER_PART_LOANS_MAX))
    for handover in (Handover(3, ()), Handover(3, excess)):
        assert [handover] == split(handover)


def test_parts_of_another_handover_are_not_mixed_in() -> None:
    """A later generation takes the place of an earlier one, and one that was divided differently begins anew."""
    first, second = (Excess(LoanId("mx1", 7, number), ALICE, number) for number in (1, 2))
    parts = Parts()
    assert None is parts.add(HandoverPart(3, -1, 0, 2, (first,)))
    assert None is parts.add(HandoverPart(4, -1, 1, 2, (second,)))
    assert None is parts.add(HandoverPart(3, -1, 1, 2, (second,)))
    assert Handover(4, (first, second)) == parts.add(HandoverPart(4, -1, 0, 2, (first,)))
    assert None is parts.add(HandoverPart(4, -1, 0, 3, (first,)))
    assert None is parts.add(HandoverPart(4, -1, 1, 2, (second,)))
