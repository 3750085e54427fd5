#!/usr/bin/python
"""postmeter_host: see DOCUMENTATION."""

from __future__ import annotations

import os
import pwd
import socket
from urllib.parse import urlsplit

from ansible.module_utils.basic import AnsibleModule

KNOCK_TIMEOUT_S = 5.0

DOCUMENTATION = r"""
module: postmeter_host
short_description: Find out whether a host can run the agent
description:
  - Changes nothing. Fails with all that lacks, each with the variable to be corrected.
options:
  python:
    description: The Python that the agent shall run with.
    type: path
    required: true
  endpoints:
    description: Where etcd answers; one of these must be reached.
    type: list
    elements: str
    default: []
author:
  - The Postmeter authors
"""

RETURN = r"""
venv:
  description: Whether that Python can make virtual environments.
  type: bool
  returned: success
etcdctl:
  description: Whether there is etcdctl(1).
  type: bool
  returned: success
"""


def main():
    """Do what the task says."""
    module = AnsibleModule(
        argument_spec={
            "python": {"type": "path", "required": True},
            "endpoints": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    problems = [*_lacking(module), *_unreached(module.params["endpoints"])]
    if problems:
        module.fail_json(msg="\n".join(problems))
    module.exit_json(
        changed=False,
        venv=_runs(module, "import ensurepip, venv"),
        etcdctl=module.get_bin_path("etcdctl") is not None,
    )


def _lacking(module):
    if not os.path.isdir("/run/systemd/system"):
        yield "this host is not run by systemd, as the agent is"
    if not _runs(module, "import sys; sys.exit(sys.version_info < (3, 11))"):
        yield f"postmeter_python: {module.params['python']} is no Python 3.11 or later; install one, and name it"
    try:
        pwd.getpwnam("postfix")
    except KeyError:
        yield "there is no user postfix: install Postfix first"


def _runs(module, code):
    python = module.params["python"]
    return os.access(python, os.X_OK) and module.run_command([python, "-c", code])[0] == 0


def _unreached(endpoints):
    for endpoint in endpoints:
        try:
            place = urlsplit(endpoint)
            socket.create_connection((place.hostname, place.port), KNOCK_TIMEOUT_S).close()
            return
        except OSError:
            continue
    if endpoints:
        yield (
            f"postmeter_etcd: endpoints: none of {', '.join(endpoints)} can be reached from this host; start etcd, or"
            " correct them"
        )


if __name__ == "__main__":
    main()
