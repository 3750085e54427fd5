"""How roles/postmeter/module_utils/postmeter_wiring.py wires a real main.cf and master.cf to the agent, and back."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

from .conftest import StartAgent
from .mailhost import run

WIRING = Path(__file__).parents[2] / "roles/postmeter/module_utils/postmeter_wiring.py"
SERVICE = "{ unix:private/postmeter, timeout=10s }"
LIMITS = "limits: {per-user: {key: sasl_username, count: messages, max: 3, per: 1h}}"

MAIN_CF = """\
# A comment that nothing may lose.
compatibility_level = 3.6
queue_directory = {directory}/queue
data_directory = {directory}/data
smtpd_recipient_restrictions =
    reject_unlisted_recipient, check_client_access inline:{{ x = permit }},
    permit_mynetworks,
    permit_sasl_authenticated
smtpd_data_restrictions = reject_unauth_pipelining
"""
MASTER_CF = """\
smtp       inet n - y - - smtpd
submission inet n - y - - smtpd
    -o smtpd_recipient_restrictions=$mua_restrictions
    -o {smtpd_end_of_data_restrictions = permit_mynetworks, reject}
# From the content filter.
10025      inet n - y - - smtpd -o smtpd_end_of_data_restrictions=
"""


@pytest.fixture
def wiring() -> ModuleType:
    """Load the module as Ansible and Salt do: from its file."""
    spec = importlib.util.spec_from_file_location("postmeter_wiring", WIRING)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a configuration of Postfix that asks nobody, and let Postfix's commands use it."""
    directory = workspace / "etc"
    for name in (directory, workspace / "queue", workspace / "data"):
        name.mkdir()
    (directory / "main.cf").write_text(MAIN_CF.format(directory=workspace))
    (directory / "master.cf").write_text(MASTER_CF)
    monkeypatch.setenv("MAIL_CONFIG", str(directory))
    return directory


@pytest.fixture
def probe(agent: StartAgent, policy_port: int) -> str:
    """Start an agent that can be asked before Postfix is told to."""
    agent(LIMITS)
    return f"127.0.0.1:{policy_port}"


def files(config: Path) -> dict[str, str]:
    """Read all that lies in the configuration."""
    return {name: (config / name).read_text() for name in sorted(os.listdir(config))}


def value(name: str) -> str:
    """Ask postconf for a parameter of main.cf, or of a service."""
    return run("postconf", "-P" if "/" in name else "-n", name).partition("=")[2].strip()


def test_wired_and_back(wiring: ModuleType, config: Path, probe: str) -> None:
    """Postfix asks ahead of the first permit, and first in the other lists; undone, every byte is as before."""
    before, record = files(config), str(config / "record")
    assert wiring.apply(record, SERVICE, probe, [], test=True)
    assert before == files(config)
    assert wiring.apply(record, SERVICE, probe, [], test=False)
    ahead, behind = value("smtpd_recipient_restrictions").split(", check_policy_service $postmeter, ")
    assert "reject_unlisted_recipient, check_client_access inline:{ x = permit }" == ahead
    assert "permit_mynetworks, permit_sasl_authenticated" == behind
    assert "check_policy_service $postmeter, reject_unauth_pipelining" == value("smtpd_data_restrictions")
    assert "check_policy_service $postmeter" == value("smtpd_end_of_data_restrictions")
    assert before["master.cf"] == files(config)["master.cf"]
    assert {} == wiring.apply(record, SERVICE, probe, [], test=False)
    wiring.apply(record, None, None, [], test=False)
    assert before == files(config)
    assert {} == wiring.apply(record, None, None, [], test=False)


