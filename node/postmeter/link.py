"""The way to one peer: what is said to it, what it answers, and how it is.

    link.send(messages)        soon, together with what others want to say to it; may be lost, like every message
    await link.exchange()      tell what was used, and learn it, until neither has more
    link.state()               for an operator

Messages go at once if no call is under way, else they gather for 2 ms. Up to PEER_CALLS_MAX calls are under way, and
one exchange beside them, so that a question for which somebody waits is not behind a slow answer. If there are more
messages than that, the oldest are dropped: they would be late, and are repeated if they matter.

A handover may be long. Its parts go one in each call, behind the other messages; while they do, it is not sent again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import grpc

from postmeter import logs
from postmeter.certificates import CertificateFiles
from postmeter.core.answer import one_line
from postmeter.core.effects import Handover, Message
from postmeter.core.identity import machine_of
from postmeter.defaults import (
    EXCHANGE_PACKETS_MAX,
    PACKET_BYTES_MAX,
    PEER_CALL_TIMEOUT_S,
    PEER_CALLS_MAX,
    PEER_GATHER_S,
    PEER_KEEPALIVE_S,
    PEER_KEEPALIVE_TIMEOUT_S,
    PEER_QUEUE_MAX,
    PEER_RECONNECT_S_MAX,
    PEER_RECONNECT_S_MIN,
    PEER_SILENCE_S,
)
from postmeter.errors import PeerError
from postmeter.messages import Spoken, split
from postmeter.packet import Contents, Head, parse
from postmeter.speech import Speaker

Options = list[tuple[str, int | str]]


def to_ms(seconds: float) -> int:
    """As the library's options have it."""
    return int(1000 * seconds)


