"""How Postfix is connected to the agent: sockets, what happens while the agent is away, and the lines of the README."""

from __future__ import annotations

import grp
import pwd
import socket
import stat
from pathlib import Path

from .agent import Agent
from .conftest import StartAgent
from .mailhost import WIRING, MailHost, run

REPOSITORY = Path(__file__).parents[2]

PER_USER = """
limits:
  per-user:
    key: sasl_username
    count: messages
    max: 3
    per: 1h
"""


def test_readme_recommends_what_is_tested() -> None:
    """Every line of wiring.cf, with which all hosts of these tests run, stands in the README as it is."""
    readme = [line.strip() for line in (REPOSITORY / "README.md").read_text().splitlines()]
    missing = [line for line in WIRING.read_text().splitlines() if line.strip() and line.strip() not in readme]
    assert [] == missing


def test_postfix_has_nothing_to_say_about_the_wiring(mailhost: MailHost) -> None:
    """Neither an unused parameter nor a misplaced restriction: postconf and the daemons are silent."""
    output = run("postconf", "-c", mailhost.directory / "etc", "-n")
    assert "warning" not in output, output
    with mailhost.stranger() as client:
        client.send(["nobody@local.test"])
    complaints = [line for line in mailhost.log().splitlines() if "smtpd" in line and "restriction" in line]
    assert [] == complaints


def test_unix_socket_in_the_private_directory(workspace: Path) -> None:
    """A chrooted smtpd asks unix:private/postmeter, which belongs to Postfix, and to nobody else."""
    with MailHost(workspace, policy="unix:private/postmeter") as host:
        path = host.private / "postmeter"
        listener = {"unix": str(path), "owner": "postfix", "group": "postfix", "mode": "0660"}
        with Agent(workspace / "agent", limits=PER_USER, listen=[listener]):
            status = path.stat()
            assert stat.S_ISSOCK(status.st_mode)
            assert "660" == f"{stat.S_IMODE(status.st_mode):o}"
            assert "postfix" == pwd.getpwuid(status.st_uid).pw_name
            assert "postfix" == grp.getgrgid(status.st_gid).gr_name
            with host.submission("alice@example.org") as alice:
                assert [True, True, True, False] == [alice.send().accepted for _ in range(4)]


def test_unix_socket_left_by_a_crash_is_taken_over(workspace: Path) -> None:
    """After kill -9 the socket's file is still there: the next run listens all the same, and Postfix finds it."""
    with MailHost(workspace, policy="unix:private/postmeter") as host:
        listener = {"unix": str(host.private / "postmeter"), "owner": "postfix", "group": "postfix", "mode": "0660"}
        agent = Agent(workspace / "agent", limits=PER_USER, listen=[listener])
        agent.start()
        agent.kill()
        with agent, host.submission("alice@example.org") as alice:
            assert alice.send().accepted


def test_both_lists_share_one_connection(mailhost: MailHost, agent: StartAgent, policy_port: int) -> None:
    """The same text in both restriction lists: an smtpd needs one connection to the agent, not two."""
    one = agent(PER_USER)
    with mailhost.submission("alice@example.org") as alice:
        assert alice.send().accepted
        assert 1 == established_connections(policy_port)
    one.stop()


def test_other_limits_hold_for_connections_that_are_open(mailhost: MailHost, agent: StartAgent) -> None:
    """SIGHUP reads the limits again: the session goes on, what was used stays used, and nothing is deferred."""
    one = agent(PER_USER)
    with mailhost.submission("alice@example.org") as alice:
        assert [True, True, True, False] == [alice.send().accepted for _ in range(4)]
        more = (
            PER_USER.replace("max: 3", "max: 5")
            + "  per-client: {key: client_address, count: messages, max: 99, per: 1h}"
        )
        one.reload(more)
        one.wait_for_log("per-client")
        outcomes = [alice.send() for _ in range(3)]
    assert [250, 250, 450] == [outcome.code for outcome in outcomes]


def test_without_an_agent_mail_is_deferred(mailhost: MailHost, policy_port: int) -> None:
    """Nobody listens: Postfix tries twice, one second apart, and answers 451 4.3.5, which clients try again."""
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", policy_port)) != 0, "an agent runs"
    with mailhost.submission("alice@example.org") as alice:
        outcome = alice.send()
    assert (451, "4.3.5") == (outcome.code, outcome.text[:5]), outcome


def test_without_an_agent_mail_may_pass(mailhost: MailHost) -> None:
    """With default_action=DUNNO, Postfix goes on without limits while the agent is down."""
    before = mailhost.parameter("postmeter")
    assert before.endswith(" }"), before
    mailhost.reconfigure(postmeter=before.removesuffix(" }") + ", default_action=DUNNO }")
    try:
        with mailhost.submission("alice@example.org") as alice:
            outcome = alice.send()
        assert outcome.accepted, outcome
    finally:
        mailhost.reconfigure(postmeter=before)


def established_connections(port: int) -> int:
    """Count the connections that end at this port of 127.0.0.1, as the kernel lists them."""
    local = f"0100007F:{port:04X}"
    established = "01"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[1] == local and row[3] == established for row in rows)
