"""load - clients at the policy ports of all nodes, which write down what they are told and when.

NAME
    Load - asks all nodes about the same users' messages, until it is stopped

SYNOPSIS
    with Load({"mx1": Path("/…/policy.sock"), …}, users, meters, seed=1) as load:
        ...
    load.replies

DESCRIPTION
    Each node has so many connections, of which each asks again after a short random pause. A connection that is lost is
    opened again, and what it asked counts as lost: the load never asks the same twice. Everything happens in a thread
    of its own. Policy ports are unix sockets: whoever asks need not be on the node's machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.unit.support import message

from .count import Meter, Reply, Verdict

CONNECTIONS = 3
# A pause between two requests of a connection: about 60 requests a second at each node.
PAUSE_S_MAX = 0.1
RETRY_S = 0.05
# What is still unanswered when the load is stopped is waited for so long.
LAST_S_MAX = 5.0

_instances = itertools.count(1)


class Load:
    """`meters` says what a user's message counts on; `amounts` are the recipients of a message, drawn at random."""

    def __init__(
        self,
        nodes: Mapping[str, Path],
        users: Sequence[str],
        meters: Callable[[str], tuple[Meter, ...]],
        *,
        seed: int,
        amounts: Sequence[int] = (1,),
        pause_s_max: float = PAUSE_S_MAX,
    ) -> None:
        self.replies: list[Reply] = []
        self._nodes = dict(nodes)
        self._users = users
        self._meters = meters
        self._amounts = amounts
        self._pause_s_max = pause_s_max
        self._random = random.Random(seed)
        self._stopping = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="load")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stopping = True
        self._thread.join()

    async def _run(self) -> None:
        clients = [asyncio.create_task(self._client(node)) for node in self._nodes for _ in range(CONNECTIONS)]
        await asyncio.gather(*clients)

    async def _client(self, node: str) -> None:
        while not self._stopping:
            try:
                reader, writer = await asyncio.open_unix_connection(str(self._nodes[node]))
            except OSError:
                await asyncio.sleep(RETRY_S)
                continue
            with contextlib.closing(writer):
                while await self._ask(node, reader, writer) and not self._stopping:
                    await self._pause()

    async def _pause(self) -> None:
        await asyncio.sleep(self._random.uniform(0, self._pause_s_max))

    async def _ask(self, node: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; False when the connection is lost."""
        user, amount = self._random.choice(self._users), self._random.choice(self._amounts)
        # Never twice, or the agent would take it for Postfix's repeat of a message that it has charged.
        instance = f"load.{next(_instances)}"
        asked_s = time.monotonic()
        try:
            writer.write(message(sasl_username=user, recipient_count=amount, instance=instance))
            text = (await self._answer(reader)).decode().strip()
        except (OSError, asyncio.IncompleteReadError):
            text = ""
        answered_s = time.monotonic()
        reply = Reply(node, self._meters(user), amount, asked_s, answered_s, _verdict(text), text)
        self.replies.append(reply)
        return reply.verdict != "lost"

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        """The answer; of an agent that is frozen, none after the load was stopped."""
        answer = asyncio.ensure_future(reader.readuntil(b"\n\n"))
        while not (await asyncio.wait([answer], timeout=LAST_S_MAX))[0]:
            if self._stopping:
                answer.cancel()
                raise ConnectionResetError
        return answer.result()


def _verdict(text: str) -> Verdict:
    if text == "action=DUNNO":
        return "admitted"
    if text.startswith("action=450 4.7.1 "):
        return "refused"
    return "failed" if text else "lost"
