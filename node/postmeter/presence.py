"""A key of etcd that is there as long as this process is, and reaches etcd.

    presence = Presence(etcd, "/postmeter/nodes/mx1", value, on_health)
    await presence.run()           # in a task; until it is cancelled
    presence.update(value)
    await presence.leave()         # at once; else the key ends PRESENCE_TTL_S after it was last kept alive

The key is under a lease. Three times in its life the lease is kept alive, and the key is looked at: whatever happened
to them (the lease ended, etcd was restored, somebody deleted the key), they are made anew. `on_health` gets the reason
why that fails, and "" when it does not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from postmeter import logs
from postmeter.defaults import PRESENCE_TTL_S
from postmeter.errors import EtcdError
from postmeter.etcd import Etcd, persist


class Presence:
    """To `run` in a task, and to `leave`."""

    def __init__(self, etcd: Etcd, key: str, value: bytes, on_health: Callable[[str], None]) -> None:
        self._etcd = etcd
        self._key = key
        self._value = value
        self._lease = 0
        self._updated = asyncio.Event()
        self._outage = logs.Outage("presence in etcd", on_health)

    def update(self, value: bytes) -> None:
        """Put another value."""
        self._value = value
        self._updated.set()

    async def run(self) -> NoReturn:
        """Be present until cancelled."""
        while True:
            await persist(self._renew, self._outage)
            self._outage.over()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._updated.wait(), PRESENCE_TTL_S / 3)

    async def leave(self) -> None:
        """Delete the key, unless another process has put it anew. Not to be called while `run` runs."""
        if self._lease:
            with suppress(EtcdError):
                await self._etcd.release(self._key, self._lease)

    async def _renew(self) -> None:
        self._updated.clear()
        if not self._lease or not await self._etcd.keep_alive(self._lease):
            self._lease = await self._etcd.grant(PRESENCE_TTL_S)
        entry = await self._etcd.get(self._key)
        if not entry or (entry.value, entry.lease) != (self._value, self._lease):
            await self._etcd.put(self._key, self._value, self._lease)
