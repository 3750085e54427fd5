"""The process: sockets, signals, the service manager, and the order of starting and stopping.

    SIGTERM, SIGINT    drain: accept no more, answer what is asked, store everything, mark the state clean, exit 0
    SIGHUP             read the limits again; wrong ones are logged and change nothing

Sockets passed in by systemd take the place of those in the settings.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import signal
import socket
import sys
from collections.abc import Coroutine
from typing import Any

import uvloop

from postmeter import __version__, library_log, logs, systemd
from postmeter.control import ControlServer
from postmeter.defaults import GARBAGE_THRESHOLDS, SWITCH_INTERVAL_S
from postmeter.errors import ConfigError, PostmeterError
from postmeter.etcd_follower import EtcdFollower
from postmeter.membership import RejoinError
from postmeter.node import Node, log_problems
from postmeter.postfix import PolicyPort
from postmeter.settings import Settings
from postmeter.sockets import bind


def run(settings: Settings) -> int:
    """Run until a signal says to stop. Returns the exit status: 0, 2 if it could not start, 70 after a bug."""
    logs.set_up(settings.log_level, settings.log_format)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.set_threshold(*GARBAGE_THRESHOLDS)
    _raise_open_files()
    passed = systemd.passed_sockets()
    rejoin = False
    try:
        while rejoin := uvloop.run(_run(settings, passed, rejoin)):
            pass
        return 0
    except ConfigError as error:
        log_problems("cannot start", error)
    except PostmeterError as error:
        logs.event(logging.ERROR, "cannot go on", reason=error)
    except Exception as error:  # noqa: BLE001 - the journal must say why
        logs.failure("ended by a bug", error)
        return 70
    return 2


async def _run(settings: Settings, passed: list[socket.socket], rejoin: bool) -> bool:
    """Run until a signal says to stop; or until this node has to begin anew in the cluster: then True."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    library_log.follow()
    node = Node(settings)
    follower = EtcdFollower(node, rejoin) if settings.etcd is not None else None
    reloads: set[asyncio.Task[None]] = set()

    def reload() -> None:
        task = asyncio.create_task(_reload(node))
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    loop.add_signal_handler(signal.SIGHUP, reload)
    control = ControlServer(node, follower)
    port = PolicyPort(node)
    running = _start(node.run(), stop)
    following: asyncio.Task[None] | None = None
    try:
        await control.start()
        if follower is not None:
            await follower.start()
            following = _start(follower.run(), stop)
        for sock in [sock.dup() for sock in passed] or [bind(listener) for listener in settings.listen]:
            await port.listen(sock)
        _ready(node, [_address(sock) for sock in passed] or [str(listener) for listener in settings.listen])
        watchdog = asyncio.create_task(_watchdog())
        await stop.wait()
        watchdog.cancel()
    finally:
        systemd.notify("STOPPING=1")
        node.set_trouble("start", "draining")
        logs.event(logging.INFO, "draining")
        # Postfix last: from then on until the next start it waits.
        if following is not None:
            following.cancel()
        if follower is not None:
            await follower.stop()
        await control.stop()
        await port.drain()
        node.stop()
        await running
    logs.event(logging.INFO, "stopped")
    return following is not None and await _has_to_rejoin(following)


def _start(work: Coroutine[Any, Any, None], stop: asyncio.Event) -> asyncio.Task[None]:
    """Something without which the process must not go on."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda _: stop.set())
    return task


async def _has_to_rejoin(following: asyncio.Task[None]) -> bool:
    """Whether that is why the task ended. Raises what else may have ended it."""
    try:
        await following
    except RejoinError as error:
        logs.event(logging.WARNING, "begins anew", reason=error)
        return True
    except asyncio.CancelledError:
        pass
    return False


def _ready(node: Node, addresses: list[str]) -> None:
    node.set_trouble("start", "")
    listen = ",".join(addresses)
    logs.event(logging.INFO, "ready", version=__version__, listen=listen, state_dir=node.settings.state_dir)
    systemd.notify("READY=1", f"STATUS=answering on {listen}")


def _address(sock: socket.socket) -> str:
    name = sock.getsockname()
    return f"systemd:{name[0]}:{name[1]}" if isinstance(name, tuple) else f"systemd:{name}"


async def _reload(node: Node) -> None:
    try:
        await node.reload()
    except ConfigError as error:
        log_problems("limits refused", error)
        logs.event(logging.ERROR, "last good limits stay in force", file=node.settings.limits)


async def _watchdog() -> None:
    interval_s = systemd.watchdog_interval_s()
    while interval_s is not None:
        systemd.notify("WATCHDOG=1")
        await asyncio.sleep(interval_s)


def _raise_open_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
