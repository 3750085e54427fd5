"""cluster - several agents, each on a machine of its own, with a real etcd.

NAME
    Cluster - nodes, etcd and the network between them
    NodeAgent - one node's agent; what its earlier runs logged is kept

SYNOPSIS
    with Cluster(directory, ["mx1", "mx2", "mx3"]) as cluster:
        cluster.put_limit("per-user", key="sasl_username", max=100, per="12s")
        cluster.start()
        cluster.network.drop(cut(["mx1"], ["mx2", "mx3", "etcd"]))
        cluster.agents["mx1"].kill()

DESCRIPTION
    The agents know each other by addresses on the cluster's own network, and take limits from etcd. Postfix's side is a
    unix socket, which can be reached from everywhere: cuts concern what nodes say to each other and to etcd.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from postmeter.cli.client import Client
from postmeter.v1 import control_pb2
from tests.etcd.server import PREFIX, EtcdServer
from tests.postfix.agent import Agent, postmeter
from tests.postfix.mailhost import wait_until

from .faults import ETCD
from .network import Network

PEER_PORT = 10044
CALL_S_MAX = 2.0


class NodeAgent(Agent):
    """A node of a cluster."""

    def __init__(
        self,
        directory: Path,
        network: Network,
        machine: str,
        settings: Mapping[str, object],
        policy_socket: Path | None = None,
    ) -> None:
        self.machine = machine
        self.policy_socket = policy_socket or directory / "policy.sock"
        self.earlier_log = ""
        self._network = network
        # As smtpd reaches it, which runs as postfix.
        listen = {"unix": str(self.policy_socket), "mode": "0666"}
        super().__init__(directory, limits="limits: {}\n", listen=[listen], settings=settings)

    @property
    def command(self) -> list[str]:
        """What is run: the same on the node's machine."""
        return self._network.command(self.machine, *super().command)

    def launch(self) -> None:
        """Start a run without waiting for it."""
        self.earlier_log += self.log()
        super().launch()

    def freeze(self) -> None:
        """Stop it in its tracks."""
        self._send(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._send(signal.SIGCONT)

    @property
    def has_ended(self) -> bool:
        """Whether it ended though nobody told it to."""
        return self._process is None or self._process.poll() is not None

    def used(self, key: str) -> dict[str, dict[str, int]]:
        """What this node knows that a key has used, by limit and node."""
        return {usage.meter.limit: {part.node: part.used for part in usage.parts} for usage in self._usages(key)}

    def max_of(self, key: str) -> dict[str, int]:
        """By which `max` this node goes, by limit; only where the key has used something."""
        return {usage.meter.limit: usage.meter.max for usage in self._usages(key)}

    def _usages(self, key: str) -> list[control_pb2.Usage]:
        with Client(self.admin_socket) as client:
            return list(client.show(key.encode()).usages)

    def health(self, part: str = "") -> str:
        """What gRPC health says of a part (policy, peers, etcd, storage), or of the whole."""
        request = health_pb2.HealthCheckRequest(service=f"postmeter.{part}" if part else "")
        with grpc.insecure_channel(f"unix:{self.admin_socket}") as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=CALL_S_MAX)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))

    def _send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


class Cluster:
    """A context manager: it ends everything.

    `spare` are machines on which no node runs at first. `settings` are more of those under `cluster` than the address,
    and `etcd_settings` of those under `etcd`.
    """

    def __init__(
        self,
        directory: Path,
        nodes: Sequence[str],
        *,
        spare: Sequence[str] = (),
        etcd_options: Sequence[str] = (),
        etcd_settings: Mapping[str, str] | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        self.directory = directory
        self.network = Network([*nodes, *spare, ETCD])
        self.etcd = EtcdServer(
            directory, *etcd_options, address=self.network.address(ETCD), command=self.network.command(ETCD)
        )
        self.agents: dict[str, NodeAgent] = {}
        self._nodes = nodes
        self._etcd_settings = etcd_settings or {}
        self._settings = settings or {}

    def add(self, machine: str, node: str = "", policy_socket: Path | None = None) -> NodeAgent:
        """One node more, not started yet; it is called like its machine, if not told otherwise."""
        settings = {
            "node": node or machine,
            "etcd": {"endpoints": [self.etcd.endpoint], "prefix": PREFIX, **self._etcd_settings},
            "cluster": {"listen": f"{self.network.address(machine)}:{PEER_PORT}", "insecure": True, **self._settings},
        }
        agent = NodeAgent(self.directory / machine, self.network, machine, settings, policy_socket)
        self.agents[machine] = agent
        return agent

    def change_roster(self, at: str, *change: str) -> bool:
        """Run `postmeter node` at a node, as an operator does. Returns whether that was done."""
        command: list[str | Path] = [postmeter(), "node", *change, "--socket", self.agents[at].admin_socket]
        return subprocess.run(command, check=False).returncode == 0

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.network)
            stack.enter_context(self.etcd)
            for node in self._nodes:
                self.add(node)
            stack.callback(self._kill)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def start(self) -> None:
        """Start all agents. Returns when they are ready, all are in, and have their shares."""
        for agent in self.agents.values():
            agent.launch()
        for agent in self.agents.values():
            agent.wait_ready()
        self.wait_for_roster(self.agents)
        wait_until("shares", lambda: all(self.status(node).get("settled") for node in self.agents))

    def wait_for_roster(self, nodes: Collection[str]) -> None:
        """Until these, and no others, are the members, and all follow the roster that says so."""
        wait_until(f"roster of {', '.join(nodes)}", lambda: self._all_follow(set(nodes)))

    def put_limit(self, name: str, **limit: object) -> None:
        """Write a limit into etcd, as an operator does."""
        self.etcd.put(f"limits/{name}", json.dumps(limit))

    def status(self, node: str) -> dict[str, Any]:
        """What a node says in etcd that it follows; {} if nothing."""
        return self._get(f"status/{node}")

    def _all_follow(self, nodes: set[str]) -> bool:
        roster = self._get("roster")
        if not roster:
            return False
        newest = max(roster["generations"], key=int)
        follow = {self.status(node).get("generation", 0) for node in nodes}
        return (nodes, {int(newest)}) == (set(roster["generations"][newest]), follow)

    def _get(self, key: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.etcd.etcdctl("get", "--print-value-only", PREFIX + key) or "{}")
        return found

    def _kill(self) -> None:
        for agent in self.agents.values():
            agent.__exit__(AssertionError, None, None)
