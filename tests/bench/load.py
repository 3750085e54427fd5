"""The load generator, load.c: built once, run with options, its JSON as a value.

    binaries = build(Path("build/bench"))
    run = generate(binaries / "load", "inet:127.0.0.1:10040", connections=64, seconds=2.0)

The generator runs on one core and the server on another (Server.take_core). Left to the scheduler, the two sides of a
connection share a core in one run and not in the next, and that alone may be a factor of five: a core that is idle has
to be woken up for every request and for every reply.

Raises BenchError if the compiler is missing, or if a server hung up, hung, or answered what is no reply.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PROGRAMS = ("load", "echo")
# Above the time that the slowest server (64 connections, one fsync a reply) was seen to take.
REPLY_S_MAX = 30.0


class BenchError(Exception):
    """The bench could not be run; the message says what to do, or which server failed how."""


@dataclass(frozen=True, slots=True)
class Population:
    """Who sends: so many users, spread evenly over so many domains."""

    users: int
    domains: int

    @property
    def meters(self) -> int:
        """Live meters when all have sent: an hour and a day for each user, an hour for each domain."""
        return 2 * self.users + min(self.users, self.domains)


ALL_CORES = os.sched_getaffinity(0)
LOAD_CORE = max(ALL_CORES)
SERVER_CORE = min(ALL_CORES)
EVERYBODY = Population(users=10_000, domains=997)


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of the generator saw. `requests` of `sent` were measured, the rest was warm-up.

    `others` were answered otherwise than accepted, the first of them with `first_other`, as request `first_other_at`.
    """

    connections: int
    users: int
    sent: int
    requests: int
    seconds: float
    per_second: float
    p50_us: float
    p99_us: float
    p999_us: float
    max_us: float
    load_cpu_s: float
    others: int
    first_other_at: int
    first_other: str


def build(directory: Path) -> Path:
    """Compile the C programs into `directory` unless they are newer than their sources; returns it."""
    compiler = shutil.which("gcc")
    if compiler is None:
        raise BenchError("gcc is missing: apt-get install gcc libc6-dev")
    directory.mkdir(parents=True, exist_ok=True)
    for name in PROGRAMS:
        source, binary = HERE / f"{name}.c", directory / name
        if binary.exists() and binary.stat().st_mtime > source.stat().st_mtime:
            continue
        command = [compiler, "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(binary), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchError(f"{source} does not compile:\n{done.stderr}")
    return directory


def generate(
    binary: Path,
    target: str,
    *,
    connections: int = 1,
    people: Population = EVERYBODY,
    stage: str = "END-OF-MESSAGE",
    accepted: str = "action=DUNNO",
    requests: int = 0,
    seconds: float = 0.0,
    warmup_s: float = 0.0,
    rate: float = 0.0,
    seed: int = 1,
    core: int = LOAD_CORE,
) -> Run:
    """Ask `target` for so many `seconds`, or so many `requests` walking through the users in order.

    It is asked again as soon as it has answered; with a `rate` so often a second, however long the answers take.
    """
    amount = [f"-n{requests}"] if requests else [f"-d{seconds}", f"-w{warmup_s}", f"-R{rate}"]
    load = [f"-c{connections}", f"-k{people.users}", f"-D{people.domains}", f"-s{stage}", f"-e{accepted}", f"-S{seed}"]
    command = [str(binary), *amount, *load, f"-p{core}", f"-t{REPLY_S_MAX}", target]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{' '.join(command)}: {done.stderr.strip() or 'killed'}")
    return Run(**json.loads(done.stdout))
