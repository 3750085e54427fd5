"""States: Postfix asks the policy agent, or no longer does.

    wired      Postfix asks `service`, after the agent answered at `probe`
    unwired    Postfix is as it was before; nothing happens if it was not wired by this

What is done to main.cf and master.cf, and how it is undone, stands in _modules/postmeter_wiring.py.
"""

# ruff: noqa: F821 - Salt puts __salt__ and __opts__ into the module

from __future__ import annotations

RECORD = "/etc/postmeter/postfix-before.json"


def wired(name, service, probe, own_lists=(), record=RECORD):
    """Let Postfix ask the agent, and warn of services with lists of their own that do not."""
    ret = _apply(name, record, service, probe, own_lists)
    return {**ret, "warnings": __salt__["postmeter_wiring.warnings"](own_lists)}


def unwired(name, record=RECORD):
    """Let Postfix no longer ask the agent."""
    return _apply(name, record, None, None, ())


def _apply(name, record, service, probe, own_lists):
    ret = {"name": name, "changes": {}, "result": True, "comment": "Postfix is as it should be"}
    try:
        changes = __salt__["postmeter_wiring.apply"](record, service, probe, own_lists, __opts__["test"])
    except RuntimeError as error:
        return {**ret, "result": False, "comment": str(error)}
    if changes:
        ret["changes"] = changes
        ret["result"] = None if __opts__["test"] else True
        ret["comment"] = "Postfix would be changed" if __opts__["test"] else "Postfix was changed"
    return ret
