"""Nodes come and go while mail flows: the cap holds, and nobody waits."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from .cluster import Cluster
from .stories import WINDOW_S, longest_s, mail_goes_on, put_limit, sending, until

NODES = ["mx1", "mx2", "mx3"]
ANSWER_S_MAX = 1.0


def test_nodes_come_and_go_while_mail_flows(workspace: Path) -> None:
    """A fourth joins, one is drained, one is killed and removed and comes back, and a copy of one is refused."""
    with Cluster(workspace, NODES, spare=["mx4", "mx5"]) as cluster:
        put_limit(cluster, 60)
        cluster.start()
        mx4 = cluster.add("mx4")
        with sending(cluster, 60, newcomers=["mx2", "mx4"]) as load:
            mx4.start()
            cluster.wait_for_roster({*NODES, "mx4"})
            assert cluster.change_roster("mx1", "drain")
            cluster.wait_for_roster({"mx2", "mx3", "mx4"})
            drained_s = time.monotonic()
            mx2 = cluster.agents["mx2"]
            mx2.kill()
            # Refused while its lease in etcd has not run out.
            until("mx2 removed", lambda: cluster.change_roster("mx3", "remove", "mx2", "--yes"))
            cluster.wait_for_roster({"mx3", "mx4"})
            mx2.start()
            cluster.wait_for_roster({"mx2~2", "mx3", "mx4"})
            _refuse_a_copy(cluster)
            time.sleep(3 * WINDOW_S)
            mail_goes_on(load, 3)
        assert [] == [
            reply
            for reply in load.replies
            if reply.node == "mx1" and reply.asked_s > drained_s and reply.verdict == "admitted"
        ]
        assert longest_s(load.replies) < ANSWER_S_MAX


def _refuse_a_copy(cluster: Cluster) -> None:
    """The state directory of mx3 is copied to another machine, and started there under the name that it holds."""
    copy = cluster.add("mx5", node="mx3")
    shutil.copytree(cluster.agents["mx3"].directory / "state", copy.directory / "state")
    copy.launch()
    copy.wait_for_log("another process runs as mx3")
    until("the copy ends", lambda: copy.has_ended)
