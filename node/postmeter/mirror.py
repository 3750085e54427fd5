"""A copy of all keys of etcd with a prefix, which follows etcd whatever happens to it.

    mirror = Mirror(etcd, "/postmeter/", on_update, on_health)
    await mirror.run()             # in a task; until it is cancelled

It lists all keys, hands them on, and then what changes, in order. When the watch ends, for whatever reason, it lists
again and hands on the difference, so nothing that has happened meanwhile can be missed:

    etcd, or the way to it, is away or silent     tries again, all endpoints in turn; the copy stays as it was
    the history was compacted while it was away   nothing special
    the token expired                             the client fetches another one
    etcd was restored from an older snapshot      the same, and `Update.broken` says so: what was there may be gone
    it is another cluster                         the same

`on_update` is awaited, and etcd waits for that long. It gets every listing, even if nothing changed, and the changes
after it. `on_health` gets the reason why etcd cannot be followed, and "" when it can.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import NoReturn

from postmeter import logs
from postmeter.defaults import ETCD_PORTION_KEYS, ETCD_RETRY_S_MAX
from postmeter.errors import EtcdError
from postmeter.etcd import Entry, Etcd, Events, Listing, check_size, persist


@dataclass(frozen=True, slots=True)
class Update:
    """What changed, by key without the prefix; None for what is gone. `listed`: it is the difference to a new listing.

    `broken`: why this does not continue what came before ("" if it does).
    """

    changes: Mapping[str, Entry | None]
    listed: bool
    broken: str = ""


class Mirror:
    """Public: `entries` by key without the prefix, and the `revision` and `cluster_id` that they are of; 0 before."""

    def __init__(
        self,
        etcd: Etcd,
        prefix: str,
        on_update: Callable[[Update], Awaitable[None]],
        on_health: Callable[[str], None],
    ) -> None:
        self.entries: dict[str, Entry] = {}
        self.revision = 0
        self.cluster_id = 0
        self._size = 0
        self._etcd = etcd
        self._prefix = prefix
        self._on_update = on_update
        self._outage = logs.Outage("etcd", on_health)

    async def run(self) -> NoReturn:
        """Follow etcd until cancelled."""
        while True:
            await persist(self._follow, self._outage)

    async def _follow(self) -> None:
        """List and watch, until the watch ends. Raises EtcdError if that was soon."""
        await self._take_listing(await self._etcd.get_prefix(self._prefix))
        began_s = asyncio.get_running_loop().time()
        async with aclosing(self._etcd.watch(self._prefix, self.revision + 1)) as watch:
            try:
                async for events in watch:
                    self._outage.over()
                    await self._take_events(events)
            except EtcdError as error:
                if asyncio.get_running_loop().time() - began_s < ETCD_RETRY_S_MAX:
                    raise
                logs.event(logging.INFO, "etcd watch ended", reason=error)

    async def _take_listing(self, listing: Listing) -> None:
        broken = self._broken(listing)
        entries: dict[str, Entry] = {}
        changes: dict[str, Entry | None] = {}
        size = 0
        for place, (whole, entry) in enumerate(listing.entries.items(), 1):
            key = whole[len(self._prefix) :]
            entries[key] = entry
            size += len(whole) + len(entry.value)
            if self.entries.get(key) != entry:
                changes[key] = entry
            if place % ETCD_PORTION_KEYS == 0:
                await asyncio.sleep(0)
        for place, key in enumerate(self.entries, 1):
            if key not in entries:
                changes[key] = None
            if place % ETCD_PORTION_KEYS == 0:
                await asyncio.sleep(0)
        self.entries, self._size = entries, size
        self.revision, self.cluster_id = listing.revision, listing.cluster_id
        await self._on_update(Update(changes, True, broken))

    def _broken(self, listing: Listing) -> str:
        if self.cluster_id and self.cluster_id != listing.cluster_id:
            broken = f"etcd is another cluster: {listing.cluster_id:x}, and was {self.cluster_id:x}"
        elif listing.revision < self.revision:
            broken = f"etcd was restored to an older state: revision {listing.revision}, and was {self.revision}"
        else:
            return ""
        logs.event(logging.WARNING, "etcd has another history", reason=broken)
        return broken

    async def _take_events(self, events: Events) -> None:
        if events.cluster_id != self.cluster_id:
            raise EtcdError("the watch is answered by another cluster")
        changes: dict[str, Entry | None] = {}
        keys, size = len(self.entries), self._size
        for whole, entry in events.changes.items():
            key = whole[len(self._prefix) :]
            changes[key] = entry
            before = self.entries.get(key)
            if before:
                keys, size = keys - 1, size - len(whole) - len(before.value)
            if entry:
                keys, size = keys + 1, size + len(whole) + len(entry.value)
        check_size(self._prefix, keys, size)
        for key, entry in changes.items():
            if entry:
                self.entries[key] = entry
            else:
                self.entries.pop(key, None)
        self._size = size
        # A member may be behind the one that answered last.
        self.revision = max(self.revision, events.revision)
        if changes:
            await self._on_update(Update(changes, False))
