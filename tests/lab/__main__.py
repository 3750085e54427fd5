"""lab - boot Debian hosts on this machine, to watch a cluster of Postmeter and to break it

    python -m tests.lab [--bare] [--command COMMAND]... [NAME...]

Boots hosts (mx1, mx2, mx3 unless named) and installs a cluster on them with deploy/ansible (etcd.yml and install.yml),
as an operator would; with --bare only boots them. Then reads commands from the terminal or from --command; `help` lists
them. The hosts end with the program. Users are user1@example.com to user9@example.com, their password is letter-box.
"""

# ruff: noqa: D403 - the docstrings of commands are what `help` prints
from __future__ import annotations

import argparse
import cmd
import signal
import smtplib
import subprocess
import sys
import time
from collections.abc import Callable

from . import cache
from .cache import LabError
from .lab import DOMAIN, Lab


class Prompt(cmd.Cmd):
    """The commands. Each takes names of hosts."""

    prompt = "lab> "

    def __init__(self, lab: Lab) -> None:
        super().__init__()
        self._lab = lab

    def do_status(self, _: str) -> None:
        """status: what runs on which host, and how to get at it from another terminal"""
        for host in self._lab.hosts.values():
            try:
                units = host.run("systemctl is-active postfix postmeter etcd", check=False).split()
                print(f"{host.name}  {host.address}  nsenter -t {host.leader} --all --wd  ", end="")
                print(
                    *(f"{unit}: {state}" for unit, state in zip(("postfix", "postmeter", "etcd"), units, strict=False))
                )
            except LabError as error:
                print(error)

    def do_shell(self, line: str) -> None:
        """shell NAME: a root shell on a host"""
        self._lab.hosts[line].shell()

    def do_run(self, line: str) -> None:
        """run NAME COMMAND: a command on a host"""
        name, _, command = line.partition(" ")
        print(self._lab.hosts[name].run(command, check=False), end="")

    def do_cut(self, line: str) -> None:
        """cut NAME [PEER...]: cut a host off from some others, or from all"""
        host, *peers = (self._lab.hosts[name] for name in line.split())
        host.cut(*peers)

    def do_heal(self, line: str) -> None:
        """heal NAME: undo cut"""
        self._lab.hosts[line].heal()

    def do_off(self, line: str) -> None:
        """off NAME: as when the power fails"""
        self._lab.hosts[line].power_off()

    def do_on(self, line: str) -> None:
        """on NAME: boot it again from its disk"""
        self._lab.hosts[line].power_on()

    def do_reboot(self, line: str) -> None:
        """reboot NAME: let it stop and start in order"""
        self._lab.hosts[line].reboot()

    def do_send(self, line: str) -> None:
        """send NAME [USER [COUNT]]: mail from a user through a host, and what Postfix says"""
        name, user, count = (*line.split(), *("user1", "1")[len(line.split()) - 1 :])
        with self._lab.smtp(name, user) as client:
            for number in range(int(count)):
                try:
                    client.sendmail(f"{user}@{DOMAIN}", ["somebody@example.net"], f"Subject: {number}\n\nHello")
                    print("accepted")
                except smtplib.SMTPException as error:
                    print(error)
                    break

    def do_ansible(self, line: str) -> None:
        """ansible PLAYBOOK [OPTION...]: run a playbook of deploy/ansible"""
        playbook, *options = line.split()
        print(self._lab.ansible(f"deploy/ansible/{playbook}", *options, check=False))

    def do_quit(self, _: str) -> bool:
        """quit: end the lab"""
        return True

    do_EOF = do_quit  # noqa: N815 - the name that cmd.Cmd looks for

    def onecmd(self, line: str) -> bool:
        """Run a command, and say what was wrong with it instead of ending."""
        try:
            return bool(super().onecmd(line))
        except (LabError, KeyError, ValueError, OSError, smtplib.SMTPException, subprocess.SubprocessError) as error:
            print(f"{type(error).__name__}: {error}")
            return False

    def emptyline(self) -> bool:
        """Do nothing; not the last command again."""
        return False


def main() -> int:
    """Run the lab."""
    parser = argparse.ArgumentParser(
        prog="lab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", default=["mx1", "mx2", "mx3"])
    parser.add_argument("--bare", action="store_true", help="boot the hosts, install nothing on them")
    parser.add_argument("--command", action="append", default=[], help="instead of what the terminal says")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _timed("Debian base", cache.base)
        start = time.monotonic()
        with Lab(args.names) as lab:
            print(f"{len(lab.hosts)} hosts booted in {time.monotonic() - start:.1f} s")
            if not args.bare:
                _timed("etcd installed by Ansible", lab.install_etcd)
                _timed("cluster installed by Ansible", lab.install)
            prompt = Prompt(lab)
            prompt.onecmd("status")
            for command in args.command:
                print(f"{prompt.prompt}{command}")
                prompt.onecmd(command)
            if not args.command:
                prompt.cmdloop("`help` lists the commands; ^D ends the lab")
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _timed(what: str, do: Callable[[], object]) -> None:
    start = time.monotonic()
    do()
    print(f"{what}: {time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
