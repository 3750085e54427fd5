"""The admin socket: what an operator asks of the running agent, over gRPC on a unix socket.

Two services (see proto/postmeter/v1/control.proto):

    postmeter.v1.Control     Ask, Show, Top, Nodes, ChangeRoster, Reset, Reload: what the command line shows and does
    grpc.health.v1.Health    "" for the whole agent, "postmeter.policy" and so on for its parts; the port of the peers
                             serves it, too, over TLS where they have certificates

Nobody but the agent's own user can connect before the socket has its owner and mode. A socket file that a killed agent
left is replaced; one that answers is not. What takes long (a million keys) is done in portions, and Postfix is answered
in between.
"""

# ruff: noqa: N802 - the calls are named as in control.proto
from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from heapq import nlargest, nsmallest
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from postmeter.cluster import Cluster
from postmeter.core.answer import one_line
from postmeter.core.limits import ADDRESS_ATTRIBUTES, Key, Limit
from postmeter.core.meters import OVERFLOW_KEY, OVERFLOW_ROW, UNLIMITED, Meters, MetersId
from postmeter.core.policy import answer
from postmeter.core.request import Parser, Request, single
from postmeter.core.rule import Reading
from postmeter.core.shared import SharedMeters
from postmeter.defaults import (
    CONTROL_BYTES_MAX,
    CONTROL_CALLS_MAX,
    CONTROL_GRACE_S,
    NEAREST_KEYS_MAX,
    SCAN_ROWS_MAX,
    TOP_KEYS_MAX,
)
from postmeter.errors import ConfigError, EtcdError, ProtocolError, StorageError
from postmeter.etcd_follower import EtcdFollower
from postmeter.node import Node
from postmeter.settings import Listener
from postmeter.sockets import give_away
from postmeter.v1 import control_pb2 as pb
from postmeter.v1 import control_pb2_grpc

# Without the others the node goes on answering.
WHOLE = ("policy", "storage")

Context = grpc.aio.ServicerContext[Any, Any]


