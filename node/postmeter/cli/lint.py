"""lint: look for mistakes in a limits file.

Says all that is wrong with a limits file, each problem with its line; an agent would refuse the file as a whole. If
nothing is wrong, it warns of limits that can never match, can never be reached, or that the Postfix of this machine
never asks about. No agent is needed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from postmeter.cli.command import add_command, local_settings
from postmeter.cli.output import print_json
from postmeter.errors import ConfigError

if TYPE_CHECKING:
    from postmeter.cli.command import Commands
    from postmeter.lint import Finding


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        __doc__,
        run,
        examples={
            "postmeter lint /etc/postmeter/limits.yaml": "before `postmeter reload`",
            "postmeter lint --no-postfix limits.yaml": "for another machine",
        },
        exits={
            0: "nothing but notes",
            1: "there are warnings",
            2: "the file, the settings or the command line are wrong",
        },
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the limits file")
    parser.add_argument("--no-postfix", action="store_true", help="do not look at the Postfix of this machine")
    parser.add_argument("--settings", type=Path, metavar="FILE", help="the settings of the agent that it is for")


def run(args: argparse.Namespace) -> int:
    """Print what is found."""
    try:
        findings, problems = _findings(args), []
    except ConfigError as error:
        findings, problems = [], error.problems
    if args.json:
        found = [{"line": each.line, "severity": each.severity, "text": each.text} for each in findings]
        print_json({"problems": problems, "findings": found})
    else:
        lines = [f"{args.file}:{each.line}: {each.severity}: {each.text}" for each in findings]
        print("\n".join(problems + lines) or f"{args.file}: ok")
    if problems:
        return 2
    return 1 if any(each.severity == "warning" for each in findings) else 0


def _findings(args: argparse.Namespace) -> list[Finding]:
    from postmeter.documents import read_text
    from postmeter.limits_document import read_limits
    from postmeter.lint import lint
    from postmeter.settings import read_settings
    from postmeter.wiring import read_postconf

    limits = read_limits(read_text(args.file), str(args.file))
    settings = read_settings(args.settings) if args.settings else local_settings()
    return lint(limits, settings, None if args.no_postfix else read_postconf(), time.time())
