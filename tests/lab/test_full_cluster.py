"""A cluster on three hosts, from bare to upgraded, through trouble, and off again: one story, told in order.

The figures that it measures are printed as a table at its end (pytest -s).
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator

import pytest

from . import cache
from .conftest import boot
from .lab import Lab
from .mail import Traffic, accepted_recipients, send

# Booting and Ansible take their time.
pytestmark = pytest.mark.timeout(1800)

NAMES = ("mx1", "mx2", "mx3")
# Those whose mail goes on all the time; user1 is the one that is capped.
BUSY = [f"user{number}" for number in range(2, 10)]
ETCDCTL = (
    "ETCDCTL_API=3 ETCDCTL_ENDPOINTS=https://127.0.0.1:2379 ETCDCTL_CACERT=/etc/postmeter/tls/etcd-ca.pem"
    " ETCDCTL_USER=postmeter:$(cat /etc/postmeter/etcd.password) etcdctl"
)


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """Collect what was measured, and print it."""
    lines: list[str] = []
    yield lines
    print("\n" + "\n".join(lines))


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Boot three hosts."""
    yield from boot(*NAMES)


@pytest.fixture(scope="module")
def before(lab: Lab) -> list[str]:
    """Remember how each Postfix was before."""
    return [host.run("postconf -n") for host in lab.hosts.values()]


@pytest.fixture(scope="module")
def cluster(lab: Lab, before: list[str], table: list[str]) -> Lab:
    """Install by the example playbooks, and send as one user through all hosts until he is refused."""
    start = time.monotonic()
    lab.install_etcd()
    table.append(f"etcd on three bare hosts                    {time.monotonic() - start:7.1f} s")
    start = time.monotonic()
    lab.install()
    accepted, refusal = accepted_recipients(lab, "mx1", "user1", recipients=10, most=400)
    table.append(f"ansible-playbook to the first refused mail  {time.monotonic() - start:7.1f} s")
    assert 200 == accepted
    assert 450 == refusal.code
    return lab


def releases(lab: Lab) -> list[str]:
    """What runs on each host."""
    return [host.run("postmeter --version; postmeter health").split("\n")[0] for host in lab.hosts.values()]


def note(table: list[str], what: str, traffic: Traffic) -> None:
    """Put a line about some traffic into the table."""
    table.append(
        f"{what:<44}{len(traffic.outcomes):6} messages, {len(traffic.refused()):3} not taken,"
        f" slowest {traffic.slowest_s():5.2f} s"
    )


def during(lab: Lab, table: list[str], what: str, do: Callable[[], object], hosts: tuple[str, ...] = NAMES) -> Traffic:
    """Constant mail to hosts while something is done."""
    with Traffic(lab, BUSY, hosts) as traffic:
        do()
    note(table, what, traffic)
    return traffic


def test_the_cap_holds_through_all_hosts(cluster: Lab) -> None:
    """The user that has spent his recipients through one host is refused by all."""
    assert [450, 450, 450] == [send(cluster, name, "user1").code for name in NAMES]


def test_all_nodes_are_well(cluster: Lab) -> None:
    """All three are members, alive, without trouble, and have refused no limit."""
    for host in cluster.hosts.values():
        host.run("postmeter nodes && postmeter health")


def test_second_run_changes_nothing(cluster: Lab) -> None:
    """Both playbooks find everything as it should be; and what the operator changed in etcd stays."""
    operators = "{key: sasl_username, count: recipients, max: 100000, per: 1h}"
    cluster.hosts["mx1"].run(f"{ETCDCTL} put /postmeter/limits/per-user '{operators}'")
    cluster.hosts["mx1"].run(f"{ETCDCTL} put /postmeter/limits/per-domain '{operators.replace('username', 'domain')}'")
    assert ["0"] * 3 == re.findall(r"changed=(\d+)", cluster.install_etcd())
    assert ["0"] * 3 == re.findall(r"changed=(\d+)", cluster.install())
    assert operators in cluster.hosts["mx1"].run(f"{ETCDCTL} get /postmeter/limits/per-user")


def test_etcd_lets_the_agents_touch_their_prefix_only(cluster: Lab) -> None:
    """The user of the agents may not write elsewhere."""
    assert "permission denied" in cluster.hosts["mx1"].run(f"{ETCDCTL} put /other 1 2>&1", check=False)


