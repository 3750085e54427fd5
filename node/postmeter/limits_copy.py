"""The copy of etcd's limits on this node's disk, for a start without etcd: lines of EtcdLimits, see there.

What changes is appended. When more was appended than it had at first, it is written anew, so that it stays below about
twice of what is needed. To be used from one thread at a time; raises OSError.
"""

from __future__ import annotations

import os
from pathlib import Path

# A small one need not be written anew for each change.
_APPENDED_BYTES_MIN = 64 * 1024


class LimitsCopy:
    """One file, of this process alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size = 0
        self._most = 0

    @property
    def is_due(self) -> bool:
        """Whether it is to be written anew; so it is at first."""
        return self._size >= self._most

    def read(self) -> str:
        """What it has; "" if there is none."""
        try:
            return self.path.read_text("utf-8", "replace")
        except FileNotFoundError:
            return ""

    def append(self, lines: str) -> None:
        """Add changes."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                self._size += file.write(lines)
        except OSError:
            # Nothing may follow half a line.
            self._most = 0
            raise

    def write(self, lines: str) -> None:
        """Write it anew, whole or not at all."""
        draft = self.path.with_suffix(".new")
        draft.write_text(lines, "utf-8")
        os.replace(draft, self.path)
        self._size = len(lines)
        self._most = 2 * len(lines) + _APPENDED_BYTES_MIN
