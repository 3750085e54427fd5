"""peers - the other policy services that a mail server commonly asks: Debian's postgrey and policyd-weight.

NAME
    Postgrey, PolicydWeight - the real daemons, on free ports, with all their state in a temporary directory
    Resolver - the DNS that policyd-weight asks, so that its judgement depends on nothing outside the test

SYNOPSIS
    with Postgrey(directory) as postgrey, Resolver({...}) as resolver, PolicydWeight(directory, resolver) as weights:
        MailHost(..., greylist=postgrey.address, weights=weights.address)

DESCRIPTION
    Both drop to the users that Debian made for them. Each is ended by the process id that starting it gave.
"""

from __future__ import annotations

import os
import pwd
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from .mailhost import PATIENCE_S, HostError, answers, free_ports, search_path, tail, wait_until

# Perl, evaluated by policyd-weight: as packaged, but without block lists, and with our resolver for what it asks.
POLICYD_WEIGHT_CONF = """\
$LOCKPATH = '{directory}/run/';
$SPATH = '{directory}/run/cache.sock';
$PIDFILE = '{directory}/policyd-weight.pid';
$TCP_PORT = {port};
$MIN_PROC = 1;
@dnsbl_score = ();
@rhsbl_score = ();
$USE_NET_DNS = 1;
$DNS_RETRIES = 1;
$DNS_RETRY_IVAL = 2;
# There may be no /dev/log here.
$syslog_socktype = 'native';
# The first new() reads resolv.conf into the defaults; what is set after it stays.
Net::DNS::Resolver->new;
Net::DNS::Resolver->nameservers('127.0.0.1');
Net::DNS::Resolver->port({resolver_port});
1;
"""

A, PTR, MX = 1, 12, 15
NXDOMAIN = 3


class Resolver:
    """A DNS server on a UDP port of 127.0.0.1 that knows the names given, and of all others that they do not exist.

    names       {("good.test", "MX"): "mail.good.test", ("mail.good.test", "A"): "192.0.2.10"}
    """

    def __init__(self, names: Mapping[tuple[str, str], str]) -> None:
        self.names = names
        self.asked: list[str] = []
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, name="resolver")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as waker:
            waker.sendto(b"", ("127.0.0.1", self.port))
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            query, client = self._socket.recvfrom(4096)
            if not query:
                return
            self._socket.sendto(self._reply(query), client)

    def _reply(self, query: bytes) -> bytes:
        """Answer a query of one question; the record names the question by a pointer (RFC 1035, 4.1)."""
        at, labels = 12, []
        while query[at]:
            labels.append(query[at + 1 : at + 1 + query[at]].decode("ascii", "replace"))
            at += 1 + query[at]
        question = query[12 : at + 5]
        name, (kind,) = ".".join(labels).lower(), struct.unpack("!H", query[at + 1 : at + 3])
        self.asked.append(name)
        data = self._record(name, kind)
        exists = any(known == name for known, _ in self.names)
        flags = 0x8180 | (0 if exists else NXDOMAIN)
        header = query[:2] + struct.pack("!5H", flags, 1, 1 if data else 0, 0, 0)
        answer = struct.pack("!HHHIH", 0xC00C, kind, 1, 60, len(data)) + data if data else b""
        return header + question + answer

    def _record(self, name: str, kind: int) -> bytes:
        if kind == MX and (name, "MX") in self.names:
            return struct.pack("!H", 10) + _wire_name(self.names[name, "MX"])
        if kind == PTR and (name, "PTR") in self.names:
            return _wire_name(self.names[name, "PTR"])
        if kind == A and (name, "A") in self.names:
            return socket.inet_aton(self.names[name, "A"])
        return b""


def _wire_name(name: str) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0"


class _Daemon:
    """A policy service in the foreground, owned by the test."""

    command = ""
    user = ""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_ports(1)[0]
        self.log_path = directory / "log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """What check_policy_service is given."""
        return f"inet:127.0.0.1:{self.port}"

    def arguments(self) -> list[str]:
        """Write the files that it needs, and return its command line."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        owner = pwd.getpwnam(self.user)
        self.directory.mkdir(mode=0o755)
        os.chown(self.directory, owner.pw_uid, owner.pw_gid)
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self.arguments(),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PATH": search_path()},
                start_new_session=True,
            )
        try:
            wait_until(self.command, self._ready)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def _ready(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise HostError(f"{self.command}: exit {self._process.returncode}: {tail(self.log_path)}")
        return answers(("127.0.0.1", self.port))

    def _end(self) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise


class Postgrey(_Daemon):
    """Greylisting as packaged, with 300 s to wait, and nobody whitelisted."""

    command = "postgrey"
    user = "postgrey"
    delay_s = 300

    def arguments(self) -> list[str]:
        """Start it with an empty whitelist, and its database in the directory."""
        nobody = self.directory / "whitelist"
        nobody.touch()
        return [
            self.command,
            f"--inet=127.0.0.1:{self.port}",
            f"--dbdir={self.directory}",
            f"--delay={self.delay_s}",
            f"--whitelist-clients={nobody}",
            f"--whitelist-recipients={nobody}",
        ]

    def let_time_pass(self, client: str, sender: str, recipient: str) -> None:
        """Make it believe that the client tried this for the first time just over the delay ago.

        policy_test_time is postgrey's own means for that: the time of the request.
        """
        earlier = int(time.time()) - self.delay_s - 1
        attributes = {
            "request": "smtpd_access_policy",
            "client_address": client,
            "client_name": "unknown",
            "sender": sender,
            "recipient": recipient,
            "policy_test_time": str(earlier),
        }
        request = "".join(f"{name}={value}\n" for name, value in attributes.items()) + "\n"
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S) as connection:
            connection.sendall(request.encode())
            reply = connection.makefile("rb").readline()
        if b"Greylisted" not in reply:
            raise HostError(f"postgrey, asked as if {self.delay_s} s ago: {reply!r}")


class PolicydWeight(_Daemon):
    """Weights as packaged, without block lists, with the DNS of the resolver given."""

    command = "policyd-weight"
    user = "polw"

    def __init__(self, directory: Path, resolver: Resolver) -> None:
        super().__init__(directory)
        self._resolver = resolver

    def arguments(self) -> list[str]:
        """Keep the master in the foreground (-D); its children go with it."""
        configuration = self.directory / "policyd-weight.conf"
        configuration.write_text(
            POLICYD_WEIGHT_CONF.format(directory=self.directory, port=self.port, resolver_port=self._resolver.port)
        )
        configuration.chmod(0o644)
        return [self.command, "-D", "-f", str(configuration), "start"]

    def _end(self) -> None:
        super()._end()
        # Its cache is a process in a session of its own, which ends when it is told so.
        subprocess.run(
            [self.command, "-k", "-f", self.directory / "policyd-weight.conf"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=PATIENCE_S,
            check=False,
            env={**os.environ, "PATH": search_path()},
        )
