"""Rights reach the node that needs them, as long as it reaches those who have them."""

from __future__ import annotations

from pathlib import Path

from .cluster import Cluster
from .stories import USERS, put_limit, sending, until

MAX = 60


def test_who_cannot_be_called_borrows_all_the_same(workspace: Path) -> None:
    """Answers come by the way of the questions: nothing is lent that does not arrive."""
    with Cluster(workspace, ["mx1", "mx2"]) as cluster:
        put_limit(cluster, MAX, window_s=3600)
        cluster.start()
        mx1, mx2 = cluster.agents.values()
        cluster.network.close_door("mx1")
        mx2.stop()
        mx2.start()
        with sending(cluster, MAX, window_s=3600, nodes=["mx1"]):
            until("all is used", lambda: all({"mx1": MAX} == mx1.used(user).get("per-user") for user in USERS))
