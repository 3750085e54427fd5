"""Usage in sliding windows: who has used how much, in columns that the garbage collector does not have to visit.

A *key* (alice@example.com) gets a row number while anybody counts it. `Meters` holds one window of one limit for all
keys: a column of sums by row, and for every slice of the window a dict of row -> amount. So a question is one look-up
and one comparison, a charge is an addition, and a slice that has become too old is taken away as a whole. `Ledger`
holds all meters of this node, and keeps them while the limits around them are changed.

Charges of one are only listed at first (`ones`), and counted together: that takes half the time.

A slice counts until its end is one window old. Slices that ran out are subtracted later and in portions (`expire`), and
at once for a row that is about to be refused (`settle`): until then the sum is too high, never too low.

Amounts that are not on disk yet are in `ones` and `fresh`, and then, in batches, in `waiting`. The caller writes what
`take_unflushed` returns and says so with `flushed`. What is written is the sum of a slice, not the difference, so
that writing it twice does no harm.

Times are milliseconds of one clock that never goes back. Rows are small integers, amounts are in the limit's unit.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from itertools import repeat
from typing import NamedTuple, cast

from postmeter.defaults import KEYS_MAX, SLICES_PER_WINDOW, UNFLUSHED_PART

OVERFLOW_ROW = 0
OVERFLOW_KEY = "(overflow)"
UNLIMITED = 1 << 60
PLACES = 1024
"""How many sums `unflushed` has; a row is in the one at `row % PLACES`."""

_NOTHING = array("q", bytes(8 * PLACES))
# Counter's own loop, on dicts: those the garbage collector does not visit.
_add_ones = cast("Callable[[dict[int, int], list[int]], None]", Counter.update)


class MetersId(NamedTuple):
    """What is counted; if one of these changes, it is another count. `key` and `unit` are the limit's key and count."""

    limit: str
    key: str
    unit: str
    window_ms: int


class Keys:
    """The rows of the keys of one kind (say, all `sasl_username`), shared by all meters that count by it."""

    __slots__ = ("_free", "meters", "names", "renamed", "rows", "rows_max")

    def __init__(self, rows_max: int) -> None:
        self.rows: dict[str, int] = {}
        self.names: list[str | None] = [OVERFLOW_KEY]
        self.renamed: dict[int, str | None] = {}
        self.rows_max = rows_max
        self.meters: list[Meters] = []
        self._free = array("q")

    @property
    def full(self) -> bool:
        """Whether there is no row left for a new key."""
        return len(self.rows) >= self.rows_max

    def row(self, key: str) -> int | None:
        """The key's row; None if nobody has charged it; the overflow row for a new key when there is no more room."""
        row = self.rows.get(key)
        if row is None and self.full:
            return OVERFLOW_ROW
        return row

    def open(self, key: str) -> int:
        """The key's row; a new one if it has none; the overflow row when there is no more room."""
        row = self.row(key)
        if row is not None:
            return row
        if self._free:
            row = self._free.pop()
            self.names[row] = key
        else:
            row = len(self.names)
            self.names.append(key)
            for meters in self.meters:
                meters.used.append(0)
        self.rows[key] = row
        self.renamed[row] = key
        return row

    def release(self, row: int) -> None:
        """Forget a row that no meters use any more; others keep it."""
        key = self.names[row]
        if key is None or row == OVERFLOW_ROW or any(meters.used[row] for meters in self.meters):
            return
        del self.rows[key]
        self.names[row] = self.renamed[row] = None
        self._free.append(row)

    def restore(self, named: Iterable[tuple[int, str]]) -> None:
        """Give keys the rows that an earlier run gave them. No meters may have been opened yet."""
        for row, key in named:
            self.names += [None] * (row + 1 - len(self.names))
            self.names[row] = key
            self.rows[key] = row
        self._free = array("q", [row for row, key in enumerate(self.names) if key is None])

    def take_renamed(self) -> dict[int, str | None]:
        """The rows whose key is not on disk as it is here; pass them to `put_back` if they could not be stored."""
        renamed, self.renamed = self.renamed, {}
        return renamed

    def put_back(self, renamed: dict[int, str | None]) -> None:
        """These could not be stored."""
        self.renamed = {**renamed, **self.renamed}


