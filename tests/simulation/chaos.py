"""Schedules at random: a setting and a list of steps, both a function of the seed."""

from __future__ import annotations

from random import Random

from tests.simulation.script import Step
from tests.simulation.world import Setting

USERS = ("alice@a", "bob@a", "carol@b", "dave@b", "erin@c", "frank@c", "grace@c", "heidi@d")


def schedule(seed: int, steps: int) -> tuple[Setting, list[Step]]:
    """What a seed means."""
    random = Random(seed)
    setting, pace_ms, users = _setting(random, seed)
    return setting, _Chaos(random, setting, pace_ms, users).steps(steps)


def _setting(random: Random, seed: int) -> tuple[Setting, int, int]:
    window_ms = random.choice((500, 2_000, 5_000))
    max_first = random.choice((1, 2, 3, 7, 20, 60))
    users = random.choice((1, 1, 2, 4, 8))
    pace_ms = min(150, int(window_ms / (max_first * users * random.choice((0.7, 1, 2, 4)))) or 2)
    limits = [("user", "sasl_username", window_ms, max_first)]
    if random.random() < 0.4:
        limits.append(
            (
                "domain",
                "sasl_domain",
                random.choice((window_ms, 2 * window_ms)),
                max_first + random.randrange(max_first + 3),
            )
        )
    setting = Setting(
        nodes=random.choice((2, 2, 3, 3, 4, 5)),
        limits=tuple(limits),
        lifetime_ms=random.choice((window_ms // 8, window_ms // 4, window_ms // 2, window_ms)),
        drift_ppm=random.choice((1_000, 10_000, 50_000)),
        overdraft=random.choice((0, 0, 0, 0, 0.25)),
        tick_ms=min(300, max(20, pace_ms * random.choice((1, 3, 10)))),
        borrow_timeout_ms=random.choice((50, 250)),
        delay_ms=random.choice((2, 20, 100)),
        loss=random.choice((0, 0.05, 0.3)),
        twice=random.choice((0, 0, 0.2)),
        seed=seed,
        # No draw, and not in all: gossip takes half as much time again, and most rules are broken without it.
        gossip_ms=0 if seed % 4 else window_ms // (3, 10)[seed // 4 % 2],
    )
    return setting, pace_ms, users


class _Chaos:
    def __init__(self, random: Random, setting: Setting, pace_ms: int, users: int) -> None:
        self.random = random
        self.setting = setting
        self.names = [f"n{number}" for number in range(1, setting.nodes + 1)]
        self.sticky = random.random() < 0.5
        self.favourite = self.names[0]
        self.users = USERS[:users]
        self.pace_ms = pace_ms
        self.trouble = random.choice((0.01, 0.02, 0.05))
        self.faults = random.choice(_THEMES)
        self.due: list[tuple[int, Step]] = []

    def steps(self, count: int) -> list[Step]:
        """So many steps."""
        random = self.random
        steps: list[Step] = []
        t_ms = 0
        while len(steps) < count:
            while self.due and self.due[0][0] <= t_ms:
                steps.append(self.due.pop(0)[1])
            if random.random() < self.trouble:
                for fault in random.choice(self.faults)(self):
                    if isinstance(fault, Step):
                        steps.append(fault)
                    else:
                        self.due.append((t_ms + fault[0], fault[1]))
                self.due.sort(key=lambda due: due[0])
            if random.random() < 0.01:
                self.favourite = random.choice(self.names)
            name = self.favourite if self.sticky and random.random() < 0.95 else random.choice(self.names)
            amount = random.choice((1, 1, 1, 1, 1, 2, 3))
            by_ms = random.randrange(2 * self.pace_ms + 1)
            t_ms += by_ms
            steps.append(Step(by_ms, "send", (name, random.choice(self.users), str(amount))))
        return steps[:count]

    def later(self, step: Step, up_to_ms: int) -> tuple[int, Step]:
        """The step, some time from now."""
        return self.random.randrange(up_to_ms + 1), step

    def span_ms(self) -> int:
        """A time that is long or short for a loan."""
        window_ms, lifetime_ms = self.setting.limits[0][2], self.setting.lifetime_ms
        return self.random.choice((50, lifetime_ms // 2, lifetime_ms, window_ms, window_ms + 2 * lifetime_ms))

    def name(self) -> str:
        """Any node."""
        return self.random.choice(self.names)

    def cut(self) -> Faults:
        random = self.random
        ends = [*self.names, "etcd"]
        part = random.random()
        pairs = [(a, b) for a in self.names for b in ends if a != b and random.random() < part]
        cuts = [Step(0, "cut", pair) for pair in pairs]
        return [Step(0, "heal"), *cuts, self.later(Step(0, "heal"), self.span_ms())]

    def cut_off(self) -> Faults:
        name = self.name()
        pairs = [pair for other in self.names if other != name for pair in ((name, other), (other, name))]
        if self.random.random() < 0.5:
            pairs.append((name, "etcd"))
        self.favourite = self.random.choice((name, self.name()))
        cuts = [Step(0, "cut", pair) for pair in pairs]
        return [*cuts, self.later(Step(0, "heal"), self.span_ms())]

    def heal(self) -> Faults:
        return [Step(0, "heal")]

    def crash(self) -> Faults:
        name = self.name()
        return [*self.crash_of(name), self.later(Step(0, "start", (name,)), self.span_ms())]

    def crash_busy(self) -> Faults:
        name = self.name()
        self.favourite = name
        return [*self.crash_of(name), *self.busy(name, 4), self.later(Step(0, "start", (name,)), 300)]

    def crash_lender(self) -> Faults:
        """Somebody else asks while the fuse burns."""
        name, other = self.name(), self.name()
        start = self.later(Step(0, "start", (name,)), 100)
        return [*self.crash_of(name), *self.busy(other, 4), start, self.later(Step(0, "start", (name,)), 300)]

    def crash_of(self, name: str) -> list[Step]:
        return [Step(0, "crash", (name, str(self.random.choice((0, 1, 2, 3, 4, 6)))))]

    def busy(self, name: str, count: int) -> list[Step]:
        return [
            Step(self.random.choice((0, 1, 3)), "send", (name, self.random.choice(self.users), "1"))
            for _ in range(count)
        ]

    def stop(self) -> Faults:
        name = self.name()
        return [Step(0, "stop", (name,)), self.later(Step(0, "start", (name,)), self.span_ms())]

    def start(self) -> Faults:
        return [Step(0, "start", (name,)) for name in self.names]

    def pause(self) -> Faults:
        return [Step(0, "pause", (self.name(), str(self.span_ms())))]

    def idle(self) -> Faults:
        return [Step(0, "idle", (self.name(),))]

    def join(self) -> Faults:
        name = f"n{len(self.names) + 1}"
        self.names.append(name)
        return [Step(0, "join", (name,))]

    def drain(self) -> Faults:
        name = self.name()
        return [Step(0, "drain", (name,)), *self.join()]

    def remove(self) -> Faults:
        """One goes, another one comes, and the first may come back."""
        name = self.name()
        steps: Faults = [Step(0, "remove", (name,)), *self.join()]
        if self.random.random() < 0.5:
            if self.random.random() < 0.7:
                steps.append(Step(0, "cut", (name, "etcd")))
            steps.append(self.later(Step(0, "start", (name,)), self.span_ms()))
            self.favourite = name
        return steps

    def change(self) -> Faults:
        random = self.random
        name, _, _, max_first = random.choice(self.setting.limits)
        value = max(1, max_first + random.choice((-5, -1, 0, 1, 5, max_first, -max_first // 2)))
        return [Step(0, "max", (name, str(value)))]

    def override(self) -> Faults:
        """One key has another max, the same as the others again, or soon."""
        random = self.random
        name, attribute, _, max_first = random.choice(self.setting.limits)
        user = random.choice(self.users)
        key = user if attribute == "sasl_username" else user.partition("@")[2]
        value = max(0, max_first + random.choice((-5, -1, 1, 5, max_first, -max_first // 2)))
        words = (str(value), str(value), str(value), "none", "none", "0", "unlimited")
        steps: Faults = [Step(0, "override", (name, key, random.choice(words)))]
        if random.random() < 0.5:
            steps.append(self.later(Step(0, "override", (name, key, random.choice(words))), self.span_ms()))
        return steps

    def alone(self) -> Faults:
        return [Step(0, "alone", (self.name(), self.random.choice("01")))]

    def backup(self) -> Faults:
        name = self.name()
        steps: Faults = [Step(0, "backup", (name,)), self.later(Step(0, "crash", (name, "0")), 400)]
        return [*steps, (401, Step(0, "restore", (name,))), self.later(Step(0, "start", (name,)), 1_000)]

    def net(self) -> Faults:
        random = self.random
        words = (random.choice(("2", "20", "200")), random.choice(("0", "0.05", "0.5")), random.choice(("0", "0.3")))
        return [Step(0, "net", words)]

    def quiet(self) -> Faults:
        """Nobody sends for a while."""
        return [Step(self.random.choice((100, 500, self.setting.lifetime_ms)), "wait")]


Faults = list[Step | tuple[int, Step]]
"""Steps, and steps to be made later: (when, from now, in ms)."""

_LOANS = [_Chaos.cut_off, _Chaos.cut_off, _Chaos.cut, _Chaos.heal, _Chaos.pause, _Chaos.net, _Chaos.quiet]
_CRASHES = [_Chaos.crash, _Chaos.crash_busy, _Chaos.crash_lender, _Chaos.stop, _Chaos.idle, _Chaos.start]
_ROSTER = [_Chaos.join, _Chaos.drain, _Chaos.remove]
_REST = [_Chaos.change, _Chaos.override, _Chaos.override, _Chaos.alone, _Chaos.backup]
_THEMES = [
    [*_LOANS, _Chaos.alone],
    _CRASHES,
    [*_CRASHES, *_LOANS],
    [*_ROSTER, *_LOANS],
    [*_ROSTER, *_CRASHES],
    [*_ROSTER, _Chaos.crash_busy, _Chaos.crash_lender],
    [*_ROSTER, _Chaos.change, _Chaos.override, _Chaos.override, _Chaos.cut_off],
    [_Chaos.change, _Chaos.override, _Chaos.cut_off, _Chaos.crash],
    [*_LOANS, *_CRASHES, *_ROSTER, *_REST],
    [*_LOANS, *_CRASHES, *_ROSTER, *_REST, *_REST],
]
