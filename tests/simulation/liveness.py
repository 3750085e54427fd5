"""After the last fault: is all well again, within bounded time, and is everything forgotten?

All rights can be used; all views are equal, and equal to what was used; nothing is kept of idle meters, and in the end
the views hold what they held when they began.
"""

from __future__ import annotations

from postmeter.core.entries import slice_ms
from postmeter.core.meters import MetersId
from postmeter.defaults import VIEW_KEEP_MS, VIEW_LOANS_MS
from tests.simulation import chaos
from tests.simulation.gossip import Gossip
from tests.simulation.host import Host
from tests.simulation.script import Step, play, run
from tests.simulation.world import World

Entry = tuple[str, MetersId, int, str]
"""Node, meters, slice and key."""


def check(seed: int, steps: int, story: list[str] | None = None) -> str:
    """Play a schedule, end all faults, wait, and look. Returns what is wrong, or ""."""
    setting, script = chaos.schedule(seed, steps)
    setting = setting._replace(gossip_ms=setting.limits[0][2] // (3, 10)[seed % 2])
    outcome = run(setting, script, story=story)
    if outcome.broken:
        return outcome.broken
    world = outcome.world
    end_faults(world)
    world.advance(max(0, world.under_way_ms))
    news = tell_news(world)
    if news:
        return news
    wait_ms = max(world.terms.stopped_wait_ms(window_ms) for _, window_ms in world.limits.values())
    world.advance(3 * wait_ms + 5_000)
    return look(world) or look_at_views(world) or use_all(world) or forget_all(world)


def end_faults(world: World) -> None:
    """The network is whole, every machine that is not out of use runs, nobody believes to be alone.

    Nodes look after their loans several times in a lifetime.
    """
    world.tick_ms = max(1, min(world.tick_ms, world.terms.loan_ms // 16))
    for step in (Step(0, "heal"), Step(0, "net", ("2", "0", "0"))):
        play(world, step)
    for host in world.hosts.values():
        host.fuse = -1
        host.paused_until_ms = 0
        host.next_tick_ms = min(host.next_tick_ms, world.t_ms + world.tick_ms)
        if not host.up and host.name not in world.stopped:
            host.start()
        if host.up:
            host.ledger.isolated = False


def look(world: World) -> str:
    """What is left of a cluster that should be at rest."""
    for name in world.members:
        rights = world.hosts[name].rights
        if rights.roster.generation != max(world.generations):
            return f"{name} has adopted generation {rights.roster.generation} of {max(world.generations)}"
        if rights.books or rights.owed or rights.questions:
            return f"{name} keeps {rights.books} {rights.owed} {rights.questions}"
        for meters in rights.ledger.meters.values():
            if meters.keys.rows or any(meters.used):
                return f"{name} keeps {meters.keys.rows}"
        records = [
            where for where in world.hosts[name].disk.records if isinstance(where, tuple) and where[0] != "before"
        ]
        if records:
            return f"{name} keeps {records} on its disk"
    return ""


# --- views --------------------------------------------------------------------------------------------------------


def tell_news(world: World) -> str:
    """What nodes have used is known to all when every pair of them has had its turn; one of them starts anew before."""
    hosts = {name: host for name, host in world.hosts.items() if host.up and name not in world.stopped}
    for name in hosts:
        play(world, Step(0, "send", (name, "zoe@z", "1")))
    world.advance(world.borrow_timeout_ms + 2 * world.tick_ms)
    for what in ("stop", "start"):
        play(world, Step(0, what, (min(hosts),)))
    told = {name: _gossip(host).view.digest(host.now_ms())[name] for name, host in hosts.items()}
    rounds = 2 * -(-len(hosts) // world.gossip_peers_max)
    world.advance(rounds * world.gossip_ms * (1 + 2 * world.terms.drift_ppm / 1e6) + 10)
    used = {entry: left_ms for host in hosts.values() for entry, left_ms in _charged(host).items()}
    for name, host in hosts.items():
        view, now_ms = _gossip(host).view, host.now_ms()
        digest = view.digest(now_ms)
        for other, known in told.items():
            if other not in digest or digest[other][:2] < known[:2]:
                return f"{name} does not know {known} of {other} after {rounds} rounds: {digest.get(other)}"
        held = {entry[:4]: entry[4] for entry in view.entries() if entry[1].limit in world.limits}
        for entry, (amount, left_ms) in used.items():
            late_ms = 5 + 3 * world.terms.stretch_ms(entry[1].window_ms + slice_ms(entry[1]))
            if left_ms > late_ms and held.get(entry) != amount:
                return f"{name} takes {entry} for {held.get(entry)}, it is {amount}"
    return ""


def _gossip(host: Host) -> Gossip:
    assert host.gossip is not None
    return host.gossip


def _charged(host: Host) -> dict[Entry, tuple[int, int]]:
    """What a node has used in a slice, and how long others count that."""
    now_ms = host.now_ms()
    return {
        (host.name, id, number, key): (amount, (number + 1) * slice_ms(id) + id.window_ms - now_ms)
        for id, meters in host.ledger.meters.items()
        for key, row in meters.keys.rows.items()
        for number, amount in meters.slices(row, now_ms)
    }


def look_at_views(world: World) -> str:
    """All members hold the same of everybody, the dead included, and nothing of the windows."""
    views = {name: _gossip(world.hosts[name]).view for name in world.members}
    digests = {}
    for name, view in views.items():
        digest = view.digest(world.hosts[name].now_ms())
        digests[name] = {node: known[:2] for node, known in sorted(digest.items())}
        left = [entry for entry in view.entries() if entry[1].window_ms != VIEW_LOANS_MS]
        if left:
            return f"{name} keeps {left}"
    return "" if len({str(digest) for digest in digests.values()}) == 1 else f"views differ: {digests}"


def forget_all(world: World) -> str:
    """Long after, a view holds no more than when it began: the nodes that are alive."""
    for _ in range(2):
        world.skip(VIEW_KEEP_MS + VIEW_LOANS_MS)
        world.advance(4 * world.gossip_ms + 2 * world.tick_ms)
    alive = sorted(host.name for host in world.hosts.values() if host.up and host.name not in world.stopped)
    for name in world.members:
        host = world.hosts[name]
        view = _gossip(host).view
        if view.entries_held or sorted(view.ages_ms(host.now_ms())) != alive:
            return f"the view of {name} keeps {list(view.entries())} of {view.ages_ms(host.now_ms())}"
    return ""


# --- rights -------------------------------------------------------------------------------------------------------


def use_all(world: World) -> str:
    """One node can use the whole `max` at once."""
    name, user = world.members[0], "zoe@z"
    most = min(world.allowed.max.values())
    for _ in range(most):
        before = world.totals["admitted"]
        play(world, Step(0, "send", (name, user, "1")))
        world.advance(world.borrow_timeout_ms + 50)
        if world.totals["admitted"] == before:
            used = next(iter(world.sums[meter] for meter in world.meters_of(user)))
            return f"{name} could use {used} of {most}"
    return ""
