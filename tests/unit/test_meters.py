"""Sliding windows, against a dumb twin that keeps every single charge."""

from __future__ import annotations

import gc

from hypothesis import given, settings
from hypothesis import strategies as st

from postmeter.core.meters import (
    OVERFLOW_KEY,
    OVERFLOW_ROW,
    PLACES,
    UNLIMITED,
    Batch,
    Keys,
    Ledger,
    Meters,
    MetersId,
    unflushed_max,
)
from postmeter.defaults import SLICES_PER_WINDOW

WINDOW_MS = 60_000
SLICE_MS = WINDOW_MS // SLICES_PER_WINDOW
ID = MetersId("per-user", "sasl_username", "recipients", WINDOW_MS)


def open_meters(max: int = 100, overrides: dict[str, int] | None = None, ledger: Ledger | None = None) -> Meters:
    """Meters of one minute."""
    meters = (ledger or Ledger()).open(ID)
    meters.set_max(max, overrides or {})
    return meters


def charge(meters: Meters, key: str, amount: int, now_ms: int) -> int:
    """Charge as the policy does; returns the row."""
    row = meters.keys.row(key)
    if row is None:
        row = meters.keys.open(key)
    meters.advance(now_ms)
    if amount == 1:
        meters.used[row] += 1
        meters.unflushed[row % PLACES] += 1
        meters.ones.append(row)
    else:
        meters.charge(row, key, amount)
    return row


def told(batches: list[Batch]) -> list[tuple[int, dict[int, int]]]:
    """The slices and amounts of batches."""
    return [(batch.slice, {row: batch.amount(row) for row in batch.rows}) for batch in batches]


def used(meters: Meters, key: str, now_ms: int) -> int:
    """Used within the window."""
    return meters.usage(meters.keys.row(key), now_ms)


class Twin:
    """Every charge with its time; the sum of those whose slice has not ended a window ago."""

    def __init__(self) -> None:
        self.charges: list[tuple[int, str, int]] = []

    def usage(self, key: str, now_ms: int, window_ms: int, slice_ms: int) -> int:
        """By the definition in the design."""
        return sum(
            amount
            for at_ms, who, amount in self.charges
            if who == key and (at_ms // slice_ms + 1) * slice_ms + window_ms > now_ms
        )


steps = st.lists(
    st.tuples(
        st.sampled_from(["charge", "charge", "charge", "expire", "flush", "reset", "refund"]),
        st.sampled_from(["alice", "bob", "carol"]),
        st.one_of(st.just(1), st.integers(1, 50)),
        st.one_of(st.integers(0, 300), st.integers(0, 3 * 60_000)),
    ),
    max_size=60,
)


@given(steps, st.sampled_from([1_000, 1_999, 60_000, 3_600_000]), st.integers(0, 10**12))
@settings(max_examples=400, deadline=None)
def test_usage_equals_the_twin(steps: list[tuple[str, str, int, int]], window_ms: int, start_ms: int) -> None:
    """Whatever is charged, expired, stored, taken back and forgotten: usage is that of the twin, for every key."""
    ledger, twin, now_ms = Ledger(), Twin(), start_ms
    meters = ledger.open(MetersId("l", "k", "messages", window_ms))
    meters.set_max(10**9, {})
    for what, key, amount, passed_ms in steps:
        now_ms += passed_ms
        row = meters.keys.row(key)
        if what == "charge":
            charge(meters, key, amount, now_ms)
            twin.charges.append((now_ms, key, amount))
        elif what == "expire":
            ledger.expire(now_ms, amount)
        elif what == "flush":
            meters.flushed(meters.take_unflushed())
        elif what == "reset" and row is not None:
            meters.reset(row)
            twin.charges = [charge for charge in twin.charges if charge[1] != key]
        elif what == "refund" and twin.charges:
            at_ms, who, last = twin.charges.pop()
            refunded = meters.keys.row(who)
            if refunded is not None:
                meters.refund(refunded, who, at_ms // meters.slice_ms, last)
        for who in ("alice", "bob", "carol"):
            assert twin.usage(who, now_ms, window_ms, meters.slice_ms) == used(meters, who, now_ms)
    for row in meters.keys.rows.values():
        most = meters.unflushed[row % PLACES] + meters.waiting_max
        assert meters.pending(row) <= most
        slices = meters.slices(row, now_ms)
        assert [amount for _, amount in slices] == [sum(meters.sums(number, [row])) for number, _ in slices]
        assert sum(amount for _, amount in slices) == meters.used[row]


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 90_000)), min_size=1), st.integers(1, 120))
@settings(max_examples=200, deadline=None)
def test_wait_is_the_first_moment_that_fits(charges: list[tuple[int, int]], amount: int) -> None:
    """After `wait_ms` the amount fits, and one millisecond earlier it does not."""
    meters, now_ms = open_meters(max=100), 10**6
    for part, passed_ms in charges:
        now_ms += passed_ms
        if used(meters, "alice", now_ms) + part <= 100:
            charge(meters, "alice", part, now_ms)
    row = meters.keys.row("alice")
    wait_ms = meters.wait_ms("alice", row, amount, now_ms)
    if amount > 100:
        assert wait_ms is None
    elif wait_ms == 0:
        assert used(meters, "alice", now_ms) + amount <= 100
    else:
        assert wait_ms is not None
        assert used(meters, "alice", now_ms + wait_ms - 1) + amount > 100
        assert used(meters, "alice", now_ms + wait_ms) + amount <= 100


