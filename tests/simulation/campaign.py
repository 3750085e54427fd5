"""Many schedules, and what they showed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import Pool
from typing import TypeVar

from tests.simulation import chaos
from tests.simulation.script import run
from tests.simulation.world import World

T = TypeVar("T")


@dataclass
class Report:
    """`broken` maps a seed to what does not hold; `near` counts schedules that came near their cap, `full` exactly."""

    schedules: int = 0
    steps: int = 0
    near: int = 0
    full: int = 0
    seconds: float = 0
    broken: dict[int, str] = field(default_factory=dict)
    totals: Counter[str] = field(default_factory=Counter)

    def add(self, other: Report) -> None:
        """Take another one in."""
        self.schedules += other.schedules
        self.steps += other.steps
        self.near += other.near
        self.full += other.full
        self.broken |= other.broken
        self.totals.update(other.totals)

    def __str__(self) -> str:
        counts = ", ".join(f"{self.totals[name]:,} {name}" for name in ("admitted", "refused", "packets"))
        faults = ", ".join(f"{count:,} {name}" for name, count in sorted(self.totals.items()) if name[0] == "+")
        lines = [
            f"{self.schedules:,} schedules of {self.steps // max(1, self.schedules):,} steps in {self.seconds:.0f} s:"
            f" {len(self.broken)} broke; {self.near:,} came near their cap, {self.full:,} reached it exactly",
            f"  {counts}",
            f"  {faults}",
        ]
        return "\n".join([*lines, *told(self.broken, "chaos")])


def told(broken: dict[int, str], command: str) -> list[str]:
    """What is wrong with which seed, and how to see it again."""
    lines = []
    for seed, why in sorted(broken.items())[:200]:
        lines += [f"  seed {seed}: {why}", f"    python -m tests.simulation {command} --seed {seed}"]
    return lines


def one(seed: int, steps: int, world_class: type[World] = World) -> Report:
    """One schedule."""
    setting, script = chaos.schedule(seed, steps)
    outcome = run(setting, script, world_class)
    world, totals = outcome.world, outcome.world.totals
    totals.update(f"+{step.what}" for step in script[: outcome.steps_done] if step.what not in ("send", "wait", "heal"))
    broken = {seed: f"step {outcome.steps_done} of {steps}: {outcome.broken}"} if outcome.broken else {}
    return Report(1, outcome.steps_done, int(world.near), int(world.full), 0, broken, totals)


def many(
    seeds: Iterable[int], steps: int, jobs: int = 1, near: int | None = None, world_class: type[World] = World
) -> Report:
    """All these seeds; with `near` no more than until so many came near their cap."""
    report, start_s = Report(), time.monotonic()
    for result in spread(partial(one, steps=steps, world_class=world_class), seeds, jobs):
        report.add(result)
        for seed, why in result.broken.items():
            print(f"seed {seed} broke: {why}", flush=True)
        if near is not None and report.near >= near:
            break
    report.seconds = time.monotonic() - start_s
    return report


def spread(act: Callable[[int], T], seeds: Iterable[int], jobs: int) -> Iterator[T]:
    """What `act` makes of each seed, on so many processes, with a sign of life now and then."""
    if jobs == 1:
        yield from map(act, seeds)
        return
    with Pool(jobs) as pool:
        for count, result in enumerate(pool.imap_unordered(act, seeds, chunksize=4), 1):
            yield result
            if not count % 500:
                print(f"{count:,} done", flush=True)
