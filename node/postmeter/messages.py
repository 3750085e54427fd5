"""Messages about rights as protobuf: core/effects.py on one side, proto/postmeter/v1/peers.proto on the other.

    write_message(message, tables)    a message for a packet, which has the tables
    read_message(message, tables)     the other way; None for a kind that this version does not know
    split(message)                    the parts in which a long handover travels; Parts puts them together again

What comes from another node is checked here, so that the core need not: places within their tables, columns of equal
length, numbers below NUMBER_MAX, names that a node may have, nothing longer than its maximum. PeerError says what is
wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from postmeter.core.effects import (
    Accepted,
    Answer,
    Ask,
    Excess,
    Handover,
    LoanId,
    Message,
    Meter,
    Offer,
    Return,
    Returned,
)
from postmeter.core.identity import is_node_name
from postmeter.core.meters import MetersId
from postmeter.defaults import (
    HANDOVER_PART_CHARS,
    HANDOVER_PART_LOANS_MAX,
    HANDOVER_PARTS_MAX,
    MERGED_MAX,
    METERS_NAME_CHARS_MAX,
    PEER_KEY_BYTES_MAX,
)
from postmeter.errors import PeerError
from postmeter.v1 import peers_pb2 as pb

T = TypeVar("T")

# Sums of two fit into the 64 bits in which numbers are kept.
NUMBER_MAX = 1 << 62


@dataclass(frozen=True, slots=True)
class HandoverPart:
    """Some of the loans of a handover: part number `part`, from 0, of `parts`."""

    generation: int
    unclean_ms: int
    part: int
    parts: int
    excess: tuple[Excess, ...]


Spoken = Message | HandoverPart
"""What travels as one message."""


# --- tables -----------------------------------------------------------------------------------------------------------


class TablesWriter:
    """Puts what is named more than once into tables. `bytes_count` is about what they take."""

    def __init__(self, tables: pb.Tables) -> None:
        self._tables = tables
        self._nodes: dict[str, int] = {}
        self._meters: dict[MetersId, int] = {}
        self._keys: dict[str, int] = {}
        self.bytes_count = 0

    def node(self, name: str) -> int:
        """The place of a node."""
        place = self._nodes.get(name)
        if place is None:
            place = self._nodes[name] = len(self._nodes)
            self._tables.nodes.append(name)
            self.bytes_count += len(name) + 2
        return place

    def meters(self, id: MetersId) -> int:
        """The place of meters."""
        place = self._meters.get(id)
        if place is None:
            place = self._meters[id] = len(self._meters)
            written = write_meters(id)
            self._tables.meters.append(written)
            self.bytes_count += written.ByteSize() + 3
        return place

    def key(self, key: str) -> int:
        """The place of a key."""
        place = self._keys.get(key)
        if place is None:
            place = self._keys[key] = len(self._keys)
            written = write_key(key)
            self._tables.keys.append(written)
            self.bytes_count += len(written) + 3
        return place


class TablesReader:
    """What the places in a packet, portion or record refer to, checked."""

    def __init__(self, tables: pb.Tables) -> None:
        self.nodes = [read_node(name) for name in tables.nodes]
        self.meters = [_read_meters(meters) for meters in tables.meters]
        self.keys = _read_keys(list(tables.keys))

    def node(self, place: int) -> str:
        """The node at a place."""
        return _at(self.nodes, place, "nodes")

    def id(self, place: int) -> MetersId:
        """The meters at a place."""
        return _at(self.meters, place, "meters")

    def meter(self, meters: int, key: int) -> Meter:
        """The meter of meters and key at two places."""
        return self.id(meters), _at(self.keys, key, "keys")


def write_meters(id: MetersId) -> pb.MetersId:
    """Meters by their names."""
    return pb.MetersId(limit=id.limit, key=id.key, count=id.unit, window_ms=id.window_ms)


def write_key(key: str) -> bytes:
    """A key as Postfix sent it."""
    return key.encode("utf-8", "surrogateescape")


def read_node(name: str) -> str:
    """A node's name, checked."""
    if not is_node_name(name):
        raise PeerError(f"{name[:64]!r} is no name of a node")
    return name


def _read_meters(meters: pb.MetersId) -> MetersId:
    for name, text in (("limit", meters.limit), ("key", meters.key), ("count", meters.count)):
        if not 0 < len(text) <= METERS_NAME_CHARS_MAX:
            raise PeerError(f"the {name} of meters has {len(text)} characters, not 1 to {METERS_NAME_CHARS_MAX}")
    if not meters.window_ms:
        raise PeerError("a window has no length")
    return MetersId(meters.limit, meters.key, meters.count, number(meters.window_ms, "the length of a window"))


