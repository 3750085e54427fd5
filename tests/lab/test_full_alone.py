"""A single host by the example playbook: where the release comes from, and what check mode says before and after."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from postmeter import __version__

from . import cache
from .conftest import boot
from .lab import OWN_ADDRESS, Host, Lab

# Booting and Ansible take their time.
pytestmark = pytest.mark.timeout(1800)

INSTALL = "deploy/ansible/install.yml"
# A single node with its limits in a file: no cluster, no etcd.
ALONE = (
    "--limit",
    "mx1.example.com",
    "-e",
    '{"postmeter_cluster": {}, "postmeter_etcd": {}, "postmeter_etcd_tls_ca": ""}',
)
CHECK = ("--check", "--diff")
# All that a run may change.
STATE = """
postconf -n; postconf -P; getent passwd; getent group; systemctl list-units --all --plain --no-legend postmeter*
find /etc /opt /usr/local /var/spool/postfix/private -printf '%p %m %u %l %s %T@\\n' | grep -v __pycache__ | sort
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Boot one host."""
    yield from boot("mx1")


@pytest.fixture(scope="module")
def host(lab: Lab) -> Host:
    """Take the only one, whose submission service has lists of its own."""
    host = lab.hosts["mx1"]
    host.run(
        "postconf -P submission/inet/smtpd_recipient_restrictions=permit_sasl_authenticated,reject && postfix reload"
    )
    return host


@pytest.fixture
def index(lab: Lab, tmp_path: Path) -> Iterator[str]:
    """Serve a package index to the hosts, as PyPI would be, with the wheels that the tests have."""
    for wheel in cache.wheelhouse().glob("*.whl"):
        directory = tmp_path / re.sub("[-_.]+", "-", wheel.name.partition("-")[0]).lower()
        directory.mkdir()
        shutil.copy(wheel, directory)
    server = subprocess.Popen(
        [
            *lab.entry("--net"),
            sys.executable,
            "-m",
            "http.server",
            "--bind",
            OWN_ADDRESS,
            "--directory",
            str(tmp_path),
            "80",
        ],
        stderr=subprocess.DEVNULL,
    )
    yield f"http://{OWN_ADDRESS}/"
    server.terminate()
    server.wait()


def changed(output: str) -> int:
    """How many tasks changed something, or would."""
    return int(re.findall(r"changed=(\d+)", output.rpartition("PLAY RECAP")[2])[0])


def test_check_mode_on_a_bare_host(lab: Lab, host: Host) -> None:
    """It runs to its end, shows what would be written and how Postfix would be wired, and changes nothing."""
    before = host.run(STATE)
    output = lab.install(*ALONE, *CHECK)
    assert before == host.run(STATE)
    assert changed(output) > 5
    assert "+node: mx1" in output
    assert "+    key: sasl_username" in output
    assert "+smtpd_end_of_data_restrictions = check_policy_service $postmeter" in output


@pytest.mark.parametrize("source", ["pypi", "wheel"])
def test_from_an_index(lab: Lab, host: Host, index: str, source: str) -> None:
    """By its version from an index as PyPI is one; or as a wheel, and what it needs from the index."""
    (wheel,) = cache.wheelhouse().glob("postmeter-*.whl")
    variables = {
        "postmeter_source": source,
        "postmeter_version": __version__ if source == "pypi" else "",
        "postmeter_wheel": str(wheel),
        "postmeter_pip_arguments": ["--index-url", index, "--trusted-host", OWN_ADDRESS],
    }
    lab.ansible(INSTALL, *ALONE, "--tags", "install", "-e", json.dumps(variables))
    assert f"postmeter {__version__}\n" == host.run(f"/opt/postmeter/{__version__}/bin/postmeter --version")
    host.run("rm -r /opt/postmeter")


def test_a_service_with_lists_of_its_own(lab: Lab, host: Host) -> None:
    """The role warns of it, once for each list; and wires it if it is named."""
    warning = "submission/inet/smtpd_recipient_restrictions of master.cf does not ask the agent"
    assert warning in " ".join(lab.install(*ALONE).split())
    output = lab.install(*ALONE, "-e", '{"postmeter_postfix_services": ["submission/inet"]}')
    assert warning not in " ".join(output.split())
    asked = host.run("postconf -P submission/inet/smtpd_recipient_restrictions")
    assert asked.endswith("= check_policy_service,$postmeter,permit_sasl_authenticated,reject\n")


def test_check_mode_on_an_installed_host(lab: Lab, host: Host) -> None:
    """It tells of nothing where nothing would change; and of what would, before and after."""
    before = host.run(STATE)
    assert 0 == changed(lab.install(*ALONE, *CHECK))
    output = lab.install(*ALONE, *CHECK, "-e", '{"postmeter_settings": {"on_error": "dunno"}}')
    assert before == host.run(STATE)
    assert "+on_error: dunno" in output
    assert "Restart postmeter" in output
    output = lab.ansible("deploy/ansible/back-out.yml", *ALONE, *CHECK)
    assert before == host.run(STATE)
    assert "-smtpd_end_of_data_restrictions = check_policy_service $postmeter" in output
    assert "-submission/inet/smtpd_recipient_restrictions = check_policy_service,$postmeter" in output


def test_backing_out_undoes_all(lab: Lab, host: Host) -> None:
    """Also what was done to master.cf."""
    lab.ansible("deploy/ansible/back-out.yml", *ALONE, "-e", "postmeter_purge=true")
    asked = host.run("postconf -P submission/inet/smtpd_recipient_restrictions")
    assert asked.endswith("= permit_sasl_authenticated,reject\n")
    assert "" == host.run(
        "postconf -n | grep postmeter; ls /opt/postmeter /etc/postmeter 2>/dev/null; getent passwd postmeter",
        check=False,
    )
