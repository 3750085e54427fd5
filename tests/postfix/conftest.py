"""Fixtures of the tests against a real Postfix: a mail host for all of them, and agents for it.

Where hosts cannot run (not root, packages missing), every test that asks for one is skipped, and says why.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from .agent import Agent
from .mailhost import MailHost, free_ports, unavailable


class StartAgent(Protocol):
    """The type of the fixture `agent`: starts an agent with these limits, on an empty state."""

    def __call__(self, limits: str, **settings: object) -> Agent: ...


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """Make a directory that Postfix's and other daemons' users may pass through, which pytest's own is not."""
    why_not = unavailable()
    if why_not is not None:
        pytest.skip(why_not)
    directory = Path(tempfile.mkdtemp(prefix="postmeter-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def workspace(scratch: Path) -> Path:
    """Make a directory of its own for one test."""
    return Path(tempfile.mkdtemp(dir=scratch))


@pytest.fixture(scope="session")
def policy_port() -> int:
    """Choose where the host of all tests expects the agent."""
    return free_ports(1)[0]


@pytest.fixture(scope="session")
def mailhost(scratch: Path, policy_port: int) -> Iterator[MailHost]:
    """Run one Postfix for all tests that need nothing special. Its agent is down until a test starts one."""
    directory = scratch / "mailhost"
    directory.mkdir()
    with MailHost(directory, policy=f"inet:127.0.0.1:{policy_port}") as host:
        yield host


@pytest.fixture
def agent(workspace: Path, policy_port: int) -> Iterator[StartAgent]:
    """Start agents for `mailhost`, and end at the end of the test what the test has not ended."""
    started: list[Agent] = []

    def start(limits: str, **settings: object) -> Agent:
        one = Agent(workspace / "agent", limits=limits, listen=[f"inet:127.0.0.1:{policy_port}"], settings=settings)
        started.append(one.__enter__())
        return one

    yield start
    for one in started:
        one.__exit__(None, None, None)
