"""ask: what Postfix would be told about a message, and why.

Sends a policy request to the running agent and prints the action that Postfix would get. Nothing is charged. What is
missing is filled in: request=smtpd_access_policy, protocol_state=END-OF-MESSAGE, recipient_count=1.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from postmeter.cli.client import Client
from postmeter.cli.command import UNREACHABLE, add_command, add_socket
from postmeter.cli.output import USAGE_COLUMNS, key_text, print_json, table, to_key, usage_cells, visible, window_text
from postmeter.core.answer import amount_text
from postmeter.core.limits import duration_text
from postmeter.core.request import KNOWN
from postmeter.defaults import REQUEST_BYTES_MAX
from postmeter.errors import ConfigError

if TYPE_CHECKING:
    from postmeter.cli.command import Commands
    from postmeter.v1 import control_pb2 as pb

# Of an attribute that stands twice the first one counts, so these only fill in what is missing.
_MISSING = [b"request=smtpd_access_policy", b"protocol_state=END-OF-MESSAGE", b"recipient_count=1"]


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        __doc__,
        run,
        examples={
            "postmeter ask sasl_username=alice@example.com": "may alice send a message now?",
            "postmeter ask --explain sasl_username=alice@example.com recipient_count=50 size=20000000": (
                "and one of 20 MB to 50 recipients? How does each limit see it?"
            ),
            "postmeter ask --file request.txt protocol_state=RCPT": "a request from a file, at another stage",
        },
        exits={
            0: "the mail would pass",
            1: "it would be refused, or diverted from its recipients",
            2: "the request or the command line is wrong",
            3: UNREACHABLE,
        },
    )
    parser.add_argument(
        "attributes", nargs="*", metavar="NAME=VALUE", help="attributes; they take the place of those in a file"
    )
    parser.add_argument(
        "--file", metavar="FILE", help="a request as Postfix sends it, a name=value a line; - for input"
    )
    parser.add_argument("--explain", action="store_true", help="show how every limit sees the request")
    add_socket(parser)


def run(args: argparse.Namespace) -> int:
    """Ask, and print the answer."""
    given = [to_key(attribute) for attribute in args.attributes]
    if args.file:
        given += _read(args.file).split(b"\n\n")[0].strip(b"\n").split(b"\n")
    if not given:
        raise ConfigError(["say what to ask about, such as sasl_username=alice@example.com, or --file FILE"])
    _note_unknown(given)
    with Client(args.socket) as client:
        reply = client.ask(b"\n".join([*given, *_MISSING]) + b"\n\n")
    for trouble in reply.troubles:
        print(f"postmeter: the agent does not serve now: {trouble}", file=sys.stderr)
    if args.json:
        print_json(reply)
    else:
        print(reply.action)
        if args.explain:
            _explain(reply)
    return 1 if reply.refused else 0


def _read(name: str) -> bytes:
    try:
        with open(0 if name == "-" else name, "rb", closefd=name != "-") as file:
            data = file.read(REQUEST_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError([f"{name}: cannot be read ({error.strerror})"]) from None
    if len(data) > REQUEST_BYTES_MAX:
        raise ConfigError([f"{name}: has more than {REQUEST_BYTES_MAX} bytes, this is no policy request"])
    return data


def _note_unknown(lines: Iterable[bytes]) -> None:
    for line in lines:
        name = line.partition(b"=")[0].decode("utf-8", "surrogateescape")
        if name not in KNOWN:
            alike = difflib.get_close_matches(name, KNOWN, 1)
            hint = f"; did you mean {alike[0]}?" if alike else ""
            print(f"postmeter: Postfix sends no attribute called {visible(name)}{hint}", file=sys.stderr)


def _explain(reply: pb.AskResponse) -> None:
    rows = [_cells(limit, reading) for limit in reply.limits for reading in limit.readings]
    print()
    if rows:
        print("\n".join(table(("LIMIT", "PER", "KEY", ">COSTS", *USAGE_COLUMNS, "ACCEPTED"), rows)))
    shares = [_share(reading.meter) for limit in reply.limits for reading in limit.readings if _has_share(reading)]
    if shares:
        print("\nof these, at this node:")
        print("\n".join(table(("LIMIT", "PER", "KEY", ">BASE", ">LENT", ">BORROWED", ">USED", ">LEFT"), shares)))
    for limit in reply.limits:
        if limit.why_not:
            print(f"{limit.limit}: does not apply: {limit.why_not}")


def _has_share(reading: pb.Reading) -> bool:
    return reading.meter.HasField("share")


def _share(meter: pb.Meter) -> list[str]:
    share = meter.share
    amounts = (share.base, share.lent, share.borrowed, share.used, share.left)
    return [meter.limit, window_text(meter), key_text(meter.key), *(amount_text(meter.count, each) for each in amounts)]


def _cells(limit: pb.Explanation, reading: pb.Reading) -> list[str]:
    meter = reading.meter
    if not reading.HasField("wait_ms"):
        accepted = "never"
    else:
        accepted = f"in {duration_text(reading.wait_ms)}" if reading.wait_ms else "now"
    if reading.borrows:
        accepted = "if other nodes lend"
    if limit.shadow:
        accepted += " (in shadow: only logged)"
    cost = amount_text(meter.count, reading.amount)
    return [limit.limit, window_text(meter), key_text(meter.key), cost, *usage_cells(meter), accepted]
