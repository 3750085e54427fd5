"""What is charged when: every way in which mail can stop between MAIL and the final 250."""

from __future__ import annotations

import smtplib

import pytest

from .conftest import StartAgent
from .mailhost import MailHost, SmtpClient

PER_USER = """
limits:
  per-user:
    key: sasl_username
    count: recipients
    max: {max}
    per: 1h
"""

PER_USER_MESSAGES = """
limits:
  per-user:
    key: sasl_username
    count: messages
    max: {max}
    per: 1h
"""


@pytest.mark.parametrize("charge_at", ["end-of-message", "rcpt"])
def test_vrfy_is_never_counted(mailhost: MailHost, agent: StartAgent, charge_at: str) -> None:
    """VRFY passes through the recipient restrictions, and is no mail: neither charge stage counts it."""
    agent(PER_USER.format(max=3), charge_at=charge_at)
    with mailhost.submission("alice@example.org") as alice:
        assert [252] * 10 == [alice.command("VRFY user1@local.test")[0] for _ in range(10)]
        assert [True, True, True, False] == [alice.send().accepted for _ in range(4)]
        assert 252 == alice.command("VRFY user1@local.test")[0]


def test_an_abandoned_transaction_costs_nothing(mailhost: MailHost, agent: StartAgent) -> None:
    """RSET after RCPT: recipients were looked at, and not charged."""
    agent(PER_USER.format(max=2))
    with mailhost.submission("alice@example.org") as alice:
        for _ in range(5):
            assert 250 == alice.command("MAIL FROM:<alice@example.org>")[0]
            assert 250 == alice.command("RCPT TO:<somebody@remote.test>")[0]
            assert 250 == alice.command("RSET")[0]
        assert [True, True, False] == [alice.send().accepted for _ in range(3)]


def test_a_client_that_hangs_up_in_its_message_pays_nothing(mailhost: MailHost, agent: StartAgent) -> None:
    """A connection that breaks within DATA leaves no message, and no charge."""
    agent(PER_USER.format(max=2))
    for number in range(3):
        address = f"198.51.100.{70 + number}"
        alice = mailhost.submission("alice@example.org", address)
        alice.command("MAIL FROM:<alice@example.org>")
        alice.command("RCPT TO:<somebody@remote.test>")
        assert 354 == alice.command("DATA")[0]
        alice.smtp.send("Subject: half a message\r\n")
        alice.hang_up()
        mailhost.wait_for_log(rf"lost connection after DATA \(.*\) from unknown\[{address}\]")
    with mailhost.submission("alice@example.org") as alice:
        assert [True, True, False] == [alice.send().accepted for _ in range(3)]


def test_mail_that_another_rule_refuses_at_data_costs_nothing(mailhost: MailHost, agent: StartAgent) -> None:
    """A bounce to several recipients, refused at DATA, does not reach the stage that charges."""
    agent(PER_USER.format(max=2))
    before = mailhost.parameter("smtpd_data_restrictions")
    mailhost.reconfigure(smtpd_data_restrictions=f"reject_multi_recipient_bounce, {before}")
    try:
        with mailhost.submission("alice@example.org") as alice:
            outcome = alice.send(["one@remote.test", "two@remote.test"], sender="")
            assert ("DATA", 550) == (outcome.stage, outcome.code), outcome
            assert [True, True, False] == [alice.send().accepted for _ in range(3)]
    finally:
        mailhost.reconfigure(smtpd_data_restrictions=before)


def test_mail_that_is_too_big_for_postfix_costs_nothing(mailhost: MailHost, agent: StartAgent) -> None:
    """What exceeds message_size_limit is refused by Postfix before the stage that charges."""
    agent(PER_USER.format(max=1))
    mailhost.reconfigure(message_size_limit="2000")
    try:
        with mailhost.submission("alice@example.org") as alice:
            outcome = alice.send(body="\r\n".join(["A" * 70] * 100))
            assert ("END", 552) == (outcome.stage, outcome.code), outcome
            assert [True, False] == [alice.send().accepted for _ in range(2)]
    finally:
        mailhost.reconfigure(message_size_limit="52428800")


def test_mail_that_cleanup_refuses_has_been_charged_once(mailhost: MailHost, agent: StartAgent) -> None:
    """header_checks speak after the end of data: by then the charge is made, and Postfix has no way to undo it."""
    agent(PER_USER.format(max=3))
    with mailhost.submission("alice@example.org") as alice:
        outcome = alice.send(headers={"X-Refuse": "yes"})
        assert ("END", 550) == (outcome.stage, outcome.code), outcome
        assert [True, True, False] == [alice.send().accepted for _ in range(3)]


