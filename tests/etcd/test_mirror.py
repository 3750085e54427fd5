"""The mirror follows etcd through everything that can happen to it."""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from postmeter import etcd
from postmeter.settings import EtcdSettings

from .follower import Follower
from .proxy import Proxy
from .server import EtcdServer, make_cluster

Story = Callable[[Follower], Awaitable[None]]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notice soon what would be noticed in seconds."""
    monkeypatch.setattr(etcd, "ETCD_PATIENCE_S", 0.2)
    monkeypatch.setattr(etcd, "ETCD_CALL_S", 1.0)
    monkeypatch.setattr(etcd, "ETCD_QUIET_S", 0.1)


def follow(settings: EtcdSettings, story: Story) -> None:
    """Tell a story to a follower."""

    async def told() -> None:
        async with Follower(settings) as follower:
            await story(follower)

    uvloop.run(told())


def test_it_lists_and_then_follows(server: EtcdServer) -> None:
    """What is there, what is put, and what is deleted; each change once."""
    server.put("a", "1")
    server.put("b", "1")

    async def story(follower: Follower) -> None:
        await follower.sees(a="1", b="1")
        await follower.works()
        server.put("b", "2")
        server.delete("a")
        server.put("c", "1")
        await follower.sees(b="2", c="1")
        assert [["a", "b"], ["b"], ["a"], ["c"]] == [list(update.changes) for update in follower.updates]
        assert [True, False, False, False] == [update.listed for update in follower.updates]
        assert 6 == follower.mirror.revision

    follow(server.settings(), story)


def test_an_empty_etcd_is_told_too(server: EtcdServer) -> None:
    """So that who waits for a first listing does not wait for a first key."""

    async def story(follower: Follower) -> None:
        await follower.until(lambda: bool(follower.updates))
        assert ({}, True, "") == (follower.updates[0].changes, follower.updates[0].listed, follower.updates[0].broken)

    follow(server.settings(), story)


def test_it_begins_when_etcd_does(tmp_path: Path) -> None:
    """And says so until then."""
    with EtcdServer(tmp_path) as server:
        server.put("a", "1")
        server.kill()

        async def story(follower: Follower) -> None:
            await follower.fails("Connection refused")
            server.start()
            await follower.sees(a="1")
            await follower.works()

        follow(server.settings(), story)


def test_etcd_is_killed(server: EtcdServer) -> None:
    """The copy stays; what was put before anybody watched again is not missed."""
    server.put("a", "1")

    async def story(follower: Follower) -> None:
        await follower.works()
        server.kill()
        await follower.fails("etcd does not answer")
        assert {"a": "1"} == follower.seen
        server.start()
        server.put("a", "2")
        await follower.sees(a="2")
        await follower.works()

    follow(server.settings(), story)


def test_etcd_is_paused(server: EtcdServer) -> None:
    """Connections that are there and silent are noticed."""
    server.put("a", "1")

    async def story(follower: Follower) -> None:
        await follower.works()
        server.pause()
        await follower.fails("no answer")
        server.resume()
        await follower.works()
        server.put("a", "2")
        await follower.sees(a="2")

    follow(server.settings(), story)


def test_the_network_is_silent(server: EtcdServer) -> None:
    """Nobody says that the connection is gone."""

    async def story() -> None:
        async with Proxy(server.port) as proxy, Follower(proxy.settings) as follower:
            await follower.works()
            proxy.silence()
            await follower.fails("no answer")
            server.put("a", "1")
            await proxy.heal()
            await follower.sees(a="1")
            await follower.works()

    uvloop.run(story())


def test_the_history_is_compacted_while_it_is_away(server: EtcdServer) -> None:
    """What was deleted meanwhile is gone here, too."""
    server.put("a", "1")
    server.put("b", "1")

    async def story() -> None:
        async with Proxy(server.port) as proxy, Follower(proxy.settings) as follower:
            await follower.works()
            await proxy.cut()
            await follower.fails("Connection refused")
            server.put("b", "2")
            server.delete("a")
            server.compact()
            await proxy.heal()
            await follower.sees(b="2")
            await follower.works()
            assert {"a", "b"} == set(follower.updates[-1].changes)
            assert "" == follower.updates[-1].broken

    uvloop.run(story())


def test_etcd_is_restored_from_an_older_snapshot(server: EtcdServer, caplog: pytest.LogCaptureFixture) -> None:
    """The snapshot is what holds now, and that it is older is said."""
    server.put("a", "1")
    server.put("b", "1")
    snapshot = server.snapshot()

    async def story(follower: Follower) -> None:
        await follower.sees(a="1", b="1")
        server.delete("b")
        server.put("c", "1")
        server.put("a", "2")
        await follower.sees(a="2", c="1")
        server.restore(snapshot)
        await follower.sees(a="1", b="1")
        await follower.works()
        assert "etcd was restored to an older state: revision 3, and was 6" == follower.updates[-1].broken
        server.put("a", "3")
        await follower.sees(a="3", b="1")
        assert "" == follower.updates[-1].broken

    with caplog.at_level(logging.WARNING, "postmeter"):
        follow(server.settings(), story)
    assert 1 == [record.getMessage() for record in caplog.records].count("etcd has another history")


def test_a_restored_etcd_that_has_gone_further_than_the_old_one(server: EtcdServer) -> None:
    """Its revision tells nothing; its keys are listed anyway, also those that have the revision of another value."""
    server.put("a", "1")
    snapshot = server.snapshot()

    async def story() -> None:
        async with Proxy(server.port) as proxy, Follower(proxy.settings) as follower:
            server.put("a", "2")
            server.put("b", "2")
            await follower.sees(a="2", b="2")
            await proxy.cut()
            server.restore(snapshot)
            server.put("a", "3")
            server.put("c", "3")
            await proxy.heal()
            await follower.sees(a="3", c="3")

    uvloop.run(story())


def test_another_cluster_in_its_place(server: EtcdServer) -> None:
    """It is followed, and said to be another one."""
    server.put("a", "1")

    async def story(follower: Follower) -> None:
        await follower.sees(a="1")
        server.replace()
        await follower.until(lambda: "etcd is another cluster" in follower.updates[-1].broken)
        assert {} == follower.seen
        server.put("b", "1")
        await follower.sees(b="1")
        await follower.works()

    follow(server.settings(), story)


def test_an_expired_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on with another one, and nothing is reported."""
    monkeypatch.setattr(etcd, "ETCD_PATIENCE_S", 10)
    with EtcdServer(tmp_path, "--auth-token-ttl", "1") as server:
        server.ask_for_login()
        login = server.settings()

        async def story() -> None:
            async with Proxy(server.port) as proxy:
                settings = EtcdSettings(proxy.settings.endpoints, user=login.user, password=login.password)
                async with Follower(settings) as follower:
                    await follower.works()
                    server.wait_for("deleted a simple token")
                    server.put("a", "1")
                    await follower.sees(a="1")
                    await proxy.cut()
                    await proxy.heal()
                    server.put("a", "2")
                    await follower.sees(a="2")
                    assert "" == follower.health

        uvloop.run(story())


