"""Limits put into etcd hold on a node, good ones within a moment, and bad ones never."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
import uvloop

from postmeter import etcd, etcd_follower, limits_follower
from postmeter.etcd_follower import EtcdFollower
from postmeter.node import Node
from postmeter.settings import Listener, Settings
from tests.unit.support import HOUR_MS

from .server import EtcdServer

USER = "{key: sasl_username, count: recipients, max: 100, per: 1h}"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notice soon what would be noticed in seconds."""
    monkeypatch.setattr(etcd, "ETCD_PATIENCE_S", 0.2)
    monkeypatch.setattr(etcd, "ETCD_CALL_S", 1.0)
    monkeypatch.setattr(etcd_follower, "ETCD_START_S", 1.0)
    monkeypatch.setattr(limits_follower, "TIDY_INTERVAL_S", 0.01)
    monkeypatch.setattr(etcd_follower, "STATUS_PAUSE_S", 0.0)


@asynccontextmanager
async def following(server: EtcdServer, directory: Path) -> AsyncIterator[Node]:
    """A node of its own that takes its limits from etcd."""
    settings = Settings(
        node="mx1", state_dir=directory / "state", admin_socket=Listener(path=directory / "a"), etcd=server.settings()
    )
    node = Node(settings)
    serving = asyncio.create_task(node.run())
    follower = EtcdFollower(node)
    try:
        await follower.start()
        task = asyncio.create_task(follower.run())
        yield node
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    finally:
        await follower.stop()
        node.stop()
        await serving


async def until(happened: Callable[[], bool]) -> None:
    """Wait for what a node or etcd shows: neither says when."""
    async with asyncio.timeout(20):
        while not await asyncio.to_thread(happened):  # noqa: ASYNC110 - neither says when
            await asyncio.sleep(0.01)


def maxes(node: Node) -> dict[str, int]:
    """What may be used in an hour, by limit, and by limit and key."""
    found = {}
    for limit in node.policy.limits:
        found[limit.name] = limit.windows[HOUR_MS]
        overrides = next(meters for id, meters in node.ledger.meters.items() if id.limit == limit.name).overrides
        found |= {f"{limit.name}/{key}": max for key, max in overrides.items()}
    return found


def test_what_is_put_holds(server: EtcdServer, tmp_path: Path) -> None:
    """Limits and overrides; what is deleted does not."""
    server.put("limits/per-user", USER)

    async def story() -> None:
        async with following(server, tmp_path) as node:
            assert {"per-user": 100} == maxes(node)
            server.put("limits/per-user", USER.replace("100", "10"))
            server.put("overrides/per-user/a", "1000")
            await until(lambda: maxes(node) == {"per-user": 10, "per-user/a": 1000})
            server.put("overrides/per-user/a", "{max: 2000, note: x}")
            await until(lambda: maxes(node) == {"per-user": 10, "per-user/a": 2000})
            server.delete("overrides/per-user/a")
            await until(lambda: maxes(node) == {"per-user": 10})
            server.delete("limits/per-user")
            await until(lambda: maxes(node) == {})

    uvloop.run(story())


def test_bad_values_change_nothing_and_are_told(
    server: EtcdServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the log and in the status."""
    server.put("limits/per-user", USER)
    server.put("overrides/per-user/a", "1")

    async def story() -> None:
        async with following(server, tmp_path) as node:
            server.put("limits/per-user", "{max: lots}")
            server.put("overrides/per-user/a", "-1")
            server.put("overrides/per-user/B", "1")
            server.put("limits/other", "x" * 100_000)
            server.put("limits/last", USER)
            await until(lambda: "last" in maxes(node))
            assert {"per-user": 100, "per-user/a": 1, "last": 100} == maxes(node)

            def refused() -> set[str]:
                status = server.etcdctl("get", "--print-value-only", "/postmeter/status/mx1")
                return set(json.loads(status)["refused"])

            bad = {"limits/per-user", "overrides/per-user/a", "overrides/per-user/B", "limits/other"}
            await until(lambda: refused() == bad)

    with caplog.at_level(logging.ERROR, "postmeter"):
        uvloop.run(story())
    fields = [record.__dict__["fields"] for record in caplog.records if record.getMessage().startswith("refused")]
    assert {"key": "limits/other", "problem": "has 100000 bytes; write at most 65536"} in fields


def test_a_start_without_etcd_takes_the_last_good_limits(server: EtcdServer, tmp_path: Path) -> None:
    """And what was changed meanwhile, when etcd is there again."""
    server.put("limits/per-user", USER)
    server.put("limits/other", USER)
    server.put("overrides/per-user/a", "1")

    async def story() -> None:
        async with following(server, tmp_path) as node:
            server.put("overrides/per-user/b", "2")
            server.put("overrides/per-user/a", "bad")
            server.delete("limits/other")
            expected = {"per-user": 100, "per-user/a": 1, "per-user/b": 2}
            await until(lambda: maxes(node) == expected)
        server.kill()
        async with following(server, tmp_path) as node:
            assert expected == maxes(node)
            server.start()
            server.delete("overrides/per-user/b")
            await until(lambda: maxes(node) == {"per-user": 100, "per-user/a": 1})

    uvloop.run(story())


def test_an_override_ends_in_time(server: EtcdServer, tmp_path: Path) -> None:
    """Without anybody doing anything."""
    end_s = int(time.time()) + 2
    until_text = datetime.fromtimestamp(end_s, UTC).strftime("%Y-%m-%d %H:%M:%S")
    server.put("limits/per-user", USER.replace("}", ", overrides: {a: 5}}"))
    server.put("overrides/per-user/a", f"{{max: 1, until: '{until_text}'}}")

    async def story() -> None:
        async with following(server, tmp_path) as node:
            await until(lambda: maxes(node) == {"per-user": 100, "per-user/a": 5})
            assert time.time() >= end_s

    uvloop.run(story())


def test_an_etcd_that_was_emptied_does_not_let_all_mail_pass(server: EtcdServer, tmp_path: Path) -> None:
    """The last good limits stay, also over a restart, until it has some again; one by one they can be deleted."""
    server.put("limits/per-user", USER)

    async def story() -> None:
        async with following(server, tmp_path) as node:
            assert {"per-user": 100} == maxes(node)
            await asyncio.to_thread(server.replace)
            await until(lambda: node.health["etcd"] == "" and server.etcdctl("get", "--prefix", "/postmeter/") != "")
            assert {"per-user": 100} == maxes(node)
        async with following(server, tmp_path) as node:
            assert {"per-user": 100} == maxes(node)
            server.put("limits/other", USER)
            await until(lambda: maxes(node) == {"other": 100})
            server.delete("limits/other")
            await until(lambda: maxes(node) == {})

    uvloop.run(story())