def _read_keys(keys: list[bytes]) -> list[str]:
    longest = max(map(len, keys), default=0)
    if longest > PEER_KEY_BYTES_MAX:
        raise PeerError(f"a key has {longest} bytes, more than {PEER_KEY_BYTES_MAX}")
    return [key.decode("utf-8", "surrogateescape") for key in keys]


def _at(table: Sequence[T], place: int, name: str) -> T:
    if place >= len(table):
        raise PeerError(f"place {place} is not in the table of {len(table)} {name}")
    return table[place]


def number(value: int, what: str) -> int:
    """A number, checked."""
    if not 0 <= value < NUMBER_MAX:
        raise PeerError(f"{what} is {value}, not 0 to 2^62")
    return value


def column(values: Sequence[int], length: int, below: int, what: str) -> list[int]:
    """A column, checked: so many numbers, each below a maximum."""
    if len(values) != length:
        raise PeerError(f"there are {len(values)} {what} beside {length} others")
    # A list is read twice in less time than protobuf's own sequence once.
    found = list(values)
    most = max(found, default=-1)
    if most >= below:
        raise PeerError(f"one of the {what} is {most}, which should be below {below}")
    return found


# --- messages ---------------------------------------------------------------------------------------------------------


def write_message(message: Spoken, tables: TablesWriter) -> pb.RightsMessage:
    """A message for a packet. A Handover must be short: see `split`."""
    match message:
        case Ask(loan, (id, key)):
            ask = pb.Ask(
                loan=write_loan(loan, tables),
                meters=tables.meters(id),
                key=tables.key(key),
                amount=message.amount,
                urgent=message.urgent,
                asked_ms=message.asked_ms,
                lifetime_ms=message.lifetime_ms,
                instead=[write_loan(earlier, tables) for earlier in message.instead],
            )
            return pb.RightsMessage(ask=ask)
        case Answer(loan, amount, asked_ms, wait_ms, again):
            places = [tables.node(node) for node in again]
            lent = pb.Answer(
                loan=write_loan(loan, tables), amount=amount, asked_ms=asked_ms, wait_ms=wait_ms, again=places
            )
            return pb.RightsMessage(answer=lent)
        case Offer((id, key)):
            return pb.RightsMessage(offer=pb.Offer(meters=tables.meters(id), key=tables.key(key)))
        case Return(loan, returned):
            return pb.RightsMessage(back=pb.Return(loan=write_loan(loan, tables), returned=returned))
        case Returned(loan, returned):
            return pb.RightsMessage(returned=pb.Returned(loan=write_loan(loan, tables), returned=returned))
        case Handover() | HandoverPart():
            return pb.RightsMessage(handover=write_handover(message, tables))
        case Accepted(generation):
            return pb.RightsMessage(accepted=pb.Accepted(generation=generation))


def read_message(message: pb.RightsMessage, tables: TablesReader) -> Spoken | None:
    """A message of a packet; None if its kind is not known. Raises PeerError."""
    kind = message.WhichOneof("kind")
    return _READERS[kind](getattr(message, kind), tables) if kind else None


def _read_ask(ask: pb.Ask, tables: TablesReader) -> Ask:
    loan, meter = read_loan(ask.loan, tables), tables.meter(ask.meters, ask.key)
    asked_ms, lifetime_ms = number(ask.asked_ms, "a time"), number(ask.lifetime_ms, "a time")
    if len(ask.instead) > MERGED_MAX:
        raise PeerError(f"an Ask names {len(ask.instead)} earlier loans, which is more than {MERGED_MAX}")
    instead = tuple(read_loan(earlier, tables) for earlier in ask.instead)
    return Ask(loan, meter, number(ask.amount, "an amount"), ask.urgent, asked_ms, lifetime_ms, instead)


def _read_answer(answer: pb.Answer, tables: TablesReader) -> Answer:
    again = tuple(tables.node(place) for place in answer.again)
    return Answer(
        read_loan(answer.loan, tables),
        number(answer.amount, "an amount"),
        number(answer.asked_ms, "a time"),
        number(answer.wait_ms, "a time"),
        again,
    )


def _read_offer(offer: pb.Offer, tables: TablesReader) -> Offer:
    return Offer(tables.meter(offer.meters, offer.key))


def _read_return(back: pb.Return, tables: TablesReader) -> Return:
    return Return(read_loan(back.loan, tables), number(back.returned, "an amount"))


def _read_returned(returned: pb.Returned, tables: TablesReader) -> Returned:
    return Returned(read_loan(returned.loan, tables), number(returned.returned, "an amount"))


def _read_accepted(accepted: pb.Accepted, tables: TablesReader) -> Accepted:
    return Accepted(number(accepted.generation, "a generation"))


def write_loan(loan: LoanId, tables: TablesWriter) -> pb.LoanId:
    """The name of a loan."""
    return pb.LoanId(borrower=tables.node(loan.borrower), incarnation=loan.incarnation, number=loan.number)