def test_permission_is_denied_and_granted(server: EtcdServer) -> None:
    """Until then the health says what to do."""
    server.ask_for_login(permission="write")

    async def story(follower: Follower) -> None:
        await follower.fails("permission denied; let a role of postmeter read and write all keys that begin with")
        server.etcdctl("role", "grant-permission", "--prefix=true", "agents", "readwrite", "/postmeter/")
        await follower.works()

    follow(server.settings(), story)


def test_permission_is_taken_away(server: EtcdServer) -> None:
    """The watch goes on, but the next one is refused."""
    server.ask_for_login()

    async def story() -> None:
        login = server.settings()
        async with Proxy(server.port) as proxy:
            settings = EtcdSettings(proxy.settings.endpoints, user=login.user, password=login.password)
            async with Follower(settings) as follower:
                await follower.works()
                server.etcdctl("user", "revoke-role", "postmeter", "agents")
                await proxy.cut()
                await proxy.heal()
                await follower.fails("permission denied")
                server.etcdctl("user", "grant-role", "postmeter", "agents")
                await follower.works()

    uvloop.run(story())


def test_members_stop_one_after_the_other(tmp_path: Path) -> None:
    """As long as two of three are there, nothing is missed and nothing reported."""
    members = make_cluster(tmp_path, 3)
    try:
        for member in members:
            member.start(wait=False)
        for member in members:
            member.wait_for("serving client traffic")

        async def story(follower: Follower) -> None:
            await follower.works()
            for number, member in enumerate(members):
                member.kill()
                # A read is answered when there is a leader again; a write would be lost before.
                members[number - 1].etcdctl("get", "x")
                members[number - 1].put("a", str(number))
                await follower.sees(a=str(number))
                member.start()
            members[0].pause()
            members[1].etcdctl("get", "x")
            members[1].put("a", "paused")
            await follower.sees(a="paused")
            assert "" == follower.health

        settings = members[0].settings(*members[1:])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(etcd, "ETCD_PATIENCE_S", 10)
            follow(settings, story)
    finally:
        for member in members:
            member.kill()


def test_too_much_for_a_copy(server: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy stays as it was, until some is removed."""
    monkeypatch.setattr(etcd, "ETCD_KEYS_MAX", 2)
    server.put("a", "1")
    server.put("b", "1")

    async def story(follower: Follower) -> None:
        await follower.works()
        server.put("c", "1")
        await follower.fails("there are more than 2 keys")
        assert {"a": "1", "b": "1"} == follower.seen
        server.delete("a")
        await follower.sees(b="1", c="1")
        await follower.works()

    follow(server.settings(), story)


def test_an_outage_is_logged_when_it_begins_and_when_it_ends(
    server: EtcdServer, caplog: pytest.LogCaptureFixture
) -> None:
    """However often it was tried in between."""

    async def story(follower: Follower) -> None:
        await follower.works()
        server.kill()
        await follower.fails("Connection refused")
        # What listens there now is no etcd: another reason for the same outage.
        async with Proxy(1, server.port):
            await follower.until(lambda: follower.health != "" and "Connection refused" not in follower.health)
        server.start()
        await follower.works()

    with caplog.at_level(logging.INFO, "postmeter"):
        follow(server.settings(), story)
    names = [record.getMessage() for record in caplog.records if record.getMessage().startswith("etcd")]
    assert ["etcd fails", "etcd works again"] == names


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_the_copy_is_right_in_the_end(server: EtcdServer, seed: int) -> None:
    """Random puts, deletions, compactions, cuts, silence and restarts."""
    rng = random.Random(seed)

    async def story() -> None:
        async with Proxy(server.port) as proxy, Follower(proxy.settings) as follower:
            keys: dict[str, str] = {}
            for number in range(25):
                key = rng.choice("abcd")
                if keys.pop(key, None) and rng.random() < 0.5:
                    server.delete(key)
                else:
                    keys[key] = str(number)
                    server.put(key, keys[key])
                event = rng.random()
                if event < 0.1:
                    server.compact()
                elif event < 0.25:
                    await proxy.cut()
                elif event < 0.35:
                    proxy.silence()
                elif event < 0.4:
                    server.kill()
                    server.start()
                elif event < 0.8:
                    await proxy.heal()
            await proxy.heal()
            await follower.sees(**keys)
            await follower.works()

    uvloop.run(story())
