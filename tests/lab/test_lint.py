"""The linters of Ansible and Salt find nothing in what is for operators."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from . import cache

# Booting and Ansible take their time.
pytestmark = pytest.mark.timeout(1800)

ANSIBLE = cache.ROOT / "deploy/ansible"
STATES = sorted((cache.ROOT / "deploy/salt").rglob("*.sls"))


def lint(home: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a linter as it is for operators, without a network."""
    environment = {"PATH": f"{cache.tools()}:{os.environ['PATH']}", "HOME": str(home), "LC_ALL": "C.UTF-8"}
    environment |= {"ANSIBLE_CONFIG": str(ANSIBLE / "ansible.cfg"), "ANSIBLE_HOME": str(home)}
    return subprocess.run(
        list(map(str, command)), cwd=cache.ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="the linters are kept in a place of root's")
def test_ansible_lint_finds_nothing(tmp_path: Path) -> None:
    """In the profile that is for production."""
    done = lint(
        tmp_path, "ansible-lint", "--offline", "--nocolor", "--profile", "production", ANSIBLE, "roles/postmeter"
    )
    assert 0 == done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="the linters are kept in a place of root's")
def test_salt_lint_finds_nothing(tmp_path: Path) -> None:
    """In all states of the formula."""
    assert len(STATES) > 10
    done = lint(tmp_path, "salt-lint", *STATES)
    assert 0 == done.returncode, done.stdout + done.stderr
