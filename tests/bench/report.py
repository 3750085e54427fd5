"""What came out: targets with met or missed, a table for people, Markdown for the README, JSON for comparing runs.

    result = Result(plan, shown, rows, resident, memory, live, decisions)
    print(table(result)); write_json(result, Path("build/bench.json"))

Ratios are made within a round, between runs that were seconds apart, and the median of them is taken.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from .compare import AGENT, ECHO, LOOKS, ON_DISK, PEERS, SAME_CORE, Plan, Row, Shown
from .decision import Decisions
from .meters import Memory
from .neighbours import UPDATES_PER_S, Neighbours
from .servers import POSTFWD_VARIANTS

PACKAGES = ("postfwd", "policyd-rate-limit", "gcc")
MIB = 1024 * 1024


@dataclass(slots=True)
class Result:
    """All that a run has measured; parts that were left out are empty."""

    plan: Plan
    shown: list[Shown] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    resident: dict[str, int] = field(default_factory=dict)
    memory: list[Memory] = field(default_factory=list)
    live: list[Row] = field(default_factory=list)
    decisions: list[Decisions] = field(default_factory=list)
    neighbours: Neighbours | None = None

    def row(self, server: str, connections: int, transport: str = "inet") -> Row | None:
        """The row of a server, None if it was not measured."""
        wanted = (server, transport, connections)
        return next((row for row in self.rows if (row.server, row.transport, row.connections) == wanted), None)

    def faster_postfwd(self) -> str:
        """The variant of postfwd that answers more at most connections."""
        rows = [row for name in POSTFWD_VARIANTS if (row := self.row(name, max(self.plan.connections)))]
        return max(rows, key=lambda row: row.figure("per_second")).server if rows else POSTFWD_VARIANTS[0]


@dataclass(frozen=True, slots=True)
class Target:
    """A figure that issue and README promise, `at_least` or at most, and what this run measured, round by round."""

    what: str
    target: float
    measured: float
    at_least: bool = True
    rounds: tuple[float, ...] = ()

    @property
    def met(self) -> bool:
        """Whether the measured figure is on the right side."""
        return self.measured >= self.target if self.at_least else self.measured <= self.target


def ratios(above: Row | None, below: Row | None, name: str = "per_second") -> tuple[float, ...]:
    """A figure of one row by that of another, round by round."""
    if above is None or below is None:
        return ()
    pairs = zip(above.runs, below.runs, strict=True)
    return tuple(float(getattr(a, name)) / float(getattr(b, name)) for a, b in pairs)


def targets(result: Result) -> list[Target]:
    """The targets for which this run has figures."""
    found = []

    def add(what: str, target: float, rounds: Sequence[float], at_least: bool = True) -> None:
        if rounds:
            found.append(Target(what, target, median(rounds), at_least, tuple(rounds)))

    few, most = min(result.plan.connections), max(result.plan.connections)
    for transport in ("inet", "unix"):
        for connections, target in ((most, 0.40), (few, 0.75)):
            both = result.row(AGENT, connections, transport), result.row(ECHO, connections, transport)
            add(f"requests/s of the echo server's, {plural(connections)}, {transport}", target, ratios(*both))
    agent, postfwd = result.row(AGENT, most), result.faster_postfwd()
    add(f"times {postfwd}, the faster one, {plural(most)}", 12, ratios(agent, result.row(postfwd, most)))
    add(f"times {ON_DISK}, {plural(most)}", 90, ratios(agent, result.row(ON_DISK, most)))
    for memory in result.memory:
        what = f"bytes per live meter, {memory.live:,} live, slices used: {memory.slices}"
        add(what, 350, [memory.bytes_per_meter], at_least=False)
    for a, b in zip(result.live[::2], result.live[1::2], strict=True):
        what = f"p99 with {b.server} by that with {a.server}, {plural(a.connections)}"
        add(what, 1.5, ratios(b, a, "p99_us"), at_least=False)
    for d in result.decisions:
        cluster = f", {d.nodes} nodes with rights local" if d.nodes > 1 else ""
        add(f"decisions/s on one core, {d.meters:,} live meters{cluster}", 200_000, [d.per_second])
    if result.neighbours:
        what = f"p99 beside peers that push {UPDATES_PER_S:,} updates/s by that beside idle ones, half of all it can do"
        add(what, 2, result.neighbours.ratios, at_least=False)
    return found


def plural(connections: int) -> str:
    """`1 connection`, `64 connections`."""
    return f"{connections} connection{'' if connections == 1 else 's'}"


# --- for people -------------------------------------------------------------------------------------------------------


def table(result: Result) -> str:
    """Everything, in plain text."""
    parts = []
    if result.shown:
        lines = [
            [shown.server, shown.stage, str(shown.max), str(shown.refused_at), shown.reply] for shown in result.shown
        ]
        parts.append(columns("Every server limits", ["server", "stage", "left", "refused at", "reply"], lines, 2))
    if result.rows:
        parts.append(
            columns("Side by side: medians of the rounds", HEAD, [_cells(row, result) for row in result.rows], 2)
        )
        parts.append(columns("Where the CPU time goes: us a request", CPU_HEAD, _cpu_lines(result), 1))
        sizes = [[name, f"{size / MIB:.1f}"] for name, size in result.resident.items()]
        parts.append(columns("Resident memory after all rounds", ["server", "MiB"], sizes, 1))
    if result.live:
        parts.append(columns("Live meters and latency", HEAD, [_cells(row, result) for row in result.live], 2))
    if result.memory:
        parts.append(
            columns("Memory per live meter", MEMORY_HEAD, [_memory_cells(memory) for memory in result.memory], 0)
        )
    if result.decisions:
        lines = [
            [str(d.nodes), f"{d.meters:,}", f"{d.per_second:,.0f}", f"{d.per_second_from_bytes:,.0f}"]
            for d in result.decisions
        ]
        head = ["nodes", "live meters", "parsed requests/s", "from the bytes on"]
        parts.append(columns("The decision alone, on one core, rights local", head, lines, 0))
    if result.neighbours:
        parts.append(
            columns(
                "What peers cost: each round, at an even rate", NEIGHBOURS_HEAD, _neighbour_lines(result.neighbours), 1
            )
        )
    lines = [
        [t.what, _amount(t.target), _amount(t.measured), "met" if t.met else "MISSED", _spread(t)]
        for t in targets(result)
    ]
    parts.append(columns("Targets", ["", "target", "measured", "", "rounds"], lines, 1))
    return "\n".join(parts)


HEAD = ["server", "stage", "on", "conn.", "requests/s", "p50 ms", "p99 ms", "p99.9 ms", "CPU s/1,000", "of echo"]
CPU_HEAD = ["server", "on", "conn.", "answering thread, program", "kernel", "other threads"]
MEMORY_HEAD = [
    "live meters",
    "slices",
    "windows s",
    "filled in s",
    "before MiB",
    "after MiB",
    "most MiB",
    "bytes/meter",
]
NEIGHBOURS_HEAD = ["peers", "updates/s", "requests/s", "p50 ms", "p99 ms", "p99.9 ms"]


def _neighbour_lines(found: Neighbours) -> list[list[str]]:
    idle = [("idle", 0.0, run) for run in found.idle]
    pushed = [("push", updates, run) for updates, run in zip(found.updates_per_s, found.pushed, strict=True)]
    return [
        [peers, f"{updates:,.0f}", f"{run.per_second:,.0f}", _ms(run.p50_us), _ms(run.p99_us), _ms(run.p999_us)]
        for peers, updates, run in idle + pushed
    ]


def _cells(row: Row, result: Result) -> list[str]:
    of_echo = ratios(row, _echo_of(row, result)) if row in result.rows else ()
    return [
        row.server,
        row.stage,
        row.transport,
        str(row.connections),
        f"{row.figure('per_second'):,.0f}",
        *_latencies(row),
        f"{row.cpu_s('all_s'):.4f}",
        _part(median(of_echo)) if of_echo else "",
    ]


def _echo_of(row: Row, result: Result) -> Row | None:
    """The echo server's row that a row is compared with."""
    name = f"{ECHO}{SAME_CORE}" if row.server.endswith(SAME_CORE) else ECHO
    return result.row(name, row.connections, row.transport)


