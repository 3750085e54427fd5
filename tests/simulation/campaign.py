"""Many schedules, and what they showed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import Pool

from tests.simulation import chaos
from tests.simulation.script import run
from tests.simulation.world import World


@dataclass
class Report:
    """`broken` maps a seed to what does not hold; `full` counts schedules that reached their cap exactly."""

    schedules: int = 0
    steps: int = 0
    full: int = 0
    seconds: float = 0
    broken: dict[int, str] = field(default_factory=dict)
    totals: Counter[str] = field(default_factory=Counter)

    def add(self, other: Report) -> None:
        """Take another one in."""
        self.schedules += other.schedules
        self.steps += other.steps
        self.full += other.full
        self.broken |= other.broken
        self.totals.update(other.totals)

    def __str__(self) -> str:
        counts = ", ".join(f"{self.totals[name]:,} {name}" for name in ("admitted", "refused", "packets"))
        faults = ", ".join(f"{count:,} {name}" for name, count in sorted(self.totals.items()) if name[0] == "+")
        lines = [
            f"{self.schedules:,} schedules of {self.steps // max(1, self.schedules):,} steps in {self.seconds:.0f} s:"
            f" {len(self.broken)} broke, {self.full:,} reached their cap exactly",
            f"  {counts}",
            f"  {faults}",
        ]
        return "\n".join([*lines, *(f"  seed {seed}: {why}" for seed, why in sorted(self.broken.items())[:20])])


def one(seed: int, steps: int, world_class: type[World] = World) -> Report:
    """One schedule."""
    setting, script = chaos.schedule(seed, steps)
    outcome = run(setting, script, world_class)
    totals = outcome.world.totals
    totals.update(f"+{step.what}" for step in script[: outcome.steps_done] if step.what not in ("send", "wait", "heal"))
    broken = {seed: f"step {outcome.steps_done}: {outcome.broken}"} if outcome.broken else {}
    return Report(1, outcome.steps_done, int(outcome.world.full), 0, broken, totals)


def many(seeds: range, steps: int, jobs: int = 1, progress: bool = False) -> Report:
    """All seeds, on so many processes."""
    report, start_s = Report(), time.monotonic()
    for result in _results(seeds, steps, jobs):
        report.add(result)
        if progress and report.schedules % 500 == 0:
            print(f"{report.schedules:,} of {len(seeds):,}, {len(report.broken)} broken", flush=True)
    report.seconds = time.monotonic() - start_s
    return report


def _results(seeds: range, steps: int, jobs: int) -> Iterator[Report]:
    if jobs == 1:
        yield from (one(seed, steps) for seed in seeds)
        return
    with Pool(jobs) as pool:
        yield from pool.imap_unordered(_one, ((seed, steps) for seed in seeds), chunksize=4)


def _one(args: tuple[int, int]) -> Report:
    return one(*args)
