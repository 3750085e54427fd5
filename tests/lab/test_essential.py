"""From three bare hosts with Postfix to a limit that holds in all of them and back, by the example playbooks."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from .conftest import boot
from .lab import Host, Lab
from .mail import accepted_recipients, send

# Booting and Ansible take their time.
pytestmark = pytest.mark.timeout(1800)

NAMES = ("mx1", "mx2", "mx3")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Boot three hosts, with a Postfix that asks nobody."""
    yield from boot(*NAMES)


@pytest.fixture(scope="module")
def before(lab: Lab) -> str:
    """Remember Postfix as it was before anything was installed."""
    return lab.hosts["mx1"].run("postconf -n; postconf -M; postconf -P")


@pytest.fixture(scope="module")
def cluster(lab: Lab, before: str) -> Lab:
    """Install by the example playbooks."""
    lab.install_etcd()
    lab.install()
    return lab


@pytest.fixture(scope="module")
def host(cluster: Lab) -> Host:
    """One host of the cluster."""
    return cluster.hosts["mx1"]


def connects(host: Host, user: str, path: str) -> bool:
    """Whether a user can connect to a unix socket on a host."""
    script = f"import socket; socket.socket(socket.AF_UNIX).connect('{path}')"
    return host.run(f'runuser -u {user} -- python3 -c "{script}" 2>/dev/null && echo yes', check=False) == "yes\n"


def test_second_run_changes_nothing(cluster: Lab) -> None:
    """The example playbook once more finds everything as it should be."""
    recap = cluster.install().partition("PLAY RECAP")[2]
    assert ["changed=0"] * 3 == re.findall(r"changed=\d+", recap)
    assert ["failed=0"] * 3 == re.findall(r"failed=\d+", recap)


def test_user_over_the_cap_is_refused_through_any_host(cluster: Lab) -> None:
    """A user gets 200 recipients an hour through all hosts together, and is then told by each to try later."""
    parts = [
        accepted_recipients(cluster, name, "user1", recipients=50, most=most)[0]
        for name, most in zip(NAMES, (0, 50, 400), strict=True)
    ]
    assert [50, 100, 50] == parts
    refusals = [send(cluster, name, "user1") for name in NAMES]
    assert [450, 450, 450] == [refusal.code for refusal in refusals]
    assert re.search(r"user1@example.com has used \d+ of 200 recipients per 1h, try again in", refusals[0].text)


def test_a_restart_of_the_agent_forgets_nothing(cluster: Lab, host: Host) -> None:
    """What was counted is on disk, and the unit lets the agent write it and read it again."""
    assert 150 == accepted_recipients(cluster, "mx1", "user2", recipients=50, most=100)[0]
    host.run("systemctl restart postmeter && postmeter health --wait 30")
    refusal = send(cluster, "mx1", "user2", recipients=100)
    assert 450 == refusal.code
    assert "user2@example.com has used 150 of 200 recipients per 1h" in refusal.text


def test_the_policy_socket_is_for_postfix_only(host: Host) -> None:
    """Another user, and the agent's own, cannot ask; Postfix's can."""
    place = "/var/spool/postfix/private/postmeter"
    assert connects(host, "postfix", place)
    assert not connects(host, "nobody", place)
    assert not connects(host, "postmeter", place)


def test_the_admin_socket_is_for_its_group_only(host: Host) -> None:
    """Members of the group postmeter can use it, others cannot."""
    host.run("useradd --groups postmeter admin && useradd stranger")
    assert connects(host, "admin", "/run/postmeter/admin.sock")
    assert not connects(host, "stranger", "/run/postmeter/admin.sock")
    assert not connects(host, "postfix", "/run/postmeter/admin.sock")


@pytest.mark.parametrize(
    "path",
    ["/etc/shadow", "/root/.ssh/authorized_keys", "/var/spool/postfix/etc/sasldb2", "/etc/etcd/member.key"],
)
def test_the_service_reads_no_file_of_others(host: Host, path: str) -> None:
    """With the namespaces, the user and the groups of the running agent, secrets of root and Postfix cannot be read."""
    pid = host.run("systemctl show --value --property MainPID postmeter").strip()
    enter = f"nsenter --target {pid} --mount -- setpriv --reuid postmeter --regid postmeter --init-groups --"
    assert host.run(f"test -s {path} && echo there") == "there\n"
    assert "Permission denied" in host.run(f"{enter} cat {path}", check=False)


def test_the_service_is_locked_in(host: Host) -> None:
    """`systemd-analyze security` says 1.5 or less of the running unit."""
    found = re.search(
        r"exposure level for postmeter.service: ([0-9.]+)", host.run("systemd-analyze security postmeter")
    )
    assert found is not None
    assert float(found[1]) <= 1.5


def test_backing_out_leaves_postfix_as_it_was(cluster: Lab, host: Host, before: str) -> None:
    """After the playbook that takes Postmeter off a host, Postfix has the settings of before there, and takes mail."""
    cluster.ansible("deploy/ansible/back-out.yml", "--limit", "mx1.example.com")
    assert before == host.run("postconf -n; postconf -M; postconf -P")
    assert "" == host.run(
        "ls -d /opt/postmeter /etc/systemd/system/postmeter.* /usr/local/bin/postmeter 2>/dev/null || true"
    )
    accepted, outcome = accepted_recipients(cluster, "mx1", "user1", recipients=50, most=400)
    assert (450, 250) == (accepted, outcome.code)
