"""network - machines that are network namespaces, and a network between them that can really be cut.

NAME
    Network - a namespace for each machine, a bridge in one of its own, and rules that drop packets
    unavailable - why there can be no such network here, if so

SYNOPSIS
    with Network(["mx1", "mx2", "etcd"]) as network:
        subprocess.Popen(network.command("mx1", "postmeter", "agent"))
        network.drop({("mx1", "mx2"): 100})         # mx2 hears nothing of what mx1 says: cut one way
        network.drop(cut({"mx1"}, {"mx2", "etcd"}))  # neither side hears the other
        network.drop({})                             # healed

DESCRIPTION
    The namespaces are called postmeter-PID-NUMBER-MACHINE by the process that made them. Nothing is made in the
    namespace of this machine: no interface, no address, no rule; so networks do not get into each other's way. What an
    earlier process left behind because it was killed is removed, with the processes in it, when the next network is
    made. Commands end with the thread that started them, however that ends.

    A rule is a part, in per cent, of the packets of one machine to another that are lost: dropped by nftables where
    they arrive. TCP carries everything both ways: a cut in one direction lets questions through and no answers.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.postfix.mailhost import HostError, run, search_path

PREFIX = "postmeter-"
COMMANDS = ("ip", "nft", "setpriv", "etcd", "etcdctl")
KNOCK = """
import errno, socket, sys
socket.setdefaulttimeout(0.5)
sys.exit(socket.socket().connect_ex((sys.argv[1], 9)) != errno.ECONNREFUSED)
"""
RULES = """\
table ip postmeter {
    chain input { type filter hook input priority 0; }
}
"""

# Who drops which part, in per cent, of what comes from whom: (source, destination) -> per cent.
Drops = Mapping[tuple[str, str], int]

_numbers = itertools.count(1)


def unavailable() -> str | None:
    """Why namespaces cannot be made and cut here, or None if they can."""
    missing = [command for command in COMMANDS if shutil.which(command, path=search_path()) is None]
    if missing:
        return f"needs {', '.join(missing)}: run tests/packages.sh as root"
    if os.geteuid() != 0:
        return "needs root: network namespaces are made by root only"
    try:
        with Network(["probe"]):
            return None
    except HostError as error:
        return f"no network namespaces here: {error}"


def cut(side: Collection[str], other: Collection[str], percent: int = 100) -> dict[tuple[str, str], int]:
    """Drops between every machine of one side and every one of the other, both ways."""
    pairs = list(itertools.product(side, other))
    return {pair: percent for a, b in pairs if a != b for pair in ((a, b), (b, a))}


class Network:
    """A context manager: the machines exist inside, and nothing of them afterwards."""

    def __init__(self, machines: Sequence[str]) -> None:
        self.machines = tuple(machines)
        self._name = f"{PREFIX}{os.getpid()}-{next(_numbers)}"

    def address(self, machine: str) -> str:
        """The address of a machine."""
        return f"10.0.0.{self.machines.index(machine) + 1}"

    def command(self, machine: str, *command: str) -> list[str]:
        """What to run in order to run a command on a machine."""
        return ["ip", "netns", "exec", f"{self._name}-{machine}", "setpriv", "--pdeathsig", "KILL", "--", *command]

    def drop(self, drops: Drops) -> None:
        """Lose these packets from now on, and no others."""
        for machine in self.machines:
            rules = [
                f"add rule ip postmeter input ip saddr {self.address(source)} {_sometimes(percent)} drop"
                for (source, destination), percent in drops.items()
                if destination == machine
            ]
            self._nft(machine, "\n".join(["flush chain ip postmeter input", *rules, ""]))

    def close_door(self, machine: str) -> None:
        """Let nobody connect to a machine any more, until the next `drop`. Connections that there are live on."""
        self._nft(machine, "add rule ip postmeter input tcp flags & (syn|ack) == syn drop\n")

    def reaches(self, source: str, destination: str) -> bool:
        """Whether a question gets to a machine, and the answer back: `nothing listens there` is one."""
        command = self.command(source, sys.executable, "-S", "-c", KNOCK, self.address(destination))
        return subprocess.run(command, check=False).returncode == 0

    def __enter__(self) -> Self:
        _remove_leftovers()
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Remove the machines."""
        for namespace in _namespaces(self._name + "-"):
            _remove(namespace)

    def _make(self) -> None:
        bridge = f"{self._name}-bridge"
        run("ip", "netns", "add", bridge)
        run("ip", "-n", bridge, "link", "add", "bridge", "up", "type", "bridge")
        for machine in self.machines:
            namespace = f"{self._name}-{machine}"
            port = f"port{self.machines.index(machine)}"
            run("ip", "netns", "add", namespace)
            run("ip", "-n", bridge, "link", "add", port, "type", "veth", "peer", "name", "net", "netns", namespace)
            run("ip", "-n", bridge, "link", "set", port, "master", "bridge", "up")
            run("ip", "-n", namespace, "addr", "add", f"{self.address(machine)}/24", "dev", "net")
            run("ip", "-n", namespace, "link", "set", "net", "up")
            run("ip", "-n", namespace, "link", "set", "lo", "up")
            self._nft(machine, RULES)

    def _nft(self, machine: str, rules: str) -> None:
        done = subprocess.run(
            self.command(machine, "nft", "-f", "-"), input=rules, text=True, capture_output=True, check=False
        )
        if done.returncode:
            raise HostError(f"nft at {machine}: {done.stderr}")


def _sometimes(percent: int) -> str:
    return f"numgen random mod 100 < {percent}" if percent < 100 else ""


def _namespaces(prefix: str) -> Iterator[str]:
    for line in run("ip", "netns", "list").splitlines():
        name = line.split()[0]
        if name.startswith(prefix):
            yield name


def _remove(namespace: str) -> None:
    for pid in run("ip", "netns", "pids", namespace, ok=(0, 1)).split():
        os.kill(int(pid), signal.SIGKILL)
    run("ip", "netns", "del", namespace, ok=(0, 1))


def _remove_leftovers() -> None:
    """Remove the namespaces whose maker lives no more."""
    for namespace in _namespaces(PREFIX):
        pid = namespace.removeprefix(PREFIX).partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists():
            _remove(namespace)
