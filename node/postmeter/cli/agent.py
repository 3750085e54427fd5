"""agent: run the agent that answers Postfix.

Runs in the foreground and answers Postfix, until SIGTERM. It is ready when it logs `ready`. Options take the place of
what the settings file says. On SIGHUP the limits are read again.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from postmeter.cli.command import add_command
from postmeter.cli.output import print_json
from postmeter.errors import ConfigError

if TYPE_CHECKING:
    from postmeter.cli.command import Commands
    from postmeter.settings import Settings


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        __doc__,
        run,
        examples={
            "postmeter agent": "with /etc/postmeter/postmeter.yaml, as a service manager does",
            "postmeter agent --check": "are the settings and the limits right?",
            "postmeter agent --limits limits.yaml --state-dir state --admin-socket admin.sock": "to try something",
        },
        exits={
            0: "stopped by SIGTERM with everything stored; with --check: ok",
            2: "the command line, the settings or the limits are wrong, or the agent could not go on",
        },
    )
    parser.add_argument("--settings", type=Path, metavar="FILE", help="default: /etc/postmeter/postmeter.yaml")
    parser.add_argument("--limits", type=Path, metavar="FILE", help="the limits file")
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="where usage is kept")
    parser.add_argument(
        "--listen", action="append", metavar="SPEC", help="inet:ADDRESS:PORT or unix:PATH; may be given several times"
    )
    parser.add_argument("--admin-socket", type=Path, metavar="PATH", help="where the other commands reach the agent")
    parser.add_argument(
        "--check", action="store_true", help="check the settings and the limits, print all problems, end"
    )


def run(args: argparse.Namespace) -> int:
    """Run until stopped, or check."""
    if args.check:
        return _check(args)
    settings = _settings(args)
    from postmeter.agent import run as run_agent

    return run_agent(settings)


def _settings(args: argparse.Namespace) -> Settings:
    from postmeter.settings import parse_listener, read_settings

    changes: dict[str, Any] = {}
    if args.limits:
        changes["limits"] = args.limits.absolute()
    if args.state_dir:
        changes["state_dir"] = args.state_dir.absolute()
    if args.listen:
        changes["listen"] = tuple(map(parse_listener, args.listen))
    if args.admin_socket:
        changes["admin_socket"] = parse_listener(f"unix:{args.admin_socket.absolute()}")
    return replace(read_settings(args.settings), **changes)


def _check(args: argparse.Namespace) -> int:
    from postmeter.documents import read_text
    from postmeter.limits_document import read_limits

    limits, problems = args.limits, []
    try:
        settings = _settings(args)
        # A node that follows etcd has its limits there.
        limits = args.limits if settings.etcd else settings.limits
    except ConfigError as error:
        problems += error.problems
    try:
        if limits:
            read_limits(read_text(limits), str(limits))
    except ConfigError as error:
        problems += error.problems
    if args.json:
        print_json({"problems": problems})
    else:
        print("\n".join(problems) or "ok")
    return 2 if problems else 0
