"""Who this node is in the cluster, and how it comes into the roster and goes by it. What it says of itself in etcd:

    <prefix>identities/<id>    incarnation, time of the last entry on the disk, state directory, machine, address: kept
    <prefix>nodes/<id>         who is alive: under a lease of the process
    <prefix>roster             which nodes hold base shares: changed by compare-and-swap (roster_document.py)

A node may spend when its state directory is the one that the cluster knows it by, and it is in the roster. With
`join: auto` it comes into the roster by itself, and again after it was removed, under another name. A node that starts
while etcd is away goes on with what is on its disk. One that was drained stays out until it is told to join.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from postmeter import __version__, logs
from postmeter.cluster import Cluster
from postmeter.core.effects import Place, Record, Standing
from postmeter.core.handover import STANDING
from postmeter.core.identity import Identity, is_impostor, machine_of, next_name, refusal
from postmeter.core.roster import Roster
from postmeter.defaults import JOIN_RETRY_S, REGISTER_INTERVAL_S
from postmeter.errors import ClusterError, ConfigError, EtcdError
from postmeter.etcd import Entry, Etcd
from postmeter.mirror import Mirror, Update
from postmeter.node import Node
from postmeter.presence import Presence
from postmeter.records import read_place, read_record
from postmeter.roster_document import RosterDocument, first_roster, read_roster
from postmeter.v1 import control_pb2 as pb

_TOLD = ("identities", "status")


class RejoinError(ClusterError):
    """The node is out of the roster, and is to begin anew under another name."""


class Membership:
    """To `begin`, and then `run` in a task. `problem` says why this node is not in the roster, "" if it is.

    Whoever runs the mirror of etcd calls `take` with what changed in it. `rejoin`: join even if that has to be told.
    """

    def __init__(self, node: Node, cluster: Cluster, etcd: Etcd, mirror: Mirror, rejoin: bool) -> None:
        assert node.settings.etcd is not None
        self.problem = ""
        self._node = node
        self._cluster = cluster
        self._etcd = etcd
        self._mirror = mirror
        self._prefix = node.settings.etcd.prefix
        self._settings = cluster.settings
        self._wants_in = rejoin or cluster.settings.join == "auto"
        self._rejoin = rejoin
        self._anew = False
        self._identity = node.state.identity or Identity(node.settings.node, 0, 0, machine(), uuid4().hex)
        self._presence: Presence | None = None
        self._tasks: list[asyncio.Task[Any]] = []
        self._roster: RosterDocument | None = None
        self._roster_entry: Entry | None = None
        self._roster_unreadable = False
        self._read_ms = 0
        self._update = asyncio.Event()
        self._register_s = 0.0

    @property
    def id(self) -> str:
        """What this node is called in the roster."""
        return self._identity.node

    # --- starting -----------------------------------------------------------------------------------------------------

    async def begin(self, seen: bool) -> None:
        """Go on as the node that the state directory belongs to, if it does; `seen`: etcd has been seen.

        Raises ClusterError if its state may not be used, and StorageError.
        """
        self._set_problem("is not in the roster yet" if seen else "has not seen the roster: etcd does not answer")
        records = {read_place(place): read_record(record) for place, record in self._node.storage.records()}
        standing = records.get(STANDING)
        if machine_of(self.id) != self._node.settings.node:
            raise ClusterError(
                f"{self._node.settings.state_dir} is the state of {self.id}, but node is {self._node.settings.node}:"
                " write its name there, or begin with an empty state_dir"
            )
        self._read_roster()
        stopped = self._roster.stopped if self._roster is not None else ()
        if not isinstance(standing, Standing):
            return
        if self._wants_in and (self._rejoin or standing.node in stopped):
            self._anew = True
            return
        if reason := self._refusal():
            raise ClusterError(reason)
        await self._start(Roster.restore(standing), records, self._node.state.alive_ms)

    async def _start(self, roster: Roster, records: Mapping[Place, Record], alive_ms: int) -> None:
        self._identity = replace(self._identity, incarnation=self._identity.incarnation + 1)
        await self._store_identity(anew=not records)
        await self._cluster.begin(roster, self._identity.incarnation, records, alive_ms, self._node.state.clean)
        alive = {"address": self._settings.address, "incarnation": self._identity.incarnation, "version": __version__}
        self._presence = Presence(self._etcd, self._key("nodes"), _json(alive), lambda _: None)
        self._tasks.append(asyncio.create_task(self._presence.run()))
        self._set_problem("")
        self._follow()

    async def _store_identity(self, anew: bool) -> None:
        storage, moment = self._node.storage, self._node.clock.moment()
        self._identity = replace(self._identity, written_ms=moment.ledger_ms)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(storage.thread, storage.begin, self._identity, moment, anew)

    def _refusal(self) -> str:
        return refusal(self._identity, machine(), self._registered(), self._is_elsewhere())

    def _registered(self) -> Identity | None:
        entry = self._mirror.entries.get(f"identities/{self.id}")
        return None if entry is None else _read_identity(self.id, entry.value)

    def _is_elsewhere(self) -> bool:
        """Whether a process at another address holds this node's lease. One at this address is gone: it is bound."""
        entry = self._mirror.entries.get(f"nodes/{self.id}")
        return entry is not None and read_json(entry.value).get("address") != self._settings.address

    # --- running ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Join, follow and register. Raises ClusterError when this process must stop, RejoinError to begin anew."""
        while True:
            self._update.clear()
            try:
                await self._catch_up()
            except EtcdError as error:
                # The mirror tells that etcd is away.
                logs.event(logging.DEBUG, "etcd failed", reason=error)
            with suppress(TimeoutError):
                wait_s = JOIN_RETRY_S if self._cluster.rights is None or self._is_behind else REGISTER_INTERVAL_S
                await asyncio.wait_for(self._update.wait(), wait_s)

    async def leave(self) -> None:
        """The process ends; the node stays in the roster."""
        for task in self._tasks:
            task.cancel()
        if self._presence is not None:
            await self._presence.leave()

    def take(self, update: Update) -> None:
        """Something has changed in etcd."""
        if update.listed or any(key == "roster" or key.startswith(("identities/", "nodes/")) for key in update.changes):
            self._read_roster()
            self._follow()
            self._update.set()

    async def _catch_up(self) -> None:
        rights = self._cluster.rights
        if rights is None:
            if self._wants_in:
                await self._join()
            else:
                self._set_problem("is not in the roster: `postmeter node join` brings it in")
            return
        leaves = self._rejoin or self.id in rights.roster.stopped
        if self._is_out and self._wants_in and leaves and self.id not in self._awaited:
            raise RejoinError(f"{self.id} is out of the roster and joins under another name")
        if self._is_behind:
            await self._confirm_roster()
        await self._repair_roster(rights.roster)
        await self._register()

    # --- the roster ---------------------------------------------------------------------------------------------------

    def _read_roster(self) -> None:
        entry = self._mirror.entries.get("roster")
        if entry == self._roster_entry:
            return
        self._roster_entry, self._roster_unreadable, self._read_ms = entry, False, 0
        try:
            self._roster = read_roster(entry.value, entry.mod_revision) if entry is not None else None
        except ConfigError as error:
            # What was followed so far stays: nobody may spend more because of this.
            self._roster_unreadable = True
            logs.event(logging.ERROR, "roster refused", problem=error)

    async def _confirm_roster(self) -> None:
        """Ask for the roster once more: how long an event was under way, or this process did not run, nobody knows."""
        asked_ms = self._node.now_ms()
        if await self._etcd.get(f"{self._prefix}roster") == self._roster_entry:
            self._read_ms = asked_ms
            self._follow()

    @property
    def _is_behind(self) -> bool:
        """Whether there is a generation that this node is to adopt."""
        rights, roster = self._cluster.rights, self._roster
        if rights is None or roster is None or not rights.roster.is_member:
            return False
        return rights.roster.generation < roster.generation

    def _follow(self) -> None:
        """Go by the roster as it is now. A generation is adopted only while `_confirm_roster` was not long ago."""
        roster, rights = self._roster, self._cluster.rights
        if rights is None or roster is None or self._contradicts(roster, rights.roster):
            return
        self._cluster.follow(roster.generations, roster.stopped, self._addresses(), self._read_ms)
        if self.id in roster.stopped:
            self._set_problem("was declared stopped: it admits nothing on limited meters")
        elif self.id not in roster.members:
            self._set_problem("was drained: it admits nothing on limited meters, `postmeter node join` brings it back")
        else:
            self._set_problem("")

    @property
    def _is_out(self) -> bool:
        return self._roster is not None and self.id not in self._roster.members

    @staticmethod
    def _contradicts(roster: RosterDocument, own: Roster) -> bool:
        """Whether the roster in etcd is not a later form of what this node goes by."""
        if roster.generation < own.generation:
            return True
        return roster.generations.get(own.generation, own.members) != own.members

    async def _repair_roster(self, own: Roster) -> None:
        """After etcd was restored from an older snapshot, or lost: write what this node goes by."""
        roster = self._roster
        if roster is not None and roster.generation >= own.generation:
            if self._contradicts(roster, own):
                theirs = ", ".join(roster.generations[own.generation])
                self._set_problem(
                    f"goes by a generation {own.generation} of the roster ({', '.join(own.members)}) that is another in"
                    f" etcd ({theirs}): stop this node, take it out with `postmeter node remove {self.id}`, move its"
                    " state_dir away and start it"
                )
            return
        if self._roster_unreadable:
            return
        stopped = tuple(sorted({*own.stopped, *(roster.stopped if roster is not None else ())}))
        last = f"{self.id} wrote its roster again, etcd had an older one"
        mod_revision = roster.mod_revision if roster is not None else 0
        repaired = RosterDocument(own.generations, stopped, "", mod_revision)
        for node in {*own.members} & {*stopped}:
            repaired = repaired.removed(node, {}, settled=False)
        repaired = replace(repaired, last=last)
        if await self._write_roster(repaired):
            logs.event(logging.WARNING, "roster repaired", generation=own.generation, members=",".join(own.members))

    async def _join(self) -> None:
        """Come into the roster, with an identity that is registered first."""
        roster = self._roster
        if self._roster_unreadable:
            self._set_problem("cannot join: the roster in etcd cannot be read")
            return
        gone = roster.stopped if roster is not None else ()
        needed = {*self._awaited, *(roster.members if roster is not None else ())}
        registered = self._registered()
        if self._anew or self.id in gone:
            self._identity = Identity(self._free_name(), 0, 0, machine(), uuid4().hex)
            self._anew, registered = False, None
        elif registered is not None and self.id not in needed and registered.directory != self._identity.directory:
            self._identity = replace(self._identity, node=self._free_name())
            registered = None
        elif reason := self._refusal():
            self._set_problem(reason)
            return
        if registered is None:
            await self._store_identity(anew=True)
            if not await self._write_identity(0):
                return
        if roster is None:
            joined = first_roster(self.id)
        elif self.id in roster.members:
            joined = roster
        else:
            try:
                joined = roster.joined(self.id, self._adopted(), self._is_settled())
            except ConfigError as error:
                self._set_problem(f"waits to join: {error}")
                return
        if joined is not roster and not await self._write_roster(joined):
            return
        born, now_ms = joined.born(self.id), self._node.now_ms()
        self._rejoin = False
        logs.event(logging.INFO, "joined", node=self.id, generation=joined.generation, members=",".join(joined.members))
        await self._start(Roster(self.id, joined.generations, born, dict.fromkeys(joined.stopped, now_ms)), {}, now_ms)

    def _free_name(self) -> str:
        roster = self._roster
        known = [key.partition("/")[2] for key in self._mirror.entries if key.startswith("identities/")]
        if roster is not None:
            known += [*roster.stopped, *(node for members in roster.generations.values() for node in members)]
        return next_name(self._node.settings.node, [*known, self.id])

    def _adopted(self) -> dict[str, int]:
        """The generation that each node says it follows."""
        adopted = {}
        for key, entry in self._mirror.entries.items():
            if key.startswith("status/"):
                generation = read_json(entry.value).get("generation")
                adopted[key.partition("/")[2]] = generation if isinstance(generation, int) else 0
        return adopted

    def _is_settled(self) -> bool:
        """Whether any member says that nobody can be spending by a generation before the newest."""
        roster = self._roster
        if roster is None:
            return False
        told = map(self._told, roster.members)
        return any(status.get("settled") is True and status.get("generation") == roster.generation for status in told)

    def _told(self, node: str) -> dict[str, Any]:
        """The status of a node."""
        entry = self._mirror.entries.get(f"status/{node}")
        return {} if entry is None else read_json(entry.value)

    @property
    def _awaited(self) -> Collection[str]:
        """The living nodes that have to follow the roster yet."""
        return () if self._roster is None else self._roster.awaited(self._adopted())

    # --- what operators change ----------------------------------------------------------------------------------------

    def join(self, node: str) -> str:
        """Let this node join, although its settings say that this has to be told. Raises ConfigError."""
        if node != self.id:
            raise ConfigError([f"this is {self.id}: ask the agent of {node} to join"])
        if self._cluster.rights is not None and not self._is_out:
            raise ConfigError([f"{self.id} is in the roster already"])
        self._wants_in = self._rejoin = True
        self._update.set()
        return f"{self.id} joins; `postmeter nodes` shows when it has"

    async def drain(self, node: str) -> str:
        """Take a node that runs out of the roster. Raises ConfigError if that cannot be, and EtcdError."""
        await self._change(lambda roster: roster.drained(node, self._adopted(), self._is_settled()))
        return f"{node} hands over what it has, and refuses mail on limited meters"

    async def remove(self, node: str) -> str:
        """Declare a node stopped for good. Raises ConfigError if that cannot be, and EtcdError."""
        if f"nodes/{node}" in self._mirror.entries:
            raise ConfigError([f"{node} is alive, it keeps its lease in etcd: drain it, or stop it first"])
        await self._change(lambda roster: roster.removed(node, self._adopted(), self._is_settled()))
        for what in ("identities", "status"):
            entry = self._mirror.entries.get(f"{what}/{node}")
            if entry is not None:
                await self._etcd.swap(f"{self._prefix}{what}/{node}", None, entry.mod_revision)
        return f"{node} is out; the others take its share over as soon as nothing that it may have admitted counts"

    async def _change(self, change: Callable[[RosterDocument], RosterDocument]) -> None:
        roster = self._roster
        if roster is None:
            raise ConfigError(["there is no roster yet, or etcd has not been seen"])
        if not await self._write_roster(change(roster)):
            raise ConfigError(["the roster was changed by somebody else at the same moment: look, and try again"])

    def report(self) -> pb.NodesResponse:
        """Who is in the cluster, as far as this node knows."""
        roster, entries = self._roster, self._mirror.entries
        members = roster.members if roster is not None else ()
        stopped = roster.stopped if roster is not None else ()
        awaited = self._awaited
        running = {key.partition("/")[2] for key in entries if key.startswith("nodes/")}
        states = (
            {state.node: state for state in self._cluster.peers.states()} if self._cluster.peers is not None else {}
        )
        nodes = []
        for id in sorted({*members, *awaited, *running, *stopped, self.id}):
            told = {what: read_json(entries[key].value) if (key := f"{what}/{id}") in entries else {} for what in _TOLD}
            node = pb.Node(id=id, self=id == self.id, alive=id in running, state="out")
            if id in stopped:
                node.state = "stopped"
            elif id in members and roster is not None:
                node.state = "member" if self._adopted().get(id, 0) == roster.generation else "joining"
            elif id in awaited:
                node.state = "leaving"
            _describe(node, told["identities"], told["status"])
            if node.self and self._cluster.rights is not None:
                node.awaits.extend(sorted({receiver for receiver, _ in self._cluster.rights.owed}))
            peer = states.get(id)
            if peer is not None and peer.heard_ms is not None:
                node.reached_ms = peer.heard_ms
                node.ahead_ms = peer.clock_offset_ms or 0
            nodes.append(node)
        generation = roster.generation if roster is not None else 0
        last = roster.last if roster is not None else ""
        return pb.NodesResponse(nodes=nodes, generation=generation, last=last, revision=self._mirror.revision)

    def status(self) -> dict[str, object]:
        """What the others are told of this node beside its limits."""
        rights = self._cluster.rights
        if rights is None:
            # Who has not started as this node yet leaves what an earlier process has said.
            return {"generation": self._told(self.id).get("generation", 0), "settled": False, "problem": self.problem}
        lent, borrowed = self._cluster.moved_parts()
        return {
            "generation": rights.roster.generation,
            "settled": rights.is_settled(self._node.now_ms()),
            "lent": round(lent, 3),
            "borrowed": round(borrowed, 3),
        }

    # --- registration -------------------------------------------------------------------------------------------------

    async def _register(self) -> None:
        """Tell now and then how far this node's state has come, so that an older one can be told from it."""
        entry, registered = self._mirror.entries.get(f"identities/{self.id}"), self._registered()
        if is_impostor(self._identity, registered) or (
            registered is not None and registered.directory != self._identity.directory
        ):
            raise ClusterError(f"another process has started as {self.id} since: this one stops")
        now_s = asyncio.get_running_loop().time()
        current = registered is not None and registered.incarnation == self._identity.incarnation
        if current and now_s < self._register_s:
            return
        written_ms = await self._cluster.sign_of_life()
        self._identity = replace(self._identity, written_ms=max(written_ms, self._identity.written_ms))
        if await self._write_identity(entry.mod_revision if entry is not None else 0):
            self._register_s = now_s + REGISTER_INTERVAL_S

    async def _write_identity(self, mod_revision: int) -> bool:
        value = _json({**asdict(self._identity), "address": self._settings.address})
        return await self._etcd.swap(self._prefix + f"identities/{self.id}", value, mod_revision)

    def _addresses(self) -> dict[str, str]:
        """Where the others can be reached."""
        known = {
            key.partition("/")[2]: entry for key, entry in self._mirror.entries.items() if key.startswith("identities/")
        }
        return {
            node: str(read_json(entry.value).get("address", "")) for node, entry in known.items() if node != self.id
        }

    # --- etcd ---------------------------------------------------------------------------------------------------------

    def _key(self, what: str) -> str:
        return f"{self._prefix}{what}/{self.id}"

    async def _write_roster(self, roster: RosterDocument) -> bool:
        """False if it is not any more what this one was made of."""
        return await self._etcd.swap(f"{self._prefix}roster", roster.text().encode(), roster.mod_revision)

    def _set_problem(self, problem: str) -> None:
        if problem == self.problem:
            return
        self.problem = problem
        if problem:
            logs.event(logging.WARNING, "not in the cluster", node=self.id, reason=problem)
        self._node.set_trouble("roster", f"{self.id} {problem}" if problem else "")