def _latencies(row: Row) -> list[str]:
    return [_ms(row.quantile_us(name, part)) for name, part in (("p50_us", 0.5), ("p99_us", 0.99), ("p999_us", 0.999))]


def _cpu_lines(result: Result) -> list[list[str]]:
    """Of the agent, and of the echo server, which shows what the kernel takes at least."""
    rows = [row for row in [*result.rows, *result.live] if row.server not in PEERS]
    names = ("user_s", "system_s", "others_s")
    # Seconds for 1,000 requests are milliseconds for one.
    return [
        [row.server, row.transport, str(row.connections), *(f"{row.cpu_s(name) * 1_000:.1f}" for name in names)]
        for row in rows
    ]


def _memory_cells(memory: Memory) -> list[str]:
    sizes = (memory.resident_before, memory.resident_after, memory.resident_max)
    return [
        f"{memory.live:,}",
        str(memory.slices),
        "/".join(map(str, memory.windows_s)),
        f"{memory.fill_s:.1f}",
        *(f"{size / MIB:.1f}" for size in sizes),
        f"{memory.bytes_per_meter:.0f}",
    ]


def columns(title: str, head: Sequence[str], lines: Iterable[Sequence[str]], left: int) -> str:
    """A table in plain text, the first `left` columns and texts aligned left."""
    every = [list(head), *map(list, lines)]
    widths = [max(len(line[column]) for line in every) for column in range(len(head))]
    texts = [
        "  ".join(
            cell.ljust(width) if i < left or not _is_figure(cell) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in every
    ]
    return "\n".join([title, *(f"  {text}".rstrip() for text in texts), ""])


def _is_figure(cell: str) -> bool:
    return cell[:1].isdigit() or cell == "-"


def _ms(us: float | None) -> str:
    return "-" if us is None else f"{us / 1_000:.2f}" if us < 10_000 else f"{us / 1_000:.0f}"


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _part(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _spread(target: Target) -> str:
    return f"{_amount(min(target.rounds))} to {_amount(max(target.rounds))}" if len(target.rounds) > 1 else ""


# --- for the README ---------------------------------------------------------------------------------------------------


def markdown(result: Result) -> str:
    """The table and the targets as the README shows them."""
    few, most = min(result.plan.connections), max(result.plan.connections)
    head = ["server", *(f"requests/s, {plural(c)}" for c in result.plan.connections)]
    head += [f"p50 / p99 / p99.9 ms at {most}", "CPU s for 1,000", "resident MiB"]
    head += [f"of echo at {few}", f"of echo at {most}", f"{AGENT} is faster at {most}"]
    lines = [_markdown_cells(name, result) for name in (ECHO, AGENT, LOOKS, *PEERS) if result.row(name, most)]
    promised = [[t.what, _amount(t.target), _amount(t.measured), "met" if t.met else "missed"] for t in targets(result)]
    compared = _pipes(head, lines) + "\n" if lines else ""
    return compared + _pipes(["measured", "target", "this run", ""], promised)


def _markdown_cells(name: str, result: Result) -> list[str]:
    rows = [row for connections in result.plan.connections if (row := result.row(name, connections))]
    first, last = rows[0], rows[-1]
    size = result.resident.get(f"{name} inet" if name == ECHO else name)
    faster = ratios(result.row(AGENT, last.connections), last) if name in PEERS else ()
    return [
        name,
        *(f"{row.figure('per_second'):,.0f}" for row in rows),
        " / ".join(_latencies(last)),
        f"{last.cpu_s('all_s'):.3f}",
        f"{size / MIB:.0f}" if size else "",
        *(_part(median(ratios(row, result.row(ECHO, row.connections)))) for row in (first, last)),
        f"{_amount(median(faster))} times" if faster else "",
    ]


def _pipes(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in head[1:])]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *lines))


