"""What must not be forgotten about rights, as the storage keeps it: records and their places of core/effects.py.

write_record(record), read_record(data)    protobuf (Record in peers.proto), complete in itself
write_place(place), read_place(text)       where it lies, as text for a look into the database: loan/mx1/7/42
"""

from __future__ import annotations

import json

from google.protobuf.message import DecodeError

from postmeter.core.effects import Before, Borrowed, Handover, Lent, LoanId, Place, Record, Standing
from postmeter.core.meters import MetersId
from postmeter.errors import PeerError, StorageError
from postmeter.messages import (
    TablesReader,
    TablesWriter,
    read_excess,
    read_loan,
    write_handover,
    write_loan,
)
from postmeter.v1 import peers_pb2 as pb


def write_record(record: Record) -> bytes:
    """A record for the disk."""
    written = pb.Record()
    tables = TablesWriter(written.tables)
    match record:
        case Lent(loan, (id, key), amount, back_ms, returned):
            lent = pb.Lent(loan=write_loan(loan, tables), meters=tables.meters(id), key=tables.key(key))
            lent.amount, lent.back_ms, lent.returned = amount, back_ms, returned
            written.lent.CopyFrom(lent)
        case Borrowed():
            written.borrowed.CopyFrom(_write_borrowed(record, tables))
        case Handover():
            written.handover.CopyFrom(write_handover(record, tables))
        case Before(id, key, until_ms, max):
            place = None if key is None else tables.key(key)
            written.before.CopyFrom(pb.Before(meters=tables.meters(id), until_ms=until_ms, max=max, key=place))
        case Standing():
            written.standing.CopyFrom(_write_standing(record))
    return written.SerializeToString()


def read_record(data: bytes) -> Record:
    """A record of the disk. Raises StorageError."""
    try:
        return _read_record(pb.Record.FromString(data))
    except DecodeError:
        raise StorageError("a record about rights is damaged: it is not protobuf") from None
    except PeerError as error:
        raise StorageError(f"a record about rights is damaged: {error}") from None


def _read_record(record: pb.Record) -> Record:
    tables = TablesReader(record.tables)
    match record.WhichOneof("kind"):
        case "lent":
            lent = record.lent
            meter = tables.meter(lent.meters, lent.key)
            return Lent(read_loan(lent.loan, tables), meter, lent.amount, lent.back_ms, lent.returned)
        case "borrowed":
            return _read_borrowed(record.borrowed, tables)
        case "handover":
            generation, unclean_ms, excess = read_excess(record.handover, tables)
            return Handover(generation, excess, unclean_ms)
        case "before":
            before = record.before
            if not before.HasField("key"):
                return Before(tables.id(before.meters), None, before.until_ms, before.max)
            id, key = tables.meter(before.meters, before.key)
            return Before(id, key, before.until_ms, before.max)
        case "standing":
            return _read_standing(record.standing)
        case _:
            raise PeerError("its kind is not known to this version")


def _write_borrowed(loan: Borrowed, tables: TablesWriter) -> pb.Borrowed:
    id, key = loan.meter
    return pb.Borrowed(
        meters=tables.meters(id),
        key=tables.key(key),
        lender=loan.lender,
        amount=loan.amount,
        asked_ms=loan.asked_ms,
        lifetime_ms=loan.lifetime_ms,
        returned=loan.returned,
        acknowledged=loan.acknowledged,
        generation=loan.generation,
        accepted=loan.accepted,
        covers=loan.covers or {},
    )


def _read_borrowed(loan: pb.Borrowed, tables: TablesReader) -> Borrowed:
    return Borrowed(
        tables.meter(loan.meters, loan.key),
        loan.lender,
        loan.amount,
        loan.asked_ms,
        loan.lifetime_ms,
        loan.returned,
        loan.acknowledged,
        loan.generation,
        loan.accepted,
        dict(loan.covers),
    )


def _write_standing(standing: Standing) -> pb.Standing:
    return pb.Standing(
        node=standing.node,
        generations=[pb.Generation(number=number, members=members) for number, members in standing.generations],
        born=standing.born,
        handed=[pb.NodeNumber(node=node, number=number) for node, number in standing.handed],
        stopped=[pb.NodeNumber(node=node, number=number) for node, number in standing.stopped],
        lingers=[pb.NodeNumber(node=node, number=number) for node, number in standing.lingers],
        unclean_ms=standing.unclean_ms,
    )


def _read_standing(standing: pb.Standing) -> Standing:
    return Standing(
        standing.node,
        tuple((each.number, tuple(each.members)) for each in standing.generations),
        standing.born,
        tuple((each.node, each.number) for each in standing.handed),
        tuple((each.node, each.number) for each in standing.stopped),
        tuple((each.node, each.number) for each in standing.lingers),
        standing.unclean_ms if standing.HasField("unclean_ms") else None,
    )


def write_place(place: Place) -> str:
    """A place as text."""
    match place:
        case str():
            return place
        case LoanId():
            return f"loan/{place.borrower}/{place.incarnation}/{place.number}"
        case (str(kind), MetersId() as id, key):
            return f"{kind}/{json.dumps([*id, key])}"
        case (str(receiver), generation):
            return f"handover/{receiver}/{generation}"
    raise AssertionError(place)


def read_place(text: str) -> Place:
    """A place of `write_place`. Raises StorageError."""
    kind, *words = text.split("/")
    try:
        if kind == "loan":
            borrower, incarnation, count = words
            return LoanId(borrower, int(incarnation), int(count))
        if kind == "handover":
            receiver, generation = words
            return receiver, int(generation)
        if kind == "before":
            *id, key = json.loads(text.partition("/")[2])
            return kind, MetersId(*id), key
    except (ValueError, TypeError):
        raise StorageError(f"{text[:64]!r} is no place of a record about rights") from None
    return text
