"""The servers side by side: that they limit at all, and then what they do under the same load.

    shown = show_limits(directory, binaries)                    # one Shown for each server
    rows, resident = compare(directory, binaries, plan)         # one Row for each server, transport and connections

`compare` keeps all servers running and lets each answer in turn: for every round, for every number of connections, for
every server, in an order that turns by one from round to round. Generator and server have a core each. For one
connection the echo server and the agent are measured on one core together, too: there a request costs what both sides
compute, while between two cores most of the time is taken by waking the other one up.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from .load import EVERYBODY, LOAD_CORE, SERVER_CORE, BenchError, Population, Run, generate
from .servers import (
    HIGH,
    POSTFWD_VARIANTS,
    SMALL,
    Cpu,
    Limits,
    Server,
    start_agent,
    start_echo,
    start_policyd_rate_limit,
    start_postfwd,
)

AGENT = "postmeter"
LOOKS = "postmeter, looks at RCPT"
SAME_CORE = ", same core"
ECHO = "echo (C)"
ON_DISK = "policyd-rate-limit, disk"
ON_TMPFS = "policyd-rate-limit, tmpfs"
PEERS = (*POSTFWD_VARIANTS, ON_DISK, ON_TMPFS)

Starter = Callable[[Path, Limits], AbstractContextManager[Server]]


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how much: every server is asked for `seconds` at each of `connections`, `rounds` times.

    Memory is measured with so many live `meters`, with one slice each, and with `slices` of them in windows of
    `window_s`; `settle_s` is for the last flush, and for what the allocator gives back after it.
    """

    rounds: int
    seconds: float
    warmup_s: float
    connections: tuple[int, ...]
    meters: int
    slices: int
    window_s: int
    settle_s: float
    decisions_s: float


# A slice is a sixtieth of a window. Three passes of up to a minute, each in a slice of its own, stay within 300 s.
FULL = Plan(3, 1.2, 0.2, (1, 16, 64), 1_000_000, 3, 300, 2.0, 3.0)
QUICK = Plan(1, 0.15, 0.05, (1, 16), 10_000, 2, 30, 0.2, 0.3)


@dataclass(frozen=True, slots=True)
class Shown:
    """A server refused request number `refused_at` of one user, whose limit is SMALL.user_hour, with `reply`."""

    server: str
    stage: str
    max: int
    refused_at: int
    reply: str

    @property
    def limits(self) -> bool:
        """Whether it refused exactly the first request that was one too many."""
        return self.refused_at == self.max + 1


@dataclass(slots=True)
class Row:
    """One server on one transport at so many connections: its runs, one a round, and what 1,000 requests cost."""

    server: str
    transport: str
    stage: str
    connections: int
    runs: list[Run] = field(default_factory=list)
    cpu_per_1000: list[Cpu] = field(default_factory=list)

    def figure(self, name: str) -> float:
        """The median of a figure over the rounds."""
        return median(float(getattr(run, name)) for run in self.runs)

    def cpu_s(self, name: str) -> float:
        """The median of CPU seconds for 1,000 requests: user_s, system_s, others_s or all_s."""
        return median(float(getattr(cpu, name)) for cpu in self.cpu_per_1000)

    def quantile_us(self, name: str, part: float) -> float | None:
        """The median of a latency; None where a run has too few requests to have such a quantile."""
        if min(run.requests for run in self.runs) * (1 - part) < 1:
            return None
        return self.figure(name)


@dataclass(frozen=True, slots=True)
class Asked:
    """A server to be asked on one transport, at one stage, by whom, from which core; `name` is the row's."""

    name: str
    server: Server
    transport: str
    stage: str
    people: Population = EVERYBODY
    core: int = LOAD_CORE


def starters() -> dict[str, Starter]:
    """The servers that limit, by name."""

    def on_disk(directory: Path, limits: Limits) -> AbstractContextManager[Server]:
        return start_policyd_rate_limit(directory, directory, ON_DISK, limits)

    @contextlib.contextmanager
    def on_tmpfs(directory: Path, limits: Limits) -> Iterator[Server]:
        with (
            TemporaryDirectory(prefix="postmeter-bench-", dir="/dev/shm") as memory,
            start_policyd_rate_limit(directory, Path(memory), ON_TMPFS, limits) as server,
        ):
            yield server

    def postfwd(variant: str) -> Starter:
        return lambda directory, limits: start_postfwd(directory, variant, limits)

    return (
        {AGENT: start_agent}
        | {name: postfwd(name) for name in POSTFWD_VARIANTS}
        | {ON_DISK: on_disk, ON_TMPFS: on_tmpfs}
    )


