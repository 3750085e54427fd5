"""The client of etcd: keys, swaps, pages, TLS, logins and several endpoints, against the real thing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import uvloop

from postmeter import defaults, etcd, logs
from postmeter.errors import EtcdError
from postmeter.etcd import Entry, Etcd, Events
from postmeter.settings import EtcdSettings

from .server import PASSWORD, PREFIX, USER, Certificates, EtcdServer, make_cluster

T = TypeVar("T")
KEY = PREFIX + "x"


def ask(settings: EtcdSettings, question: Callable[[Etcd], Awaitable[T]]) -> T:
    """What a client of its own is answered."""

    async def asked() -> T:
        client = Etcd(settings)
        try:
            return await question(client)
        finally:
            await client.close()

    return uvloop.run(asked())


async def value(client: Etcd) -> bytes | None:
    """What is under KEY."""
    entry = await client.get(KEY)
    return entry and entry.value


async def last_words(events: AsyncIterator[Events]) -> str:
    """Why a watch ends."""
    try:
        while True:
            await anext(events)
    except EtcdError as error:
        return str(error)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up soon: what fails here fails for good."""
    monkeypatch.setattr(etcd, "ETCD_PATIENCE_S", 0.3)
    monkeypatch.setattr(etcd, "ETCD_CALL_S", 1.0)


def refusal(settings: EtcdSettings) -> str:
    """Why a key cannot be read."""
    with pytest.raises(EtcdError) as refused:
        ask(settings, lambda client: client.get(KEY))
    return str(refused.value)


# --- keys -------------------------------------------------------------------------------------------------------------


def test_what_is_put_can_be_got(server: EtcdServer) -> None:
    """By etcdctl and by us; and a key that is not there is None."""

    async def put(client: Etcd) -> None:
        assert await client.get(KEY) is None
        await client.put(KEY, b"\xff\x00")
        entry = await client.get(KEY)
        assert entry == Entry(b"\xff\x00", 2, 2, 0)
        server.put("x", "again")
        assert Entry(b"again", 2, 3, 0) == await client.get(KEY)

    ask(server.settings(), put)


def test_keys_may_have_bytes_that_are_not_utf_8(server: EtcdServer) -> None:
    """Senders have such names."""

    async def put(client: Etcd) -> None:
        await client.put(PREFIX + "\udcff", b"1")
        assert [PREFIX + "\udcff"] == list((await client.get_prefix(PREFIX)).entries)

    ask(server.settings(), put)


def test_a_swap_is_done_only_if_nobody_was_faster(server: EtcdServer) -> None:
    """To put a key that must not exist, one that must be as it was read, and to delete it."""

    async def swap(client: Etcd) -> None:
        assert await client.swap(KEY, b"1", 0)
        assert not await client.swap(KEY, b"2", 0)
        assert await client.swap(KEY, b"3", 2)
        assert not await client.swap(KEY, b"4", 2)
        assert not await client.swap(KEY, None, 2)
        assert b"3" == await value(client)
        assert await client.swap(KEY, None, 3)
        assert await value(client) is None

    ask(server.settings(), swap)


