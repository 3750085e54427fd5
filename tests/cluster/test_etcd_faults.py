"""etcd fails, and comes back: mail goes on by the last good limits, and all follow again within seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.etcd.server import PASSWORD, USER

from .cluster import Cluster
from .network import cut
from .stories import RECOVERY_S_MAX, USERS, WINDOW_S, everywhere, health, mail_goes_on, put_limit, sending, until

NODES = ["mx1", "mx2", "mx3"]


@pytest.fixture
def cluster(workspace: Path) -> Iterator[Cluster]:
    """Three nodes, 60 messages per window."""
    with Cluster(workspace, NODES) as cluster:
        put_limit(cluster, 60)
        cluster.start()
        yield cluster


@pytest.mark.parametrize("fault", ["killed", "frozen"])
def test_mail_goes_on_without_etcd(cluster: Cluster, fault: str) -> None:
    """Its part is not well, the whole is; when it is back, changes are followed within seconds."""
    etcd = cluster.etcd
    with sending(cluster, 60) as load:
        {"killed": etcd.kill, "frozen": etcd.pause}[fault]()
        until(f"etcd {fault}: noticed", lambda: {"NOT_SERVING"} == health(cluster, "etcd"))
        assert ({"SERVING"}, {"SERVING"}) == (health(cluster, ""), health(cluster, "policy"))
        mail_goes_on(load, 3)
        {"killed": etcd.start, "frozen": etcd.resume}[fault]()
        assert until("etcd is back: noticed", lambda: {"SERVING"} == health(cluster, "etcd")) <= RECOVERY_S_MAX
        put_limit(cluster, 30)
        until("a change after that", lambda: everywhere(cluster, 30))


def test_history_that_was_compacted_is_not_missed(cluster: Cluster) -> None:
    """A node that was cut off cannot be told what has changed: it reads everything again."""
    with sending(cluster, 60) as load:
        cluster.network.drop(cut(["mx1"], ["etcd"]))
        until("noticed", lambda: "NOT_SERVING" == cluster.agents["mx1"].health("etcd"))
        for max in (59, 58, 57):
            put_limit(cluster, max)
        cluster.etcd.compact()
        mail_goes_on(load, 3)
        assert {"per-user": 60} == cluster.agents["mx1"].max_of(USERS[0])
        cluster.network.drop({})
        assert until("all at 57", lambda: everywhere(cluster, 57)) <= RECOVERY_S_MAX


def test_logins_are_renewed(workspace: Path) -> None:
    """A token that has expired, or that a restarted etcd does not know, is replaced without anybody noticing."""
    login = {"user": USER, "password": PASSWORD}
    with Cluster(workspace, NODES, etcd_options=("--auth-token-ttl", "10"), etcd_settings=login) as cluster:
        cluster.etcd.ask_for_login()
        put_limit(cluster, 60)
        cluster.start()
        with sending(cluster, 60):
            time.sleep(12)  # the token's life
            put_limit(cluster, 50)
            assert until("a change after the token's life", lambda: everywhere(cluster, 50)) <= RECOVERY_S_MAX
            assert {"SERVING"} == health(cluster, "etcd")
            cluster.etcd.kill()
            cluster.etcd.start()
            assert until("etcd is back", lambda: {"SERVING"} == health(cluster, "etcd")) <= RECOVERY_S_MAX
            put_limit(cluster, 40)
            until("a change after a restart", lambda: everywhere(cluster, 40))


def test_etcd_is_put_back_to_an_older_snapshot(workspace: Path) -> None:
    """Limits are those of the snapshot, the roster is not: a share that somebody spends by is not forgotten."""
    with Cluster(workspace, ["mx1", "mx2"], spare=["mx3"]) as cluster:
        put_limit(cluster, 60)
        cluster.start()
        snapshot = cluster.etcd.snapshot()
        cluster.add("mx3").start()
        cluster.wait_for_roster(NODES)
        with sending(cluster, 60) as load:
            put_limit(cluster, 30)
            until("the change", lambda: everywhere(cluster, 30))
            cluster.etcd.restore(snapshot)
            since_s = time.monotonic()
            assert until("the limits of the snapshot", lambda: everywhere(cluster, 60), since_s) <= RECOVERY_S_MAX
            cluster.wait_for_roster(NODES)
            assert until("all is well", lambda: {"SERVING"} == health(cluster, "etcd"), since_s) <= RECOVERY_S_MAX
            mail_goes_on(load, 3)
            put_limit(cluster, 50)
            until("a change after that", lambda: everywhere(cluster, 50))


def test_a_limit_is_changed_while_mail_flows(cluster: Cluster) -> None:
    """From 60 to 10 and to 300: the larger counts while it is changed, the new one soon after."""
    lifetime_and_window_s = 2 * WINDOW_S + 2
    with sending(cluster, 60) as load:
        put_limit(cluster, 10)
        until("10 everywhere", lambda: everywhere(cluster, 10))
        time.sleep(lifetime_and_window_s)
        low = len(load.replies)
        time.sleep(WINDOW_S)
        assert 2 * 10 >= sum(reply.verdict == "admitted" for reply in load.replies[low:])
    with sending(cluster, 300) as load:
        put_limit(cluster, 300)
        until("300 everywhere", lambda: everywhere(cluster, 300))
        time.sleep(WINDOW_S)


BAD_VALUES = {
    "no YAML": "{key: [",
    "no key": "{max: 10, per: 1h}",
    "an unknown word": "{key: sasl_username, max: 10, per: 1h, colour: red}",
    "less than nothing": "{key: sasl_username, max: -1, per: 1h}",
    "no text": "\udcff\udcfe",
}


def test_bad_values_change_nothing(cluster: Cluster) -> None:
    """Each is refused with its reason, by all nodes; the last good limit stays, until a good one comes."""
    with sending(cluster, 60) as load:
        for why, value in BAD_VALUES.items():
            cluster.etcd.put("limits/per-user", value)
            until(f"{why}: refused", lambda: all(cluster.status(node)["refused"] for node in NODES))
            assert everywhere(cluster, 60)
            mail_goes_on(load, 3)
            put_limit(cluster, 60)
            took_s = until(f"{why}: mended", lambda: not any(cluster.status(node)["refused"] for node in NODES))
            assert took_s <= RECOVERY_S_MAX
    assert {"SERVING"} == health(cluster, "")
