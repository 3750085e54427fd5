"""Many runs of clusters under faults, and a table of them: make cluster-test.

    python -m tests.cluster [--seeds 3] [--jobs 4] [--only FAULT] [--nodes 3,5]

Exit status 1 if the cap was broken in any of them, or anything else that must hold did not.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed

from .campaign import Result, Run, carry_out, table
from .faults import FAULTS
from .network import unavailable

# Small and large shares, short windows and longer ones; by seed.
KINDS = ((60, 12), (300, 12), (17, 6))


def main() -> int:
    """Parse the command line, carry out all runs, print what came of them."""
    parser = argparse.ArgumentParser(description="clusters under faults")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each fault and size")
    parser.add_argument("--jobs", type=int, default=4, help="clusters at a time")
    parser.add_argument("--only", choices=("none", *FAULTS), help="this fault only")
    parser.add_argument("--nodes", default="3,5", help="sizes of clusters")
    args = parser.parse_args()
    why_not = unavailable()
    if why_not is not None:
        print(why_not, file=sys.stderr)
        return 2
    faults = (args.only,) if args.only else ("none", *FAULTS)
    runs = [
        Run(fault, nodes, seed, *KINDS[seed % len(KINDS)])
        for seed in range(1, args.seeds + 1)
        for nodes in map(int, args.nodes.split(","))
        for fault in faults
    ]
    results = []
    with ProcessPoolExecutor(args.jobs, max_tasks_per_child=1) as pool:
        for future in as_completed([pool.submit(carry_out, run) for run in runs]):
            results.append(future.result())
            print(_line(results[-1]), flush=True)
    results.sort(key=lambda result: runs.index(result.run))
    print(table(results))
    return int(any(result.problems for result in results))


def _line(result: Result) -> str:
    run = result.run
    verdicts = " ".join(f"{verdict}={count}" for verdict, count in sorted(result.verdicts.items()))
    facts = (
        f"{run.fault} nodes={run.nodes} seed={run.seed} max={run.max} window={run.window_s}s "
        f"most={result.most_percent:.0f}% {verdicts} refused_wrongly={result.refused_wrongly} "
        f"longest={result.longest_ms:.0f}ms equal={result.equal_s} usable={result.usable_s}"
    )
    return "\n    ".join([facts, *result.problems])


if __name__ == "__main__":
    sys.exit(main())
