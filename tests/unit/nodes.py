"""A node with its admin socket, in a thread of the test, as the agent runs it.

with running_node(tmp_path, LIMITS) as node:
    node.charge(sasl_username="alice@example.com", recipient_count=3)
    channel = grpc.insecure_channel(f"unix:{node.socket}")
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import uvloop

from postmeter.control import ControlServer
from postmeter.node import Node
from postmeter.settings import Listener, Settings
from tests.unit.support import message

T = TypeVar("T")

LIMITS = """
limits:
  per-user:
    key: sasl_username
    count: recipients
    max: {1h: 20, 24h: 100}
    overrides: {boss@example.com: unlimited, evil@example.com: blocked}
  per-domain:
    key: sasl_domain
    count: recipients
    max: 50
    per: 1h
  per-client:
    key: client_address
    count: messages
    max: 30
    per: 1h
    shadow: true
  bytes:
    key: sasl_username
    count: bytes
    max: 25MB
    per: 1h
    match: {client_address: {not: {cidr: [10.0.0.0/8]}}}
"""


class RunningNode:
    """What a test does with the node from its own thread."""

    def __init__(self, directory: Path, limits: str) -> None:
        self.limits_file = directory / "limits.yaml"
        self.limits_file.write_text(limits)
        self.socket = directory / "admin.sock"
        self.settings = Settings(
            state_dir=directory / "state", admin_socket=Listener(path=self.socket), limits=self.limits_file
        )
        self.node: Node
        self._loop: asyncio.AbstractEventLoop
        self._stop = asyncio.Event()

    def do(self, act: Callable[[Node], Awaitable[T]]) -> T:
        """Run something in the node's event loop, and wait for what it returns."""

        async def acted() -> T:
            return await act(self.node)

        return asyncio.run_coroutine_threadsafe(acted(), self._loop).result(timeout=30)

    def charge(self, **attributes: object) -> str:
        """One message at its end, however the node decides. Returns the action."""

        async def decide(node: Node) -> str:
            return node.policy.decide(node.parser.parse(message(**attributes)), node.now_ms()).action

        return self.do(decide)

    def set_health(self, part: str, reason: str) -> None:
        """A part serves (""), or does not."""

        async def change(node: Node) -> None:
            node.set_health(part, reason)

        self.do(change)

    def run(self, started: Callable[[], None]) -> None:
        """Serve until `stop`."""

        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            self.node = Node(self.settings)
            running = asyncio.create_task(self.node.run())
            control = ControlServer(self.node)
            await control.start()
            self.node.set_health("policy", "")
            started()
            await self._stop.wait()
            self.node.stop()
            await running
            await control.stop()

        uvloop.run(serve())

    def stop(self) -> None:
        """End `run`."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop.set)


@contextmanager
def running_node(directory: Path, limits: str = LIMITS) -> Iterator[RunningNode]:
    """A node that serves until the end of the `with`."""
    running, started = RunningNode(directory, limits), threading.Event()
    thread = threading.Thread(target=running.run, args=(started.set,), daemon=True)
    thread.start()
    assert started.wait(30), "the node has not started"
    try:
        yield running
    finally:
        running.stop()
        thread.join(30)
        assert not thread.is_alive(), "the node has not stopped"
