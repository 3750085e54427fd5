"""Run the simulator from the command line.

python -m tests.simulation chaos [--seeds 0:10000] [--steps 1000]       does the cap hold, whatever happens?
python -m tests.simulation liveness [--seeds 0:1000] [--steps 200]      is all well again after the last fault?
python -m tests.simulation healthy [--seeds 0:1000] [--steps 600]       can all of `max` be used?
python -m tests.simulation cost [--nodes 2,3,5,10,30,100]               what does coordination cost?

With --seed 7 in place of --seeds one schedule is told step by step. --jobs 2: on so many processes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

from tests.simulation import campaign, chaos, cost, healthy, liveness
from tests.simulation.script import run

STEPS = {"chaos": 1_000, "liveness": 200, "healthy": 600}


def main() -> int:
    """0 if everything held."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, steps in STEPS.items():
        command = commands.add_parser(name)
        command.add_argument("--seeds", type=_seeds, default="0:1000", metavar="FROM:TO")
        command.add_argument("--seed", type=int)
        command.add_argument("--steps", type=int, default=steps)
        command.add_argument("--jobs", type=int, default=2)
    command = commands.add_parser("cost")
    command.add_argument("--nodes", type=_numbers, default=cost.NODES, metavar="N,N")
    command.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    if options.command != "cost" and options.seed is not None:
        return _tell(options.command, options.seed, options.steps)
    return COMMANDS[options.command](options)


def _seeds(text: str) -> range:
    first, _, last = text.partition(":")
    return range(int(first), int(last))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _tell(command: str, seed: int, steps: int) -> int:
    """One schedule, step by step. 1 if something is wrong."""
    story: list[str] = []
    if command == "healthy":
        result = str(healthy.run(seed, steps, story))
    elif command == "liveness":
        result = liveness.check(seed, steps, story)
    else:
        result = run(*chaos.schedule(seed, steps), story=story).broken
    print("\n".join([*story, result]))
    return int(command != "healthy" and bool(result))


def _chaos(options: argparse.Namespace) -> int:
    report = campaign.many(options.seeds, options.steps, options.jobs)
    print(report)
    return int(bool(report.broken))


def _liveness(options: argparse.Namespace) -> int:
    check = partial(_checked, steps=options.steps)
    broken = {seed: why for seed, why in campaign.spread(check, options.seeds, options.jobs) if why}
    print(f"{len(options.seeds):,} schedules of {options.steps:,} steps: after {len(broken)} something was left")
    print("\n".join(campaign.told(broken, "liveness")))
    return int(bool(broken))


def _checked(seed: int, steps: int) -> tuple[int, str]:
    return seed, liveness.check(seed, steps)


def _healthy(options: argparse.Namespace) -> int:
    use = healthy.Use()
    for other in campaign.spread(partial(healthy.run, steps=options.steps), options.seeds, options.jobs):
        use.add(other)
    print(use)
    return int(not use.is_good)


def _cost(options: argparse.Namespace) -> int:
    print(cost.HEADING)
    for line in cost.measure_all(options.nodes, options.jobs):
        print(line, flush=True)
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "chaos": _chaos,
    "liveness": _liveness,
    "healthy": _healthy,
    "cost": _cost,
}

if __name__ == "__main__":
    sys.exit(main())
