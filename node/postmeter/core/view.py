"""The usage view: roughly who has used how much in the whole cluster, for looking at. No cap depends on it.

    view.count(id, slice, [(key, amount)], now_ms)          what this node has used: the sum of a slice, each time anew
    digest = view.digest(now_ms)                            what this node knows; a peer is asked with it
    portions = peer.delta(digest, entries_max, now_ms)      what the asker lacks; the reply has the peer's digest, too
    for _ in view.merge(peer_digest, portions, now_ms):     the caller may yield to others after every portion
    view.expire(now_ms, entries_max)                        forget, now and then; again soon while it returns True
    view.total(id, key)  .top(id, n)  .usage(id, key)       what was used: by all, by whom most, by node
    view.ages_ms(now_ms)  .age_ms(now_ms)  .refused         how much that is worth

Asking is all of the protocol: one request (digest) and one reply (digest, delta); both may be lost, late or repeated.
A delta may also be sent unasked to a peer whose digest is known.

An *entry* is what one node, its *owner*, used of one meter in one slice; nobody else writes it. The owner counts
versions: an entry carries the one at which it last changed, and of two forms of an entry the later version holds. While
amounts grow that is their maximum; a reset or a refund gets through, too. The entries of one version are a *bucket*.
A view knows for each owner a version up to which it lacks nothing. A *portion* is all that changed after `since` up to
`version`; who does not know everything up to `since` ignores it and asks again. So every node may pass on what it knows
of every other. Each call of `count` may begin a bucket if somebody asked meanwhile: collect what is counted until then.

An owner is a node with an incarnation. A node that starts again has a later incarnation and counts anew everything that
it still has; that replaces what it said before, which may have been more.

Slices are numbered by their owner's clock. A portion says what that clock shows, the receiver goes on from there with
its own: late by the time that portions were under way, wrong by the drift since the last. It forgets a slice when the
slice's end is one window old. What is known of an owner is as old as the last word, passed on as an age, that nothing
was lacking. An owner without entries is forgotten VIEW_KEEP_MS after that word, or after it became known, so that
stragglers cannot bring it back again and again.

Of others' entries a view takes no more than until it has `entries_max`. What is `refused` makes its owner's figures too
low: they have no age and are not passed on, and are fetched again when a quarter of the view has become free.

Times are milliseconds of this node's clock, which never goes back; amounts are in the limit's unit. Whoever reads
messages checks their form: indices within their tables, no negative numbers, versions ascending and within the
portion's, nothing longer than its maximum.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush, nlargest
from itertools import islice, takewhile
from typing import NamedTuple

from postmeter.core.meters import MetersId
from postmeter.defaults import (
    SLICES_PER_WINDOW,
    VIEW_ENTRIES_MAX,
    VIEW_KEEP_MS,
    VIEW_METERS_MAX,
    VIEW_NODES_MAX,
    VIEW_PORTION_ENTRIES_MAX,
)

# A slice of a window is (slice, window) in one integer, an entry (slice, window, row): integers are not visited by the
# garbage collector.
_WINDOW_BITS = 16
_ROW_BITS = 32
_WINDOW_MASK = (1 << _WINDOW_BITS) - 1
_ROW_MASK = (1 << _ROW_BITS) - 1
_NEVER_MS = 1 << 62


class Known(NamedTuple):
    """What a view knows of an owner: all up to `version`, and that it was all `age_ms` ago (None: it never was)."""

    incarnation: int
    version: int
    age_ms: int | None


Digest = dict[str, Known]


@dataclass(frozen=True, slots=True)
class Portion:
    """What an owner changed after version `since` up to `version`, when its clock was not yet past `now_ms`.

    An entry is its version, ascending; an index into `meters`; the owner's slice; an index into `keys`; an amount.
    There are at most VIEW_PORTION_ENTRIES_MAX, and none where all that changed has run out.
    """

    node: str
    incarnation: int
    since: int
    version: int
    now_ms: int
    meters: list[MetersId]
    keys: list[str]
    entries: list[tuple[int, int, int, int, int]]


class _Names:
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


@dataclass(slots=True)
class _Window:
    """One window of one limit: its totals by row over all owners, without zeros."""

    id: MetersId
    index: int
    entries: int = 0
    totals: dict[int, int] = field(default_factory=dict)

    def add(self, row: int, amount: int) -> None:
        total = self.totals.pop(row, 0) + amount
        if total:
            self.totals[row] = total


@dataclass(slots=True)
class _Owner:
    """What is known of one incarnation of a node.

    `complete_ms` is when nothing was lacking, `offset_ms` its clock less ours, `partial` whether entries were refused.
    `rows` has the version of an entry by (slice, window), then row; `buckets` its amount by version, ascending, then
    (slice, window, row); `ends` is a heap of when a (slice, window) runs out on its clock.
    """

    incarnation: int
    keep_ms: int
    version: int = 0
    complete_ms: int | None = None
    offset_ms: int = 0
    partial: bool = False
    rows: dict[int, dict[int, int]] = field(default_factory=dict)
    buckets: dict[int, dict[int, int]] = field(default_factory=dict)
    ends: list[tuple[int, int]] = field(default_factory=list)

    def known(self, now_ms: int) -> Known:
        age_ms = None if self.complete_ms is None else now_ms - self.complete_ms
        return Known(self.incarnation, self.version, age_ms)

    def confirm(self, known: Known, now_ms: int) -> None:
        """Somebody says what there is: if we have that, we lacked nothing then."""
        if known.age_ms is None or known.incarnation != self.incarnation or known.version > self.version:
            return
        complete_ms = now_ms - known.age_ms
        if self.complete_ms is None or self.complete_ms < complete_ms:
            self.complete_ms = complete_ms
            self.keep_ms = max(self.keep_ms, complete_ms + VIEW_KEEP_MS)

    def newer(self, since: int) -> list[int]:
        """The versions of buckets after `since`, ascending. Costs nothing where there are none."""
        return list(takewhile(lambda version: version > since, reversed(self.buckets)))[::-1]

    def put(self, at: int, row: int, amount: int) -> None:
        self.rows[at][row] = self.version
        self.buckets.setdefault(self.version, {})[at << _ROW_BITS | row] = amount

    def take(self, at: int, row: int) -> int:
        """Remove an entry. Returns its amount."""
        version = self.rows[at].pop(row)
        bucket = self.buckets[version]
        amount = bucket.pop(at << _ROW_BITS | row)
        if not bucket:
            del self.buckets[version]
        return amount

    def used(self, window: int, row: int) -> int:
        held = [(at, rows[row]) for at, rows in self.rows.items() if at & _WINDOW_MASK == window and row in rows]
        return sum(self.buckets[version][at << _ROW_BITS | row] for at, version in held)


class View:
    """What node `node` knows of everybody's usage, its own included."""

    def __init__(self, node: str, incarnation: int, entries_max: int = VIEW_ENTRIES_MAX) -> None:
        self.node = node
        self.entries_max = entries_max
        self.entries_held = 0
        self.refused = 0
        self._names = _Names()
        self._windows: dict[MetersId, _Window] = {}
        self._by_index: dict[int, _Window] = {}
        self._own = _Owner(incarnation, _NEVER_MS)
        self._own.version = 1
        self._owners = {node: self._own}
        self._gone: list[_Owner] = []
        self._published = False
        self._turn = 0

    # --- what this node has used ------------------------------------------------------------------------------------

    def count(self, id: MetersId, slice: int, sums: Iterable[tuple[str, int]], now_ms: int) -> None:
        """Note what this node has used in a slice: sums (key, amount), in place of those noted before."""
        own = self._own
        for key, amount in sums:
            if self._published or len(own.buckets.get(own.version, ())) >= VIEW_PORTION_ENTRIES_MAX:
                own.version += 1
                self._published = False
            self._set(own, id, slice, key, amount, now_ms)

    # --- gossip -----------------------------------------------------------------------------------------------------

    def digest(self, now_ms: int) -> Digest:
        """What is known of whom."""
        self._own.complete_ms = now_ms
        return {node: owner.known(now_ms) for node, owner in self._owners.items()}

    def delta(self, known: Digest, entries_max: int, now_ms: int) -> list[Portion]:
        """What a peer that knows `known` lacks, oldest first: at most `entries_max` entries, but at least one portion.

        Every call begins with another owner, so that a busy one does not keep the others back.
        """
        self._published = True
        left = max(entries_max, VIEW_PORTION_ENTRIES_MAX)
        self._turn = (self._turn + 1) % len(self._owners)
        nodes = list(self._owners)
        portions: list[Portion] = []
        for node in nodes[self._turn :] + nodes[: self._turn]:
            for portion in self._portions(node, known.get(node), now_ms):
                left -= len(portion.entries)
                if left < 0:
                    return portions
                portions.append(portion)
        return portions

    def _portions(self, node: str, known: Known | None, now_ms: int) -> Iterator[Portion]:
        owner = self._owners[node]
        since = known.version if known and known.incarnation == owner.incarnation else 0
        ahead = known is not None and known[:2] >= (owner.incarnation, owner.version)
        if ahead or owner.partial:
            return
        size = 0
        versions: list[int] = []
        for version in owner.newer(since):
            size += len(owner.buckets[version])
            if versions and size > VIEW_PORTION_ENTRIES_MAX:
                yield self._portion(node, since, versions[-1], versions, now_ms)
                since, size, versions = versions[-1], len(owner.buckets[version]), []
            versions.append(version)
        yield self._portion(node, since, owner.version, versions, now_ms)

    def _portion(self, node: str, since: int, to: int, versions: list[int], now_ms: int) -> Portion:
        owner = self._owners[node]
        meters: dict[MetersId, int] = {}
        keys: dict[str, int] = {}
        entries = []
        for version in versions:
            for entry, amount in owner.buckets[version].items():
                slice, window, row = _unpack(entry)
                meters_at = meters.setdefault(self._by_index[window].id, len(meters))
                keys_at = keys.setdefault(self._names.keys[row], len(keys))
                entries.append((version, meters_at, slice, keys_at, amount))
        now_ms += owner.offset_ms
        return Portion(node, owner.incarnation, since, to, now_ms, list(meters), list(keys), entries)

    def merge(self, digest: Digest, portions: Iterable[Portion], now_ms: int) -> Iterator[int]:
        """Take in what a peer sent that arrived at `now_ms`, with its digest of that moment.

        Yields the number of entries after each portion: run it to its end. Several may run in turns.
        """
        for portion in portions:
            yield self._merge(portion, digest, now_ms)
        for node, known in digest.items():
            owner = self._owners.get(node)
            if owner is not None and not owner.partial:
                owner.confirm(known, now_ms)

    def _merge(self, portion: Portion, digest: Digest, now_ms: int) -> int:
        if portion.node == self.node:
            return 0
        owner = self._owners.get(portion.node)
        if owner is None or owner.incarnation < portion.incarnation:
            owner = self._admit(portion, digest.get(portion.node), now_ms)
        if owner is None or owner.incarnation > portion.incarnation:
            return 0
        if not portion.since <= owner.version < portion.version:
            return 0
        owner.offset_ms = portion.now_ms - now_ms
        held = owner.version
        for version, meters_at, slice, keys_at, amount in portion.entries:
            if version > held:
                owner.version = version
                self._set(owner, portion.meters[meters_at], slice, portion.keys[keys_at], amount, now_ms)
        owner.version = portion.version
        return len(portion.entries)

    def _admit(self, portion: Portion, known: Known | None, now_ms: int) -> _Owner | None:
        """Begin with an owner or its next incarnation; None if this is a straggler, or one too many."""
        node = portion.node
        silent = known is None or known.age_ms is None or known.age_ms > VIEW_KEEP_MS // 2
        if portion.since or (silent and not portion.entries):
            return None
        if node not in self._owners and len(self._owners) >= VIEW_NODES_MAX:
            self.refused += len(portion.entries)
            return None
        self._dismiss(node)
        owner = self._owners[node] = _Owner(portion.incarnation, now_ms + VIEW_KEEP_MS)
        return owner

    # --- entries ----------------------------------------------------------------------------------------------------

    def _set(self, owner: _Owner, id: MetersId, slice: int, key: str, amount: int, now_ms: int) -> None:
        """Note an amount at the owner's version, unless the slice has run out or not begun."""
        slice_ms = -(-id.window_ms // SLICES_PER_WINDOW)
        begin_ms, end_ms = slice * slice_ms, (slice + 1) * slice_ms + id.window_ms
        if not begin_ms <= now_ms + owner.offset_ms < end_ms:
            return
        window, row = self._windows.get(id), self._names.rows.get(key)
        if window is not None and row is not None:
            at = slice << _WINDOW_BITS | window.index
            if row in owner.rows.get(at, ()):
                window.add(row, amount - owner.take(at, row))
                owner.put(at, row, amount)
                return
        if owner is not self._own and self._is_full(window):
            owner.partial = True
            owner.complete_ms = None
            self.refused += 1
            return
        window = window or self._open(id)
        at = slice << _WINDOW_BITS | window.index
        if at not in owner.rows:
            owner.rows[at] = {}
            heappush(owner.ends, (end_ms, at))
        row = self._names.use(key)
        owner.put(at, row, amount)
        window.add(row, amount)
        window.entries += 1
        self.entries_held += 1

    def _is_full(self, window: _Window | None) -> bool:
        return self.entries_held >= self.entries_max or (window is None and len(self._windows) >= VIEW_METERS_MAX)

    def _open(self, id: MetersId) -> _Window:
        index = next(index for index in range(len(self._by_index) + 1) if index not in self._by_index)
        assert index <= _WINDOW_MASK
        window = self._windows[id] = self._by_index[index] = _Window(id, index)
        return window

    def _drop(self, owner: _Owner, at: int, row: int) -> None:
        window = self._by_index[at & _WINDOW_MASK]
        window.add(row, -owner.take(at, row))
        window.entries -= 1
        self.entries_held -= 1
        self._names.release(row)
        if not window.entries:
            del self._windows[window.id], self._by_index[window.index]
        if not self.entries_held:
            self._names = _Names()

    # --- forgetting -------------------------------------------------------------------------------------------------

    def expire(self, now_ms: int, entries_max: int) -> bool:
        """Forget what has run out, at most so many entries. True if there may be more."""
        left = entries_max
        for owner in self._gone:
            left -= self._expire(owner, _NEVER_MS, left)
        self._gone = [owner for owner in self._gone if owner.rows]
        room = self.entries_held <= self.entries_max * 3 // 4 and len(self._windows) <= VIEW_METERS_MAX * 3 // 4
        for node, owner in list(self._owners.items()):
            left -= self._expire(owner, now_ms + owner.offset_ms, left)
            if (owner.partial and room) or (not owner.rows and now_ms >= owner.keep_ms):
                self._dismiss(node)
        return left <= 0

    def _expire(self, owner: _Owner, owner_ms: int, entries_max: int) -> int:
        done = 0
        while done < entries_max and owner.ends and owner.ends[0][0] <= owner_ms:
            at = owner.ends[0][1]
            rows = owner.rows[at]
            for row in list(islice(rows, entries_max - done)):
                self._drop(owner, at, row)
                done += 1
            if not rows:
                heappop(owner.ends)
                del owner.rows[at]
        return done

    def _dismiss(self, node: str) -> None:
        """Know nothing of a node; its entries are removed later, in portions."""
        owner = self._owners.pop(node, None)
        if owner is not None and owner.rows:
            self._gone.append(owner)

    # --- questions --------------------------------------------------------------------------------------------------

    def total(self, id: MetersId, key: str) -> int:
        """What all nodes together have used."""
        window, row = self._windows.get(id), self._names.rows.get(key)
        return 0 if window is None or row is None else window.totals.get(row, 0)

    def top(self, id: MetersId, n: int) -> list[tuple[str, int]]:
        """The `n` keys that used most, and what they used."""
        window = self._windows.get(id)
        if window is None:
            return []
        totals = window.totals
        return [(self._names.keys[row], totals[row]) for row in nlargest(n, totals, key=totals.__getitem__)]

    def usage(self, id: MetersId, key: str) -> dict[str, int]:
        """What each node has used, without those that used nothing."""
        window, row = self._windows.get(id), self._names.rows.get(key)
        if window is None or row is None:
            return {}
        used = {node: owner.used(window.index, row) for node, owner in self._owners.items()}
        return {node: amount for node, amount in used.items() if amount}

    def ages_ms(self, now_ms: int) -> dict[str, int | None]:
        """How old the word is that nothing is lacking of a node; None where it did not come yet.

        A node that is missing was not heard of for long, or never.
        """
        return {node: known.age_ms for node, known in self.digest(now_ms).items()}

    def age_ms(self, now_ms: int) -> int | None:
        """How old the oldest contribution to any figure is; None if one is not complete."""
        ages_ms = [age_ms for age_ms in self.ages_ms(now_ms).values() if age_ms is not None]
        return max(ages_ms) if len(ages_ms) == len(self._owners) else None

    def entries(self) -> Iterator[tuple[str, MetersId, int, str, int]]:
        """(node, meters, slice, key, amount) of everything that is held."""
        for node, owner in self._owners.items():
            for bucket in owner.buckets.values():
                for entry, amount in bucket.items():
                    slice, window, row = _unpack(entry)
                    yield node, self._by_index[window].id, slice, self._names.keys[row], amount


def _unpack(entry: int) -> tuple[int, int, int]:
    """Slice, window and row of an entry."""
    return entry >> _ROW_BITS + _WINDOW_BITS, entry >> _ROW_BITS & _WINDOW_MASK, entry & _ROW_MASK