def test_a_listing_is_of_one_moment(server: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many pages it takes, and only of its prefix."""
    monkeypatch.setattr(etcd, "ETCD_PAGE_KEYS", 3)
    monkeypatch.setattr(etcd, "ETCD_PORTION_KEYS", 2)

    async def list_while_putting(client: Etcd) -> None:
        for number in range(10):
            await client.put(f"{PREFIX}{number}", b"1")
        await client.put("/other", b"1")
        listing = asyncio.create_task(client.get_prefix(PREFIX))
        while not listing.done():
            await client.put(f"{PREFIX}9", b"2")
        made = listing.result()
        assert [f"{PREFIX}{number}" for number in range(10)] == list(made.entries)
        assert max(entry.mod_revision for entry in made.entries.values()) <= made.revision

    ask(server.settings(), list_while_putting)


def test_pages_that_are_too_large_are_made_smaller(server: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until even one key is too large."""
    options = [option for option in etcd._OPTIONS if option[0] != "grpc.max_receive_message_length"]
    monkeypatch.setattr(etcd, "_OPTIONS", (*options, ("grpc.max_receive_message_length", 5_000)))

    async def fill(client: Etcd) -> None:
        for number in range(20):
            await client.put(f"{PREFIX}{number:02}", b"x" * 1_000)
        assert 20 == len((await client.get_prefix(PREFIX)).entries)
        await client.put(f"{PREFIX}19", b"x" * 5_000)
        with pytest.raises(EtcdError, match="larger than max"):
            await client.get_prefix(PREFIX)

    ask(server.settings(), fill)


def test_what_is_listed_is_bounded(server: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """In keys, and in bytes."""
    server.put("x", "12345")
    server.put("y", "12345")
    assert 2 == len(ask(server.settings(), lambda client: client.get_prefix(PREFIX)).entries)
    for name, most in (("ETCD_KEYS_MAX", 1), ("ETCD_BYTES_MAX", 20)):
        with monkeypatch.context() as patch:
            patch.setattr(etcd, name, most)
            with pytest.raises(EtcdError, match=r"there are more than .*; remove some$"):
                ask(server.settings(), lambda client: client.get_prefix(PREFIX))


# --- endpoints --------------------------------------------------------------------------------------------------------


def test_the_next_endpoint_is_asked_when_one_fails(server: EtcdServer) -> None:
    """Whether nobody is there, or somebody who says nothing."""

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def asked() -> None:
        silent = await asyncio.start_server(hold, "127.0.0.1", 0)
        port = silent.sockets[0].getsockname()[1]
        endpoints = ("http://127.0.0.1:1", f"http://127.0.0.1:{port}", *server.settings().endpoints)
        client = Etcd(EtcdSettings(endpoints))
        server.put("x", "1")
        for _ in range(2):
            assert b"1" == await value(client)
        await client.close()
        silent.close()

    uvloop.run(asked())


def test_every_endpoint_that_fails_is_named_with_its_reason() -> None:
    """In one line."""
    reasons = "http://127.0.0.1:1: Connection refused; http://127.0.0.1:2: Connection refused"
    assert f"etcd does not answer: {reasons}" == refusal(EtcdSettings(("http://127.0.0.1:1", "http://127.0.0.1:2")))


def test_members_of_two_clusters_are_not_mixed(server: EtcdServer, tmp_path: Path) -> None:
    """What is listed is of one of them."""
    with EtcdServer(tmp_path) as other:
        settings = server.settings(other)

        async def leave_while_listing(client: Etcd) -> None:
            for number in range(3):
                server.put(str(number), "x")
                other.put(str(number), "x")
            page = client._page

            async def paged(request: object) -> object:
                client._current = 1 - client._current
                return await page(request)  # type: ignore[arg-type]  # whatever it was called with

            client._page = paged  # type: ignore[method-assign, assignment]
            with pytest.raises(EtcdError, match="do not belong to one cluster"):
                await client.get_prefix(PREFIX)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(etcd, "ETCD_PAGE_KEYS", 1)
            ask(settings, leave_while_listing)


def test_a_swap_whose_answer_is_lost_is_not_tried_again(tmp_path: Path) -> None:
    """It may have been done: nobody but who asked can tell."""
    with EtcdServer(tmp_path) as server:
        server.put("x", "1")

        async def swap(client: Etcd) -> None:
            await client.get(KEY)
            server.pause()
            with pytest.raises(EtcdError, match="may have been done"):
                await client.swap(KEY, b"2", 2)
            server.resume()
            assert await value(client) in (b"1", b"2")

        ask(server.settings(), swap)


# --- TLS --------------------------------------------------------------------------------------------------------------


def test_tls_in_both_directions(tmp_path: Path) -> None:
    """With the right files it works, and each wrong one is told from the others."""
    certificates = Certificates(tmp_path / "ours", "etcd", "client")
    foreign = Certificates(tmp_path / "foreign", "client")
    with EtcdServer(tmp_path, certificates=certificates) as server:
        server.put("x", "1")
        right = server.settings()
        assert b"1" == ask(right, value)
        unlike = replace(right, certificate=foreign.certificate("client"), key=foreign.key("client"))
        look = "look at etcd.ca, etcd.certificate and etcd.key"
        assert look in refusal(replace(right, ca=foreign.ca))
        assert look in refusal(unlike)
        assert look in refusal(replace(right, key=right.ca))
        gone = tmp_path / "gone.pem"
        advice = "cannot be read (No such file or directory); correct the settings of etcd, or the file"
        assert f"{gone}: {advice}" == refusal(replace(right, ca=gone))


def test_changed_certificates_are_used_without_a_restart(tmp_path: Path) -> None:
    """The next call uses them."""
    certificates = Certificates(tmp_path / "ours", "etcd", "client")
    foreign = Certificates(tmp_path / "foreign", "client")
    with EtcdServer(tmp_path, certificates=certificates) as server:
        right = server.settings()
        links = {name: tmp_path / f"used.{name}" for name in ("certificate", "key")}

        def use(made: Certificates) -> None:
            for name, path in (("certificate", made.certificate("client")), ("key", made.key("client"))):
                links[name].unlink(missing_ok=True)
                links[name].symlink_to(path)

        async def renew(client: Etcd) -> None:
            with pytest.raises(EtcdError, match=r"look at etcd\.ca"):
                await client.get(KEY)
            use(certificates)
            assert await client.get(KEY) is None

        use(foreign)
        ask(replace(right, certificate=links["certificate"], key=links["key"]), renew)


# --- logins -----------------------------------------------------------------------------------------------------------


def test_login(tmp_path: Path) -> None:
    """With a password from a file, which is read when it is needed; below the prefix only; each refusal says why."""
    file = tmp_path / "password"
    with EtcdServer(tmp_path) as server:
        without = server.settings()
        server.ask_for_login()
        wants = replace(without, user=USER, password_file=file)
        assert "user name is empty; it wants a login: write etcd.user and etcd.password_file" in refusal(without)
        assert f"{file}: cannot be read" in refusal(wants)

        async def correct(client: Etcd) -> None:
            file.write_text("wrong\n")
            with pytest.raises(EtcdError, match=f"authentication failed.*; correct etcd.user, {file}, or etcd's user"):
                await client.get(KEY)
            file.write_text(f"{PASSWORD}\nand a comment")
            assert await client.get(KEY) is None
            with pytest.raises(EtcdError, match=f"permission denied; let a role of {USER} read and write"):
                await client.get("/other")

        ask(wants, correct)


def test_a_login_that_nobody_asks_for(server: EtcdServer) -> None:
    """Works without, and with one as soon as it is asked for."""
    settings = replace(server.settings(), user=USER, password=PASSWORD)

    async def asked(client: Etcd) -> None:
        assert await client.get(KEY) is None
        server.ask_for_login()
        assert await client.get(KEY) is None

    ask(settings, asked)


def test_an_expired_token_is_renewed(tmp_path: Path) -> None:
    """For reading, writing and leases; also when the users have changed, and when etcd has forgotten all tokens."""
    with EtcdServer(tmp_path, "--auth-token-ttl", "1") as server:
        server.ask_for_login()

        async def use(client: Etcd) -> None:
            assert await client.swap(KEY, b"1", 0)
            server.wait_for("deleted a simple token")
            assert not await client.swap(KEY, b"1", 0)
            server.etcdctl("user", "add", "other:other")
            assert await client.keep_alive(await client.grant(5))
            server.kill()
            server.start()
            await client.put(KEY, b"2")

        ask(server.settings(), use)


# --- watches ----------------------------------------------------------------------------------------------------------


def test_a_watch_tells_what_happens_in_order(server: EtcdServer) -> None:
    """From the revision asked for; and that it was taken on."""
    server.put("x", "1")
    server.put("x", "2")

    async def watch(client: Etcd) -> None:
        events = client.watch(PREFIX, 3)
        assert {} == (await anext(events)).changes
        assert {KEY: Entry(b"2", 2, 3, 0)} == (await anext(events)).changes
        server.delete("x")
        assert {KEY: None} == (await anext(events)).changes
        await events.aclose()

    ask(server.settings(), watch)


def test_a_compacted_revision_cannot_be_watched(server: EtcdServer) -> None:
    """It says so at once."""
    server.put("x", "1")
    server.put("x", "2")
    server.compact()

    async def watch(client: Etcd) -> None:
        assert "has ended the watch: the history is compacted" in await last_words(client.watch(PREFIX, 1))

    ask(server.settings(), watch)


def test_a_silent_watch_is_asked_whether_it_is_there(server: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is, then says so; it is not, then that is an error."""
    monkeypatch.setattr(etcd, "ETCD_QUIET_S", 0.05)

    async def watch(client: Etcd) -> None:
        events = client.watch(PREFIX, 1)
        for _ in range(3):
            assert {} == (await anext(events)).changes
        server.pause()
        assert "gives no sign of life" in await last_words(events)
        server.resume()

    ask(server.settings(), watch)


def test_a_member_without_a_leader_ends_its_watches(tmp_path: Path) -> None:
    """Although it is there itself: so another endpoint is tried."""
    members = make_cluster(tmp_path, 3)
    try:
        for member in members:
            member.start(wait=False)
        for member in members:
            member.wait_for("serving client traffic")

        async def watch(client: Etcd) -> None:
            events = client.watch(PREFIX, 1)
            await anext(events)
            for member in members[1:]:
                member.kill()
            assert "no leader" in await last_words(events)

        ask(members[0].settings(), watch)
    finally:
        for member in members:
            member.kill()


# --- leases -----------------------------------------------------------------------------------------------------------


def test_leases(server: EtcdServer) -> None:
    """A key ends with its lease; a lease that does not exist cannot be kept alive, nor used."""

    async def use(client: Etcd) -> None:
        lease = await client.grant(5)
        assert await client.keep_alive(lease)
        await client.put(KEY, b"1", lease)
        await client.release(KEY, 4711)
        assert b"1" == await value(client)
        await client.release(KEY, lease)
        assert await value(client) is None
        assert not await client.keep_alive(4711)
        with pytest.raises(EtcdError, match="lease not found"):
            await client.put(KEY, b"1", 4711)

    ask(server.settings(), use)


@pytest.mark.parametrize(("patience_s", "expected"), [(10.0, []), (0.0, ["away"])])
def test_what_soon_works_again_is_no_outage(
    patience_s: float, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member that restarts is nothing to report; what lasts is."""
    monkeypatch.setattr(etcd, "ETCD_PATIENCE_S", patience_s)
    failures, reasons = [EtcdError("away")] * 2, list[str]()

    async def act() -> None:
        if failures:
            raise failures.pop()

    asyncio.run(etcd.persist(act, logs.Outage("it", reasons.append)))
    assert expected == reasons


def test_numbers_fit_together() -> None:
    """A ping more often than every 5 s would be taken for an attack by etcd."""
    assert defaults.ETCD_PING_S > 5
