"""That the bench works: all servers limit, and every row has figures. Never how fast anything is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench.servers import missing

# A worker of its own: the bench is run once, and alone.
pytestmark = pytest.mark.xdist_group("bench")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a quick run of the bench wrote."""
    if missing():
        pytest.skip(f"not installed: {', '.join(missing())}; as root, tests/packages.sh installs them")
    file = tmp_path_factory.mktemp("bench") / "bench.json"
    command = [sys.executable, "-m", "tests.bench", "--quick", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads(file.read_text())
    return figures


def test_every_server_limits(figures: dict[str, Any]) -> None:
    """With 20 an hour every server refuses one user's 21st request, and the agent refuses the next one at RCPT."""
    refused_at = {shown["server"]: shown["refused_at"] for shown in figures["limits_shown"]}
    assert refused_at == {
        "postmeter": 21,
        "postmeter, looks at RCPT": 1,
        "postfwd1": 21,
        "postfwd2": 21,
        "policyd-rate-limit, disk": 21,
        "policyd-rate-limit, tmpfs": 21,
    }


def test_every_server_is_measured(figures: dict[str, Any]) -> None:
    """Each server has a row for each number of connections, in which every request was accepted."""
    rows = {(row["server"], row["transport"], row["connections"]): row["runs"] for row in figures["rows"]}
    ours = ("echo (C)", "postmeter", "postmeter, looks at RCPT")
    peers = ("postfwd1", "postfwd2", "policyd-rate-limit, disk", "policyd-rate-limit, tmpfs")
    expected = {(name, on, connections) for name in ours for on in ("inet", "unix") for connections in (1, 16)}
    expected |= {(f"{name}, same core", on, 1) for name in ours[:2] for on in ("inet", "unix")}
    expected |= {(name, "inet", connections) for name in peers for connections in (1, 16)}
    assert expected == set(rows)
    assert all(run["others"] == 0 and run["requests"] > 0 for runs in rows.values() for run in runs)


def test_meters_and_decisions_are_measured(figures: dict[str, Any]) -> None:
    """Memory is measured with one and with several slices, latency with few and many meters, and the decision alone."""
    assert [memory["slices"] for memory in figures["memory"]] == [1, 2]
    assert {"1,000 live meters", "10,000 live meters"} == {row["server"] for row in figures["live_meters"]}
    assert [1, 3] == [decisions["nodes"] for decisions in figures["decisions"] if decisions["per_second"] > 0]


def test_peers_push_what_they_should(figures: dict[str, Any]) -> None:
    """The agent has taken in some of what it was told, and all that it was asked was accepted."""
    neighbours = figures["neighbours"]
    assert all(updates > 0 for updates in neighbours["updates_per_s"])
    assert all(run["others"] == 0 for run in neighbours["idle"] + neighbours["pushed"])


def test_targets_have_figures(figures: dict[str, Any]) -> None:
    """Every target of the README is printed beside a figure; whether it is met is nothing that a test may ask."""
    assert len(figures["targets"]) == 13
