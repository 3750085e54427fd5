"""mailhost - a whole mail server in a temporary directory.

NAME
    MailHost, Dovecot - a private Postfix 3.7 with SASL logins, for tests
    SmtpClient - a sender that says what it was told at each step

SYNOPSIS
    with MailHost(directory, policy="inet:127.0.0.1:10040") as host:
        with host.submission("alice@example.org") as alice:
            outcome = alice.send(["bob@remote.test"])
            assert (250, []) == (outcome.code, outcome.refused)

DESCRIPTION
    A MailHost owns everything that it needs under one directory: Postfix's configuration, queue, data and log, and a
    Dovecot that knows the users. It listens on free ports of 127.0.0.1, trusts no network by default, delivers nothing
    (the discard transport), and asks no DNS. The daemons run chrooted where Debian's do. The restriction lists are read
    from wiring.cf beside this file: what the README recommends is what is tested.

    Mail counts as accepted when Postfix said "queued as" at the end of the message.

    mail domains of the host
        local.test      user1 and user2 exist; to others Postfix says 550 5.1.1 of its own accord
        anything else   relayed for logged-in users, refused to strangers; a recipient refused@... is always refused
    message contents
        a header "X-Refuse: yes" makes cleanup(8) refuse the message after end of data

    Only processes that were started here are ended: `postfix -c DIR abort`, and Dovecot by its process id.

DIAGNOSTICS
    HostError with the log's end, when something does not start. unavailable() says why hosts cannot run here at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pwd
import random
import re
import shutil
import smtplib
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

WIRING = Path(__file__).with_name("wiring.cf")

# Where the README's lines say that the services are; each is replaced by where the test runs it.
POSTMETER = "inet:127.0.0.1:10040"
POSTGREY = "inet:127.0.0.1:10023"
POLICYD_WEIGHT = "inet:127.0.0.1:12525"

PASSWORD = "letter-box"
USERS = (
    "alice@example.org",
    "bob@example.org",
    "carol@example.org",
    "dave@example.net",
    *(f"load{number}@example.com" for number in range(64)),
)

# How long anything may take to start or to end; far above what it takes, so that a busy machine fails no test.
PATIENCE_S = 30.0

# The services of Debian 12's master.cf that mail needs which is received and thrown away, chrooted where Debian's are.
MASTER_CF = """\
127.0.0.1:{smtp_port} inet n - y - - smtpd
127.0.0.1:{submission_port} inet n - y - - smtpd
    -o syslog_name=postfix/submission
    -o smtpd_sasl_auth_enable=yes
