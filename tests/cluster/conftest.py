"""Fixtures of the tests of whole clusters. Where there can be none, tests that ask for one are skipped, and say why."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .network import unavailable


@pytest.fixture(scope="session")
def machines() -> None:
    """Skip where network namespaces cannot be made."""
    why_not = unavailable()
    if why_not is not None:
        pytest.skip(why_not)


@contextlib.contextmanager
def make_workspace() -> Iterator[Path]:
    """Make a directory with a short name, as paths of sockets are at most 96 bytes long, which all users may enter."""
    directory = Path(tempfile.mkdtemp(prefix="postmeter-cluster-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def workspace(machines: None) -> Iterator[Path]:
    """Make a workspace for one test."""
    with make_workspace() as directory:
        yield directory
