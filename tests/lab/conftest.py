"""Fixtures of the tests on real hosts. A lab takes both cores while Ansible works.

Those called test_full_... take minutes each, and run with POSTMETER_LAB=all (make lab-test); the others run always.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from .cache import RELEASE, LabError, run
from .lab import Lab

collect_ignore_glob = [] if os.environ.get("POSTMETER_LAB") == "all" else ["test_full_*.py"]

NEEDED = ("debootstrap", "systemd-nspawn", "nft", "ssh")


def why_not() -> str:
    """Why no host can be booted here; "" if it can."""
    if os.geteuid() != 0:
        return "only root can boot the lab's hosts"
    missing = [name for name in NEEDED if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
    if missing:
        return f"missing: {', '.join(missing)}; run tests/packages.sh"
    try:
        run("unshare", "--mount", "--net", "--pid", "--fork", "mount", "-t", "cgroup2", "cgroup2", "/mnt")
    except LabError as error:
        return f"this machine has no namespaces or control groups for the lab's hosts: {error}"
    return ""


def boot(*names: str, layers: Sequence[Path] = (), release: str = RELEASE) -> Iterator[Lab]:
    """A lab for a fixture."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with Lab(names, layers, release) as lab:
        yield lab
