"""top: who has used most of a limit, live with --watch.

Shows who has used most of each window of a limit; without LIMIT, the first few of all limits.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from postmeter.cli.client import Client
from postmeter.cli.command import UNREACHABLE, add_command, add_socket
from postmeter.cli.output import USAGE_COLUMNS, key_text, print_json, table, usage_cells, window_text
from postmeter.defaults import TOP_KEYS_MAX, WATCH_S_MIN

if TYPE_CHECKING:
    from postmeter.cli.command import Commands
    from postmeter.v1 import control_pb2 as pb

_KEYS, _KEYS_OF_ALL = 10, 3
_CLEAR = "\x1b[H\x1b[2J"


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        __doc__,
        run,
        examples={
            "postmeter top": "the first few of every limit",
            "postmeter top per-user -n 20 --watch 2": "twenty users, drawn again every 2 seconds until Ctrl-C",
        },
        exits={0: "fine", 2: "there is no such limit, or the command line is wrong", 3: UNREACHABLE},
    )
    parser.add_argument("limit", nargs="?", default="", metavar="LIMIT", help="the limit's name; all if there is none")
    parser.add_argument(
        "-n", type=_count, metavar="N", help=f"so many of each window (default {_KEYS}; {_KEYS_OF_ALL} without LIMIT)"
    )
    parser.add_argument(
        "--watch", type=_interval_s, metavar="SECONDS", help="draw again and again; with --json a line each time"
    )
    add_socket(parser)


def run(args: argparse.Namespace) -> int:
    """Ask, and print the tables; again and again with --watch."""
    count = args.n or (_KEYS if args.limit else _KEYS_OF_ALL)
    with Client(args.socket) as client:
        if args.watch is None:
            _draw(client.top(args.limit, count), args.json)
            return 0
        try:
            while True:
                reply = client.top(args.limit, count)
                if sys.stdout.isatty() and not args.json:
                    print(_CLEAR, end="")
                _draw(reply, args.json)
                sys.stdout.flush()
                time.sleep(args.watch)
        except KeyboardInterrupt:
            return 0


def _draw(reply: pb.TopResponse, json: bool) -> None:
    if json:
        print_json(reply)
        return
    for ranking in reply.rankings:
        print(f"{ranking.limit}: {ranking.count} per {window_text(ranking)}")
        if ranking.meters:
            rows = [[*usage_cells(meter), _part(meter), key_text(meter.key)] for meter in ranking.meters]
            print("\n".join(table((*USAGE_COLUMNS, ">OF MAX", "KEY"), rows)))
        else:
            print("nobody has used any")
        print()


def _part(meter: pb.Meter) -> str:
    return f"{100 * meter.used // meter.max} %" if meter.max else ""


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= TOP_KEYS_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {TOP_KEYS_MAX}")
    return int(text)


def _interval_s(text: str) -> float:
    try:
        interval_s = float(text.removesuffix("s"))
    except ValueError:
        interval_s = 0.0
    if not WATCH_S_MIN <= interval_s <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from {WATCH_S_MIN:g} to 86400")
    return interval_s
