"""Packets in this node's name: written, understood, and both in small steps.

    speaker = Speaker(node, incarnation, turns)
    data, left = await speaker.write(receiver, contents)
    head = speaker.meet(packet)                     refuses what is not meant for this node, or beyond its protocol
    contents = await speaker.read(packet, head.sender)

Each step is one of the `turns`: who asks about mail does not wait for a large packet. Of what does not fit into a
packet, messages are `left`, and that there are more portions is said in the packet.
"""

from __future__ import annotations

import time

from postmeter import __version__
from postmeter.core.effects import Message
from postmeter.core.view import Portion
from postmeter.errors import PeerError
from postmeter.messages import HandoverPart, Parts, Spoken, split
from postmeter.packet import (
    PROTOCOL_NEWEST,
    PROTOCOL_OLDEST,
    Contents,
    Draft,
    Head,
    read_digest,
    read_head,
    read_messages,
    read_portions,
)
from postmeter.turns import Turns
from postmeter.v1 import peers_pb2 as pb


class Speaker:
    """For one run of a node."""

    def __init__(self, node: str, incarnation: int, turns: Turns) -> None:
        self.node = node
        self._turns = turns
        self._incarnation = incarnation
        self._parts: dict[str, Parts] = {}

    @staticmethod
    def wall_ms() -> int:
        """The wall clock, in ms since 1970."""
        return int(time.time() * 1000)

    def draft(self, receiver: str) -> Draft:
        """An empty packet for another node."""
        return Draft(Head(self.node, receiver, self._incarnation, __version__, self.wall_ms()))

    async def write(self, receiver: str, contents: Contents) -> tuple[bytes, list[Message]]:
        """A packet of as much as fits, and the messages that do not."""
        draft, left = self.draft(receiver), list(contents.messages)
        while left and not draft.full and len(parts := split(left[0])) == 1:
            draft.add_message(parts[0])
            del left[0]
        if contents.digest:
            draft.add_digest(contents.digest)
        portions, portion = iter(contents.portions), None

        def write_portion() -> bool:
            nonlocal portion
            portion = next(portions, None)
            if portion is None or draft.full:
                return False
            draft.add_portion(portion)
            return True

        if contents.portions:
            await self._turns.take(write_portion)
        return draft.finish(portion is not None), left

    def meet(self, packet: pb.Packet) -> Head:
        """Who says something to this node. Raises PeerError if it is not for this node, or cannot be understood."""
        head = read_head(packet)
        speaks = f"{head.sender} (Postmeter {head.version}) speaks protocol"
        if head.protocol_newest < PROTOCOL_OLDEST:
            least = f"{self.node} from {PROTOCOL_OLDEST} on"
            raise PeerError(f"{speaks} {head.protocol_newest}, {least}: upgrade {head.sender}")
        if head.protocol_oldest > PROTOCOL_NEWEST:
            most = f"{self.node} up to {PROTOCOL_NEWEST}"
            raise PeerError(f"{speaks} {head.protocol_oldest}, {most}: upgrade {self.node}")
        if head.receiver != self.node:
            raise PeerError(f"this is {self.node}, not {head.receiver}: correct the address of {head.receiver}")
        if head.sender == self.node:
            raise PeerError(f"two nodes are called {self.node}: give one of them another name")
        return head

    async def read(self, packet: pb.Packet, sender: str) -> Contents:
        """All that is said. Raises PeerError."""
        messages = [message for spoken in read_messages(packet) if (message := self._whole(spoken, sender)) is not None]
        portions, found = read_portions(packet), list[Portion]()

        def read_portion() -> bool:
            found.append(next(portions))
            return len(found) < len(packet.portions)

        if packet.portions:
            await self._turns.take(read_portion)
        return Contents(messages, read_digest(packet), found, packet.more)

    def _whole(self, spoken: Spoken, sender: str) -> Message | None:
        """A message, or the handover that is whole with this part of it."""
        if not isinstance(spoken, HandoverPart):
            return spoken
        return self._parts.setdefault(sender, Parts()).add(spoken)

    def forget(self, node: str) -> None:
        """A node is no peer any more."""
        self._parts.pop(node, None)