BOTH_ENDS: Options = [
    ("grpc.max_receive_message_length", PACKET_BYTES_MAX),
    ("grpc.max_send_message_length", PACKET_BYTES_MAX),
    ("grpc.keepalive_time_ms", to_ms(PEER_KEEPALIVE_S)),
    ("grpc.keepalive_timeout_ms", to_ms(PEER_KEEPALIVE_TIMEOUT_S)),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
_OPTIONS: Options = [
    *BOTH_ENDS,
    ("grpc.initial_reconnect_backoff_ms", to_ms(PEER_RECONNECT_S_MIN)),
    # How long one attempt may take, too.
    ("grpc.min_reconnect_backoff_ms", to_ms(PEER_RECONNECT_S_MAX)),
    ("grpc.max_reconnect_backoff_ms", to_ms(PEER_RECONNECT_S_MAX)),
    ("grpc.dns_min_time_between_resolutions_ms", to_ms(PEER_RECONNECT_S_MAX)),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
]

METHOD = "/postmeter.v1.Peers/Exchange"

_Code = grpc.StatusCode
_REASONS = {
    _Code.UNAVAILABLE: "cannot be reached",
    _Code.DEADLINE_EXCEEDED: f"does not answer within {PEER_CALL_TIMEOUT_S:g} s",
    _Code.RESOURCE_EXHAUSTED: "is busy",
    _Code.FAILED_PRECONDITION: "refuses",
    _Code.UNIMPLEMENTED: "is no Postmeter",
}
_WRONG = "answers what cannot be"
_FINAL = {_REASONS[_Code.FAILED_PRECONDITION], _REASONS[_Code.UNIMPLEMENTED], _WRONG}


@dataclass(frozen=True, slots=True)
class Packet:
    """What a peer said. What it answers to this node (`is_reply`) needs no digest or portions in return."""

    head: Head
    contents: Contents
    is_reply: bool


class Handler(Protocol):
    """What becomes of what peers say. All of it is called in the event loop, several `receive` at the same time."""

    def refusal(self, node: str) -> str:
        """Why nothing is taken from a node, such as that it is not in the roster; "" if it is."""

    def news(self, node: str) -> Contents:
        """What a peer is to be told: the digest, and what it lacks if it has just said what it knows."""

    async def receive(self, packet: Packet) -> Contents:
        """Take in what a peer said, in portions. Returns what to answer; to a reply, only messages."""


@dataclass(frozen=True, slots=True)
class PeerState:
    """How a peer is. `reachable` is whether it answers; both have lasted for `since_ms`, and `trouble` says why not.

    `heard_ms` ago it was heard of last, in either direction; None if it never was. `clock_offset_ms` is its wall clock
    less this one's; unknown numbers are None. `dropped` counts messages since the start.
    """

    node: str
    address: str
    reachable: bool
    since_ms: int
    trouble: str
    heard_ms: int | None
    round_trip_ms: float | None
    clock_offset_ms: int | None
    version: str
    incarnation: int | None
    dropped: int


class Link:
    """To be used from one event loop. With certificates (`files`) the peer must be named in its own."""

    def __init__(
        self,
        node: str,
        address: str,
        speaker: Speaker,
        handler: Handler,
        files: CertificateFiles | None,
    ) -> None:
        self.node = node
        self.address = address
        self.dropped = 0
        self._speaker = speaker
        self._handler = handler
        self._files = files
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Spoken] = deque()
        self._parts: deque[Spoken] = deque()
        self._calls: set[asyncio.Task[None]] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._due: asyncio.Handle | None = None
        self._dropping = False
        self._exchanging = asyncio.Lock()
        self._head: Head | None = None
        self._heard_s: float | None = None
        self._answered_s: float | None = None
        self._round_trip_s: float | None = None
        self._clock_offset_ms: int | None = None
        self._reachable = False
        self._since_s = self._loop.time()
        self._trouble = ""
        self._reasons: set[str] = set()
        self._channel = self._open_channel()

    # --- messages ---------------------------------------------------------------------------------------------------

    def send(self, messages: Iterable[Message]) -> None:
        """Say this soon."""
        for message in messages:
            if not isinstance(message, Handover):
                self._queue.append(message)
            elif not self._parts:
                self._parts.extend(split(message))
        too_many = len(self._queue) - PEER_QUEUE_MAX
        if too_many > 0:
            if not self._dropping:
                logs.event(logging.WARNING, "messages to a peer dropped", peer=self.node, queue_max=PEER_QUEUE_MAX)
            self._dropping = True
            self.dropped += too_many
            for _ in range(too_many):
                self._queue.popleft()
        if self._due is None and (self._queue or self._parts):
            self._due = self._loop.call_later(PEER_GATHER_S if self._calls else 0, self._speak)

    def _speak(self) -> None:
        self._due = None
        while (self._queue or self._parts) and len(self._calls) < PEER_CALLS_MAX:
            draft = self._speaker.draft(self.node)
            while self._queue and not draft.full:
                draft.add_message(self._queue.popleft())
            if self._parts and not draft.full:
                draft.add_message(self._parts.popleft())
            call = asyncio.create_task(self._say(draft.finish()))
            self._calls.add(call)
            call.add_done_callback(self._said)
        self._dropping = self._dropping and bool(self._queue)

    def _said(self, call: asyncio.Task[None]) -> None:
        self._calls.discard(call)
        if self._due is None and (self._queue or self._parts):
            self._speak()

    async def _say(self, data: bytes) -> None:
        try:
            await self._call(data)
        except PeerError as error:
            logs.event(logging.DEBUG, "messages lost", reason=error)
        except Exception as error:  # noqa: BLE001 - the others must be said nevertheless
            logs.failure("the answer of a peer failed", error)

    # --- usage ------------------------------------------------------------------------------------------------------

    async def exchange(self) -> None:
        """Tell and learn what was used. Raises PeerError if the peer does not answer."""
        async with self._exchanging:
            news = self._handler.news(self.node)
            for _ in range(EXCHANGE_PACKETS_MAX):
                data, left = await self._speaker.write(self.node, news)
                self.send(left)
                packet = await self._call(data)
                news = self._handler.news(self.node)
                if not (packet.contents.more or news.portions):
                    break

    @property
    def is_exchanging(self) -> bool:
        """Whether that is under way."""
        return self._exchanging.locked()

    # --- calls ------------------------------------------------------------------------------------------------------

    async def _call(self, data: bytes) -> Packet:
        """One call, and what is to be done about the answer."""
        method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(METHOD)
        began_s, wall_ms = self._loop.time(), self._speaker.wall_ms()
        try:
            parsed = parse(await method(data, timeout=PEER_CALL_TIMEOUT_S))
            head = self._speaker.meet(parsed)
            if head.sender != self.node:
                raise PeerError(f"{head.sender} answers at {self.address}: correct the address of {self.node}")
            packet = Packet(head, await self._speaker.read(parsed, self.node), is_reply=True)
        except grpc.aio.AioRpcError as error:
            raise self._failed(_REASONS.get(error.code(), error.code().name), error.details()) from None
        except PeerError as error:
            raise self._failed(_WRONG, str(error)) from None
        self._succeeded(head, began_s, wall_ms)
        answer = await self._handler.receive(packet)
        self.send(answer.messages)
        return packet

    def _succeeded(self, head: Head, began_s: float, wall_ms: int) -> None:
        now_s = self._answered_s = self._loop.time()
        self._round_trip_s = now_s - began_s
        self._clock_offset_ms = head.wall_ms - wall_ms - int(self._round_trip_s * 500)
        self.heard(head)
        if not self._reachable:
            self._reachable, self._since_s, self._trouble = True, now_s, ""
            self._reasons.clear()
            logs.event(logging.INFO, "peer reachable", peer=self.node, address=self.address, version=head.version)

    def _failed(self, reason: str, details: str | None) -> PeerError:
        """What to raise. The peer is unreachable if it refuses, or has not answered anything for a while."""
        trouble = one_line(f"{reason}: {details}" if details else reason)
        now_s = self._loop.time()
        lately = self._answered_s is not None and now_s - self._answered_s < PEER_SILENCE_S
        if not lately or reason in _FINAL:
            if reason not in self._reasons:
                self._reasons.add(reason)
                logs.event(logging.WARNING, "peer unreachable", peer=self.node, address=self.address, reason=trouble)
            if self._reachable:
                self._since_s = now_s
            self._reachable, self._trouble = False, trouble
        return PeerError(f"{self.node} {trouble}")

    # --- the peer ---------------------------------------------------------------------------------------------------

    def heard(self, head: Head) -> None:
        """The peer said something, of itself or as an answer."""
        self._head = head
        self._heard_s = self._loop.time()

    def state(self) -> PeerState:
        """How the peer is now."""
        now_s = self._loop.time()
        return PeerState(
            node=self.node,
            address=self.address,
            reachable=self._reachable,
            since_ms=int(1000 * (now_s - self._since_s)),
            trouble=self._trouble,
            heard_ms=None if self._heard_s is None else int(1000 * (now_s - self._heard_s)),
            round_trip_ms=None if self._round_trip_s is None else round(1000 * self._round_trip_s, 3),
            clock_offset_ms=self._clock_offset_ms,
            version=self._head.version if self._head else "",
            incarnation=self._head.incarnation if self._head else None,
            dropped=self.dropped,
        )

    def _open_channel(self) -> grpc.aio.Channel:
        if self._files is None:
            return grpc.aio.insecure_channel(self.address, options=_OPTIONS)
        current = self._files.current
        credentials = grpc.ssl_channel_credentials(current.ca, current.key, current.chain)
        options: Options = [*_OPTIONS, ("grpc.ssl_target_name_override", machine_of(self.node))]
        return grpc.aio.secure_channel(self.address, credentials, options=options)

    def reconnect(self) -> None:
        """Speak over a new connection from now on: with new certificates. Calls under way may end."""
        old, self._channel = self._channel, self._open_channel()
        closing = asyncio.create_task(old.close(PEER_CALL_TIMEOUT_S))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Say no more."""
        self._queue.clear()
        self._parts.clear()
        if self._due is not None:
            self._due.cancel()
        for call in self._calls:
            call.cancel()
        await asyncio.gather(self._channel.close(), *self._closing, *self._calls, return_exceptions=True)