def show_limits(directory: Path, binaries: Path) -> list[Shown]:
    """Start every server with small limits and see it refuse one user's request too many, at the stage it charges at.

    The agent is also seen to refuse at RCPT what it could not charge any more. Raises BenchError if a server lets
    through what it should refuse.
    """
    shown = []
    for name, start in starters().items():
        progress(f"limits: {name}")
        with start(subdirectory(directory, f"limits-{name}"), SMALL) as server:
            shown.append(_ask_too_much(name, server, binaries / "load", server.stage, SMALL.user_hour))
            if name == AGENT:
                shown.append(_ask_too_much(LOOKS, server, binaries / "load", "RCPT", 0))
            if server.stage == "END-OF-MESSAGE":
                _exceed_domain(name, server, binaries / "load")
    for each in shown:
        if not each.limits:
            raise BenchError(f"{each.server} does not limit: refused request {each.refused_at}, not {each.max + 1}")
    return shown


def _ask_too_much(name: str, server: Server, load: Path, stage: str, left: int) -> Shown:
    """Of one user, who has so much left, ask for five more."""
    target, one = server.targets["inet"], Population(users=1, domains=1)
    run = generate(load, target, people=one, requests=left + 5, stage=stage, accepted=server.accepted)
    return Shown(name, stage, left, run.first_other_at, run.first_other)


def _exceed_domain(name: str, server: Server, load: Path) -> None:
    """One user has sent all they may. Let the others of the domain send a message each until the domain is full."""
    many = Population(users=100, domains=1)
    run = generate(load, server.targets["inet"], people=many, requests=many.users, accepted=server.accepted)
    refused = many.users - (SMALL.domain_hour - SMALL.user_hour)
    # postfwd's processes were seen to refuse one more.
    if abs(run.others - refused) > (name not in (AGENT, LOOKS)):
        raise BenchError(f"{name}: the domain's limit refused {run.others} of {many.users}, not {refused}")


def compare(directory: Path, binaries: Path, plan: Plan) -> tuple[list[Row], dict[str, int]]:
    """Measure all servers in turn. Returns the rows, and resident bytes by server after all rounds."""
    with contextlib.ExitStack() as running:
        servers = {
            name: running.enter_context(start(subdirectory(directory, name), HIGH))
            for name, start in starters().items()
        }
        for transport in ("inet", "unix"):
            echo = start_echo(subdirectory(directory, f"echo-{transport}"), binaries / "echo", transport)
            servers[f"{ECHO} {transport}"] = running.enter_context(echo)
        pairs = [
            (asked, Row(asked.name, asked.transport, asked.stage, connections))
            for asked in _everybody(servers)
            for connections in ((1,) if asked.name.endswith(SAME_CORE) else plan.connections)
        ]
        for number in range(plan.rounds):
            for connections in plan.connections:
                progress(f"round {number + 1} of {plan.rounds}, connections: {connections}")
                turn = [pair for pair in pairs if pair[1].connections == connections]
                for asked, row in turn[number % len(turn) :] + turn[: number % len(turn)]:
                    measure(asked, row, binaries / "load", plan, number)
        resident = {name: server.resident_bytes() for name, server in servers.items()}
    return [row for _, row in pairs], resident


def _everybody(servers: dict[str, Server]) -> list[Asked]:
    """What is asked, in the order of the table."""
    agent = servers[AGENT]
    found = []
    for transport in agent.targets:
        echo = servers[f"{ECHO} {transport}"]
        found += [Asked(ECHO, echo, transport, echo.stage), Asked(AGENT, agent, transport, agent.stage)]
        found += [Asked(LOOKS, agent, transport, "RCPT")]
        found += [replace(asked, name=f"{asked.name}{SAME_CORE}", core=SERVER_CORE) for asked in found[-3:-1]]
    return found + [Asked(name, servers[name], "inet", servers[name].stage) for name in PEERS]


def measure(asked: Asked, row: Row, load: Path, plan: Plan, number: int) -> None:
    """Run the load on one server and add what came out to its row. Raises BenchError if a request was refused."""
    server = asked.server
    server.take_core()
    before = server.cpu()
    run = generate(
        load,
        server.targets[asked.transport],
        connections=row.connections,
        people=asked.people,
        stage=asked.stage,
        accepted=server.accepted,
        core=asked.core,
        seconds=plan.seconds,
        warmup_s=plan.warmup_s,
        seed=number + 1,
    )
    if run.others:
        raise BenchError(f"{asked.name} refused {run.others} of {run.sent} requests, the first: {run.first_other}")
    row.runs.append(run)
    row.cpu_per_1000.append(server.cpu().since(before, run.sent))


def subdirectory(directory: Path, name: str) -> Path:
    """A new directory for one server, with a short name that is safe in a socket's path."""
    made = directory / "".join(c if c.isalnum() else "-" for c in name)
    made.mkdir()
    return made


def progress(text: str) -> None:
    """One line on stderr."""
    print(f"bench: {text}", file=sys.stderr, flush=True)
