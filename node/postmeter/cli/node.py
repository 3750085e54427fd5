"""node: bring a node into the cluster's roster, or take it out.

Nodes in the roster have base shares of every limit. `join` brings in the node that is asked; with `join: auto` in its
settings it comes by itself. `drain` takes one out that runs: it hands over what it has, and refuses mail on limited
meters from then on. So take Postfix off it first, and stop its agent only when `postmeter nodes` there names nobody any
more who has not acknowledged that. `remove` is for a node whose machine is down for good: the others take its share
over when nothing that it may have admitted or lent counts any longer. A restart needs none of these.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from postmeter.cli.client import Client
from postmeter.cli.command import UNREACHABLE, add_command, add_socket
from postmeter.cli.output import print_json

if TYPE_CHECKING:
    from postmeter.cli.command import Commands

_CHANGES = ("join", "drain", "remove")


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        __doc__,
        run,
        examples={
            "postmeter node drain mx3": "before mx3 is taken out of service",
            "postmeter node remove mx3": "the machine of mx3 is broken and does not run; asks whether that is so",
            "postmeter node join": "on a node with join: manual, or one that was drained",
        },
        exits={
            0: "done",
            1: "not confirmed",
            2: "the command line is wrong, or this change cannot be made now",
            3: UNREACHABLE,
        },
    )
    parser.add_argument("change", choices=_CHANGES, metavar="join|drain|remove", help="what to do")
    parser.add_argument("node", nargs="?", default="", metavar="NODE", help="which node; else the one that is asked")
    parser.add_argument("--yes", action="store_true", help="remove: the machine is down for good, do not ask")
    add_socket(parser)


def run(args: argparse.Namespace) -> int:
    """Ask the agent to do it."""
    if args.change == "remove" and not args.yes and not _is_down(args.node):
        return 1
    with Client(args.socket) as client:
        reply = client.change_roster(args.change, args.node)
    if args.json:
        print_json(reply)
    else:
        print(reply.done)
    return 0


def _is_down(node: str) -> bool:
    print(
        f"If {node or 'the node'} still runs, it goes on admitting mail while its share is given to the others: more"
        " than `max` may pass.\nIs its machine down, and will it not come back by itself? Type the name of the node: ",
        end="",
        flush=True,
    )
    if sys.stdin.readline().strip() == node != "":
        return True
    print("postmeter: nothing was changed", file=sys.stderr)
    return False
