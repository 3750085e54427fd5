"""Several nodes in one process that speak over real gRPC on the loopback, with or without certificates.

async with Nodes(certificates) as nodes:
    mx1, mx2 = await nodes.add("mx1"), await nodes.add("mx2")
    nodes.introduce()
    mx1.peers.send("mx2", [...])
    await mx2.heard(...)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from postmeter.core.effects import Message
from postmeter.link import METHOD, Packet, PeerState
from postmeter.packet import Contents
from postmeter.peers import Peers
from postmeter.settings import ClusterSettings, Settings

WAIT_S_MAX = 20.0
"""For what should take milliseconds, on a machine that is busy with other tests."""


class Watched:
    """Something of which one can wait for a change."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """Let those look who wait."""
        self._changed.set()

    async def until(self, true: Callable[[], object]) -> None:
        """Wait until something is true, which is looked at after every change."""
        async with asyncio.timeout(WAIT_S_MAX):
            while not true():
                self._changed.clear()
                await self._changed.wait()


class Log(Watched, logging.Handler):
    """What is logged meanwhile: events with their reasons."""

    def __init__(self) -> None:
        Watched.__init__(self)
        logging.Handler.__init__(self)
        self.lines: list[str] = []
        self._log = logging.getLogger("postmeter")

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.getMessage()}: {getattr(record, 'fields', {}).get('reason', '')}")
        self.changed()

    def starting(self, start: str) -> list[str]:
        """The lines that begin so."""
        return [line for line in self.lines if line.startswith(start)]

    def __enter__(self) -> Self:
        self._log.addHandler(self)
        self._level_before = self._log.level
        self._log.setLevel(logging.INFO)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.removeHandler(self)
        self._log.setLevel(self._level_before)


class Heard(Watched):
    """A handler that keeps what it hears, and answers what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.packets: list[Packet] = []
        self.answer: Callable[[Packet], Awaitable[Contents]] | None = None
        self.tell: Callable[[str], Contents] | None = None
        self.refusals: dict[str, str] = {}

    def refusal(self, node: str) -> str:
        return self.refusals.get(node, "")

    def news(self, node: str) -> Contents:
        return self.tell(node) if self.tell else Contents()

    async def receive(self, packet: Packet) -> Contents:
        self.packets.append(packet)
        self.changed()
        return await self.answer(packet) if self.answer else Contents()

    def messages(self) -> list[Message]:
        """All messages, in the order in which they came."""
        return [message for packet in self.packets for message in packet.contents.messages]

    def senders(self) -> set[str]:
        """Who called."""
        return {packet.head.sender for packet in self.packets if not packet.is_reply}


@dataclass
class Member:
    """One node."""

    name: str
    peers: Peers
    handler: Heard

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.peers.port}"

    def state(self, node: str) -> PeerState:
        [state] = [state for state in self.peers.states() if state.node == node]
        return state


class Nodes:
    """`directory` has the certificates: ca.pem, NODE.pem and NODE.key. Nothing is exchanged unasked for a minute."""

    def __init__(self, directory: Path | None = None, exchange_interval_ms: int = 60_000) -> None:
        self.directory = directory
        self.members: dict[str, Member] = {}
        self._interval_ms = exchange_interval_ms

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(*(member.peers.stop() for member in self.members.values()))

    def settings(self, name: str, listen: str = "127.0.0.1:0", directory: Path | None = None) -> Settings:
        directory = directory or self.directory
        cluster = ClusterSettings(listen, listen, exchange_interval_ms=self._interval_ms)
        if directory:
            chain, key = directory / f"{name}.pem", directory / f"{name}.key"
            cluster = replace(cluster, ca=directory / "ca.pem", certificate=chain, key=key)
        return Settings(node=name, cluster=cluster)

    async def add(self, name: str, listen: str = "127.0.0.1:0", directory: Path | None = None) -> Member:
        """Start a node."""
        handler = Heard()
        peers = Peers(self.settings(name, listen, directory), name, 7, handler)
        await peers.start()
        # It begins to wait for the next exchange while it has no peers.
        await asyncio.sleep(0)
        member = self.members[name] = Member(name, peers, handler)
        return member

    def introduce(self) -> None:
        """Tell all where all are."""
        addresses = {member.name: member.address for member in self.members.values()}
        for member in self.members.values():
            member.peers.set_peers(addresses)


async def call(
    address: str, data: bytes, credentials: grpc.ChannelCredentials | None = None, name: str = "mx1"
) -> bytes | grpc.aio.AioRpcError:
    """One call by somebody else, over a connection of its own: what comes back, or the error."""
    options: list[tuple[str, int | str]] = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
    if credentials:
        options.append(("grpc.ssl_target_name_override", name))
        channel = grpc.aio.secure_channel(address, credentials, options=options)
    else:
        channel = grpc.aio.insecure_channel(address, options=options)
    async with channel:
        method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD)
        try:
            return await method(data, timeout=WAIT_S_MAX)
        except grpc.aio.AioRpcError as error:
            return error