class Batch:
    """What was charged in a slice and is not on disk yet: `amounts` by row, and rows that 1 more was added to.

    No row has more than `most`.
    """

    __slots__ = ("_amounts", "_ones", "most", "slice")

    def __init__(self, slice: int, amounts: dict[int, int], ones: list[int], most: int) -> None:
        self.slice = slice
        self.most = most
        self._amounts = amounts
        self._ones = ones

    @property
    def rows(self) -> list[int]:
        """Each row once."""
        return list(dict.fromkeys([*self._amounts, *self._ones]))

    def amount(self, row: int) -> int:
        """What was charged to the row."""
        self._count()
        return self._amounts.get(row, 0)

    def forget(self, row: int) -> None:
        """Nothing was charged to the row."""
        self._count()
        self._amounts.pop(row, None)

    def _count(self) -> None:
        if self._ones:
            _add_ones(self._amounts, self._ones)
            self._ones = []


class Meters:
    """One window of one limit for all its keys.

    `used` is the column of sums, `current` the amounts of the slice that `advance` began, `fresh` what of them is in no
    batch yet. Rows in `ones` have 1 more in `used`, and not yet in the others. `unflushed` has no less than what is in
    `fresh` and `ones`: all rows with the same `row % PLACES` share a sum, so that few need a look at their own.
    """

    __slots__ = (
        "_slices",
        "_stale",
        "_tolls_ms",
        "current",
        "fresh",
        "id",
        "keys",
        "max",
        "ones",
        "overrides",
        "quick_max",
        "quick_unflushed_max",
        "slice",
        "slice_end_ms",
        "slice_ms",
        "unflushed",
        "used",
        "waiting",
        "waiting_max",
    )

    def __init__(self, id: MetersId, keys: Keys) -> None:
        self.id = id
        self.slice_ms = -(-id.window_ms // SLICES_PER_WINDOW)
        self.keys = keys
        self.used = array("q", bytes(8 * len(keys.names)))
        self.slice = -1
        self.slice_end_ms = 0
        self.current: dict[int, int] = {}
        self.fresh: dict[int, int] = {}
        self.ones: list[int] = []
        self.unflushed = _NOTHING[:]
        self.waiting: list[Batch] = []
        self.waiting_max = 0
        self._tolls_ms: list[int] = []
        self._slices: dict[int, dict[int, int]] = {}
        self._stale: list[dict[int, int]] = []
        keys.meters.append(self)
        self.set_max(0, {})

    def set_max(self, max: int, overrides: dict[str, int]) -> None:
        """What a key may use in a window, and which keys may use more or less: UNLIMITED, or 0 for blocked."""
        self.max = max
        self.overrides = overrides
        self._set_quick()

    def set_override(self, key: str, max: int | None) -> None:
        """What one key may use from now on; None for as much as the others."""
        if max is None:
            self.overrides.pop(key, None)
        else:
            self.overrides[key] = max
        self._set_quick()

    def set_tolls(self, tolls_ms: Collection[int]) -> None:
        """When this node started after an unclean stop: for one window each costs what may have been lost."""
        self._tolls_ms = list(tolls_ms)
        self._set_quick()

    def _set_quick(self) -> None:
        """Below these no closer look is needed; a closer look is always needed where keys differ."""
        alike = not self._tolls_ms and not self.overrides
        self.quick_max = self.max if alike else -1
        self.quick_unflushed_max = unflushed_max(self.max) if alike else -1

    def _set_waiting(self, waiting: list[Batch]) -> None:
        """`waiting_max` is what no row has more of in `waiting`."""
        self.waiting = waiting
        self.waiting_max = sum(batch.most for batch in waiting)

    # --- time -------------------------------------------------------------------------------------------------------

    def oldest(self, now_ms: int) -> int:
        """The oldest slice that still counts."""
        return (now_ms - self.id.window_ms) // self.slice_ms

    def advance(self, now_ms: int) -> None:
        """Begin the slice that `now_ms` lies in. Callers on the decision path compare `slice_end_ms` first."""
        if now_ms < self.slice_end_ms:
            return
        self._begin_batch()
        oldest = self.oldest(now_ms)
        for number in [number for number in self._slices if number < oldest]:
            self._stale.append(self._slices.pop(number))
        self._set_waiting([batch for batch in self.waiting if batch.slice >= oldest])
        if self.slice in self._slices and not self.current:
            del self._slices[self.slice]
        self.slice = now_ms // self.slice_ms
        self.slice_end_ms = (self.slice + 1) * self.slice_ms
        self.current = self._slices.setdefault(self.slice, {})
        if self._tolls_ms:
            self.set_tolls([toll_ms for toll_ms in self._tolls_ms if toll_ms // self.slice_ms >= oldest])

    def expire(self, entries_max: int) -> int:
        """Subtract up to `entries_max` entries of slices that ran out. Returns how many it did."""
        done = 0
        while self._stale and done < entries_max:
            amounts = self._stale[-1]
            if not amounts:
                self._stale.pop()
                continue
            row, amount = amounts.popitem()
            self.used[row] -= amount
            if not self.used[row]:
                self.keys.release(row)
            done += 1
        return done

    def settle(self, row: int) -> None:
        """Subtract at once what has run out for one row."""
        for amounts in self._stale:
            amount = amounts.get(row)
            if amount:
                self.used[row] -= amount
                amounts[row] = 0

    # --- questions --------------------------------------------------------------------------------------------------

    def max_of(self, key: str) -> int:
        """What the key may use in a window: `max`, or its override."""
        return self.overrides.get(key, self.max) if self.overrides else self.max

    def toll(self, key: str) -> int:
        """What is assumed to be used because of unclean stops within the window: as much as could have been lost."""
        return len(self._tolls_ms) * unflushed_max(self.max_of(key))

    def allowance(self, key: str, now_ms: int) -> int:
        """What usage may rise to: `max_of`, less the toll."""
        self.advance(now_ms)
        return self.max_of(key) - self.toll(key)

    def counted(self, key: str, row: int | None, now_ms: int) -> int:
        """What counts as used within the window, as it is shown to people."""
        return self.usage(row, now_ms) + self.toll(key)

    def usage(self, row: int | None, now_ms: int) -> int:
        """Used within the window, exactly; no row, no usage."""
        if row is None:
            return 0
        self.advance(now_ms)
        self.settle(row)
        return self.used[row]

    def slices(self, row: int | None, now_ms: int) -> list[tuple[int, int]]:
        """(slice, amount) of one row, oldest first, without the empty ones."""
        self.advance(now_ms)
        if row is None:
            return []
        self._count()
        amounts = ((number, self._slices[number].get(row, 0)) for number in sorted(self._slices))
        return [(number, amount) for number, amount in amounts if amount]

    def wait_ms(self, key: str, row: int | None, amount: int, now_ms: int) -> int | None:
        """How long until `amount` could be charged: 0 if now, None if never."""
        excess = self.usage(row, now_ms) + amount - self.allowance(key, now_ms)
        if excess <= 0:
            return 0
        toll = unflushed_max(self.max_of(key))
        ends = self.slices(row, now_ms) + [(toll_ms // self.slice_ms, toll) for toll_ms in self._tolls_ms]
        for number, freed in sorted(ends):
            excess -= freed
            if excess <= 0:
                return (number + 1) * self.slice_ms + self.id.window_ms - now_ms
        return None

    def must_wait(self, key: str, row: int) -> bool:
        """Whether more is charged to the row and not on disk than may be answered before it is."""
        return self.pending(row) > unflushed_max(self.max_of(key))

    def pending(self, row: int) -> int:
        """What is charged to the row and not on disk."""
        self._count()
        return self.fresh.get(row, 0) + sum(batch.amount(row) for batch in self.waiting)

    # --- changes ------------------------------------------------------------------------------------------------------

    def charge(self, row: int, key: str, amount: int) -> bool:
        """Add to the current slice, which `advance` began. True if that must be on disk before it is answered.

        (`compiled.py` does the same in place, where it knows most of it beforehand.)
        """
        self.used[row] += amount
        self.unflushed[row % PLACES] += amount
        self.add(row, amount)
        return self.must_wait(key, row)

    def add(self, row: int, amount: int) -> None:
        """Add to the current slice what `used` and `unflushed` have already. For 1, `ones.append(row)` will do."""
        self.current[row] = self.current.get(row, 0) + amount
        self.fresh[row] = self.fresh.get(row, 0) + amount

    def _count(self) -> None:
        if self.ones:
            _add_ones(self.current, self.ones)
            _add_ones(self.fresh, self.ones)
            self.ones = []

    def refund(self, row: int, key: str, number: int, amount: int) -> None:
        """Take a charge of slice `number` back, because it could not be stored and the mail was not let through."""
        self._count()
        amounts = self._slices.get(number, {})
        if amounts.get(row, 0) >= amount and self.keys.names[row] == key:
            self.used[row] -= amount
            amounts[row] -= amount
            if number == self.slice:
                self.fresh.setdefault(row, 0)
            else:
                self.waiting.append(Batch(number, {row: 0}, [], 0))

    def reset(self, row: int) -> list[int]:
        """Forget what the row has used. Returns the slices in which the caller forgets it on disk, too."""
        self._count()
        numbers = [number for number, amounts in self._slices.items() if row in amounts]
        self.used[row] = 0
        self.fresh.pop(row, None)
        for amounts in [*self._slices.values(), *self._stale]:
            amounts.pop(row, None)
        for batch in self.waiting:
            batch.forget(row)
        self.keys.release(row)
        return numbers

    def load(self, number: int, row: int, amount: int) -> None:
        """Add what an earlier run or an earlier form of this limit had counted in slice `number`."""
        self.used[row] += amount
        amounts = self._slices.setdefault(number, {})
        amounts[row] = amounts.get(row, 0) + amount

    def restore(self, logged: Iterable[tuple[int, dict[int, int]]]) -> None:
        """Take over what an earlier run stored: (slice, row -> amount), the last word on a row holds."""
        slices: dict[int, dict[int, int]] = {}
        for number, amounts in logged:
            slices.setdefault(number, {}).update(amounts)
        for number, amounts in slices.items():
            for row, amount in amounts.items():
                if amount and row < len(self.keys.names) and self.keys.names[row] is not None:
                    self.load(number, row, amount)

    def adopt(self, other: Meters) -> None:
        """Take over what `other` counted in a window of another length. An amount never ends earlier than it did."""
        other._count()
        for number, amounts in other._slices.items():
            for row, amount in amounts.items():
                self.load(((number + 1) * other.slice_ms - 1) // self.slice_ms, row, amount)
        slices = ((number, amounts) for number, amounts in self._slices.items() if amounts)
        self._set_waiting([Batch(number, dict(amounts), [], max(amounts.values())) for number, amounts in slices])

    def retire(self) -> None:
        """Nobody asks any more: let `expire` take everything away."""
        self._count()
        self._stale.extend(self._slices.values())
        self._slices = {}
        self.current = {}
        self.fresh = {}
        self._set_waiting([])

    # --- the disk -----------------------------------------------------------------------------------------------------

    @property
    def all_flushed(self) -> bool:
        """Whether all that is charged is on disk."""
        return not (self.ones or self.fresh or self.waiting)

    def take_unflushed(self) -> list[Batch]:
        """The batches that are not on disk; pass them to `flushed` when they are."""
        self._begin_batch()
        return list(self.waiting)

    def _begin_batch(self) -> None:
        if self.fresh or self.ones:
            _add_ones(self.current, self.ones)
            self._set_waiting([*self.waiting, Batch(self.slice, self.fresh, self.ones, max(self.unflushed))])
            self.fresh, self.ones = {}, []
            self.unflushed[:] = _NOTHING

    def flushed(self, batches: Iterable[Batch]) -> None:
        """These batches are on disk."""
        done = set(batches)
        self._set_waiting([batch for batch in self.waiting if batch not in done])

    @property
    def numbers(self) -> list[int]:
        """The slices that something was charged in."""
        return list(self._slices)

    def rows(self, number: int) -> Collection[int]:
        """The rows that have an amount in a slice."""
        return self._slices.get(number, {}).keys()

    def sums(self, number: int, rows: Iterable[int]) -> list[int]:
        """The amounts of these rows in a slice, 0 for those that have none."""
        return list(map(self._slices.get(number, {}).get, rows, repeat(0)))


class Ledger:
    """All meters of this node, by what they count.

    `tolls_ms` are the starts after unclean stops. While `answer_unflushed` is False every charge must be on disk before
    it is answered.
    """

    keys_class = Keys

    def __init__(self, keys_max: int = KEYS_MAX) -> None:
        self.meters: dict[MetersId, Meters] = {}
        self.tolls_ms: list[int] = []
        self.answer_unflushed = False
        self.kinds: dict[str, Keys] = {}
        self._keys_max = keys_max
        self._retired: list[Meters] = []

    def keys(self, key: str) -> Keys:
        """The rows for a kind of key."""
        if key not in self.kinds:
            self.kinds[key] = self.keys_class(self._keys_max)
        return self.kinds[key]

    def open(self, id: MetersId) -> Meters:
        """The meters with this id. New ones begin with what the same limit counted in a window of another length."""
        if id in self.meters:
            return self.meters[id]
        like = [other for other in self.meters.values() if other.id[:3] == id[:3]]
        meters = self.restore(id)
        if like:
            longer = [other for other in like if other.id.window_ms >= id.window_ms]
            meters.adopt(min(longer, key=_window) if longer else max(like, key=_window))
        return meters

    def restore(self, id: MetersId) -> Meters:
        """The meters that an earlier run had, empty: the caller loads them."""
        meters = self.meters[id] = Meters(id, self.keys(id.key))
        meters.set_tolls(self.tolls_ms)
        return meters

    def tidy(self) -> None:
        """Release the rows that `restore` made for keys of which nothing counts any more."""
        for keys in self.kinds.values():
            for row in range(len(keys.names)):
                keys.release(row)

    def retain(self, ids: Collection[MetersId]) -> list[MetersId]:
        """Retire all other meters. Returns their ids."""
        gone = [id for id in self.meters if id not in ids]
        for id in gone:
            meters = self.meters.pop(id)
            meters.retire()
            self._retired.append(meters)
        return gone

    def expire(self, now_ms: int, entries_max: int) -> bool:
        """Forget what has run out, at most so many entries. True if there may be more."""
        left = entries_max
        for meters in self.meters.values():
            meters.advance(now_ms)
            left -= meters.expire(left)
        for meters in list(self._retired):
            left -= meters.expire(left)
            if left:
                meters.keys.meters.remove(meters)
                self._retired.remove(meters)
        return left <= 0


def _window(meters: Meters) -> int:
    return meters.id.window_ms


def unflushed_max(max: int) -> int:
    """Of a meter with this `max`, what may be admitted before it is on disk, and what an unclean stop is taken to cost.

    A limit that is changed between crash and restart needs no memory of its old value: with `new` < `old` at most
    new - new/20 + old/20 is admitted, which is not above `old`, and the larger of the two holds while one is changed.
    """
    return max // UNFLUSHED_PART or min(max, 1)