def test_a_slice_counts_until_its_end_is_one_window_old() -> None:
    """The strict side: a charge at the beginning of a slice counts for a window and a slice."""
    meters = open_meters()
    charge(meters, "alice", 5, 10 * SLICE_MS)
    assert used(meters, "alice", 11 * SLICE_MS + WINDOW_MS - 1) == 5
    assert used(meters, "alice", 11 * SLICE_MS + WINDOW_MS) == 0


def test_an_idle_meter_costs_nothing() -> None:
    """A window after the last charge the key, its row and its amounts are gone, and the row is used again."""
    ledger = Ledger()
    meters = open_meters(ledger=ledger)
    row = charge(meters, "alice", 5, 0)
    meters.flushed(meters.take_unflushed())
    assert not ledger.expire(WINDOW_MS + SLICE_MS, 1000)
    assert {} == meters.keys.rows
    assert [] == meters.take_unflushed()
    assert row == charge(meters, "bob", 1, WINDOW_MS + SLICE_MS)


def test_a_row_is_kept_while_other_meters_use_it() -> None:
    """Meters with the same key share rows; one of them running out does not take the row from the other."""
    ledger = Ledger()
    short = open_meters(ledger=ledger)
    long = ledger.open(ID._replace(window_ms=10 * WINDOW_MS))
    row = charge(short, "alice", 5, 0)
    assert row == charge(long, "alice", 5, 0)
    ledger.expire(2 * WINDOW_MS, 1000)
    assert (0, 5) == (used(short, "alice", 2 * WINDOW_MS), used(long, "alice", 2 * WINDOW_MS))
    assert row == short.keys.row("alice")


def test_expiry_is_done_in_portions_and_questions_are_exact_meanwhile() -> None:
    """With thousands of entries run out and a few subtracted, a key that is asked for shows its true usage."""
    ledger = Ledger()
    meters = open_meters(ledger=ledger)
    for number in range(1000):
        charge(meters, f"user{number}", 1, 0)
    assert ledger.expire(2 * WINDOW_MS, 10)
    assert 990 == len(meters.keys.rows)
    assert 0 == used(meters, "user7", 2 * WINDOW_MS)


def test_beyond_the_maximum_new_keys_share_one_meter() -> None:
    """An attacker who invents keys fills one meter, not the memory; known keys are counted as before."""
    ledger = Ledger(keys_max=2)
    meters = open_meters(ledger=ledger)
    for name in ("alice", "bob", "mallory1", "mallory2", "alice"):
        charge(meters, name, 1, 0)
    assert OVERFLOW_ROW == meters.keys.row("mallory3")
    assert OVERFLOW_KEY == meters.keys.names[OVERFLOW_ROW]
    assert 2 == meters.usage(OVERFLOW_ROW, 0)
    assert 2 == used(meters, "alice", 0)


def test_overrides_and_tolls_change_the_allowance() -> None:
    """An override replaces max; an unclean stop costs what may have been lost, of the key's own max, for one window."""
    meters = open_meters(max=100, overrides={"big": 1000, "boss": UNLIMITED, "evil": 0})
    meters.set_tolls([0])
    assert [95, 950, UNLIMITED - UNLIMITED // 20, 0] == [
        meters.allowance(key, 0) for key in ("alice", "big", "boss", "evil")
    ]
    assert 100 == meters.allowance("alice", WINDOW_MS + SLICE_MS)


def test_what_is_not_on_disk_is_bounded() -> None:
    """Up to 5 % of max, and at least one, may be answered before it is stored; what is being stored counts, too."""
    assert [0, 1, 1, 1, 2, 50] == [unflushed_max(max) for max in (0, 1, 20, 39, 40, 1000)]
    meters = open_meters(max=40)
    row = charge(meters, "alice", 2, 0)
    assert not meters.must_wait("alice", row)
    taken = meters.take_unflushed()
    charge(meters, "alice", 1, 0)
    assert meters.must_wait("alice", row)
    meters.flushed(taken)
    assert not meters.must_wait("alice", row)


def test_an_unwritten_slice_is_offered_again() -> None:
    """What could not be stored is in the next batch, with the sum of its slice, also when the slice has ended."""
    meters = open_meters()
    row = charge(meters, "alice", 2, 0)
    assert [(0, {row: 2})] == told(meters.take_unflushed())
    charge(meters, "alice", 3, 0)
    charge(meters, "alice", 4, SLICE_MS)
    taken = meters.take_unflushed()
    assert [(0, {row: 2}), (0, {row: 3}), (1, {row: 4})] == told(taken)
    assert [5, 0] == meters.sums(0, [row, 99])
    meters.flushed(taken)
    assert [] == meters.take_unflushed()


def test_another_window_begins_with_what_is_known() -> None:
    """A limit whose window is changed keeps its counts, and never forgets one earlier than before."""
    ledger = Ledger()
    minute = open_meters(ledger=ledger)
    charge(minute, "alice", 5, 30_000)
    longer = ledger.open(ID._replace(window_ms=10 * WINDOW_MS))
    assert [ID] == ledger.retain({longer.id})
    assert 5 == used(longer, "alice", 30_000)
    assert 5 == used(longer, "alice", 30_000 + 10 * WINDOW_MS)
    assert [(3, {1: 5})] == told(longer.take_unflushed())


def test_the_garbage_collector_has_nothing_to_visit() -> None:
    """The containers that grow with the number of keys are not tracked, so a full collection stays short."""
    meters = Meters(ID, Keys(10_000))
    for number in range(1000):
        charge(meters, f"user{number}", 1, 0)
    gc.collect()
    assert [False, False, False] == [gc.is_tracked(it) for it in (meters.keys.rows, meters.current, meters.fresh)]
