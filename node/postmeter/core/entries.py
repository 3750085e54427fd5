"""What a usage view holds: amounts by owner, meter, slice and key, in tables that the garbage collector need not visit.

    part = Part()                                                   the entries of one owner
    refused = entries.put(part, version, id, slice, [(key, amount)], bounded)
    part.newer(since)                                               what changed after a version
    entries.expire(part, owner_ms, entries_max)                     forget slices that have run out
    entries.total(id, key)  .top(id, n)                             sums, kept up to date with every change
    part.sums.get(entries.place(id, key), 0)                        ... and what one owner has used

An entry has the version at which it last changed; the entries of one version are a *bucket*. Keys have rows and windows
have indices while any entry refers to them, so that an entry is one integer (slice, window, row).
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Iterator
from heapq import heappop, heappush, nlargest
from itertools import islice, takewhile

from postmeter.core.meters import MetersId
from postmeter.defaults import SLICES_PER_WINDOW, VIEW_METERS_MAX

# A slice of a window is (slice, window) in one integer, an entry (slice, window, row), a sum (window, row): integers
# are not visited by the garbage collector.
WINDOW_BITS = 16
ROW_BITS = 32
WINDOW_MASK = (1 << WINDOW_BITS) - 1
ROW_MASK = (1 << ROW_BITS) - 1


def slice_ms(id: MetersId) -> int:
    """How long a slice is."""
    return -(-id.window_ms // SLICES_PER_WINDOW)


def unpack(entry: int) -> tuple[int, int, int]:
    """Slice, window and row of an entry."""
    return entry >> ROW_BITS + WINDOW_BITS, entry >> ROW_BITS & WINDOW_MASK, entry & ROW_MASK


class Names:
    """Numbers the keys that entries refer to."""

    __slots__ = ("_free", "_uses", "keys", "rows")

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        self.keys: list[str] = []
        self._uses = array("q")
        self._free = array("q")

    def use(self, key: str) -> int:
        """The row of the key, for one more entry."""
        row = self.rows.get(key)
        if row is None:
            if not self._free:
                self._free.append(len(self.keys))
                self.keys.append(key)
                self._uses.append(0)
            row = self.rows[key] = self._free.pop()
            self.keys[row] = key
        self._uses[row] += 1
        return row

    def release(self, row: int) -> None:
        """One entry less. Without entries the key is forgotten."""
        self._uses[row] -= 1
        if not self._uses[row]:
            del self.rows[self.keys[row]]
            self.keys[row] = ""
            self._free.append(row)


class Window:
    """One window of one limit: its totals by row over all owners, without zeros."""

    __slots__ = ("entries", "id", "index", "totals")

    def __init__(self, id: MetersId, index: int) -> None:
        self.id = id
        self.index = index
        self.entries = 0
        self.totals: dict[int, int] = {}


class Part:
    """The entries of one owner.

    `rows` has the version of an entry by (slice, window), then row; `buckets` its amount by version, ascending, then
    entry; `sums` what the owner has used by (window, row), without zeros; `ends` is a heap of when a (slice, window)
    runs out on the owner's clock.
    """

    __slots__ = ("buckets", "ends", "rows", "sums")

    def __init__(self) -> None:
        self.rows: dict[int, dict[int, int]] = {}
        self.buckets: dict[int, dict[int, int]] = {}
        self.sums: dict[int, int] = {}
        self.ends: list[tuple[int, int]] = []

    def newer(self, since: int) -> list[int]:
        """The versions of buckets after `since`, ascending. Costs nothing where there are none."""
        return list(takewhile(lambda version: version > since, reversed(self.buckets)))[::-1]


class Entries:
    """All entries of all owners: `held` is how many, `held_max` how many there may be."""

    def __init__(self, held_max: int) -> None:
        self.held = 0
        self.held_max = held_max
        self._names = Names()
        self._windows: dict[MetersId, Window] = {}
        self._by_index: dict[int, Window] = {}

    @property
    def has_room(self) -> bool:
        """Whether at least a quarter is free."""
        return self.held <= self.held_max * 3 // 4 and len(self._windows) <= VIEW_METERS_MAX * 3 // 4

    # --- changes ------------------------------------------------------------------------------------------------------

    def put(
        self, part: Part, version: int, id: MetersId, slice: int, sums: Collection[tuple[str, int]], bounded: bool
    ) -> int:
        """Note amounts of one slice, in place of earlier ones. `version` is the owner's newest; `sums` is not empty.

        Returns how many were refused: if `bounded`, those that are new when there are too many entries or meters.
        """
        room = self.held_max - self.held if bounded else len(sums)
        window = self._windows.get(id)
        if window is None:
            if room <= 0 or (bounded and len(self._windows) >= VIEW_METERS_MAX):
                return len(sums)
            window = self._open(id)
        at = slice << WINDOW_BITS | window.index
        if at not in part.rows:
            if room <= 0:
                return len(sums)
            part.rows[at] = {}
            heappush(part.ends, ((slice + 1) * slice_ms(id) + id.window_ms, at))
        return self._put(part, version, window, at, sums, room)

    def _put(
        self, part: Part, version: int, window: Window, at: int, sums: Iterable[tuple[str, int]], room: int
    ) -> int:
        """One loop with hardly a call in it: this is most of what gossip costs a node."""
        refused = 0
        names, totals, used = self._names.rows, window.totals, part.sums
        versions, buckets = part.rows[at], part.buckets
        bucket = buckets.setdefault(version, {})
        entries_at, sums_at = at << ROW_BITS, window.index << ROW_BITS
        for key, amount in sums:
            row = names.get(key)
            old = versions.get(row) if row is not None else None
            if row is not None and old is not None:
                before = buckets[old]
                change = amount - before.pop(entries_at | row)
                if not before and old != version:
                    del buckets[old]
            elif room > 0:
                room -= 1
                row = self._names.use(key)
                window.entries += 1
                self.held += 1
                change = amount
            else:
                refused += 1
                continue
            versions[row] = version
            bucket[entries_at | row] = amount
            if change:
                _add(totals, row, change)
                _add(used, sums_at | row, change)
        if not bucket:
            del buckets[version]
        return refused

    def _open(self, id: MetersId) -> Window:
        index = next(index for index in range(len(self._by_index) + 1) if index not in self._by_index)
        assert index <= WINDOW_MASK
        window = self._windows[id] = self._by_index[index] = Window(id, index)
        return window

    def expire(self, part: Part, owner_ms: int, entries_max: int) -> int:
        """Forget what has run out, at most so many entries. Returns how many."""
        done = 0
        while done < entries_max and part.ends and part.ends[0][0] <= owner_ms:
            at = part.ends[0][1]
            rows = part.rows[at]
            for row in list(islice(rows, entries_max - done)):
                self._drop(part, at, row)
                done += 1
            if not rows:
                heappop(part.ends)
                del part.rows[at]
        return done

    def _drop(self, part: Part, at: int, row: int) -> None:
        window = self._by_index[at & WINDOW_MASK]
        version = part.rows[at].pop(row)
        bucket = part.buckets[version]
        amount = bucket.pop(at << ROW_BITS | row)
        if not bucket:
            del part.buckets[version]
        if amount:
            _add(window.totals, row, -amount)
            _add(part.sums, window.index << ROW_BITS | row, -amount)
        window.entries -= 1
        self.held -= 1
        self._names.release(row)
        if not window.entries:
            del self._windows[window.id], self._by_index[window.index]
        if not self.held:
            self._names = Names()

    # --- questions --------------------------------------------------------------------------------------------------

    def told(self, part: Part, version: int) -> Iterator[tuple[MetersId, int, str, int]]:
        """(meters, slice, key, amount) of a bucket."""
        for entry, amount in part.buckets.get(version, {}).items():
            slice, window, row = unpack(entry)
            yield self._by_index[window].id, slice, self._names.keys[row], amount

    def total(self, id: MetersId, key: str) -> int:
        """What all owners together have used."""
        window, row = self._windows.get(id), self._names.rows.get(key)
        return 0 if window is None or row is None else window.totals.get(row, 0)

    def top(self, id: MetersId, n: int) -> list[tuple[str, int]]:
        """The `n` keys that used most, and what they used."""
        window = self._windows.get(id)
        if window is None:
            return []
        totals = window.totals
        return [(self._names.keys[row], totals[row]) for row in nlargest(n, totals, key=totals.__getitem__)]

    def place(self, id: MetersId, key: str) -> int | None:
        """Where a `Part` has the sum of a key; None if nobody has used anything."""
        window, row = self._windows.get(id), self._names.rows.get(key)
        return None if window is None or row is None else window.index << ROW_BITS | row


def _add(sums: dict[int, int], at: int, change: int) -> None:
    total = sums.get(at, 0) + change
    if total:
        sums[at] = total
    else:
        sums.pop(at, None)
