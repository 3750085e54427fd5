"""override: another max for one key of a limit in etcd.

For those who have their limits in etcd. VALUE is a number (if the limit has one window), `unlimited` or `blocked`,
or one by window such as '{1h: 500, 24h: 2000}', in which the windows that are left out keep theirs. With --until it
ends by itself: that day is its last one, in UTC. KEY is spelled as the requests are counted, so Alice@Example.com
becomes alice@example.com. Who puts it and why is noted. etcdctl does the same, unchecked.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from postmeter.cli.command import add_command
from postmeter.cli.output import print_json, table, visible
from postmeter.cli.store import UNREACHABLE, Store, add_etcd, add_remarks, text_of, with_store
from postmeter.core.answer import amount_text
from postmeter.core.limits import Limit, Override, duration_text
from postmeter.core.meters import UNLIMITED
from postmeter.errors import ConfigError

if TYPE_CHECKING:
    from postmeter.cli.command import Commands
    from postmeter.documents import Plain
    from postmeter.etcd import Entry

_LIMITS, _OVERRIDES = "limits/", "overrides/"


class _Found(NamedTuple):
    """An override in etcd, in words; and why it is refused, if it is."""

    limit: str
    key: str
    max: str
    until: str
    author: str
    note: str
    problems: list[str]
    text: str


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        __doc__,
        run,
        examples={
            "postmeter override put per-user ads@example.com '{24h: 9000}' --until 2027-01-31": "more for a while",
            "postmeter override put per-user stolen@example.com blocked": "nothing at all",
            "postmeter override list per-user": "all of a limit, and what is wrong with them",
            "postmeter override rm per-user stolen@example.com": "back to what the limit says",
        },
        exits={
            0: "done; fine",
            1: "there is none, or there are problems",
            2: "there is no such limit, the value, the key, the settings or the command line are wrong",
            3: UNREACHABLE,
        },
    )
    acts = parser.add_subparsers(title="what to do", metavar="WHAT", required=True)
    put = acts.add_parser("put", help="put one")
    remove = acts.add_parser("rm", help="delete one")
    listing = acts.add_parser("list", help="show them, and what is wrong with them")
    for parser, act in ((put, _put), (remove, _remove), (listing, _list)):
        parser.set_defaults(act=act)
        add_etcd(parser)
        one = None if parser is not listing else "?"
        parser.add_argument("limit", nargs=one, metavar="LIMIT", help="the limit's name")
        parser.add_argument("key", nargs=one, metavar="KEY", help="who is counted")
    put.add_argument("value", metavar="VALUE", help="its max")
    put.add_argument("--until", metavar="DATE", help="its last day, such as 2027-01-31, or a time")
    add_remarks(put)


def run(args: argparse.Namespace) -> int:
    """Do it."""
    return with_store(args, partial(args.act, args))


async def _put(args: argparse.Namespace, store: Store) -> int:
    from postmeter.documents import Problems, compose, plain
    from postmeter.etcd_limits import parse_override
    from postmeter.limits_document import fold

    limit = await _limit(store, args.limit)
    if limit is None:
        raise ConfigError([f"there is no limit {args.limit}, or it is refused; `postmeter limits list` shows all"])
    who = fold(limit.key, args.key)
    value = plain(compose(args.value, Problems("VALUE")))
    entries = value if isinstance(value, dict) and "max" in value else {"max": value}
    remarks = {"until": args.until, "note": args.note, "author": args.author}
    entries |= {name: remark for name, remark in remarks.items() if remark}
    text = json.dumps(_with_numbers(entries), ensure_ascii=False)
    override = parse_override(limit, who, text)
    key = f"{_OVERRIDES}{limit.name}/{who}"
    entry = await store.get(key)
    await store.swap(key, text, entry.mod_revision if entry else 0)
    if args.json:
        print_json({"limit": limit.name, "key": who, "text": text})
    else:
        print(f"put: {limit.name} / {visible(who)}: {_max_text(limit, override)}")
    return 0


async def _remove(args: argparse.Namespace, store: Store) -> int:
    from postmeter.limits_document import fold

    # As it stands there, so that also what is misspelled can be deleted; else as requests are counted.
    limit, spellings = await _limit(store, args.limit), [args.key]
    if limit is not None:
        try:
            spellings.append(fold(limit.key, args.key))
        except ConfigError:
            limit = None
    for who in spellings:
        key = f"{_OVERRIDES}{args.limit}/{who}"
        entry = await store.get(key)
        if entry is not None:
            await store.swap(key, None, entry.mod_revision)
            if args.json:
                print_json({"limit": args.limit, "key": who, "text": text_of(entry)})
            else:
                print(f"deleted: {visible(args.limit)} / {visible(who)}")
            return 0
    print(f"postmeter: {visible(args.limit)} has no override for {visible(args.key)}", file=sys.stderr)
    return 1


async def _list(args: argparse.Namespace, store: Store) -> int:
    entries = await store.list(_OVERRIDES + (f"{args.limit}/" if args.limit else ""))
    limits = {name: await _limit(store, name) for name in {key.split("/")[1] for key in entries}}
    found = [each for each in _found(entries, limits) if args.key in (None, each.key)]
    if args.json:
        print_json({"overrides": [each._asdict() for each in found]})
    elif found:
        rows = [[visible(cell) for cell in each[:-2]] for each in found]
        print("\n".join(table(("LIMIT", "KEY", "MAX", "UNTIL", "AUTHOR", "NOTE"), rows)))
        for each in found:
            for problem in each.problems:
                print(f"postmeter: {visible(each.limit)} / {visible(each.key)}: {visible(problem)}", file=sys.stderr)
    else:
        print("postmeter: there are none", file=sys.stderr)
    return 0 if found and not any(each.problems for each in found) else 1


def _found(entries: Mapping[str, Entry], limits: Mapping[str, Limit | None]) -> Iterator[_Found]:
    from postmeter.etcd_limits import parse_override

    now_s = time.time()
    for name, entry in entries.items():
        limit_name, _, key = name.removeprefix(_OVERRIDES).partition("/")
        limit = limits[limit_name]
        try:
            if limit is None:
                raise ConfigError(["there is no such limit, or it is refused"])
            override = parse_override(limit, key, text_of(entry))
        except ConfigError as error:
            yield _Found(limit_name, key, "", "", "", "", error.problems, text_of(entry))
            continue
        until = ""
        if override.until_s is not None:
            until = datetime.fromtimestamp(override.until_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
            until += " (has ended)" if override.until_s <= now_s else ""
        most = _max_text(limit, override)
        yield _Found(limit_name, key, most, until, override.author, override.note, [], text_of(entry))


async def _limit(store: Store, name: str) -> Limit | None:
    """A limit of etcd; None if there is none, or none that is good."""
    from postmeter.etcd_limits import parse_limit

    entry = await store.get(_LIMITS + name)
    try:
        return entry and parse_limit(name, text_of(entry))
    except ConfigError:
        return None


def _max_text(limit: Limit, override: Override) -> str:
    words = {UNLIMITED: "unlimited", 0: "blocked"}
    alike = set(override.max.values())
    if len(alike) == 1 and alike <= words.keys():
        return words[alike.pop()]
    return ", ".join(
        f"{words.get(most) or amount_text(limit.count, most)} per {duration_text(window_ms)}"
        for window_ms, most in override.max.items()
    )


def _with_numbers(value: Plain) -> Any:
    """The value as JSON has it: what looks like a number is one."""
    if isinstance(value, dict):
        return {name: _with_numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_with_numbers(each) for each in value]
    return int(value) if re.fullmatch("0|[1-9][0-9]{0,15}", value) else value