pickup    unix  n       -       y       60      1       pickup
cleanup   unix  n       -       y       -       0       cleanup
qmgr      unix  n       -       n       300     1       qmgr
rewrite   unix  -       -       y       -       -       trivial-rewrite
bounce    unix  -       -       y       -       0       bounce
defer     unix  -       -       y       -       0       bounce
trace     unix  -       -       y       -       0       bounce
showq     unix  n       -       y       -       -       showq
discard   unix  -       -       y       -       -       discard
anvil     unix  -       -       y       -       1       anvil
postlog   unix-dgram n  -       n       -       1       postlogd
"""

MAIN_CF = """\
compatibility_level = 3.6
config_directory = {directory}/etc
queue_directory = {directory}/queue
data_directory = {directory}/data
maillog_file = {directory}/mail.log
maillog_file_prefixes = {directory}
myhostname = mx.local.test
mydestination =
local_recipient_maps =
alias_maps =
alias_database =
virtual_mailbox_domains = local.test
virtual_mailbox_maps = inline:{{ user1@local.test=1, user2@local.test=1 }}
virtual_transport = discard:
default_transport = discard:
header_checks = regexp:{directory}/etc/header_checks
inet_interfaces = loopback-only
# All, or Postfix believes no IPv6 address that a test pretends to come from; it listens on 127.0.0.1 only.
inet_protocols = all
# Nobody is trusted for his address alone, and a test may pretend to come from any.
mynetworks = 192.0.2.240/28
smtpd_authorized_xclient_hosts = 127.0.0.1
smtpd_sasl_type = dovecot
smtpd_sasl_path = private/auth
broken_sasl_auth_clients = no
# No DNS, no waiting, no punishment for the errors that tests provoke.
smtpd_peername_lookup = no
smtpd_error_sleep_time = 0
smtpd_soft_error_limit = 10000
smtpd_hard_error_limit = 10000
smtpd_client_connection_count_limit = 0
message_size_limit = 52428800
"""

HEADER_CHECKS = """\
/^X-Refuse:/ REJECT not this one
# Into the log with what other policy services prepend: the message itself is thrown away.
/^X-(Greylist|policyd-weight):/ WARN
"""

DOVECOT_CONF = """\
base_dir = {directory}/dovecot
state_dir = {directory}/dovecot
log_path = {directory}/dovecot.log
instance_name = {directory}
protocols =
ssl = no
disable_plaintext_auth = no
auth_mechanisms = plain login
# Names reach Postfix as the client wrote them, as with many auth backends, while the lookup ignores case.
auth_username_format = %u
auth_failure_delay = 0
passdb {{
  driver = passwd-file
  args = scheme=PLAIN username_format=%Lu {directory}/etc/users
}}
userdb {{
  driver = static
  args = uid=nobody gid=nogroup home=/nonexistent
}}
service auth {{
  unix_listener {directory}/queue/private/auth {{
    mode = 0660
    user = postfix
    group = postfix
  }}
}}
service stats {{
  unix_listener stats-writer {{
    mode = 0600
  }}
}}
"""


class HostError(Exception):
    """Something of the mail host does not start or stop; the message ends with the end of its log."""


def unavailable(*commands: str) -> str | None:
    """Why mail hosts (and the commands named) cannot run on this machine, or None if they can."""
    needed = ("postfix", "dovecot", *commands)
    missing = [command for command in needed if shutil.which(command, path=search_path()) is None]
    if missing:
        return f"needs {', '.join(missing)}: run tests/packages.sh as root"
    if os.geteuid() != 0:
        return "needs root: Postfix starts only as root, and changes to its own users"
    return None


def search_path() -> str:
    """Where commands are looked for: daemons of Debian lie in /usr/sbin, which not every PATH has."""
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on, all different.

    From below the range that the kernel gives to outgoing connections (32768 and up): none of those takes one of them
    between this question and the daemon's bind.
    """
    free: list[int] = []
    for port in random.sample(range(12000, 32000), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            free.append(port)
        if len(free) == count:
            return free
    raise HostError(f"no {count} free ports among 1000 tried")


def wait_until(what: str, happened: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    """Return as soon as `happened` says so. For what sends no event: a file, a socket, another process's port."""
    deadline = time.monotonic() + patience_s
    while not happened():
        if time.monotonic() > deadline:
            raise HostError(f"{what}: not within {patience_s:.0f} s")
        time.sleep(0.005)


def answers(address: str | tuple[str, int]) -> bool:
    """Whether somebody accepts connections at (host, port), or at the path of a unix socket."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as probe:
        return probe.connect_ex(address) == 0


def ended(pid: str) -> bool:
    """Whether a process runs no more, though nobody may have asked for its exit status yet."""
    try:
        return "\nState:\tZ" in Path("/proc", pid, "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def run(*command: str | Path, ok: tuple[int, ...] = (0,)) -> str:
    """Run a command to its end, and return its output. HostError if its exit status is not one of `ok`."""
    done = subprocess.run(
        command,
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, "PATH": search_path()},
    )
    if done.returncode not in ok:
        raise HostError(f"{' '.join(map(str, command))}: exit {done.returncode}: {done.stdout}")
    return done.stdout


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one message: the reply that settled it, and the recipients refused on the way.

    stage is where `code` and `text` were said: MAIL, RCPT (none of the recipients was accepted), DATA, or END.
    """

    stage: str
    code: int
    text: str
    refused: dict[str, tuple[int, str]]

    @property
    def accepted(self) -> bool:
        """Whether Postfix took responsibility for the message."""
        return self.stage == "END" and self.code == 250

    @property
    def refused_for_rate(self) -> bool:
        """Whether the message was refused as Postmeter refuses for a while: 450 4.7.1."""
        return self.code == 450 and self.text.startswith("4.7.1 ")


class SmtpClient:
    """A sender's connection. Any of user and address may be None: not logged in, the address as it is."""

    def __init__(self, port: int, user: str | None = None, address: str | None = None, helo: str = "client.test"):
        self.user = user
        self.smtp = smtplib.SMTP("127.0.0.1", port, local_hostname=helo, timeout=PATIENCE_S)
        try:
            if address is not None:
                self.pretend(address)
            self.smtp.ehlo()
            if user is not None:
                self.smtp.login(user, PASSWORD)
        except BaseException:
            self.smtp.close()
            raise

    def pretend(self, address: str) -> None:
        """Make Postfix believe that the client's address is this one (XCLIENT)."""
        self.smtp.ehlo()
        prefix = "IPV6:" if ":" in address else ""
        code, text = self.smtp.docmd("XCLIENT", f"NAME=[UNAVAILABLE] ADDR={prefix}{address}")
        if code != 220:
            raise HostError(f"XCLIENT refused: {code} {text!r}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.hang_up()

    def close(self) -> None:
        """Say goodbye; a server that is gone already is no error."""
        with contextlib.suppress(smtplib.SMTPException, OSError):
            self.smtp.quit()
        self.hang_up()

    def hang_up(self) -> None:
        """Break the connection, wherever it stands."""
        self.smtp.close()

    def command(self, line: str) -> tuple[int, str]:
        """Send one command, and return its reply."""
        code, text = self.smtp.docmd(line)
        return code, text.decode("utf-8", "replace")

    def send(
        self,
        recipients: Sequence[str] = ("somebody@remote.test",),
        *,
        sender: str | None = None,
        body: str = "hello",
        headers: Mapping[str, str] | None = None,
    ) -> Outcome:
        """Send one message, and say what became of it. The connection is ready for the next one afterwards."""
        refused: dict[str, tuple[int, str]] = {}
        code, text = self.command(f"MAIL FROM:<{self.user or 'stranger@remote.test' if sender is None else sender}>")
        if code != 250:
            return self._abandon("MAIL", code, text, refused)
        for recipient in recipients:
            code, text = self.command(f"RCPT TO:<{recipient}>")
            if code != 250:
                refused[recipient] = (code, text)
        if len(refused) == len(recipients):
            return self._abandon("RCPT", code, text, refused)
        stage, code, text = self._data(body, headers or {})
        return Outcome(stage, code, text, refused) if code == 250 else self._abandon(stage, code, text, refused)

    def data_again(self, body: str = "hello") -> Outcome:
        """Send DATA and a message in the open transaction. Postfix 3.7 leaves it open when it refuses the message."""
        stage, code, text = self._data(body, {})
        return Outcome(stage, code, text, {})

    def _data(self, body: str, headers: Mapping[str, str]) -> tuple[str, int, str]:
        code, text = self.command("DATA")
        if code != 354:
            return "DATA", code, text
        lines = [f"{name}: {value}" for name, value in {"Subject": "test", **headers}.items()]
        self.smtp.send("\r\n".join([*lines, "", body, ".", ""]))
        code, raw = self.smtp.getreply()
        return "END", code, raw.decode("utf-8", "replace")

    def _abandon(self, stage: str, code: int, text: str, refused: dict[str, tuple[int, str]]) -> Outcome:
        if code != 421:
            self.command("RSET")
        return Outcome(stage, code, text, refused)


class Dovecot:
    """Dovecot's auth service alone: the users of `directory`/etc/users, asked by Postfix at queue/private/auth."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return when Postfix may ask."""
        (self.directory / "etc/users").write_text("".join(f"{user}:{PASSWORD}\n" for user in USERS))
        (self.directory / "etc/users").chmod(0o644)
        configuration = self.directory / "etc/dovecot.conf"
        configuration.write_text(DOVECOT_CONF.format(directory=self.directory))
        self.process = subprocess.Popen(
            ["dovecot", "-F", "-c", configuration],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PATH": search_path()},
        )
        wait_until("dovecot", self._ready)

    def stop(self) -> None:
        """Return when it has gone."""
        if self.process is None:
            return
        self.process.terminate()
        self.process.wait(PATIENCE_S)

    def _ready(self) -> bool:
        log = self.directory / "dovecot.log"
        if self.process is not None and self.process.poll() is not None:
            raise HostError(f"dovecot: exit {self.process.returncode}: {tail(log)}")
        return answers(str(self.directory / "queue/private/auth"))


class MailHost:
    """One private Postfix with its Dovecot. A context manager: running inside, no process left behind.

    policy      where the agent is: "inet:127.0.0.1:PORT" or "unix:private/NAME"
    greylist    where postgrey is; None leaves its line out
    weights     where policyd-weight is; None leaves its line out
    """

    def __init__(
        self,
        directory: Path,
        *,
        policy: str,
        greylist: str | None = None,
        weights: str | None = None,
    ) -> None:
        self.directory = directory
        self.log_path = directory / "mail.log"
        self.smtp_port, self.submission_port = free_ports(2)
        self._policy = policy
        self._peers = {POSTGREY: greylist, POLICYD_WEIGHT: weights}
        self._dovecot = Dovecot(directory)
        self._master = ""

    @property
    def private(self) -> Path:
        """The queue's private directory, where a chrooted smtpd finds unix:private/NAME."""
        return self.directory / "queue/private"

    def start(self) -> None:
        """Make the directories, and return when mail may be sent."""
        self._make_directories()
        self._write_configuration()
        run("postfix", "-c", self.directory / "etc", "start")
        self._master = (self.directory / "queue/pid/master.pid").read_text().strip()
        self._dovecot.start()
        wait_until("smtpd", lambda: answers(("127.0.0.1", self.submission_port)))

    def stop(self) -> None:
        """Return when Postfix and Dovecot are gone."""
        if self._master:
            run("postfix", "-c", self.directory / "etc", "abort")
            wait_until("postfix", lambda: ended(self._master))
        self._dovecot.stop()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            with contextlib.suppress(HostError, OSError):
                self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def submission(self, user: str, address: str | None = None) -> SmtpClient:
        """Log in at the submission service."""
        return SmtpClient(self.submission_port, user, address)

    def stranger(self, address: str | None = None, helo: str = "client.test") -> SmtpClient:
        """Connect to the service that corresponds to port 25, without logging in."""
        return SmtpClient(self.smtp_port, None, address, helo)

    def reconfigure(self, **main: str) -> None:
        """Set main.cf parameters, and return when no process works without them. No client may be connected."""
        settings = [f"{name} = {value}" for name, value in main.items()]
        run("postconf", "-c", self.directory / "etc", "-e", *settings)
        self._settle()
        before = self._smtpds()
        run("postfix", "-c", self.directory / "etc", "reload")
        # Each ends when it has heard of the reload; until then it takes connections, and works by the old settings.
        wait_until("reload", lambda: all(ended(pid) for pid in before))

    def parameter(self, name: str) -> str:
        """Ask postconf for a main.cf parameter as it stands."""
        return run("postconf", "-c", self.directory / "etc", "-h", name).strip()

    def log(self) -> str:
        """Read the mail log so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def wait_for_log(self, pattern: str) -> re.Match[str]:
        """Wait for a match in the log, and return the first: Postfix logs after it has replied."""
        found: list[re.Match[str]] = []

        def matched() -> bool:
            match = re.search(pattern, self.log())
            if match:
                found.append(match)
            return match is not None

        wait_until(f"{pattern!r} in the mail log", matched)
        return found[0]

    def _smtpds(self) -> list[str]:
        """List the process ids of the master's smtpds."""
        return run("pgrep", "--parent", self._master, "--exact", "smtpd", ok=(0, 1)).split()

    def _make_directories(self) -> None:
        owner = pwd.getpwnam("postfix")
        self.directory.chmod(0o755)  # daemons of several users pass through
        for name in ("etc", "queue", "data", "dovecot"):
            (self.directory / name).mkdir()
        os.chown(self.directory / "data", owner.pw_uid, owner.pw_gid)

    def _write_configuration(self) -> None:
        etc = self.directory / "etc"
        ports = {"smtp_port": self.smtp_port, "submission_port": self.submission_port}
        (etc / "master.cf").write_text(MASTER_CF.format(**ports))
        (etc / "main.cf").write_text(MAIN_CF.format(directory=self.directory) + self._wiring())
        (etc / "header_checks").write_text(HEADER_CHECKS)
        self._settle()

    def _settle(self) -> None:
        """Let files look old: every daemon waits before it reads one that was written just now, lest it be half."""
        for name in ("main.cf", "header_checks"):
            os.utime(self.directory / "etc" / name, (0, 0))

    def _wiring(self) -> str:
        """Make the recommended lists, with this test's services, and with a rule that refuses `refused@`."""
        text = WIRING.read_text().replace(POSTMETER, self._policy)
        for documented, actual in self._peers.items():
            line = f"    check_policy_service {documented},?\n"
            text = re.sub(line, "" if actual is None else line.replace(documented, actual).replace(",?", ","), text)
        refusing = "reject_unlisted_recipient,\n    check_recipient_access regexp:{ {/^refused@/ REJECT} },"
        assert "reject_unlisted_recipient," in text, "wiring.cf has changed: where do refused recipients go now?"
        return text.replace("reject_unlisted_recipient,", refusing)


def tail(path: Path, lines: int = 20) -> str:
    """Read the last lines of a file, for an error message."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else f"no {path}"
