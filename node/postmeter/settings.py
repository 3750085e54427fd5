"""The agent's settings: one YAML file, every setting with a default, so that none is needed.

    listen: inet:127.0.0.1:10040       # or a list; inet:[::1]:10040, unix:/PATH,
                                       # {unix: /PATH, owner: USER, group: GROUP, mode: "0660"}
    state_dir: /var/lib/postmeter
    admin_socket: /run/postmeter/admin.sock
    limits: /etc/postmeter/limits.yaml
    charge_at: end-of-message          # or rcpt
    on_error: defer                    # or dunno
    log: {level: info, format: text}   # debug, info, warning, error; text or json
    etcd:                              # left out, or empty: this node is alone, and takes its limits from the file
      endpoints: [https://etcd1.example.org:2379, https://etcd2.example.org:2379]    # or http://...
      prefix: /postmeter/
      ca: etcd-ca.pem                  # whom to believe; with https
      certificate: etcd.pem            # both or none, with https: what this node shows
      key: etcd.key
      user: postmeter                  # for an etcd that asks for one, with password_file or password
      password_file: etcd.password
    node: mx1                          # default: the host's name up to the first dot
    cluster:                           # left out, or empty: this node is alone
      listen: 192.0.2.1:10044          # or [2001:db8::1]:10044
      address: mx1.example.com:10044
      ca: ca.pem                       # these three, or `insecure: true`, or listen on this machine only
      certificate: mx1.pem
      key: mx1.key
      insecure: false
      join: auto                       # or manual
      borrow_timeout: 250ms
      exchange_interval: 1s
      exchange_peers: 3

HELP says what each is for. Paths of sockets are absolute, others may start at the file's directory. Owner and group
must exist on this machine. The files of etcd are read when they are used.
"""

from __future__ import annotations

import grp
import os
import pwd
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Literal, get_args

from postmeter.core.identity import is_machine_name
from postmeter.core.rule import ChargeAt
from postmeter.defaults import (
    BORROW_TIMEOUT_MS,
    BORROW_TIMEOUT_MS_MAX,
    EXCHANGE_INTERVAL_MS,
    EXCHANGE_INTERVAL_MS_MAX,
    EXCHANGE_INTERVAL_MS_MIN,
    EXCHANGE_PEERS,
    EXCHANGE_PEERS_MAX,
)
from postmeter.documents import (
    Node,
    Problems,
    RefusedError,
    attempt,
    boolean,
    choice,
    compose,
    fields,
    listed,
    quote,
    read_text,
    scalar,
    take,
)

DEFAULT_PATH = Path("/etc/postmeter/postmeter.yaml")
ETCD_PREFIX = "/postmeter/"
# An address of a unix socket has at most 107 bytes, of which a temporary name while it is made takes some.
SOCKET_PATH_BYTES_MAX = 96

