"""reload: put the limits file into force.

Makes the agent read its limits file again. No connection is dropped and nothing is forgotten. A file with problems is
refused as a whole, and the last good limits stay in force.
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


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        __doc__,
        run,
        examples={
            "postmeter reload": "after a change of the limits file",
            "postmeter lint /etc/postmeter/limits.yaml && postmeter reload": "look for mistakes first",
        },
        exits={0: "the limits are in force", 2: "the limits file or the command line is wrong", 3: UNREACHABLE},
    )
    add_socket(parser)


def run(args: argparse.Namespace) -> int:
    """Reload, and say what is in force now."""
    with Client(args.socket) as client:
        reply = client.reload()
    if args.json:
        print_json(reply)
    elif reply.problems:
        print("\n".join(reply.problems), file=sys.stderr)
        print(f"the last good limits stay in force: {reply.limits}", file=sys.stderr)
    else:
        print(f"limits in force: {reply.limits}")
    return 2 if reply.problems else 0
