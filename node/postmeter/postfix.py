"""The policy port: connections of Postfix, on unix and inet sockets.

Postfix keeps a connection for each smtpd process and asks one question at a time. Each gets exactly one reply. What no
Postfix sends is logged with the client and the reason, and gets no reply but a closed connection. While a reply waits
for the disk, at most one request's worth of bytes is kept for later.

`PolicyPort.drain` stops accepting, lets replies that are due go out, and closes: a request that was not read yet is
asked again by Postfix, on a new connection.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import cast

from postmeter import logs
from postmeter.defaults import CONNECTIONS_MAX, DRAIN_S_MAX, LISTEN_BACKLOG, REQUEST_BYTES_MAX
from postmeter.errors import ProtocolError
from postmeter.node import Node

_END = b"\n\n"


class Connection(asyncio.Protocol):
    """One connection of one smtpd."""

    def __init__(self, node: Node, port: PolicyPort) -> None:
        self._node = node
        self._port = port
        self._answer = node.answer
        self._transport: asyncio.Transport
        self._peer = ""
        self._unread = bytearray()
        self._waiting = False
        self._closing = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection, or close it if there are too many."""
        self._transport = transport = cast(asyncio.Transport, transport)
        self._write = transport.write
        name = transport.get_extra_info("peername")
        self._peer = f"{name[0]}:{name[1]}" if isinstance(name, tuple) else "unix"
        if not self._port.admit(self):
            logs.event(logging.ERROR, "connection refused", peer=self._peer, connections=CONNECTIONS_MAX)
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection. What it was charged stays charged: Postfix asks again, and is recognised."""
        self._closing = True
        self._port.left(self)

    def data_received(self, data: bytes) -> None:
        """Answer what is complete."""
        if not self._unread and not self._waiting and 0 < data.find(_END) == len(data) - 2:
            self._ask(data)
            return
        known = len(self._unread)
        self._unread += data
        self._ask_unread(max(0, known - 1))

    def pause_writing(self) -> None:
        """The client does not read its replies: do not read its requests."""
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        """It reads again."""
        self._transport.resume_reading()

    def close(self) -> None:
        """Close, after the reply that is due, if one is."""
        self._closing = True
        if not self._waiting:
            self._transport.close()

    def _ask_unread(self, start: int) -> None:
        while not self._waiting and not self._closing:
            end = self._unread.find(_END, start)
            if end < 0:
                break
            data = bytes(self._unread[: end + 2])
            del self._unread[: end + 2]
            start = 0
            self._ask(data)
        if len(self._unread) > REQUEST_BYTES_MAX:
            self._refuse(f"request of more than {REQUEST_BYTES_MAX} bytes")

    def _ask(self, data: bytes) -> None:
        try:
            reply = self._answer(data, self._peer, self._reply)
        except ProtocolError as error:
            self._refuse(str(error))
            return
        except Exception as error:  # noqa: BLE001 - a bug must not stop the mail until somebody reads the log
            logs.failure("no decision", error)
            reply = self._node.fail_safe()
        if reply is None:
            self._waiting = True
        else:
            self._write(reply)

    def _reply(self, reply: bytes) -> None:
        self._waiting = False
        if not self._transport.is_closing():
            self._transport.write(reply)
        if self._closing:
            self._transport.close()
        else:
            self._ask_unread(0)

    def _refuse(self, reason: str) -> None:
        logs.event(logging.WARNING, "malformed request", peer=self._peer, reason=reason)
        self._closing = True
        self._unread.clear()
        self._transport.close()


class PolicyPort:
    """All listening sockets and their connections."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._connections: set[Connection] = set()
        self._servers: list[asyncio.AbstractServer] = []
        self._empty = asyncio.Event()

    async def listen(self, sock: socket.socket) -> None:
        """Accept connections on a socket that is bound."""
        loop = asyncio.get_running_loop()
        start: Callable[..., Awaitable[asyncio.AbstractServer]] = loop.create_server
        options: dict[str, bool] = {}
        if sock.family == socket.AF_UNIX:
            start = loop.create_unix_server
            if sys.version_info >= (3, 13):
                # The file is systemd's, or the next agent's: it must not go when this one stops.
                options = {"cleanup_socket": False}
        server = await start(lambda: Connection(self._node, self), sock=sock, backlog=LISTEN_BACKLOG, **options)
        self._servers.append(server)

    def admit(self, connection: Connection) -> bool:
        """Count a new connection; False if there are too many."""
        if len(self._connections) >= CONNECTIONS_MAX:
            return False
        self._connections.add(connection)
        return True

    def left(self, connection: Connection) -> None:
        """A connection is closed."""
        self._connections.discard(connection)
        if not self._connections:
            self._empty.set()

    async def drain(self) -> None:
        """Accept no more, send the replies that are due, and close all connections: within DRAIN_S_MAX."""
        for server in self._servers:
            server.close()
        self._empty.clear()
        for connection in list(self._connections):
            connection.close()
        if self._connections:
            try:
                await asyncio.wait_for(self._empty.wait(), DRAIN_S_MAX)
            except TimeoutError:
                logs.event(logging.WARNING, "connections cut", connections=len(self._connections))