OnError = Literal["defer", "dunno"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
Joining = Literal["auto", "manual"]

_ADDRESS = "write HOST:PORT, such as mx1.example.com:10044 or [2001:db8::1]:10044"
_LISTENER = "write inet:127.0.0.1:10040, inet:[::1]:10040 or unix:/path/of/socket"


@dataclass(frozen=True, slots=True)
class Listener:
    """Where to listen: `path` for a unix socket, else `host` and `port`. No owner or group: those of the agent."""

    host: str = ""
    port: int = 0
    path: Path | None = None
    owner: str | None = None
    group: str | None = None
    mode: int = 0o660

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"inet:[{self.host}]:{self.port}" if ":" in self.host else f"inet:{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class EtcdSettings:
    """The etcd that the cluster shares. `endpoints` are all http:// or all https://; without `user` no login."""

    endpoints: tuple[str, ...]
    prefix: str = ETCD_PREFIX
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    user: str = ""
    password: str = field(default="", repr=False)
    password_file: Path | None = None


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """How this node takes part in a cluster. Addresses are HOST:PORT; the files are all set, or none."""

    listen: str
    address: str
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    insecure: bool = False
    join: Joining = "auto"
    borrow_timeout_ms: int = BORROW_TIMEOUT_MS
    exchange_interval_ms: int = EXCHANGE_INTERVAL_MS
    exchange_peers: int = EXCHANGE_PEERS


def host_name() -> str:
    """What this host is called, up to the first dot; "" if no node may be called so."""
    name = socket.gethostname().partition(".")[0].lower()
    return name if is_machine_name(name) else ""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operator decides about this agent. HELP says what for."""

    listen: tuple[Listener, ...] = (Listener("127.0.0.1", 10040),)
    state_dir: Path = Path("/var/lib/postmeter")
    admin_socket: Listener = Listener(path=Path("/run/postmeter/admin.sock"))
    limits: Path = Path("/etc/postmeter/limits.yaml")
    charge_at: ChargeAt = "end-of-message"
    on_error: OnError = "defer"
    log_level: LogLevel = "info"
    log_format: LogFormat = "text"
    etcd: EtcdSettings | None = None
    node: str = field(default_factory=host_name)
    cluster: ClusterSettings | None = None


HELP = {
    "listen": "where Postfix asks; one place, or a list",
    "state_dir": "where usage is kept across restarts: a directory on a local disk, of this agent alone",
    "admin_socket": "where the commands (ask, show, top, nodes, reset, ...) reach the agent",
    "limits": "the file of limits",
    "charge_at": "when mail is counted: end-of-message, or rcpt for a Postfix that cannot ask at the end",
    "on_error": "what Postfix is told when the agent cannot decide: defer, or dunno (let it pass)",
    "log_level": "debug, info, warning or error",
    "log_format": "text (name=value) or json",
    "etcd": "the etcd that the nodes of a cluster share; without it this node is alone, and takes limits from the file",
    "etcd_endpoints": "where it answers, one or a list; the next one is asked when one fails",
    "etcd_prefix": "what the keys begin with",
    "etcd_ca": "the certificates of the CAs that may sign etcd's, with https",
    "etcd_certificate": "the certificate that this node shows to etcd, if it asks for one",
    "etcd_key": "the key of this certificate",
    "etcd_user": "the login, if etcd asks for one",
    "etcd_password": "its password",
    "etcd_password_file": "or a file of which it is the first line, read at every login",
    "node": "what this node is called in the cluster, and in its certificate; never two alike",
    "cluster": "the nodes that share the limits; without it this node is alone",
    "cluster_listen": "where the other nodes reach this one",
    "cluster_address": "what the others are told to connect to, if that is not `listen`",
    "cluster_ca": "who signs the nodes' certificates; `postmeter certs` makes these files",
    "cluster_certificate": "this node's certificate, which names it",
    "cluster_key": "the key of the certificate",
    "cluster_insecure": "true: without certificates, and yet reachable from other machines",
    "cluster_join": "auto: become part of the cluster when the agent starts; manual: by `postmeter node join`",
    "cluster_borrow_timeout": "how long Postfix may wait for rights from other nodes, at most 5s",
    "cluster_exchange_interval": "how often usage is exchanged with a peer",
    "cluster_exchange_peers": "with how many peers each time; others are chosen the next time",
}


def read_settings(path: Path | None) -> Settings:
    """The settings in a file, which must exist; without a path in DEFAULT_PATH, or the defaults. Raises ConfigError."""
    if path is None:
        if not DEFAULT_PATH.exists():
            return Settings()
        path = DEFAULT_PATH
    return parse_settings(read_text(path), str(path), path.absolute().parent)


def parse_settings(text: str, source: str, directory: Path) -> Settings:
    """The settings in a text. Raises ConfigError with all problems."""
    problems = Problems(source)
    names = ("listen", "state_dir", "admin_socket", "limits", "charge_at", "on_error", "log", "etcd", "node", "cluster")
    entries = fields(compose(text, problems), names)
    default = Settings()
    path = partial(_path, directory=directory)
    log = fields(entries["log"], ("level", "format")) if "log" in entries else {}
    settings = Settings(
        listen=take(entries, "listen", _listeners, default.listen),
        state_dir=take(entries, "state_dir", path, default.state_dir),
        admin_socket=take(entries, "admin_socket", _admin_socket, default.admin_socket),
        limits=take(entries, "limits", path, default.limits),
        charge_at=take(entries, "charge_at", choice(get_args(ChargeAt)), default.charge_at),
        on_error=take(entries, "on_error", choice(get_args(OnError)), default.on_error),
        log_level=take(log, "level", choice(get_args(LogLevel)), default.log_level),
        log_format=take(log, "format", choice(get_args(LogFormat)), default.log_format),
        etcd=take(entries, "etcd", partial(_etcd, path=path), None),
        node=take(entries, "node", _node_name, default.node),
        cluster=take(entries, "cluster", partial(_cluster, path=path), None),
    )
    if settings.cluster and not settings.node:
        entries["cluster"].refuse("this host's name cannot be the name of a node", "write node: mx1 above")
    problems.check()
    return settings


def parse_listener(text: str) -> Listener:
    """A listener in its short form. Raises ConfigError."""
    if text.startswith("unix:"):
        return Listener(path=_socket_path(text.removeprefix("unix:")))
    if not text.startswith("inet:"):
        raise RefusedError(f"{quote(text)} is no place to listen", _LISTENER)
    return Listener(*parse_address(text.removeprefix("inet:"), f"{quote(text)} is no place to listen", _LISTENER))


def parse_address(text: str, wrong: str = "", right: str = _ADDRESS) -> tuple[str, int]:
    """Host and port of HOST:PORT, an IPv6 address in brackets. Raises ConfigError, in the caller's words if given."""
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:\[\]]+):([0-9]{1,5})", text)
    if not match or not 1 <= int(match[2]) <= 65535:
        raise RefusedError(wrong or f"{quote(text)} is no address with a port", right)
    host = match[1].strip("[]")
    try:
        if host != match[1]:
            IPv6Address(host)
        elif re.fullmatch("[0-9.]+", host):
            IPv4Address(host)
    except ValueError:
        raise RefusedError(f"{quote(host)} is no address", right) from None
    return host, int(match[2])


