"""The decision alone, on one core: no sockets, no disk, three limits, a million live meters, everything allowed.

Once with the meters of a node that is alone, and once with those of one of three nodes, whose part of every `max` is
enough (rights local): these know when loans end, and which roster they go by.

Timed are `decide` on requests that were parsed just before, as an agent has them, and `parse` and `decide` together:
bytes in, action out. The requests are those of the load generator, each of another user, drawn uniformly. Every
100 ms of decisions what is not on disk is taken, its rows are listed, and it is called flushed, as the agent does; the
time for that counts.
Seconds are CPU seconds, so that what else the machine does counts less.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from postmeter.core.limits import Key, KeyPart, Limit
from postmeter.core.meters import Ledger
from postmeter.core.policy import Policy, Repeats
from postmeter.core.request import Parser
from postmeter.core.roster import Roster
from postmeter.core.shared import SharedLedger, SharedMeters, Terms

from .load import BenchError, Population
from .servers import DAY_S, HIGH, HOUR_S

BATCH = 20_000
PARSED = 200
PER_MS = 200
START_MS = 1_000_000_000
REQUEST = (
    "request=smtpd_access_policy\nprotocol_state=END-OF-MESSAGE\nprotocol_name=ESMTP\nclient_address=192.0.2.165\n"
    "client_name=client-165.access.example.net\nclient_port=10604\nreverse_client_name=client-165.access.example.net\n"
    "server_address=198.51.100.25\nserver_port=587\nhelo_name=[192.0.2.165]\nsender={user}\n"
    "recipient=rcpt0912521@mx0266.example.com\nrecipient_count=1\nqueue_id=4X15501570\ninstance=24c7.6b02f151.{serial}.0\n"
    "size=168141\netrn_domain=\nstress=\nsasl_method=PLAIN\nsasl_username={user}\nsasl_sender=\nccert_subject=\n"
    "ccert_issuer=\nccert_fingerprint=\nccert_pubkey_fingerprint=\nencryption_protocol=TLSv1.3\n"
    "encryption_cipher=TLS_AES_256_GCM_SHA384\nencryption_keysize=256\npolicy_context=submission\n\n"
)


@dataclass(frozen=True, slots=True)
class Decisions:
    """Decisions a second on one core, in a cluster of so many nodes: of parsed requests, and from the bytes on."""

    nodes: int
    meters: int
    per_second: float
    per_second_from_bytes: float


def measure_decisions(people: Population, seconds: float) -> list[Decisions]:
    """Fill a ledger by a message of every user, then decide for so many CPU seconds each way."""
    return [_measure(people, seconds, nodes) for nodes in (1, 3)]


def _measure(people: Population, seconds: float, nodes: int) -> Decisions:
    core = _Core(nodes)
    requests = _requests(people)
    while core.decided < people.users:
        core.decide(list(islice(requests, min(BATCH, people.users - core.decided))))
    rates = []
    for is_parsed in (True, False):
        decided, elapsed_s = core.decided, 0.0
        while elapsed_s < seconds:
            elapsed_s += core.decide(list(islice(requests, BATCH)), is_parsed)
        rates.append((core.decided - decided) / elapsed_s)
    return Decisions(nodes, people.meters, *rates)


class _Core:
    """The agent's core on a clock of its own: PER_MS decisions in a millisecond, whatever the machine."""

    def __init__(self, nodes: int) -> None:
        self.decided = 0
        members = tuple(f"node{number}" for number in range(nodes))
        shared = SharedLedger(Roster(members[0], {1: members}, 0, {}), Terms())
        shared.spends = True
        self._ledger = shared if nodes > 1 else Ledger()
        self._policy = Policy(_limits(), self._ledger, "end-of-message", Repeats())
        self._policy.apply_overrides(time.time())
        for meters in self._ledger.meters.values():
            if isinstance(meters, SharedMeters):
                meters.refresh(START_MS)
        self._ledger.answer_unflushed = True
        self._parser = Parser()

    def decide(self, batch: list[bytes], is_parsed: bool = False) -> float:
        """Decide a batch, parsed beforehand (PARSED at a time) or not, and flush. Returns its CPU seconds."""
        decide, parse = self._policy.decide, self._parser.parse
        now_ms = START_MS + self.decided // PER_MS
        decisions, elapsed_s = [], 0.0
        for start in range(0, len(batch), PARSED):
            some = batch[start : start + PARSED]
            parsed = [parse(data) for data in some] if is_parsed else []
            start_s = time.process_time()
            if is_parsed:
                decisions += [decide(request, now_ms) for request in parsed]
            else:
                decisions += [decide(parse(data), now_ms) for data in some]
            elapsed_s += time.process_time() - start_s
        start_s = time.process_time()
        for meters in self._ledger.meters.values():
            taken = meters.take_unflushed()
            for each in taken:
                _ = each.rows
            meters.flushed(taken)
        elapsed_s += time.process_time() - start_s
        self.decided += len(batch)
        refused = sum(decision.action != "DUNNO" for decision in decisions)
        if refused:
            raise BenchError(f"{refused} of {len(batch)} decisions were refusals")
        return elapsed_s


def _limits() -> list[Limit]:
    user, domain = Key((KeyPart("sasl_username"),)), Key((KeyPart("sasl_domain"),))
    return [
        Limit("user-hour", user, "recipients", {HOUR_S * 1_000: HIGH.user_hour}),
        Limit("user-day", user, "recipients", {DAY_S * 1_000: HIGH.user_day}),
        Limit("domain-hour", domain, "recipients", {HOUR_S * 1_000: HIGH.domain_hour}),
    ]


def _requests(people: Population) -> Iterator[bytes]:
    """Every user once, in order; then users drawn uniformly, without end."""
    draw = random.Random(1)
    serial = 0
    while True:
        number = serial if serial < people.users else draw.randrange(people.users)
        user = f"user{number:07}@dom{number % people.domains:04}.example.org"
        yield REQUEST.format(user=user, serial=f"{serial:08}").encode()
        serial += 1
