"""The agent dies, and comes back: what Postfix accepts stays within `max`, and a clean restart costs nothing.

Each test prints its seed; POSTMETER_SEED repeats it (the moments, not the scheduling of processes).

After a crash an agent assumes that K = max(1, 5 % of max) more was used than it has on disk, on every meter. So with
`max: 40` a crash may cost two rights of forty, and what is in flight at that moment may be paid for twice. These tests
hold both ends: never more than `max`, and not much less.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .agent import Agent, PolicyConnection, SocketHolder
from .mailhost import PATIENCE_S, MailHost, free_ports

MAX = 40
SESSIONS = 4
CRASHES_PER_STATE = 5
STATES_PER_LANE = 5
LANES = 2

PER_USER = """
limits:
  per-user:
    key: sasl_username
    count: messages
    max: {max}
    per: 1h
"""


def seed() -> int:
    """Choose a test's random seed, or take the one asked for; print it, and pytest shows it with a failure."""
    chosen = int(os.environ.get("POSTMETER_SEED", random.randrange(1 << 32)))
    print(f"POSTMETER_SEED={chosen}")
    return chosen


def crash_toll(maximum: int) -> int:
    """Count the rights of a meter that one crash may cost: what is promised, not what the agent computes."""
    return max(1, maximum * 5 // 100)


class Count:
    """A number that several threads count up, and that one may wait for."""

    def __init__(self) -> None:
        self.value = 0
        self._changed = threading.Condition()

    def add(self) -> None:
        """Count one more."""
        with self._changed:
            self.value += 1
            self._changed.notify_all()

    def reaches(self, value: int) -> bool:
        """Wait until it is that much; False if that takes longer than anything should."""
        with self._changed:
            return self._changed.wait_for(lambda: self.value >= value, PATIENCE_S)


class Load:
    """Senders that send through Postfix as fast as they are answered, each in a session of its own, until told to stop.

    A sender stops by itself when it is refused for rate: then its user's `max` is reached. Any other refusal (451 while
    the agent is down) is noted, and the message is tried again, as mail clients do.
    """

    def __init__(self, host: MailHost, user: str) -> None:
        self.accepted = Count()
        self.deferred: list[str] = []
        self._host = host
        self._user = user
        self._stop = threading.Event()
        self._threads = ThreadPoolExecutor(SESSIONS)
        self._senders = [self._threads.submit(self._send) for _ in range(SESSIONS)]

    def stop(self) -> None:
        """Let every sender finish its message, and end."""
        self._stop.set()

    def join(self) -> int:
        """Wait for the senders to end; how many messages Postfix has accepted."""
        self._threads.shutdown()
        for sender in self._senders:
            sender.result()
        return self.accepted.value

    def _send(self) -> None:
        with self._host.submission(self._user) as client:
            while not self._stop.is_set():
                outcome = client.send()
                if outcome.accepted:
                    self.accepted.add()
                elif outcome.refused_for_rate:
                    return
                else:
                    self.deferred.append(f"{outcome.code} {outcome.text}")


@contextlib.contextmanager
def hosts(scratch: Path, ports: Sequence[int]) -> Iterator[list[MailHost]]:
    """Run a mail host for each agent's port."""
    with contextlib.ExitStack() as stack:
        running = []
        for port in ports:
            directory = scratch / f"host-{port}"
            directory.mkdir()
            running.append(stack.enter_context(MailHost(directory, policy=f"inet:127.0.0.1:{port}")))
        yield running


def test_fifty_crashes_under_real_load_never_admit_one_too_many(scratch: Path) -> None:
    """50 times kill -9 at a random moment while four sessions send: in total at most `max` is accepted by Postfix.

    Each crash has a user of its own, who starts with an untouched meter, and goes on after the restart until he is
    refused. Two agents crash side by side. One has its socket held by another process, as under systemd: connections
    wait for the next run. The other leaves no listener behind, and Postfix waits a second before it tries again.
    """
    chosen = seed()
    ports = free_ports(LANES)
    with hosts(scratch, ports) as running, SocketHolder(ports[1]) as holder, ThreadPoolExecutor(LANES) as lanes:
        futures = [
            lanes.submit(crash_lane, random.Random(chosen + lane), host, scratch / f"lane-{lane}", ports[lane], held)
            for lane, (host, held) in enumerate(zip(running, (None, holder), strict=True))
        ]
        totals = [total for future in futures for total in future.result()]
    assert LANES * STATES_PER_LANE * CRASHES_PER_STATE == len(totals) == 50
    print("accepted:", sorted(totals))


def crash_lane(
    chance: random.Random, host: MailHost, directory: Path, port: int, holder: SocketHolder | None
) -> list[int]:
    """Crash one agent again and again, on a new state now and then: tolls add up. Return what was accepted each."""
    directory.mkdir()
    totals: list[int] = []
    for state in range(STATES_PER_LANE):
        agent = Agent(
            directory / f"agent-{state}",
            limits=PER_USER.format(max=MAX),
            listen=[f"inet:127.0.0.1:{port}"],
            holder=holder,
        )
        with agent:
            for crash in range(1, CRASHES_PER_STATE + 1):
                total = crash_once(chance, host, agent, f"load{len(totals)}@example.com")
                totals.append(total)
                assert total <= MAX, f"{total} accepted of {MAX} (crash {len(totals)}, {totals})"
                least = MAX - crash * crash_toll(MAX) - SESSIONS
                assert total >= least, f"only {total} accepted of {MAX}, at least {least} expected: {totals}"
    return totals


def crash_once(chance: random.Random, host: MailHost, agent: Agent, user: str) -> int:
    """Send, crash at a random moment, restart, and go on to the end of the user's rights; return what was accepted."""
    load = Load(host, user)
    try:
        # By then each session holds a message at some stage; the rest of the delay shifts the crash within the stages.
        assert load.accepted.reaches(chance.randrange(MAX * 3 // 4))
        time.sleep(chance.random() * 0.01)
        agent.kill()
        agent.start()
    except BaseException:
        load.stop()
        raise
    finally:
        total = load.join()
    return total


def test_ten_crashes_in_a_row_on_one_meter(workspace: Path) -> None:
    """One meter, ten crashes, eight connections that never rest, straight at the agent: at most `max` in total.

    Faster than through Postfix, so more is in flight at each crash. Like Postfix, a client that loses its connection
    before the reply sends the same request again. (What was charged and not answered may be charged twice.)
    """
    maximum, crashes, connections = 1000, 10, 8
    chance = random.Random(seed())
    port = free_ports(1)[0]
    agent = Agent(workspace / "agent", limits=PER_USER.format(max=maximum), listen=[f"inet:127.0.0.1:{port}"])
    accepted = Count()

    def client(number: int) -> None:
        connection = PolicyConnection(port, f"raw{number}")
        while True:
            action = until_answered(connection, "alice@example.org")
            if action != "DUNNO":
                assert action.startswith("450 4.7.1 "), action
                connection.close()
                return
            accepted.add()

    with agent, ThreadPoolExecutor(connections) as pool:
        clients = [pool.submit(client, number) for number in range(connections)]
        for crash in range(crashes):
            # A twentieth of max between crashes: the toll of all ten together is half of it.
            accepted.reaches(crash * maximum // 25 + chance.randrange(1, maximum // 25))
            time.sleep(chance.random() * 0.005)
            agent.kill()
            agent.start()
        for each in clients:
            each.result()
    print("accepted:", accepted.value)
    assert accepted.value <= maximum
    assert maximum - crashes * crash_toll(maximum) - crashes * connections <= accepted.value


def until_answered(connection: PolicyConnection, user: str) -> str:
    """Ask about one new message, again and again as long as the agent is away."""
    request = connection.new_message(user)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return connection.ask(request)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def test_clean_restarts_lose_nothing(scratch: Path) -> None:
    """SIGTERM in the middle of the load, three times: exactly `max` is accepted, not one less."""
    maximum = 100
    chance = random.Random(seed())
    port = free_ports(1)[0]
    agent = Agent(scratch / "clean-agent", limits=PER_USER.format(max=maximum), listen=[f"inet:127.0.0.1:{port}"])
    with hosts(scratch, [port]) as [host], agent:
        load = Load(host, "alice@example.org")
        try:
            for restart in range(3):
                assert load.accepted.reaches(restart * 25 + chance.randrange(1, 25))
                agent.stop()
                agent.start()
        except BaseException:
            load.stop()
            raise
        finally:
            total = load.join()
    assert maximum == total


def test_a_clean_restart_remembers_to_the_last_message(workspace: Path) -> None:
    """What was used before SIGTERM is used after it: 15 of 20, then five more, and no sixth."""
    port = free_ports(1)[0]
    agent = Agent(workspace / "agent", limits=PER_USER.format(max=20), listen=[f"inet:127.0.0.1:{port}"])
    before, after = PolicyConnection(port, "before"), PolicyConnection(port, "after")
    with agent:
        assert ["DUNNO"] * 15 == [before.ask(before.new_message("alice@example.org")) for _ in range(15)]
        before.close()
        agent.stop()
        agent.start()
        assert ["DUNNO"] * 5 == [after.ask(after.new_message("alice@example.org")) for _ in range(5)]
        assert after.ask(after.new_message("alice@example.org")).startswith("450 4.7.1 ")
        after.close()


@pytest.mark.parametrize("end", [Agent.stop, Agent.kill], ids=["SIGTERM", "kill -9"])
def test_with_the_socket_held_a_restart_defers_nothing(scratch: Path, end: Callable[[Agent], None]) -> None:
    """The listening socket outlives the agent, as systemd keeps it: restarts under load give not a single 451.

    What connects while no agent runs waits in the socket's queue; what was asked and not answered, Postfix asks again.
    """
    port = free_ports(1)[0]
    directory = scratch / f"held-{port}"
    with SocketHolder(port) as holder, hosts(scratch, [port]) as [host]:
        with Agent(directory, limits=PER_USER.format(max=1_000_000), holder=holder) as agent:
            load = Load(host, "alice@example.org")
            try:
                for _ in range(3):
                    assert load.accepted.reaches(load.accepted.value + 50)
                    end(agent)
                    agent.start()
                assert load.accepted.reaches(load.accepted.value + 50)
            finally:
                load.stop()
                total = load.join()
        assert [] == load.deferred
        assert [] == re.findall(r"reject: .*", host.log())
    assert total >= 200
