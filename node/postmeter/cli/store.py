"""etcd, seen from the command line: how it is reached, who changes it, and that no change of others is lost."""

from __future__ import annotations

import argparse
import asyncio
import os
import pwd
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from postmeter.cli.command import local_settings
from postmeter.errors import ConfigError, EtcdError

if TYPE_CHECKING:
    from postmeter.etcd import Entry, Etcd
    from postmeter.settings import EtcdSettings

UNREACHABLE = "etcd cannot be reached or refused it, or somebody else changed it at the same time"


class Store:
    """The keys of Postmeter. Their names are without the prefix."""

    def __init__(self, etcd: Etcd, prefix: str) -> None:
        self._etcd = etcd
        self._prefix = prefix

    async def get(self, key: str) -> Entry | None:
        """What is under a key."""
        return await self._etcd.get(self._prefix + key)

    async def list(self, prefix: str) -> dict[str, Entry]:
        """All keys that begin with a prefix."""
        entries = (await self._etcd.get_prefix(self._prefix + prefix)).entries
        return {key.removeprefix(self._prefix): entry for key, entry in entries.items()}

    async def swap(self, key: str, value: str | None, mod_revision: int) -> None:
        """Put a value, or delete it, unless it has changed since. Raises EtcdError."""
        encoded = None if value is None else value.encode()
        if not await self._etcd.swap(self._prefix + key, encoded, mod_revision):
            raise EtcdError(f"{key}: somebody else has changed it at the same time; look at it, and do it again")


def text_of(entry: Entry) -> str:
    """A value as text."""
    return entry.value.decode("utf-8", "replace")


def add_etcd(parser: argparse.ArgumentParser) -> None:
    """The options of all commands that talk to etcd."""
    parser.add_argument(
        "--settings", type=Path, metavar="FILE", help="where etcd is; default: /etc/postmeter/postmeter.yaml"
    )
    parser.add_argument(
        "--etcd", action="append", metavar="URL", help="instead of the endpoints in the settings; may be repeated"
    )
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")


def add_remarks(parser: argparse.ArgumentParser) -> None:
    """The options of all commands that put something."""
    parser.add_argument("--note", default="", metavar="TEXT", help="why; it is put beside the value")
    parser.add_argument("--author", default=_user(), metavar="NAME", help="who; default: %(default)s")


def with_store(args: argparse.Namespace, act: Callable[[Store], Awaitable[int]]) -> int:
    """Do something with etcd. Returns the exit status."""
    settings = _settings(args)
    from postmeter.etcd import Etcd

    async def acted() -> int:
        etcd = Etcd(settings)
        try:
            return await act(Store(etcd, settings.prefix))
        finally:
            await etcd.close()

    return asyncio.run(acted())


def _settings(args: argparse.Namespace) -> EtcdSettings:
    from postmeter.settings import DEFAULT_PATH, EtcdSettings, parse_endpoint, read_settings

    settings = (read_settings(args.settings) if args.settings else local_settings()).etcd
    if args.etcd:
        endpoints = tuple(map(parse_endpoint, args.etcd))
        settings = replace(settings or EtcdSettings(()), endpoints=endpoints)
        if settings.ca is None and any(endpoint.startswith("https:") for endpoint in endpoints):
            raise ConfigError(["--etcd with https needs etcd.ca in the settings; name them with --settings"])
    if settings is None:
        where = args.settings or DEFAULT_PATH
        right = "write it there, name other settings with --settings, or an endpoint with --etcd"
        raise ConfigError([f"{where} has no etcd, or this user may not read it; {right}"])
    return settings


def _user() -> str:
    """Who is at the terminal, also behind sudo."""
    user = os.environ.get("SUDO_USER", "")
    if user:
        return user
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
