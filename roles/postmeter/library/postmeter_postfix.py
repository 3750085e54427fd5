#!/usr/bin/python
"""postmeter_postfix: see DOCUMENTATION."""

from __future__ import annotations

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.postmeter_wiring import WiringError, apply, warnings

DOCUMENTATION = r"""
module: postmeter_postfix
short_description: Let Postfix ask the policy agent, or undo that
description:
  - >-
    Sets the parameter C(postmeter) of main.cf to O(service), and puts C(check_policy_service $postmeter) into
    smtpd_recipient_restrictions ahead of the first permit, and first into smtpd_data_restrictions and
    smtpd_end_of_data_restrictions, with C(postconf -e).
  - >-
    A service of master.cf with such a list of its own asks if O(own_lists) names it; else there is a warning.
  - >-
    Before that it asks the agent something over O(probe), so that Postfix is never told to ask nobody, and copies
    main.cf and master.cf. Afterwards C(postfix check) must find nothing, or the copies are put back.
  - >-
    Undoing puts back the copy of each file that is as it was left here, and otherwise takes out only what was put in.
    Where it was not this module that let Postfix ask, nothing is touched.
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
  own_lists:
    description: Services as C(postconf -M) calls them, C(submission/inet), whose own lists shall ask, too.
    type: list
    elements: str
    default: []
  record:
    description: Where it is noted what was there before.
    type: path
    default: /etc/postmeter/postfix-before.json
author:
  - The Postmeter authors
"""


def main():
    """Do what the task says."""
    module = AnsibleModule(
        argument_spec={
            "state": {"choices": ["present", "absent"], "default": "present"},
            "service": {"type": "str"},
            "probe": {"type": "str"},
            "own_lists": {"type": "list", "elements": "str", "default": []},
            "record": {"type": "path", "default": "/etc/postmeter/postfix-before.json"},
        },
        required_if=[("state", "present", ("service", "probe"))],
        supports_check_mode=True,
    )
    present = module.params["state"] == "present"
    service, probe = (module.params["service"], module.params["probe"]) if present else (None, None)
    own_lists = module.params["own_lists"]
    try:
        changes = apply(module.params["record"], service, probe, own_lists, module.check_mode)
        for text in warnings(own_lists) if present else ():
            module.warn(text)
    except WiringError as error:
        module.fail_json(msg=f"postmeter_postfix: {error}")
    module.exit_json(changed=bool(changes), diff=changes)


if __name__ == "__main__":
    main()
