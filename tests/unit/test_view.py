"""The usage view, against a dumb twin that knows of every node what it said last."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from postmeter.core import entries as entries_module
from postmeter.core import view as module
from postmeter.core.entries import ROW_BITS, slice_ms, unpack
from postmeter.core.meters import MetersId
from postmeter.core.view import Digest, Known, Portion, View
from postmeter.defaults import VIEW_KEEP_MS, VIEW_PORTION_ENTRIES, VIEW_TOLD_MS

MINUTE_MS = 60_000
HOUR_MS = 60 * MINUTE_MS
USER_HOUR = MetersId("per-user", "sasl_username", "recipients", HOUR_MS)
USER_DAY = MetersId("per-user", "sasl_username", "recipients", 24 * HOUR_MS)
DOMAIN_HOUR = MetersId("per-domain", "sasl_domain", "recipients", HOUR_MS)
IDS = [USER_HOUR, USER_DAY, DOMAIN_HOUR]

Entry = tuple[str, MetersId, int, str]


def held(view: View) -> dict[Entry, int]:
    """Everything a view holds."""
    return {entry[:4]: entry[4] for entry in view.entries()}


def gossip(asker: View, peer: View, now_ms: int = 0, peer_ms: int | None = None, portions_max: int = 1000) -> int:
    """One request and its reply, without delay. Returns how many entries came."""
    peer_ms = now_ms if peer_ms is None else peer_ms
    portions = islice(peer.delta(asker.digest(now_ms), peer_ms), portions_max)
    return sum(asker.merge(peer.digest(peer_ms), portions, now_ms))


def join(view: View, *others: View) -> dict[Entry, int]:
    """What a copy of the view holds after it has got everything the others have, one after another."""
    view = copy.deepcopy(view)
    for other in others:
        gossip(view, copy.deepcopy(other))
        check(view)
    return held(view)


def drain(view: View, now_ms: int) -> None:
    """Forget all that has run out."""
    while view.expire(now_ms, 7):
        check(view)


def check(view: View) -> None:
    """Assert that the tables of a view agree with one another."""
    entries = view._entries
    totals: dict[tuple[int, int], int] = {}
    uses: dict[int, int] = {}
    for owner in [*view._owners.values(), *view._gone]:
        versions = list(owner.buckets)
        assert sorted(versions) == versions
        assert all(bucket and version <= owner.version for version, bucket in owner.buckets.items())
        assert sorted(owner.rows) == sorted(at for _, at in owner.ends)
        placed = {entry: version for version, bucket in owner.buckets.items() for entry in bucket}
        assert {at << ROW_BITS | row: v for at, rows in owner.rows.items() for row, v in rows.items()} == placed
        sums: dict[int, int] = {}
        for bucket in owner.buckets.values():
            for entry, amount in bucket.items():
                _, window, row = unpack(entry)
                uses[row] = uses.get(row, 0) + 1
                totals[window, row] = totals.get((window, row), 0) + amount
                sums[window << ROW_BITS | row] = sums.get(window << ROW_BITS | row, 0) + amount
        assert {place: amount for place, amount in sums.items() if amount} == owner.sums
    windows = entries._windows.values()
    assert {at: amount for at, amount in totals.items() if amount} == {
        (window.index, row): amount for window in windows for row, amount in window.totals.items()
    }
    assert sum(uses.values()) == view.entries_held == sum(window.entries for window in windows)
    assert all(window.entries for window in windows)
    assert set(uses) == set(entries._names.rows.values())


def assert_empty(view: View) -> None:
    """Nothing is left but what a new view has."""
    check(view)
    assert list(view._owners) == [view.node]
    entries, own = view._entries, view._own
    assert not any([view._gone, entries._windows, entries._by_index, entries._names.keys])
    assert not any([own.rows, own.buckets, own.sums, own.ends])


@dataclass(frozen=True)
class Reply:
    """A reply under way to the node that asked."""

    to: int
    digest: Digest
    portions: list[Portion]
    sent_ms: int = 0


class Chaos:
    """Nodes, replies that may arrive any number of times in any order or never, and the twin."""

    def __init__(self, nodes: int, offsets_ms: Iterable[int] = (), portion_max: int = VIEW_PORTION_ENTRIES) -> None:
        self.views = [View(f"n{at}", 1) for at in range(nodes)]
        self.offsets_ms = list(offsets_ms) or [0] * nodes
        self.now_ms = 0
        self.digests: list[Digest] = [{} for _ in range(nodes)]
        self.replies: list[Reply] = []
        self.truth: dict[Entry, int] = {}
        self.incarnations = 1
        self.portion_max = portion_max

    def clock(self, at: int) -> int:
        """What the node's clock shows."""
        return self.now_ms + self.offsets_ms[at]

    def count(self, at: int, id: MetersId, key: str, amount: int) -> None:
        """The node has used that much more in the present slice."""
        slice = self.clock(at) // slice_ms(id)
        entry = (f"n{at}", id, slice, key)
        self.truth[entry] = self.truth.get(entry, 0) + amount
        self.views[at].count(id, slice, [(key, self.truth[entry])], self.clock(at))

    def remember(self, at: int) -> None:
        """Keep the digest of now, for a request that is answered later."""
        self.digests[at] = self.views[at].digest(self.clock(at))

    def ask(self, at: int, peer: int, portions_max: int) -> None:
        """Let the peer answer the digest kept last."""
        view = self.views[peer]
        portions = list(islice(view.delta(self.digests[at], self.clock(peer)), portions_max))
        assert all(len(portion.changes.entries) <= self.portion_max for portion in portions)
        self.replies.append(Reply(at, view.digest(self.clock(peer)), portions, self.now_ms))

    def deliver(self, reply: Reply, skipped: int = -1) -> None:
        """Merge a reply, without one of its portions."""
        portions = [portion for place, portion in enumerate(reply.portions) if place != skipped]
        for _ in self.views[reply.to].merge(reply.digest, portions, self.clock(reply.to)):
            check(self.views[reply.to])

    def restart(self, at: int, lost: int) -> None:
        """The node comes back with an empty view and has lost some of every third amount it had counted."""
        self.incarnations += 1
        self.views[at] = View(f"n{at}", self.incarnations)
        own = {entry: amount for entry, amount in self.truth.items() if entry[0] == f"n{at}"}
        for place, ((node, id, slice, key), amount) in enumerate(own.items()):
            left = max(0, amount - lost) if place % 3 == 0 else amount
            del self.truth[node, id, slice, key]
            if left:
                self.truth[node, id, slice, key] = left
                self.views[at].count(id, slice, [(key, left)], self.clock(at))

    def heal(self, rounds: int) -> None:
        """Everybody asks everybody, so often."""
        for _ in range(rounds):
            for at in range(len(self.views)):
                for peer in range(len(self.views)):
                    gossip(self.views[at], self.views[peer], self.clock(at), self.clock(peer))