def parse_endpoint(text: str) -> str:
    """A URL of etcd, checked. Raises ConfigError."""
    right = "write http://HOST:PORT or https://HOST:PORT, such as https://etcd1.example.org:2379"
    match = re.fullmatch(r"https?://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})", text)
    if not match or not 1 <= int(match[2]) <= 65535:
        raise RefusedError(f"{quote(text)} is no endpoint of etcd", right)
    return text


def _listeners(node: Node) -> tuple[Listener, ...]:
    return tuple(attempt(item, _listener, Listener()) for item in listed(node))


def _listener(node: Node) -> Listener:
    if not isinstance(node.value, dict):
        return parse_listener(scalar(node, _LISTENER))
    entries = fields(node, ("unix", "owner", "group", "mode"), {"unix": "unix: /path/of/socket"})
    return Listener(
        path=take(entries, "unix", lambda path: _socket_path(scalar(path, "write a path")), None),
        owner=take(entries, "owner", partial(_account, kind="user", find=pwd.getpwnam), None),
        group=take(entries, "group", partial(_account, kind="group", find=grp.getgrnam), None),
        mode=take(entries, "mode", _mode, Listener().mode),
    )


def _etcd(node: Node, path: Callable[[Node], Path]) -> EtcdSettings | None:
    if not node.value:
        return None
    names = ("endpoints", "prefix", "ca", "certificate", "key", "user", "password", "password_file")
    entries = fields(node, names, {"endpoints": "endpoints: [https://etcd1.example.org:2379]"})
    etcd = EtcdSettings(
        endpoints=take(entries, "endpoints", _endpoints, ()),
        prefix=take(entries, "prefix", _prefix, ETCD_PREFIX),
        ca=take(entries, "ca", path, None),
        certificate=take(entries, "certificate", path, None),
        key=take(entries, "key", path, None),
        user=take(entries, "user", lambda user: scalar(user, "write a login, or remove it"), ""),
        password=take(entries, "password", lambda password: scalar(password, "write a password, or remove it"), ""),
        password_file=take(entries, "password_file", path, None),
    )
    secure = etcd.endpoints and etcd.endpoints[0].startswith("https:")
    if secure and not etcd.ca:
        node.refuse("ca is missing", "write ca: /etc/ssl/certs/ca-certificates.crt, or the file of your own CA")
    for name in ("ca", "certificate", "key"):
        if etcd.endpoints and not secure and name in entries:
            entries[name].refuse("is not used with http://", "write https:// endpoints, or remove it")
    for name, other in (
        ("certificate", "key"),
        ("key", "certificate"),
        ("password", "user"),
        ("password_file", "user"),
    ):
        if name in entries and other not in entries:
            entries[name].refuse(f"stands there without {other}", f"write {other} beside it, or remove it")
    if "user" in entries and ("password" in entries) == ("password_file" in entries):
        entries["user"].refuse("needs a password or a password_file", "write one of them")
    return etcd


def _endpoints(node: Node) -> tuple[str, ...]:
    found = tuple(attempt(item, lambda item: parse_endpoint(scalar(item, "write a URL")), "") for item in listed(node))
    if len({endpoint.partition(":")[0] for endpoint in found if endpoint}) > 1:
        raise RefusedError("has http:// and https:// endpoints", "write all of them with https://")
    return found


def _prefix(node: Node) -> str:
    text = scalar(node, "write /postmeter/")
    if not re.fullmatch("/([A-Za-z0-9._-]{1,64}/){1,8}", text):
        raise RefusedError(f"{quote(text)} is no prefix", "write one such as /postmeter/, with / at both ends")
    return text


