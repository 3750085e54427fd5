"""A client of etcd: keys, transactions, leases and watches, as far as Postmeter needs them.

    etcd = Etcd(settings.etcd)
    listing = await etcd.get_prefix("/postmeter/")
    done = await etcd.swap("/postmeter/roster", value, listing.entries["/postmeter/roster"].mod_revision)
    async for events in etcd.watch("/postmeter/", listing.revision + 1): ...

Every call has a deadline and is tried at one endpoint after the other, for ETCD_PATIENCE_S at least; then it raises
EtcdError. The endpoint that answered last is asked first. A watch stays with its endpoint, is asked whether it is still
there when nothing happens, and raises EtcdError when it ends, for whatever reason: list again, and watch from there.

With a user in the settings a token is fetched when it is needed, and again when etcd does not take it any more
(expired, etcd restarted, users or roles changed). The password file and the files of TLS are read when they are used,
so changed ones need no restart.

Keys are text; bytes that are not UTF-8 are in it as `surrogateescape` has them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import grpc
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from postmeter import logs
from postmeter.defaults import (
    ETCD_BYTES_MAX,
    ETCD_CALL_S,
    ETCD_KEYS_MAX,
    ETCD_MESSAGE_BYTES_MAX,
    ETCD_PAGE_KEYS,
    ETCD_PATIENCE_S,
    ETCD_PING_S,
    ETCD_PORTION_KEYS,
    ETCD_QUIET_S,
    ETCD_RETRY_S_MAX,
    ETCD_RETRY_S_MIN,
)
from postmeter.documents import printable
from postmeter.errors import EtcdError
from postmeter.etcdpb import rpc_pb2 as pb
from postmeter.etcdpb import rpc_pb2_grpc as rpc
from postmeter.settings import EtcdSettings

T = TypeVar("T")

_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", int(1000 * ETCD_RETRY_S_MIN)),
    ("grpc.max_reconnect_backoff_ms", int(1000 * ETCD_RETRY_S_MAX)),
    # In spite of its name: how long one attempt to connect may take. And how often names are looked up at most.
    ("grpc.min_reconnect_backoff_ms", int(1000 * ETCD_CALL_S)),
    ("grpc.dns_min_time_between_resolutions_ms", int(1000 * ETCD_RETRY_S_MAX)),
    ("grpc.keepalive_time_ms", int(1000 * ETCD_PING_S)),
    ("grpc.keepalive_timeout_ms", int(1000 * ETCD_CALL_S)),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", ETCD_MESSAGE_BYTES_MAX),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    # Else what one client learned of an endpoint delays the others.
    ("grpc.use_local_subchannel_pool", 1),
)

# What another endpoint, or the same one later, may answer.
_PASSING = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
# etcd has no codes for these.
_STALE = ("invalid auth token", "user name is empty", "revision of auth store is old")
_NO_LOGIN = "authentication is not enabled"
_DENIED = "permission denied"
_UNSENT = "failed to connect to all addresses"

# What gRPC says before it says why it could not connect; and of TLS.
_NOISE = [
    re.compile(noise)
    for noise in (
        r"^failed to connect to all addresses; last error: \w+: \S+: ",
        "^Failed to connect to remote host: ",
        "^Tls handshake failed.*OPENSSL_internal:",
    )
]
_TLS = re.compile("CERTIFICATE|TSI_|security handshaker").search

Metadata = tuple[tuple[str, str], ...]
Call = Callable[["_Member", Metadata], Awaitable[T]]


class Entry(NamedTuple):
    """What is under a key. The revisions are those of its creation and of its last change; no lease is 0."""

    value: bytes
    create_revision: int
    mod_revision: int
    lease: int


@dataclass(frozen=True, slots=True)
class Listing:
    """All keys with a prefix, as they were at one revision."""

    cluster_id: int
    revision: int
    entries: dict[str, Entry]


@dataclass(frozen=True, slots=True)
class Events:
    """What happened up to a revision: new entries, None for deleted ones. Nothing, if that is all there is to say."""

    cluster_id: int
    revision: int
    changes: dict[str, Entry | None]


class _PassingError(Exception):
    """An attempt failed, and another one may not."""


class _TooLargeError(EtcdError):
    """A response is larger than ETCD_MESSAGE_BYTES_MAX."""


class Etcd:
    """One client, to be used from one event loop, and closed. Opens its first connection when it is first needed."""

    def __init__(self, settings: EtcdSettings) -> None:
        self._settings = settings
        self._members = [_Member(endpoint, settings) for endpoint in settings.endpoints]
        self._current = 0
        # None: to be fetched. "": etcd does not want any.
        self._token: str | None = None
        self._logging_in = asyncio.Lock()

    async def close(self) -> None:
        """End all calls and watches."""
        for member in self._members:
            await member.close()

    # --- keys ---------------------------------------------------------------------------------------------------------

    async def get(self, key: str) -> Entry | None:
        """What is under a key now; None if it does not exist. Raises EtcdError."""
        request = pb.RangeRequest(key=_bytes(key))
        response = await self._ask(lambda member, token: member.kv.Range(request, timeout=ETCD_CALL_S, metadata=token))
        return _entry(response.kvs[0]) if response.kvs else None

    async def get_prefix(self, prefix: str) -> Listing:
        """All keys that begin with a prefix. Raises EtcdError, also if they are more than ETCD_KEYS_MAX."""
        first, end = _range(prefix)
        request = pb.RangeRequest(key=first, range_end=end, limit=ETCD_PAGE_KEYS)
        entries: dict[str, Entry] = {}
        size, listing = 0, None
        while True:
            response = await self._page(request)
            header = response.header
            if listing is None:
                listing = Listing(header.cluster_id, header.revision, entries)
                request.revision = header.revision
            elif header.cluster_id != listing.cluster_id:
                endpoints = ", ".join(self._settings.endpoints)
                raise EtcdError(f"{endpoints} do not belong to one cluster; correct etcd.endpoints")
            for place, kv in enumerate(response.kvs, 1):
                entries[_text(kv.key)] = _entry(kv)
                size += len(kv.key) + len(kv.value)
                if place % ETCD_PORTION_KEYS == 0:
                    await asyncio.sleep(0)
            check_size(prefix, len(entries), size)
            if not response.more:
                return listing
            request.key = response.kvs[-1].key + b"\0"

    async def put(self, key: str, value: bytes, lease: int = 0) -> None:
        """Put a value, whatever was there. Raises EtcdError, also if the lease has ended."""
        request = pb.PutRequest(key=_bytes(key), value=value, lease=lease)
        await self._ask(lambda member, token: member.kv.Put(request, timeout=ETCD_CALL_S, metadata=token))

    async def swap(self, key: str, value: bytes | None, mod_revision: int) -> bool:
        """Put a value, or delete (None), if the key's last change is still the one given; 0, if it does not exist.

        Returns whether that was so. Raises EtcdError: then it may have been done all the same.
        """
        held = pb.Compare(target=pb.Compare.MOD, key=_bytes(key), mod_revision=mod_revision)
        if value is None:
            return await self._transact(held, pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=_bytes(key))))
        return await self._transact(held, pb.RequestOp(request_put=pb.PutRequest(key=_bytes(key), value=value)))

    async def _transact(self, held: pb.Compare, done: pb.RequestOp) -> bool:
        request = pb.TxnRequest(compare=[held], success=[done])
        response = await self._ask(
            lambda member, token: member.kv.Txn(request, timeout=ETCD_CALL_S, metadata=token), repeatable=False
        )
        return bool(response.succeeded)

    async def _page(self, request: pb.RangeRequest) -> pb.RangeResponse:
        while True:
            try:
                return await self._ask(
                    lambda member, token: member.kv.Range(request, timeout=ETCD_CALL_S, metadata=token)
                )
            except _TooLargeError:
                if request.limit == 1:
                    raise
                request.limit = max(1, request.limit // 8)

    # --- leases -------------------------------------------------------------------------------------------------------

    async def grant(self, ttl_s: int) -> int:
        """A new lease that ends after so many seconds unless it is kept alive. Raises EtcdError."""
        request = pb.LeaseGrantRequest(TTL=ttl_s)
        grant = await self._ask(
            lambda member, token: member.lease.LeaseGrant(request, timeout=ETCD_CALL_S, metadata=token)
        )
        return int(grant.ID)

    async def keep_alive(self, lease: int) -> bool:
        """Begin a lease's time anew. False if it has ended. Raises EtcdError."""

        async def ask(member: _Member, token: Metadata) -> bool:
            call = member.lease.LeaseKeepAlive(timeout=ETCD_CALL_S, metadata=token)
            with suppress(asyncio.InvalidStateError):
                await call.write(pb.LeaseKeepAliveRequest(ID=lease))
            response = await call.read()
            call.cancel()
            return response is not grpc.aio.EOF and response.TTL > 0

        return await self._ask(ask)

    async def release(self, key: str, lease: int) -> None:
        """Delete a key if it is under this lease. Raises EtcdError."""
        held = pb.Compare(target=pb.Compare.LEASE, key=_bytes(key), lease=lease)
        await self._transact(held, pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=_bytes(key))))

    # --- watches ------------------------------------------------------------------------------------------------------

    async def watch(self, prefix: str, revision: int) -> AsyncGenerator[Events]:
        """What happens to keys with a prefix from a revision on. Never ends by itself; raises EtcdError.

        The first events are empty and come as soon as etcd has taken it on; others too, from time to time.
        """
        member = self._members[self._current]
        try:
            metadata = (*await self._metadata(member), ("hasleader", "true"))
            call = member.watch.Watch(metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise self._lost(member, _reason(error)) from None
        reading: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        try:
            first, end = _range(prefix)
            create = pb.WatchCreateRequest(key=first, range_end=end, start_revision=revision, fragment=True)
            await _write(call, pb.WatchRequest(create_request=create))
            changes: dict[str, Entry | None] = {}
            while True:
                reading = asyncio.ensure_future(call.read())
                response = await _heard(call, reading)
                if response is grpc.aio.EOF:
                    raise self._lost(member, "has ended the watch")
                if response.canceled:
                    reason = "the history is compacted" if response.compact_revision else response.cancel_reason
                    raise EtcdError(f"{member.endpoint}: has ended the watch: {printable(reason)}")
                for event in response.events:
                    changes[_text(event.kv.key)] = None if event.type == pb.Event.DELETE else _entry(event.kv)
                if not response.fragment:
                    yield Events(response.header.cluster_id, response.header.revision, changes)
                    changes = {}
        except grpc.aio.AioRpcError as error:
            raise self._lost(member, _reason(error)) from None
        except TimeoutError:
            raise self._lost(member, "gives no sign of life") from None
        finally:
            call.cancel()
            reading.cancel()

    def _lost(self, member: _Member, reason: str) -> EtcdError:
        self._leave(member)
        return EtcdError(f"{member.endpoint}: {reason}")

    # --- calls --------------------------------------------------------------------------------------------------------

    async def _ask(self, call: Call[T], repeatable: bool = True) -> T:
        """What a call returns at the first endpoint that answers; not `repeatable` is what must not be done twice."""
        troubles: dict[str, str] = {}

        def stop(state: RetryCallState) -> bool:
            return state.attempt_number >= len(self._members) and (state.seconds_since_start or 0) > ETCD_PATIENCE_S

        attempts = AsyncRetrying(
            retry=retry_if_exception_type(_PassingError),
            wait=wait_random_exponential(ETCD_RETRY_S_MIN, ETCD_RETRY_S_MAX),
            stop=stop,
            reraise=True,
        )
        try:
            return await attempts(self._attempt, call, repeatable, troubles)
        except _PassingError:
            reasons = "; ".join(f"{endpoint}: {reason}" for endpoint, reason in troubles.items())
            raise EtcdError(f"etcd does not answer: {reasons}") from None

    async def _attempt(self, call: Call[T], repeatable: bool, troubles: dict[str, str]) -> T:
        member, token, sent = self._members[self._current], None, False
        try:
            metadata = await self._metadata(member)
            token, sent = self._token, True
            return await call(member, metadata)
        except grpc.aio.AioRpcError as error:
            reason = troubles[member.endpoint] = _reason(error)
            if token is not None and any(words in reason for words in _STALE):
                if token == self._token:
                    self._token = None
                raise _PassingError from None
            if "larger than max" in reason:
                raise _TooLargeError(f"{member.endpoint}: {reason}") from None
            if error.code() not in _PASSING:
                raise EtcdError(f"{member.endpoint}: {self._advised(reason)}") from None
            self._leave(member)
            if sent and not repeatable and _UNSENT not in (error.details() or ""):
                raise EtcdError(f"{member.endpoint}: {reason}; it may have been done all the same, look") from None
            raise _PassingError from None

    async def _metadata(self, member: _Member) -> Metadata:
        """Connect, and log in where needed. Raises EtcdError for files that cannot be used, and gRPC's errors."""
        await member.connect()
        if not self._settings.user:
            return ()
        async with self._logging_in:
            if self._token is None:
                request = pb.AuthenticateRequest(name=self._settings.user, password=self._password())
                try:
                    self._token = (await member.auth.Authenticate(request, timeout=ETCD_CALL_S)).token
                except grpc.aio.AioRpcError as error:
                    if _NO_LOGIN not in (error.details() or ""):
                        raise
                    self._token = ""
                    logs.event(logging.WARNING, "etcd asks for no login", endpoint=member.endpoint)
            return (("token", self._token),) if self._token else ()

    def _password(self) -> str:
        path = self._settings.password_file
        if path is None:
            return self._settings.password
        try:
            return path.read_text("utf-8").split("\n", 1)[0].rstrip("\r")
        except (OSError, UnicodeDecodeError) as error:
            raise _unreadable(path, error) from None

    def _advised(self, reason: str) -> str:
        """A reason, with what to do about it."""
        user = self._settings.user
        if _DENIED in reason:
            return f"{reason}; let a role of {user} read and write all keys that begin with {self._settings.prefix}"
        if _STALE[1] in reason and not user:
            return f"{reason}; it wants a login: write etcd.user and etcd.password_file"
        if "authentication failed" in reason:
            return f"{reason}; correct etcd.user, {self._settings.password_file or 'etcd.password'}, or etcd's user"
        return reason

    def _leave(self, member: _Member) -> None:
        """Ask the next endpoint first, unless that was done already."""
        if self._members[self._current] is member:
            self._current = (self._current + 1) % len(self._members)


class _Member:
    """An endpoint, and the connection to it."""

    def __init__(self, endpoint: str, settings: EtcdSettings) -> None:
        self.endpoint = endpoint
        self._paths = [path for path in (settings.ca, settings.key, settings.certificate) if path]
        self._files: list[tuple[int, ...]] = []
        self._channel: grpc.aio.Channel | None = None
        self._closing: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        """See to it that there is a connection, with the files of TLS as they are now. Raises EtcdError."""
        files = [_state(path) for path in self._paths]
        if self._channel and files == self._files:
            return
        if self._channel:
            self._closing = asyncio.create_task(self._channel.close(ETCD_CALL_S))
        self._files = files
        scheme, _, address = self.endpoint.partition("://")
        if scheme == "https":
            # gRPC wants them in this order.
            credentials = grpc.ssl_channel_credentials(*map(_content, self._paths))
            self._channel = grpc.aio.secure_channel(address, credentials, _OPTIONS)
        else:
            self._channel = grpc.aio.insecure_channel(address, _OPTIONS)
        # The generated stubs have no types.
        self.kv: Any = rpc.KVStub(self._channel)  # type: ignore[no-untyped-call]
        self.watch: Any = rpc.WatchStub(self._channel)  # type: ignore[no-untyped-call]
        self.lease: Any = rpc.LeaseStub(self._channel)  # type: ignore[no-untyped-call]
        self.auth: Any = rpc.AuthStub(self._channel)  # type: ignore[no-untyped-call]

    async def close(self) -> None:
        """End all calls."""
        if self._channel:
            await self._channel.close()


async def persist(act: Callable[[], Awaitable[None]], outage: logs.Outage) -> None:
    """Do something with etcd until it succeeds, however long that takes. It is an outage from ETCD_PATIENCE_S on."""

    def failed(state: RetryCallState) -> None:
        if state.outcome is not None and (state.seconds_since_start or 0) >= ETCD_PATIENCE_S:
            outage.failed(str(state.outcome.exception()))

    wait = wait_random_exponential(ETCD_RETRY_S_MIN, ETCD_RETRY_S_MAX)
    await AsyncRetrying(retry=retry_if_exception_type(EtcdError), wait=wait, before_sleep=failed)(act)


async def _write(call: Any, request: pb.WatchRequest) -> None:
    # A call that has ended cannot be written to; reading tells why.
    with suppress(asyncio.InvalidStateError):
        async with asyncio.timeout(ETCD_CALL_S):
            await call.write(request)


async def _heard(call: Any, reading: asyncio.Future[Any]) -> Any:
    """What the watch says next. Raises TimeoutError if it says nothing even when it is asked to."""
    done, _ = await asyncio.wait({reading}, timeout=ETCD_QUIET_S)
    if not done:
        await _write(call, pb.WatchRequest(progress_request=pb.WatchProgressRequest()))
        done, _ = await asyncio.wait({reading}, timeout=ETCD_CALL_S)
    if not done:
        raise TimeoutError
    # Cancelled: the connection was closed from this side, because its certificates were replaced.
    return grpc.aio.EOF if reading.cancelled() else reading.result()


def check_size(prefix: str, keys: int, size: int) -> None:
    """Raise EtcdError if so many keys, of so many bytes with their values, are more than is kept."""
    if keys > ETCD_KEYS_MAX or size > ETCD_BYTES_MAX:
        most = f"{ETCD_KEYS_MAX} keys or {ETCD_BYTES_MAX} bytes"
        raise EtcdError(f"there are more than {most} in etcd that begin with {prefix}; remove some")


def _range(prefix: str) -> tuple[bytes, bytes]:
    """The first key, and the one behind the last."""
    first = _bytes(prefix)
    return first, first[:-1] + bytes([first[-1] + 1])


def _bytes(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def _text(key: bytes) -> str:
    return key.decode("utf-8", "surrogateescape")


def _entry(kv: pb.KeyValue) -> Entry:
    return Entry(kv.value, kv.create_revision, kv.mod_revision, kv.lease)


def _reason(error: grpc.aio.AioRpcError) -> str:
    """What went wrong, in few words."""
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"no answer within {ETCD_CALL_S:g} s"
    details = (error.details() or error.code().name).removeprefix("etcdserver: ")
    for noise in _NOISE:
        details = noise.sub("", details)
    return printable(details[:200]) + ("; look at etcd.ca, etcd.certificate and etcd.key" if _TLS(details) else "")


def _state(path: Path) -> tuple[int, ...]:
    try:
        state = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    return state.st_ino, state.st_size, state.st_mtime_ns


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> EtcdError:
    reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
    return EtcdError(f"{path}: cannot be read ({reason}); correct the settings of etcd, or the file")
