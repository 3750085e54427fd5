"""The policy port, over real sockets: one exact reply to each request, whatever way it arrives, and nothing else."""

from __future__ import annotations

import asyncio
import re
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal, Self

import pytest

from postmeter import postfix
from postmeter.defaults import REQUEST_BYTES_MAX
from postmeter.node import DUNNO, FAIL_SAFE, Node
from postmeter.postfix import Connection, PolicyPort
from postmeter.settings import Listener
from postmeter.sockets import bind
from tests.unit.support import message
from tests.unit.test_flusher import eventually
from tests.unit.test_logs import Log, logged
from tests.unit.test_node import ALICE, disk_of, given_settings, play, running, used

Kind = Literal["unix", "inet"]
both = pytest.mark.parametrize("kind", ["unix", "inet"])

# A message to two recipients never fits, so that its answer holds its sender; one to one recipient is charged.
LIMITS = "limits: {per-user: {key: sasl_username, count: recipients, max: 1, per: 1h}}"
MALFORMED = [
    b"\n\n",
    b"\n" + message(),
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n\n\n",
    b"EHLO example.com\r\n" * 3 + b"\n\n",
    b"sender=alice\n\n",
    message(request="junk"),
    message(sender="a\nb"),
    message(sender="a\0b"),
    message(sender="x" * 5000),
    message(recipient_count="-1"),
    message(**{f"a{number}": "" for number in range(100)}),
    b"\xff\xfe\x00\n\n",
    message(**{f"a{number}": "x" * 4000 for number in range(10)}),
    b"request=" + b"x" * (REQUEST_BYTES_MAX + 1),
    b"a=b\n" * (REQUEST_BYTES_MAX // 4 + 1),
]


def asking(who: str, **attributes: object) -> bytes:
    """A request whose answer tells who asked."""
    return message(sasl_username=who, recipient_count=2, **attributes)


def told(who: str) -> bytes:
    """The answer to that."""
    text = f"550 5.7.1 per-user: 2 recipients at once can never be accepted, {who} may use 1 per 1h"
    return f"action={text}\n\n".encode()


class Client:
    """What an smtpd's connection is, or somebody worse."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        """Send some bytes."""
        self.writer.write(data)

    async def reply(self) -> bytes:
        """The next reply."""
        return await self._reader.readuntil(b"\n\n")

    async def ask(self, data: bytes) -> bytes:
        """Send a request, and wait for its reply."""
        self.send(data)
        return await self.reply()

    async def rest(self) -> bytes:
        """Everything that comes until the other side closes. (What it has not read by then makes that a reset.)"""
        try:
            return await self._reader.read()
        except ConnectionError:
            return b""

    async def end(self) -> bytes:
        """Hang up. Returns what was sent beyond the replies."""
        self.writer.write_eof()
        return await self.rest()


class Served:
    """A node with its policy port, on a unix and an inet socket."""

    def __init__(self, node: Node, directory: Path) -> None:
        self.node = node
        self.port = PolicyPort(node)
        self._path = directory / "policy.sock"
        self._clients: list[Client] = []

    async def listen(self) -> Self:
        """Begin to."""
        inet = bind(Listener("127.0.0.1", 0))
        self._inet_port = inet.getsockname()[1]
        for sock in (bind(Listener(path=self._path)), inet):
            await self.port.listen(sock)
        return self

    @asynccontextmanager
    async def deaf(self, data: bytes) -> AsyncIterator[tuple[Connection, socket.socket]]:
        """Somebody who sends on and on and reads nothing, when the node has stopped to read, too."""
        before = set(self.port._connections)
        with socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)
            client.connect(str(self._path))
            sending = asyncio.create_task(asyncio.get_running_loop().sock_sendall(client, data))
            await eventually(lambda: len(self.port._connections) > len(before))
            [connection] = self.port._connections - before
            await eventually(lambda: not connection._transport.is_reading())
            try:
                yield connection, client
            finally:
                sending.cancel()
                await asyncio.wait({sending})

    async def connect(self, kind: Kind = "unix") -> Client:
        """A new connection."""
        if kind == "unix":
            streams = await asyncio.open_unix_connection(str(self._path))
        else:
            streams = await asyncio.open_connection("127.0.0.1", self._inet_port)
        self._clients.append(Client(*streams))
        return self._clients[-1]

    def hang_up(self) -> None:
        """Close all connections."""
        for client in self._clients:
            client.writer.close()


@asynccontextmanager
async def serving(directory: Path, limits: str = LIMITS) -> AsyncIterator[Served]:
    """A node that serves until the end of the `with`."""
    async with running(given_settings(directory, limits)) as node:
        served = await Served(node, directory).listen()
        try:
            yield served
        finally:
            served.hang_up()
            await served.port.drain()


@pytest.fixture(autouse=True)
def log() -> Iterator[Log]:
    """What is logged; nowhere there may be a traceback."""
    with logged() as log:
        yield log
    assert "traceback" not in log.stream.getvalue()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each read had, of all connections."""
    done: list[int] = []

    class Watched(Connection):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            done.append(len(data))

    monkeypatch.setattr(postfix, "Connection", Watched)
    return done


# --- how requests arrive ----------------------------------------------------------------------------------------------


@both
def test_a_request_may_be_split_anywhere(tmp_path: Path, kind: Kind, reads: list[int]) -> None:
    """After any of its bytes, also within a character, or between the line ends: it gets the same reply."""
    data = asking("jürgen@example.com")

    async def story() -> None:
        async with serving(tmp_path) as served:
            client = await served.connect(kind)
            for split in range(1, len(data)):
                reads.clear()
                client.send(data[:split])
                await eventually(lambda: bool(reads))
                assert told("jürgen@example.com") == await client.ask(data[split:]), f"split after {split} bytes"
                assert [split, len(data) - split] == reads
            assert b"" == await client.end()

    play(story())


@both
def test_a_request_may_come_byte_by_byte(tmp_path: Path, kind: Kind, reads: list[int]) -> None:
    """However slowly."""

    async def story() -> None:
        async with serving(tmp_path) as served:
            client = await served.connect(kind)
            for byte in asking(ALICE):
                before = len(reads)
                client.send(bytes([byte]))
                await eventually(lambda before=before: len(reads) > before)  # type: ignore[misc]
            assert told(ALICE) == await client.reply()
            assert b"" == await client.end()

    play(story())


@both
def test_requests_may_come_together(tmp_path: Path, kind: Kind) -> None:
    """Several in one write, some of which wait for the disk, and the last one in two pieces: replies in their order."""
    names = [f"user{number}@example.com" for number in range(60)]
    requests = [message(sasl_username=name) if number % 7 == 3 else asking(name) for number, name in enumerate(names)]
    replies = [DUNNO if number % 7 == 3 else told(name) for number, name in enumerate(names)]

    async def story() -> None:
        async with serving(tmp_path) as served:
            client = await served.connect(kind)
            together = b"".join(requests)
            client.send(together[:-20])
            assert replies[:-1] == [await client.reply() for _ in names[:-1]]
            assert replies[-1] == await client.ask(together[-20:])
            assert b"" == await client.end()

    play(story())


@both
def test_one_reply_to_each_request_and_nothing_more(tmp_path: Path, kind: Kind) -> None:
    """Not one byte: Postfix would take the connection for dead."""

    async def story() -> None:
        async with serving(tmp_path) as served:
            client = await served.connect(kind)
            assert DUNNO == await client.ask(message())
            assert (await client.ask(message())).startswith(b"action=450 4.7.1 per-user: alice@example.com has used 1 ")
            assert DUNNO == await client.ask(message(protocol_state="VRFY"))
            assert told("a?b?c@example.com") == await client.ask(asking("a\x1bb\udcffc@example.com"))
            assert b"" == await client.end()

    play(story())


def test_a_bug_is_answered_with_the_fail_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mail goes on as `on_error` says; the traceback is in the log, in one line; the connection goes on."""

    async def story() -> None:
        async with serving(tmp_path) as served:
            client = await served.connect()
            with monkeypatch.context() as patch:
                patch.setattr(served.node, "policy", None)
                assert FAIL_SAFE["defer"] == await client.ask(message())
            assert DUNNO == await client.ask(message())
            assert b"" == await client.end()

    with logged() as log:
        play(story())
    [line] = log.of("no decision")
    assert "AttributeError" in line


# --- what no Postfix sends --------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("data", MALFORMED, ids=lambda data: re.sub("[^a-zA-Z]+", "-", repr(data[:30])))
def test_malformed_requests_are_not_answered(tmp_path: Path, kind: Kind, data: bytes, log: Log) -> None:
    """The client and the reason are logged, the connection is closed without a reply, and no other one is."""

    async def story() -> None:
        async with serving(tmp_path) as served:
            other, client = await served.connect(), await served.connect(kind)
            assert told(ALICE) == await client.ask(asking(ALICE))
            peer = client.writer.get_extra_info("sockname")
            client.send(data)
            assert b"" == await client.rest()
            name = f"{peer[0]}:{peer[1]}" if kind == "inet" else "unix"
            [line] = log.of("malformed request")
            assert re.fullmatch(f'warning malformed request peer={name} reason=".+"', line)
            assert told(ALICE) == await other.ask(asking(ALICE))
            assert {} == next(iter(served.node.ledger.meters.values())).keys.rows

    play(story())


def test_what_came_before_is_answered(tmp_path: Path, log: Log) -> None:
    """A request with a malformed one behind it, and another one behind that: one reply, and the end."""

    async def story() -> None:
        async with serving(tmp_path) as served:
            client = await served.connect()
            client.send(asking(ALICE) + b"junk\n\n" + asking(ALICE))
            assert told(ALICE) == await client.rest()

    play(story())
    assert 1 == len(log.of("malformed request"))


def test_the_bound_does_not_depend_on_how_it_arrives(tmp_path: Path, log: Log) -> None:
    """A request of just so many bytes is taken, one byte more is not: in one piece, or in many."""
    fill = [f"a{number}=" + "x" * 4000 for number in range(8)]
    frame = len(b"request=smtpd_access_policy\n" + "\n".join(fill).encode() + b"\nb=\n\n")
    for more, taken in ((0, True), (1, False)):
        last = "b=" + "x" * (REQUEST_BYTES_MAX - frame + more)
        data = "\n".join(["request=smtpd_access_policy", *fill, last]).encode() + b"\n\n"
        for piece in (len(data), 5000):

            async def story(data: bytes = data, piece: int = piece, taken: bool = taken) -> None:
                async with serving(tmp_path) as served:
                    client = await served.connect()
                    for start in range(0, len(data), piece):
                        client.send(data[start : start + piece])
                        await asyncio.sleep(0)
                    client.writer.write_eof()
                    assert (DUNNO if taken else b"") == await client.rest()

            play(story())
    assert 2 == len(log.of("malformed request"))


def test_while_a_reply_is_due_little_more_is_kept(tmp_path: Path, log: Log) -> None:
    """Who sends on and on without waiting for the disk is disconnected; a request or two are kept, and answered."""

    async def story() -> None:
        async with serving(tmp_path) as served:
            with disk_of(served.node) as disk:
                disk.hang()
                patient, hasty = await served.connect(), await served.connect()
                patient.send(message() + asking(ALICE))
                hasty.send(message(sasl_username="hasty") + asking("hasty") * 1000)
                assert b"" == await hasty.rest()
                disk.mend()
                assert [DUNNO, told(ALICE)] == [await patient.reply(), await patient.reply()]
                assert b"" == await patient.end()

    play(story())
    assert [f'warning malformed request peer=unix reason="request of more than {REQUEST_BYTES_MAX} bytes"'] == log.of(
        "malformed request"
    )


# --- many connections, and bad ones -----------------------------------------------------------------------------------


@both
def test_two_thousand_connections(tmp_path: Path, kind: Kind) -> None:
    """All open at once, and each is answered, on all of them at the same time and one after the other."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 5_000)), hard))

    async def story() -> None:
        async with serving(tmp_path) as served:
            clients = [await served.connect(kind) for _ in range(2_000)]
            for turn in range(2):
                for number, client in enumerate(clients):
                    client.send(asking(f"user{number}.{turn}"))
                for number, client in enumerate(clients):
                    assert told(f"user{number}.{turn}") == await client.reply()
            assert 2_000 == len(served.port._connections)
            for client in clients:
                assert b"" == await client.end()
            await eventually(lambda: not served.port._connections)

    try:
        play(story())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_client_that_never_reads(tmp_path: Path) -> None:
    """It is not read from any more, so that it fills no memory; others are served; if it reads it gets every reply."""
    many = 6_000

    async def story() -> None:
        async with serving(tmp_path) as served, served.deaf(asking("deaf") * many) as (connection, client):
            other = await served.connect()
            for _ in range(100):
                assert told(ALICE) == await other.ask(asking(ALICE))
            assert connection._transport.get_write_buffer_size() < 1_000_000
            assert len(connection._unread) <= REQUEST_BYTES_MAX
            wanted = told("deaf") * many
            received = bytearray()
            while len(received) < len(wanted):
                received += await asyncio.get_running_loop().sock_recv(client, 100_000)
            client.shutdown(socket.SHUT_WR)
            received += await asyncio.get_running_loop().sock_recv(client, 100_000)
            assert wanted == received

    play(story())


async def connections(served: Served, count: int) -> list[Connection]:
    """The connections, when there are so many."""
    await eventually(lambda: len(served.port._connections) == count)
    return list(served.port._connections)


def test_who_disconnects_while_its_reply_waits_is_charged_once(tmp_path: Path, reads: list[int], log: Log) -> None:
    """Postfix asks again, on another connection: the first charge counts for it, and is on the disk when it is told."""
    limits = LIMITS.replace("max: 1", "max: 20")
    data = message(instance="1a.2b.3c.0", recipient_count=7)

    async def story() -> None:
        async with serving(tmp_path, limits) as served:
            with disk_of(served.node) as disk:
                disk.hang()
                first = await served.connect()
                first.send(data)
                await eventually(lambda: bool(reads))
                first.writer.transport.abort()
                await connections(served, 0)
                again = await served.connect()
                again.send(data)
                await eventually(lambda: len(reads) == 2)
                disk.mend()
                assert DUNNO == await again.reply()
                assert 7 == disk.used(ALICE)
                assert DUNNO == await again.ask(data)
                assert 7 == used(served.node)
                assert b"" == await again.end()

    play(story())


def test_clients_come_and_go(tmp_path: Path, log: Log) -> None:
    """Without a word, in the middle of one, by a reset, or with replies unread: nothing is logged, nothing is left."""

    async def story() -> None:
        async with serving(tmp_path) as served:
            for words in (b"", message()[:50], message()[:-1], asking(ALICE), asking(ALICE) * 50):
                for abort in (True, False):
                    client = await served.connect("inet")
                    client.send(words)
                    await connections(served, 1)
                    if abort:
                        client.writer.transport.abort()
                    else:
                        client.writer.close()
                    await connections(served, 0)
            lines = len(log.lines)
            assert told(ALICE) == await (await served.connect()).ask(asking(ALICE))
            assert lines + 1 == len(log.lines)

    play(story())
    assert [] == log.of("malformed request")


def test_there_is_a_cap_on_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: Log) -> None:
    """One too many is closed at once, and logged; the others are served, and when one leaves another may come."""
    monkeypatch.setattr(postfix, "CONNECTIONS_MAX", 3)

    async def story() -> None:
        async with serving(tmp_path) as served:
            clients = [await served.connect() for _ in range(3)]
            await connections(served, 3)
            refused = await served.connect()
            refused.send(asking(ALICE))
            assert b"" == await refused.rest()
            for client in clients:
                assert told(ALICE) == await client.ask(asking(ALICE))
            assert b"" == await clients[0].end()
            await connections(served, 2)
            assert told(ALICE) == await (await served.connect()).ask(asking(ALICE))

    play(story())
    assert ["error connection refused peer=unix connections=3"] == log.of("connection refused")


