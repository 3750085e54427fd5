"""limits: look at the limits in etcd, and change them.

For those who have their limits in etcd. `put` checks a limit as the agents do, notes who puts it and why, and never
undoes what somebody else put at the same time. FILE is a file of limits, as `postmeter lint` takes it, or has just the
one limit; - is standard input. What is put is in force on all nodes within a second, and `postmeter nodes` shows
whether they follow. etcdctl does the same, unchecked.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from difflib import unified_diff
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from postmeter.cli.command import add_command, local_settings
from postmeter.cli.output import print_json, table, visible
from postmeter.cli.store import UNREACHABLE, Store, add_etcd, add_remarks, text_of, with_store
from postmeter.core.answer import amount_text
from postmeter.core.limits import Limit, duration_text
from postmeter.defaults import FILE_BYTES_MAX, LIMIT_BYTES_MAX
from postmeter.errors import ConfigError, EtcdError

if TYPE_CHECKING:
    from postmeter.cli.command import Commands
    from postmeter.documents import Node, Plain
    from postmeter.etcd import Entry

_LIMITS, _OVERRIDES = "limits/", "overrides/"
_REMARKS = ("note", "author")


class _Written(NamedTuple):
    """A limit, and how it was written."""

    limit: Limit
    entries: dict[str, Plain]


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        __doc__,
        run,
        examples={
            "postmeter limits list": "what is there?",
            "postmeter limits diff limits.yaml": "what would change?",
            "postmeter limits put --all limits.yaml --note spring": "put what is new or different in a file",
            "postmeter limits show per-user": "one of them, as a text that can be changed and put again",
            "postmeter limits put per-user - --revision 42": "only if it is still what `show` showed",
            "postmeter limits lint": "which of them can never match, or never bind?",
        },
        exits={
            0: "done; fine; no differences",
            1: "there is no such limit, or there are problems, warnings or differences",
            2: "the limit, the settings or the command line are wrong; nothing was put",
            3: UNREACHABLE,
        },
    )
    acts = parser.add_subparsers(title="what to do", metavar="WHAT", required=True)
    listing = acts.add_parser("list", help="show all limits, and what is wrong with them")
    show = acts.add_parser("show", help="show a limit as it was put")
    put = acts.add_parser("put", help="put a limit, or all of a file")
    remove = acts.add_parser("rm", help="delete a limit; its overrides stay")
    lint = acts.add_parser("lint", help="look for mistakes, as `postmeter lint` does in a file")
    diff = acts.add_parser("diff", help="show what `put --all FILE` would change")
    for parser, act in ((listing, _list), (show, _show), (put, _put), (remove, _remove), (lint, _lint), (diff, _diff)):
        parser.set_defaults(act=act)
        add_etcd(parser)
    for parser in (show, remove):
        parser.add_argument("name", metavar="NAME", help="the limit's name")
    put.add_argument("name", nargs="?", metavar="NAME", help="the limit's name, if not --all")
    for parser in (put, diff):
        parser.add_argument("file", type=Path, metavar="FILE", help="a file, or - for standard input")
    put.add_argument("--all", action="store_true", help="all limits of FILE; others are left as they are")
    put.add_argument(
        "--revision", type=int, metavar="N", help="only if it is still at this revision, see `show`; 0: if it is new"
    )
    add_remarks(put)
    lint.add_argument("--no-postfix", action="store_true", help="do not look at the Postfix of this machine")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    return with_store(args, partial(args.act, args))


# --- looking ----------------------------------------------------------------------------------------------------------


async def _list(args: argparse.Namespace, store: Store) -> int:
    entries = await store.list(_LIMITS) | await store.list(_OVERRIDES)
    limits, problems = _in_force(entries)
    found = [(limit, entries[_LIMITS + limit.name]) for limit in limits]
    if args.json:
        rows = [
            {
                "name": limit.name,
                "text": text_of(entry),
                "overrides": len(limit.overrides),
                "revision": entry.mod_revision,
                "note": limit.note,
                "author": limit.author,
            }
            for limit, entry in found
        ]
        print_json({"limits": rows, "problems": _problem_rows(problems)})
        return 1 if problems else 0
    cells = [
        [
            *(limit.name, str(limit.key), _max_text(limit)),
            *(str(len(limit.overrides)), str(entry.mod_revision)),
            *(visible(limit.author), visible(limit.note)),
        ]
        for limit, entry in found
    ]
    columns = ("LIMIT", "KEY", "MAX", ">OVERRIDES", ">REVISION", "AUTHOR", "NOTE")
    print("\n".join(table(columns, cells)) if cells else "there are no limits")
    _complain(problems)
    return 1 if problems else 0


async def _show(args: argparse.Namespace, store: Store) -> int:
    from postmeter.documents import printable
    from postmeter.etcd_limits import parse_limit

    entry = await store.get(_LIMITS + args.name)
    if entry is None:
        return _unknown(args.name)
    problems: list[str] = []
    try:
        parse_limit(args.name, text_of(entry))
    except ConfigError as error:
        problems = error.problems
    if args.json:
        found = {"name": args.name, "text": text_of(entry), "revision": entry.mod_revision, "problems": problems}
        print_json(found)
        return 1 if problems else 0
    print(f"# limit {args.name}, revision {entry.mod_revision}")
    print("\n".join(map(printable, text_of(entry).rstrip("\n").split("\n"))))
    _complain([(args.name, problem) for problem in problems])
    return 1 if problems else 0


async def _lint(args: argparse.Namespace, store: Store) -> int:
    from postmeter.lint import lint
    from postmeter.settings import read_settings
    from postmeter.wiring import read_postconf

    limits, problems = _in_force(await store.list(_LIMITS) | await store.list(_OVERRIDES))
    settings = read_settings(args.settings) if args.settings else local_settings()
    findings = lint(limits, settings, None if args.no_postfix else read_postconf(), time.time())
    if args.json:
        found = [{"severity": each.severity, "text": each.text} for each in findings]
        print_json({"problems": _problem_rows(problems), "findings": found})
    else:
        print("\n".join(f"{each.severity}: {visible(each.text)}" for each in findings) or "nothing found")
        _complain(problems)
    return 1 if problems or any(each.severity == "warning" for each in findings) else 0


async def _diff(args: argparse.Namespace, store: Store) -> int:
    wanted = _read_file(args.file, None)
    there = {key.removeprefix(_LIMITS): text_of(entry) for key, entry in (await store.list(_LIMITS)).items()}
    different = []
    for name in sorted(wanted.keys() | there.keys()):
        mine = wanted.get(name)
        if mine is None or not _is_there(mine.limit, there.get(name)):
            different.append({"name": name, "file": mine and _text(mine.entries), "etcd": there.get(name)})
    if args.json:
        print_json({"different": different})
    else:
        print("\n".join(_difference(**each) for each in different) or "no differences")
    return 1 if different else 0


def _difference(name: str | None, file: str | None, etcd: str | None) -> str:
    if etcd is None:
        return f"{name}: only in the file"
    if file is None:
        return f"{visible(name or '')}: only in etcd, where `put --all` leaves it"
    try:
        etcd = _text(_entries(etcd))
    except ConfigError:
        return f"{name}: what is in etcd is refused"
    lines = unified_diff(etcd.splitlines(), file.splitlines(), f"etcd/{name}", f"file/{name}", n=0, lineterm="")
    return "\n".join(line for line in lines if not line.startswith("@@"))


# --- changing ---------------------------------------------------------------------------------------------------------


async def _put(args: argparse.Namespace, store: Store) -> int:
    if args.all == (args.name is not None) or (args.all and args.revision is not None):
        raise ConfigError(["name one limit, with or without --revision, or all of a file with --all"])
    wanted = _read_file(args.file, args.name)
    values = {name: _value(written, args) for name, written in wanted.items()}
    done: dict[str, list[str]] = {"put": [], "unchanged": []}
    for name, value in values.items():
        entry = await store.get(_LIMITS + name)
        revision = entry.mod_revision if entry else 0
        if args.revision not in (None, revision):
            raise EtcdError(f"{name} is at revision {revision}: somebody has changed it; look at it, and do it again")
        if entry and not args.note and _is_there(wanted[name].limit, text_of(entry)):
            done["unchanged"].append(name)
        else:
            await store.swap(_LIMITS + name, value, revision)
            done["put"].append(name)
            _warn(wanted[name].limit, await store.list(f"{_OVERRIDES}{name}/"))
    if args.json:
        print_json(done)
    else:
        print("\n".join(f"{what}: {name}" for what, names in done.items() for name in names))
    return 0


async def _remove(args: argparse.Namespace, store: Store) -> int:
    entry = await store.get(_LIMITS + args.name)
    if entry is None:
        return _unknown(args.name)
    await store.swap(_LIMITS + args.name, None, entry.mod_revision)
    left = len(await store.list(f"{_OVERRIDES}{args.name}/"))
    if args.json:
        print_json({"deleted": args.name, "overrides": left})
    else:
        print(f"deleted: {visible(args.name)}" + (f"; its overrides stay: {left}" if left else ""))
    return 0


def _warn(limit: Limit, overrides: Mapping[str, Entry]) -> None:
    """Tell of overrides that are wrong for the limit as it is now."""
    from postmeter.etcd_limits import parse_override

    wrong = 0
    for key, entry in overrides.items():
        try:
            parse_override(limit, key.removeprefix(f"{_OVERRIDES}{limit.name}/"), text_of(entry))
        except ConfigError:
            wrong += 1
    if wrong:
        advice = f"`postmeter override list {limit.name}` shows which"
        print(f"postmeter: {limit.name}: refused overrides: {wrong}; {advice}", file=sys.stderr)


def _value(written: _Written, args: argparse.Namespace) -> str:
    remarks = {"note": args.note or written.limit.note, "author": args.author}
    value = _text(written.entries, {name: remark for name, remark in remarks.items() if remark})
    if len(value.encode()) > LIMIT_BYTES_MAX:
        wrong = f"{written.limit.name}: has more than {LIMIT_BYTES_MAX} bytes"
        raise ConfigError([f"{wrong}; put its overrides with `postmeter override put`"])
    return value


# --- limits as texts --------------------------------------------------------------------------------------------------


def _read_file(path: Path, name: str | None) -> dict[str, _Written]:
    """The limits of a file, or one of them, which may be all that the file has. Raises ConfigError."""
    from postmeter.documents import Problems, compose, decode, fields, mapping, plain, read_text
    from postmeter.limits_document import read_limit

    source = "standard input" if str(path) == "-" else str(path)
    text = decode(sys.stdin.buffer.read(FILE_BYTES_MAX + 1), source) if str(path) == "-" else read_text(path)
    problems = Problems(source)
    root = compose(text, problems)
    nodes: dict[str, Node] = {}
    if name is None or (isinstance(root.value, dict) and "limits" in root.value):
        entries = fields(root, ("limits",), {"limits": "limits: and below it, indented, the limits"})
        nodes = mapping(entries["limits"]) if "limits" in entries else {}
        if name is not None and name not in nodes:
            raise ConfigError([f"{source}: has no limit {name}; it has {', '.join(nodes) or 'none'}"])
    else:
        nodes = {name: root}
    written = {}
    for each in nodes if name is None else (name,):
        entries_of = plain(nodes[each])
        written[each] = _Written(read_limit(each, nodes[each]), entries_of if isinstance(entries_of, dict) else {})
    problems.check()
    return written


def _entries(text: str) -> dict[str, Plain]:
    """A limit as it was written. Raises ConfigError."""
    from postmeter.documents import Problems, compose, plain

    entries = plain(compose(text, Problems("")))
    return entries if isinstance(entries, dict) else {}


def _text(entries: Mapping[str, Plain], remarks: Mapping[str, Plain] | None = None) -> str:
    """A limit as a text, with these remarks instead of its own."""
    from postmeter.documents import to_yaml

    return to_yaml({name: value for name, value in entries.items() if name not in _REMARKS} | dict(remarks or {}))


def _is_there(limit: Limit, text: str | None) -> bool:
    """Whether a text says the same as a limit, but for remarks."""
    from postmeter.etcd_limits import parse_limit

    try:
        return text is not None and _bare(parse_limit(limit.name, text)) == _bare(limit)
    except ConfigError:
        return False


def _bare(limit: Limit) -> Limit:
    return replace(limit, note="", author="")


def _in_force(entries: Mapping[str, Entry]) -> tuple[list[Limit], list[tuple[str, str]]]:
    """The limits that an agent would go by, and what it would refuse."""
    from postmeter.etcd_limits import EtcdLimits

    limits = EtcdLimits()
    limits.apply({key: entry.value for key, entry in entries.items()})
    while limits.settle(1_000):
        pass
    return limits.take(time.time()).limits or [], list(limits.problems())


# --- words ------------------------------------------------------------------------------------------------------------


def _max_text(limit: Limit) -> str:
    windows = (
        f"{amount_text(limit.count, most)} {limit.count} per {duration_text(window_ms)}"
        for window_ms, most in limit.windows.items()
    )
    return ", ".join(windows)


def _unknown(name: str) -> int:
    print(f"postmeter: there is no limit {visible(name)}; `postmeter limits list` shows all", file=sys.stderr)
    return 1


def _complain(problems: Iterable[tuple[str, str]]) -> None:
    for key, problem in problems:
        print(f"postmeter: {visible(key)}: {visible(problem)}", file=sys.stderr)


def _problem_rows(problems: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"key": key, "problem": problem} for key, problem in problems]
