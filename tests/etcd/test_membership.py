"""Agents come into the roster, go by it, and leave it: with a real etcd, as processes on this machine.

What a cut network does to them is in tests/cluster.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.postfix.mailhost import wait_until

from .nodes import LIMIT, Node, Nodes
from .server import PREFIX, EtcdServer

ALICE = "alice@example.com"
MAX = 30


@pytest.fixture
def nodes(tmp_path: Path, server: EtcdServer) -> Iterator[Nodes]:
    """No agents yet, and an etcd with one limit of 30."""
    with Nodes(tmp_path, server) as running:
        yield running


def knows(node: Node, used: int) -> bool:
    """Whether a node has heard that so much was used."""
    return f'"used": {used}' in node.tell("top", "--json")


def knows_nothing(node: Node) -> bool:
    """Whether a node knows of no usage of hers."""
    return ALICE not in node.tell("top", "--json")


def test_they_join_by_themselves_and_share_one_cap(nodes: Nodes) -> None:
    """All at once into an empty roster; then the last right can be used at any of them, and no more."""
    several = nodes.start("mx1", "mx2", "mx3")
    nodes.wait_for_members("mx1", "mx2", "mx3")
    assert ["DUNNO"] * MAX == [several[0].ask(ALICE) for _ in range(MAX)]
    for node in several:
        assert node.ask(ALICE).startswith("450 4.7.1 per-user: ")
    wait_until("all to be well", lambda: several[2].try_to_tell("nodes").returncode == 0)
    shown = json.loads(several[2].tell("nodes", "--json"))
    assert [("mx1", "member", True), ("mx2", "member", True), ("mx3", "member", True)] == [
        (node["id"], node["state"], node["alive"]) for node in shown["nodes"]
    ]


def test_show_and_top_answer_for_all_at_any_node(nodes: Nodes) -> None:
    """With the part of each; and `ask` says that others would have to lend."""
    mx1, mx2 = nodes.start("mx1", "mx2")
    nodes.wait_for_members("mx1", "mx2")
    assert ["DUNNO", "DUNNO"] == [mx1.ask(ALICE, 10), mx2.ask(ALICE, 5)]
    for node in (mx1, mx2):
        wait_until("both to know of both", partial(knows, node, 15))
        [usage] = json.loads(node.tell("show", "--json", ALICE))["usages"]
        assert (15, 30, 15) == tuple(usage["meter"][name] for name in ("used", "max", "left"))
        assert [("mx1", 10), ("mx2", 5)] == [(part["node"], part["used"]) for part in usage["parts"]]
    asked = mx2.try_to_tell("ask", "--explain", f"sasl_username={ALICE}", "recipient_count=12")
    assert (0, True) == (asked.returncode, "if other nodes lend" in asked.stdout)
    assert 1 == mx2.try_to_tell("ask", f"sasl_username={ALICE}", "recipient_count=16").returncode


def test_a_restart_is_not_a_leave(nodes: Nodes) -> None:
    """Clean or not: what was used and lent is remembered, and the roster stays as it is."""
    mx1, mx2 = nodes.start("mx1", "mx2")
    nodes.wait_for_members("mx1", "mx2")
    before = nodes.read("roster")
    assert ["DUNNO"] * MAX == [mx1.ask(ALICE) for _ in range(MAX)]
    mx2.stop()
    mx2.launch()
    nodes.wait_for_health(mx2)
    mx1.kill()
    mx1.launch()
    nodes.wait_for_health(mx1)
    assert before == nodes.read("roster")
    for node in (mx1, mx2):
        assert node.ask(ALICE).startswith("450 4.7.1 ")
    assert 2 == nodes.read("nodes/mx1")["incarnation"]


def test_they_start_without_etcd(nodes: Nodes) -> None:
    """With the limits, the roster and the addresses that they had; a new node waits, and does not let mail pass."""
    mx1, mx2 = nodes.start("mx1", "mx2")
    nodes.wait_for_members("mx1", "mx2")
    assert "DUNNO" == mx1.ask(ALICE)
    mx1.stop()
    mx2.stop()
    nodes.server.kill()
    mx3 = nodes.add("mx3")
    for node in (mx1, mx2, mx3):
        node.launch()
    nodes.wait_for_health(mx1)
    nodes.wait_for_health(mx2)
    assert ["DUNNO"] * (MAX // 2 - 1) == [mx1.ask(ALICE) for _ in range(MAX // 2 - 1)]
    assert mx1.ask(ALICE).startswith("450 4.7.1 ")
    mx3.wait_ready()
    assert mx3.ask(ALICE).startswith("451 4.3.0 ")
    nodes.server.start()
    nodes.wait_for_health(mx3)
    nodes.wait_for_members("mx1", "mx2", "mx3")
    assert ["DUNNO"] * (MAX // 2) == [mx2.ask(ALICE) for _ in range(MAX // 2)]
    for node in (mx1, mx2, mx3):
        assert node.ask(ALICE).startswith("450 4.7.1 ")


def test_a_drained_node_hands_over_and_comes_back_when_told(nodes: Nodes) -> None:
    """It admits nothing more, the others have all of `max`; it stays out over a restart, and returns as another."""
    mx1, mx2 = nodes.start("mx1", "mx2")
    nodes.wait_for_members("mx1", "mx2")
    mx1.tell("node", "drain", "mx2")
    nodes.wait_for_members("mx1")
    wait_until("mx2 to have left", lambda: mx2.ask(ALICE).startswith("450 4.7.1 "))
    assert ["DUNNO"] * MAX == [mx1.ask(ALICE) for _ in range(MAX)]
    assert 1 == mx2.try_to_tell("health").returncode
    mx2.stop()
    mx2.start()
    assert mx2.ask(ALICE).startswith("450 4.7.1 ")
    mx2.tell("node", "join")
    nodes.wait_for_members("mx1", "mx2~2")
    nodes.wait_for_health(mx2)
    assert ["DUNNO"] * MAX == [mx2.ask("bob@example.com") for _ in range(MAX)]


def test_a_drained_node_tells_who_has_not_heard_it(nodes: Nodes) -> None:
    """Until then its agent must not be taken away: others would keep waiting for what it has not said."""
    mx1, mx2 = nodes.start("mx1", "mx2")
    nodes.wait_for_members("mx1", "mx2")
    os.kill(mx1.pid, signal.SIGSTOP)
    try:
        mx2.tell("node", "drain")
        said = "mx2: what it handed over is not acknowledged yet by mx1"
        wait_until("mx2 to have handed over", lambda: said in mx2.try_to_tell("nodes").stdout)
    finally:
        os.kill(mx1.pid, signal.SIGCONT)
    wait_until("mx1 to have heard", lambda: said not in mx2.try_to_tell("nodes").stdout)


def test_a_dead_node_is_removed_and_returns_as_another(nodes: Nodes) -> None:
    """Not while it is alive; its old state is of no use afterwards, and the message says so."""
    mx1, mx2 = nodes.start("mx1", "mx2")
    nodes.wait_for_members("mx1", "mx2")
    refused = mx1.try_to_tell("node", "remove", "mx2", "--yes")
    assert (2, True) == (refused.returncode, "mx2 is alive" in refused.stderr)
    mx2.kill()
    wait_until("its lease to end", lambda: nodes.read("nodes/mx2") is None)
    mx1.tell("node", "remove", "mx2", "--yes")
    nodes.wait_for_members("mx1", settled=False)
    assert ["mx2"] == nodes.read("roster")["stopped"]
    mx2.launch()
    nodes.wait_for_members("mx1", "mx2~2", settled=False)
    nodes.wait_for_health(mx2)


def test_what_a_dead_node_has_used_counts_though_another_one_joins(nodes: Nodes) -> None:
    """It may have used its share, and nobody has that before it leaves the window: not the newcomer, either."""
    mx1, mx2 = nodes.start("mx1", "mx2")
    nodes.wait_for_members("mx1", "mx2")
    assert ["DUNNO"] * (MAX // 2) == [mx2.ask(ALICE) for _ in range(MAX // 2)]
    mx2.kill()
    wait_until("its lease to end", lambda: nodes.read("nodes/mx2") is None)
    mx1.tell("node", "remove", "mx2", "--yes")
    nodes.wait_for_members("mx1", settled=False)
    (mx3,) = nodes.start("mx3")
    nodes.wait_for_members("mx1", "mx3", settled=False)
    nodes.wait_for_health(mx3)
    answers = [node.ask(ALICE) for node in (mx1, mx3) for _ in range(MAX)]
    # What it had borrowed ahead is lost for as long, too.
    assert 0 < answers.count("DUNNO") <= MAX // 2


def test_who_is_unknown_is_not_drained(nodes: Nodes) -> None:
    """A name that was mistyped: nothing changes."""
    [mx1] = nodes.start("mx1")
    refused = mx1.try_to_tell("node", "drain", "mx9")
    assert (2, "postmeter: mx9 is not in the roster; there are mx1\n") == (refused.returncode, refused.stderr)
    assert ["mx1"] == nodes.members()


# --- state that must not be used --------------------------------------------------------------------------------------


def test_state_from_a_backup_is_refused(nodes: Nodes) -> None:
    """It has forgotten what the node has done since."""
    [mx1] = nodes.start("mx1")
    mx1.stop()
    state, backup = mx1.directory / "state", mx1.directory / "backup"
    shutil.copytree(state, backup)
    mx1.launch()
    nodes.wait_for_health(mx1)
    mx1.stop()
    shutil.rmtree(state)
    backup.rename(state)
    mx1.launch()
    line = mx1.wait_for_log("cannot go on")
    assert "was it restored from a backup?" in line


def test_a_copy_of_a_running_node_is_refused(nodes: Nodes) -> None:
    """The one that runs goes on."""
    [mx1] = nodes.start("mx1")
    copy = nodes.add("mx1")
    shutil.copytree(mx1.directory / "state", copy.directory / "state")
    copy.launch()
    copy.wait_for_log("another process runs as mx1: stop it first")
    assert "DUNNO" == mx1.ask(ALICE)


def test_a_node_that_lost_its_state_waits(nodes: Nodes) -> None:
    """Until the operator takes the lost one out: what that has admitted is not known to anybody else."""
    mx1, mx2 = nodes.start("mx1", "mx2")
    nodes.wait_for_members("mx1", "mx2")
    mx2.kill()
    shutil.rmtree(mx2.directory / "state")
    mx2.launch()
    mx2.wait_for_log("mx2 is known in the cluster by another state directory")
    assert mx2.ask(ALICE).startswith("451 4.3.0 ")
    wait_until("the lease of the lost one to end", lambda: nodes.read("nodes/mx2") is None)
    mx1.tell("node", "remove", "mx2", "--yes")
    nodes.wait_for_members("mx1", "mx2~2", settled=False)
    nodes.wait_for_health(mx2)


def test_the_state_of_another_node_is_refused(nodes: Nodes) -> None:
    """The name in the settings was changed: that is no way to rename a node."""
    [mx1] = nodes.start("mx1")
    mx1.stop()
    other = nodes.add("mx2")
    shutil.copytree(mx1.directory / "state", other.directory / "state")
    other.launch()
    other.wait_for_log("is the state of mx1, but node is mx2")


# --- etcd is not what it was ------------------------------------------------------------------------------------------


def test_a_roster_that_was_lost_is_written_again(nodes: Nodes) -> None:
    """After etcd was restored from a snapshot before the last change, or emptied: the nodes know better."""
    [mx1] = nodes.start("mx1")
    nodes.wait_for_members("mx1")
    snapshot = nodes.server.snapshot()
    [mx2] = nodes.start("mx2")
    nodes.wait_for_members("mx1", "mx2")
    nodes.server.restore(snapshot)
    nodes.wait_for_members("mx1", "mx2")
    nodes.server.etcdctl("del", "--prefix", PREFIX)
    nodes.server.etcdctl("put", f"{PREFIX}limits/per-user", LIMIT)
    nodes.wait_for_members("mx1", "mx2")
    assert "DUNNO" == mx2.ask(ALICE, MAX)
    wait_until("mx1 to be short", lambda: mx1.ask(ALICE).startswith("450 4.7.1 "))


def test_a_damaged_roster_changes_nothing(nodes: Nodes) -> None:
    """It is refused and logged, and the node goes on with the last one."""
    [mx1] = nodes.start("mx1")
    nodes.wait_for_members("mx1")
    good = json.dumps(nodes.read("roster"))
    nodes.server.etcdctl("put", f"{PREFIX}roster", "{generations: [oops]}")
    mx1.wait_for_log("roster refused")
    assert "DUNNO" == mx1.ask(ALICE)
    nodes.server.etcdctl("put", f"{PREFIX}roster", good)
    [mx2] = nodes.start("mx2")
    nodes.wait_for_members("mx1", "mx2")
    assert "DUNNO" == mx2.ask(ALICE)


def test_a_reset_reaches_all_nodes(nodes: Nodes) -> None:
    """The key may use all of `max` again, at any of them."""
    mx1, mx2 = nodes.start("mx1", "mx2")
    nodes.wait_for_members("mx1", "mx2")
    assert ["DUNNO"] * 3 == [node.ask(ALICE, 10) for node in (mx1, mx2, mx1)]
    wait_until("mx2 to know of all", partial(knows, mx2, MAX))
    [forgotten] = json.loads(mx2.tell("reset", "--json", ALICE))["forgotten"]
    assert MAX == forgotten["used"]
    mx1.wait_for_log("reset asked for")
    wait_until("mx1 to lend or admit again", lambda: mx1.ask(ALICE, MAX) == "DUNNO")


def test_a_reset_is_known_everywhere_if_nothing_was_lent(nodes: Nodes) -> None:
    """Nothing is left then of the key, and the others are told all the same."""
    mx1, mx2 = nodes.start("mx1", "mx2")
    nodes.wait_for_members("mx1", "mx2")
    assert ["DUNNO"] * 2 == [node.ask(ALICE, 5) for node in (mx1, mx2)]
    for node in (mx1, mx2):
        wait_until("both to know of both", partial(knows, node, 10))
    mx2.tell("reset", ALICE)
    for node in (mx1, mx2):
        wait_until("both to know that nothing is used", partial(knows_nothing, node))