# --- draining ---------------------------------------------------------------------------------------------------------


@both
def test_a_drain_answers_what_is_due_and_closes(tmp_path: Path, kind: Kind, reads: list[int], log: Log) -> None:
    """Who waits for the disk gets the reply; who has asked half a question, or none, gets none; nobody new comes."""

    async def story() -> None:
        async with serving(tmp_path) as served:
            idle, half, due, impatient = [await served.connect(kind) for _ in range(4)]
            with disk_of(served.node) as disk:
                disk.hang()
                half.send(message()[:-1])
                due.send(message())
                impatient.send(message(sasl_username="impatient") + asking("impatient"))
                await eventually(lambda: len(reads) == 3)
                draining = asyncio.create_task(served.port.drain())
                assert [b"", b""] == [await idle.rest(), await half.rest()]
                with pytest.raises(OSError, match=r"refused|No such file"):
                    await served.connect(kind)
                assert not draining.done()
                disk.mend()
                assert DUNNO == await due.rest()
                assert DUNNO == await impatient.rest()
                await draining
            assert 1 == used(served.node)

    play(story())
    assert [] == log.of("connections cut")


def test_a_drain_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: Log) -> None:
    """Not for a client that never reads, nor for a disk that never answers."""
    monkeypatch.setattr(postfix, "DRAIN_S_MAX", 0.1)

    async def story() -> None:
        async with serving(tmp_path) as served, served.deaf(asking("deaf") * 6_000):
            due = await served.connect()
            with disk_of(served.node) as disk:
                disk.hang()
                due.send(message())
                await eventually(lambda: any(each._waiting for each in served.port._connections))
                await served.port.drain()
                disk.mend()

    play(story())
    assert ["warning connections cut connections=2"] == log.of("connections cut")


def test_a_drain_without_connections(tmp_path: Path) -> None:
    """Ends at once, also if there were some before."""

    async def story() -> None:
        async with serving(tmp_path) as served:
            client = await served.connect()
            assert DUNNO == await client.ask(message())
            assert b"" == await client.end()
            await connections(served, 0)
            await served.port.drain()

    play(story())
