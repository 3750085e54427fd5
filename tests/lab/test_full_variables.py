"""Wrong variables of the role: the playbook stops before anything was changed, and names the variable."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from .conftest import boot
from .lab import Lab

# Booting and Ansible take their time.
pytestmark = pytest.mark.timeout(1800)

ALONE = {"postmeter_cluster": {}, "postmeter_etcd": {}, "postmeter_etcd_tls_ca": ""}
LIMIT = {"key": "sasl_username", "max": 200, "per": "1h"}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Boot two hosts, without etcd."""
    yield from boot("mx1", "mx2")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({**ALONE, "postmeter_node": ""}, "postmeter_node: is missing"),
        ({**ALONE, "postmeter_node": "mx1"}, "postmeter_node: 'mx1' is also the node of mx2.example.com"),
        (
            {**ALONE, "postmeter_limits": {"a": {**LIMIT, "exempt": [{"client_address": {"cidr": "192.0.2.0/33"}}]}}},
            "postmeter_limits: a.exempt.client_address.cidr: '192.0.2.0/33'",
        ),
        (
            {
                **ALONE,
                "postmeter_etcd_tls_ca": "/nowhere/ca.pem",
                "postmeter_etcd": {"endpoints": ["https://etcd:2379"]},
            },
            "postmeter_etcd_tls_ca: '/nowhere/ca.pem' on the controller cannot be read",
        ),
        ({**ALONE, "postmeter_cluster": {"lissten": "192.0.2.11:10044"}}, "lissten"),
        ({**ALONE, "postmeter_cluster": {"listen": "192.0.2.11:10044"}}, "postmeter_etcd: is missing"),
        (
            {**ALONE, "postmeter_etcd": {"endpoints": ["http://192.0.2.11:2379"]}},
            "postmeter_etcd: endpoints: none of http://192.0.2.11:2379 can be reached",
        ),
        ({**ALONE, "postmeter_version": "9.9.9"}, "postmeter_version: 9.9.9 is not in"),
    ],
    ids=["no-node", "same-node", "network", "certificate", "unknown-key", "no-etcd", "etcd-away", "release"],
)
def test_wrong_variable_stops_before_anything_changes(lab: Lab, variables: dict[str, object], message: str) -> None:
    """The play fails with the variable's name, and no host has anything of Postmeter."""
    hosts = ("--limit", "mx1.example.com,mx2.example.com")
    output = lab.install(*hosts, "-e", json.dumps(variables), check=False)
    assert message in output
    assert "changed=0" in output.rpartition("PLAY RECAP")[2]
    for host in lab.hosts.values():
        there = "ls -d /opt/postmeter /etc/postmeter 2>/dev/null; getent passwd postmeter; true"
        assert "" == host.run(there)
