"""follower - a mirror, and what a test sees of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

from postmeter.etcd import Etcd
from postmeter.mirror import Mirror, Update
from postmeter.settings import EtcdSettings

from .server import PREFIX

PATIENCE_S = 20


class Follower:
    """Follows etcd within an `async with`. `seen` is what the updates add up to."""

    def __init__(self, settings: EtcdSettings) -> None:
        self.etcd = Etcd(settings)
        self.mirror = Mirror(self.etcd, PREFIX, self._updated, self._changed)
        self.health = "not yet"
        self.updates: list[Update] = []
        self.seen: dict[str, str] = {}
        self._happened = asyncio.Condition()
        self._notifying: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self.mirror.run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        await self.etcd.close()

    async def until(self, happened: Callable[[], bool]) -> None:
        """Wait for something that comes with an update or a change of health."""
        async with asyncio.timeout(PATIENCE_S), self._happened:
            await self._happened.wait_for(happened)

    async def sees(self, **expected: str) -> None:
        """Wait until these keys have these values, and no others are there."""
        try:
            await self.until(lambda: self.seen == expected)
        except TimeoutError:
            assert expected == self.seen, self.health
            raise

    async def fails(self, words: str) -> None:
        """Wait until the health has these words."""
        await self.until(lambda: words in self.health)

    async def works(self) -> None:
        """Wait until it is healthy."""
        await self.until(lambda: self.health == "")

    async def _updated(self, update: Update) -> None:
        self.updates.append(update)
        for key, entry in update.changes.items():
            if entry is None:
                del self.seen[key]
            else:
                self.seen[key] = entry.value.decode()
        assert self.seen == {key: entry.value.decode() for key, entry in self.mirror.entries.items()}
        await self._notify()

    def _changed(self, reason: str) -> None:
        self.health = reason
        task = asyncio.create_task(self._notify())
        self._notifying.add(task)
        task.add_done_callback(self._notifying.discard)

    async def _notify(self) -> None:
        async with self._happened:
            self._happened.notify_all()
