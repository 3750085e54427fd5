"""A node that starts again knows what it has used, and so do the others."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from .cluster import Cluster
from .stories import USERS, put_limit, sending, until

MAX = 60
NODES = ["mx1", "mx2", "mx3"]


@pytest.mark.parametrize("end", ["killed", "stopped"])
def test_usage_outlives_a_restart(workspace: Path, end: str) -> None:
    """All nodes show the same for each node before and after; nobody admits any more in between."""
    with Cluster(workspace, NODES) as cluster:
        put_limit(cluster, MAX, window_s=3600)
        cluster.start()
        with sending(cluster, MAX, window_s=3600):
            until("all is used", lambda: all(MAX == _known(cluster, user) for user in USERS))
            before = cluster.agents["mx1"].used(USERS[0])
            mx2 = cluster.agents["mx2"]
            {"killed": mx2.kill, "stopped": mx2.stop}[end]()
            mx2.start()
            until("the same everywhere", lambda: all(before == cluster.agents[node].used(USERS[0]) for node in NODES))
            time.sleep(1)  # for requests to be refused
        assert all(MAX == _known(cluster, user) for user in USERS)


def test_a_clean_restart_costs_no_rights(workspace: Path) -> None:
    """What a node has used by borrowed rights does not burden its own after that: the last message is admitted."""
    most = 200
    with Cluster(workspace, NODES[:2]) as cluster:
        put_limit(cluster, most, window_s=3600)
        cluster.start()
        mx1 = cluster.agents["mx1"]
        with sending(cluster, most, window_s=3600, nodes=["mx1"]):
            until("rights were borrowed", lambda: all(_known(cluster, user) >= 0.6 * most for user in USERS))
        assert all(_known(cluster, user) < most for user in USERS)
        mx1.stop()
        mx1.start()
        with sending(cluster, most, window_s=3600, nodes=["mx1"]):
            until("all is used", lambda: all(most == _known(cluster, user) for user in USERS))


def _known(cluster: Cluster, user: str) -> int:
    """What all nodes say that a user has used; 0 if they do not agree."""
    [*known] = {sum(agent.used(user).get("per-user", {}).values()) for agent in cluster.agents.values()}
    return known[0] if len(known) == 1 else 0