def machine() -> str:
    """What tells this machine apart."""
    with suppress(OSError):
        return Path("/etc/machine-id").read_text("ascii", "replace").strip()
    return ""


def read_json(value: bytes) -> dict[str, Any]:
    """What a node wrote; {} if it is no object."""
    try:
        read = json.loads(value)
    except ValueError:
        return {}
    return read if isinstance(read, dict) else {}


def _json(value: Mapping[str, object]) -> bytes:
    return json.dumps(value).encode()


def _describe(node: pb.Node, identity: Mapping[str, Any], status: Mapping[str, Any]) -> None:
    """What a node says of itself, as far as it makes sense."""
    with suppress(TypeError, ValueError, AttributeError):
        node.address = identity.get("address", "")
        node.version = status.get("version", "")
        node.generation = status.get("generation", 0)
        node.revision = status.get("revision", 0)
        node.changing = not status.get("settled", True)
        node.refused = len(status.get("refused", ()))
        node.lent_percent = 100 * status.get("lent", 0.0)
        node.borrowed_percent = 100 * status.get("borrowed", 0.0)
        node.troubles.extend(f"{part}: {reason}" for part, reason in status.get("troubles", {}).items())


def _read_identity(node: str, value: bytes) -> Identity | None:
    read = read_json(value)
    try:
        incarnation, written_ms = int(read["incarnation"]), int(read["written_ms"])
        return Identity(node, incarnation, written_ms, str(read["machine"]), str(read["directory"]))
    except (KeyError, TypeError, ValueError):
        return None
