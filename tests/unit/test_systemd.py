"""What systemd and the agent say to each other.

The agent is a real one; in systemd's place a test passes its sockets to it, and listens to its notifications.
"""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from postmeter import systemd
from tests.postfix.agent import Agent, SocketHolder
from tests.unit.support import message

PATIENCE_S = 30.0
LIMITS = "limits: {per-user: {key: sasl_username, count: recipients, max: 20, per: 1h}}"


class Manager:
    """The end of the notification socket that systemd has."""

    def __init__(self, address: str) -> None:
        self._wire = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._wire.settimeout(PATIENCE_S)
        self._wire.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)

    def told(self) -> list[str]:
        """The lines of the next notification."""
        return self._wire.recv(4096).decode().split("\n")

    def wait_for(self, line: str) -> int:
        """Wait until it is told. Returns how many other notifications came before."""
        before = 0
        while line not in self.told():
            before += 1
        return before

    def close(self) -> None:
        self._wire.close()


class Smtpd:
    """A connection that asks."""

    def __init__(self, address: str | tuple[str, int]) -> None:
        self._wire = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        self._wire.settimeout(PATIENCE_S)
        self._wire.connect(address)

    def ask(self, **attributes: object) -> bytes:
        """The reply to one request; nothing if the connection is closed instead."""
        self._wire.sendall(message(**attributes))
        reply = b""
        while not reply.endswith(b"\n\n"):
            received = self._wire.recv(4096)
            if not received:
                return reply
            reply += received
        return reply

    def rest(self) -> bytes:
        """What comes until the other side closes."""
        return self._wire.recv(4096)

    def close(self) -> None:
        self._wire.close()


class UnixHolder(SocketHolder):
    """Holds a unix socket, as a systemd .socket unit with ListenStream=/PATH does."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(str(path))
        self.socket.listen(100)


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    """Whoever is started from here on notifies it."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with closing(Manager(str(tmp_path / "notify"))) as made:
        yield made


# --- a real agent -----------------------------------------------------------------------------------------------------


