"""The cap holds, and can be used: random schedules, the saved stories, and every rule turned off once."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from postmeter.core import rights
from postmeter.core.meters import MetersId
from tests.conftest import SHOWN
from tests.simulation import campaign, chaos, cost, healthy, liveness
from tests.simulation.host import Host
from tests.simulation.rules import RULES, off
from tests.simulation.script import read, run, write
from tests.simulation.shrink import shrink
from tests.simulation.world import World

SCENARIOS = sorted((Path(__file__).parent / "scenarios").glob("*.txt"))
PARTS = 10
NEAR = 30
"""Schedules of a part that came near their cap; others do not count."""
STEPS = 500
FIRST = int(os.environ["POSTMETER_SEED"])

Show = Callable[[str, object], None]


@pytest.mark.parametrize("part", range(PARTS))
def test_cap_holds_whatever_happens(part: int, record_property: Show) -> None:
    """No window admits more than `max` in 300 random schedules that come near it; most of them reach it exactly."""
    first = FIRST + 1_000 * part
    report = campaign.many(range(first, first + 2 * NEAR), STEPS, near=NEAR)
    record_property(SHOWN, f"chaos from seed {first}: {str(report).splitlines()[0]}")
    assert not report.broken, str(report)
    assert report.near == NEAR
    assert report.full > NEAR // 2


def test_all_rights_can_be_used_in_a_healthy_cluster(record_property: Show) -> None:
    """At least 99 % of what a central counter admits is admitted; hardly anybody who waits is refused wrongly."""
    use = healthy.Use()
    for seed in range(FIRST, FIRST + 20):
        use.add(healthy.run(seed, 400))
    record_property(SHOWN, f"from seed {FIRST}: {use}")
    assert use.admitted >= 0.99 * use.ideal
    # 1,000 schedules are below 0.001; in so few, some may lie together.
    assert use.wrong <= 0.002 * use.requests


@pytest.mark.parametrize("part", range(2))
def test_everything_comes_back_after_the_last_fault(part: int) -> None:
    """Within bounded time all rights can be used on any node, all views are equal, and nothing idle is kept."""
    first = FIRST + 1_000 * part
    seeds = range(first, first + 20)
    broken = {seed: why for seed in seeds if (why := liveness.check(seed, 200))}
    assert not broken, "\n".join(campaign.told(broken, "liveness"))


class LyingWorld(World):
    """What nodes believe of others is nonsense."""

    def started(self, host: Host) -> None:
        random = Random(host.name)

        def committed(id: MetersId, key: str) -> dict[str, int]:
            return {node: random.randrange(-9, 9) for node in self.hosts if random.random() < 0.5}

        def used(id: MetersId, key: str) -> int:
            return random.randrange(9)

        host.rights.committed_seen, host.rights.used_seen = committed, used


def test_no_cap_depends_on_the_view() -> None:
    """Nodes that are told nonsense of each other ask whom they should not, and admit no more than `max`."""
    report = campaign.many(range(FIRST, FIRST + 30), 200, world_class=LyingWorld)
    assert not report.broken, str(report)


def test_what_coordination_costs(record_property: Show) -> None:
    """In small clusters an admitted message costs less than one between nodes, and all agree within a few rounds."""
    for nodes, way in ((3, "sticky"), (5, "sticky")):
        measured = cost.measure(nodes, way, windows=0.2)
        assert measured.packets < measured.admitted
        assert measured.rounds <= 3


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_saved_story(path: Path) -> None:
    """A story that once broke, or would without a rule, ends as it says."""
    setting, steps, expect = read(path.read_text())
    outcome = run(setting, steps)
    assert expect == ("broken" if outcome.broken else "holds"), outcome.broken


@pytest.mark.parametrize(
    "path", [path for path in SCENARIOS if path.read_text().startswith("# Rule: ")], ids=lambda path: path.stem
)
def test_rule_is_needed(path: Path) -> None:
    """With the rule off that the story is about, the simulator sees the break."""
    text = path.read_text()
    rule = text.splitlines()[0].removeprefix("# Rule: ")
    setting, steps, _ = read(text)
    with off(rule):
        assert run(setting, steps).broken


def test_every_rule_has_its_story() -> None:
    """Nobody adds a rule without showing what breaks without it."""
    told = {path.read_text().splitlines()[0].removeprefix("# Rule: ") for path in SCENARIOS}
    assert set(RULES) <= told


def test_theory_names_every_story() -> None:
    """The page on why the cap holds has a place for each story, and no story that does not exist."""
    theory = (Path(rights.__file__).parent / "README.md").read_text()
    assert {path.stem for path in SCENARIOS} == set(re.findall(r"\[([a-z-]+)\]", theory))


def test_same_seed_same_story() -> None:
    """A schedule is a function of its seed, to the last message."""
    stories: list[list[str]] = [[], []]
    for story in stories:
        run(*chaos.schedule(5, 200), story=story)
    assert stories[0] == stories[1]


def test_stories_survive_the_file() -> None:
    """What is written is read again as it was."""
    setting, steps = chaos.schedule(7, 50)
    assert (setting, steps, "holds") == read(write(setting, steps, "holds"))


def test_shrinking_keeps_the_break() -> None:
    """A broken story becomes much shorter and still breaks."""
    with off("returned is a total"):
        seed = next(seed for seed in range(50) if run(*chaos.schedule(seed, 200)).broken)
        setting, steps = chaos.schedule(seed, 200)
        short = shrink(setting, steps)
        assert run(setting, short).broken
    assert len(short) < len(steps) // 2
