"""What lies in etcd, followed by this node: limits and overrides are put into force, and what it follows is told.

    <prefix>limits/ overrides/    see limits_follower.py
    <prefix>status/<id>           what this node follows, and what it refuses: for `postmeter nodes`, and for people
    <prefix>resets/<number>       usage of a key is to be forgotten by all nodes; there for RESET_TTL_S

The limits that are in force are kept in the state directory, for a start while etcd is away. A change is in force as
soon as etcd tells; many that come at once are put into force together.
"""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import suppress
from typing import Any, NoReturn
from uuid import uuid4

from postmeter import __version__, logs
from postmeter.defaults import ETCD_START_S, REGISTER_INTERVAL_S, RESET_TTL_S, STATUS_PAUSE_S
from postmeter.errors import EtcdError, StorageError
from postmeter.etcd import Etcd
from postmeter.limits_follower import LimitsFollower
from postmeter.membership import Membership, read_json
from postmeter.mirror import Mirror, Update
from postmeter.node import Node


class EtcdFollower:
    """To `start`, `run` in a task, and `stop`. `membership` is None for a node that is in no cluster."""

    def __init__(self, node: Node, rejoin: bool = False) -> None:
        settings = node.settings
        assert settings.etcd is not None
        self.membership: Membership | None = None
        self._node = node
        self._prefix = settings.etcd.prefix
        self._etcd = Etcd(settings.etcd)
        self._mirror = Mirror(self._etcd, self._prefix, self._take, self._set_health)
        self._limits = LimitsFollower(node, self._mirror)
        self._resets: set[str] = set()
        self._listed = asyncio.Event()
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[Any]] = []
        if node.cluster is not None:
            self.membership = Membership(node, node.cluster, self._etcd, self._mirror, rejoin)

    # --- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Follow etcd; without it, after ETCD_START_S, what this node knows. Raises ClusterError and StorageError."""
        self._node.set_trouble("limits", "no limits yet: etcd has not answered, and none are kept here")
        self._tasks.append(asyncio.create_task(self._mirror.run()))
        with suppress(TimeoutError):
            await asyncio.wait_for(self._listed.wait(), ETCD_START_S)
        if not self._listed.is_set():
            await self._limits.load()
        if self.membership is not None:
            await self.membership.begin(seen=self._listed.is_set())

    async def run(self) -> None:
        """Until cancelled. Raises ClusterError when this process must stop."""
        self._node.on_health.append(self._changed.set)
        if self._node.cluster is not None:
            self._node.cluster.on_settled = self._changed.set
        self._tasks.append(asyncio.create_task(self._limits.run()))
        self._tasks.append(asyncio.create_task(self._tell_status()))
        if self.membership is not None:
            await self.membership.run()
        await asyncio.gather(*self._tasks)

    async def stop(self) -> None:
        """Follow no longer, and take this process out of those that are alive."""
        for task in self._tasks:
            task.cancel()
        if self.membership is not None:
            await self.membership.leave()
        await self._etcd.close()

    # --- following ----------------------------------------------------------------------------------------------------

    async def _take(self, update: Update) -> None:
        await self._limits.take(update)
        self._take_resets(update)
        self._listed.set()
        if self.membership is not None:
            self.membership.take(update)
        self._changed.set()

    # --- resets -------------------------------------------------------------------------------------------------------

    async def spread_reset(self, key: str, limit: str | None) -> None:
        """Let the other nodes forget what a key has used. Raises EtcdError."""
        number = uuid4().hex
        self._resets.add(number)
        value = json.dumps({"key": key, "limit": limit, "node": self._node.settings.node}).encode()
        await self._etcd.put(f"{self._prefix}resets/{number}", value, await self._etcd.grant(RESET_TTL_S))

    def _take_resets(self, update: Update) -> None:
        """Do what is new since this node follows etcd; what was there before it may have missed."""
        for name, entry in update.changes.items():
            number = name.removeprefix("resets/")
            if entry is None or number == name or number in self._resets:
                self._resets.discard(number)
                continue
            self._resets.add(number)
            reset = read_json(entry.value)
            key, limit = reset.get("key"), reset.get("limit")
            if self._listed.is_set() and isinstance(key, str) and isinstance(limit, str | None):
                logs.event(logging.INFO, "reset asked for", key=key, limit=limit, node=reset.get("node"))
                self._tasks.append(asyncio.create_task(self._reset(key, limit)))

    async def _reset(self, key: str, limit: str | None) -> None:
        try:
            await self._node.reset(key, limit)
        except StorageError as error:
            logs.event(logging.ERROR, "reset not stored yet", key=key, reason=error)

    # --- status -------------------------------------------------------------------------------------------------------

    def _set_health(self, reason: str) -> None:
        self._node.set_health("etcd", reason)
        self._changed.set()

    async def _tell_status(self) -> NoReturn:
        """See to it that etcd has the status as it is, when something changes, and now and then."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), REGISTER_INTERVAL_S)
            self._changed.clear()
            node, status = self._status()
            entry = self._mirror.entries.get(f"status/{node}")
            if self._listed.is_set() and (entry is None or entry.value != status):
                try:
                    await self._etcd.put(f"{self._prefix}status/{node}", status)
                except EtcdError as error:
                    logs.event(logging.DEBUG, "status not told", reason=error)
            await asyncio.sleep(STATUS_PAUSE_S)

    def _status(self) -> tuple[str, bytes]:
        status: dict[str, object] = {
            "version": __version__,
            "revision": self._limits.revision,
            "refused": self._limits.refused(),
            "troubles": {part: reason for part, reason in self._node.health.items() if reason},
        }
        if self.membership is None:
            return self._node.settings.node, json.dumps(status).encode()
        status |= self.membership.status()
        return self.membership.id, json.dumps(status).encode()
