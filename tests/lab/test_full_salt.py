"""The Salt formula, masterless, on bare hosts: the same results as the role's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from postmeter import __version__

from . import cache
from .conftest import why_not
from .lab import Host, Lab
from .mail import accepted_recipients

# Booting and Ansible take their time.
pytestmark = pytest.mark.timeout(1800)

FORMULA = cache.ROOT / "deploy/salt"
SALT = "salt-call --local --out=json --retcode-passthrough --log-level=error"
PILLAR = {
    "postmeter": {
        "version": __version__,
        "wheelhouse": "salt://postmeter-wheels",
        "limits": {"per-user": {"key": "sasl_username", "count": "recipients", "max": {"1h": 200}}},
        "postfix": True,
    }
}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Boot two hosts that have Salt."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with Lab(["mx1", "mx2"], [cache.salt()]) as lab:
        for host in lab.hosts.values():
            shutil.copytree(FORMULA, host.root / "srv/salt")
            shutil.copytree(cache.wheelhouse(), host.root / "srv/salt/postmeter-wheels")
            host.write("/srv/pillar/top.sls", json.dumps({"base": {"*": ["postmeter"]}}))
            host.write("/srv/pillar/postmeter.sls", json.dumps(PILLAR))
            host.run(f"{SALT} saltutil.sync_all")
        yield lab


@pytest.fixture(scope="module")
def before(lab: Lab) -> str:
    """Remember Postfix as it was."""
    return lab.hosts["mx1"].run("postconf -n")


def apply(host: Host, state: str) -> dict[str, Any]:
    """Apply a state, and return those of its parts that changed something."""
    parts: dict[str, Any] = json.loads(host.run(f"{SALT} state.apply {state} 2>/dev/null"))["local"]
    return {name: part["changes"] for name, part in parts.items() if part["changes"]}


def test_from_bare_to_refused(lab: Lab, before: str) -> None:
    """One state, and a user over the cap is refused."""
    for name, host in lab.hosts.items():
        apply(host, "postmeter")
        accepted, refusal = accepted_recipients(lab, name, "user1", recipients=50, most=400)
        assert (200, 450) == (accepted, refusal.code)


def test_second_run_changes_nothing(lab: Lab) -> None:
    """The same state once more finds everything as it should be."""
    assert {} == apply(lab.hosts["mx1"], "postmeter")


def test_clean_leaves_postfix_as_it_was(lab: Lab, before: str) -> None:
    """After postmeter.clean Postfix has the settings of before, and nothing of Postmeter runs."""
    mx1 = lab.hosts["mx1"]
    apply(mx1, "postmeter.clean")
    assert before == mx1.run("postconf -n")
    assert "" == mx1.run("ls -d /opt/postmeter /etc/postmeter /etc/systemd/system/postmeter.* 2>/dev/null || true")
    assert 250 == accepted_recipients(lab, "mx1", "user1", recipients=50, most=400)[1].code