def read_loan(loan: pb.LoanId, tables: TablesReader) -> LoanId:
    """The name of a loan, checked."""
    incarnation = number(loan.incarnation, "an incarnation")
    return LoanId(tables.node(loan.borrower), incarnation, number(loan.number, "the number of a loan"))


# --- handovers --------------------------------------------------------------------------------------------------------


def split(message: Message) -> list[Spoken]:
    """As what a message travels: itself, or the parts of a long handover."""
    if not isinstance(message, Handover):
        return [message]
    starts, length, size = [0], 0, 0
    for place, each in enumerate(message.excess):
        if length >= HANDOVER_PART_LOANS_MAX or size >= HANDOVER_PART_CHARS:
            starts.append(place)
            length = size = 0
        length += 1
        size += len(each.meter[1])
    if len(starts) == 1:
        return [message]
    generation, unclean_ms, excess = message.generation, message.unclean_ms, message.excess
    return [
        HandoverPart(generation, unclean_ms, part, len(starts), excess[start:end])
        for part, (start, end) in enumerate(pairwise([*starts, len(excess)]))
    ]


class Parts:
    """Puts a node's handovers together: one at a time, the newest generation."""

    def __init__(self) -> None:
        self._whole = (0, 0, 0)
        self._parts: dict[int, tuple[Excess, ...]] = {}

    def add(self, part: HandoverPart) -> Handover | None:
        """The handover, if it is whole with this part. Parts may come in any order, and several times."""
        whole = (part.generation, part.parts, part.unclean_ms)
        if part.generation < self._whole[0]:
            return None
        if whole != self._whole:
            self._whole, self._parts = whole, {}
        self._parts[part.part] = part.excess
        if len(self._parts) < part.parts:
            return None
        excess = tuple(loan for _, loans in sorted(self._parts.items()) for loan in loans)
        self._parts = {}
        return Handover(part.generation, excess, part.unclean_ms)


def write_handover(handover: Handover | HandoverPart, tables: TablesWriter) -> pb.Handover:
    """A handover of any length."""
    excess = handover.excess
    written = pb.Handover(
        generation=handover.generation,
        borrowers=[tables.node(each.loan.borrower) for each in excess],
        incarnations=[each.loan.incarnation for each in excess],
        numbers=[each.loan.number for each in excess],
        meters=[tables.meters(each.meter[0]) for each in excess],
        keys=[tables.key(each.meter[1]) for each in excess],
        amounts=[each.amount for each in excess],
    )
    if handover.unclean_ms >= 0:
        written.unclean_ms = handover.unclean_ms
    if isinstance(handover, HandoverPart):
        written.part, written.parts = handover.part, handover.parts
    return written


def _read_handover(handover: pb.Handover, tables: TablesReader) -> Spoken:
    """At most HANDOVER_PART_LOANS_MAX loans."""
    if len(handover.numbers) > HANDOVER_PART_LOANS_MAX:
        raise PeerError(
            f"a handover has {len(handover.numbers)} loans, more than {HANDOVER_PART_LOANS_MAX} in one part"
        )
    if handover.parts > HANDOVER_PARTS_MAX or handover.part >= max(1, handover.parts):
        raise PeerError(f"a handover has part {handover.part} of {handover.parts}")
    generation, unclean_ms, excess = read_excess(handover, tables)
    if handover.parts > 1:
        return HandoverPart(generation, unclean_ms, handover.part, handover.parts, excess)
    return Handover(generation, excess, unclean_ms)


def read_excess(handover: pb.Handover, tables: TablesReader) -> tuple[int, int, tuple[Excess, ...]]:
    """Generation, time since the unclean stop, and loans of a handover of any length, checked."""
    unclean_ms = number(handover.unclean_ms, "a time") if handover.HasField("unclean_ms") else -1
    length = len(handover.numbers)
    rows = zip(
        column(handover.borrowers, length, len(tables.nodes), "borrowers"),
        column(handover.incarnations, length, NUMBER_MAX, "incarnations"),
        column(handover.numbers, length, NUMBER_MAX, "numbers of loans"),
        column(handover.meters, length, len(tables.meters), "places of meters"),
        column(handover.keys, length, len(tables.keys), "places of keys"),
        column(handover.amounts, length, NUMBER_MAX, "amounts"),
        strict=True,
    )
    nodes, meters, keys = tables.nodes, tables.meters, tables.keys
    excess = tuple(
        Excess(LoanId(nodes[borrower], incarnation, count), (meters[id], keys[key]), amount)
        for borrower, incarnation, count, id, key, amount in rows
    )
    return number(handover.generation, "a generation"), unclean_ms, excess


_READERS: dict[str, Callable[..., Spoken]] = {
    "ask": _read_ask,
    "answer": _read_answer,
    "offer": _read_offer,
    "back": _read_return,
    "returned": _read_returned,
    "handover": _read_handover,
    "accepted": _read_accepted,
}
