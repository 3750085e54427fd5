"""The servers that are compared, with equivalent limits: started, measured from outside, stopped.

    with start_postfwd(directory, "postfwd1", HIGH) as server: ...

Every `start_*` takes an empty directory for the server's files and the limits, returns when the server answers, and
ends what it started when the context ends. A server listens on a port or unix socket of its own, runs as the user who
runs the bench, and logs nothing (which favours the peers: Debian's defaults make both log every request).

What is equivalent: Postmeter and postfwd charge recipients at END-OF-MESSAGE on three limits (user per hour, user per
day, domain per hour). policyd-rate-limit has no limits per domain and counts at RCPT only: it charges two limits.
"""

from __future__ import annotations

import contextlib
import grp
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .load import ALL_CORES, SERVER_CORE, BenchError

START_S_MAX = 20.0
STOP_S_MAX = 10.0
HOUR_S, DAY_S = 3_600, 86_400
POSTFWD_VARIANTS = ("postfwd1", "postfwd2")
PATH = "/usr/sbin:/usr/bin"


@dataclass(frozen=True, slots=True)
class Limits:
    """The `max` of the three limits, and their windows in seconds."""

    user_hour: int
    user_day: int
    domain_hour: int
    hour_s: int = HOUR_S
    day_s: int = DAY_S


SMALL = Limits(user_hour=20, user_day=1_000_000, domain_hour=50)
HIGH = Limits(user_hour=1_000_000_000, user_day=1_000_000_000, domain_hour=1_000_000_000)


@dataclass(frozen=True, slots=True)
class Cpu:
    """CPU seconds: of the thread that answers, in the program and in the kernel, and of all other threads."""

    user_s: float
    system_s: float
    others_s: float

    @property
    def all_s(self) -> float:
        """All of it."""
        return self.user_s + self.system_s + self.others_s

    def since(self, before: Cpu, requests: int) -> Cpu:
        """What was used since then, for 1,000 requests."""
        part = 1_000 / requests
        return Cpu(
            (self.user_s - before.user_s) * part,
            (self.system_s - before.system_s) * part,
            (self.others_s - before.others_s) * part,
        )


@dataclass(frozen=True, slots=True)
class Server:
    """A running server: `targets` by transport (inet, unix), the stage at which it charges, what it says to accept."""

    name: str
    pid: int
    targets: dict[str, str]
    stage: str = "END-OF-MESSAGE"
    accepted: str = "action=DUNNO"

    def take_core(self) -> None:
        """Put the thread that answers on the servers' core; others (the agent's storage) may run where there is room.

        postfwd2 answers with many processes, which may all run anywhere.
        """
        if len(_tree(self.pid)) == 1:
            for task in Path(f"/proc/{self.pid}/task").iterdir():
                thread = int(task.name)
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(thread, {SERVER_CORE} if thread == self.pid else ALL_CORES)

    def cpu(self) -> Cpu:
        """CPU time of all its processes until now, and of those that it has waited for."""
        others_s = sum(_others_cpu_s(pid, of=self.pid) for pid in _tree(self.pid))
        user_s, system_s = _ticks_s(_stat(f"{self.pid}/task/{self.pid}")[11:13])
        return Cpu(user_s, system_s, others_s)

    def resident_bytes(self) -> int:
        """VmRSS; for several processes the sum of their proportional shares, as they share most of their pages."""
        pids = _tree(self.pid)
        if len(pids) == 1:
            return _memory_bytes(pids[0], "status", "VmRSS:")
        return sum(_memory_bytes(pid, "smaps_rollup", "Pss:") for pid in pids)

    def resident_bytes_max(self) -> int:
        """The most that its first process ever held."""
        return _memory_bytes(self.pid, "status", "VmHWM:")


def missing() -> list[str]:
    """The programs that the bench needs and that are not installed."""
    programs = ("gcc", *POSTFWD_VARIANTS, "policyd-rate-limit", "etcd", "etcdctl")
    return [program for program in programs if shutil.which(program, path=PATH) is None]


