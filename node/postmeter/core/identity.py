"""Which state directory may speak for which node: state from a backup and state on a second machine may not.

A node's name, an *incarnation* (a number that grows with every start) and the time of the last entry lie in its state
directory, and are registered in etcd: at every start and every few seconds, after they are on the disk. Rights depend
on them: older state has forgotten loans and usage, a copy would spend the same base share once more, and questions must
never be numbered twice.

What cannot be told: state from a backup that is younger than the node's last registration.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# A node is called what its certificate calls it: a host's name, and not an address.
_MACHINE = r"(?=.*[a-z])[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?"
_MACHINE_NAME = re.compile(_MACHINE)
_NODE_NAME = re.compile(_MACHINE + "(~[1-9][0-9]{0,5})?")


def is_machine_name(text: str) -> bool:
    """Whether a machine may be called so in its settings and its certificate."""
    return _MACHINE_NAME.fullmatch(text) is not None


def is_node_name(text: str) -> bool:
    """Whether a node may be called so: like its machine, or mx1~2, for the second node that the machine mx1 is."""
    return _NODE_NAME.fullmatch(text) is not None


def machine_of(node: str) -> str:
    """The name of a node's machine."""
    return node.partition("~")[0]


def next_name(machine: str, taken: Iterable[str]) -> str:
    """What the machine's next node is called: like it, or as none was before."""
    lives = [int(node.partition("~")[2] or 1) for node in taken if machine_of(node) == machine]
    return f"{machine}~{max(lives) + 1}" if lives else machine


@dataclass(frozen=True, slots=True)
class Identity:
    """What a state directory, or etcd, says of a node. `written_ms` is on the node's own clock.

    `machine` is whatever tells machines apart, such as /etc/machine-id; `directory` a name that the state directory was
    given when it was made.
    """

    node: str
    incarnation: int
    written_ms: int
    machine: str
    directory: str = ""


def refusal(stored: Identity, machine: str, registered: Identity | None, alive: bool) -> str:
    """Why a node must not start from this state; "" if it may.

    `registered` is what etcd says, None if it has nothing or cannot be asked. `alive`: a process with this identity
    holds its lease. A node that starts without etcd counts on by itself, so its state may be ahead.
    """
    node = stored.node
    if stored.machine != machine:
        return f"this is a copy of the state of {node} from another machine: move it away to start as a new node"
    if registered is not None and registered.directory != stored.directory:
        return (
            f"{node} is known in the cluster by another state directory: bring that one back, or, if it is lost, take"
            f" {node} out with `postmeter node remove` and start again"
        )
    if registered is not None and _age(stored) < _age(registered):
        return (
            f"the state of {node} is older than what the node has done since: was it restored from a backup?"
            " Move it away to start as a new node, and take this one out with `postmeter node remove`"
        )
    if alive:
        return f"another process runs as {node}: stop it first"
    return ""


def is_impostor(own: Identity, registered: Identity | None) -> bool:
    """Whether somebody else has started as this node since: then this process must stop."""
    return registered is not None and registered.incarnation > own.incarnation


def _age(identity: Identity) -> tuple[int, int]:
    return identity.incarnation, identity.written_ms