def _cluster(node: Node, path: Callable[[Node], Path]) -> ClusterSettings | None:
    if not node.value:
        return None
    names = [name.removeprefix("cluster_") for name in HELP if name.startswith("cluster_")]
    entries = fields(node, names, {"listen": "listen: 192.0.2.1:10044"})
    default = ClusterSettings("", "")
    listen = take(entries, "listen", _address, "")
    cluster = ClusterSettings(
        listen=listen,
        address=take(entries, "address", _address, listen),
        ca=take(entries, "ca", path, None),
        certificate=take(entries, "certificate", path, None),
        key=take(entries, "key", path, None),
        insecure=take(entries, "insecure", boolean, default.insecure),
        join=take(entries, "join", choice(get_args(Joining)), default.join),
        borrow_timeout_ms=take(
            entries, "borrow_timeout", _duration(0, BORROW_TIMEOUT_MS_MAX), default.borrow_timeout_ms
        ),
        exchange_interval_ms=take(
            entries,
            "exchange_interval",
            _duration(EXCHANGE_INTERVAL_MS_MIN, EXCHANGE_INTERVAL_MS_MAX),
            default.exchange_interval_ms,
        ),
        exchange_peers=take(entries, "exchange_peers", _exchange_peers, default.exchange_peers),
    )
    if listen:
        _check_reach(cluster, entries)
    return cluster


def _check_reach(cluster: ClusterSettings, entries: Mapping[str, Node]) -> None:
    """Others must be able to reach the node, and only the others."""
    host, _ = parse_address(cluster.listen)
    certified = [name for name in ("ca", "certificate", "key") if name in entries]
    if certified and cluster.insecure:
        entries["insecure"].refuse("is not used beside certificates", "remove it, or the certificates")
    elif certified and len(certified) < 3:
        entries[certified[0]].refuse("stands without the others", "write all three of ca, certificate and key")
    elif not certified and not cluster.insecure and not _is_loopback(host):
        wrong = "anybody who can connect there could take the cluster's rights, because there are no certificates"
        entries["listen"].refuse(wrong, "write ca, certificate and key, made by `postmeter certs`, or insecure: true")
    if host in ("0.0.0.0", "::") and "address" not in entries:  # noqa: S104 - it is refused
        entries["listen"].refuse("is nothing that others can connect to", "write address: mx1.example.com:10044")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _address(node: Node) -> str:
    text = scalar(node, _ADDRESS)
    parse_address(text)
    return text


def _node_name(node: Node) -> str:
    right = "write a host's name in lower case, such as mx1 or mx1.example.com"
    text = scalar(node, right)
    if not is_machine_name(text):
        raise RefusedError(f"{quote(text)} is no name of a node", right)
    return text


def _duration(least_ms: int, most_ms: int) -> Callable[[Node], int]:
    """A reader of a duration in ms or s."""

    def reader(node: Node) -> int:
        right = f"write {least_ms}ms to {most_ms // 1000}s, such as 250ms or 1s"
        text = scalar(node, right)
        match = re.fullmatch("([0-9]{1,6}) ?(ms|s)", text)
        length_ms = int(match[1]) * {"ms": 1, "s": 1000}[match[2]] if match else -1
        if not least_ms <= length_ms <= most_ms:
            raise RefusedError(f"{quote(text)} is no such duration", right)
        return length_ms

    return reader


def _exchange_peers(node: Node) -> int:
    right = f"write a number of peers, 1 to {EXCHANGE_PEERS_MAX}"
    text = scalar(node, right)
    if not re.fullmatch("[0-9]{1,3}", text) or not 1 <= int(text) <= EXCHANGE_PEERS_MAX:
        raise RefusedError(f"{quote(text)} is none", right)
    return int(text)


def _admin_socket(node: Node) -> Listener:
    if isinstance(node.value, str) and not node.value.startswith("unix:"):
        return Listener(path=_socket_path(scalar(node, "write a path")))
    return _listener(node)


def _socket_path(text: str) -> Path:
    if not text.startswith("/") or text.endswith("/") or not text.isprintable():
        raise RefusedError(f"{quote(text)} is no path of a unix socket", "write one such as /run/postmeter/x.sock")
    if len(os.fsencode(text)) > SOCKET_PATH_BYTES_MAX:
        raise RefusedError(
            f"{quote(text)} is too long for a unix socket", f"write at most {SOCKET_PATH_BYTES_MAX} bytes"
        )
    return Path(text)


def _path(node: Node, directory: Path) -> Path:
    text = scalar(node, "write a path")
    if not text.isprintable():
        raise RefusedError(f"{quote(text)} is no path", "write one without control characters")
    return directory / text


def _account(node: Node, kind: str, find: Callable[[str], object]) -> str:
    text = scalar(node, f"write the name of a {kind}")
    try:
        find(text)
    except (KeyError, ValueError):
        raise RefusedError(f"there is no {kind} {quote(text)} here", f"write the name of an existing {kind}") from None
    return text


def _mode(node: Node) -> int:
    text = scalar(node, 'write a mode such as "0660"')
    match = re.fullmatch("(?:0o?)?([0-7]{3})", text)
    if not match:
        raise RefusedError(f"{quote(text)} is no mode", 'write three octal digits, such as "0660"')
    return int(match[1], 8)
