"""nodes: who is in the cluster, and how they are.

Asks the agent on this machine what it knows of all nodes: from etcd, and from what they said to it. LENT and BORROWED
are in percent of the base shares of what rights have moved on. CLOCK is how far a node's clock is ahead of the one
here; no cap depends on it. Below stands who has not acknowledged what this node handed over: after a drain, let the
agent run until nobody is named.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from postmeter.cli.client import Client
from postmeter.cli.command import UNREACHABLE, add_command, add_socket
from postmeter.cli.output import print_json, table, visible
from postmeter.core.limits import duration_text
from postmeter.defaults import FRESH_MS

if TYPE_CHECKING:
    from postmeter.cli.command import Commands
    from postmeter.v1 import control_pb2 as pb

_COLUMNS = (
    "NODE", "STATE", "ALIVE", "VERSION", ">GENERATION", ">LIMITS", ">REFUSED", ">LENT", ">BORROWED", ">REACHED",
    ">CLOCK", "ADDRESS",
)  # fmt: skip


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        __doc__,
        run,
        examples={
            "postmeter nodes": "is everybody there, and at the same revision of the limits?",
            "postmeter nodes --json | jq -r '.nodes[] | select(.alive | not).id'": "who is not?",
        },
        exits={
            0: "all members are alive and well",
            1: "some are not, or this agent is in no cluster",
            2: "the command line is wrong",
            3: UNREACHABLE,
        },
    )
    add_socket(parser)


def run(args: argparse.Namespace) -> int:
    """Ask, and print the table."""
    with Client(args.socket) as client:
        reply = client.nodes()
    well = bool(reply.nodes) and all(
        node.alive and not node.troubles and not node.refused for node in reply.nodes if node.state == "member"
    )
    if args.json:
        print_json(reply)
        return 0 if well else 1
    print("\n".join(table(_COLUMNS, map(_cells, reply.nodes))))
    print(f"generation {reply.generation} of the roster ({visible(reply.last)}), revision {reply.revision} of etcd")
    for node in reply.nodes:
        for trouble in node.troubles:
            print(f"{node.id}: {visible(trouble)}")
        if node.changing and node.state == "member":
            print(f"{node.id}: rises to its shares when nobody can be spending by the roster before")
        if node.awaits:
            print(f"{node.id}: what it handed over is not acknowledged yet by {', '.join(node.awaits)}")
    return 0 if well else 1


def _cells(node: pb.Node) -> list[str]:
    reached = "here" if node.self else "never"
    clock = ""
    if node.HasField("reached_ms"):
        reached = "now" if node.reached_ms < FRESH_MS else duration_text(node.reached_ms) + " ago"
        clock = f"{node.ahead_ms / 1000:+.1f}s"
    return [
        node.id,
        node.state,
        "yes" if node.alive else "no",
        visible(node.version) or "?",
        str(node.generation),
        str(node.revision),
        str(node.refused),
        f"{node.lent_percent:.0f}%",
        f"{node.borrowed_percent:.0f}%",
        reached,
        clock,
        visible(node.address),
    ]
