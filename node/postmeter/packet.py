"""What one node says to another at once: a head and contents, as bytes of Packet in proto/postmeter/v1/peers.proto.

    draft = Draft(head)           to be filled with add_message, add_digest, add_portion, until it is `full`
    data = draft.finish()
    packet = parse(data)          raises PeerError
    read_head(packet)             who speaks to whom, and in which versions; the rest may be beyond this one's
    read_messages(packet), read_digest(packet), read_portions(packet), packet.more

Reading is checked as in messages.py. It is done in steps of 0.5 ms or less, so that the caller can let others run in
between: messages are few, and portions come one at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from google.protobuf.message import DecodeError

from postmeter.core.effects import Message
from postmeter.core.view import Changes, Digest, Known, Portion
from postmeter.defaults import (
    HANDOVER_PART_LOANS_MAX,
    KEY_CHARS_MAX,
    PACKET_BYTES,
    PACKET_MESSAGES_MAX,
    VIEW_NODES_MAX,
    VIEW_PORTION_ENTRIES_MAX,
    VIEW_TOLD_MAX,
)
from postmeter.errors import PeerError
from postmeter.messages import (
    NUMBER_MAX,
    HandoverPart,
    Spoken,
    TablesReader,
    TablesWriter,
    column,
    number,
    read_message,
    read_node,
    write_key,
    write_message,
    write_meters,
)
from postmeter.v1 import peers_pb2 as pb

# Raised when something is said that an older agent would misunderstand.
PROTOCOL_OLDEST = 1
PROTOCOL_NEWEST = 1
# A version is shown, and not more than that of it.
TEXT_CHARS_MAX = 100


@dataclass(slots=True)
class Contents:
    """What is said: messages about rights, what is known of everybody's usage, and what the other lacks of that.

    `portions` is false if there are none; what is to be said may be gathered one at a time. `more`: there is more that
    the other lacks.
    """

    messages: list[Message] = field(default_factory=list)
    digest: Digest = field(default_factory=dict)
    portions: Iterable[Portion] = ()
    more: bool = False


@dataclass(frozen=True, slots=True)
class Head:
    """Who says something to whom. `wall_ms` is since 1970."""

    sender: str
    receiver: str
    incarnation: int
    version: str
    wall_ms: int
    protocol_oldest: int = PROTOCOL_OLDEST
    protocol_newest: int = PROTOCOL_NEWEST


class Draft:
    """A packet that is being filled."""

    def __init__(self, head: Head) -> None:
        self._packet = pb.Packet(
            sender=head.sender,
            receiver=head.receiver,
            incarnation=head.incarnation,
            protocol_oldest=head.protocol_oldest,
            protocol_newest=head.protocol_newest,
            version=head.version,
            wall_ms=head.wall_ms,
        )
        self._tables = TablesWriter(self._packet.tables)
        self._portions: list[bytes] = []
        self._bytes_count = 0
        self._messages_left = PACKET_MESSAGES_MAX

    @property
    def full(self) -> bool:
        """Whether no more messages or portions should be added."""
        return self._messages_left <= 0 or self._bytes_count + self._tables.bytes_count >= PACKET_BYTES

    def add_message(self, message: Spoken) -> None:
        """Say this, behind what was added before."""
        written = write_message(message, self._tables)
        self._packet.messages.append(written)
        self._bytes_count += written.ByteSize() + 3
        # A part of a handover takes as long as all that a packet may hold besides.
        self._messages_left -= PACKET_MESSAGES_MAX if isinstance(message, HandoverPart) else 1

    def add_digest(self, digest: Digest) -> None:
        """Say what is known."""
        written = self._packet.digest
        written.nodes.extend(digest)
        incarnations, versions, ages_ms = zip(*digest.values(), strict=True) if digest else ((), (), ())
        written.incarnations.extend(incarnations)
        written.versions.extend(versions)
        written.ages_ms.extend([0 if age_ms is None else age_ms + 1 for age_ms in ages_ms])
        self._bytes_count += written.ByteSize()

    def add_portion(self, portion: Portion) -> None:
        """Say what was used, but not by keys that are too long to be passed on."""
        head = pb.Portion(
            node=portion.node,
            incarnation=portion.incarnation,
            since=portion.since,
            version=portion.version,
            now_ms=portion.now_ms,
        )
        written = head.SerializeToString() + _written(portion.changes)
        self._portions.append(written)
        self._bytes_count += len(written) + 4

    def finish(self, more: bool = False) -> bytes:
        """The bytes; whether there is more to say."""
        self._packet.more = more
        return self._packet.SerializeToString() + pb.WrittenPortions(portions=self._portions).SerializeToString()


@lru_cache(maxsize=VIEW_TOLD_MAX)
def _written(changes: Changes) -> bytes:
    """As part of a Portion; of what is told to one peer most is told to all."""
    written = pb.Portion()
    written.tables.meters.extend(map(write_meters, changes.meters))
    entries, keys = changes.entries, changes.keys
    if any(len(key) > KEY_CHARS_MAX for key in keys):
        keys = [key if len(key) <= KEY_CHARS_MAX else "" for key in keys]
        entries = [entry for entry in entries if keys[entry[3]]]
    written.tables.keys.extend(map(write_key, keys))
    columns = (written.versions, written.meters, written.slices, written.keys, written.amounts)
    for empty, values in zip(columns, zip(*entries, strict=True), strict=False):
        empty.extend(values)
    return written.SerializeToString()


def parse(data: bytes) -> pb.Packet:
    """Bytes as protobuf. Raises PeerError."""
    try:
        return pb.Packet.FromString(data)
    except DecodeError:
        raise PeerError("this is not protobuf") from None


def read_head(packet: pb.Packet) -> Head:
    """Who says something to whom. Raises PeerError."""
    if len(packet.version) > TEXT_CHARS_MAX or not packet.version.isprintable():
        raise PeerError(f"the name of a version is not text of up to {TEXT_CHARS_MAX} characters")
    return Head(
        sender=read_node(packet.sender),
        receiver=read_node(packet.receiver),
        incarnation=number(packet.incarnation, "an incarnation"),
        version=packet.version,
        wall_ms=number(packet.wall_ms, "a time"),
        protocol_oldest=packet.protocol_oldest,
        protocol_newest=packet.protocol_newest,
    )


def read_messages(packet: pb.Packet) -> list[Spoken]:
    """Messages about rights, without those of unknown kinds. Raises PeerError."""
    count = len(packet.messages)
    if count > PACKET_MESSAGES_MAX:
        raise PeerError(f"there are {count} messages in a packet, more than {PACKET_MESSAGES_MAX}")
    tables = _read_tables(packet.tables, PACKET_MESSAGES_MAX + HANDOVER_PART_LOANS_MAX)
    messages = (read_message(message, tables) for message in packet.messages)
    return [message for message in messages if message is not None]


def _read_tables(tables: pb.Tables, length_max: int) -> TablesReader:
    longest = max(len(tables.meters), len(tables.keys))
    if longest > length_max or len(tables.nodes) > VIEW_NODES_MAX:
        raise PeerError(f"tables have {len(tables.nodes)} nodes and {longest} others, more than can be referred to")
    return TablesReader(tables)


def read_digest(packet: pb.Packet) -> Digest:
    """What the sender knows; {} if it does not say. Raises PeerError."""
    digest = packet.digest
    length = len(digest.nodes)
    if length > VIEW_NODES_MAX:
        raise PeerError(f"a digest has {length} nodes, more than {VIEW_NODES_MAX}")
    rows = zip(
        map(read_node, digest.nodes),
        column(digest.incarnations, length, NUMBER_MAX, "incarnations"),
        column(digest.versions, length, NUMBER_MAX, "versions"),
        column(digest.ages_ms, length, NUMBER_MAX, "ages"),
        strict=True,
    )
    return {
        node: Known(incarnation, version, age_ms - 1 if age_ms else None) for node, incarnation, version, age_ms in rows
    }


def read_portions(packet: pb.Packet) -> Iterator[Portion]:
    """What was used, one portion at a time. Raises PeerError, at any of them."""
    return map(_read_portion, packet.portions)


def _read_portion(portion: pb.Portion) -> Portion:
    length = len(portion.versions)
    if length > VIEW_PORTION_ENTRIES_MAX:
        raise PeerError(f"a portion has {length} entries, more than {VIEW_PORTION_ENTRIES_MAX}")
    tables = _read_tables(portion.tables, VIEW_PORTION_ENTRIES_MAX)
    since, version = number(portion.since, "a version"), number(portion.version, "a version")
    versions = column(portion.versions, length, version + 1, "versions")
    if since > version or (versions and versions[0] <= since) or versions != sorted(versions):
        raise PeerError(f"the versions of a portion do not ascend from {since} to {version}")
    rows = zip(
        versions,
        column(portion.meters, length, len(tables.meters), "places of meters"),
        column(portion.slices, length, NUMBER_MAX, "slices"),
        column(portion.keys, length, len(tables.keys), "places of keys"),
        column(portion.amounts, length, NUMBER_MAX, "amounts"),
        strict=True,
    )
    return Portion(
        read_node(portion.node),
        number(portion.incarnation, "an incarnation"),
        since,
        version,
        number(portion.now_ms, "a time"),
        Changes(tables.meters, tables.keys, list(rows)),
    )
