"""With one rule off: how soon does the simulator find a break, and what is the shortest story?

python -m tests.simulation.hunt [--upto 100] [--save] [rule ...]
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

from tests.simulation import chaos
from tests.simulation.rules import RULES, off
from tests.simulation.script import Step, run, write
from tests.simulation.shrink import shrink
from tests.simulation.world import Setting

SCENARIOS = Path(__file__).parent / "scenarios"


def find(rule: str, seeds: range, steps: int = 1_000) -> tuple[int, str, Setting, list[Step]] | None:
    """The first seed that breaks without the rule, what breaks, and its schedule."""
    with off(rule):
        for seed in seeds:
            setting, script = chaos.schedule(seed, steps)
            outcome = run(setting, script)
            if outcome.broken:
                return seed, outcome.broken, setting, script
    return None


def story(rule: str, setting: Setting, script: list[Step]) -> str:
    """The shortest story that breaks without the rule, and holds with it."""
    with off(rule):
        short = shrink(setting, script)
        broken = run(setting, short).broken
    heading = f"# Rule: {rule}\n# {RULES[rule].text}. Without it: {broken}\n"
    return heading + write(setting, short, "holds" if not run(setting, short).broken else "broken")


def main() -> int:
    """0 if every rule is needed."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.hunt")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--upto", type=int, default=100)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("rules", nargs="*")
    options = parser.parse_args()
    missed = 0
    for rule in options.rules or RULES:
        start_s = time.process_time()
        found = find(rule, range(options.first, options.upto))
        missed += not found
        seconds = time.process_time() - start_s
        print(f"{rule}: {f'seed {found[0]}: {found[1]}' if found else 'NOT FOUND'} ({seconds:.0f} s)", flush=True)
        if found and options.save:
            name = re.sub(r"[^a-z]+", "-", rule.lower()).strip("-")
            (SCENARIOS / f"{name}.txt").write_text(story(rule, found[2], found[3]))
    return missed


if __name__ == "__main__":
    sys.exit(main())
