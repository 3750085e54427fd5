"""Run schedules from the command line.

python -m tests.simulation --seeds 0:10000 [--steps 1000] [--jobs 2]     chaos: does the cap hold?
python -m tests.simulation --seed 7 [--steps 1000]                       one schedule, told step by step
"""

from __future__ import annotations

import argparse
import sys

from tests.simulation import campaign, chaos
from tests.simulation.script import run


def main() -> int:
    """0 if everything held."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", default="0:300", help="from:to")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    if options.seed is not None:
        story: list[str] = []
        outcome = run(*chaos.schedule(options.seed, options.steps), story=story)
        print("\n".join(story))
        return int(bool(outcome.broken))
    first, _, last = options.seeds.partition(":")
    report = campaign.many(range(int(first), int(last)), options.steps, options.jobs, progress=True)
    print(report)
    return int(bool(report.broken))


if __name__ == "__main__":
    sys.exit(main())
