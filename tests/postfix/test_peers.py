"""Beside postgrey and policyd-weight, both as Debian packages them, in the order that the README recommends.

Limits look first, for they hold for everybody; then those whom we trust or know are let through; greylisting and
weights judge the rest, after unknown destinations were refused; and limits charge at the end of the data what is left.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from .agent import Agent
from .mailhost import MailHost, unavailable
from .peers import PolicydWeight, Postgrey, Resolver

# One host with its two daemons is enough, also where tests run in several processes.
pytestmark = pytest.mark.xdist_group("peers")

GOOD = "198.51.100.10"
BAD = "198.51.100.66"
SENDER = "somebody@good.test"
RECIPIENT = "user1@local.test"

# The mail server of good.test is where its domain says; the forger's domain and name do not exist.
NAMES = {
    ("good.test", "MX"): "mail.good.test",
    ("mail.good.test", "A"): GOOD,
}

PER_CLIENT = """
limits:
  per-client:
    key: client_address
    count: messages
    max: 2
    per: 1h
"""


@pytest.fixture(scope="module")
def postgrey(scratch: Path) -> Iterator[Postgrey]:
    """Run the greylisting for the host of this module."""
    why_not = unavailable("postgrey", "policyd-weight")
    if why_not is not None:
        pytest.skip(why_not)
    with Postgrey(scratch / "postgrey") as daemon:
        yield daemon


@pytest.fixture(scope="module")
def host(scratch: Path, postgrey: Postgrey, policy_port: int) -> Iterator[MailHost]:
    """Run a host with all three services."""
    directory = scratch / "host-with-peers"
    directory.mkdir()
    with (
        Resolver(NAMES) as resolver,
        PolicydWeight(scratch / "policyd-weight", resolver) as weights,
        MailHost(
            directory,
            policy=f"inet:127.0.0.1:{policy_port}",
            greylist=postgrey.address,
            weights=weights.address,
        ) as running,
    ):
        yield running


@pytest.fixture
def limited(host: MailHost, workspace: Path, policy_port: int) -> Iterator[MailHost]:
    """Run an agent for the host that allows two messages an hour from an address."""
    with Agent(workspace / "agent", limits=PER_CLIENT, listen=[f"inet:127.0.0.1:{policy_port}"]):
        yield host


def test_greylisting_still_defers_a_stranger_and_that_costs_nothing(limited: MailHost, postgrey: Postgrey) -> None:
    """A client's first attempts are put off by postgrey, though the limit allows them; none of them is charged."""
    with limited.stranger(GOOD, "mail.good.test") as client:
        for number in range(4):
            outcome = client.send([RECIPIENT], sender=f"first{number}@good.test")
            assert (450, True) == (outcome.code, "Greylisted" in outcome.text), outcome
        postgrey.let_time_pass(GOOD, "first@good.test", RECIPIENT)
        assert [True, True] == [client.send([RECIPIENT], sender="first@good.test").accepted for _ in range(2)]


def test_weights_still_refuse_a_forger_and_that_costs_nothing(limited: MailHost, postgrey: Postgrey) -> None:
    """What postgrey lets through, policyd-weight refuses, though the limit allows it; his address pays nothing."""
    postgrey.let_time_pass(BAD, "forger@nowhere.test", RECIPIENT)
    with limited.stranger(BAD, "dialup-1-2-3-4.nowhere.test") as client:
        for _ in range(4):
            outcome = client.send([RECIPIENT], sender="forger@nowhere.test")
            assert (550, True) == (outcome.code, "appeared to be SPAM" in outcome.text), outcome
    with limited.submission("alice@example.org", BAD) as somebody_else_there:
        assert [True, True, False] == [somebody_else_there.send().accepted for _ in range(3)]


def test_both_leave_their_mark_on_accepted_mail(limited: MailHost, postgrey: Postgrey) -> None:
    """Their PREPENDs reach the message: an agent that answered OK at RCPT would have silenced them."""
    postgrey.let_time_pass(GOOD, "marked@good.test", RECIPIENT)
    with limited.stranger(GOOD, "mail.good.test") as client:
        outcome = client.send([RECIPIENT], sender="marked@good.test")
    assert outcome.accepted, outcome
    queue_id = outcome.text.split()[-1]
    for header in ("X-Greylist: delayed", "X-policyd-weight:"):
        limited.wait_for_log(rf"{queue_id}: warning: header {re.escape(header)}")


def test_the_limit_still_stops_whom_both_let_through(limited: MailHost, postgrey: Postgrey) -> None:
    """The third message of a client whom greylisting knows and weights like is refused by the limit."""
    postgrey.let_time_pass(GOOD, SENDER, RECIPIENT)
    with limited.stranger(GOOD, "mail.good.test") as client:
        outcomes = [client.send([RECIPIENT], sender=SENDER) for _ in range(3)]
    assert [True, True, False] == [outcome.accepted for outcome in outcomes]
    assert outcomes[2].refused_for_rate, outcomes[2]
    assert "per-client" in outcomes[2].text


def test_users_who_log_in_are_limited_and_not_greylisted(limited: MailHost) -> None:
    """permit_sasl_authenticated spares them the judgement of strangers, and not the limits."""
    with limited.submission("alice@example.org", "203.0.113.5") as alice:
        outcomes = [alice.send() for _ in range(3)]
    assert [True, True, False] == [outcome.accepted for outcome in outcomes]
    assert outcomes[2].refused_for_rate, outcomes[2]


def test_nobody_is_asked_about_mail_that_we_do_not_relay(limited: MailHost, postgrey: Postgrey) -> None:
    """reject_unauth_destination comes first: a relay attempt is refused for good, and leaves no trace in postgrey."""
    with limited.stranger(BAD) as client:
        outcome = client.send(["victim@remote.test"], sender="spammer@nowhere.test")
    assert (554, True) == (outcome.code, "Relay access denied" in outcome.text), outcome
    assert "victim@remote.test" not in postgrey.log_path.read_text()
