"""Stories: what happens to a cluster, as text. Saved in scenarios/*.txt, made at random by chaos.py.

# comment
world nodes=3 lifetime=500 drift=10000 overdraft=0 tick=50 timeout=100 delay=5 loss=0 twice=0 seed=1 gossip=100
limit user sasl_username window=2000 max=7
+120 send n1 alice@a 1      after 120 ms a client sends to one recipient through n1
+0 cut n1 n2                n2 hears nothing from n1; `cut n1 etcd`: n1 does not see etcd
+0 heal                     nothing is cut
+0 net 30 0.1 0.2           messages take up to 30 ms, 10 % are lost, 20 % arrive twice
+0 crash n1 2               n1's power fails after two more effects
+0 stop n1                  n1 is stopped cleanly
+0 start n1                 n1 starts again if it is down
+0 pause n1 300             n1 is not scheduled for 300 ms
+0 idle n1                  n1 marks its state clean
+0 join n4                  n4 is put into the roster
+0 drain n1                 n1 is taken out of the roster, and runs on
+0 remove n1                n1 is down; the operator declares it stopped for good
+0 max user 12              the limit is changed
+0 override user alice@a 9  another max for one key: 0, 9, unlimited; `none`: as others have it again
+0 alone n1 1               n1 believes that it is cut off (overdraft), or (0) not
+0 backup n1                a copy of n1's disk
+0 restore n1               n1, which is down, is started from the copy
expect holds                or: expect broken (the last line)
"""

from __future__ import annotations

from typing import NamedTuple

from postmeter.core.meters import UNLIMITED
from tests.simulation.world import Broken, Setting, World


class Step(NamedTuple):
    """After `by_ms`, `what` with these arguments."""

    by_ms: int
    what: str
    args: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join((f"+{self.by_ms}", self.what, *self.args))


class Outcome(NamedTuple):
    """How a story ended: `broken` is "" or says what does not hold. `world` is as it was then."""

    broken: str
    world: World
    steps_done: int


def run(
    setting: Setting, steps: list[Step], world_class: type[World] = World, story: list[str] | None = None
) -> Outcome:
    """Play a story, and check after every step."""
    world = world_class(setting, story)
    done = 0
    try:
        for step in steps:
            if step.by_ms:
                world.advance(step.by_ms)
            if story is not None:
                world.note(str(step))
            play(world, step)
            world.check()
            done += 1
    except (Broken, AssertionError) as error:
        if story is not None:
            world.note(f"BROKEN: {error}")
        return Outcome(str(error) or repr(error), world, done)
    return Outcome("", world, len(steps))


_OVERRIDES = {"unlimited": UNLIMITED, "none": None}


def play(world: World, step: Step) -> None:
    """Do one thing. What makes no sense now (to crash a node that is down) does nothing."""
    what, args = step.what, step.args
    if what == "heal":
        world.cuts.clear()
    elif what == "cut":
        world.cuts.add((args[0], args[1]))
    elif what == "net":
        world.delay_ms, world.loss, world.twice = int(args[0]), float(args[1]), float(args[2])
    elif what == "join":
        world.join(args[0])
    elif what == "max":
        world.allowed.max[args[0]] = int(args[1])
    elif what == "override":
        world.allowed.override(args[0], args[1], _OVERRIDES[args[2]] if args[2] in _OVERRIDES else int(args[2]))
    elif what != "wait" and args[0] in world.hosts:
        _play_on_host(world, what, args)


def _play_on_host(world: World, what: str, args: tuple[str, ...]) -> None:
    host = world.hosts[args[0]]
    if what == "drain":
        world.drain(host.name)
    elif what == "remove":
        world.remove(host.name)
    elif what == "restore":
        host.restore_backup()
    elif what == "start":
        if not host.up:
            host.start()
    elif not host.up:
        return
    elif what == "send":
        if host.paused_until_ms <= world.t_ms:
            host.send(args[1], int(args[2]))
    elif what == "crash":
        host.fuse = int(args[1])
        if not host.fuse:
            world.note(f"{host.name} crashes")
            host.crash()
    elif what == "stop":
        host.stop()
    elif what == "pause":
        host.paused_until_ms = world.t_ms + int(args[1])
    elif what == "idle":
        host.idle()
    elif what == "alone":
        host.ledger.isolated = args[1] == "1"
    elif what == "backup":
        host.back_up()
    else:
        raise ValueError(f"unknown step: {what}")


# --- text ---------------------------------------------------------------------------------------------------------

_NAMES = {
    "nodes": "nodes",
    "lifetime": "lifetime_ms",
    "drift": "drift_ppm",
    "overdraft": "overdraft",
    "tick": "tick_ms",
    "timeout": "borrow_timeout_ms",
    "delay": "delay_ms",
    "loss": "loss",
    "twice": "twice",
    "seed": "seed",
    "gossip": "gossip_ms",
}


def write(setting: Setting, steps: list[Step], expect: str) -> str:
    """A story as text."""
    lines = ["world " + " ".join(f"{name}={getattr(setting, field)}" for name, field in _NAMES.items())]
    lines += [f"limit {name} {attribute} window={window} max={max}" for name, attribute, window, max in setting.limits]
    return "\n".join([*lines, *map(str, steps), f"expect {expect}", ""])


def read(text: str) -> tuple[Setting, list[Step], str]:
    """The setting, the steps and what is expected."""
    values: dict[str, float] = {}
    limits: list[tuple[str, str, int, int]] = []
    steps: list[Step] = []
    expect = "holds"
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if not words:
            continue
        if words[0] == "world":
            pairs = (word.split("=") for word in words[1:])
            values = {_NAMES[name]: float(value) if "." in value else int(value) for name, value in pairs}
        elif words[0] == "limit":
            limits.append((words[1], words[2], int(words[3].split("=")[1]), int(words[4].split("=")[1])))
        elif words[0] == "expect":
            expect = " ".join(words[1:])
        else:
            steps.append(Step(int(words[0]), words[1], tuple(words[2:])))
    return Setting(limits=tuple(limits), **values), steps, expect  # type: ignore[arg-type]
