"""Who has which part of a `max`, and what happens to it when nodes come and go.

The roster is a list of *generations*: numbered sets of nodes, one after the other. A node adopts them in order, each
when it sees it. Its base share is the smallest of its shares over all generations that are still *open*: a share falls
at once, and rises when nobody can be spending by the older generation any more.

A generation is open at a node until every other member has handed over a later one, or is known to be stopped for as
long as its usage and its loans can last. The node's own, newest generation is always open.

Why the base shares of a meter never sum to more than `max`: take the oldest generation g that any node still spends by,
say node j. At every other node i, g is open, because j has not handed over a later one to it. So every base share is at
most the share in g, and these sum to `max`. Three rules make "j is open at i" true:

- a node hands over only what it has adopted, durably, and its share has fallen by then;
- a generation is adopted only when all living members of the one before the current have handed over: so a node that
  joins need only hear from those who are in the generation that it was born from. (Without it, one that is drained in
  generation 2 and has not noticed could spend beside one that joined in 3 and does not know it. One of those must live
  to tell it; so roster_document.py lets nobody join before such a node has followed or was declared stopped.)
- a stopped node counts as gone only after two lifetimes + window + margin on the clock of each node that learns of it.
  A node that is new itself begins to count then, and takes every stopped node into account that is in one of the
  generations that it was told: roster_document.py keeps these until some member says that nobody spends by them.

After an unclean stop a node does not know what it has used, on any meter, up to its toll: not even which meters. It
cannot hand that over. So it tells how long ago that was, and others take it to spend by the older generation until one
window has passed since (`lingers`). Nobody adopts the generation after the one that such a node leaves before that.

What a node has used or lent beyond its new share stays with it as a loan from those whose share rises: see handover.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from hashlib import blake2b

from postmeter.core.effects import Meter, Standing
from postmeter.core.meters import UNLIMITED
from postmeter.defaults import SHARE_CHUNK_MAX, SHARE_CHUNK_NODES_MIN, SHARE_SINGLES

Members = tuple[str, ...]


@lru_cache(maxsize=4096)
def order(meter: Meter, members: Members) -> Members:
    """The members in the rendezvous order of a meter: another one for each, which outlives joins and drains."""
    text = "\0".join((*map(str, meter[0]), meter[1]))
    start = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8)

    def place(member: str) -> bytes:
        hash = start.copy()
        hash.update(b"\0" + member.encode())
        return hash.digest()

    return tuple(sorted(members, key=place))


def share(max: int, members: Members, node: str, meter: Meter) -> int:
    """A node's part of `max`. The parts sum to `max`, and each grows with `max`: nodes may learn of it any time.

    Units are dealt one after the other in a fixed sequence, of which `max` is the length. A round gives a chunk to the
    next node in the order of the meter, and three times as many units one by one. So among a few nodes all have the
    same; among many a few *homes* have a quarter of a small `max`, so that few need to be asked for it, and the rest
    lies wherever the next message may arrive. UNLIMITED is not divided.
    """
    if node not in members:
        return 0
    if max >= UNLIMITED:
        return max
    count = len(members)
    if max % (sum(_deal(count)) * count) == 0:
        return max // count
    return _part(max, count, order(meter, members).index(node))


@lru_cache(maxsize=4096)
def least_share(max: int, count: int) -> int:
    """What none of so many members has less than, whatever the meter."""
    return min(_part(max, count, place) for place in range(count))


def _part(max: int, count: int, place: int) -> int:
    """What the node at this place has: chunks are dealt from the first place on, single units from the last."""
    chunk, single = _deal(count)
    rounds, rest = divmod(max, chunk + single)
    singles = rounds * single + (rest - chunk if rest > chunk else 0)
    part = chunk * _dealt(rounds, count, place) + _dealt(singles, count, count - 1 - place)
    if place == rounds % count:
        part += rest if rest < chunk else chunk
    return part


def _deal(count: int) -> tuple[int, int]:
    """In one round: how many units go to one node, and how many are dealt one by one."""
    if count < SHARE_CHUNK_NODES_MIN:
        return 1, 1
    chunk = min(SHARE_CHUNK_MAX, count)
    return chunk, SHARE_SINGLES * chunk


def _dealt(units: int, count: int, place: int) -> int:
    """How many of so many units come to a place, dealt from place 0 on, again and again."""
    return units // count + (place < units % count)


def transfers(max: int, old: Members, new: Members, meter: Meter) -> dict[tuple[str, str], int]:
    """(giver, taker) -> how much of `max` moves when `old` becomes `new`. The same on every node."""
    give: list[tuple[str, int]] = []
    take: list[tuple[str, int]] = []
    for node in sorted({*old, *new}):
        rise = share(max, new, node, meter) - share(max, old, node, meter)
        if rise > 0:
            take.append((node, rise))
        elif rise < 0:
            give.append((node, -rise))
    moved: dict[tuple[str, str], int] = {}
    while give and take:
        (giver, falls), (taker, rises) = give.pop(0), take.pop(0)
        amount = moved[giver, taker] = min(falls, rises)
        if falls > amount:
            give.insert(0, (giver, falls - amount))
        if rises > amount:
            take.insert(0, (taker, rises - amount))
    return moved


class Roster:
    """Where one node stands.

    `generation` is the newest one that it has adopted, `handed` what every other node handed over to it last, `stopped`
    when (own clock, ms) it learned that a node is stopped for good, `lingers` when (own clock, ms) another one started
    after an unclean stop, `unclean_ms` when this one did. A node is `born` with the generation before its first.
    """

    def __init__(self, node: str, generations: Mapping[int, Members], born: int, stopped: Mapping[str, int]) -> None:
        self.node = node
        self.generations = {number: tuple(sorted(members)) for number, members in generations.items()}
        self.generation = max(self.generations)
        self.born = born
        self.handed: dict[str, int] = {}
        self.stopped = dict(stopped)
        self.lingers: dict[str, int] = {}
        self.unclean_ms: int | None = None

    # --- shares -------------------------------------------------------------------------------------------------------

    @property
    def members(self) -> Members:
        """The nodes of the newest adopted generation."""
        return self.generations[self.generation]

    @property
    def is_member(self) -> bool:
        """Whether this node is one of them, and has not been declared stopped."""
        return self.node in self.members and self.node not in self.stopped

    def open(self, now_ms: int, wait_ms: int, toll_wait_ms: int) -> list[Members]:
        """The generations that somebody may be spending by.

        A stopped node does so for `wait_ms`, one that does not know what it has used for `toll_wait_ms`.
        """
        return [
            members
            for number, members in self.generations.items()
            if number == self.generation
            or any(self._spends(node, number, now_ms, wait_ms, toll_wait_ms) for node in members)
        ]

    def _spends(self, node: str, number: int, now_ms: int, wait_ms: int, toll_wait_ms: int) -> bool:
        """Whether another node may still be spending by this older generation."""
        if node == self.node:
            return False
        if node in self.stopped and now_ms >= self.stopped[node] + wait_ms:
            return False
        if self.handed.get(node, -1 if node in self.stopped else self.born) <= number:
            return True
        return self._lingers(node, now_ms, toll_wait_ms)

    def _lingers(self, node: str, now_ms: int, toll_wait_ms: int) -> bool:
        return node in self.lingers and now_ms < self.lingers[node] + toll_wait_ms

    # --- changes ------------------------------------------------------------------------------------------------------

    def may_adopt(self, now_ms: int, toll_wait_ms: int) -> bool:
        """Whether all living members of the generation before the current one have handed over the current one."""
        before = self.generations.get(self.generation - 1, ())
        living = [node for node in before if node != self.node and node not in self.stopped]
        left = [node for node in living if node not in self.members]
        return (
            self.node in self.members
            and all(self.handed.get(node, -1) >= self.generation for node in living)
            and not any(self._lingers(node, now_ms, toll_wait_ms) for node in left)
        )

    def adopt(self, number: int, members: Iterable[str]) -> Members:
        """Spend by the next generation from now on. Returns the others of the old and new one, to hand over to."""
        old, new = self.members, tuple(sorted(members))
        self.generations[number] = new
        self.generation = number
        return tuple(node for node in sorted({*old, *new}) if node != self.node and node not in self.stopped)

    def knows(self, node: str, generation: int) -> bool:
        """Whether the node has handed over this generation or a later one."""
        return self.handed.get(node, -1) >= generation

    def hear(self, node: str, generation: int, unclean_ms: int | None) -> None:
        """A node hands over a generation that this one has adopted, and says when it last started uncleanly."""
        self.handed[node] = max(generation, self.handed.get(node, -1))
        if unclean_ms is None:
            self.lingers.pop(node, None)
        else:
            self.lingers[node] = unclean_ms

    def stop(self, node: str, now_ms: int) -> bool:
        """A node is stopped for good. True if that is news."""
        if node in self.stopped:
            return False
        self.stopped[node] = now_ms
        return True

    def prune(self, now_ms: int, wait_ms: int, toll_wait_ms: int) -> None:
        """Forget generations that are closed for good; the waits are the longest of any meter."""
        closed = [
            number
            for number, members in self.generations.items()
            if number < self.generation - 1
            and not any(self._spends(node, number, now_ms, wait_ms, toll_wait_ms) for node in members)
        ]
        for number in closed:
            del self.generations[number]

    # --- the disk -----------------------------------------------------------------------------------------------------

    def standing(self) -> Standing:
        """Everything, as it is stored."""
        return Standing(
            self.node,
            tuple(sorted(self.generations.items())),
            self.born,
            tuple(sorted(self.handed.items())),
            tuple(sorted(self.stopped.items())),
            tuple(sorted(self.lingers.items())),
            self.unclean_ms,
        )

    @classmethod
    def restore(cls, standing: Standing) -> Roster:
        """As it was stored."""
        roster = cls(standing.node, dict(standing.generations), standing.born, dict(standing.stopped))
        roster.handed = dict(standing.handed)
        roster.lingers = dict(standing.lingers)
        roster.unclean_ms = standing.unclean_ms
        return roster

    def check_invariants(self) -> None:
        """Raise AssertionError if this object contradicts itself."""
        assert self.generation == max(self.generations), "the newest generation is the adopted one"
        assert all(number <= self.generation for number in self.handed.values()), (
            "handed over before it was adopted here"
        )
        assert self.node not in self.handed, "handed over to itself"
        assert all(members == tuple(sorted(set(members))) for members in self.generations.values()), "members in order"
