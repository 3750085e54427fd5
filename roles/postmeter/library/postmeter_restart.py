#!/usr/bin/python
"""postmeter_restart: see DOCUMENTATION."""

from __future__ import annotations

import base64
import os

from ansible.module_utils.basic import AnsibleModule

CURRENT = "/opt/postmeter/current"
SETTINGS = "/etc/postmeter/postmeter.yaml"
JOURNAL_LINES = 20

DOCUMENTATION = r"""
module: postmeter_restart
short_description: Restart the agent, and go back to what ran before if it does not serve
description:
  - >-
    All in one step on the host, because Postfix waits meanwhile: a release that does not come up is taken back within
    seconds, and no mail is refused for it. The task fails then, and says what the journal said.
options:
  timeout:
    description: How many seconds it may take until the agent serves.
    type: int
    required: true
  release_before:
    description: What C(/opt/postmeter/current) led to before; empty if there was nothing.
    type: str
    default: ""
  settings_before:
    description: What C(/etc/postmeter/postmeter.yaml) held before, in base64; empty if there was nothing.
    type: str
    default: ""
author:
  - The Postmeter authors
"""


def main():
    """Do what the task says."""
    module = AnsibleModule(
        argument_spec={
            "timeout": {"type": "int", "required": True},
            "release_before": {"type": "str", "default": ""},
            "settings_before": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    if module.check_mode or _restart(module):
        module.exit_json(changed=True)
    failed = os.path.basename(os.path.realpath(CURRENT))
    _, journal, _ = module.run_command(
        ["journalctl", "--unit=postmeter.service", f"--lines={JOURNAL_LINES}", "--no-pager", "--output=cat"]
    )
    said = " | ".join(journal.splitlines())
    module.fail_json(
        msg=f"postmeter {failed} does not serve with these settings. {_go_back(module)} The journal said: {said}"
    )


def _restart(module):
    """Whether it serves."""
    return all(
        module.run_command(command)[0] == 0
        for command in (
            ["systemctl", "daemon-reload"],
            ["systemctl", "restart", "postmeter.service"],
            [f"{CURRENT}/bin/postmeter", "health", "--wait", str(module.params["timeout"])],
        )
    )


def _go_back(module):
    """Let run what ran, and tell how that went."""
    release = module.params["release_before"]
    if not release:
        return "Nothing ran before."
    if module.params["settings_before"]:
        with open(SETTINGS, "r+b") as file:
            file.write(base64.b64decode(module.params["settings_before"]))
            file.truncate()
    os.symlink(release, f"{CURRENT}.new")
    os.replace(f"{CURRENT}.new", CURRENT)
    if _restart(module):
        return f"{os.path.basename(release)} and the settings of before run again."
    return f"{os.path.basename(release)} and the settings of before do not serve any more either."


if __name__ == "__main__":
    main()
