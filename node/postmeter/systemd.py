"""The two things systemd and a service say to each other: sockets on the way in, notifications on the way out.

See sd_listen_fds(3) and sd_notify(3). Without systemd both do nothing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping

_FIRST_FD = 3


def passed_sockets(environ: MutableMapping[str, str] = os.environ) -> list[socket.socket]:
    """The listening sockets that were passed in, taken from the environment so that no child takes them again."""
    mine = environ.pop("LISTEN_PID", "") == str(os.getpid())
    count = int(environ.pop("LISTEN_FDS", "0") or 0)
    environ.pop("LISTEN_FDNAMES", None)
    return [_taken(fd) for fd in range(_FIRST_FD, _FIRST_FD + count)] if mine else []


def _taken(fd: int) -> socket.socket:
    os.set_inheritable(fd, False)
    return socket.socket(fileno=fd)


def notify(*lines: str) -> None:
    """Tell the service manager: READY=1, STOPPING=1, WATCHDOG=1, STATUS=..."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as wire:
        wire.setblocking(False)
        try:
            wire.sendto("\n".join(lines).encode(), address)
        except OSError:
            # The manager is busy or gone. It will notice by itself, and mail matters more.
            return


def watchdog_interval_s() -> float | None:
    """How often to say WATCHDOG=1: twice in the time after which systemd restarts the agent. None: never."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    mine = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return int(usec) / 2_000_000 if usec.isdigit() and mine else None
