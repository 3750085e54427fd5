"""proxy - the network between a client and etcd, which can be cut."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import TracebackType
from typing import Self

from postmeter.settings import EtcdSettings


class Proxy:
    """Forwards connections to port `to` of 127.0.0.1. `async with`; `settings` lead a client through it.

    cut       ends all connections and takes no new ones
    silence   lets nothing through any more, and says so to nobody
    heal      lets everything through again; what was held up in between arrives now
    """

    def __init__(self, to: int, port: int = 0) -> None:
        self._to = to
        self._port = port
        self._server: asyncio.Server | None = None
        self._flows: set[asyncio.Task[None]] = set()
        self._open = asyncio.Event()
        self._open.set()

    async def __aenter__(self) -> Self:
        await self.heal()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.cut()

    @property
    def settings(self) -> EtcdSettings:
        """How a client reaches etcd through it."""
        return EtcdSettings((f"http://127.0.0.1:{self._port}",))

    async def heal(self) -> None:
        """See above."""
        self._open.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._connected, "127.0.0.1", self._port)
            self._port = self._server.sockets[0].getsockname()[1]

    def silence(self) -> None:
        """See above."""
        self._open.clear()

    async def cut(self) -> None:
        """See above."""
        if self._server:
            self._server.close()
            self._server = None
        for flow in self._flows:
            flow.cancel()
        await asyncio.gather(*self._flows, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            writer.close()
            return
        for source, sink in ((reader, there_writer), (there_reader, writer)):
            flow = asyncio.create_task(self._flow(source, sink))
            self._flows.add(flow)
            flow.add_done_callback(self._flows.discard)

    async def _flow(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            with suppress(OSError):
                while data := await source.read(65_536):
                    await self._open.wait()
                    sink.write(data)
                    await sink.drain()
        finally:
            sink.close()
