"""After the last fault: within bounded time all rights can be used again, and nothing is kept of idle meters."""

from __future__ import annotations

from tests.simulation import chaos
from tests.simulation.script import Step, play, run
from tests.simulation.world import World


def check(seed: int, steps: int) -> str:
    """Play a schedule, end all faults, wait, and look. Returns what is wrong, or ""."""
    outcome = run(*chaos.schedule(seed, steps))
    if outcome.broken:
        return outcome.broken
    world = outcome.world
    end_faults(world)
    wait_ms = max(world.terms.wait_ms(window_ms) for _, window_ms in world.limits.values())
    world.advance(3 * wait_ms + 5_000)
    return look(world) or use_all(world)


def end_faults(world: World) -> None:
    """The network is whole, every machine that is not out of use runs, nobody believes to be alone.

    Nodes look after their loans several times in a lifetime.
    """
    world.tick_ms = max(1, min(world.tick_ms, world.terms.lifetime_ms_max // 16))
    for step in (Step(0, "heal"), Step(0, "net", ("2", "0", "0"))):
        play(world, step)
    for host in world.hosts.values():
        host.fuse = -1
        host.paused_until_ms = 0
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


def use_all(world: World) -> str:
    """One node can use the whole `max` at once."""
    name, user = world.members[0], "zoe@z"
    most = min(world.max.values())
    for _ in range(most):
        before = world.totals["admitted"]
        play(world, Step(0, "send", (name, user, "1")))
        world.advance(world.borrow_timeout_ms + 50)
        if world.totals["admitted"] == before:
            used = next(iter(world.sums[meter] for meter in world.meters_of(user)))
            return f"{name} could use {used} of {most}"
    return ""