def test_upgrade_refuses_no_mail(cluster: Lab, table: list[str]) -> None:
    """With mail to all hosts all the time, the next release comes: every message is taken, and the cap is held."""
    during(cluster, table, "nothing happens", lambda: time.sleep(10))
    # user1 has used his 200, and can send 10000 more: he will not be through before all agents have restarted.
    cluster.hosts["mx1"].run("postmeter override put per-user user1@example.com '{1h: 10200}'")
    wheels = cache.wheelhouse("0.1.1")
    with Traffic(cluster, ["user1"]) as capped:
        traffic = during(cluster, table, "rolling upgrade", lambda: cluster.install(wheels=wheels))
    assert [] == traffic.refused()
    assert ["postmeter 0.1.1"] * 3 == releases(cluster)
    meanwhile = len(capped.outcomes) - len(capped.refused())
    rest = [
        accepted_recipients(cluster, name, "user1", recipients, most=10000)[0]
        for recipients in (100, 10, 1)
        for name in NAMES
    ]
    table.append(f"user1, who may send 10000, meanwhile and after{meanwhile:6} + {sum(rest)}")
    assert 10000 == meanwhile + sum(rest)


def test_broken_release_stops_at_the_first_host(cluster: Lab, table: list[str]) -> None:
    """A release that does not come up is taken back where it was tried, says why, and reaches no other host."""
    output: list[str] = []
    wheels = cache.wheelhouse("0.1.2", spoiled=True)
    traffic = during(
        cluster, table, "broken upgrade", lambda: output.append(cluster.install(wheels=wheels, check=False))
    )
    assert [] == traffic.refused()
    assert ["postmeter 0.1.1"] * 3 == releases(cluster)
    assert "fatal: [mx1.example.com]" in output[0]
    assert "postmeter 0.1.2 does not serve with these settings. 0.1.1 and the settings of before run again" in output[0]
    assert "spoiled on purpose" in output[0]
    recap = output[0].rpartition("PLAY RECAP")[2]
    assert ["1", "0", "0"] == re.findall(r"failed=(\d+)", recap)


def test_going_back_refuses_no_mail(cluster: Lab, table: list[str]) -> None:
    """The release of before is still there, and is chosen again."""
    traffic = during(cluster, table, "going back", cluster.install)
    assert [] == traffic.refused()
    assert ["postmeter 0.1.0"] * 3 == releases(cluster)


def test_settings_that_do_not_come_up_are_taken_back(cluster: Lab, table: list[str]) -> None:
    """Those that nobody can find wrong before: an address that the host does not have. The first host keeps serving."""
    elsewhere = json.dumps({"postmeter_cluster": {"listen": "192.0.2.99:10044"}})
    output: list[str] = []
    traffic = during(
        cluster, table, "wrong settings", lambda: output.append(cluster.install("-e", elsewhere, check=False))
    )
    assert [] == traffic.refused()
    assert "postmeter 0.1.0 does not serve with these settings. 0.1.0 and the settings of before run again" in output[0]
    assert "192.0.2.99:10044" in output[0]
    assert "listen: 192.0.2.11:10044" in cluster.hosts["mx1"].run("cat /etc/postmeter/postmeter.yaml")
    assert ["1", "0", "0"] == re.findall(r"failed=(\d+)", output[0].rpartition("PLAY RECAP")[2])


def test_certificates_are_rotated(cluster: Lab, table: list[str]) -> None:
    """Each node has another certificate afterwards, and all reach each other."""
    show = "cat /etc/postmeter/tls/node.pem"
    old = [host.run(show) for host in cluster.hosts.values()]
    rotate = "deploy/ansible/rotate-certificates.yml"
    options = ("-e", "postmeter_source=wheelhouse", "-e", f"postmeter_wheelhouse={cache.wheelhouse()}")
    traffic = during(cluster, table, "new certificates", lambda: cluster.ansible(rotate, *options))
    assert [] == traffic.refused()
    assert all(
        one != other for one, other in zip(old, (host.run(show) for host in cluster.hosts.values()), strict=True)
    )
    for host in cluster.hosts.values():
        host.run("systemctl restart postmeter && postmeter health --wait 60")


def test_a_host_reboots(cluster: Lab, table: list[str]) -> None:
    """The others take mail meanwhile; and it does so again as soon as it is up, with nothing to be done."""
    traffic = during(cluster, table, "mx1 reboots, mail to mx2 and mx3", cluster.hosts["mx1"].reboot, ("mx2", "mx3"))
    assert [] == traffic.refused()
    cluster.hosts["mx1"].run("postmeter health --wait 60")
    assert 250 == send(cluster, "mx1", "user2").code


def test_a_host_loses_its_power(cluster: Lab, table: list[str]) -> None:
    """The others take mail meanwhile; and it does so again once it has power."""
    mx1 = cluster.hosts["mx1"]

    def cycle() -> None:
        mx1.power_off()
        time.sleep(5)
        mx1.power_on()

    traffic = during(cluster, table, "mx1 without power, mail to mx2 and mx3", cycle, ("mx2", "mx3"))
    assert [] == traffic.refused()
    mx1.run("postmeter health --wait 60")
    assert 250 == send(cluster, "mx1", "user2").code


