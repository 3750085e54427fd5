"""Mail into the lab: real SMTP clients that log in, and note what they were told and how long it took.

outcome = send(lab, "mx1", "user1", recipients=50)
with Traffic(lab, ["user2", "user3"]) as traffic: ...      # constant mail to all hosts meanwhile
traffic.refused(), traffic.slowest_s()
"""

from __future__ import annotations

import itertools
import smtplib
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from .lab import DOMAIN, Lab

# Between two messages of one client.
PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class Outcome:
    """One message: what Postfix said at last, and how long it all took."""

    host: str
    user: str
    code: int
    text: str
    seconds: float

    @property
    def accepted(self) -> bool:
        """Whether Postfix took it."""
        return self.code == 250


def send(lab: Lab, host: str, user: str, recipients: int = 1) -> Outcome:
    """Send one message. What goes wrong on the way is an outcome, too, with the code 0."""
    start = time.monotonic()
    addresses = [f"somebody{number}@example.net" for number in range(recipients)]
    try:
        with lab.smtp(host, user) as client:
            client.sendmail(f"{user}@{DOMAIN}", addresses, "Subject: hello\r\n\r\nHello\r\n")
        code, text = 250, ""
    except smtplib.SMTPRecipientsRefused as error:
        code, said = next(iter(error.recipients.values()))
        text = said.decode()
    except smtplib.SMTPResponseException as error:
        code, text = error.smtp_code, str(error.smtp_error)
    except (OSError, smtplib.SMTPException) as error:
        code, text = 0, f"{type(error).__name__}: {error}"
    return Outcome(host, user, code, text, time.monotonic() - start)


def accepted_recipients(lab: Lab, host: str, user: str, recipients: int, most: int) -> tuple[int, Outcome]:
    """How many recipients a user gets through a host before a refusal, or up to `most`; and the last outcome."""
    total = 0
    while True:
        outcome = send(lab, host, user, recipients)
        if not outcome.accepted or total + recipients > most:
            return total + recipients * outcome.accepted, outcome
        total += recipients


class Traffic:
    """Constant mail to all hosts, one client each, from these users in turn."""

    def __init__(self, lab: Lab, users: Sequence[str], hosts: Iterable[str] = ()) -> None:
        self._lab = lab
        self._users = users
        self._stopping = threading.Event()
        self.outcomes: list[Outcome] = []
        names = list(hosts) or list(lab.hosts)
        self._threads = [threading.Thread(target=self._client, args=(name,)) for name in names]

    def _client(self, host: str) -> None:
        for user in itertools.cycle(self._users):
            self.outcomes.append(send(self._lab, host, user))
            if self._stopping.wait(PAUSE_S):
                return

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def refused(self) -> list[Outcome]:
        """What was not taken."""
        return [outcome for outcome in self.outcomes if not outcome.accepted]

    def slowest_s(self) -> float:
        """How long the slowest message took."""
        return max(outcome.seconds for outcome in self.outcomes)
