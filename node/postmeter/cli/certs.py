"""certs: make certificates by which the nodes of a cluster know each other.

For those who have no CA of their own. `certs ca` makes one in a directory, `certs node` a certificate for a node beside
it. Do both on a machine that is safe: who has ca.key can join the cluster. Files that are there already are never
written over, and the agents read new ones by themselves.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from postmeter.cli.command import add_command
from postmeter.cli.output import print_json
from postmeter.defaults import CERTIFICATE_DAYS_MAX, CERTIFICATE_DAYS_OF_CA, CERTIFICATE_DAYS_OF_NODE

if TYPE_CHECKING:
    from postmeter.cli.command import Commands

_SETTINGS = """
{key} is for {node} alone. Copy it there over a safe way, with {pem} and {ca}:

    install -o postmeter -g root -m 400 {node}.key /etc/postmeter/
    install -m 644 {node}.pem ca.pem /etc/postmeter/

and set in its /etc/postmeter/postmeter.yaml:

    node: {node}
    cluster:
      listen: ADDRESS:10044
      ca: /etc/postmeter/ca.pem
      certificate: /etc/postmeter/{node}.pem
      key: /etc/postmeter/{node}.key
"""


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        __doc__,
        run,
        examples={
            "postmeter certs ca /root/postmeter-ca": "once for a cluster",
            "postmeter certs node mx1 /root/postmeter-ca": "once for each node, under its name in the cluster",
            "postmeter certs node mx1 /root/postmeter-ca --address mx1.example.com --address 192.0.2.1": (
                "for programs, too, that check to which address they connect"
            ),
        },
        exits={0: "made", 2: "it is there already, cannot be written, or the command line is wrong"},
    )
    kinds = parser.add_subparsers(title="what to make", metavar="WHAT", required=True)
    authority = kinds.add_parser("ca", help="the CA of a cluster", description="Make the CA of a cluster.")
    authority.set_defaults(make=_make_authority)
    node = kinds.add_parser("node", help="a node's certificate", description="Make a node's certificate.")
    node.set_defaults(make=_make_node)
    node.add_argument("node", metavar="NODE", help="the node's name, `node` in its settings")
    for kind, days in ((authority, CERTIFICATE_DAYS_OF_CA), (node, CERTIFICATE_DAYS_OF_NODE)):
        kind.add_argument("directory", type=Path, metavar="DIR", help="where the CA is: ca.pem and ca.key")
        kind.add_argument(
            "--days", type=_days, default=days, metavar="N", help=f"how long it is valid, in days; default: {days}"
        )
        kind.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
    node.add_argument(
        "--address",
        action="append",
        default=[],
        metavar="HOST",
        help="another name or IP address in it, which nodes do not need; may be given several times",
    )


def run(args: argparse.Namespace) -> int:
    """Make it, and say what was made."""
    status: int = args.make(args)
    return status


def _make_authority(args: argparse.Namespace) -> int:
    from postmeter.certificates import make_authority

    key, pem = make_authority(args.directory, args.days)
    if args.json:
        print_json({"key": str(key), "certificate": str(pem)})
    else:
        print(
            f"made {key} and {pem}\n\nKeep {key} here. Next, for each node: postmeter certs node NODE {args.directory}"
        )
    return 0


def _make_node(args: argparse.Namespace) -> int:
    from postmeter.certificates import make_certificate

    key, pem = make_certificate(args.node, args.directory, args.address, args.days)
    if args.json:
        print_json({"key": str(key), "certificate": str(pem)})
    else:
        ca = args.directory / "ca.pem"
        print(f"made {key} and {pem}\n{_SETTINGS.format(node=args.node, key=key, pem=pem, ca=ca)}", end="")
    return 0


def _days(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= CERTIFICATE_DAYS_MAX:
        raise argparse.ArgumentTypeError(f"write a number of days, 1 to {CERTIFICATE_DAYS_MAX}")
    return int(text)
