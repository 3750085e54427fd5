"""States: Postfix asks the policy agent, or no longer does.

    wired      Postfix asks `service`, after the agent answered at `probe`
    unwired    Postfix is as it was before; nothing happens if it was not wired by this

What is done to main.cf, and how it is undone, stands in _modules/postmeter_wiring.py.
"""

# ruff: noqa: F821 - Salt puts __salt__ and __opts__ into the module

from __future__ import annotations

RECORD = "/etc/postmeter/postfix-before.json"


def wired(name, service, probe, record=RECORD):
    """Let Postfix ask the agent."""
    return _apply(name, record, service, probe)


def unwired(name, record=RECORD):
    """Let Postfix no longer ask the agent."""
    return _apply(name, record, None, None)


def _apply(name, record, service, probe):
    ret = {"name": name, "changes": {}, "result": True, "comment": "Postfix is as it should be"}
    try:
        changes = __salt__["postmeter_wiring.apply"](record, service, probe, __opts__["test"])
    except RuntimeError as error:
        return {**ret, "result": False, "comment": str(error)}
    if changes:
        ret["changes"] = changes
        ret["result"] = None if __opts__["test"] else True
        ret["comment"] = "main.cf would be changed" if __opts__["test"] else "main.cf was changed"
    return ret