# --- the servers ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def start_echo(directory: Path, binary: Path, transport: str) -> Iterator[Server]:
    """The C echo server on `transport`: what the machine can do at most."""
    target = _inet_target() if transport == "inet" else f"unix:{directory}/echo.sock"
    with _child([str(binary), target], directory) as pid:
        _wait_for(target, pid)
        yield Server("echo (C)", pid, {transport: target})


def agent_command() -> Path:
    """The `postmeter` that is installed beside this Python."""
    command = Path(sys.executable).with_name("postmeter")
    if not command.exists():
        raise BenchError(f"{command} is missing: make setup")
    return command


@contextlib.contextmanager
def start_agent(directory: Path, limits: Limits, **more: object) -> Iterator[Server]:
    """The agent, as it is installed beside this Python, on both transports; its state lies in `directory`."""
    targets = {"inet": _inet_target(), "unix": f"unix:{directory}/agent.sock"}
    settings = {
        "listen": [targets["inet"], {"unix": f"{directory}/agent.sock", "mode": "0600"}],
        "state_dir": f"{directory}/state",
        "admin_socket": f"{directory}/admin.sock",
        "limits": f"{directory}/limits.yaml",
        "log": {"level": "error"},
        **more,
    }
    # JSON is YAML.
    (directory / "limits.yaml").write_text(json.dumps({"limits": documents(limits)}))
    (directory / "postmeter.yaml").write_text(json.dumps(settings))
    command = [str(agent_command()), "agent", "--settings", str(directory / "postmeter.yaml")]
    with _child(command, directory) as pid:
        for target in targets.values():
            _wait_for(target, pid)
        yield Server("postmeter", pid, targets)


def documents(limits: Limits) -> dict[str, dict[str, object]]:
    """The three limits as the agent reads them, by name."""
    windows = {
        "user-hour": ("sasl_username", limits.user_hour, limits.hour_s),
        "user-day": ("sasl_username", limits.user_day, limits.day_s),
        "domain-hour": ("sasl_domain", limits.domain_hour, limits.hour_s),
    }
    return {
        name: {"key": key, "count": "recipients", "max": most, "per": f"{per_s}s"}
        for name, (key, most, per_s) in windows.items()
    }


@contextlib.contextmanager
def start_postfwd(directory: Path, variant: str, limits: Limits) -> Iterator[Server]:
    """postfwd1 (one process, many connections) or postfwd2 (a process for each connection, and one that counts)."""
    command = shutil.which(variant, path=PATH)
    if command is None:
        raise BenchError(f"{variant} is missing: apt-get install postfwd")
    rules = {
        "USERHOUR": ("sasl_username", limits.user_hour, limits.hour_s),
        "USERDAY": ("sasl_username", limits.user_day, limits.day_s),
        "DOMAINHOUR": ("sender_domain", limits.domain_hour, limits.hour_s),
    }
    lines = [
        f"id={name}; protocol_state==END-OF-MESSAGE; action=rcpt({item}/{most}/{per_s}/450 4.7.1 {name} exceeded)\n"
        for name, (item, most, per_s) in rules.items()
    ]
    (directory / "rules.cf").write_text("".join(lines))
    target = _inet_target()
    user, group = _who_am_i()
    pid_file = directory / "pid"
    # fmt: off
    options = [
        "--daemon", "--file", str(directory / "rules.cf"), "--pidfile", str(pid_file), "--user", user, "--group", group,
        "--interface", "127.0.0.1", "--port", target.rpartition(":")[2], "--nodns", "--perfmon", "--summary", "0",
    ]
    # fmt: on
    if variant == "postfwd2":
        # Without this process rate() and rcpt() never refuse anything.
        options += ["--cache_socket", f"unix::{directory}/cache.sock"]
    with open(directory / "log", "wb") as log:
        subprocess.run([command, *options], stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True)
    _wait_until(lambda: pid_file.exists() and pid_file.read_text().strip().isdigit(), f"{variant} does not start")
    pid = int(pid_file.read_text())
    try:
        _wait_for(target, pid)
        yield Server(variant, pid, {"inet": target})
    finally:
        _end(pid)


