"""A network of Debian hosts on this machine, each with a systemd of its own, for as long as a program runs.

    with Lab(["mx1", "mx2", "mx3"]) as lab:
        mx1 = lab.hosts["mx1"]
        mx1.run("postfix status")
        mx1.cut()                       # from the other hosts; the lab still reaches it
        mx1.power_off(); mx1.power_on()
        lab.ansible("deploy/ansible/install.yml", "--limit", "mx1")
        with lab.smtp("mx2") as client: ...

All of it lives in a mount, a network and a PID namespace of its own (the "box"), whose first process reads from a pipe
of ours: however this program ends, the box ends with it, and with the box everything in it. Nothing is left but empty
control groups, which the next lab takes away. Hosts have the addresses 192.0.2.11, .12 ... on a bridge inside the box,
the lab itself 192.0.2.1; no packet leaves the box.

A host's disk is a tmpfs over the common base (cache.py): it survives `power_off` and `reboot`, not the lab. What a
power loss does to unsynced data is therefore not shown here; that processes die at any instant is.

The hosts are containers of systemd-nspawn(1) with control groups v2. Where the machine itself has bound the memory and
pids controllers to v1, units' MemoryMax= and TasksMax= have no effect inside.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import shutil
import signal
import smtplib
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from . import cache
from .cache import ROOT, LabError

DOMAIN = "example.com"
PREFIX = "192.0.2."
OWN_ADDRESS = f"{PREFIX}1"
PASSWORD = "letter-box"
DISK_BYTES = 2 << 30
# Far above what anything takes, so that a busy machine fails no test.
PATIENCE_S = 300.0

_CLONE_NEWNET = 0x40000000
_CGROUPS = Path("/sys/fs/cgroup")

# The first process of the box. The last line waits for us, and for nothing else.
_BOX = """\
set -eu
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mkdir /run/lock /run/lab
mount -t tmpfs -o size=90% tmpfs /run/lab
if [ "$(stat -fc %T /sys/fs/cgroup)" != cgroup2fs ]; then
    umount -R /sys/fs/cgroup
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
fi
ip link set lo up
ip link add lab0 type bridge
ip address add 192.0.2.1/24 dev lab0
ip link set lab0 up
echo ready
exec cat
"""

# A host's disk, and its end of a cable to the bridge.
_PLUG = """\
set -eu
disk=/run/lab/$1
mkdir "$disk"
mount -t tmpfs -o size=$3 tmpfs "$disk"
mkdir "$disk/upper" "$disk/work" "$disk/root"
mount -t overlay overlay -o "lowerdir=$4,upperdir=$disk/upper,workdir=$disk/work" "$disk/root"
ip netns add "$1"
ip link add "$1" type veth peer name eth0 netns "$1"
ip link set "$1" master lab0 up
ip -n "$1" link set lo up
ip -n "$1" address add "$2/24" dev eth0
ip -n "$1" link set eth0 up
"""

ReplyT = TypeVar("ReplyT")


class Host:
    """A Debian host. To be made by a Lab; methods raise LabError with what the command said."""

    def __init__(self, lab: Lab, name: str, number: int) -> None:
        self.lab = lab
        self.name = name
        self.address = f"{PREFIX}{number}"
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._notices: socket.socket | None = None
        layers = ":".join(map(str, [*lab.layers, cache.base(lab.release)]))
        lab.inside("sh", "-c", _PLUG, "plug", name, self.address, str(DISK_BYTES), layers)
        known = [f"{PREFIX}{place} {one} {one}.{DOMAIN}" for place, one in lab.numbers.items()]
        lines = ["127.0.0.1 localhost", f"{OWN_ADDRESS} lab", *known]
        self.write("/etc/hosts", "\n".join([*lines, ""]))
        self.write("/etc/hostname", f"{name}\n")
        self.write("/etc/mailname", f"{name}.{DOMAIN}\n")

    @property
    def root(self) -> Path:
        """The host's file system, seen from outside; also while it is off."""
        return Path(f"/proc/{self.lab.box}/root/run/lab/{self.name}/root")

    @property
    def leader(self) -> int:
        """The process id of the host's systemd, on this machine."""
        if self._nspawn is None or self._nspawn.poll() is not None:
            raise LabError(f"{self.name} is off")
        (nspawn,) = _children(self._nspawn.pid)
        return _children(nspawn)[0]

    def write(self, path: str, text: str) -> None:
        """Put a file onto the host's disk."""
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def power_on(self, wait: bool = True) -> None:
        """Boot, and wait until systemd says that it is done."""
        if self._notices is not None:
            self._notices.close()
        self._notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        path = self.lab.directory / f"{self.name}.notify"
        path.unlink(missing_ok=True)
        self._notices.bind(str(path))
        group = f"{_CGROUPS}/{self.lab.group}/{self.name}"
        start = f'mkdir -p {group} && echo 0 >{group}/cgroup.procs && exec env NOTIFY_SOCKET={path} "$@"'
        with (self.lab.directory / f"{self.name}.console").open("ab") as console:
            self._nspawn = subprocess.Popen(
                [
                    *self.lab.entry("--mount", "--net", "--pid"),
                    *("sh", "-c", start, "start", "systemd-nspawn", "--quiet", "--boot", "--notify-ready=yes"),
                    *("--register=no", "--keep-unit", "--private-users=no", "--console=pipe"),
                    *("--resolv-conf=off", "--timezone=off", "--link-journal=no"),
                    f"--network-namespace-path=/run/netns/{self.name}",
                    *(f"--directory=/run/lab/{self.name}/root", f"--machine={self.name}"),
                    # Postfix, etcd and the agent open more files than the default of some machines.
                    "--rlimit=NOFILE=65536",
                ],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
            )
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Wait until the host has booted."""
        assert self._notices is not None
        self._notices.settimeout(PATIENCE_S)
        try:
            while b"READY=1" not in self._notices.recv(4096).split(b"\n"):
                pass
        except TimeoutError:
            console = (self.lab.directory / f"{self.name}.console").read_text(errors="replace")
            raise LabError(f"{self.name} did not boot:\n{console[-4000:]}") from None

    def power_off(self) -> None:
        """Kill it, as when the power fails."""
        os.kill(self.leader, signal.SIGKILL)
        assert self._nspawn is not None
        self._nspawn.wait(PATIENCE_S)

    def gone(self) -> None:
        """Note that the lab has ended, and the host with it."""
        if self._nspawn is not None:
            self._nspawn.wait()
        if self._notices is not None:
            self._notices.close()

    def reboot(self) -> None:
        """Let its systemd stop everything and start again."""
        assert self._nspawn is not None
        self.run("systemctl --no-block reboot")
        # nspawn ends then, and leaves it to its caller to start it again.
        self._nspawn.wait(PATIENCE_S)
        self.power_on()

    def run(self, command: str, *, check: bool = True) -> str:
        """What a shell command on the host printed. It needs no network."""
        done = subprocess.run(
            [*self._entry(), "/bin/sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PATIENCE_S,
            check=False,
        )
        text = done.stdout.decode(errors="replace")
        if check and done.returncode != 0:
            raise LabError(f"on {self.name}: {command}\nfailed ({done.returncode}):\n{text[-4000:]}")
        return text

    def shell(self) -> int:
        """Run a shell for whoever sits at this terminal."""
        return subprocess.run([*self._entry(), "/bin/bash", "-l"], check=False).returncode

    def _entry(self) -> list[str]:
        enter = [
            "nsenter",
            "--target",
            str(self.leader),
            "--mount",
            "--uts",
            "--ipc",
            "--net",
            "--pid",
            "--root",
            "--wd",
        ]
        path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"
        return [*enter, "--", "env", "-i", path, "HOME=/root", f"TERM={os.environ.get('TERM', 'dumb')}"]

    def cut(self, *peers: Host) -> None:
        """Cut it off from these hosts, or from all. The lab's own connections stay."""
        self.heal()
        addresses = "{ " + ", ".join(peer.address for peer in peers) + " }"
        for way in ("saddr", "daddr"):
            rule = f"ip {way} {addresses} drop" if peers else "drop"
            hook, chain, side = ("input", "in", "iif") if way == "saddr" else ("output", "out", "oif")
            self.lab.inside(
                *("ip", "netns", "exec", self.name, "nft"),
                f"add table inet lab; add chain inet lab {chain} {{ type filter hook {hook} priority -300; }};"
                f" add rule inet lab {chain} {side} lo accept; add rule inet lab {chain} ip {way} {OWN_ADDRESS} accept;"
                f" add rule inet lab {chain} {rule}",
            )

    def heal(self) -> None:
        """Undo `cut`."""
        self.lab.inside("ip", "netns", "exec", self.name, "nft", "add table inet lab; delete table inet lab")


