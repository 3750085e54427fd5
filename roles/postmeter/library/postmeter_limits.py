#!/usr/bin/python
"""postmeter_limits: see DOCUMENTATION."""

from __future__ import annotations

import json
import os
import tempfile

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: postmeter_limits
short_description: Put limits into etcd that are not there yet
description:
  - >-
    Puts each limit under C(PREFIXlimits/NAME), in a transaction that does nothing if there is one of that name. What an
    operator changed in etcd, or deleted and put anew, stays as it is.
  - All limits are checked before the first is put. etcdctl(1) finds etcd by ETCDCTL_... in the task's environment.
options:
  limits:
    description: The limits, by name.
    type: dict
    required: true
  prefix:
    description: What the keys begin with.
    type: str
    default: /postmeter/
  command:
    description: The command of Postmeter that checks them.
    type: path
    default: /opt/postmeter/current/bin/postmeter
author:
  - The Postmeter authors
"""


def main():
    """Do what the task says."""
    module = AnsibleModule(
        argument_spec={
            "limits": {"type": "dict", "required": True},
            "prefix": {"type": "str", "default": "/postmeter/"},
            "command": {"type": "path", "default": "/opt/postmeter/current/bin/postmeter"},
        },
        supports_check_mode=True,
    )
    limits = module.params["limits"]
    place = module.params["prefix"] + "limits/"
    etcdctl = module.get_bin_path("etcdctl", required=True)
    _check(module, limits)
    _, out, _ = module.run_command([etcdctl, "get", "--prefix", "--keys-only", place], check_rc=True)
    missing = {name: value for name, value in limits.items() if place + name not in out.split()}
    put = []
    for name, value in sorted(missing.items()):
        if module.check_mode or _put(module, etcdctl, place + name, value):
            put.append(name)
    module.exit_json(
        changed=bool(put),
        put=put,
        diff={"before": "", "after": "".join(f"{place}{name} {_text(missing[name])}\n" for name in put)},
    )


def _check(module, limits):
    """Let Postmeter itself look at the limits; before it is installed, in check mode, nobody can."""
    if not os.path.exists(module.params["command"]):
        return
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump({"limits": limits}, file)
        file.flush()
        status, out, err = module.run_command(
            [module.params["command"], "agent", "--check", "--settings", "/dev/null", "--limits", file.name]
        )
    if status != 0:
        module.fail_json(msg=f"postmeter_limits: {out}{err}Nothing was put into etcd.")


def _put(module, etcdctl, key, value):
    """Put it if it is not there; returns whether it was not."""
    # Between double quotes: what etcdctl 3.4 makes of single ones is not what was written.
    quoted = json.dumps(_text(value), ensure_ascii=False)
    transaction = f'create("{key}") = "0"\n\nput {key} {quoted}\n\n\n'
    _, out, _ = module.run_command([etcdctl, "txn"], data=transaction, check_rc=True)
    return out.startswith("SUCCESS")


def _text(value):
    """Write a limit as JSON, which is YAML."""
    return json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    main()