@contextlib.contextmanager
def start_policyd_rate_limit(directory: Path, database: Path, name: str, limits: Limits) -> Iterator[Server]:
    """policyd-rate-limit with its SQLite database in the directory `database`."""
    command = shutil.which("policyd-rate-limit", path=PATH)
    if command is None:
        raise BenchError("policyd-rate-limit is missing: apt-get install policyd-rate-limit")
    target = _inet_target()
    user, group = _who_am_i()
    settings = {
        "debug": False,
        "user": user,
        "group": group,
        "pidfile": f"{directory}/pid",
        "backend": 0,
        "sqlite_config": {"database": f"{database}/db.sqlite3"},
        "SOCKET": ["127.0.0.1", int(target.rpartition(":")[2])],
        "limits": [[limits.user_hour, limits.hour_s], [limits.user_day, limits.day_s]],
        "limits_by_id": {},
        "limit_by_sasl": True,
    }
    (directory / "settings.yaml").write_text(json.dumps(settings))
    with _child([command, "--file", str(directory / "settings.yaml")], directory) as pid:
        _wait_for(target, pid)
        yield Server(name, pid, {"inet": target}, stage="RCPT", accepted="action=dunno")


# --- processes --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _child(command: list[str], directory: Path) -> Iterator[int]:
    """Run a program in the foreground, its output in `directory`/log, until the context ends."""
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=directory)
    try:
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end(pid: int) -> None:
    """End a daemon and its children: TERM for the first, KILL for what is left after STOP_S_MAX."""
    pids = _tree(pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline_s = time.monotonic() + STOP_S_MAX
    while pids := [pid for pid in pids if _is_alive(pid)]:
        if time.monotonic() > deadline_s:
            for left in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(left, signal.SIGKILL)
            return
        time.sleep(0.05)


def _is_alive(pid: int) -> bool:
    try:
        return _stat(pid)[0] != "Z"
    except OSError:
        return False


def _wait_for(target: str, pid: int) -> None:
    """Until `target` accepts connections. Raises BenchError if the process ends or takes too long."""

    def answers() -> bool:
        if not _is_alive(pid):
            raise BenchError(f"the server for {target} ended while it started")
        kind, _, where = target.partition(":")
        family = socket.AF_UNIX if kind == "unix" else socket.AF_INET
        host, _, port = where.rpartition(":")
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            return probe.connect_ex(where if kind == "unix" else (host, int(port))) == 0

    _wait_until(answers, f"nothing listens on {target}")


def _wait_until(condition: Callable[[], bool], failure: str) -> None:
    deadline_s = time.monotonic() + START_S_MAX
    while not condition():
        if time.monotonic() > deadline_s:
            raise BenchError(f"{failure} within {START_S_MAX:.0f} s")
        time.sleep(0.02)


def _inet_target() -> str:
    """A port on the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"inet:127.0.0.1:{probe.getsockname()[1]}"


def _who_am_i() -> tuple[str, str]:
    return pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(os.getgid()).gr_name


# --- /proc ------------------------------------------------------------------------------------------------------------


def _stat(task: int | str) -> list[str]:
    """The fields of /proc/PID/stat or /proc/PID/task/TID/stat behind the program's name, the state first."""
    return Path(f"/proc/{task}/stat").read_text().rpartition(")")[2].split()


def _tree(pid: int) -> list[int]:
    """The process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                children.setdefault(int(_stat(int(entry.name))[1]), []).append(int(entry.name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found


def _others_cpu_s(pid: int, of: int) -> float:
    """CPU seconds of a process's threads and of the children that it has waited for, without `of`'s first thread."""
    try:
        tasks = [task for task in Path(f"/proc/{pid}/task").iterdir() if task.name != str(of)]
        nanoseconds = sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)
        return nanoseconds / 1e9 + sum(_ticks_s(_stat(pid)[13:15]))
    except OSError:
        return 0.0


def _ticks_s(ticks: list[str]) -> list[float]:
    return [int(count) / os.sysconf("SC_CLK_TCK") for count in ticks]


def _memory_bytes(pid: int, file: str, name: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
