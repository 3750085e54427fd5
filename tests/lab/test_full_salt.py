"""The Salt formula, masterless, on bare hosts: the same results as the role's."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from postmeter import __version__

from . import cache
from .conftest import boot
from .lab import Host, Lab
from .mail import accepted_recipients, send

# Booting and Ansible take their time.
pytestmark = pytest.mark.timeout(1800)

FORMULA = cache.ROOT / "deploy/salt"
SALT = "salt-call --local --out=json --retcode-passthrough --log-level=error"
NAMES = ("mx1", "mx2", "mx3")
LIMITS = {"per-user": {"key": "sasl_username", "count": "recipients", "max": {"1h": 200}}}
PILLAR = {"version": __version__, "wheelhouse": "salt://postmeter-wheels", "limits": LIMITS, "postfix": True}
OWN_LIST = "submission/inet/smtpd_recipient_restrictions"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Boot three hosts that have Salt, of which the last has a service with lists of its own."""
    for lab in boot(*NAMES, layers=[cache.salt()]):
        for host in lab.hosts.values():
            shutil.copytree(FORMULA, host.root / "srv/salt")
            shutil.copytree(cache.wheelhouse(), host.root / "srv/salt/postmeter-wheels")
            host.write("/srv/pillar/top.sls", json.dumps({"base": {"*": ["postmeter"]}}))
            fill_pillar(host, {})
            host.run(f"{SALT} saltutil.sync_all")
        lab.hosts["mx3"].run(f"postconf -P {OWN_LIST}=permit_sasl_authenticated,reject && postfix reload")
        yield lab


@pytest.fixture(scope="module")
def before(lab: Lab) -> list[str]:
    """Remember each Postfix as it was."""
    return [wiring(host) for host in lab.hosts.values()]


def wiring(host: Host) -> str:
    """How Postfix is set up."""
    return host.run("postconf -n; postconf -P")


def fill_pillar(host: Host, more: dict[str, object]) -> None:
    """Write a host's pillar."""
    host.write("/srv/pillar/postmeter.sls", json.dumps({"postmeter": {**PILLAR, **more}}))


def apply(host: Host, state: str) -> dict[str, Any]:
    """Apply a state, and return those of its parts that changed something."""
    parts: dict[str, Any] = json.loads(host.run(f"{SALT} state.apply {state} 2>/dev/null"))["local"]
    return {name: part["changes"] for name, part in parts.items() if part["changes"]}


def test_from_bare_to_refused(lab: Lab, before: list[str]) -> None:
    """One state, and a user over the cap is refused; once more, and everything is found as it should be."""
    apply(lab.hosts["mx1"], "postmeter")
    accepted, refusal = accepted_recipients(lab, "mx1", "user1", recipients=50, most=400)
    assert (200, 450) == (accepted, refusal.code)
    assert {} == apply(lab.hosts["mx1"], "postmeter")


def test_clean_leaves_postfix_as_it_was(lab: Lab, before: list[str]) -> None:
    """After postmeter.clean Postfix has the settings of before, and nothing of Postmeter runs."""
    mx1 = lab.hosts["mx1"]
    apply(mx1, "postmeter.clean")
    assert before[0] == wiring(mx1)
    assert "" == mx1.run("ls -d /opt/postmeter /etc/postmeter /etc/systemd/system/postmeter.* 2>/dev/null || true")
    assert 250 == accepted_recipients(lab, "mx1", "user1", recipients=50, most=400)[1].code
    mx1.run("rm -r /var/lib/postmeter")


def test_a_cluster(lab: Lab, before: list[str], tmp_path: Path) -> None:
    """With etcd and certificates in the pillar the hosts share the cap; the second run changes nothing on any."""
    lab.install_etcd()
    certs = ("-c", "import sys; from postmeter.cli import main; sys.exit(main())", "certs")
    cache.run(sys.executable, *certs, "ca", tmp_path / "ca")
    for name, host in lab.hosts.items():
        cache.run(sys.executable, *certs, "node", name, tmp_path / "ca")
        fill_pillar(host, cluster_pillar(lab, name, tmp_path / "ca"))
        apply(host, "postmeter")
    total = [
        accepted_recipients(lab, name, "user2", recipients=20, most=most)[0]
        for name, most in zip(NAMES, (40, 40, 400), strict=True)
    ]
    assert [60, 60, 80] == total
    assert [450, 450, 450] == [send(lab, name, "user2").code for name in NAMES]
    assert [{}, {}, {}] == [apply(host, "postmeter") for host in lab.hosts.values()]
    asked = lab.hosts["mx3"].run(f"postconf -P {OWN_LIST}")
    assert "= check_policy_service,$postmeter,permit_sasl_authenticated,reject" in asked


def test_clean_leaves_all_as_they_were(lab: Lab, before: list[str]) -> None:
    """Also what was done to master.cf."""
    for host in lab.hosts.values():
        apply(host, "postmeter.clean")
    assert before == [wiring(host) for host in lab.hosts.values()]


def cluster_pillar(lab: Lab, name: str, ca: Path) -> dict[str, object]:
    """What a node of a cluster has in its pillar beside the rest."""
    tls = "/etc/postmeter/tls"
    secrets = lab.directory / "secrets"
    return {
        "settings": {
            "node": name,
            "cluster": {
                "listen": f"{lab.hosts[name].address}:10044",
                "ca": f"{tls}/ca.pem",
                "certificate": f"{tls}/node.pem",
                "key": f"{tls}/node.key",
            },
            "etcd": {
                "endpoints": [f"https://{host.address}:2379" for host in lab.hosts.values()],
                "ca": f"{tls}/etcd-ca.pem",
                "user": "postmeter",
                "password_file": "/etc/postmeter/etcd.password",
            },
        },
        "tls": {
            "ca.pem": (ca / "ca.pem").read_text(),
            "node.pem": (ca / f"{name}.pem").read_text(),
            "node.key": (ca / f"{name}.key").read_text(),
            "etcd-ca.pem": (secrets / "etcd/ca.pem").read_text(),
        },
        "etcd_password": (secrets / "etcd-postmeter.password").read_text().strip(),
        "postfix_services": ["submission/inet"],
    }