def test_a_refused_message_costs_nothing(mailhost: MailHost, agent: StartAgent) -> None:
    """What is refused for rate is not charged: smaller mail still fits afterwards, to the last recipient."""
    agent(PER_USER.format(max=10))
    with mailhost.submission("alice@example.org") as alice:
        assert alice.send([f"r{number}@remote.test" for number in range(8)]).accepted
        for _ in range(5):
            assert alice.send([f"r{number}@remote.test" for number in range(3)]).refused_for_rate
        assert alice.send(["r1@remote.test", "r2@remote.test"]).accepted


def test_mail_in_chunks_is_charged_like_any_other(mailhost: MailHost, agent: StartAgent) -> None:
    """BDAT instead of DATA is no way around: its last chunk is the end of the message."""
    agent(PER_USER.format(max=3))
    chunk = "Subject: in chunks\r\n\r\nhello\r\n"

    def send_in_chunks(client: SmtpClient) -> int:
        client.command("RSET")
        client.command("MAIL FROM:<alice@example.org>")
        client.command("RCPT TO:<one@remote.test>")
        client.command("RCPT TO:<two@remote.test>")
        client.smtp.send(f"BDAT {len(chunk)}\r\n{chunk}")
        code, _ = client.smtp.getreply()
        if code != 250:
            return code
        client.smtp.send(f"BDAT {len(chunk)} LAST\r\n{chunk}")
        code, _ = client.smtp.getreply()
        return code

    with mailhost.submission("alice@example.org") as alice:
        assert [250, 450, 450] == [send_in_chunks(alice) for _ in range(3)]
        alice.command("RSET")
        assert [True, False] == [alice.send().accepted for _ in range(2)]


def test_all_limits_or_none_are_charged(mailhost: MailHost, agent: StartAgent) -> None:
    """A message that one limit refuses is not charged on the other: bob has his domain's last right."""
    agent(
        """
limits:
  per-user: {key: sasl_username, count: messages, max: 2, per: 1h}
  per-domain: {key: sasl_domain, count: messages, max: 3, per: 1h}
"""
    )
    with mailhost.submission("alice@example.org") as alice, mailhost.submission("bob@example.org") as bob:
        assert [True, True, False, False, False] == [alice.send().accepted for _ in range(5)]
        assert [True, False] == [bob.send().accepted for _ in range(2)]


def test_a_transaction_that_grows_after_a_refusal_pays_for_all_of_it(mailhost: MailHost, agent: StartAgent) -> None:
    """A rule after the limits refuses the first attempt; the client adds recipients and sends DATA again.

    Postfix asks under the same instance, with a larger count. Taken for a repetition, eight recipients would be free.
    (From 3.8.20, 3.9.14, 3.10.13 and 3.11.6 on, Postfix ends the transaction after a refusal at the end of data.)
    """
    agent(PER_USER.format(max=10))
    before = mailhost.parameter("smtpd_end_of_data_restrictions")
    mailhost.reconfigure(
        smtpd_end_of_data_restrictions=f"{before}, check_recipient_access regexp:{{ {{/^late@/ REJECT}} }}"
    )
    try:
        with mailhost.submission("alice@example.org") as alice:
            assert 250 == alice.command("MAIL FROM:<alice@example.org>")[0]
            assert 250 == alice.command("RCPT TO:<late@remote.test>")[0]
            assert 554 == alice.data_again().code
            code, text = alice.command("RCPT TO:<r0@remote.test>")
            if code == 503:
                pytest.skip(f"this Postfix has ended the transaction: {text}")
            for number in range(1, 8):
                assert 250 == alice.command(f"RCPT TO:<r{number}@remote.test>")[0]
            assert 250 == alice.data_again().code
            assert alice.send(["one@remote.test", "two@remote.test"]).refused_for_rate
    finally:
        mailhost.reconfigure(smtpd_end_of_data_restrictions=before)