def test_etcd_goes_away_and_comes_back(cluster: Lab, table: list[str]) -> None:
    """Members stop one after the other, until none is left, and start again: mail goes on with the last limits."""

    def away() -> None:
        for command in ("stop", "start"):
            for host in cluster.hosts.values():
                host.run(f"systemctl --no-block {command} etcd")
                time.sleep(3)

    traffic = during(cluster, table, "etcd stops, member by member, and starts", away)
    assert [] == traffic.refused()


def test_a_disk_is_full(cluster: Lab, table: list[str]) -> None:
    """The other hosts take mail; the one without space serves again by itself when there is some."""
    mx1 = cluster.hosts["mx1"]

    def fill() -> None:
        mx1.run("fallocate -l 4G /full 2>/dev/null || dd if=/dev/zero of=/full bs=1M 2>/dev/null || true")
        time.sleep(5)

    traffic = during(cluster, table, "mx1 without disk space, mail to mx2 and mx3", fill, ("mx2", "mx3"))
    assert [] == traffic.refused()
    mx1.run("rm /full")
    mx1.run("postmeter health --wait 60")
    assert 250 == send(cluster, "mx1", "user2").code


def test_a_node_is_drained_and_comes_back(cluster: Lab, table: list[str]) -> None:
    """Its Postfix and its agent go, the others have all rights; and it joins again when it is installed again."""
    drain = ("deploy/ansible/drain-node.yml", "-e", "host=mx3.example.com")
    traffic = during(cluster, table, "mx3 is drained", lambda: cluster.ansible(*drain), ("mx1", "mx2"))
    assert [] == traffic.refused()
    mx3 = cluster.hosts["mx3"]
    assert "inactive\ninactive\n" == mx3.run("systemctl is-active postfix postmeter.socket", check=False)
    assert {"mx1", "mx2"} == members(cluster)
    mx3.run("systemctl enable --now postfix")
    cluster.install("--limit", "mx3.example.com")
    assert {"mx1", "mx2", "mx3"} == {name.partition("~")[0] for name in wait_for_members(cluster, 3)}
    assert 250 == send(cluster, "mx3", "user2").code


def test_a_dead_node_is_replaced(cluster: Lab, table: list[str]) -> None:
    """A machine burns down and is declared so; the same name on another one, with an empty disk, joins."""
    mx3 = cluster.hosts["mx3"]
    (name,) = (name for name in members(cluster) if name.startswith("mx3"))

    def burn() -> None:
        mx3.power_off()
        for place in ("opt/postmeter", "etc/postmeter", "var/lib/postmeter"):
            shutil.rmtree(mx3.root / place)
        # It keeps a lease in etcd for 10 s, and cannot be declared dead before.
        told = ("-e", f"node={name}", "-e", "reporter=mx1.example.com", "-e", f"confirmed={name}")
        cluster.ansible("deploy/ansible/remove-dead-node.yml", *told)

    traffic = during(cluster, table, "mx3 burns down and is removed", burn, ("mx1", "mx2"))
    assert [] == traffic.refused()
    assert {"mx1", "mx2"} == members(cluster)
    mx3.power_on()
    cluster.install("--limit", "mx3.example.com")
    assert {"mx1", "mx2", "mx3"} == {name.partition("~")[0] for name in wait_for_members(cluster, 3)}
    assert 250 == send(cluster, "mx3", "user2").code


def members(lab: Lab) -> set[str]:
    """Who is in the roster, or comes into it, as mx1 sees it."""
    told = json.loads(lab.hosts["mx1"].run("postmeter nodes --json || true"))
    return {node["id"] for node in told["nodes"] if node["state"] in ("member", "joining")}


def wait_for_members(lab: Lab, count: int) -> set[str]:
    """Wait until so many are in the roster."""
    end = time.monotonic() + 60
    while len(members(lab)) < count and time.monotonic() < end:
        time.sleep(0.5)
    return members(lab)


def test_backing_out_leaves_postfix_as_it_was(cluster: Lab, before: list[str]) -> None:
    """After the playbook that takes Postmeter off, every Postfix has the settings of before."""
    cluster.ansible("deploy/ansible/back-out.yml", "-e", "postmeter_purge=true")
    assert before == [host.run("postconf -n") for host in cluster.hosts.values()]
    assert [""] * 3 == [
        host.run("ls -d /opt/postmeter /etc/postmeter 2>/dev/null || true") for host in cluster.hosts.values()
    ]
