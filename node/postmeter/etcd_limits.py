"""Limits as they lie in etcd: `limits/<name>` holds one, as YAML."""

from __future__ import annotations

from postmeter.core.limits import Limit
from postmeter.documents import Problems, compose
from postmeter.errors import ConfigError
from postmeter.limits_document import read_limit
from postmeter.mirror import Update

_PREFIX = "limits/"


class EtcdLimits:
    """`limits` are in force, `refused` maps keys to what is wrong with them, `revision` is that of the last change."""

    def __init__(self) -> None:
        self.refused: dict[str, str] = {}
        self.revision = 0
        self._limits: dict[str, tuple[str, Limit]] = {}

    @property
    def limits(self) -> list[Limit]:
        """Those in force, by name."""
        return [limit for _, (_, limit) in sorted(self._limits.items())]

    def take(self, update: Update) -> bool:
        """Take changes in. Returns whether limits have to be put into force."""
        changes = {key: entry for key, entry in update.changes.items() if key.startswith(_PREFIX)}
        for key, entry in changes.items():
            self.refused.pop(key, None)
            if entry is None:
                self._limits.pop(key.removeprefix(_PREFIX), None)
                continue
            self.revision = max(self.revision, entry.mod_revision)
            try:
                self._read(key, entry.value.decode("utf-8", "replace"))
            except ConfigError as error:
                self.refused[key] = str(error)
        return bool(changes) or update.listed

    def _read(self, key: str, text: str) -> None:
        problems = Problems(key)
        name = key.removeprefix(_PREFIX)
        limit = read_limit(name, compose(text, problems))
        problems.check()
        self._limits[name] = (text, limit)

    def dump(self) -> str:
        """The texts of those in force, to be kept."""
        return "".join(f"{name}\0{text}\0" for name, (text, _) in self._limits.items())

    def load(self, text: str) -> None:
        """What `dump` gave."""
        parts = text.split("\0")[:-1]
        for name, each in zip(parts[::2], parts[1::2], strict=True):
            self._read(_PREFIX + name, each)
