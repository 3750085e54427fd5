"""How Postfix comes to ask the policy agent, and stops asking: for the module of Ansible and that of Salt.

    apply("/etc/postmeter/postfix-before.json", "{ unix:private/postmeter, timeout=10s }",
          "/var/spool/postfix/private/postmeter", ["submission/inet"], test=False)
    warnings(["submission/inet"])

Asking: the parameter `postmeter`, and `check_policy_service $postmeter` in the restriction lists: ahead of the first
permit in smtpd_recipient_restrictions, and first in those of data and end of data. What goes wrong is a WiringError.

A service of master.cf with such a list of its own (-o smtpd_recipient_restrictions=...) does not go by that of main.cf,
and asks only if it is named. Nobody but the postmaster can tell a port for submission from one where a content filter
hands mail back, which would be counted twice. `warnings` tells what does not ask.
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
# And what is missed without it.
LISTS = {
    "smtpd_recipient_restrictions": "is not refused at RCPT yet",
    "smtpd_data_restrictions": "is not refused at DATA yet",
    "smtpd_end_of_data_restrictions": "is not counted",
}
REQUEST = b"request=smtpd_access_policy\nprotocol_state=RCPT\nprotocol_name=ESMTP\nrecipient=postmaster\n\n"
PROBE_TIMEOUT_S = 15.0

_ASKS = re.compile(r"check_policy_service[\s,]+\$postmeter\b[\s,]*")
# What may end a list, but for what stands behind check_...: that is an argument.
_ENDING = re.compile(r"check_\w+[\s,]+(?:[^\s,{]*\{[^}]*\}|[^\s,]+)|(?<![\w$/:.-])(permit\w*|reject(?!\w)|\$[\w{(]+)")


class WiringError(RuntimeError):
    """It could not be done; says why, and what Postfix is left with."""


def apply(record, service, probe, own_lists, test):
    """Let Postfix ask a service that answers at `probe`; or nobody, with None for both. With `test` change nothing.

    `own_lists` names the services of master.cf whose own lists shall ask, too. Returns what changed: {} or the
    parameters before and after. `record` is a file that notes what was before.
    """
    wiring = Wiring(record)
    before, wanted = wiring.plan(service, own_lists)
    if service and not test:
        ask(probe)
    if before == wanted and (wiring.record or not service):
        return {}
    if not test:
        (wiring.wire if service else wiring.unwire)(wanted)
    return {"before": _lines(before), "after": _lines(wanted)}


def warnings(own_lists):
    """Which lists of master.cf do not ask the agent and are not named, what that means, and what to do."""
    return [
        f"{place} of master.cf does not ask the agent: mail that comes in there {LISTS[name]}. If it shall ask, name"
        f" {service} in postmeter_postfix_services; not if a content filter hands mail back there"
        for place, value in _parameters("-P").items()
        for service, _, name in [place.rpartition("/")]
        if name in LISTS and service not in own_lists and not _ASKS.search(value)
    ]


class Wiring:
    """main.cf and master.cf as they are, and as they shall be.

    What stands in master.cf is called as by postconf(1): submission/inet/smtpd_recipient_restrictions.
    """

    def __init__(self, record):
        self.record_path = record
        self.record = json.loads(_read(record)) if os.path.exists(record) else None
        directory = _run("postconf", "-h", "config_directory")
        self.main_cf, self.master_cf = (os.path.join(directory, name) for name in ("main.cf", "master.cf"))
        self.parameters = {**_parameters("-n"), **_parameters("-P")}

    def plan(self, service, own_lists):
        """The parameters as they are, and as they shall be; None for what is not set."""
        wanted = self._with_entries(service, own_lists) if service else self._without_entries()
        return {name: self.parameters.get(name) for name in wanted}, wanted

    def _with_entries(self, service, own_lists):
        for one in own_lists:
            if not _run("postconf", "-M", one):
                raise WiringError(f"postmeter_postfix_services: there is no {one} in master.cf; see postconf -M")
        own = [f"{one}/{name}" for one in own_lists for name in LISTS]
        wanted = {name: self.parameters.get(name, "") for name in [*LISTS, *(set(own) & set(self.parameters))]}
        return {
            "postmeter": service,
            **{name: value if _ASKS.search(value) else _with_entry(name, value) for name, value in wanted.items()},
        }

    def _without_entries(self):
        """Nothing, if it was not this that wired Postfix. Else nobody may ask: $postmeter will be unknown."""
        if self.record is None:
            return {}
        asking = {name: _without_entry(value) for name, value in self.parameters.items() if _ASKS.search(value)}
        before = self.record["parameters"]
        return {
            "postmeter": before.get("postmeter"),
            **{name: value if value or "/" in name else before.get(name) for name, value in asking.items()},
        }

    def wire(self, wanted):
        """Change what is to be changed; if Postfix does not like it, put it back and raise WiringError."""
        saved = {path: _read(path) for path in (self.main_cf, self.master_cf)}
        ours = list(saved)
        if self.record:
            # Once somebody else has changed a file, the copy must not come back in its place.
            parameters, ours = self.record["parameters"], [path for path in saved if self._is_ours(path)]
        elif any(map(_ASKS.search, self.parameters.values())):
            # Wired by hand, or the record was lost: what was before is all but that.
            parameters, ours = {name: _without_entry(self.parameters.get(name, "")) or None for name in wanted}, []
            parameters["postmeter"] = None
        else:
            parameters = {name: self.parameters.get(name) for name in wanted}
            for path in saved:
                shutil.copy2(path, _backup(path))
        try:
            self._set(wanted)
            _run("postfix", "check")
        except WiringError as error:
            for path, text in saved.items():
                _write(path, text)
            raise WiringError(f"main.cf and master.cf are as before: {error}") from None
        record = {"parameters": parameters, "digests": {path: _digest(path) for path in ours}}
        _write(self.record_path, json.dumps(record).encode())

    def unwire(self, wanted):
        """Put the files back as they were; of one that somebody changed since, only take out what was put in."""
        ours = [path for path in (self.main_cf, self.master_cf) if self._is_ours(path)]
        for path in ours:
            _write(path, _read(_backup(path)))
        self._set({name: value for name, value in wanted.items() if self._file(name) not in ours})
        for path in (_backup(self.main_cf), _backup(self.master_cf), self.record_path):
            if os.path.exists(path):
                os.unlink(path)

    def _file(self, name):
        return self.master_cf if "/" in name else self.main_cf

    def _is_ours(self, path):
        """Whether nobody has changed a file since it was changed here."""
        return os.path.exists(_backup(path)) and self.record["digests"].get(path) == _digest(path)

    def _set(self, wanted):
        main = {name: value for name, value in wanted.items() if "/" not in name}
        # postconf takes no white space there.
        own = {name: re.sub(r"[\s,]+", ",", value) for name, value in wanted.items() if "/" in name}
        removed = [name for name, value in main.items() if value is None and name in self.parameters]
        for option, values in (("-e", main), ("-P", own)):
            arguments = [f"{name}={value}" for name, value in values.items() if value is not None]
            if arguments:
                _run("postconf", option, *arguments)
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


def _with_entry(name, value):
    """First in a list; but that of RCPT may refuse for other reasons before it, as long as it lets nothing pass."""
    place = 0
    if name.endswith("smtpd_recipient_restrictions"):
        place = next((found.start() for found in _ENDING.finditer(value) if found[1]), len(value))
    ahead, behind = value[:place].rstrip(", \t"), value[place:]
    return ", ".join(filter(None, (ahead, ENTRY, behind)))


def _without_entry(value):
    return _ASKS.sub("", value).rstrip(", \t")


def _parameters(option):
    """What is set, as `postconf -n` (main.cf) or `postconf -P` (master.cf) tells it."""
    lines = _run("postconf", option).splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition("=") for line in lines)}


def _backup(path):
    return f"{path}.before-postmeter"


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
