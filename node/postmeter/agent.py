"""The process: sockets, signals, the service manager, and the order of starting and stopping.

    SIGTERM, SIGINT    drain: accept no more, answer what is asked, store everything, mark the state clean, exit 0
    SIGHUP             read the limits again; wrong ones are logged and change nothing

Sockets passed in by systemd take the place of those in the settings.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import socket
import sys

import uvloop

from postmeter import __version__, logs, systemd
from postmeter.control import ControlServer
from postmeter.defaults import SWITCH_INTERVAL_S
from postmeter.errors import ConfigError, PostmeterError
from postmeter.node import Node, log_problems
from postmeter.postfix import PolicyPort
from postmeter.settings import Settings
from postmeter.sockets import bind


def run(settings: Settings) -> int:
    """Run until a signal says to stop. Returns the exit status: 0, 2 if it could not start, 70 after a bug."""
    logs.set_up(settings.log_level, settings.log_format)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    _raise_open_files()
    try:
        return uvloop.run(_run(settings))
    except ConfigError as error:
        log_problems("cannot start", error)
    except PostmeterError as error:
        logs.event(logging.ERROR, "cannot go on", reason=error)
    except Exception as error:  # noqa: BLE001 - the journal must say why
        logs.failure("ended by a bug", error)
        return 70
    return 2


async def _run(settings: Settings) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    passed = systemd.passed_sockets()
    node = Node(settings)
    reloads: set[asyncio.Task[None]] = set()

    def reload() -> None:
        task = asyncio.create_task(_reload(node))
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    loop.add_signal_handler(signal.SIGHUP, reload)
    running = asyncio.create_task(node.run())
    running.add_done_callback(lambda _: stop.set())
    control = ControlServer(node)
    port = PolicyPort(node)
    try:
        await control.start()
        for sock in passed or [bind(listener) for listener in settings.listen]:
            await port.listen(sock)
        _ready(node, [_address(sock) for sock in passed] or [str(listener) for listener in settings.listen])
        watchdog = asyncio.create_task(_watchdog())
        await stop.wait()
        watchdog.cancel()
    finally:
        systemd.notify("STOPPING=1")
        node.set_health("policy", "draining")
        logs.event(logging.INFO, "draining")
        await port.drain()
        node.stop()
        try:
            await running
        finally:
            await control.stop()
    logs.event(logging.INFO, "stopped")
    return 0


def _ready(node: Node, addresses: list[str]) -> None:
    node.set_health("policy", "")
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
