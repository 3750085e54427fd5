"""Records about rights: what is stored is what is found again, and damage is noticed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postmeter.core.effects import Excess, Handover, LoanId, Place, Record
from postmeter.core.meters import MetersId
from postmeter.errors import StorageError
from postmeter.records import read_place, read_record, write_place, write_record
from tests.unit.cluster_strategies import places, records


@given(records)
def test_a_record_is_found_again(record: Record) -> None:
    """Of every kind."""
    assert record == read_record(write_record(record))


def test_a_handover_is_one_record_however_long() -> None:
    """It is divided only to be sent."""
    meter = (MetersId("per-user", "sasl_username", "recipients", 3_600_000), "alice@example.com")
    handover = Handover(3, tuple(Excess(LoanId("mx1", 7, number), meter, number) for number in range(10_000)))
    assert handover == read_record(write_record(handover))


@given(places)
def test_a_place_is_found_again(place: Place) -> None:
    """Of every kind, limits of any name included; and no two are written alike."""
    assert place == read_place(write_place(place))


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (LoanId("mx1", 7, 42), "loan/mx1/7/42"),
        (("mx2", 3), "handover/mx2/3"),
        (("before", MetersId("a", "b", "c", 5), None), 'before/["a", "b", "c", 5, null]'),
        (("before", MetersId("a", "b", "c", 5), "k"), 'before/["a", "b", "c", 5, "k"]'),
        ("standing", "standing"),
    ],
)
def test_places_can_be_read(place: Place, expected: str) -> None:
    """By somebody who looks into the database."""
    assert expected == write_place(place)


@given(st.binary())
def test_garbage_is_no_record(data: bytes) -> None:
    """And says so."""
    with pytest.raises(StorageError, match="a record about rights is damaged: "):
        read_record(b"\x7f" + data)


@pytest.mark.parametrize("text", ["loan/mx1/7", "loan/mx1/7/x", "handover/mx1", "before/{", "before/[1]"])
def test_garbage_is_no_place(text: str) -> None:
    """And says so."""
    with pytest.raises(StorageError, match="is no place of a record about rights"):
        read_place(text)
