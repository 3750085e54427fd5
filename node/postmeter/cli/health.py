"""health: whether the agent serves, and why not.

Says what grpc.health.v1 says on the admin socket, and what is wrong. With --wait it waits until the agent serves: what
an upgrade of one host after the other waits for.
"""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from postmeter.cli.client import Client
from postmeter.cli.command import UNREACHABLE, add_command, add_socket
from postmeter.cli.output import print_json

if TYPE_CHECKING:
    from postmeter.cli.command import Commands

# Any request will do: what is wrong is told beside each answer.
_ANY = b"request=smtpd_access_policy\n\n"


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        __doc__,
        run,
        examples={
            "postmeter health": "does it serve?",
            "postmeter health --wait 30": "after a restart: wait until it does",
        },
        exits={0: "it serves", 1: "it does not", 2: "the command line is wrong", 3: UNREACHABLE},
    )
    parser.add_argument("--wait", type=_seconds, default=0.0, metavar="SECONDS", help="how long it may take to serve")
    add_socket(parser)


def run(args: argparse.Namespace) -> int:
    """Ask, and print."""
    with Client(args.socket) as client:
        serving = client.serving(args.wait)
        troubles = list(client.ask(_ANY).troubles)
    if args.json:
        print_json({"serving": serving, "troubles": troubles})
    else:
        print("\n".join(["serving" if serving else "not serving", *troubles]))
    return 0 if serving else 1


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < math.inf:
        raise ValueError
    return seconds
