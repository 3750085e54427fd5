"""reset: forget what a key has used.

Forgets what a key has used, so that it may send again at once. Does not ask whether you are sure. It is on the disk
when the command ends. In a cluster the other nodes are told through etcd and follow at once; one that does not reach
etcd for a minute goes on counting what was used there.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from postmeter.cli.client import Client
from postmeter.cli.command import UNREACHABLE, add_command, add_socket
from postmeter.cli.output import key_text, print_json, to_key, window_text
from postmeter.cli.show import print_unknown
from postmeter.core.answer import amount_text

if TYPE_CHECKING:
    from postmeter.cli.command import Commands


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        __doc__,
        run,
        examples={
            "postmeter reset alice@example.com": "on all limits",
            "postmeter reset alice@example.com --limit per-user": "on one limit",
        },
        exits={
            0: "forgotten",
            1: "there was nothing to forget",
            2: "there is no such limit, or the command line is wrong",
            3: UNREACHABLE,
        },
    )
    parser.add_argument("key", metavar="KEY", help="who is counted")
    parser.add_argument("--limit", default="", metavar="NAME", help="only on this limit")
    add_socket(parser)


def run(args: argparse.Namespace) -> int:
    """Reset, and say what was forgotten."""
    with Client(args.socket) as client:
        reply = client.reset(to_key(args.key), args.limit)
    if args.json:
        print_json(reply)
    elif not reply.forgotten:
        print_unknown(args.key, reply.nearest)
    else:
        for each in reply.forgotten:
            amount = f"{amount_text(each.count, each.used)} {each.count}"
            print(f"forgotten: {amount} of {key_text(each.key)} on {each.limit} per {window_text(each)}")
    return 0 if reply.forgotten else 1
