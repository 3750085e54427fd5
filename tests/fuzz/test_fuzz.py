"""A real agent under 100,000 hostile requests: it answers each as it must, stays as large as it is, and lives.

FUZZ_SEED=7         the seed, as a run has printed it, to have the same requests again
FUZZ_REQUESTS=10000000      how many
"""

from __future__ import annotations

import os
import random
import re
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.fuzz.requests import CORPUS, Fuzzer, Outcome, expect
from tests.postfix.agent import Agent
from tests.unit.support import message

REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "100000"))
CONNECTIONS = 8
BATCH_REQUESTS_MAX = 12
PATIENCE_S = 30.0
# What the agent keeps of a request for longer than a few seconds is the mark of its instance: 100 bytes or two.
GROWTH_KB_MAX = 8_000
WARM_UP_PART = 0.3

# Windows as short as they can be: who was invented a few seconds ago is forgotten.
LIMITS = """
limits:
  per-user: {key: sasl_username, count: recipients, max: {1s: 400, 2s: 600}, overrides: {"(overflow)": blocked}}
  per-domain: {key: sasl_domain, count: recipients, max: 1000, per: 1s, text: "{key} {used}/{max} {wait}"}
  per-network: {key: {client_address: {ipv4: 24, ipv6: 48}}, count: messages, max: 20000, per: 2s, shadow: true}
  per-pair: {key: [sender, recipient_domain], count: messages, max: 400, per: 2s, on_exceed: "421 4.7.0 {key}"}
  bytes: {key: sender_domain, count: bytes, max: 1GB, per: 1s, on_exceed: hold, match: {size: {regex: "^[0-9]+$"}}}
  others:
    key: helo_name
    count: messages
    max: 1000
    per: 1s
    match: {sender: {not: {glob: "u*"}}, client_address: {not: {cidr: ["192.0.2.0/24", "2001:db8::/32"]}}}
    exempt: [client.example.com, {sasl_username: ["alice@example.com", "(overflow)"]}]
    on_exceed: reject
"""
REPLY = re.compile("action=(?:DUNNO|HOLD .+|421 4\\.7\\.0 .+|450 4\\.7\\.1 .+|550 5\\.7\\.1 .+)")


class Client:
    """A connection that checks what it is told."""

    def __init__(self, address: str | tuple[str, int], choice: random.Random) -> None:
        self._address = address
        self._choice = choice
        self.closed = 0
        self._connect()

    def _connect(self) -> None:
        self._wire = socket.socket(socket.AF_UNIX if isinstance(self._address, str) else socket.AF_INET)
        self._wire.settimeout(PATIENCE_S)
        self._wire.connect(self._address)

    def send(self, data: bytes) -> None:
        """In one piece, or in many; the agent may have hung up before the last."""
        piece = len(data) if self._choice.random() < 0.9 else self._choice.randrange(1, 2000)
        try:
            for start in range(0, len(data), piece):
                self._wire.sendall(data[start : start + piece])
        except ConnectionError:
            pass

    def check(self, outcomes: list[Outcome], data: bytes) -> None:
        """Wait for what must follow; connect again if that is the end."""
        received = b""
        while received.count(b"\n\n") < len(outcomes) and (more := self._receive()):
            received += more
        replies = received.split(b"\n\n")
        assert b"" == replies.pop(), f"more than whole replies: {received!r} to {data!r}"
        for reply in replies:
            text = reply.decode()
            assert REPLY.fullmatch(text), f"no reply of a policy service: {text!r} to {data!r}"
            assert text.isprintable(), f"not printable: {text!r} to {data!r}"
        closed = len(replies) < len(outcomes)
        possible = {
            Outcome.REPLY: [(len(outcomes), False)],
            Outcome.CLOSE: [(len(outcomes) - 1, True)],
            Outcome.EITHER: [(len(outcomes), False), (len(outcomes) - 1, True)],
        }
        assert (len(replies), closed) in possible[outcomes[-1]], f"{len(replies)} replies to {data!r}: {outcomes}"
        if closed:
            self.closed += 1
            self._wire.close()
            self._connect()

    def _receive(self) -> bytes:
        try:
            return self._wire.recv(65_536)
        except ConnectionResetError:
            return b""

    def end(self) -> None:
        """Hang up; nothing may come any more."""
        self._wire.shutdown(socket.SHUT_WR)
        assert b"" == self._receive()
        self._wire.close()


def resident_kb(pid: int) -> int:
    """The memory that a process has."""
    [size] = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(size)


@pytest.fixture
def directory() -> Iterator[Path]:
    """In memory if there is such a place: how fast the disk is does not matter here."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="postmeter-", dir=memory) as made:
        yield Path(made)


def test_hostile_requests(directory: Path) -> None:
    """Whatever is sent: one valid reply to what Postfix might send, none to anything else; no crash, no growth."""
    seed = int(os.environ.get("FUZZ_SEED") or random.SystemRandom().randrange(10**6))
    print(f"FUZZ_SEED={seed} FUZZ_REQUESTS={REQUESTS}")
    fuzzer, path = Fuzzer(seed), str(directory / "policy.sock")
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    agent = Agent(directory / "agent", limits=LIMITS, listen=[f"unix:{path}", f"inet:127.0.0.1:{port}"])
    with agent:
        choice = random.Random(seed)
        clients = [Client(path if number % 4 else ("127.0.0.1", port), choice) for number in range(CONNECTIONS)]
        sent, warm_kb, began_s = 0, 0, time.monotonic()
        while sent < REQUESTS:
            batches = [fuzzer.batch(BATCH_REQUESTS_MAX) for _ in clients]
            for client, (_, data) in zip(clients, batches, strict=True):
                client.send(data)
            for client, (outcomes, data) in zip(clients, batches, strict=True):
                client.check(outcomes, data)
                sent += len(outcomes)
            if not warm_kb and sent > WARM_UP_PART * REQUESTS:
                warm_kb = resident_kb(agent.pid)
        growth_kb = resident_kb(agent.pid) - warm_kb
        took_s = time.monotonic() - began_s
        closed = sum(client.closed for client in clients)
        print(f"{sent} requests in {took_s:.1f} s, {closed} disconnects, memory {warm_kb} kB and {growth_kb:+} kB")
        client = clients[0]
        client.send(message(sasl_username="proper@example.com"))
        client.check([Outcome.REPLY], b"a proper request")
        for client in clients:
            client.end()
    lines = agent.log().splitlines()
    assert closed == sum(" malformed request " in line for line in lines)
    sound = re.compile(r"\d{4}-\S+ (info|warning) .+")
    assert [] == [line for line in lines if not sound.fullmatch(line) or not line.isprintable()]
    assert growth_kb < GROWTH_KB_MAX


def test_the_corpus() -> None:
    """Each file is a whole request or more, and those of Postfix are answered."""
    outcomes = {path.stem: expect(path.read_bytes())[0] for path in CORPUS}
    assert [] == [name for name, found in outcomes.items() if not found]
    of_postfix = [found for name, found in outcomes.items() if name.startswith("postfix-")]
    assert [[Outcome.REPLY]] * len(of_postfix) == of_postfix


def test_the_same_seed_makes_the_same_requests() -> None:
    """So that what a run has found can be found again; another seed makes others."""
    first, again, other = Fuzzer(1), Fuzzer(1), Fuzzer(2)
    batches = [first.batch(10) for _ in range(200)]
    assert batches == [again.batch(10) for _ in range(200)]
    assert batches != [other.batch(10) for _ in range(200)]
    seen = {outcome for outcomes, _ in batches for outcome in outcomes}
    assert set(Outcome) == seen
