"""What live meters cost: resident memory, and latency with a million of them against a thousand.

A meter is one limit applied to one key. Users are walked through in order, each with one message at END-OF-MESSAGE, so
that every user has two meters (hour, day) and every domain one. All of that goes through the agent's socket.

Memory is VmRSS after filling less VmRSS before, divided by the meters added. "Before" is the same agent after it has
charged a few meters REPEATS times: so the program, its connections, and the requests that it remembers for Postfix's
repeats are not counted as meters. How many slices of its window a meter was used in matters: each is one more amount to
keep. So it is measured in one pass with windows of 1 h and 24 h (one slice, or two where a slice ended meanwhile), and
in several passes with windows so short that every pass of a user falls into a slice of its own.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from .compare import Asked, Plan, Row, measure, progress, subdirectory
from .load import Population, generate
from .servers import HIGH, Limits, Server, start_agent

FEW = Population(users=450, domains=100)
# So many touch all pages of the table in which the agent remembers charged requests.
REPEATS = 120_000
CONNECTIONS = 64
# Of a window, whatever its length.
SLICES = 60


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident bytes of an agent before and after `added` of its `live` meters, each used in at least `slices` slices.

    The meters of domains, one in a thousand, are used in more.
    """

    live: int
    added: int
    slices: int
    windows_s: tuple[int, int]
    fill_s: float
    resident_before: int
    resident_after: int
    resident_max: int

    @property
    def bytes_per_meter(self) -> float:
        """What one more live meter costs, its key and its place in every table included."""
        return (self.resident_after - self.resident_before) / self.added


def measure_meters(directory: Path, load: Path, plan: Plan) -> tuple[list[Memory], list[Row]]:
    """Memory in one pass and in several; and latency beside an agent with FEW meters, in turn, round after round."""
    many = population(plan.meters)
    short = replace(HIGH, hour_s=plan.window_s, day_s=2 * plan.window_s)
    with (
        start_agent(subdirectory(directory, "few"), HIGH) as agent_few,
        _filled(subdirectory(directory, "many"), load, plan, HIGH, 1) as (agent_many, one_slice),
    ):
        _walk(agent_few, load, FEW)
        rows = _latency({FEW: agent_few, many: agent_many}, load, plan)
    with _filled(subdirectory(directory, "short"), load, plan, short, plan.slices) as (_, several_slices):
        pass
    return [one_slice, several_slices], rows


def population(meters: int) -> Population:
    """Users and domains that have so many meters, 500 users to a domain."""
    domains = max(FEW.domains, meters // 1_000)
    return Population(users=(meters - domains) // 2, domains=domains)


@contextlib.contextmanager
def _filled(directory: Path, load: Path, plan: Plan, limits: Limits, slices: int) -> Iterator[tuple[Server, Memory]]:
    """An agent with plan.meters live meters, and what they cost."""
    many = population(plan.meters)
    first = replace(many, users=FEW.users)
    with start_agent(directory, limits) as server:
        progress(f"{many.meters:,} meters, slices used: {slices}")
        _walk(server, load, first, requests=min(REPEATS, many.meters))
        time.sleep(plan.settle_s)
        before = server.resident_bytes()
        fill_s = 0.0
        for number in range(slices):
            pass_s = _walk(server, load, many)
            fill_s += pass_s
            if number + 1 < slices:
                time.sleep(max(0.0, limits.day_s / SLICES - pass_s))
        time.sleep(plan.settle_s)
        yield (
            server,
            Memory(
                live=many.meters,
                added=many.meters - first.meters,
                slices=slices,
                windows_s=(limits.hour_s, limits.day_s),
                fill_s=fill_s,
                resident_before=before,
                resident_after=server.resident_bytes(),
                resident_max=server.resident_bytes_max(),
            ),
        )


def _walk(server: Server, load: Path, people: Population, requests: int = 0) -> float:
    """A message from every user in turn; returns how many seconds it took."""
    count = requests or people.users
    return generate(load, server.targets["inet"], connections=CONNECTIONS, people=people, requests=count).seconds


def _latency(agents: dict[Population, Server], load: Path, plan: Plan) -> list[Row]:
    """Rows named by the number of meters, the users drawn uniformly from all that have some."""
    rows = []
    for connections in plan.connections:
        pairs = []
        for people, agent in agents.items():
            name = f"{people.meters:,} live meters"
            pairs.append((Asked(name, agent, "inet", agent.stage, people), Row(name, "inet", agent.stage, connections)))
        for number in range(plan.rounds):
            progress(f"few and many meters, connections: {connections}, round {number + 1} of {plan.rounds}")
            for asked, row in pairs if number % 2 else reversed(pairs):
                measure(asked, row, load, plan, number)
        rows += [row for _, row in pairs]
    return rows