class Lab:
    """Hosts that were booted together, of a release of Debian. All have the directories `layers` over the base."""

    def __init__(self, names: Sequence[str], layers: Sequence[Path] = (), release: str = cache.RELEASE) -> None:
        if os.geteuid() != 0:
            raise LabError("only root can boot the lab's hosts")
        self.layers = list(layers)
        self.release = release
        self.numbers = {11 + place: name for place, name in enumerate(names)}
        cache.base(release)
        self.directory = Path(tempfile.mkdtemp(prefix="postmeter-lab-"))
        self.group = f"postmeter-lab-{os.getpid()}"
        self._unshare = subprocess.Popen(
            ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", _BOX],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # ^C at the terminal is for us, who then end the box in order.
            start_new_session=True,
        )
        assert self._unshare.stdout is not None
        if self._unshare.stdout.readline() != b"ready\n":
            self.close()
            raise LabError("the lab's namespaces could not be made; see above")
        (self.box,) = _children(self._unshare.pid)
        self.hosts: dict[str, Host] = {}
        try:
            self.hosts = {name: Host(self, name, number) for number, name in self.numbers.items()}
            for host in self.hosts.values():
                host.power_on(wait=False)
            for host in self.hosts.values():
                host.wait_ready()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End everything."""
        assert self._unshare.stdin is not None
        self._unshare.stdin.close()
        self._unshare.wait()
        for host in self.hosts.values():
            host.gone()
        _sweep()
        shutil.rmtree(self.directory)

    def entry(self, *namespaces: str) -> list[str]:
        """The beginning of a command that is to run inside the box."""
        return ["nsenter", "--target", str(self.box), *namespaces, "--"]

    def inside(self, *command: str) -> str:
        """Run a command inside the box, outside the hosts."""
        return cache.run(*self.entry("--mount", "--net", "--pid"), *command)

    def ansible(self, playbook: Path | str, *options: str, check: bool = True) -> str:
        """Run a playbook against the hosts, by the example inventory. Returns what it printed."""
        tools = cache.tools()
        environment = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "HOME": str(self.directory),
            "LC_ALL": "C.UTF-8",
            "ANSIBLE_CONFIG": str(ROOT / "deploy/ansible/ansible.cfg"),
            "ANSIBLE_HOME": str(self.directory / "ansible"),
            "ANSIBLE_HOST_KEY_CHECKING": "false",
            "ANSIBLE_PRIVATE_KEY_FILE": str(cache.key()),
            "ANSIBLE_NOCOLOR": "1",
        }
        done = subprocess.run(
            [
                *self.entry("--mount", "--net", "--pid"),
                *(tools / "ansible-playbook", ROOT / playbook),
                *("-e", f"secrets_directory={self.directory}/secrets", *options),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=ROOT / "deploy/ansible",
            check=False,
        )
        text = done.stdout.decode(errors="replace")
        if check and done.returncode != 0:
            raise LabError(f"ansible-playbook {playbook} {shlex.join(options)} failed ({done.returncode}):\n{text}")
        return text

    def install(self, *options: str, wheels: Path | None = None, check: bool = True) -> str:
        """Install or upgrade by the example playbook, without a network: this tree's Postmeter, or that of `wheels`."""
        source = (
            "-e",
            "postmeter_source=wheelhouse",
            "-e",
            f"postmeter_wheelhouse={wheels or cache.wheelhouse(release=self.release)}",
        )
        return self.ansible("deploy/ansible/install.yml", *source, *options, check=check)

    def install_etcd(self) -> str:
        """Bring up an etcd of three members, as the example playbook does it."""
        return self.ansible("deploy/ansible/etcd.yml")

    def connect(self, name: str, port: int, timeout_s: float = 30.0) -> socket.socket:
        """Connect from the lab to a host."""
        address = (self.hosts[name].address, port)
        return self._in_network(lambda: socket.create_connection(address, timeout_s))

    def smtp(self, name: str, user: str | None = "user1") -> smtplib.SMTP:
        """A client of a host's submission port, logged in."""
        client = _Smtp(self, name)
        if user:
            client.login(f"{user}@{DOMAIN}", PASSWORD)
        return client

    def _in_network(self, make: Callable[[], ReplyT]) -> ReplyT:
        """What `make` returns in the box's network. A socket stays in the network that it was made in."""
        outcome: list[ReplyT | BaseException] = []

        def enter() -> None:
            try:
                with Path(f"/proc/{self.box}/ns/net").open() as network:
                    if ctypes.CDLL(None, use_errno=True).setns(network.fileno(), _CLONE_NEWNET) != 0:
                        raise OSError(ctypes.get_errno(), "setns")
                outcome.append(make())
            except BaseException as error:  # noqa: BLE001 - raised again below
                outcome.append(error)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]


class _Smtp(smtplib.SMTP):
    def __init__(self, lab: Lab, name: str) -> None:
        self._lab = lab
        super().__init__(name, 587, local_hostname="lab", timeout=30.0)

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        return self._lab.connect(host, port, timeout)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _sweep() -> None:
    """Remove the control groups of labs that are gone."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    for where in (Path(fields[1]) for fields in mounts if fields[2] == "cgroup2"):
        for group in where.glob("postmeter-lab-*"):
            if Path(f"/proc/{group.name.rpartition('-')[2]}").exists() and group.name != f"postmeter-lab-{os.getpid()}":
                continue
            for directory, _, _ in os.walk(group, topdown=False):
                with contextlib.suppress(OSError):
                    Path(directory).rmdir()