class ControlServer:
    """The admin socket of a node. To be used from the event loop that the node is used from."""

    def __init__(self, node: Node, follower: EtcdFollower | None = None) -> None:
        self._node = node
        self._health = health.aio.HealthServicer()
        self._changed = asyncio.Event()
        self._following: asyncio.Task[None] | None = None
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=CONTROL_CALLS_MAX,
            options=[("grpc.max_receive_message_length", CONTROL_BYTES_MAX)],
        )
        control_pb2_grpc.add_ControlServicer_to_server(Control(node, follower), self._server)  # type: ignore[no-untyped-call]
        self._serve_health(self._server)
        if node.cluster is not None:
            node.cluster.services.append(self._serve_health)

    def _serve_health(self, server: grpc.aio.Server) -> None:
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)

    async def start(self) -> None:
        """Answer. Raises ConfigError if the socket cannot be made."""
        await self._publish_health()
        _bind(self._server, self._node.settings.admin_socket)
        await self._server.start()
        self._node.on_health.append(self._changed.set)
        self._following = asyncio.create_task(self._follow_health())

    async def stop(self) -> None:
        """Take no more calls, and let those under way end within CONTROL_GRACE_S."""
        if self._following is not None:
            self._following.cancel()
        await self._server.stop(CONTROL_GRACE_S)

    async def _follow_health(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self._publish_health()

    async def _publish_health(self) -> None:
        parts = {f"postmeter.{part}": reason for part, reason in self._node.health.items()}
        status = health_pb2.HealthCheckResponse.ServingStatus
        whole = "".join(self._node.health[part] for part in WHOLE)
        for service, reason in {**parts, "": whole}.items():
            await self._health.set(service, status.NOT_SERVING if reason else status.SERVING)


def _bind(server: grpc.aio.Server, listener: Listener) -> None:
    path = listener.path
    assert path is not None
    if _is_live(path):
        raise ConfigError([f"admin_socket: {path}: another agent answers there; stop it, or choose another path"])
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    umask = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{quote(str(draft))}")
        give_away(draft, listener)
        os.replace(draft, path)
    except (RuntimeError, OSError) as error:
        draft.unlink(missing_ok=True)
        right = f"{path.parent} must exist, and this user must be allowed to write there"
        raise ConfigError([f"admin_socket: {path}: {getattr(error, 'strerror', 'cannot be made')}; {right}"]) from error
    finally:
        os.umask(umask)


def _is_live(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError as error:
            return isinstance(error, TimeoutError)
    return True


class Control(control_pb2_grpc.ControlServicer):
    """The calls of control.proto."""

    def __init__(self, node: Node, follower: EtcdFollower | None = None) -> None:
        self._node = node
        self._follower = follower

    async def Ask(self, request: pb.AskRequest, context: Context) -> pb.AskResponse:
        """What Postfix would be told, and why."""
        try:
            explained = self._node.policy.explain(_parse(request.request), self._node.now_ms())
        except ProtocolError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, one_line(str(error)))
        explained = [(limit, why, [self._lent(reading) for reading in readings]) for limit, why, readings in explained]
        decision = answer([reading for _, _, readings in explained for reading in readings])
        return pb.AskResponse(
            action=decision.action,
            refused=decision.refused,
            limits=[self._explanation(*each) for each in explained],
            troubles=[f"{part}: {reason}" for part, reason in self._node.health.items() if reason],
        )

    async def Show(self, request: pb.ShowRequest, context: Context) -> pb.ShowResponse:
        """What a key has used."""
        written = _text(request.key)
        usages = [usage for limit in self._node.policy.limits for usage in self._usages(limit, written)]
        return pb.ShowResponse(usages=usages, nearest=[] if usages else await self._nearest(written))

    async def Top(self, request: pb.TopRequest, context: Context) -> pb.TopResponse:
        """Who has used most."""
        limits = await self._named(request.limit, context)
        several = [meters for limit in limits for meters in self._meters(limit)]
        keys = min(request.keys, TOP_KEYS_MAX // max(1, len(several)))
        return pb.TopResponse(rankings=[await self._ranking(meters, max(1, keys)) for meters in several])

    async def Reset(self, request: pb.ResetRequest, context: Context) -> pb.ResetResponse:
        """Forget what a key has used."""
        limits = await self._named(request.limit, context)
        written = _text(request.key)
        forgotten: list[pb.Forgotten] = []
        try:
            for key in sorted({_spelled(limit.key, written) for limit in limits}):
                used = {
                    meters.id: self._used_by_all(meters.id, key) for limit in limits for meters in self._meters(limit)
                }
                for id, here in await self._node.reset(key, request.limit or None):
                    used[id] = max(here, used.get(id, 0))
                forgotten += [_forgotten(id, key, amount) for id, amount in used.items() if amount]
                if self._follower is not None:
                    await self._follower.spread_reset(key, request.limit or None)
        except EtcdError as error:
            reason = f"forgotten at this node, but the others cannot be told: {error}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, one_line(reason))
        except StorageError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, one_line(str(error)))
        return pb.ResetResponse(forgotten=forgotten, nearest=[] if forgotten else await self._nearest(written))

    async def Reload(self, request: pb.ReloadRequest, context: Context) -> pb.ReloadResponse:
        """Read the limits again."""
        problems: list[str] = []
        try:
            await self._node.reload()
        except ConfigError as error:
            problems = error.problems
        return pb.ReloadResponse(problems=problems, limits=len(self._node.policy.limits))

    async def Nodes(self, request: pb.NodesRequest, context: Context) -> pb.NodesResponse:
        """Who is in the cluster."""
        membership = self._follower.membership if self._follower is not None else None
        return pb.NodesResponse() if membership is None else membership.report()

    async def ChangeRoster(self, request: pb.ChangeRosterRequest, context: Context) -> pb.ChangeRosterResponse:
        """Let a node join, drain it, or remove it."""
        membership = self._follower.membership if self._follower is not None else None
        if membership is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "this agent is in no cluster")
        node = request.node or membership.id
        try:
            match request.change:
                case pb.ChangeRosterRequest.CHANGE_JOIN:
                    done = membership.join(node)
                case pb.ChangeRosterRequest.CHANGE_DRAIN:
                    done = await membership.drain(node)
                case pb.ChangeRosterRequest.CHANGE_REMOVE:
                    done = await membership.remove(node)
                case _:
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "this agent does not know this change")
        except ConfigError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, one_line(str(error)))
        except EtcdError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, one_line(str(error)))
        return pb.ChangeRosterResponse(done=done)

    async def _named(self, name: str, context: Context) -> Sequence[Limit]:
        limits = self._node.policy.limits
        chosen = [limit for limit in limits if name in ("", limit.name)]
        if name and not chosen:
            names = ", ".join(limit.name for limit in limits)
            reason = one_line(f"no limit is called {name}; there are {names or 'none'}")
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, reason)
        return chosen

    def _meters(self, limit: Limit) -> Iterator[Meters]:
        for window_ms in limit.windows:
            yield self._node.ledger.meters[MetersId(limit.name, str(limit.key), limit.count, window_ms)]

    def _meter(self, meters: Meters, key: str) -> pb.Meter:
        now_ms = self._node.now_ms()
        used, max = meters.counted(key, _row(meters, key), now_ms), meters.max_of(key)
        limit, _, count, window_ms = meters.id
        meter = pb.Meter(limit=limit, key=_bytes(key), count=count, window_ms=window_ms, used=used)
        if max < UNLIMITED:
            meter.assumed = meters.toll(key)
            meter.max = max
            meter.left = 0 if used > max else max - used
            if self._node.cluster is not None and isinstance(meters, SharedMeters):
                meter.share.CopyFrom(self._share(self._node.cluster, meters, key, now_ms))
        return meter

    @staticmethod
    def _share(cluster: Cluster, meters: SharedMeters, key: str, now_ms: int) -> pb.Share:
        lent, borrowed = cluster.moved(meters.id, key)
        used = meters.usage(_row(meters, key), now_ms)
        left = meters.allowance(key, now_ms) - used
        return pb.Share(base=meters.base(key), lent=lent, borrowed=borrowed, used=used, left=left if left > 0 else 0)

    def _lent(self, reading: Reading) -> Reading:
        """A reading as it would be if other nodes lent what they have, as far as is known."""
        cluster, room = self._node.cluster, reading.max - reading.used
        if cluster is None or not cluster.may_borrow or not reading.exceeded or reading.amount > room:
            return reading
        return replace(reading, wait_ms=0)

    def _explanation(self, limit: Limit, why_not: str, readings: Sequence[Reading]) -> pb.Explanation:
        return pb.Explanation(
            limit=limit.name,
            why_not=one_line(why_not),
            shadow=limit.shadow,
            readings=[
                pb.Reading(
                    meter=(meter := self._meter(reading.meters, reading.key)),
                    amount=reading.amount,
                    wait_ms=reading.wait_ms,
                    borrows=meter.HasField("share") and reading.wait_ms == 0 and meter.share.left < reading.amount,
                )
                for reading in readings
            ],
        )

    def _usages(self, limit: Limit, written: str) -> list[pb.Usage]:
        key = _spelled(limit.key, written)
        usages = [self._usage(meters, key) for meters in self._meters(limit)]
        used = any(any(usage.slices) or usage.parts for usage in usages)
        return usages if used or key in limit.overrides else []

    def _usage(self, meters: Meters, key: str) -> pb.Usage:
        now_ms = self._node.now_ms()
        amounts = dict(meters.slices(_row(meters, key), now_ms))
        numbers = range(meters.oldest(now_ms), now_ms // meters.slice_ms + 1)
        return pb.Usage(
            meter=self._meter(meters, key),
            slice_ms=meters.slice_ms,
            slices=[amounts.get(number, 0) for number in numbers],
            parts=self._parts(meters.id, key, now_ms),
        )

    def _used_by_all(self, id: MetersId, key: str) -> int:
        """What all nodes of a cluster have used, as far as is known."""
        view = self._node.cluster.view if self._node.cluster is not None else None
        return view.total(id, key) if view is not None else 0

    def _parts(self, id: MetersId, key: str, now_ms: int) -> list[pb.Part]:
        view = self._node.cluster.view if self._node.cluster is not None else None
        if view is None:
            return []
        ages_ms = view.ages_ms(now_ms)
        used = sorted(view.usage(id, key).items())
        return [pb.Part(node=node, used=amount, age_ms=ages_ms.get(node)) for node, amount in used]

    async def _ranking(self, meters: Meters, count: int) -> pb.Ranking:
        rows = await _largest(meters, count)
        names = {name for row in rows if (name := meters.keys.names[row]) is not None}
        if self._node.cluster is not None and self._node.cluster.view is not None:
            names |= {name for name, _ in self._node.cluster.view.top(meters.id, count)}
        several = [meter for name in names if (meter := self._meter(meters, name)).used > meter.assumed]
        several.sort(key=lambda meter: (-meter.used, meter.key))
        del several[count:]
        limit, _, unit, window_ms = meters.id
        return pb.Ranking(limit=limit, count=unit, window_ms=window_ms, meters=several)

    async def _nearest(self, wanted: str) -> list[bytes]:
        wanted = wanted.lower()
        best: list[tuple[int, str]] = []
        most = max(2, len(wanted) // 4)
        for keys in {id(meters.keys): meters.keys for meters in self._node.ledger.meters.values()}.values():
            for start in range(0, len(keys.names), SCAN_ROWS_MAX):
                names = [name for name in keys.names[start : start + SCAN_ROWS_MAX] if name]
                found = [(apart, name) for name in names if (apart := _apart(wanted, name, most)) <= most]
                best = nsmallest(NEAREST_KEYS_MAX, {*best, *found})
                await asyncio.sleep(0)
        return [_bytes(name) for _, name in best]


def _parse(data: bytes) -> Request:
    if not data.endswith(b"\n\n"):
        raise ProtocolError("the request does not end with an empty line")
    # Not the node's parser: that one learns what Postfix sends, and nothing else.
    return Parser().parse(data)


async def _largest(meters: Meters, count: int) -> list[int]:
    best: list[tuple[int, int]] = []
    floor = 0
    for start in range(0, len(meters.used), SCAN_ROWS_MAX):
        column = meters.used[start : start + SCAN_ROWS_MAX]
        found = [(used, row) for row, used in enumerate(column, start) if used > floor]
        if found:
            best = nlargest(count, best + found)
            floor = best[-1][0] if len(best) == count else 0
        await asyncio.sleep(0)
    return [row for _, row in best]


def _apart(wanted: str, name: str, most: int) -> int:
    """How many characters lie between the common start and the common end; 0 if `wanted` is a part of the name.

    More than `most` is not counted further.
    """
    if wanted in name:
        return 0
    start = _alike(wanted, name)
    apart = max(len(wanted), len(name)) - start
    if apart > most and wanted[most - apart :] != name[most - apart :]:
        return apart
    return apart - _alike(wanted[start:][::-1], name[start:][::-1])


def _alike(one: str, other: str) -> int:
    for place, (char, opposite) in enumerate(zip(one, other, strict=False)):
        if char != opposite:
            return place
    return min(len(one), len(other))


def _spelled(key: Key, written: str) -> str:
    """A key as it is counted: in lower case, and an address as its network."""
    name = key.parts[0].attribute
    if len(key.parts) == 1 and name in ADDRESS_ATTRIBUTES:
        return key.compile()(single(name, written)) or written.lower()
    return written.lower()


def _row(meters: Meters, key: str) -> int | None:
    return OVERFLOW_ROW if key == OVERFLOW_KEY else meters.keys.rows.get(key)


def _forgotten(id: MetersId, key: str, used: int) -> pb.Forgotten:
    return pb.Forgotten(limit=id.limit, key=_bytes(key), count=id.unit, window_ms=id.window_ms, used=used)


def _text(key: bytes) -> str:
    return key.decode("utf-8", "surrogateescape")


def _bytes(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")
