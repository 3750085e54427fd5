"""Whether what other nodes say delays answers to Postfix: the same load beside peers that are idle, and that push.

    found = measure_neighbours(directory, binary, seconds, rounds)      # a Neighbours

One agent of a cluster of six is asked at half the rate that it can do, evenly spaced (load.c -R). The five others are
in one process (pushing.py), on the generator's core, with the lowest priority. They are idle, and push UPDATES_PER_S
counter updates a second, by turns.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.etcd.server import EtcdServer
from tests.postfix.mailhost import free_ports

from .load import LOAD_CORE, Run, generate
from .servers import HIGH, Server, documents, start_agent

NODE = "mx1"
PEERS_COUNT = 5
UPDATES_PER_S = 25_000
CONNECTIONS = 16
# Peers tell something once a second.
SECONDS_MIN = 2.0


@dataclass(slots=True)
class Neighbours:
    """The most that the agent did a second, and runs at half of that, beside peers that are idle and that push."""

    per_second_max: float = 0.0
    idle: list[Run] = field(default_factory=list)
    pushed: list[Run] = field(default_factory=list)
    updates_per_s: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """How much longer the slowest hundredth waits because of the peers, round by round."""
        return [pushed.p99_us / idle.p99_us for idle, pushed in zip(self.idle, self.pushed, strict=True)]


def measure_neighbours(directory: Path, binary: Path, seconds: float, rounds: int) -> Neighbours:
    """Take turns."""
    found, seconds = Neighbours(), max(seconds, SECONDS_MIN)
    with _cluster(directory) as (server, peers):

        def ask(rate: float) -> Run:
            target, warmup_s = server.targets["unix"], seconds / 4
            return generate(binary, target, connections=CONNECTIONS, seconds=seconds, warmup_s=warmup_s, rate=rate)

        found.per_second_max = max(ask(rate=0).per_second for _ in range(2))
        for _ in range(rounds):
            found.idle.append(ask(found.per_second_max / 2))
            peers.push(UPDATES_PER_S)
            found.pushed.append(ask(found.per_second_max / 2))
            found.updates_per_s.append(peers.idle())
    return found


@dataclass(slots=True)
class _Peers:
    """The process of the peers."""

    process: subprocess.Popen[str]
    pushing_s: float = 0.0

    def push(self, per_second: int) -> None:
        """Tell so many updates from now on."""
        self._say(f"push {per_second}")
        self.pushing_s = time.monotonic()

    def idle(self) -> float:
        """No more. Returns how many a second the agent has taken in since `push`."""
        self._say("idle")
        pushed_s = time.monotonic() - self.pushing_s
        assert self.process.stdout is not None
        return int(self.process.stdout.readline()) / pushed_s

    def _say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()


@contextlib.contextmanager
def _cluster(directory: Path) -> Iterator[tuple[Server, _Peers]]:
    """etcd, the agent, and its peers, which know each other."""
    own, *others = [f"127.0.0.1:{port}" for port in free_ports(1 + PEERS_COUNT)]
    names = [f"peer{number}" for number in range(1, 1 + PEERS_COUNT)]
    with EtcdServer(directory) as etcd, contextlib.ExitStack() as stack:
        for name, limit in documents(HIGH).items():
            etcd.put(f"limits/{name}", json.dumps(limit))
        settings = {"node": NODE, "etcd": {"endpoints": [etcd.endpoint]}, "cluster": {"listen": own}}
        server = stack.enter_context(start_agent(directory, HIGH, **settings))
        for name, address in zip(names, others, strict=True):
            etcd.put(f"identities/{name}", json.dumps({"address": address}))
        etcd.put("roster", json.dumps({"generations": {"1": [NODE], "2": [NODE, *names]}, "stopped": []}))
        peers = stack.enter_context(_pushing(own, others))
        server.take_core()
        yield server, peers


@contextlib.contextmanager
def _pushing(node: str, listen: list[str]) -> Iterator[_Peers]:
    command = [sys.executable, "-m", "tests.bench.pushing", NODE, node, *listen]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        os.sched_setaffinity(process.pid, {LOAD_CORE})
        # What is measured is the agent: the generator must not wait for them.
        os.setpriority(os.PRIO_PROCESS, process.pid, 19)
        assert process.stdout is not None
        process.stdout.readline()
        # It ends when its standard input does.
        yield _Peers(process)
