"""show: what a key has used on every limit, and when.

Shows every limit that counts the key: what it has used of each window, and a bar that tells when. A key is what a
limit counts by: a login, a domain, a sender, a client address or its network. In a cluster the figures are of all
nodes, as far as they were heard of, and the part of each is shown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from postmeter.cli.client import Client
from postmeter.cli.command import UNREACHABLE, add_command, add_socket
from postmeter.cli.output import (
    USAGE_COLUMNS,
    bar,
    key_text,
    print_json,
    table,
    to_key,
    usage_cells,
    visible,
    window_text,
)
from postmeter.core.answer import amount_text
from postmeter.core.limits import duration_text
from postmeter.defaults import FRESH_MS

if TYPE_CHECKING:
    from postmeter.cli.command import Commands
    from postmeter.v1 import control_pb2 as pb


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        __doc__,
        run,
        examples={
            "postmeter show alice@example.com": "what has alice used?",
            "postmeter show 2001:db8::25": "a client address: its network is what is counted",
            "postmeter show --json example.com | jq '.usages[].meter.left'": "what is left to a domain",
        },
        exits={0: "fine", 1: "no limit counts this key", 2: "the command line is wrong", 3: UNREACHABLE},
    )
    parser.add_argument("key", metavar="KEY", help="who is counted")
    add_socket(parser)


def run(args: argparse.Namespace) -> int:
    """Ask, and print the table."""
    with Client(args.socket) as client:
        reply = client.show(to_key(args.key))
    if args.json:
        print_json(reply)
        return 0 if reply.usages else 1
    if not reply.usages:
        print_unknown(args.key, reply.nearest)
        return 1
    meters = [usage.meter for usage in reply.usages]
    rows = [
        [meter.limit, window_text(meter), key_text(meter.key), meter.count, *usage_cells(meter)] for meter in meters
    ]
    heading, *lines = table(("LIMIT", "PER", "KEY", "COUNTS", *USAGE_COLUMNS), rows)
    print(heading)
    for usage, line in zip(reply.usages, lines, strict=True):
        print(line)
        print(f"  {window_text(usage.meter)} ago |{bar(usage.slices)}| now{' (here)' if usage.parts else ''}")
        if usage.parts:
            print("  " + ", ".join(_part(usage.meter.count, part) for part in usage.parts))
        if usage.meter.assumed:
            assumed = amount_text(usage.meter.count, usage.meter.assumed)
            print(f"  {assumed} of these are assumed, because the agent did not stop cleanly")
    return 0


def _part(count: str, part: pb.Part) -> str:
    """What one node has used, and how old that is if it is not of now."""
    used = f"{part.node} {amount_text(count, part.used)}"
    if not part.HasField("age_ms"):
        return f"{used} (or more)"
    return used if part.age_ms < FRESH_MS else f"{used} ({duration_text(part.age_ms)} ago)"


def print_unknown(key: str, nearest: Sequence[bytes]) -> None:
    """Say that nobody counts a key, and which ones are like it."""
    print(f"postmeter: no limit counts {visible(key)} at present", file=sys.stderr)
    if nearest:
        print("postmeter: there are: " + ", ".join(map(key_text, nearest)), file=sys.stderr)
