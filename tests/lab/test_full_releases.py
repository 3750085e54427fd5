"""The example playbook on other releases of Debian than the one that all other tests in the lab have."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from . import cache
from .conftest import boot
from .lab import Lab
from .mail import accepted_recipients
from .test_full_alone import ALONE

# Booting and Ansible take their time.
pytestmark = pytest.mark.timeout(1800)

OTHERS = [release for release in cache.PYTHONS if release != cache.RELEASE]


@pytest.fixture(params=OTHERS)
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """Boot one host."""
    yield from boot("mx1", release=request.param)


def test_from_bare_to_refused_and_back(lab: Lab) -> None:
    """Installed, a user over the cap is refused; the second run changes nothing; backed out, Postfix is as before."""
    host = lab.hosts["mx1"]
    before = host.run("postconf -n; postconf -M; postconf -P")
    lab.install(*ALONE)
    accepted, refusal = accepted_recipients(lab, "mx1", "user1", recipients=50, most=400)
    assert (200, 450) == (accepted, refusal.code)
    assert ["changed=0"] == re.findall(r"changed=\d+", lab.install(*ALONE))
    exposure = re.search(r"exposure level for postmeter.service: (\S+)", host.run("systemd-analyze security postmeter"))
    assert exposure is not None
    assert float(exposure[1]) <= 1.5
    lab.ansible("deploy/ansible/back-out.yml", *ALONE)
    assert before == host.run("postconf -n; postconf -M; postconf -P")