nodes = st.integers(0, 3)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("count"), nodes, st.sampled_from(IDS), st.sampled_from("abcdefgh"), st.integers(1, 9)),
        st.tuples(st.just("remember"), nodes),
        st.tuples(st.just("ask"), nodes, nodes, st.integers(0, 9)),
        st.tuples(st.just("gossip"), nodes, nodes),
        st.tuples(st.just("deliver"), st.integers(0, 99), st.booleans(), st.integers(-1, 3)),
        st.tuples(st.just("restart"), nodes, st.integers(0, 9)),
        st.tuples(st.just("expire")),
    ),
    max_size=60,
)
Steps = list[tuple[str, ...]]


def play(chaos: Chaos, todo: list[tuple]) -> None:  # type: ignore[type-arg]  # the elements differ by their first
    """Carry out the steps."""
    for kind, *how in todo:
        if kind == "deliver":
            if chaos.replies:
                which, again, skipped = how[0] % len(chaos.replies), how[1], how[2]
                chaos.deliver(chaos.replies[which] if again else chaos.replies.pop(which), skipped)
        elif kind == "gossip":
            at, peer = how
            gossip(chaos.views[at], chaos.views[peer], chaos.clock(at), chaos.clock(peer))
        elif kind == "expire":
            for at, view in enumerate(chaos.views):
                view.expire(chaos.clock(at), 2)
        else:
            getattr(chaos, kind)(*how)
        for view in chaos.views:
            check(view)


