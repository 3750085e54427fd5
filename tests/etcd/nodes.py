"""nodes - agents of one cluster as processes on 127.0.0.1, that find each other through a real etcd.

SYNOPSIS
    with Nodes(directory, server) as nodes:
        mx1, mx2 = nodes.start("mx1", "mx2")       # and wait until all serve
        assert "DUNNO" == mx1.ask("alice@example.com")
        nodes.roster()
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.etcd.server import PREFIX, EtcdServer
from tests.postfix.agent import Agent, PolicyConnection
from tests.postfix.mailhost import free_ports, wait_until

LIMIT = "{key: sasl_username, count: recipients, max: 30, per: 1h}"


class Node(Agent):
    """One of them. `ask` sends one message of a user and returns the action."""

    def __init__(self, directory: Path, server: EtcdServer, name: str, **cluster: object) -> None:
        self.name = name
        policy, peers = free_ports(2)
        self.address = f"127.0.0.1:{peers}"
        settings = {
            "node": name,
            "etcd": {"endpoints": server.endpoint},
            # The machine may be busy: nobody is to be refused because a peer took long.
            "cluster": {
                "listen": self.address,
                "exchange_interval": "100ms",
                "borrow_timeout": "5s",
                **cluster,
            },
        }
        super().__init__(directory, limits="limits: {}", listen=[f"inet:127.0.0.1:{policy}"], settings=settings)
        self._policy = PolicyConnection(policy, name)

    def launch(self) -> None:
        """Start a run without waiting for it."""
        self._policy.close()
        super().launch()

    def ask(self, user: str, recipients: int = 1) -> str:
        """What Postfix is told about a message; it asks once more if the agent hangs up, because it begins anew."""
        message = self._policy.new_message(user, recipients)
        try:
            return self._policy.ask(message)
        except ConnectionResetError:
            return self._policy.ask(message)

    def tell(self, *words: str) -> str:
        """What a command prints that asks this agent. Its exit status must be 0."""
        done = self.try_to_tell(*words)
        assert 0 == done.returncode, done.stderr
        return done.stdout

    def try_to_tell(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command that asks this agent."""
        postmeter = Path(sys.executable).with_name("postmeter")
        return subprocess.run(
            [postmeter, *words, "--socket", str(self.admin_socket)], capture_output=True, text=True, timeout=60
        )

    def end(self) -> None:
        """Whatever state it is in."""
        self._policy.close()
        if self._process is not None:
            self.kill()


class Nodes:
    """All of them are ended at the end."""

    def __init__(self, directory: Path, server: EtcdServer) -> None:
        self.server = server
        self.all: list[Node] = []
        self._directory = directory
        server.etcdctl("put", f"{PREFIX}limits/per-user", LIMIT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for node in self.all:
            node.end()

    def add(self, name: str, **cluster: object) -> Node:
        """One more, not started."""
        node = Node(self._directory / f"{name}-{len(self.all)}", self.server, name, **cluster)
        self.all.append(node)
        return node

    def start(self, *names: str) -> list[Node]:
        """Start some, and wait until they serve."""
        nodes = [self.add(name) for name in names]
        for node in nodes:
            node.launch()
        for node in nodes:
            self.wait_for_health(node)
        return nodes

    def wait_for_health(self, node: Node) -> None:
        """Return when it serves."""
        node.wait_for_log(r"\bready\b")
        node.tell("health", "--wait", "30")

    def read(self, key: str) -> Any:
        """What lies in etcd under a key, as JSON; None if there is nothing."""
        text = self.server.etcdctl("get", "--print-value-only", PREFIX + key)
        return json.loads(text) if text.strip() else None

    def members(self) -> list[str]:
        """The newest generation."""
        generations = (self.read("roster") or {"generations": {"0": []}})["generations"]
        newest: list[str] = generations[max(generations, key=int)]
        return newest

    def wait_for_members(self, *names: str, settled: bool = True) -> None:
        """Return when the newest generation is these, and all of them follow it; `settled`: and have their shares."""

        def happened() -> bool:
            roster = self.read("roster")
            if not roster or list(names) != self.members():
                return False
            newest = max(map(int, roster["generations"]))
            told = [self.read(f"status/{name}") or {} for name in names]
            return all(status.get("generation") == newest and (status["settled"] or not settled) for status in told)

        wait_until(f"the roster to be {names}", happened)
