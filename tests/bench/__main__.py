"""Command line of the bench. See the package's docstring.

Exit: 0 measured, whatever came out; 1 the bench could not run; 2 usage.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from .compare import FULL, QUICK, compare, progress, show_limits
from .decision import measure_decisions
from .load import BenchError, build
from .meters import measure_meters, population
from .neighbours import measure_neighbours
from .report import Result, markdown, table, write_json

BUILD = Path(__file__).resolve().parents[2] / "build"
PARTS = ("limits", "compare", "meters", "decision", "neighbours")


def main() -> int:
    """Measure what was asked for, print it, and keep it as JSON."""
    arguments = _arguments()
    # A terminated bench ends its servers, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    plan = QUICK if arguments.quick else FULL
    plan = dataclasses.replace(plan, rounds=arguments.rounds or plan.rounds, seconds=arguments.seconds or plan.seconds)
    result = Result(plan)
    # /var/tmp is on disk where /tmp is not: databases and state are to be where they would be.
    with TemporaryDirectory(prefix="postmeter-bench-", dir="/var/tmp") as name:
        directory = Path(name)
        try:
            binaries = build(BUILD / "bench")
            if "limits" in arguments.only:
                result.shown = show_limits(directory, binaries)
            if "compare" in arguments.only:
                result.rows, result.resident = compare(directory, binaries, plan)
            if "meters" in arguments.only:
                result.memory, result.live = measure_meters(directory, binaries / "load", plan)
            if "decision" in arguments.only:
                progress("the decision alone")
                result.decisions = measure_decisions(population(plan.meters), plan.decisions_s)
            if "neighbours" in arguments.only:
                progress("the agent beside peers that push")
                result.neighbours = measure_neighbours(directory, binaries / "load", plan.seconds, plan.rounds)
        except BenchError as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
        write_json(result, arguments.json, directory)
    for_readme = arguments.json.with_suffix(".md")
    for_readme.write_text(markdown(result))
    print(markdown(result) if arguments.markdown else table(result))
    progress(f"all figures are in {arguments.json}, the README's tables in {for_readme}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests.bench", description="The agent beside an echo server and its peers.")
    parser.add_argument("--quick", action="store_true", help="short runs that only show that the bench works")
    parser.add_argument(
        "--markdown", action="store_true", help="print the README's tables, which are also put beside the JSON"
    )
    parser.add_argument("--rounds", type=int, help="how often every server is asked")
    parser.add_argument("--seconds", type=float, help="how long every time")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument(
        "--json", type=Path, default=BUILD / "bench.json", metavar="FILE", help="where figures are kept"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