def test_services_with_lists_of_their_own(wiring: ModuleType, config: Path, probe: str) -> None:
    """They are warned of; those that are named ask, too, the others are left alone; undone, all is as before."""
    before, record = files(config), str(config / "record")
    lists = [
        "10025/inet/smtpd_end_of_data_restrictions",
        "submission/inet/smtpd_end_of_data_restrictions",
        "submission/inet/smtpd_recipient_restrictions",
    ]
    assert lists == sorted(warning.split()[0] for warning in wiring.warnings([]))
    assert ["10025/inet/smtpd_end_of_data_restrictions"] == [
        warning.split()[0] for warning in wiring.warnings(["submission/inet"])
    ]
    wiring.apply(record, SERVICE, probe, ["submission/inet"], test=False)
    own = [value(name) for name in lists]
    assert own == [
        "",
        "check_policy_service,$postmeter,permit_mynetworks,reject",
        "check_policy_service,$postmeter,$mua_restrictions",
    ]
    assert {} == wiring.apply(record, SERVICE, probe, ["submission/inet"], test=False)
    assert ["10025/inet/smtpd_end_of_data_restrictions"] == [warning.split()[0] for warning in wiring.warnings([])]
    wiring.apply(record, None, None, [], test=False)
    assert before == files(config)


def test_what_was_changed_meanwhile_stays(wiring: ModuleType, config: Path, probe: str) -> None:
    """Whoever changed main.cf or master.cf since keeps that, and $postmeter, which is unknown then, is nowhere left."""
    record = str(config / "record")
    wiring.apply(record, SERVICE, probe, [], test=False)
    run("postconf", "-e", "message_size_limit = 12345")
    run("postconf", "-P", "10025/inet/smtpd_end_of_data_restrictions=check_policy_service,$postmeter,reject")
    # A second change by the role does not make the operator's its own.
    other = SERVICE.replace("10s", "11s")
    wiring.apply(record, other, probe, ["submission/inet"], test=False)
    wiring.apply(record, None, None, [], test=False)
    assert "12345" == value("message_size_limit")
    assert "reject" == value("10025/inet/smtpd_end_of_data_restrictions")
    assert "$mua_restrictions" == value("submission/inet/smtpd_recipient_restrictions")
    assert "reject_unauth_pipelining" == value("smtpd_data_restrictions")
    assert "$postmeter" not in "".join(files(config).values())
    assert "" == value("postmeter")
    assert ["main.cf", "master.cf"] == sorted(os.listdir(config))


def test_nothing_is_changed_that_would_not_work(wiring: ModuleType, config: Path, probe: str) -> None:
    """No agent, no such service, and what Postfix itself refuses: main.cf and master.cf stay as they are."""
    before, record = files(config), str(config / "record")
    with pytest.raises(wiring.WiringError, match="the agent does not answer"):
        wiring.apply(record, SERVICE, "127.0.0.1:1", [], test=False)
    with pytest.raises(wiring.WiringError, match=r"there is no submision/inet in master\.cf"):
        wiring.apply(record, SERVICE, probe, ["submision/inet"], test=False)
    (config / "main.cf").write_text(before["main.cf"] + "queue_directory = /nowhere/at-all\n")
    before = files(config)
    with pytest.raises(wiring.WiringError, match="are as before"):
        wiring.apply(record, SERVICE, probe, [], test=False)
    assert {**before, **{f"{name}.before-postmeter": before[name] for name in before}} == files(config)


def test_when_the_record_was_lost_nobody_is_asked_in_the_end(wiring: ModuleType, config: Path, probe: str) -> None:
    """As on a host that is installed again with the main.cf of before: applied once more, and undone."""
    parameters, record = run("postconf", "-n"), config / "record"
    wiring.apply(str(record), SERVICE, probe, [], test=False)
    record.unlink()
    assert wiring.apply(str(record), SERVICE, probe, [], test=False)
    assert {} == wiring.apply(str(record), SERVICE, probe, [], test=False)
    wiring.apply(str(record), None, None, [], test=False)
    assert parameters == run("postconf", "-n")
    assert ["main.cf", "master.cf"] == sorted(os.listdir(config))
