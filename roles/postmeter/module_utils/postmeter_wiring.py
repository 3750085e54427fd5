"""How Postfix comes to ask the policy agent, and stops asking: for the module of Ansible and that of Salt.

    apply("/etc/postmeter/postfix-before.json", "{ unix:private/postmeter, timeout=10s }",
          "/var/spool/postfix/private/postmeter", test=False)

Asking: the parameter `postmeter`, and `check_policy_service $postmeter` in the restriction lists: ahead of the first
permit in smtpd_recipient_restrictions, and first in those of data and end of data. What goes wrong is a WiringError.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess

ENTRY = "check_policy_service $postmeter"
LISTS = ("smtpd_recipient_restrictions", "smtpd_data_restrictions", "smtpd_end_of_data_restrictions")
REQUEST = b"request=smtpd_access_policy\nprotocol_state=RCPT\nprotocol_name=ESMTP\nrecipient=postmaster\n\n"
PROBE_TIMEOUT_S = 15.0


class WiringError(RuntimeError):
    """It could not be done; says why, and what Postfix is left with."""


def apply(record, service, probe, test):
    """Let Postfix ask a service that answers at `probe`; or nobody, with None for both. With `test` change nothing.

    Returns what changed: {} or the lines of main.cf before and after. `record` is a file that notes what was before.
    """
    wiring = Wiring(record)
    before, wanted = wiring.plan(service)
    if service and not test:
        ask(probe)
    if before == wanted:
        return {}
    if not test:
        (wiring.wire if service else wiring.unwire)(wanted)
    return {"before": _lines(before), "after": _lines(wanted)}


class Wiring:
    """main.cf as it is, and as it shall be."""

    def __init__(self, record):
        self.record_path = record
        self.record = json.loads(_read(record)) if os.path.exists(record) else None
        self.main_cf = os.path.join(_run("postconf", "-h", "config_directory"), "main.cf")
        self.backup = self.main_cf + ".before-postmeter"

    def plan(self, service):
        """The parameters as they are, and as they shall be; None for what is not set."""
        wanted = self._with_entries(service) if service else self._without_entries()
        return {name: self.explicit(name) for name in wanted}, wanted

    def explicit(self, name):
        """The value of a parameter in main.cf; None if it is not set there."""
        line = _run("postconf", "-n", name)
        return line.partition("=")[2].strip() if line else None

    def _with_entries(self, service):
        wanted = {"postmeter": service}
        for name in LISTS:
            value = self.explicit(name) or ""
            wanted[name] = value if ENTRY in value else _with_entry(value, ahead_of_permit=name == LISTS[0])
        return wanted

    def _without_entries(self):
        """Nothing, if it was not this that wired Postfix."""
        if self.record is None:
            return {}
        wanted = {"postmeter": self.record["parameters"].get("postmeter")}
        for name in LISTS:
            value = _without_entry(self.explicit(name) or "")
            wanted[name] = value or self.record["parameters"].get(name)
        return wanted

    def wire(self, wanted):
        """Change main.cf; if Postfix does not like it, put it back and raise WiringError."""
        parameters = self.record["parameters"] if self.record else {name: self.explicit(name) for name in wanted}
        saved = _read(self.main_cf)
        if not self.record:
            shutil.copy2(self.main_cf, self.backup)
        self._set(wanted)
        try:
            _run("postfix", "check")
        except WiringError as error:
            _write(self.main_cf, saved)
            raise WiringError(f"main.cf is as before: {error}") from None
        _write(self.record_path, json.dumps({"parameters": parameters, "digest": _digest(self.main_cf)}).encode())

    def unwire(self, wanted):
        """Put main.cf back as it was; if somebody changed it since, only take out what was put in."""
        if os.path.exists(self.backup) and _digest(self.main_cf) == self.record["digest"]:
            _write(self.main_cf, _read(self.backup))
        else:
            self._set(wanted)
        for path in (self.backup, self.record_path):
            if os.path.exists(path):
                os.unlink(path)

    def _set(self, wanted):
        set_to = [f"{name}={value}" for name, value in wanted.items() if value is not None]
        if set_to:
            _run("postconf", "-e", *set_to)
        removed = [name for name, value in wanted.items() if value is None and self.explicit(name) is not None]
        if removed:
            _run("postconf", "-X", *removed)


def ask(place):
    """What the agent says over its policy socket, a path or an address and port."""
    try:
        return _ask(place)
    except OSError as error:
        raise WiringError(
            f"the agent does not answer at {place}: {error}; Postfix was not changed. See journalctl -u postmeter, and"
            " where postmeter.socket listens"
        ) from None


def _ask(place):
    host, _, port = place.rpartition(":")
    unix = place.startswith("/")
    family = socket.AF_UNIX if unix else socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as wire:
        wire.settimeout(PROBE_TIMEOUT_S)
        wire.connect(place if unix else (host.strip("[]") or "127.0.0.1", int(port or place)))
        wire.sendall(REQUEST)
        reply = b""
        while not reply.endswith(b"\n\n"):
            data = wire.recv(4096)
            if not data:
                raise ConnectionError("it closed the connection without an answer")
            reply += data
    return reply.decode(errors="replace").strip()


def _with_entry(value, ahead_of_permit):
    if not ahead_of_permit:
        return f"{ENTRY}, {value}" if value else ENTRY
    permit = re.search(r"(?<![\w$/:.-])permit\w*", value)
    if permit:
        return f"{value[: permit.start()]}{ENTRY}, {value[permit.start() :]}"
    return f"{value.rstrip(', ')}, {ENTRY}" if value else ENTRY


def _without_entry(value):
    entry = re.escape(ENTRY)
    return re.sub(rf"{entry}\s*,?\s*|,\s*{entry}$", "", value).rstrip(", ")


def _digest(path):
    return hashlib.sha256(_read(path)).hexdigest()


def _read(path):
    with open(path, "rb") as file:
        return file.read()


def _write(path, data):
    """Write into the file that is there, so that it keeps its owner and mode."""
    with open(path, "r+b" if os.path.exists(path) else "wb") as file:
        file.write(data)
        file.truncate()


def _lines(parameters):
    return "".join(f"{name} = {value}\n" for name, value in parameters.items() if value is not None)


def _run(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise WiringError(f"{' '.join(command)} says: {done.stdout}{done.stderr}")
    return done.stdout.strip("\n")
