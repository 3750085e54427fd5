"""Where Postfix asks policy services, as postconf(1) tells it: the lists in main.cf, and what master.cf puts over them.

`parse_postconf` takes the output of `postconf -n -x`, `postconf -P -x` (which have `$name` expanded) and
`postconf -h mail_version`; `read_postconf` runs these. MAIL_CONFIG in the environment names another configuration, as
it does for Postfix itself. Seen are check_policy_service entries with and without braces, also in restriction classes;
not seen are those in access(5) tables.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from postmeter.core.conditions import parse_address
from postmeter.core.request import END_OF_MESSAGE
from postmeter.settings import Listener

# The restriction lists that are gone through at each stage, with smtpd_delay_reject = yes. The first is where to add.
LISTS = {
    "RCPT": tuple(f"smtpd_{name}_restrictions" for name in ("recipient", "relay", "sender", "helo", "client")),
    END_OF_MESSAGE: ("smtpd_end_of_data_restrictions",),
}

_ENTRY = re.compile(r"check_policy_service[\s,]+(?:\{[\s,]*)?([^\s,{}]+)|(?<![\w/:.-])(permit\w*)")
_POSTCONF_S_MAX = 10.0

Asked = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class PostfixStages:
    """The policy services that Postfix asks.

    `lists` maps main.cf, and each service of master.cf with restriction lists of its own, to what these lists ask:
    endpoint to the permit... restrictions ahead of it. `version` is (3, 7) for 3.7.11.
    """

    lists: Mapping[str, Mapping[str, Asked]]
    queue_directory: Path
    version: tuple[int, ...]

    def asking(self, stage: str, listeners: Iterable[Listener]) -> dict[str, tuple[str, ...] | None]:
        """For main.cf and the services: what lets mail pass before a listener is asked at a stage; None if none is."""
        asking: dict[str, tuple[str, ...] | None] = {}
        for place, lists in self.lists.items():
            asked = [entry for name in LISTS[stage] for entry in lists.get(name, {}).items()]
            ahead = [permits for endpoint, permits in asked for one in listeners if self._reaches(endpoint, one)]
            asking[place] = min(ahead, key=len, default=None)
        return asking

    def endpoint(self, listener: Listener) -> str:
        """A listener as it is written behind check_policy_service."""
        if listener.path and listener.path.is_relative_to(self.queue_directory):
            return f"unix:{listener.path.relative_to(self.queue_directory)}"
        return str(listener)

    def _reaches(self, endpoint: str, listener: Listener) -> bool:
        kind, _, place = endpoint.partition(":")
        if listener.path:
            inside = self.queue_directory / place.lstrip("/")
            return kind == "unix" and listener.path in (Path(place), inside)
        host, _, port = place.rpartition(":")
        address = parse_address(host.strip("[]"))
        same = address is None or listener.host in ("0.0.0.0", "::") or address == parse_address(listener.host)  # noqa: S104
        return kind == "inet" and port == str(listener.port) and same


def parse_postconf(main: str, services: str, version: str) -> PostfixStages:
    """The stages, from what postconf printed: see above."""
    settings = _settings(main)
    classes = settings.get("smtpd_restriction_classes", "").replace(",", " ").split()
    own = {name: _asked(value, settings, classes) for name, value in settings.items()}
    lists = {"main.cf": own}
    for place, value in _settings(services).items():
        service, _, name = place.rpartition("/")
        if any(name in names for names in LISTS.values()):
            lists.setdefault(service, dict(own))[name] = _asked(value, settings, classes)
    queue_directory = Path(settings.get("queue_directory", "/var/spool/postfix"))
    return PostfixStages(lists, queue_directory, tuple(map(int, re.findall("[0-9]+", version)[:2])))


def read_postconf() -> PostfixStages | None:
    """The stages of the Postfix on this machine; None if there is none, or if it cannot say."""
    command = shutil.which("postconf", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if command is None:
        return None
    try:
        main, services, version = (_run(command, *options) for options in (["-nx"], ["-Px"], ["-h", "mail_version"]))
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return parse_postconf(main, services, version)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, check=True, timeout=_POSTCONF_S_MAX)  # noqa: S603 (no shell)
    return done.stdout.decode()


def _settings(text: str) -> dict[str, str]:
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _asked(value: str, settings: Mapping[str, str], classes: Collection[str]) -> Asked:
    """The endpoints in a list, and in the restriction classes that it names, with the permits ahead of each."""
    words = (settings.get(word, word) if word in classes else word for word in re.split(r"([\s,]+)", value))
    found: dict[str, tuple[str, ...]] = {}
    permits: list[str] = []
    for endpoint, permit in _ENTRY.findall("".join(words)):
        if permit:
            permits.append(permit)
        else:
            found.setdefault(endpoint, tuple(permits))
    return found
