"""The usage view: roughly who has used how much in the whole cluster, for looking at. No cap depends on it.

    view.count(id, slice, [(key, amount)], now_ms)          what this node has used: the sum of a slice, each time anew
    digest = view.digest(now_ms)                            what this node knows; a peer is asked with it
    portions = peer.delta(digest, now_ms)                   what the asker lacks; the reply has the peer's digest, too
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
of every other. `count` takes 0.6 µs a key if there are many in a call: pass some hundred where others wait meanwhile.
Each call may begin a bucket, if somebody has asked since the last. What is told to one peer is kept for a while: most
others lack the same, and it need not be gathered and written anew for each.

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

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from typing import NamedTuple

from postmeter.core.entries import Entries, Part, slice_ms
from postmeter.core.meters import MetersId
from postmeter.defaults import (
    VIEW_ENTRIES_MAX,
    VIEW_KEEP_MS,
    VIEW_NODES_MAX,
    VIEW_PORTION_ENTRIES,
    VIEW_TOLD_MAX,
    VIEW_TOLD_MS,
)

_NEVER_MS = 1 << 62
_bucket_and_slice = itemgetter(0, 1, 2)


class Known(NamedTuple):
    """What a view knows of an owner: all up to `version`, and that it was all `age_ms` ago (None: it never was)."""

    incarnation: int
    version: int
    age_ms: int | None


Digest = dict[str, Known]


@dataclass(frozen=True, slots=True)
class Changes:
    """Entries: a version, ascending; an index into `meters`; the owner's slice; an index into `keys`; an amount.

    There are at most VIEW_PORTION_ENTRIES_MAX, and none where all that changed has run out.
    """

    meters: list[MetersId]
    keys: list[str]
    entries: list[tuple[int, int, int, int, int]]

    # By identity: whoever writes them down recognises those that he has written before.
    __hash__ = object.__hash__


@dataclass(frozen=True, slots=True)
class Portion:
    """What an owner changed after version `since` up to `version`, when its clock was not yet past `now_ms`."""

    node: str
    incarnation: int
    since: int
    version: int
    now_ms: int
    changes: Changes


class _Owner(Part):
    """What is known of one incarnation of a node.

    `complete_ms` is when nothing was lacking, `offset_ms` its clock less ours, `partial` whether entries were refused.
    """

    __slots__ = ("complete_ms", "incarnation", "keep_ms", "offset_ms", "partial", "version")

    def __init__(self, incarnation: int, keep_ms: int, version: int = 0) -> None:
        super().__init__()
        self.incarnation = incarnation
        self.keep_ms = keep_ms
        self.version = version
        self.complete_ms: int | None = None
        self.offset_ms = 0
        self.partial = False

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

    def counts(self, id: MetersId, slice: int, now_ms: int) -> bool:
        """Whether a slice has begun and not run out."""
        begin_ms, owner_ms = slice * slice_ms(id), now_ms + self.offset_ms
        return begin_ms <= owner_ms < begin_ms + slice_ms(id) + id.window_ms


class View:
    """What node `node` knows of everybody's usage, its own included."""

    def __init__(self, node: str, incarnation: int, entries_max: int = VIEW_ENTRIES_MAX) -> None:
        self.node = node
        self.refused = 0
        self._entries = Entries(entries_max)
        self._own = _Owner(incarnation, _NEVER_MS, 1)
        self._owners = {node: self._own}
        self._gone: list[_Owner] = []
        self._published = False
        self._turn = 0
        self._told: dict[tuple[str, int, int], tuple[int, Changes]] = {}
        self._told_until_ms = 0

    @property
    def entries_held(self) -> int:
        """How many entries there are, its own included."""
        return self._entries.held

    # --- what this node has used ------------------------------------------------------------------------------------

    def count(self, id: MetersId, slice: int, sums: Iterable[tuple[str, int]], now_ms: int) -> None:
        """Note what this node has used in a slice: sums (key, amount), in place of those noted before."""
        own, left = self._own, iter(sums)
        while own.counts(id, slice, now_ms) and (some := list(islice(left, VIEW_PORTION_ENTRIES))):
            if self._published or len(own.buckets.get(own.version, ())) + len(some) > VIEW_PORTION_ENTRIES:
                own.version += 1
                self._published = False
            self._entries.put(own, own.version, id, slice, some, bounded=False)

    # --- gossip -----------------------------------------------------------------------------------------------------

    def digest(self, now_ms: int) -> Digest:
        """What is known of whom."""
        self._own.complete_ms = now_ms
        return {node: owner.known(now_ms) for node, owner in self._owners.items()}

    def delta(self, known: Digest, now_ms: int) -> Iterator[Portion]:
        """What a peer that knows `known` lacks, one portion after the other, oldest first.

        Every call begins with another owner, so that a busy one does not keep the others back. Between two portions
        the caller may do anything else.
        """
        self._turn = (self._turn + 1) % len(self._owners)
        nodes = list(self._owners)
        for node in nodes[self._turn :] + nodes[: self._turn]:
            yield from self._portions(node, known.get(node), now_ms)

    def _portions(self, node: str, known: Known | None, now_ms: int) -> Iterator[Portion]:
        owner = self._owners.get(node)
        if owner is None or owner.partial or (known is not None and known[:2] >= (owner.incarnation, owner.version)):
            return
        self._published = self._published or owner is self._own
        since = known.version if known and known.incarnation == owner.incarnation else 0
        to, left = owner.version, deque(owner.newer(since))
        while since < to and self._owners.get(node) is owner:
            asked = node, owner.incarnation, since
            told = self._told.pop(asked, None) or self._gather(owner, left, to)
            self._told[asked] = told
            if len(self._told) > VIEW_TOLD_MAX:
                del self._told[next(iter(self._told))]
            end, changes = told
            yield Portion(node, owner.incarnation, since, end, now_ms + owner.offset_ms, changes)
            since = end
            while left and left[0] <= since:
                left.popleft()

    def _gather(self, owner: _Owner, left: deque[int], to: int) -> tuple[int, Changes]:
        """The first of the buckets that are left, as many as a portion takes. Returns up to which version, and what."""
        meters: dict[MetersId, int] = {}
        keys: dict[str, int] = {}
        entries: list[tuple[int, int, int, int, int]] = []
        while left and (not entries or len(entries) + len(owner.buckets.get(left[0], ())) <= VIEW_PORTION_ENTRIES):
            version = left.popleft()
            for id, slice, key, amount in self._entries.told(owner, version):
                meters_at = meters.setdefault(id, len(meters))
                keys_at = keys.setdefault(key, len(keys))
                entries.append((version, meters_at, slice, keys_at, amount))
        end = left[0] - 1 if left else to
        return end, Changes(list(meters), list(keys), entries)

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
        changes = portion.changes
        for (version, meters_at, slice), entries in groupby(changes.entries, _bucket_and_slice):
            id = changes.meters[meters_at]
            if version > held and owner.counts(id, slice, now_ms):
                sums = [(changes.keys[keys_at], amount) for _, _, _, keys_at, amount in entries]
                refused = self._entries.put(owner, version, id, slice, sums, bounded=True)
                if refused:
                    self.refused += refused
                    owner.partial = True
                    owner.complete_ms = None
        owner.version = portion.version
        return len(changes.entries)

    def _admit(self, portion: Portion, known: Known | None, now_ms: int) -> _Owner | None:
        """Begin with an owner or its next incarnation; None if this is a straggler, or one too many."""
        node = portion.node
        silent = known is None or known.age_ms is None or known.age_ms > VIEW_KEEP_MS // 2
        if portion.since or (silent and not portion.changes.entries):
            return None
        if node not in self._owners and len(self._owners) >= VIEW_NODES_MAX:
            self.refused += len(portion.changes.entries)
            return None
        self._dismiss(node)
        owner = self._owners[node] = _Owner(portion.incarnation, now_ms + VIEW_KEEP_MS)
        return owner

    # --- forgetting -------------------------------------------------------------------------------------------------

    def expire(self, now_ms: int, entries_max: int) -> bool:
        """Forget what has run out, at most so many entries. True if there may be more."""
        if now_ms >= self._told_until_ms:
            self._told.clear()
            self._told_until_ms = now_ms + VIEW_TOLD_MS
        left = entries_max
        for owner in self._gone:
            left -= self._entries.expire(owner, _NEVER_MS, left)
        self._gone = [owner for owner in self._gone if owner.rows]
        room = self._entries.has_room
        for node, owner in list(self._owners.items()):
            left -= self._entries.expire(owner, now_ms + owner.offset_ms, left)
            if (owner.partial and room) or (not owner.rows and now_ms >= owner.keep_ms):
                self._dismiss(node)
        return left <= 0

    def _dismiss(self, node: str) -> None:
        """Know nothing of a node; its entries are removed later, in portions."""
        owner = self._owners.pop(node, None)
        if owner is not None and owner.rows:
            self._gone.append(owner)

    # --- questions --------------------------------------------------------------------------------------------------

    def total(self, id: MetersId, key: str) -> int:
        """What all nodes together have used."""
        return self._entries.total(id, key)

    def top(self, id: MetersId, n: int) -> list[tuple[str, int]]:
        """The `n` keys that used most, and what they used."""
        return self._entries.top(id, n)

    def usage(self, id: MetersId, key: str) -> dict[str, int]:
        """What each node has used, without those that used nothing."""
        place = self._entries.place(id, key)
        if place is None:
            return {}
        return {node: owner.sums[place] for node, owner in self._owners.items() if place in owner.sums}

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
            for version in owner.buckets:
                for entry in self._entries.told(owner, version):
                    yield node, *entry