def test_the_life_of_an_agent(tmp_path: Path, manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says READY when it answers, WATCHDOG again and again, and STOPPING; on SIGTERM it drains and exits with 0."""
    monkeypatch.setenv("WATCHDOG_USEC", "200000")
    path = tmp_path / "policy.sock"
    agent = Agent(tmp_path / "agent", limits=LIMITS, listen=[f"unix:{path}"])
    agent.launch()
    assert ["READY=1", f"STATUS=answering on unix:{path}"] == manager.told()
    with closing(Smtpd(str(path))) as smtpd:
        assert b"action=DUNNO\n\n" == smtpd.ask()
        assert [0, 0, 0] == [manager.wait_for("WATCHDOG=1") for _ in range(3)]
        agent.stop()
        assert b"" == smtpd.rest()
    manager.wait_for("STOPPING=1")
    assert [" draining", " stopped"] == [line[line.rindex(" ") :] for line in agent.log().splitlines()[-2:]]


def test_without_a_manager_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started by hand the agent does as well; also if the one who should be notified is gone."""
    for environ in ({}, {"NOTIFY_SOCKET": str(tmp_path / "gone"), "WATCHDOG_USEC": "200000"}):
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        path = tmp_path / "policy.sock"
        with Agent(tmp_path / "agent", limits=LIMITS, listen=[f"unix:{path}"]), closing(Smtpd(str(path))) as smtpd:
            assert b"action=DUNNO\n\n" == smtpd.ask()


@pytest.mark.parametrize("kind", ["unix", "inet"])
def test_passed_sockets_take_the_place_of_those_in_the_settings(tmp_path: Path, manager: Manager, kind: str) -> None:
    """The agent answers on descriptor 3, and listens nowhere else; who connects while it restarts is answered, too."""
    path, unwanted = tmp_path / "policy.sock", tmp_path / "unwanted.sock"
    address: str | tuple[str, int] = str(path)
    holder: SocketHolder = UnixHolder(path) if kind == "unix" else SocketHolder(0)
    if kind == "inet":
        address = holder.socket.getsockname()
    with holder:
        agent = Agent(tmp_path / "agent", limits=LIMITS, listen=[f"unix:{unwanted}"], holder=holder)
        with agent, closing(Smtpd(address)) as smtpd:
            name = f"systemd:{address}" if isinstance(address, str) else f"systemd:127.0.0.1:{address[1]}"
            assert ["READY=1", f"STATUS=answering on {name}"] == manager.told()
            assert b"action=DUNNO\n\n" == smtpd.ask(recipient_count=19)
        assert not unwanted.exists()
        with closing(Smtpd(address)) as early, agent:
            assert b"action=DUNNO\n\n" == early.ask()
            assert early.ask().startswith(b"action=450 4.7.1 ")


def test_a_reload_keeps_connections(tmp_path: Path) -> None:
    """SIGHUP: the next answer on the same connection follows the new limits; wrong ones are logged, and that is all."""
    path = tmp_path / "policy.sock"
    with Agent(tmp_path / "agent", limits=LIMITS, listen=[f"unix:{path}"]) as agent, closing(Smtpd(str(path))) as smtpd:
        assert b"action=DUNNO\n\n" == smtpd.ask(recipient_count=7)
        agent.reload(
            LIMITS.replace("20", "8").replace("}}", "}, other: {key: sender, count: bytes, max: 1MB, per: 1h}}")
        )
        agent.wait_for_log("limits in force limits=per-user,other")
        assert b"action=DUNNO\n\n" == smtpd.ask()
        agent.reload("limits: {per-user: {key: sasl_nickname}}")
        agent.wait_for_log("limits refused problem=.*sasl_nickname")
        agent.wait_for_log("last good limits stay in force")
        assert smtpd.ask().startswith(b"action=450 4.7.1 per-user: alice@example.com has used 8 of 8 ")


# --- the words --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("abstract", [False, True])
def test_notify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    """To a path, or to an abstract address, as containers have it."""
    address = f"@postmeter-{os.getpid()}" if abstract else str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with closing(Manager(address)) as manager:
        systemd.notify("READY=1", "STATUS=fine")
        assert ["READY=1", "STATUS=fine"] == manager.told()


def test_a_manager_that_does_not_read_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has no room for is lost, and mail goes on."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with closing(Manager(str(tmp_path / "notify"))) as manager:
        for _ in range(2_000):
            systemd.notify("WATCHDOG=1")
        assert ["WATCHDOG=1"] == manager.told()


@pytest.mark.parametrize(
    ("environ", "interval_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": ""}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_is_told_twice_as_often_as_it_asks(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], interval_s: float | None
) -> None:
    """If it asks, and asks this process."""
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert interval_s == systemd.watchdog_interval_s()


@pytest.mark.parametrize("environ", [{}, {"LISTEN_FDS": "1"}, {"LISTEN_PID": "1", "LISTEN_FDS": "2"}])
def test_sockets_for_somebody_else_are_not_taken(environ: dict[str, str]) -> None:
    """Without LISTEN_PID, or with that of the process before: none; and no child is told of them."""
    environ |= {"LISTEN_FDNAMES": "policy"}
    assert [] == systemd.passed_sockets(environ)
    assert {} == environ


def test_several_sockets_are_taken_in_their_order(tmp_path: Path) -> None:
    """From descriptor 3 on, of any family, and they are not passed on to children."""
    code = """
import os, sys
for place, passed in enumerate(sys.argv[1:], 3):
    os.dup2(int(passed), place)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="2", LISTEN_FDNAMES="a:b")
from postmeter.systemd import passed_sockets
for sock in passed_sockets():
    print(sock.fileno(), sock.family.name, sock.getsockname(), sock.get_inheritable())
print([name for name in os.environ if name.startswith("LISTEN")])
"""
    path = str(tmp_path / "policy.sock")
    with socket.create_server(("127.0.0.1", 0)) as inet, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(path)
        high = [fcntl.fcntl(sock, fcntl.F_DUPFD, 100) for sock in (inet, unix)]
        command = [sys.executable, "-c", code, *map(str, high)]
        done = subprocess.run(command, pass_fds=high, capture_output=True, text=True, check=True)
        for descriptor in high:
            os.close(descriptor)
        assert [
            f"3 AF_INET {inet.getsockname()} False",
            f"4 AF_UNIX {path} False",
            "[]",
        ] == done.stdout.splitlines()