@given(steps)
@settings(max_examples=150, deadline=None)
def test_converges_whatever_happened(todo: Steps) -> None:
    """After loss, repetition, reordering, relay and restarts, all views are what every node said last."""
    with patch.object(module, "VIEW_PORTION_ENTRIES", 3):
        chaos = Chaos(4, [0, 5 * HOUR_MS, 7, 9_999_999], 3)
        play(chaos, todo)
        chaos.heal(4)
        for at, view in enumerate(chaos.views):
            drain(view, chaos.clock(at))
            check(view)
            assert chaos.truth == held(view)
            chaos.remember(at)
            assert [portion for peer in chaos.views for portion in peer.delta(chaos.digests[at], 0)] == []


@given(steps)
@settings(max_examples=150, deadline=None)
def test_merge_is_a_join(todo: Steps) -> None:
    """Merging what other nodes hold is idempotent, commutative and associative."""
    with patch.object(module, "VIEW_PORTION_ENTRIES", 3):
        chaos = Chaos(4, portion_max=3)
        play(chaos, todo)
        one, a, b, _ = chaos.views
        assert held(one) == join(one, one)
        assert join(one, a) == join(one, a, a) == join(one, a, one)
        assert join(one, a, b) == join(one, b, a)
        both = copy.deepcopy(a)
        gossip(both, copy.deepcopy(b))
        assert join(one, a, b) == join(one, both)


@given(steps)
@settings(max_examples=50, deadline=None)
def test_questions(todo: Steps) -> None:
    """Totals, the top and the usage by node are what adding up all entries gives."""
    chaos = Chaos(4)
    play(chaos, todo)
    for view in chaos.views:
        while view._gone:
            view.expire(0, 99)
        for id in IDS:
            sums: dict[str, dict[str, int]] = {}
            for (node, of, _, key), amount in held(view).items():
                if of == id:
                    sums.setdefault(key, {}).setdefault(node, 0)
                    sums[key][node] += amount
            totals = {key: sum(usage.values()) for key, usage in sums.items()}
            assert sums == {key: view.usage(id, key) for key in sums}
            assert totals == {key: view.total(id, key) for key in totals}
            assert totals == dict(view.top(id, 99))
            assert sorted(totals.values(), reverse=True)[:2] == [amount for _, amount in view.top(id, 2)]
    assert chaos.views[0].total(USER_HOUR, "nobody") == 0


