"""The cap holds, and can be used: random schedules, the saved stories, and every rule turned off once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.simulation import campaign, chaos, healthy, liveness
from tests.simulation.rules import RULES, off
from tests.simulation.script import read, run, write
from tests.simulation.shrink import shrink

SCENARIOS = sorted((Path(__file__).parent / "scenarios").glob("*.txt"))
SCHEDULES = 300
STEPS = 250


def first_seed() -> int:
    """The same seeds on every run, so that a red one means a change; POSTMETER_SEED chooses others.

    Other seeds each time come when the agent uses the rights: until then `make simulate` is where to look for breaks.
    """
    return int(os.environ.get("POSTMETER_SEED", 1_000))


def test_cap_holds_whatever_happens(capsys: pytest.CaptureFixture[str]) -> None:
    """No window admits more than `max` in 300 random schedules; most of them reach it exactly."""
    first = first_seed()
    report = campaign.many(range(first, first + SCHEDULES), STEPS, jobs=2)
    with capsys.disabled():
        print(f"\nseeds {first}:{first + SCHEDULES}: {report}")
    assert {} == report.broken
    assert report.full > SCHEDULES // 2


def test_all_rights_can_be_used_in_a_healthy_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    """At least 99 % of what a central counter admits is admitted; hardly anybody who waits is refused wrongly."""
    first, use = first_seed(), healthy.Use()
    for seed in range(first, first + 15):
        use.add(healthy.run(seed, 400))
    with capsys.disabled():
        print(f"\nseeds {first}:{first + 15}: {use}")
    assert use.admitted >= 0.99 * use.ideal
    assert use.wrong <= 0.002 * use.requests


def test_everything_comes_back_after_the_last_fault() -> None:
    """Within bounded time all rights can be used on any node, and nothing is kept of idle meters."""
    first = first_seed()
    for seed in range(first, first + 20):
        assert "" == liveness.check(seed, 200), f"seed {seed}"


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
