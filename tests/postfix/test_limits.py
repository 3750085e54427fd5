"""Limits as senders meet them: a real Postfix 3.7, real SASL logins, a real SMTP client."""

from __future__ import annotations

import re

from .conftest import StartAgent
from .mailhost import MailHost, Outcome, SmtpClient

PER_USER = """
limits:
  per-user:
    key: sasl_username
    count: messages
    max: 20
    per: 1h
"""

PER_USER_RECIPIENTS = """
limits:
  per-user:
    key: sasl_username
    count: recipients
    max: {max}
    per: 1h
"""

PER_DOMAIN = """
limits:
  per-domain:
    key: sasl_domain
    count: messages
    max: 6
    per: 1h
"""

PER_USER_BYTES = """
limits:
  volume:
    key: sasl_username
    count: bytes
    max: 1MB
    per: 1h
"""

SHADOW = """
limits:
  rehearsal:
    key: sasl_username
    count: messages
    max: 2
    per: 1h
    shadow: true
"""

PER_CLIENT = """
limits:
  per-client:
    key: client_address
    count: messages
    max: 3
    per: 1h
"""

ATTACHMENT_LINE = "A" * 76


def remote(count: int) -> list[str]:
    """Make up that many recipients elsewhere."""
    return [f"reader{number}@remote.test" for number in range(count)]


