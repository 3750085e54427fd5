"""The other nodes of the cluster: links to them, and the port where they reach this one.

    peers = Peers(settings, node, incarnation, handler)
    await peers.start()                          raises ConfigError
    peers.set_peers({"mx2": "192.0.2.2:10044"})  whom there is to speak to, whenever that changes
    peers.send("mx2", messages)                  soon; may be lost
    await peers.exchange("mx2")                  at once; it is done regularly anyway
    peers.states()                               how they are
    await peers.stop()

What is said, and what becomes of what is heard, is up to the handler (link.py). Once in every `exchange_interval` usage
is exchanged with `exchange_peers` of them, chosen at random if there are more.

When the files of the certificates change, all connections are made anew.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Coroutine, Iterable, Mapping, Sequence

from postmeter import logs
from postmeter.certificates import CertificateFiles
from postmeter.core.effects import Message
from postmeter.core.gossip import Rounds
from postmeter.defaults import CERTIFICATES_INTERVAL_S
from postmeter.errors import ConfigError, PeerError
from postmeter.link import Handler, Link, PeerState, to_ms
from postmeter.packet import Head
from postmeter.peer_port import PeerPort, Service
from postmeter.settings import Settings, parse_address
from postmeter.speech import Speaker
from postmeter.turns import Turns


class Peers:
    """To be used from one event loop."""

    def __init__(
        self,
        settings: Settings,
        node: str,
        incarnation: int,
        handler: Handler,
        services: Sequence[Service] = (),
    ) -> None:
        """As this node. Raises ConfigError if the certificates are wrong.

        `services` are called to add others to the port. Large packets
        are written and read in `turns`; what a handler makes of them belongs there, too.
        """
        assert settings.cluster
        self.port = 0
        self._node = node
        self._settings = settings.cluster
        self._handler = handler
        self.turns = Turns()
        self._speaker = Speaker(node, incarnation, self.turns)
        self._files = CertificateFiles(settings.cluster, settings.node) if settings.cluster.ca else None
        self._peer_port = PeerPort(
            settings.cluster, self._speaker, handler, self._files, self._heard, self.send, services
        )
        self._links: dict[str, Link] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    # --- starting and stopping ----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen, and speak to the peers that are set. Raises ConfigError."""
        self.port = await self._peer_port.start()
        self._run(self._exchange_forever())
        if self._files is not None:
            self._log_trouble()
            self._run(self._follow_certificates(self._files))

    async def stop(self) -> None:
        """Make and take no more calls."""
        for task in self._tasks:
            task.cancel()
        links, self._links = self._links, {}
        await asyncio.gather(*(link.close() for link in links.values()))
        await self._peer_port.stop()

    def _run(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- peers --------------------------------------------------------------------------------------------------------

    def set_peers(self, addresses: Mapping[str, str]) -> None:
        """Speak to these nodes, and to no others. An address that is none is logged, and left out."""
        for node, link in list(self._links.items()):
            if addresses.get(node) != link.address:
                del self._links[node]
                self._speaker.forget(node)
                self._run(link.close())
        for node, address in addresses.items():
            if node == self._node or node in self._links:
                continue
            try:
                parse_address(address)
            except ConfigError as error:
                logs.event(logging.ERROR, "address of a peer refused", peer=node, reason=error)
                continue
            self._links[node] = Link(node, address, self._speaker, self._handler, self._files)

    def send(self, node: str, messages: Iterable[Message]) -> None:
        """Say this to a node soon. Lost if it is no peer, cannot be reached, or has too much to hear."""
        link = self._links.get(node)
        if link is not None:
            link.send(messages)

    async def exchange(self, node: str) -> None:
        """Exchange usage with a peer now. Raises PeerError."""
        link = self._links.get(node)
        if link is None:
            raise PeerError(f"{node} is no peer")
        await link.exchange()

    def states(self) -> list[PeerState]:
        """How the peers are."""
        return [link.state() for link in self._links.values()]

    async def _exchange_forever(self) -> None:
        loop = asyncio.get_running_loop()
        rounds = Rounds(random.shuffle, self._settings.exchange_interval_ms, self._settings.exchange_peers)
        while True:
            now_ms = to_ms(loop.time())
            node = rounds.next([node for node, link in self._links.items() if not link.is_exchanging], now_ms)
            if node is not None:
                self._run(self._exchange_with(self._links[node]))
            await asyncio.sleep((rounds.due_ms - now_ms) / 1000)

    @staticmethod
    async def _exchange_with(link: Link) -> None:
        try:
            await link.exchange()
        except PeerError as error:
            logs.event(logging.DEBUG, "exchange failed", reason=error)
        except Exception as error:  # noqa: BLE001 - the next exchange must come nevertheless
            logs.failure("exchange failed", error)

    def _heard(self, head: Head) -> None:
        link = self._links.get(head.sender)
        if link is not None:
            link.heard(head)

    # --- certificates -------------------------------------------------------------------------------------------------

    @property
    def trouble(self) -> str:
        """What is wrong with the certificate, or will be soon; "" if nothing."""
        return self._files.current.trouble() if self._files is not None else ""

    def _log_trouble(self) -> None:
        if self.trouble:
            logs.event(logging.WARNING, "certificate", reason=self.trouble)

    async def _follow_certificates(self, files: CertificateFiles) -> None:
        while True:
            await asyncio.sleep(CERTIFICATES_INTERVAL_S)
            if files.refresh():
                self._log_trouble()
                for link in self._links.values():
                    link.reconnect()
                await self._peer_port.restart()
                logs.event(logging.INFO, "new certificates in use", until=f"{files.current.until:%Y-%m-%dT%H:%MZ}")
