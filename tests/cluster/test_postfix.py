"""Three mail servers with a cap in common, over real SMTP."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import pytest

from tests.postfix import mailhost
from tests.postfix.mailhost import MailHost, SmtpClient

from .cluster import Cluster
from .conftest import make_workspace
from .network import cut
from .stories import RECOVERY_S_MAX, until

NODES = ["mx1", "mx2", "mx3"]
MAX = 100
USABLE_S_MAX = 15.0


@dataclass(slots=True)
class MailCluster:
    """A mail server for each node of a cluster."""

    cluster: Cluster
    hosts: dict[str, MailHost]

    @contextlib.contextmanager
    def senders(self, user: str) -> Iterator[dict[str, SmtpClient]]:
        """One user, logged in everywhere."""
        with contextlib.ExitStack() as stack:
            yield {node: stack.enter_context(host.submission(user)) for node, host in self.hosts.items()}


@pytest.fixture(scope="module")
def mail(machines: None) -> Iterator[MailCluster]:
    """The agents are asked at a unix socket below Postfix's queue, as smtpd is chrooted there."""
    why_not = mailhost.unavailable()
    if why_not is not None:
        pytest.skip(why_not)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(make_workspace())
        cluster = stack.enter_context(Cluster(directory, [], spare=NODES))
        cluster.put_limit("per-user", key="sasl_username", count="messages", max=MAX, per="1h")
        hosts = {}
        for node in NODES:
            (directory / f"host-{node}").mkdir()
            host = MailHost(directory / f"host-{node}", policy="unix:private/postmeter")
            hosts[node] = stack.enter_context(host)
            cluster.add(node, policy_socket=host.private / "postmeter")
        cluster.start()
        yield MailCluster(cluster, hosts)


def test_the_101st_is_refused_wherever_it_goes(mail: MailCluster) -> None:
    """100 messages spread at random are accepted, whichever node they reach, and no more anywhere."""
    chance = Random(1)
    with mail.senders("alice@example.org") as senders:
        accepted = [senders[chance.choice(NODES)].send().code for _ in range(MAX)]
        assert [250] * MAX == accepted
        assert [450] * 3 == [senders[node].send().code for node in NODES]


def test_a_cut_does_not_raise_the_cap(mail: MailCluster) -> None:
    """Both sides together never accept more than 100; healed, all know the usage, and the rest can be used."""
    agents = mail.cluster.agents.values()
    with mail.senders("bob@example.org") as senders:
        before = sum(senders[node].send().code == 250 for node in NODES for _ in range(4))
        mail.cluster.network.drop(cut(["mx1"], ["mx2", "mx3", "etcd"]))
        alone = _send_all(senders, ["mx1"])
        others = _send_all(senders, ["mx2", "mx3"])
        assert before == 12
        assert 0 < alone
        assert 0 < others
        accepted = before + alone + others
        assert accepted <= MAX
        mail.cluster.network.drop({})
        healed_s = time.monotonic()

        def all_know() -> bool:
            return {accepted} == {sum(agent.used("bob@example.org")["per-user"].values()) for agent in agents}

        def rest_is_used() -> bool:
            nonlocal accepted
            accepted += _send_all(senders, NODES)
            return accepted >= MAX

        assert until("the same usage everywhere", all_know, healed_s) <= RECOVERY_S_MAX
        assert until("all 100 used", rest_is_used, healed_s) <= USABLE_S_MAX
        assert MAX == accepted
        assert [450] * 3 == [senders[node].send().code for node in NODES]


def _send_all(senders: dict[str, SmtpClient], nodes: list[str]) -> int:
    """Send at each of these nodes until it refuses. Returns how many were accepted."""
    accepted = 0
    for node in nodes:
        while (outcome := senders[node].send()).code == 250:
            accepted += 1
        assert 450 == outcome.code, outcome
    return accepted