def attachment(size_bytes: int) -> str:
    """Make a body of about this size, in lines as base64 makes them."""
    return "\r\n".join([ATTACHMENT_LINE] * (size_bytes // (len(ATTACHMENT_LINE) + 2)))


def send_many(client: SmtpClient, count: int) -> list[bool]:
    """Send that many messages of one recipient, and return which were accepted."""
    return [client.send().accepted for _ in range(count)]


def is_told_when(outcome: Outcome) -> bool:
    """Whether a refusal is the temporary one, and says when to try again."""
    return outcome.refused_for_rate and re.search(r"try again in \d+ ?[a-z]+", outcome.text) is not None


def test_message_20_is_accepted_and_21_is_told_when_to_try_again(mailhost: MailHost, agent: StartAgent) -> None:
    """With `max: 20, per: 1h` the 20th message is accepted, and the 21st refused with a 450 4.7.1 that says when."""
    agent(PER_USER)
    with mailhost.submission("alice@example.org") as alice:
        assert [True] * 20 == send_many(alice, 20)
        outcome = alice.send()
    assert is_told_when(outcome), outcome
    for told in ("per-user", "alice@example.org", "20 of 20"):
        assert told in outcome.text


def test_another_user_is_not_affected(mailhost: MailHost, agent: StartAgent) -> None:
    """While one user is over the limit, another of the same domain and address sends."""
    agent(PER_USER)
    with mailhost.submission("alice@example.org") as alice, mailhost.submission("bob@example.org") as bob:
        assert [True] * 20 + [False] == send_many(alice, 21)
        assert [True] * 20 + [False] == send_many(bob, 21)
        assert not alice.send().accepted


def test_a_new_connection_does_not_start_a_new_count(mailhost: MailHost, agent: StartAgent) -> None:
    """The count is the user's, not the connection's, and not the address's from which he connects."""
    agent(PER_USER)
    accepted = 0
    for number in range(21):
        with mailhost.submission("alice@example.org", f"198.51.100.{number + 1}") as alice:
            accepted += alice.send().accepted
    assert 20 == accepted


def test_every_spelling_of_a_user_is_one_user(mailhost: MailHost, agent: StartAgent) -> None:
    """An auth backend that takes ALICE@Example.ORG for alice@example.org gives her no second quota."""
    agent(PER_USER)
    with mailhost.submission("alice@example.org") as alice, mailhost.submission("ALICE@Example.ORG") as shouting:
        assert [True] * 10 == send_many(alice, 10)
        assert [True] * 10 + [False] == send_many(shouting, 11)
    mailhost.wait_for_log("sasl_username=ALICE@Example.ORG")


def test_a_limit_on_the_domain_stops_its_third_user(mailhost: MailHost, agent: StartAgent) -> None:
    """Two users use up what their domain may send: the third is stopped at once, a user of another domain is not."""
    agent(PER_DOMAIN)
    for user in ("alice@example.org", "bob@example.org"):
        with mailhost.submission(user) as client:
            assert [True] * 3 == send_many(client, 3)
    with mailhost.submission("carol@example.org") as carol:
        outcome = carol.send()
    assert is_told_when(outcome), outcome
    with mailhost.submission("dave@example.net") as dave:
        assert dave.send().accepted


def test_a_message_to_50_recipients_costs_50(mailhost: MailHost, agent: StartAgent) -> None:
    """Of 60 recipients an hour, a message to 50 leaves 10: one to 11 is refused whole, one to 10 is accepted."""
    agent(PER_USER_RECIPIENTS.format(max=60))
    with mailhost.submission("alice@example.org") as alice:
        assert alice.send(remote(50)).accepted
        assert is_told_when(alice.send(remote(11)))
        assert alice.send(remote(10)).accepted
        assert not alice.send(remote(1)).accepted


def test_recipients_that_postfix_refuses_cost_nothing(mailhost: MailHost, agent: StartAgent) -> None:
    """A message to three of whom Postfix knows one, and a policy of Postfix refuses another, costs one."""
    agent(PER_USER_RECIPIENTS.format(max=3))
    recipients = ["user1@local.test", "nobody@local.test", "refused@remote.test"]
    with mailhost.submission("alice@example.org") as alice:
        for _ in range(3):
            outcome = alice.send(recipients)
            assert outcome.accepted, outcome
            assert {"nobody@local.test": 550, "refused@remote.test": 554} == {
                recipient: code for recipient, (code, _) in outcome.refused.items()
            }
        assert not alice.send(["user1@local.test"]).accepted


def test_messages_whose_recipients_are_all_refused_cost_nothing(mailhost: MailHost, agent: StartAgent) -> None:
    """Guessing addresses brings no message into being, and costs none."""
    agent(PER_USER_RECIPIENTS.format(max=1))
    with mailhost.submission("alice@example.org") as alice:
        for number in range(5):
            assert 550 == alice.send([f"guess{number}@local.test"]).code
        assert alice.send(["user1@local.test"]).accepted


def test_a_byte_limit_stops_the_second_big_attachment(mailhost: MailHost, agent: StartAgent) -> None:
    """Of 1 MB an hour, an attachment of 600 kB leaves room for letters, not for another such attachment."""
    agent(PER_USER_BYTES)
    with mailhost.submission("alice@example.org") as alice:
        assert alice.send(body=attachment(600_000)).accepted
        outcome = alice.send(body=attachment(600_000))
        assert is_told_when(outcome), outcome
        assert alice.send(body="a letter").accepted


def test_an_attachment_that_never_fits_is_refused_for_good(mailhost: MailHost, agent: StartAgent) -> None:
    """More bytes than the limit itself: trying again would not help, so the client is not told to."""
    agent(PER_USER_BYTES)
    with mailhost.submission("alice@example.org") as alice:
        outcome = alice.send(body=attachment(1_100_000))
        assert (550, "5.7.1") == (outcome.code, outcome.text[:5]), outcome
        assert alice.send(body="a letter").accepted


def test_a_message_to_more_than_max_is_refused_for_good(mailhost: MailHost, agent: StartAgent) -> None:
    """11 recipients never fit a limit of 10: 550 5.7.1, and nothing is charged."""
    agent(PER_USER_RECIPIENTS.format(max=10))
    with mailhost.submission("alice@example.org") as alice:
        outcome = alice.send(remote(11))
        assert (550, "5.7.1") == (outcome.code, outcome.text[:5]), outcome
        assert alice.send(remote(10)).accepted


def test_shadow_changes_nothing_but_is_logged(mailhost: MailHost, agent: StartAgent) -> None:
    """Over a limit in rehearsal everything is accepted, and the log says what would have been refused."""
    one = agent(SHADOW)
    with mailhost.submission("alice@example.org") as alice:
        assert [True] * 5 == send_many(alice, 5)
    line = one.wait_for_log(r"alice@example\.org")
    assert "rehearsal" in line
    assert "would refuse" in line


def test_ipv6_clients_share_a_64(mailhost: MailHost, agent: StartAgent) -> None:
    """Addresses of one /64 are one client, however many the client makes up; another /64 is another."""
    agent(PER_CLIENT)

    def deliver(address: str) -> bool:
        with mailhost.stranger(address) as client:
            return client.send(["user1@local.test"]).accepted

    assert [True] * 3 + [False] == [deliver(f"2001:db8:0:1::{number:x}") for number in range(1, 5)]
    assert not deliver("2001:db8:0:1:ffff:ffff:ffff:ffff")
    assert deliver("2001:db8:0:2::1")


def test_ipv4_clients_are_one_each(mailhost: MailHost, agent: StartAgent) -> None:
    """An IPv4 address is a client of its own."""
    agent(PER_CLIENT)
    with mailhost.stranger("198.51.100.1") as first, mailhost.stranger("198.51.100.2") as second:
        deliveries = [first.send(["user1@local.test"]).accepted for _ in range(4)]
        assert [True, True, True, False] == deliveries
        assert second.send(["user1@local.test"]).accepted


def test_trusted_networks_are_limited_as_well(mailhost: MailHost, agent: StartAgent) -> None:
    """The limits stand ahead of permit_mynetworks: what a host of ours sends counts."""
    agent(PER_CLIENT)
    with mailhost.stranger("192.0.2.241") as ours:
        assert [True, True, True, False] == send_many(ours, 4)
