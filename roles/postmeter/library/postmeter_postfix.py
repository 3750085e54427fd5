#!/usr/bin/python
"""postmeter_postfix: see DOCUMENTATION."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: postmeter_postfix
short_description: Let Postfix ask the policy agent, or undo that
description:
  - >-
    Sets the parameter C(postmeter) of main.cf to O(service), and puts C(check_policy_service $postmeter) into
    smtpd_recipient_restrictions ahead of the first permit, and first into smtpd_data_restrictions and
    smtpd_end_of_data_restrictions, with C(postconf -e).
  - >-
    Before that it asks the agent something over O(probe), so that Postfix is never told to ask nobody, and copies
    main.cf. Afterwards C(postfix check) must find nothing, or the copy is put back.
  - >-
    Undoing puts the copy back if main.cf is as it was left here, and otherwise takes out only what was put in. What was
    not put in by this module is never touched.
options:
  state:
    description: Whether Postfix shall ask the agent.
    type: str
    choices: [present, absent]
    default: present
  service:
    description: How Postfix reaches the agent, as behind C(check_policy_service). Needed if it shall.
    type: str
  probe:
    description: The same place as seen from here, a path or an address and port.
    type: str
  record:
    description: Where it is noted what was there before.
    type: path
    default: /etc/postmeter/postfix-before.json
author:
  - The Postmeter authors
"""

ENTRY = "check_policy_service $postmeter"
LISTS = ("smtpd_recipient_restrictions", "smtpd_data_restrictions", "smtpd_end_of_data_restrictions")
REQUEST = b"request=smtpd_access_policy\nprotocol_state=RCPT\nprotocol_name=ESMTP\nrecipient=postmaster\n\n"
PROBE_TIMEOUT_S = 15.0


class Wiring:
    """main.cf as it is, and as it shall be."""

    def __init__(self, module):
        self.module = module
        self.wanted = module.params["service"]
        self.record_path = module.params["record"]
        self.record = self._read_record()
        self.main_cf = os.path.join(self._run("postconf", "-h", "config_directory"), "main.cf")
        self.backup = self.main_cf + ".before-postmeter"

    def _run(self, *command):
        _, out, _ = self.module.run_command(list(command), check_rc=True)
        return out.strip("\n")

    def _read_record(self):
        if not os.path.exists(self.record_path):
            return None
        with open(self.record_path) as file:
            return json.load(file)

    def explicit(self, name):
        """The value of a parameter in main.cf; None if it is not set there."""
        line = self._run("postconf", "-n", name)
        return line.partition("=")[2].strip() if line else None

    def with_entries(self):
        """What the parameters shall be."""
        wanted = {"postmeter": self.wanted}
        for name in LISTS:
            value = self.explicit(name) or ""
            wanted[name] = value if ENTRY in value else _with_entry(value, ahead_of_permit=name == LISTS[0])
        return wanted

    def without_entries(self):
        """What the parameters shall be once Postfix no longer asks: None to remove one."""
        wanted = {"postmeter": self.record["parameters"].get("postmeter")}
        for name in LISTS:
            value = _without_entry(self.explicit(name) or "")
            wanted[name] = value or self.record["parameters"].get(name)
        return wanted

    def write(self, wanted):
        """Set and remove parameters."""
        set_to = [f"{name}={value}" for name, value in wanted.items() if value is not None]
        if set_to:
            self._run("postconf", "-e", *set_to)
        removed = [name for name, value in wanted.items() if value is None and self.explicit(name) is not None]
        if removed:
            self._run("postconf", "-X", *removed)

    def untouched(self):
        """Whether main.cf is as this module left it, and the copy of what was before is there."""
        return os.path.exists(self.backup) and _digest(self.main_cf) == self.record["digest"]

    def wire(self, wanted):
        """Change main.cf; if Postfix does not like it, put it back and fail."""
        parameters = self.record["parameters"] if self.record else {name: self.explicit(name) for name in wanted}
        saved = _read(self.main_cf)
        if not self.record:
            shutil.copy2(self.main_cf, self.backup)
        self.write(wanted)
        status, out, err = self.module.run_command(["postfix", "check"])
        if status != 0:
            _write(self.main_cf, saved)
            self.module.fail_json(msg=f"postmeter_postfix: Postfix refuses it, main.cf is as before: {out}{err}")
        _write(self.record_path, json.dumps({"parameters": parameters, "digest": _digest(self.main_cf)}).encode())

    def unwire(self, wanted):
        """Put main.cf back as it was, as far as nobody else changed it."""
        if self.untouched():
            _write(self.main_cf, _read(self.backup))
        else:
            self.write(wanted)
        for path in (self.backup, self.record_path):
            if os.path.exists(path):
                os.unlink(path)


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


def ask(place):
    """What the agent says over its policy socket. Raises OSError if it says nothing."""
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


def main():
    """Do what the task says."""
    module = AnsibleModule(
        argument_spec={
            "state": {"choices": ["present", "absent"], "default": "present"},
            "service": {"type": "str"},
            "probe": {"type": "str"},
            "record": {"type": "path", "default": "/etc/postmeter/postfix-before.json"},
        },
        required_if=[("state", "present", ("service", "probe"))],
        supports_check_mode=True,
    )
    wiring = Wiring(module)
    present = module.params["state"] == "present"
    if not present and wiring.record is None:
        module.exit_json(changed=False)
    wanted = wiring.with_entries() if present else wiring.without_entries()
    before = {name: wiring.explicit(name) for name in wanted}
    result = {
        "changed": before != wanted,
        "diff": {"before_header": wiring.main_cf, "before": _lines(before), "after": _lines(wanted)},
    }
    if present and not module.check_mode:
        try:
            result["answer"] = ask(module.params["probe"])
        except OSError as error:
            module.fail_json(
                msg=f"the agent does not answer at {module.params['probe']}: {error}; Postfix was not changed. "
                "See journalctl -u postmeter, and postmeter_listen"
            )
    if result["changed"] and not module.check_mode:
        (wiring.wire if present else wiring.unwire)(wanted)
    module.exit_json(**result)


def _lines(parameters):
    return "".join(f"{name} = {value}\n" for name, value in parameters.items() if value is not None)


if __name__ == "__main__":
    main()