moves = st.lists(
    st.one_of(
        st.tuples(st.just("count"), nodes, st.sampled_from(IDS), st.sampled_from("abc"), st.integers(1, 9)),
        st.tuples(st.just("ask"), nodes, nodes),
        st.tuples(st.just("wait"), st.integers(1, HOUR_MS // 2)),
    ),
    max_size=50,
)
DELAY_MS = 5_000


@given(moves, st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_slices_run_out_when_their_owner_says(todo: Steps, rnd: random.Random) -> None:
    """No slice is forgotten early, none is held longer than the delays on its way from its owner add up to."""
    chaos = Chaos(4, [rnd.randrange(10**9) for _ in range(4)])
    for kind, *how in todo:
        match kind:
            case "wait":
                chaos.now_ms += int(how[0])
            case "ask":
                chaos.remember(int(how[0]))
                chaos.ask(int(how[0]), int(how[1]), 1000)
                chaos.now_ms += rnd.randrange(DELAY_MS)
                chaos.deliver(chaos.replies.pop())
            case _:
                chaos.count(*how)  # type: ignore[arg-type]  # as `moves` makes them
        for at, view in enumerate(chaos.views):
            drain(view, chaos.clock(at))
            check(view)
            assert all(_left_ms(chaos, entry) > -3 * DELAY_MS for entry in held(view))
    chaos.heal(4)
    left_ms = {entry: _left_ms(chaos, entry) for entry in chaos.truth}
    for at, view in enumerate(chaos.views):
        drain(view, chaos.clock(at))
        assert {entry for entry, ms in left_ms.items() if ms > 0} <= set(held(view))
        assert set(held(view)) <= {entry for entry, ms in left_ms.items() if ms > -3 * DELAY_MS}
        assert held(view).items() <= chaos.truth.items()
    chaos.now_ms += 25 * HOUR_MS + 3 * DELAY_MS
    for _ in range(2):
        for at, view in enumerate(chaos.views):
            drain(view, chaos.clock(at))
        chaos.now_ms += VIEW_KEEP_MS
    for view in chaos.views:
        assert_empty(view)


def _left_ms(chaos: Chaos, entry: Entry) -> int:
    """How long the entry still counts for its owner."""
    node, id, slice, _ = entry
    return (slice + 1) * slice_ms(id) + id.window_ms - chaos.clock(int(node[1:]))


def test_a_slice_counts_until_its_end_is_one_window_old() -> None:
    """To the millisecond at its owner and, by the owner's clock, at others; what has run out is not taken over."""
    owner, peer, late, ahead_ms = View("owner", 1), View("peer", 1), View("late", 1), 123_456
    owner.count(USER_HOUR, 0, [("alice", 1)], 59_999)
    gossip(peer, owner, 59_999 + ahead_ms, 59_999)
    end_ms = HOUR_MS + MINUTE_MS
    drain(owner, end_ms - 1)
    drain(peer, end_ms + ahead_ms - 1)
    assert (1, 1) == (owner.total(USER_HOUR, "alice"), peer.total(USER_HOUR, "alice"))
    gossip(late, owner, end_ms, end_ms)
    drain(owner, end_ms)
    drain(peer, end_ms + ahead_ms)
    assert (0, 0, 0) == (owner.entries_held, peer.entries_held, late.entries_held)


def test_the_dead_do_not_come_back() -> None:
    """What a dead node had used is forgotten by all that go on gossiping with delays, and then the node itself."""
    chaos, rnd, alive = Chaos(9), random.Random(1), range(1, 9)
    chaos.count(0, USER_HOUR, "alice", 7)
    for at in alive:
        chaos.ask(at, at - 1, 1000)
        chaos.now_ms += DELAY_MS
        chaos.deliver(chaos.replies.pop())
    chaos.now_ms = HOUR_MS + MINUTE_MS
    gone_ms = HOUR_MS + MINUTE_MS + 2 * len(alive) * DELAY_MS
    while chaos.now_ms < gone_ms + 2 * VIEW_KEEP_MS:
        at, peer = rnd.sample(alive, 2)
        drain(chaos.views[at], chaos.now_ms)
        assert chaos.now_ms < gone_ms or not held(chaos.views[at])
        chaos.remember(at)
        chaos.ask(at, peer, 1000)
        chaos.now_ms += 20 if chaos.now_ms < gone_ms + DELAY_MS else 1000
        while chaos.replies[0].sent_ms < chaos.now_ms - DELAY_MS:
            chaos.deliver(chaos.replies.pop(0))
    for at in alive:
        drain(chaos.views[at], chaos.now_ms)
        assert {f"n{at}" for at in alive} == set(chaos.views[at].ages_ms(chaos.now_ms))


def test_a_silent_node_is_forgotten() -> None:
    """A node that used nothing stays known as long as anybody has heard of it."""
    idle, view = View("idle", 1), View("view", 1)
    for now_ms in (0, VIEW_KEEP_MS - 1):
        gossip(view, idle, now_ms)
    for now_ms, nodes in ((2 * VIEW_KEEP_MS - 2, ["view", "idle"]), (2 * VIEW_KEEP_MS - 1, ["view"])):
        drain(view, now_ms)
        assert nodes == list(view.ages_ms(now_ms))


def test_a_delta_is_bounded_and_goes_on() -> None:
    """A node that was away gets everything in replies of as few portions as the peer likes, each of a few entries."""
    for portions_max, asked in ((7, 3), (1, 21)):
        peer, away = View("peer", 1), View("away", 1)
        peer.count(USER_HOUR, 0, [(f"user{at}", 1) for at in range(1001)], 0)
        sizes = [gossip(away, peer, 0, portions_max=portions_max) for _ in range(asked)]
        assert max(sizes) <= portions_max * VIEW_PORTION_ENTRIES
        assert sum(sizes) == 1001
        assert held(peer) == held(away)


def test_a_busy_owner_does_not_keep_others_back() -> None:
    """Deltas that are always full of one owner's news still bring the others'."""
    busy, quiet, relay, asker = (View(name, 1) for name in ("busy", "quiet", "relay", "asker"))
    quiet.count(USER_HOUR, 0, [("bob", 1)], 0)
    for round in range(5):
        busy.count(USER_HOUR, 0, [(f"user{at}", round + 1) for at in range(200)], 0)
        gossip(relay, busy)
        gossip(relay, quiet)
        gossip(asker, relay, portions_max=4)
    assert asker.total(USER_HOUR, "bob") == 1


def test_what_is_told_to_many_is_gathered_once() -> None:
    """Also to those who knew less; but not what has changed since, and nothing is kept for long."""
    view = View("view", 1)
    view.count(USER_HOUR, 0, [(f"user{at}", 1) for at in range(3 * VIEW_PORTION_ENTRIES)], 0)
    first, *others = view.delta({}, 0)
    known = {"view": Known(1, first.version, None)}
    assert all(one.changes is other.changes for one, other in zip(view.delta(known, 5), others, strict=True))
    view.count(USER_HOUR, 0, [("user1", 2)], 0)
    assert [(2, "user1")] == [
        (portion.changes.entries[0][4], portion.changes.keys[0]) for portion in list(view.delta(known, 0))[2:]
    ]
    drain(view, VIEW_TOLD_MS)
    assert others[0].changes is not next(view.delta(known, VIEW_TOLD_MS)).changes


def test_relay() -> None:
    """What a node has used reaches nodes that it cannot talk to, also long after it died."""
    a, b, c = View("a", 1), View("b", 1), View("c", 1)
    a.count(USER_DAY, 0, [("alice", 5)], 0)
    gossip(b, a)
    gossip(c, b, 10 * HOUR_MS)
    assert c.usage(USER_DAY, "alice") == {"a": 5}


def test_a_gap_is_ignored() -> None:
    """Of a delta that lost a portion only what came before is taken; the next one brings the rest."""
    peer, asker = View("peer", 1), View("asker", 1)
    peer.count(USER_HOUR, 0, [(f"user{at}", 1) for at in range(3 * VIEW_PORTION_ENTRIES)], 0)
    first, second, third = peer.delta(asker.digest(0), 0)
    list(asker.merge({}, [second], 0))
    assert {"asker": 0} == asker.ages_ms(0)
    assert list(asker.merge(peer.digest(0), [first, third], 0)) == [VIEW_PORTION_ENTRIES, 0]
    assert None is asker.age_ms(0)
    assert gossip(asker, peer) == 2 * VIEW_PORTION_ENTRIES
    assert asker.age_ms(0) == 0


def test_merges_in_turns() -> None:
    """Two replies whose portions are merged alternately leave what each alone would."""
    peer, asker = View("peer", 1), View("asker", 1)
    peer.count(USER_HOUR, 0, [(f"user{at}", 1) for at in range(600)], 0)
    early = peer.digest(0), list(peer.delta({}, 0))
    peer.count(USER_HOUR, 0, [(f"user{at}", 2) for at in range(100, 500)], 0)
    late = peer.digest(0), list(peer.delta({}, 0))
    for _ in zip(asker.merge(*early, 0), asker.merge(*late, 0), strict=False):
        check(asker)
    gossip(asker, peer)
    assert held(peer) == held(asker)


def test_a_portion_may_repeat_what_is_known() -> None:
    """A late reply of a peer that has forgotten something meanwhile does not disturb the order of what is held."""
    peer, asker = View("peer", 1), View("asker", 1)
    for id, key in ((USER_DAY, "alice"), (USER_HOUR, "bob")):
        peer.count(id, 0, [(key, 1)], 0)
        gossip(asker, peer)
    peer.count(USER_DAY, 0, [("carol", 1)], 0)
    drain(peer, 2 * HOUR_MS)
    list(asker.merge(peer.digest(2 * HOUR_MS), peer.delta({}, 2 * HOUR_MS), 2 * HOUR_MS))
    check(asker)


def test_a_later_incarnation_replaces_an_earlier_one() -> None:
    """Counters that came back lower after a crash hold everywhere; what is said by the earlier self is ignored."""
    peer, third, before = View("peer", 1), View("third", 1), View("node", 1)
    before.count(USER_HOUR, 0, [("alice", 9), ("bob", 5)], 0)
    gossip(peer, before)
    gossip(third, before)
    before.count(USER_HOUR, 0, [("carol", 5)], 0)
    straggler = before.digest(0), list(before.delta({}, 0))
    after = View("node", 2)
    assert 0 == gossip(after, peer)
    after.count(USER_HOUR, 0, [("alice", 7)], 0)
    gossip(peer, after)
    gossip(peer, third)
    gossip(third, peer)
    gossip(before, peer)
    for view in (peer, third, after):
        assert {0} == set(view.merge(*straggler, 0))
        drain(view, 0)
        assert {("node", USER_HOUR, 0, "alice"): 7} == held(view)
        assert 7 == view.total(USER_HOUR, "alice")
        assert 0 == view.total(USER_HOUR, "bob")
    assert 9 == before.total(USER_HOUR, "alice")


def test_an_earlier_incarnation_says_nothing_of_a_later_one() -> None:
    """Who lacks some of a node that came back does not hear from one who knew its earlier self that nothing lacks."""
    peer, third, before, after = View("peer", 1), View("third", 1), View("node", 1), View("node", 2)
    gossip(third, before)
    after.count(USER_HOUR, 0, [(f"user{at}", 1) for at in range(300)], 0)
    gossip(peer, after, portions_max=4)
    gossip(peer, third)
    assert {"node": None, "peer": 0, "third": 0} == peer.ages_ms(0)


def test_amounts_may_fall() -> None:
    """A reset or a refund at the owner reaches the others."""
    a, b = View("a", 1), View("b", 1)
    a.count(USER_HOUR, 0, [("alice", 5), ("bob", 5)], 0)
    gossip(b, a)
    a.count(USER_HOUR, 0, [("alice", 0), ("bob", 4)], 0)
    gossip(b, a)
    assert b.top(USER_HOUR, 9) == [("bob", 4)]
    assert b.usage(USER_HOUR, "alice") == {}
    drain(b, 2 * HOUR_MS + VIEW_KEEP_MS)
    assert b.entries_held == 0


def test_ages() -> None:
    """What is known of a node is as old as the last word, from anybody, that nothing is lacking of it."""
    a, b, c = View("a", 1), View("b", 1), View("c", 1)
    assert a.ages_ms(1000) == {"a": 0}
    gossip(b, a, 1000)
    gossip(c, b, 4000)
    assert c.ages_ms(4000) == {"a": 3000, "b": 0, "c": 0}
    gossip(b, a, 5000)
    gossip(c, b, 6000)
    assert c.age_ms(6500) == 1500
    a.count(USER_HOUR, 0, [(f"user{at}", 1) for at in range(300)], 7000)
    gossip(c, a, 7000, portions_max=4)
    assert c.ages_ms(7000) == {"a": 2000, "b": 1000, "c": 0}
    gossip(c, a, 7000)
    gossip(c, b, 7000)
    assert c.ages_ms(7000) == {"a": 0, "b": 0, "c": 0}


def test_a_view_is_bounded() -> None:
    """What does not fit is refused, reported, not passed on, and fetched when there is room again."""
    peer, other, small = View("peer", 1), View("other", 1), View("small", 1, entries_max=100)
    peer.count(USER_HOUR, 0, [(f"user{at}", 1) for at in range(90)], 0)
    other.count(USER_DAY, 0, [(f"user{at}", 1) for at in range(5)], 0)
    gossip(small, peer)
    gossip(small, other)
    assert {"peer": 0, "other": 0, "small": 0} == small.ages_ms(0)
    other.count(USER_DAY, 0, [(f"user{at}", 2) for at in range(90)], 0)
    for _ in range(2):
        gossip(small, other)
    small.count(USER_HOUR, 0, [("mine", 1)], 0)
    check(small)
    assert (101, 80) == (small.entries_held, small.refused)
    assert {"peer": 0, "other": None, "small": 0} == small.ages_ms(0)
    assert {"peer", "small"} == {portion.node for portion in small.delta({}, 0)}
    for now_ms in (2 * HOUR_MS, 2 * HOUR_MS + 1):
        drain(small, now_ms)
        gossip(small, other, now_ms)
    assert held(other) == held(small)
    assert {"other": 0, "small": 0} == {node: small.ages_ms(now_ms)[node] for node in ("other", "small")}


def test_a_peer_with_another_maximum() -> None:
    """A bucket larger than it should be is passed on as it is."""
    peer, relay, asker = View("peer", 1), View("relay", 1), View("asker", 1)
    with patch.object(module, "VIEW_PORTION_ENTRIES", 300):
        peer.count(USER_HOUR, 0, [(f"user{at}", 1) for at in range(300)], 0)
        gossip(relay, peer)
    assert 300 == gossip(asker, relay)


def test_nodes_are_bounded() -> None:
    """Nodes beyond the maximum are refused."""
    view = View("view", 1)
    with patch.object(module, "VIEW_NODES_MAX", 3):
        for at in range(5):
            peer = View(f"peer{at}", 1)
            peer.count(USER_HOUR, 0, [("alice", 1)], 0)
            gossip(view, peer)
    assert (["view", "peer0", "peer1"], 3) == (list(view.ages_ms(0)), view.refused)


def test_meters_are_bounded() -> None:
    """A peer that invents limits is refused, once, beyond the maximum; what this node itself uses always fits."""
    view, peer = View("view", 1), View("peer", 1)
    with patch.object(entries_module, "VIEW_METERS_MAX", 4):
        for at in range(6):
            peer.count(USER_HOUR._replace(limit=f"limit{at}"), 0, [("alice", 1)], 0)
        gossip(view, peer)
        view.count(USER_DAY, 0, [("alice", 1)], 0)
        drain(view, 0)
        gossip(view, peer)
    assert (5, 2) == (view.entries_held, view.refused)


def test_slices_that_have_not_begun_are_ignored() -> None:
    """A peer that sends nonsense cannot make an entry stay for ever."""
    peer, view = View("peer", 1), View("view", 1)
    peer.count(USER_HOUR, 10**9, [("alice", 1)], 10**9 * MINUTE_MS)
    (portion,) = list(peer.delta({}, 0))
    list(view.merge(peer.digest(0), [portion], 0))
    assert view.entries_held == 0


def test_entries_are_invisible_to_the_garbage_collector() -> None:
    """A hundred thousand entries add few objects that the collector has to visit."""
    peer, view = View("peer", 1), View("view", 1)
    for at in range(0, 50_000, 200):
        peer.count(USER_HOUR, 0, [(f"user{at + place}", 1) for place in range(200)], 0)
        peer.count(USER_DAY, 0, [(f"user{at + place}", 1) for place in range(200)], 0)
    gc.collect()
    before = len(gc.get_objects())
    assert gossip(view, peer, portions_max=10**6) == 100_000
    drain(peer, 0)
    gc.collect()
    assert len(gc.get_objects()) - before < 1000
