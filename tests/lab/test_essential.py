"""From a bare host with Postfix to a limit that holds and back, by the example playbooks."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from .conftest import boot
from .lab import Host, Lab
from .mail import accepted_recipients

# Booting and Ansible take their time.
pytestmark = pytest.mark.timeout(1800)

# A single node with its limits in a file: no cluster, no etcd.
ALONE = (
    "--limit",
    "mx1.example.com",
    "-e",
    '{"postmeter_cluster": {}, "postmeter_etcd": {}, "postmeter_etcd_tls_ca": ""}',
)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Boot one host, with a Postfix that asks nobody."""
    yield from boot("mx1")


@pytest.fixture(scope="module")
def before(lab: Lab) -> str:
    """Remember Postfix as it was before anything was installed."""
    return lab.hosts["mx1"].run("postconf -n")


@pytest.fixture(scope="module")
def host(lab: Lab, before: str) -> Host:
    """Install by the example playbook."""
    lab.install(*ALONE)
    return lab.hosts["mx1"]


def connects(host: Host, user: str, path: str) -> bool:
    """Whether a user can connect to a unix socket on a host."""
    script = f"import socket; socket.socket(socket.AF_UNIX).connect('{path}')"
    return host.run(f'runuser -u {user} -- python3 -c "{script}" 2>/dev/null && echo yes', check=False) == "yes\n"


def test_second_run_changes_nothing(lab: Lab, host: Host) -> None:
    """The example playbook once more finds everything as it should be."""
    recap = lab.install(*ALONE).partition("PLAY RECAP")[2]
    assert ["changed=0"] == re.findall(r"changed=\d+", recap)
    assert ["failed=0"] == re.findall(r"failed=\d+", recap)


def test_user_over_the_cap_is_refused(lab: Lab, host: Host) -> None:
    """A user gets 200 recipients an hour through the installed agent, and is then told to try later."""
    accepted, outcome = accepted_recipients(lab, "mx1", "user1", recipients=50, most=400)
    assert 200 == accepted
    assert 450 == outcome.code
    assert "user1@example.com has used 200 of 200 recipients per 1h" in outcome.text


def test_a_restart_of_the_agent_forgets_nothing(lab: Lab, host: Host) -> None:
    """What was counted is on disk, and the unit lets the agent write it and read it again."""
    accepted, _ = accepted_recipients(lab, "mx1", "user2", recipients=50, most=100)
    host.run("systemctl restart postmeter && postmeter health --wait 30")
    again, outcome = accepted_recipients(lab, "mx1", "user2", recipients=50, most=400)
    assert (200, 450) == (accepted + again, outcome.code)


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


@pytest.mark.parametrize("path", ["/etc/shadow", "/root/.ssh/authorized_keys", "/var/spool/postfix/etc/sasldb2"])
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


def test_backing_out_leaves_postfix_as_it_was(lab: Lab, host: Host, before: str) -> None:
    """After the playbook that takes Postmeter off, Postfix has the settings of before, and takes mail."""
    lab.ansible("deploy/ansible/back-out.yml", *ALONE)
    assert before == host.run("postconf -n")
    assert "" == host.run(
        "ls -d /opt/postmeter /etc/systemd/system/postmeter.* /usr/local/bin/postmeter 2>/dev/null || true"
    )
    accepted, outcome = accepted_recipients(lab, "mx1", "user1", recipients=50, most=400)
    assert (450, 250) == (accepted, outcome.code)
