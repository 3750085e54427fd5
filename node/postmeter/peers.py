"""The port where other nodes reach this one, and the links to them; what is said is up to a `Handler` (link.py).

    peers = Peers(settings, node, incarnation, handler)
    await peers.start()                          raises ConfigError
    peers.set_peers({"mx2": "192.0.2.2:10044"})  whom there is to speak to, whenever that changes
    peers.send("mx2", messages)                  soon; may be lost
    await peers.exchange("mx2")                  at once; it is done regularly anyway
    peers.states()                               how they are
    await peers.stop()

Once in every `exchange_interval` usage is exchanged with `exchange_peers` of them, chosen at random if there are more.

With certificates both ends show one that the cluster's CA has signed. A caller must be named in its own, and be a node
that the handler does not refuse; who is called must have the name of the node that is meant. When the files change,
new connections are made with the new ones. Without certificates everybody is believed.

What is refused is logged once for each peer and reason, until the peer is right. A connection that shows no good
certificate ends in the library, which logs the reason itself, and does not know the peer.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
from collections import Counter
from collections.abc import Coroutine, Iterable, Mapping
from typing import Any, TypeVar

import grpc

from postmeter import logs
from postmeter.certificates import CertificateFiles
from postmeter.core.effects import Message
from postmeter.core.gossip import Rounds
from postmeter.core.identity import machine_of
from postmeter.defaults import (
    ANSWERS_MAX,
    CERTIFICATES_INTERVAL_S,
    PACKET_BYTES_MAX,
    PEER_ANSWERS_MAX,
    PEER_GRACE_S,
    PEER_HANDSHAKE_S_MAX,
    PEER_KEEPALIVE_S,
    PEER_KEEPALIVE_TIMEOUT_S,
    PEER_RECONNECT_S_MAX,
    PEER_RECONNECT_S_MIN,
    REFUSALS_MAX,
    REFUSED_PEERS_MAX,
)
from postmeter.errors import ConfigError, PeerError
from postmeter.link import Handler, Link, Packet, PeerState
from postmeter.packet import Head, parse
from postmeter.settings import Settings, parse_address
from postmeter.speech import Speaker

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]
Options = list[tuple[str, int | str]]


def _ms(seconds: float) -> int:
    return int(1000 * seconds)


_BOTH_ENDS: Options = [
    ("grpc.max_receive_message_length", PACKET_BYTES_MAX),
    ("grpc.max_send_message_length", PACKET_BYTES_MAX),
    ("grpc.keepalive_time_ms", _ms(PEER_KEEPALIVE_S)),
    ("grpc.keepalive_timeout_ms", _ms(PEER_KEEPALIVE_TIMEOUT_S)),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
_SERVER: Options = [
    *_BOTH_ENDS,
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", PEER_ANSWERS_MAX),
    ("grpc.server_handshake_timeout_ms", _ms(PEER_HANDSHAKE_S_MAX)),
    # Pings as often as the other end's keepalive, and a little more often.
    ("grpc.http2.min_ping_interval_without_data_ms", _ms(PEER_KEEPALIVE_S) // 2),
    ("grpc.http2.max_ping_strikes", 0),
]
_CLIENT: Options = [
    *_BOTH_ENDS,
    ("grpc.initial_reconnect_backoff_ms", _ms(PEER_RECONNECT_S_MIN)),
    # How long one attempt may take, too.
    ("grpc.min_reconnect_backoff_ms", _ms(PEER_RECONNECT_S_MAX)),
    ("grpc.max_reconnect_backoff_ms", _ms(PEER_RECONNECT_S_MAX)),
    ("grpc.dns_min_time_between_resolutions_ms", _ms(PEER_RECONNECT_S_MAX)),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
]


class Peers:
    """To be used from one event loop. `server` may be given other services before the start."""

    def __init__(self, settings: Settings, node: str, incarnation: int, handler: Handler, cluster: str = "") -> None:
        """As this node. Raises ConfigError if the certificates are wrong. `cluster` tells clusters apart, if known."""
        assert settings.cluster
        self.port = 0
        self._node = node
        self._settings = settings.cluster
        self._handler = handler
        self._speaker = Speaker(node, incarnation, cluster)
        self._files = CertificateFiles(settings.cluster, settings.node) if settings.cluster.ca else None
        self._links: dict[str, Link] = {}
        self._answering: Counter[str] = Counter()
        self._refused: dict[str, set[str]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self.server = grpc.aio.server(maximum_concurrent_rpcs=ANSWERS_MAX, options=_SERVER)
        # Bytes, not messages: what is no packet must be refused in our words.
        exchange: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(self._exchange)
        service = grpc.method_handlers_generic_handler("postmeter.v1.Peers", {"Exchange": exchange})
        self.server.add_generic_rpc_handlers((service,))

    # --- starting and stopping ----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen, and speak to the peers that are set. Raises ConfigError."""
        self.port = self._bind()
        await self.server.start()
        self._run(self._exchange_forever())
        if self._files is not None:
            self._note_trouble()
            self._run(self._follow_certificates(self._files))

    async def stop(self) -> None:
        """Take and make no more calls; those that are answered may end within PEER_GRACE_S."""
        links, self._links = self._links, {}
        await asyncio.gather(*(link.close() for link in links.values()))
        await self.server.stop(PEER_GRACE_S)
        for task in self._tasks:
            task.cancel()

    def _bind(self) -> int:
        address = self._settings.listen
        try:
            if self._files is None:
                return self.server.add_insecure_port(address)
            current = self._server_certificates
            credentials = grpc.dynamic_ssl_server_credentials(current(), current, require_client_authentication=True)
            return self.server.add_secure_port(address, credentials)
        except RuntimeError:
            right = "stop what listens there (ss -lntp), or choose another address of this host"
            raise ConfigError([f"cluster.listen: {address}: {_why_not(address)}; {right}"]) from None

    def _run(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

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
            self._links[node] = Link(node, address, self._speaker, self._handler, self._open_channel)

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
            now_ms = _ms(loop.time())
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

    # --- answering ----------------------------------------------------------------------------------------------------

    async def _exchange(self, data: bytes, context: Context) -> bytes:
        """What a peer says to this node, and the answer."""
        names = [name.decode() for name in context.auth_context().get("peer_dns", ())]
        caller = names[0] if names else context.peer().rpartition(":")[0]
        try:
            packet = parse(data)
            head = self._speaker.meet(packet)
            self._admit(head, names)
            self._answering[head.sender] += 1
            try:
                contents = await self._speaker.read(packet, head.sender)
                self._accepted(head, caller)
                # The call ends when the peer does not wait any longer. What it said is taken in as a whole.
                receiving = self._run(self._handler.receive(Packet(head, contents, is_reply=False)))
                answer = await asyncio.shield(receiving)
                return await self._speaker.write(head.sender, answer)
            finally:
                self._answering[head.sender] -= 1
        except PeerError as error:
            self._note_refusal(caller, str(error))
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except Exception as error:
            logs.failure("answering a peer failed", error)
            raise

    def _admit(self, head: Head, names: list[str]) -> None:
        """Raises PeerError if the sender is not who it says, or not to be heard now."""
        if self._files is not None and machine_of(head.sender) not in names:
            named = ", ".join(names) or "nobody"
            raise PeerError(f"the certificate names {named}, not {head.sender}")
        refusal = self._handler.refusal(head.sender)
        if refusal:
            raise PeerError(refusal)
        if self._answering[head.sender] >= PEER_ANSWERS_MAX:
            raise PeerError(f"{head.sender} makes more than {PEER_ANSWERS_MAX} calls at the same time")

    def _accepted(self, head: Head, caller: str) -> None:
        self._refused.pop(caller, None)
        link = self._links.get(head.sender)
        if link is not None:
            link.heard(head)

    def _note_refusal(self, caller: str, reason: str) -> None:
        if caller not in self._refused and len(self._refused) >= REFUSED_PEERS_MAX:
            self._refused.clear()
        reasons = self._refused.setdefault(caller, set())
        if reason not in reasons and len(reasons) < REFUSALS_MAX:
            reasons.add(reason)
            logs.event(logging.WARNING, "peer refused", peer=caller, reason=reason)

    # --- certificates -------------------------------------------------------------------------------------------------

    @property
    def trouble(self) -> str:
        """What is wrong with the certificate, or will be soon; "" if nothing."""
        return self._files.current.trouble() if self._files is not None else ""

    def _note_trouble(self) -> None:
        if self.trouble:
            logs.event(logging.WARNING, "certificate", reason=self.trouble)

    async def _follow_certificates(self, files: CertificateFiles) -> None:
        while True:
            await asyncio.sleep(CERTIFICATES_INTERVAL_S)
            if files.refresh():
                self._note_trouble()
                for link in self._links.values():
                    link.reconnect()

    def _server_certificates(self) -> grpc.ServerCertificateConfiguration:
        """For every new connection; called in a thread of the library."""
        assert self._files is not None
        current = self._files.current
        return grpc.ssl_server_certificate_configuration([(current.key, current.chain)], current.ca)

    def _open_channel(self, node: str, address: str) -> grpc.aio.Channel:
        if self._files is None:
            return grpc.aio.insecure_channel(address, options=_CLIENT)
        current = self._files.current
        credentials = grpc.ssl_channel_credentials(current.ca, current.key, current.chain)
        options: Options = [*_CLIENT, ("grpc.ssl_target_name_override", machine_of(node))]
        return grpc.aio.secure_channel(address, credentials, options=options)


def _why_not(address: str) -> str:
    """Why nobody can listen there."""
    host, port = parse_address(address)
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
            probe.listen()
    except OSError as error:
        return error.strerror or str(error)
    return "cannot be used"
