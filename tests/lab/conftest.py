"""Fixtures of the tests on real hosts. A lab takes both cores while Ansible works.

They take minutes, and run with POSTMETER_LAB=all (make lab-test); the linters run with all other tests.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from .lab import Lab

collect_ignore_glob = [] if os.environ.get("POSTMETER_LAB") == "all" else ["test_essential.py", "test_full_*.py"]

NEEDED = ("debootstrap", "systemd-nspawn", "nft", "ssh")


def why_not() -> str:
    """Why no host can be booted here; "" if it can."""
    if os.geteuid() != 0:
        return "only root can boot the lab's hosts"
    missing = [name for name in NEEDED if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
    return f"missing: {', '.join(missing)}; run tests/packages.sh" if missing else ""


def boot(*names: str) -> Iterator[Lab]:
    """A lab for a fixture."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with Lab(names) as lab:
        yield lab
