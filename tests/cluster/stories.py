"""stories - what the tests of clusters have in common: senders, limits, and what must be true of a cluster.

NAME
    sending - load at all nodes while something happens, and the judgement of it
    until - waits for something, and says how long that took
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator

import grpc

from postmeter.errors import AgentError
from tests.postfix.mailhost import PATIENCE_S, wait_until

from .cluster import Cluster
from .count import Meter, Reply, by_meter, most_admitted
from .load import Load

USERS = ("a@one.test", "b@one.test")
WINDOW_S = 6
# What the issue of a cluster promises: everything is as it should be so long after the cause of trouble is gone.
RECOVERY_S_MAX = 5.0


def meters_of(user: str) -> tuple[Meter, ...]:
    """What a message counts on."""
    return (("per-user", user),)


def put_limit(cluster: Cluster, max: int, window_s: int = WINDOW_S) -> None:
    """A user's limit, in messages per window."""
    cluster.put_limit("per-user", key="sasl_username", count="messages", max=max, per=f"{window_s}s")


@contextlib.contextmanager
def sending(
    cluster: Cluster,
    most: int,
    window_s: int = WINDOW_S,
    nodes: Collection[str] | None = None,
    newcomers: Collection[str] = (),
) -> Iterator[Load]:
    """Load at these nodes, or all. At the end: everybody was told yes or no, and no window had more.

    `newcomers` cannot tell before they are in the cluster.
    """
    nodes = cluster.agents if nodes is None else nodes
    sockets = {name: agent.policy_socket for name, agent in cluster.agents.items() if name in nodes}
    with Load(sockets, USERS, meters_of, seed=1) as load:
        yield load
    failed = [
        (reply.node, reply.text) for reply in load.replies if reply.verdict == "failed" and reply.node not in newcomers
    ]
    assert not failed, failed[:5]
    for meter, replies in by_meter(load.replies).items():
        assert most_admitted(replies, window_s) <= most, meter


def admitted_since(load: Load, since_s: float) -> dict[str, int]:
    """How many messages each node has admitted that were asked for since then."""
    found: dict[str, int] = {}
    for reply in list(load.replies):
        if reply.asked_s >= since_s and reply.verdict == "admitted":
            found[reply.node] = found.get(reply.node, 0) + 1
    return found


def mail_goes_on(load: Load, nodes: int) -> None:
    """Return when every one of so many nodes has admitted a message that it was asked about from now on."""
    since_s = time.monotonic()
    wait_until("mail at all nodes", lambda: nodes == len(admitted_since(load, since_s)))


def until(what: str, happened: Callable[[], bool], since_s: float | None = None) -> float:
    """Wait for it. Returns the seconds since then, or since now."""
    since_s = time.monotonic() if since_s is None else since_s

    def safely() -> bool:
        try:
            return happened()
        except (AgentError, grpc.RpcError):
            return False

    wait_until(what, safely, PATIENCE_S)
    took_s = time.monotonic() - since_s
    print(f"{what}: {took_s:.1f} s")
    return took_s


def everywhere(cluster: Cluster, max: int) -> bool:
    """Whether all nodes go by this `max`; only to be asked while there is load."""
    return all({"per-user": max} == agent.max_of(USERS[0]) for agent in cluster.agents.values())


def health(cluster: Cluster, part: str) -> set[str]:
    """What the nodes say of a part of themselves."""
    return {agent.health(part) for agent in cluster.agents.values()}


def longest_s(replies: list[Reply]) -> float:
    """The longest that anybody waited for an answer."""
    return max(reply.answered_s - reply.asked_s for reply in replies if reply.verdict != "lost")