# --- for machines -----------------------------------------------------------------------------------------------------


def write_json(result: Result, file: Path, directory: Path) -> None:
    """All figures, round by round, with the machine and the versions; `directory` is where the servers' files lay."""
    document = {
        "machine": machine(directory),
        "versions": versions(),
        "plan": asdict(result.plan),
        "limits_shown": [asdict(shown) | {"limits": shown.limits} for shown in result.shown],
        "rows": [asdict(row) | _ratios_of(row, result) for row in result.rows],
        "resident_bytes": result.resident,
        "live_meters": [asdict(row) for row in result.live],
        "memory": [asdict(memory) | {"bytes_per_meter": memory.bytes_per_meter} for memory in result.memory],
        "decisions": [asdict(decisions) for decisions in result.decisions],
        "neighbours": asdict(result.neighbours) if result.neighbours else None,
        "targets": [asdict(target) | {"met": target.met} for target in targets(result)],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document, indent=1) + "\n")


def _ratios_of(row: Row, result: Result) -> dict[str, Any]:
    agent = result.row(AGENT, row.connections, row.transport)
    return {"of_echo": ratios(row, _echo_of(row, result)), "agent_by_this": ratios(agent, row)}


def machine(directory: Path) -> dict[str, Any]:
    """What the figures depend on beside the programs."""
    return {
        "cpu": _first_value(Path("/proc/cpuinfo"), "model name"),
        "cores": os.cpu_count(),
        "memory": _first_value(Path("/proc/meminfo"), "MemTotal"),
        "kernel": platform.release(),
        "load_average": os.getloadavg(),
        "state_on": _output(["stat", "-f", "-c", "%T", str(directory)]),
        "measured": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def versions() -> dict[str, str]:
    """Of Python, the system, and the packages that were compared."""
    release = platform.freedesktop_os_release()
    found = {name: _output(["dpkg-query", "-W", "-f", "${Version}", name]) for name in PACKAGES}
    return found | {"python": sys.version.split()[0], "system": release.get("PRETTY_NAME", "")}


def _first_value(file: Path, name: str) -> str:
    lines = file.read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _output(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
