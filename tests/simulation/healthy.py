"""A cluster without faults, beside one central counter: how much of `max` can be used, who is refused wrongly?

The central counter is the single node's `Meters` on the true time, asked about the same messages. A refusal is wrong if
there was room for the message from when it was asked until it was refused, counting everything admitted in a window,
one slice and the stretch for fast clocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from postmeter.core.effects import Meter
from postmeter.core.meters import Ledger
from postmeter.defaults import EXCHANGE_INTERVAL_MS
from tests.simulation.host import Host
from tests.simulation.script import Step, play
from tests.simulation.world import Setting, World

USERS = ("alice@a", "bob@a", "carol@b", "dave@b")
DELAY_MS = 1
"""One way 1 to 2 ms: four round trips are 16 ms."""


@dataclass
class Use:
    """Amounts admitted by the cluster and by the central counter; requests that had to borrow, and wrong refusals."""

    schedules: int = 0
    admitted: int = 0
    ideal: int = 0
    requests: int = 0
    wrong: int = 0
    full: int = 0

    def add(self, other: Use) -> None:
        """Take another one in."""
        for name in ("schedules", "admitted", "ideal", "requests", "wrong", "full"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def is_good(self) -> bool:
        """Whether nearly all is admitted that an ideal counter would, and hardly anybody refused wrongly."""
        return self.admitted >= 0.99 * self.ideal and self.wrong < 0.001 * self.requests

    def __str__(self) -> str:
        return (
            f"{self.schedules:,} healthy schedules, {self.full:,} reached their cap: {self.admitted:,} admitted of the"
            f" {self.ideal:,} of a central counter ({self.admitted / max(1, self.ideal):.2%}); {self.wrong} of"
            f" {self.requests:,} requests refused wrongly ({self.wrong / max(1, self.requests):.3%})"
        )


class HealthyWorld(World):
    """Counts as an ideal counter would, too."""

    patient = True

    def __init__(self, setting: Setting, story: list[str] | None = None) -> None:
        self.ideal = Ledger()
        self.ideal_admitted = 0
        self.amount_admitted = 0
        self.wrong = 0
        super().__init__(setting, story)

    def ask_ideal(self, user: str, amount: int) -> None:
        """What one central counter would do."""
        now_ms = int(self.t_ms)
        meters = [(self.ideal.open(id), key) for id, key in self.meters_of(user)]
        for each, key in meters:
            each.advance(now_ms)
            if each.usage(each.keys.row(key), now_ms) + amount > self.allowed.max_of((each.id, key)):
                return
        for each, key in meters:
            each.charge(each.keys.open(key), key, amount)
            each.fresh.clear()
        self.ideal_admitted += amount

    def admitted(self, host: Host, user: str, amount: int) -> None:
        """A node let a message through."""
        self.amount_admitted += amount
        super().admitted(host, user, amount)

    def refused(self, host: Host, user: str, amount: int, asked_ms: float) -> None:
        """A node refused a message."""
        super().refused(host, user, amount, asked_ms)
        if all(self._room(meter, asked_ms) >= amount for meter in self.meters_of(user)):
            self.wrong += 1
            self.note(f"  WRONG: there was room since {asked_ms:.0f}")

    def _room(self, meter: Meter, since_ms: float) -> int:
        window_ms = meter[0].window_ms
        counts_ms = window_ms * (1 + 1 / 60 + 3 * self.terms.drift_ppm / 1e6) + 3
        used = sum(amount for at_ms, amount in self.history.get(meter, ()) if at_ms > since_ms - counts_ms)
        return self.allowed.max_of(meter) - used

    @property
    def history(self) -> dict[Meter, list[tuple[float, int]]]:
        """Everything that was admitted on a meter."""
        return self._history

    _history: dict[Meter, list[tuple[float, int]]]

    def _count(self, meter: Meter, amount: int) -> None:
        if not hasattr(self, "_history"):
            self._history = {}
        self._history.setdefault(meter, []).append((self.t_ms, amount))
        super()._count(meter, amount)


def run(seed: int, steps: int = 600, story: list[str] | None = None) -> Use:
    """One schedule."""
    random = Random(seed)
    window_ms, max = 60_000, random.choice((1, 3, 7, 20, 60, 200))
    limits = [("user", "sasl_username", window_ms, max)]
    if random.random() < 0.3:
        limits.append(("domain", "sasl_domain", window_ms, max + random.randrange(max + 1)))
    nodes, users = random.choice((2, 3, 3, 5, 10)), USERS[: random.choice((1, 1, 2, 4))]
    setting = Setting(
        nodes,
        tuple(limits),
        lifetime_ms=window_ms // 4,
        drift_ppm=1_000,
        overdraft=0,
        tick_ms=500,
        borrow_timeout_ms=8 * 2 * DELAY_MS,
        delay_ms=DELAY_MS,
        loss=0,
        twice=0,
        seed=seed,
        gossip_ms=EXCHANGE_INTERVAL_MS if seed % 2 else 0,
    )
    world = HealthyWorld(setting, story)
    world._history = {}
    names = list(world.hosts)
    sticky, favourite = random.random() < 0.5, random.choice(names)
    pace_ms = min(2_000.0, window_ms / (max * len(users) * random.choice((0.8, 1.2, 2, 5))))
    for _ in range(steps):
        if random.random() < 0.02:
            favourite = random.choice(names)
        name = favourite if sticky else random.choice(names)
        user, amount = random.choice(users), min(max, random.choice((1, 1, 1, 1, 2, 3)))
        world.advance(random.random() * 2 * pace_ms)
        world.ask_ideal(user, amount)
        play(world, Step(0, "send", (name, user, str(amount))))
        world.check()
    world.advance(setting.borrow_timeout_ms + 200)
    requests = world.totals["admitted"] + world.totals["refused"]
    return Use(1, world.amount_admitted, world.ideal_admitted, requests, world.wrong, int(world.full))