def test_a_refused_transaction_that_goes_on_is_refused_again(mailhost: MailHost, agent: StartAgent) -> None:
    """A message of five with room for three is refused; the same client adds a recipient and tries again, and again.

    Nor may a message be smuggled behind the refusal: RCPT and DATA without MAIL, which Postfix 3.7 lets pass.
    """
    agent(PER_USER.format(max=3 + 5))
    with mailhost.submission("alice@example.org") as alice:
        assert alice.send([f"r{number}@remote.test" for number in range(5)]).accepted
        assert 250 == alice.command("MAIL FROM:<alice@example.org>")[0]
        for number in range(5):
            assert 250 == alice.command(f"RCPT TO:<r{number}@remote.test>")[0]
        assert 450 == alice.data_again().code
        for number in range(3):
            code, text = alice.command(f"RCPT TO:<more{number}@remote.test>")
            if code == 503:
                pytest.skip(f"this Postfix has ended the transaction: {text}")
            assert 250 == code
            assert alice.data_again().code in (450, 550)
        assert 250 == alice.command("RSET")[0]
        assert alice.send([f"r{number}@remote.test" for number in range(3)]).accepted


def test_a_refusal_that_hangs_up(mailhost: MailHost, agent: StartAgent) -> None:
    """`on_exceed: 421 ...` ends the session with the refusal: nothing can follow it."""
    agent(
        """
limits:
  per-user:
    key: sasl_username
    count: recipients
    max: 3
    per: 1h
    on_exceed: "421 4.7.1 too fast, {key}"
"""
    )
    alice = mailhost.submission("alice@example.org")
    assert alice.send(["one@remote.test", "two@remote.test"]).accepted
    outcome = alice.send(["one@remote.test", "two@remote.test"])
    assert ("DATA", 421, "4.7.1") == (outcome.stage, outcome.code, outcome.text[:5]), outcome
    assert "too fast, alice@example.org" in outcome.text
    with pytest.raises(smtplib.SMTPServerDisconnected):
        alice.command("DATA")
    alice.hang_up()


def test_charged_at_rcpt_the_recipient_too_many_is_refused(mailhost: MailHost, agent: StartAgent) -> None:
    """With `charge_at: rcpt` the 21st recipient is refused on its own, and the first 20 get the message."""
    agent(PER_USER.format(max=20), charge_at="rcpt")
    recipients = [f"r{number}@remote.test" for number in range(22)]
    with mailhost.submission("alice@example.org") as alice:
        outcome = alice.send(recipients)
        assert outcome.accepted, outcome
        assert recipients[20:] == list(outcome.refused)
        assert {450} == {code for code, _ in outcome.refused.values()}
        assert not alice.send().accepted


def test_charged_at_rcpt_without_a_list_at_the_end_of_data(mailhost: MailHost, agent: StartAgent) -> None:
    """`charge_at: rcpt` needs no smtpd_end_of_data_restrictions: that is what it is for."""
    agent(PER_USER.format(max=20), charge_at="rcpt")
    before = mailhost.parameter("smtpd_end_of_data_restrictions")
    mailhost.reconfigure(smtpd_end_of_data_restrictions="")
    try:
        with mailhost.submission("alice@example.org") as alice:
            assert [True] * 20 + [False] == [alice.send().accepted for _ in range(21)]
    finally:
        mailhost.reconfigure(smtpd_end_of_data_restrictions=before)


def test_charged_at_rcpt_recipients_that_postfix_refuses_cost_nothing(mailhost: MailHost, agent: StartAgent) -> None:
    """Postfix's own refusals stand ahead of the limits in the recipient restrictions: they never reach the agent."""
    agent(PER_USER.format(max=2), charge_at="rcpt")
    with mailhost.submission("alice@example.org") as alice:
        outcome = alice.send(["nobody@local.test", "refused@remote.test", "user1@local.test", "user2@local.test"])
        assert outcome.accepted, outcome
        assert ["nobody@local.test", "refused@remote.test"] == list(outcome.refused)
        assert not alice.send(["user1@local.test"]).accepted


def test_charged_at_rcpt_a_message_is_one_message(mailhost: MailHost, agent: StartAgent) -> None:
    """A limit that counts messages counts one for all recipients of a transaction, at either stage."""
    agent(PER_USER_MESSAGES.format(max=3), charge_at="rcpt")
    with mailhost.submission("alice@example.org") as alice:
        outcomes = [alice.send([f"r{number}@remote.test" for number in range(5)]) for _ in range(4)]
    assert [True, True, True, False] == [outcome.accepted for outcome in outcomes]
    assert [0, 0, 0, 5] == [len(outcome.refused) for outcome in outcomes]
