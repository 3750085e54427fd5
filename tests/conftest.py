"""What is random in the simulation has other seeds on every run: chosen once for all processes, and told.

POSTMETER_SEED=123 make test        the same again
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from unittest.mock import patch

import pytest

SHOWN = "shown"
"""Under this name a test records text for the end of the run: what it prints itself is lost in other processes."""


def pytest_configure() -> None:
    """Before the processes are started that run the tests."""
    os.environ.setdefault("POSTMETER_SEED", str(random.randrange(1, 1_000) * 100_000))


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What a test or the command line sets in it does not reach the processes that other tests start."""
    with patch.dict(os.environ):
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tell what tests have recorded."""
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    shown = [str(text) for report in reports for name, text in report.user_properties if name == SHOWN]
    if shown:
        terminalreporter.section(f"simulation, POSTMETER_SEED={os.environ['POSTMETER_SEED']}")
        terminalreporter.write_line("\n".join(sorted(shown)))
