"""postmeter: run the agent that limits what Postfix accepts, and ask it what it knows.

    postmeter agent [--settings FILE] [--check] ...
    postmeter lint FILE
    postmeter certs ca | node ...
    postmeter limits | override ...    change what is in etcd
    postmeter health | ask | show | top | reset | reload ...    talk to the running agent over its admin socket

Each command is a module with `add`, which describes it, and `run`, which returns the exit status. Its docstring is what
--help shows. What a command needs is imported when it runs, so that --help and lint do not wait for gRPC.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from postmeter import __version__
from postmeter.cli import agent, ask, certs, health, limits, lint, node, nodes, override, reload, reset, show, top
from postmeter.errors import AgentError, ConfigError, EtcdError, PostmeterError

_COMMANDS = (agent, lint, health, ask, show, top, limits, override, nodes, node, reset, reload, certs)

_WRONG, _FAILED, _BUG, _INTERRUPTED, _UNREAD = 2, 3, 70, 130, 141

_EXITS = """exit codes:
  0    fine
  1    the answer is no: refused, not known, or there are warnings
  2    the command line, the settings or the limits are wrong
  3    the agent or etcd cannot be reached, or it could not be done
  70   a bug; with POSTMETER_TRACEBACK=1 in the environment it shows where
  130  interrupted
  141  nobody reads the output

`postmeter COMMAND --help` shows examples."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status; `argparse` exits by itself."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args = make_parser().parse_args(argv)
        if args.run is not agent.run:
            # gRPC's core would write to standard error what is said better here. It reads this when it is imported.
            os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        status: int = args.run(args)
        print(end="", flush=True)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except PostmeterError as error:
        return _explain(error)
    except OSError as error:
        return _give_up(error)
    except Exception as error:
        if os.environ.get("POSTMETER_TRACEBACK"):
            raise
        print(f"postmeter: a bug: {type(error).__name__}: {error}; POSTMETER_TRACEBACK=1 shows where", file=sys.stderr)
        return _BUG
    return status


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="postmeter",
        description="Limits how much mail a sender may send through Postfix.",
        epilog=_EXITS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"postmeter {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add(commands)
    return parser


def _explain(error: PostmeterError) -> int:
    problems = error.problems if isinstance(error, ConfigError) else [str(error)]
    for problem in problems:
        print(f"postmeter: {problem}", file=sys.stderr)
    return _FAILED if isinstance(error, AgentError | EtcdError) else _WRONG


def _give_up(error: OSError) -> int:
    # What is still buffered must not fail once more when the interpreter ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if isinstance(error, BrokenPipeError):
        return _UNREAD
    print(f"postmeter: {error}", file=sys.stderr)
    return _FAILED
