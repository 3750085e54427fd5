"""Limits and overrides in etcd, put into force on this node as they change.

Many that come at once are put into force together; they are read in portions, so that no request waits for them. What
is refused is logged once, and stays in `refused`. What is in force is kept in the state directory, for a start while
etcd is away.
"""

from __future__ import annotations

import asyncio
import logging
import time
from itertools import islice
from typing import NoReturn

from postmeter import logs
from postmeter.core.limits import Limit
from postmeter.defaults import ETCD_PORTION_KEYS, ETCD_SETTLE_KEYS, STATUS_PROBLEMS_MAX, TIDY_INTERVAL_S
from postmeter.errors import ConfigError
from postmeter.etcd_limits import LIMITS, OVERRIDES, EtcdLimits, encode
from postmeter.limits_copy import LimitsCopy
from postmeter.mirror import Mirror, Update
from postmeter.node import Node


class LimitsFollower:
    """Takes updates, or what was kept. `revision` is that of the last change, the same on all nodes that follow."""

    def __init__(self, node: Node, mirror: Mirror) -> None:
        self.revision = 0
        self._node = node
        self._mirror = mirror
        self._limits = EtcdLimits()
        self._copy = LimitsCopy(node.settings.state_dir / "etcd-limits.jsonl")
        self._in_force: list[Limit] | None = None
        self._applied = False
        self._emptied = False
        self._settling = asyncio.Lock()

    async def take(self, update: Update) -> None:
        """Put what changed into force."""
        if update.listed and not any(key.startswith(LIMITS) for key in self._mirror.entries):
            if self._in_force is None:
                await self._load("etcd has no limits")
            if self._in_force and (update.broken or not self.revision):
                # Nobody deletes all limits and wants mail to go on without any: this etcd was emptied, or is a new one.
                logs.event(logging.ERROR, "last good limits stay in force", reason="etcd has no limits any more")
                self._emptied = True
        if self._emptied and not any(key.startswith(LIMITS) for key in self._mirror.entries):
            return
        # What was applied so far is the copy, or what etcd had before it was emptied.
        anew = self._emptied or not self._applied
        self._emptied, self._applied = False, True
        several = self._mirror.entries if anew else update.changes
        changes = {key: entry for key, entry in several.items() if key.startswith((LIMITS, OVERRIDES))}
        self._limits.apply({key: entry and entry.value for key, entry in changes.items()})
        if anew:
            self._limits.keep(self._mirror.entries)
        if update.broken:
            self.revision = 0
            several = self._mirror.entries
        for key, entry in several.items():
            if entry and key.startswith((LIMITS, OVERRIDES)):
                self.revision = max(self.revision, entry.mod_revision)
        if changes or anew:
            await self._put_in_force()

    async def load(self) -> None:
        """Put what was in force when this node ran last into force, unless etcd is heard from first."""
        await self._load("etcd does not answer")

    async def _load(self, reason: str) -> None:
        try:
            text = await asyncio.to_thread(self._copy.read)
            if self._applied or self._in_force is not None or not text:
                return
            self._limits.load(text)
        except (OSError, ConfigError) as error:
            logs.event(logging.ERROR, "last good limits cannot be read", file=self._copy.path, error=error)
            return
        logs.event(logging.WARNING, "last good limits in force", file=self._copy.path, reason=reason)
        await self._put_in_force()

    async def run(self) -> NoReturn:
        """Let overrides end in time, until cancelled."""
        while True:
            if time.time() >= self._limits.next_end_s:
                await self._put_in_force()
            await asyncio.sleep(TIDY_INTERVAL_S)

    def refused(self) -> dict[str, str]:
        """What is not in force, by key, and why; no more than anybody reads."""
        refused: dict[str, str] = {}
        for key, problem in islice(self._limits.problems(), STATUS_PROBLEMS_MAX):
            refused[key] = f"{refused[key]}; {problem}" if key in refused else problem
        return refused

    async def _put_in_force(self) -> None:
        async with self._settling:
            more = True
            while more:
                more = self._limits.settle(ETCD_SETTLE_KEYS)
                await asyncio.sleep(0)
            change = self._limits.take(time.time())
            for key, problems in islice(change.refused.items(), STATUS_PROBLEMS_MAX):
                for problem in problems:
                    logs.event(logging.ERROR, "refused, the last good one stays", key=key, problem=problem)
            if change.limits is not None or self._in_force is None:
                self._in_force = change.limits or []
                self._node.put_in_force(self._in_force)
                self._node.set_trouble("limits", "")
            elif change.overrides:
                self._node.change_overrides(change.overrides)
            await self._keep(change.texts)

    async def _keep(self, changed: dict[str, str | None]) -> None:
        try:
            if self._copy.is_due:
                lines = []
                for place, line in enumerate(self._limits.dump()):
                    lines.append(line)
                    if place % ETCD_PORTION_KEYS == 0:
                        await asyncio.sleep(0)
                await asyncio.to_thread(self._copy.write, "".join(lines))
            elif changed:
                await asyncio.to_thread(self._copy.append, encode(changed))
        except OSError as error:
            logs.event(logging.WARNING, "last good limits not kept", file=self._copy.path, error=error)
