"""Listening sockets as the settings describe them.

A unix socket is made under a temporary name and gets its owner and mode there, so that nobody can connect before; the
last step puts it in its place, also over the socket that an agent left when it was killed, but over nothing else. Two
agents never compete for one: they would need the same state directory, which is locked.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import socket
import stat
from pathlib import Path

from postmeter.errors import ConfigError
from postmeter.settings import Listener


def bind(listener: Listener) -> socket.socket:
    """A bound socket. Raises ConfigError that says what to do."""
    try:
        return _bind_unix(listener, listener.path) if listener.path else _bind_inet(listener)
    except OSError as error:
        raise ConfigError([f"cannot listen on {listener}: {error.strerror}; {_advice(error)}"]) from error


def _bind_inet(listener: Listener) -> socket.socket:
    family = socket.AF_INET6 if ":" in listener.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.bind((listener.host, listener.port))
    except OSError:
        sock.close()
        raise
    return sock


def _bind_unix(listener: Listener, path: Path) -> socket.socket:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.lexists(path) and not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(errno.EEXIST, "something is there that is no socket")
        sock.bind(str(draft))
        give_away(draft, listener)
        sock.listen()
        os.replace(draft, path)
    except OSError:
        sock.close()
        draft.unlink(missing_ok=True)
        raise
    return sock


def give_away(path: Path, listener: Listener) -> None:
    """Set a socket's owner, group and mode as the listener says; only root can set the first two to others."""
    owner = pwd.getpwnam(listener.owner).pw_uid if listener.owner else -1
    group = grp.getgrnam(listener.group).gr_gid if listener.group else -1
    path.chmod(0)
    if (owner, group) != (-1, -1):
        os.chown(path, owner, group)
    path.chmod(listener.mode)


def _advice(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return "run the agent as a user who may, or choose another address"
    if isinstance(error, FileNotFoundError):
        return "make its directory first"
    if isinstance(error, FileExistsError):
        return "remove it, or choose another path"
    return "stop what listens there (ss -lntxp), or choose another address"
