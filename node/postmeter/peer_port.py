"""The port where the nodes of a cluster reach this one.

    port = PeerPort(cluster, speaker, handler, files, heard, send)
    await port.start()          raises ConfigError
    await port.restart()        with new certificates
    await port.stop()

With certificates (`files`) callers show one that the cluster's CA has signed; it must name the node that they say they
are, and the handler must not refuse that node. Without certificates everybody is believed. `heard` is told who called;
what does not fit into an answer is left to `send`.

What is refused is logged once for each caller and reason, until the caller is right. A connection that shows no good
certificate ends in the library, which does not tell from where it came; for the reason see library_log.py.

New certificates need a new server: the one time that the library replaces them in a running server, it may crash when
another connection comes at that moment.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import grpc
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_fixed

from postmeter import logs
from postmeter.certificates import CertificateFiles
from postmeter.core.effects import Message
from postmeter.core.identity import machine_of
from postmeter.defaults import (
    ANSWERS_MAX,
    PEER_ANSWERS_MAX,
    PEER_GRACE_S,
    PEER_HANDSHAKE_S_MAX,
    PEER_KEEPALIVE_S,
    PEER_RESTART_S,
    REFUSALS_MAX,
    REFUSED_PEERS_MAX,
)
from postmeter.errors import ConfigError, PeerError
from postmeter.link import BOTH_ENDS, Handler, Options, Packet, to_ms
from postmeter.packet import Contents, Head, parse
from postmeter.settings import ClusterSettings, parse_address
from postmeter.speech import Speaker
from postmeter.v1 import peers_pb2 as pb

Context = grpc.aio.ServicerContext[Any, Any]
Service = Callable[[grpc.aio.Server], object]

_OPTIONS: Options = [
    *BOTH_ENDS,
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", PEER_ANSWERS_MAX),
    ("grpc.server_handshake_timeout_ms", to_ms(PEER_HANDSHAKE_S_MAX)),
    # Or the library hangs up on who pings as often as the other end does.
    ("grpc.http2.min_ping_interval_without_data_ms", to_ms(PEER_KEEPALIVE_S) // 2),
    ("grpc.http2.max_ping_strikes", 0),
]


class PeerPort:
    """To be used from one event loop. `services` are called to add others to the port."""

    def __init__(
        self,
        cluster: ClusterSettings,
        speaker: Speaker,
        handler: Handler,
        files: CertificateFiles | None,
        heard: Callable[[Head], None],
        send: Callable[[str, list[Message]], None],
        services: Sequence[Service] = (),
    ) -> None:
        self._address = cluster.listen
        self._speaker = speaker
        self._handler = handler
        self._files = files
        self._heard = heard
        self._send = send
        self._services = services
        self._answering: Counter[str] = Counter()
        self._receiving: set[asyncio.Task[Contents]] = set()
        self._refused: dict[str, set[str]] = {}
        self._server: grpc.aio.Server | None = None

    # --- starting and stopping ----------------------------------------------------------------------------------------

    async def start(self) -> int:
        """Listen. Returns the number of the port. Raises ConfigError."""
        server = grpc.aio.server(maximum_concurrent_rpcs=ANSWERS_MAX, options=_OPTIONS)
        # Bytes, not messages: what is no packet must be refused in our words.
        exchange: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(self._exchange)
        peers = grpc.method_handlers_generic_handler("postmeter.v1.Peers", {"Exchange": exchange})
        server.add_generic_rpc_handlers((peers,))
        for add in self._services:
            add(server)
        number = self._bind(server)
        await server.start()
        self._server = server
        self._address = f"{self._address.rpartition(':')[0]}:{number}"
        return number

    async def stop(self) -> None:
        """Take no more calls; those that are answered may end within PEER_GRACE_S."""
        if self._server is not None:
            await self._server.stop(PEER_GRACE_S)
            self._server = None

    async def restart(self) -> None:
        """Listen with the certificates as they are now, as soon as that can be."""
        await self.stop()
        attempts = AsyncRetrying(
            retry=retry_if_exception_type(ConfigError), wait=wait_fixed(PEER_RESTART_S), before_sleep=_log_attempt
        )
        async for attempt in attempts:
            with attempt:
                await self.start()

    def _bind(self, server: grpc.aio.Server) -> int:
        try:
            if self._files is None:
                return server.add_insecure_port(self._address)
            current = self._files.current
            pair = (current.key, current.chain)
            return server.add_secure_port(
                self._address, grpc.ssl_server_credentials([pair], current.ca, require_client_auth=True)
            )
        except RuntimeError:
            right = "stop what listens there (ss -lntp), or choose another address of this host"
            raise ConfigError([f"cluster.listen: {self._address}: {_why_not(self._address)}; {right}"]) from None

    # --- answering ----------------------------------------------------------------------------------------------------

    async def _exchange(self, data: bytes, context: Context) -> bytes:
        """What a peer says to this node, and the answer."""
        names = [name.decode(errors="replace") for name in context.auth_context().get("peer_dns", ())]
        caller = names[0] if names else context.peer().rpartition(":")[0]
        try:
            packet = parse(data)
            head = self._speaker.meet(packet)
            self._admit(head, names)
            if self._answering[head.sender] < PEER_ANSWERS_MAX:
                return await self._answer(packet, head, caller)
            code, reason = grpc.StatusCode.RESOURCE_EXHAUSTED, f"{head.sender} makes more than {PEER_ANSWERS_MAX} calls"
        except PeerError as error:
            code, reason = grpc.StatusCode.FAILED_PRECONDITION, str(error)
        except Exception as error:
            logs.failure("answering a peer failed", error)
            raise
        self._log_refusal(caller, reason)
        return await context.abort(code, reason)

    async def _answer(self, packet: pb.Packet, head: Head, caller: str) -> bytes:
        self._answering[head.sender] += 1
        try:
            contents = await self._speaker.read(packet, head.sender)
            self._refused.pop(caller, None)
            self._heard(head)
            # The call ends when the peer does not wait any longer. What it said is taken in as a whole.
            receiving = asyncio.create_task(self._handler.receive(Packet(head, contents, is_reply=False)))
            self._receiving.add(receiving)
            receiving.add_done_callback(self._receiving.discard)
            try:
                answer = await asyncio.shield(receiving)
            except asyncio.CancelledError:
                receiving.add_done_callback(partial(self._send_late, head.sender))
                raise
            data, left = await self._speaker.write(head.sender, answer)
        finally:
            self._answering[head.sender] -= 1
        self._send(head.sender, left)
        return data

    def _send_late(self, node: str, receiving: asyncio.Task[Contents]) -> None:
        """Send what would have been answered."""
        if receiving.cancelled():
            return
        error = receiving.exception()
        if error is None:
            self._send(node, receiving.result().messages)
        else:
            logs.failure("answering a peer failed", error)

    def _admit(self, head: Head, names: list[str]) -> None:
        """Raises PeerError if the sender is not who it says, or not to be heard."""
        if self._files is not None and machine_of(head.sender) not in names:
            named = ", ".join(names) or "nobody"
            raise PeerError(f"the certificate names {named}, not {head.sender}")
        refusal = self._handler.refusal(head.sender)
        if refusal:
            raise PeerError(refusal)

    def _log_refusal(self, caller: str, reason: str) -> None:
        if caller not in self._refused and len(self._refused) >= REFUSED_PEERS_MAX:
            self._refused.clear()
        reasons = self._refused.setdefault(caller, set())
        if reason not in reasons and len(reasons) < REFUSALS_MAX:
            reasons.add(reason)
            logs.event(logging.WARNING, "peer refused", peer=caller, reason=reason)


def _log_attempt(state: RetryCallState) -> None:
    assert state.outcome is not None
    logs.event(logging.ERROR, "peers cannot reach this node", reason=state.outcome.exception())


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
