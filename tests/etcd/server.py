"""server - private instances of the real etcd, on free ports of 127.0.0.1, with all their state in a directory.

NAME
    EtcdServer - one process: started, killed, paused, restored from a snapshot
    make_cluster - several that form a cluster
    Certificates - a CA, with certificates for etcd and for its clients

SYNOPSIS
    with EtcdServer(directory) as server:
        settings = server.settings()
        server.etcdctl("put", "/postmeter/limits/per-user", "{key: sasl_username, ...}")
        server.pause()

DESCRIPTION
    Nothing is synced to the disk, passwords are hashed quickly, and heartbeats are short, so that tests are quick. Each
    process is ended by its id.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from postmeter.settings import EtcdSettings
from tests.postfix.mailhost import free_ports, wait_until

PREFIX = "/postmeter/"
USER, PASSWORD = "postmeter", "correct horse"


def unavailable() -> str | None:
    """Why etcd cannot run on this machine, or None if it can."""
    missing = [command for command in ("etcd", "etcdctl", "openssl") if shutil.which(command) is None]
    return f"needs {', '.join(missing)}: run tests/packages.sh as root" if missing else None


class Certificates:
    """Made by openssl in a directory: ca.pem, and NAME.pem with NAME.key for each name, good for 127.0.0.1."""

    def __init__(self, directory: Path, *names: str) -> None:
        self.directory = directory
        directory.mkdir(exist_ok=True)
        self.ca = directory / "ca.pem"
        self._openssl("req", "-x509", *self._new_key("ca"), "-subj", "/CN=Test CA", "-out", self.ca)
        for name in names:
            self.issue(name)

    def issue(self, name: str) -> None:
        """Another certificate."""
        extensions = ("-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=CA:FALSE")
        signed_by = ("-CA", self.ca, "-CAkey", self.key("ca"))
        whose = ("-subj", f"/CN={name}", "-out", self.certificate(name))
        self._openssl("req", "-x509", *self._new_key(name), *extensions, *signed_by, *whose)

    def certificate(self, name: str) -> Path:
        """The file."""
        return self.directory / f"{name}.pem"

    def key(self, name: str) -> Path:
        """The file of its key."""
        return self.directory / f"{name}.key"

    def _new_key(self, name: str) -> Sequence[str | Path]:
        return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-keyout", self.key(name))

    def _openssl(self, *words: str | Path) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True)


class EtcdServer:
    """One etcd process. Members of a cluster know each other by `cluster`: names and URLs as etcd wants them.

    With `certificates` it speaks TLS, as "etcd", and wants a certificate of its clients. On another machine than this
    one it has that `address`, and `command` is what runs commands there.
    """

    def __init__(
        self,
        directory: Path,
        *options: str,
        name: str = "m1",
        ports: tuple[int, int] | None = None,
        cluster: str = "",
        certificates: Certificates | None = None,
        address: str = "127.0.0.1",
        command: Sequence[str] = (),
    ) -> None:
        self.port, peer_port = ports or tuple(free_ports(2))
        self.name = name
        self.certificates = certificates
        self.endpoint = f"{'https' if certificates else 'http'}://{address}:{self.port}"
        self._peer = f"http://{address}:{peer_port}"
        self._command = command
        self._cluster = cluster or f"{name}={self._peer}"
        self._directory = directory
        self._options = options
        self._data = 0
        self._token = "token-1"
        self._process: subprocess.Popen[bytes] | None = None
        self._log = directory / f"{name}.log"
        self._login: tuple[str, ...] = ()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()

    # --- its life -----------------------------------------------------------------------------------------------------

    def start(self, wait: bool = True) -> None:
        """Start it, and wait until it serves."""
        here, there = self.endpoint, self._peer
        words = ["--name", self.name, "--data-dir", str(self._data_directory), "--unsafe-no-fsync"]
        words += ["--listen-client-urls", here, "--advertise-client-urls", here]
        words += ["--listen-peer-urls", there, "--initial-advertise-peer-urls", there]
        words += ["--initial-cluster", self._cluster, "--initial-cluster-token", self._token]
        words += ["--heartbeat-interval", "20", "--election-timeout", "200", "--bcrypt-cost", "4", "--logger", "zap"]
        if self.certificates:
            certificate, key = self.certificates.certificate("etcd"), self.certificates.key("etcd")
            words += ["--cert-file", str(certificate), "--key-file", str(key)]
            words += ["--client-cert-auth", "--trusted-ca-file", str(self.certificates.ca)]
        self._log.write_bytes(b"")
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([*self._command, "etcd", *words, *self._options], stdout=log, stderr=log)
        if wait:
            self.wait_for("serving client traffic")

    def wait_for(self, words: str) -> None:
        """Wait until its log since the start has them."""
        process = self._process
        assert process

        def happened() -> bool:
            assert process.poll() is None, f"etcd has ended: {self._log.read_text()[-2000:]}"
            return words in self._log.read_text()

        wait_until(f"{words!r} in the log of etcd", happened)

    def kill(self) -> None:
        """End it at once, without a chance to say goodbye."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Let it do nothing any more, with all its connections open."""
        self._signal(signal.SIGSTOP)
        wait_until("etcd stands still", self._stands_still)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def _stands_still(self) -> bool:
        assert self._process
        threads = Path(f"/proc/{self._process.pid}/task").glob("*/stat")
        return {"T"} == {thread.read_text().rpartition(")")[2].split()[0] for thread in threads}

    def _signal(self, number: int) -> None:
        assert self._process
        os.kill(self._process.pid, number)

    @property
    def _data_directory(self) -> Path:
        return self._directory / f"{self.name}-{self._data}"

    # --- other states -------------------------------------------------------------------------------------------------

    def snapshot(self) -> Path:
        """A snapshot as it is now."""
        path = self._directory / "snapshot.db"
        path.unlink(missing_ok=True)
        self.etcdctl("snapshot", "save", str(path))
        return path

    def restore(self, snapshot: Path) -> None:
        """Kill it, and start it with the state of a snapshot."""
        self.kill()
        self._data += 1
        words = ["--data-dir", str(self._data_directory), "--name", self.name, "--initial-cluster", self._cluster]
        words += ["--initial-advertise-peer-urls", self._peer, "--initial-cluster-token", self._token]
        self.etcdctl("snapshot", "restore", str(snapshot), *words)
        self.start()

    def replace(self) -> None:
        """Kill it, and start another, empty cluster in its place."""
        self.kill()
        self._data += 1
        self._token = f"token-{self._data + 1}"
        self.start()

    # --- its clients --------------------------------------------------------------------------------------------------

    def etcdctl(self, *words: str) -> str:
        """What an operator does, and what is printed then."""
        tls: list[str] = []
        if self.certificates:
            tls = ["--cacert", str(self.certificates.ca), "--cert", str(self.certificates.certificate("client"))]
            tls += ["--key", str(self.certificates.key("client"))]
        command = [*self._command, "etcdctl", "--command-timeout=25s", "--endpoints", self.endpoint]
        command += [*tls, *self._login, *words]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=30, env={**os.environ, "ETCDCTL_API": "3"}
        )
        assert 0 == done.returncode, f"{command}: {done.stderr}{done.stdout}"
        return done.stdout

    def put(self, key: str, value: str) -> None:
        """Put a value; the key without the prefix."""
        self.etcdctl("put", "--", PREFIX + key, value)

    def delete(self, key: str) -> None:
        """Delete a key."""
        self.etcdctl("del", "--", PREFIX + key)

    def compact(self) -> None:
        """Forget all history."""
        revision = self.etcdctl("get", PREFIX, "--write-out=fields").partition('"Revision" : ')[2].split("\n")[0]
        self.etcdctl("compact", revision)

    def ask_for_login(self, permission: str = "readwrite") -> None:
        """Let in only root, and USER with PASSWORD, who may do what is said below PREFIX."""
        self.etcdctl("user", "add", "root:root")
        self.etcdctl("user", "grant-role", "root", "root")
        self.etcdctl("role", "add", "agents")
        self.etcdctl("role", "grant-permission", "--prefix=true", "agents", permission, PREFIX)
        self.etcdctl("user", "add", f"{USER}:{PASSWORD}")
        self.etcdctl("user", "grant-role", USER, "agents")
        self.etcdctl("auth", "enable")
        self._login = ("--user", "root:root")

    def settings(self, *others: EtcdServer) -> EtcdSettings:
        """How an agent reaches it, and other members of its cluster."""
        settings = EtcdSettings((self.endpoint, *(other.endpoint for other in others)))
        if self._login:
            settings = replace(settings, user=USER, password=PASSWORD)
        if self.certificates:
            certificate, key = self.certificates.certificate("client"), self.certificates.key("client")
            settings = replace(settings, ca=self.certificates.ca, certificate=certificate, key=key)
        return settings


def make_cluster(directory: Path, size: int, *options: str) -> list[EtcdServer]:
    """Members of one cluster, not started yet."""
    ports = free_ports(2 * size)
    pairs = list(zip(ports[::2], ports[1::2], strict=True))
    cluster = ",".join(f"m{number}=http://127.0.0.1:{peer}" for number, (_, peer) in enumerate(pairs, 1))
    # Those of many processes on a busy machine must not take each other for dead.
    patience = ("--heartbeat-interval", "100", "--election-timeout", "1000")
    return [
        EtcdServer(directory, *patience, *options, name=f"m{number}", ports=pair, cluster=cluster)
        for number, pair in enumerate(pairs, 1)
    ]
