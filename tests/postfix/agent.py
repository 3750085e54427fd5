"""agent - the installed `postmeter agent` as a process of the test.

NAME
    Agent - one run of the agent after the other, on the same state and the same port
    SocketHolder - holds the listening socket across runs, as systemd does
    PolicyConnection - asks the agent as an smtpd does, without Postfix

SYNOPSIS
    agent = Agent(directory, listen=["inet:127.0.0.1:12345"], limits=LIMITS)
    agent.start()
    agent.kill()        # kill -9: nothing is flushed, nothing is drained
    agent.start()
    agent.stop()        # SIGTERM, and exit status 0

DESCRIPTION
    start() returns when the agent has logged `ready`: an event, not a delay. What it logs is kept; log() gives it, and
    wait_for_log() waits for a line.
"""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import yaml

from .mailhost import PATIENCE_S

# sd_listen_fds(3): passed sockets start at descriptor 3.
FIRST_PASSED = 3


class AgentError(Exception):
    """The agent did not do what every run must; the message ends with its log."""


def postmeter() -> Path:
    """The program that is tested: the script that the installation made beside the interpreter."""
    return Path(sys.executable).with_name("postmeter")


class SocketHolder:
    """Holds a listening socket while agents come and go: what connects in between waits in its queue."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_server(("127.0.0.1", port), backlog=1024)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.socket.close()

    def command(self, command: Sequence[str]) -> list[str]:
        """Tell the command of the socket as systemd does: descriptor 3, LISTEN_FDS, and LISTEN_PID its own id."""
        pass_on = (
            "import os, sys\n"
            f"os.dup2({self.socket.fileno()}, {FIRST_PASSED}, inheritable=True)\n"
            "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))\n"
            "os.execv(sys.argv[1], sys.argv[1:])\n"
        )
        return [sys.executable, "-S", "-c", pass_on, *command]


class Agent:
    """The agent with one state directory. Settings other than the listeners and the limits may be added."""

    def __init__(
        self,
        directory: Path,
        *,
        limits: str,
        listen: Sequence[str | Mapping[str, str]] = (),
        holder: SocketHolder | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.admin_socket = directory / "admin.sock"
        self._holder = holder
        self._process: subprocess.Popen[str] | None = None
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._reader: threading.Thread | None = None
        (directory / "limits.yaml").write_text(limits)
        (directory / "postmeter.yaml").write_text(
            yaml.safe_dump(
                {
                    "state_dir": str(directory / "state"),
                    "admin_socket": str(self.admin_socket),
                    "limits": str(directory / "limits.yaml"),
                    **({"listen": list(listen)} if listen else {}),
                    **(settings or {}),
                }
            )
        )

    @property
    def pid(self) -> int:
        """The process id of the present run."""
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def command(self) -> list[str]:
        """What is run."""
        return [str(postmeter()), "agent", "--settings", str(self.directory / "postmeter.yaml")]

    def launch(self) -> None:
        """Start a run without waiting for it."""
        assert self._process is None, "runs already"
        with self._changed:
            self._lines.clear()
        self._process = subprocess.Popen(
            self._holder.command(self.command) if self._holder else self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=[self._holder.socket.fileno()] if self._holder else [],
        )
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), name="agent-log")
        self._reader.start()

    def start(self) -> None:
        """Return when it answers."""
        self.launch()
        self.wait_ready()

    def wait_ready(self) -> None:
        """Return when the present run has said that it is ready."""
        self.wait_for_log(r"\bready\b")

    def stop(self) -> None:
        """End it as systemd does, and insist on exit status 0."""
        status = self._end(signal.SIGTERM)
        if status != 0:
            raise AgentError(f"exit status {status} after SIGTERM:\n{self.log()}")

    def kill(self) -> None:
        """End it as a crash does."""
        self._end(signal.SIGKILL)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process is None:
            return
        if kind is None:
            self.stop()
        else:
            self.kill()

    def log(self) -> str:
        """Return what the present run (or the last one) has logged."""
        with self._changed:
            return "".join(self._lines)

    def wait_for_log(self, pattern: str) -> str:
        """Wait for a line of the present run that matches, and return the first."""
        with self._changed:
            found = self._changed.wait_for(lambda: self._match(pattern) or self._reader is None, PATIENCE_S)
            match = self._match(pattern)
        if not found or match is None:
            raise AgentError(f"{pattern!r} is not in the agent's log:\n{self.log()}")
        return match

    def reload(self, limits: str) -> None:
        """Give it other limits, by SIGHUP. Its log says when they are in force."""
        (self.directory / "limits.yaml").write_text(limits)
        assert self._process is not None, "not started"
        self._process.send_signal(signal.SIGHUP)

    def _match(self, pattern: str) -> str | None:
        return next((line for line in self._lines if re.search(pattern, line)), None)

    def _read(self, log: IO[str]) -> None:
        for line in log:
            with self._changed:
                self._lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._reader = None
            self._changed.notify_all()

    def _end(self, sign: signal.Signals) -> int:
        assert self._process is not None, "not started"
        reader = self._reader
        self._process.send_signal(sign)
        try:
            status = self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise AgentError(f"did not end on {sign.name}:\n{self.log()}") from None
        finally:
            if reader is not None:
                reader.join()
            if self._process.stdout is not None:
                self._process.stdout.close()
            self._process = None
        return status


class PolicyConnection:
    """What an smtpd's connection to the agent is: one request, one reply. Connects when asked, and again after a loss.

    instance    tells its messages from those of other connections, as process id and time do in Postfix's
    """

    def __init__(self, port: int, instance: str) -> None:
        self._port = port
        self._instance = instance
        self._messages = 0
        self._connection: socket.socket | None = None

    def close(self) -> None:
        """Hang up."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def new_message(self, user: str, recipients: int = 1) -> dict[str, str]:
        """Make the request of a message that was not asked about before, at END-OF-MESSAGE."""
        self._messages += 1
        return {
            "request": "smtpd_access_policy",
            "protocol_state": "END-OF-MESSAGE",
            "protocol_name": "ESMTP",
            "client_address": "192.0.2.1",
            "client_name": "unknown",
            "helo_name": "client.test",
            "sender": user,
            "recipient": "somebody@remote.test" if recipients == 1 else "",
            "recipient_count": str(recipients),
            "queue_id": f"{self._messages:06X}",
            "instance": f"{self._instance}.{self._messages}",
            "size": "512",
            "sasl_method": "PLAIN",
            "sasl_username": user,
        }

    def ask(self, attributes: Mapping[str, str]) -> str:
        """Send one request, and return the action of its reply. OSError when the agent hangs up instead."""
        request = "".join(f"{name}={value}\n" for name, value in attributes.items()) + "\n"
        try:
            if self._connection is None:
                self._connection = socket.create_connection(("127.0.0.1", self._port), timeout=PATIENCE_S)
            self._connection.sendall(request.encode())
            return self._reply(self._connection)
        except OSError:
            self.close()
            raise

    def _reply(self, connection: socket.socket) -> str:
        reply = b""
        while not reply.endswith(b"\n\n"):
            received = connection.recv(4096)
            if not received:
                raise ConnectionResetError("the agent hung up without a reply")
            reply += received
        text = reply.decode()
        assert (True, 2) == (text.startswith("action="), text.count("\n")), f"not one reply: {text!r}"
        return text.removeprefix("action=").removesuffix("\n\n")
