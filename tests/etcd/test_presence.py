"""A key that is there as long as the process is, whatever happens to etcd."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import uvloop

from postmeter import etcd, presence
from postmeter.etcd import Etcd
from postmeter.presence import Presence

from .follower import Follower
from .server import PREFIX, EtcdServer


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notice soon what would be noticed in seconds."""
    monkeypatch.setattr(etcd, "ETCD_PATIENCE_S", 0.2)
    monkeypatch.setattr(etcd, "ETCD_CALL_S", 1.0)
    monkeypatch.setattr(presence, "PRESENCE_TTL_S", 1)


@asynccontextmanager
async def present(server: EtcdServer) -> AsyncIterator[tuple[Presence, Follower]]:
    """Somebody who is present as `me`, and a mirror that sees it. Ends without a word, as a crash does."""
    client = Etcd(server.settings())
    made = Presence(client, PREFIX + "me", b"here", lambda reason: None)
    task = asyncio.create_task(made.run())
    try:
        async with Follower(server.settings()) as follower:
            await follower.sees(me="here")
            yield made, follower
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await client.close()


def test_it_is_there_until_the_process_ends(server: EtcdServer) -> None:
    """Longer than its lease lasts; and not much longer than the process."""

    async def story() -> None:
        async with Follower(server.settings()) as witness:
            async with present(server) as (made, follower):
                made.update(b"still here")
                await follower.sees(me="still here")
                lease = follower.mirror.entries["me"].lease
                server.etcdctl("lease", "keep-alive", "--once", f"{lease:x}")
                assert f"{lease:x}" in server.etcdctl("lease", "list")
                await witness.sees(me="still here")
            await witness.sees()

    uvloop.run(story())


def test_leaving_is_seen_at_once(server: EtcdServer) -> None:
    """But who took the place keeps it."""

    async def story() -> None:
        client = Etcd(server.settings())
        first, second = (Presence(client, PREFIX + "me", value, lambda reason: None) for value in (b"1", b"2"))
        async with Follower(server.settings()) as follower:
            await first._renew()
            await second._renew()
            await follower.sees(me="2")
            await first.leave()
            await second._renew()
            await follower.sees(me="2")
            assert all(update.changes.get("me", "same") for update in follower.updates)
            await second.leave()
            await follower.sees()
        await client.close()

    uvloop.run(story())


@pytest.mark.parametrize("loss", ["lease", "key", "value", "cluster"])
def test_what_is_lost_is_made_anew(server: EtcdServer, loss: str) -> None:
    """The lease ends, somebody deletes or changes the key, etcd is another one."""

    async def story() -> None:
        async with present(server) as (_, follower):
            if loss == "lease":
                server.etcdctl("lease", "revoke", f"{follower.mirror.entries['me'].lease:x}")
            elif loss == "key":
                server.delete("me")
            elif loss == "value":
                server.put("me", "gone")
            else:
                server.replace()
            await follower.until(lambda: follower.seen != {"me": "here"})
            await follower.sees(me="here")

    uvloop.run(story())
