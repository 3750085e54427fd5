"""What the commands have in common: how their help looks, the options of several, and this machine's settings."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from postmeter.settings import Settings

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

# Of a terminal as it opens.
HELP_CHARS = 79

UNREACHABLE = "the agent cannot be reached, or could not do it"


def add_command(
    commands: Commands,
    manual: str | None,
    run: Callable[[argparse.Namespace], int],
    *,
    examples: Mapping[str, str],
    exits: Mapping[int, str],
) -> argparse.ArgumentParser:
    """A command whose help is a small manual page, and how to `run` it.

    `manual` begins with "name: summary.", an empty line, and a description: the docstring of the command's module.
    `examples` maps a command line to what it is for, `exits` an exit code to its meaning.
    """
    heading, _, description = (manual or "").partition("\n\n")
    name, _, summary = heading.rstrip(".").partition(": ")
    epilog = ["examples:"]
    for example, purpose in examples.items():
        epilog += [f"  {purpose}", f"      {example}"]
    epilog += ["", "exit codes:", *(f"  {status}  {meaning}" for status, meaning in exits.items())]
    parser = commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, HELP_CHARS),
        epilog="\n".join(epilog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)
    return parser


def add_socket(parser: argparse.ArgumentParser) -> None:
    """The option of all commands that talk to the agent."""
    parser.add_argument(
        "--socket",
        type=Path,
        metavar="PATH",
        help="the agent's admin socket; else $POSTMETER_SOCKET, else what the settings file says",
    )


def local_settings() -> Settings:
    """The settings of the agent on this machine; the defaults if this user may not read them. Raises ConfigError."""
    from postmeter.settings import DEFAULT_PATH, Settings, read_settings

    return read_settings(DEFAULT_PATH) if os.access(DEFAULT_PATH, os.R_OK) else Settings()
