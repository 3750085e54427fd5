"""The clock of the ledger: elapsed milliseconds that go on across restarts and never go back.

Within one boot it is CLOCK_BOOTTIME, which runs while the machine sleeps and which nobody can set. Across a reboot the
time that passed is taken from the wall clock; if that went back, no time has passed.
"""

from __future__ import annotations

import time
from pathlib import Path

from postmeter.storage import Moment


class Clock:
    """Goes on from the last stored moment, if there is one."""

    def __init__(self, last: Moment | None) -> None:
        self._boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._offset_ms = 0
        if last is None:
            return
        self._offset_ms = last.offset_ms
        if last.boot_id != self._boot_id:
            passed_ms = max(0, _wall_ms() - last.wall_ms)
            self._offset_ms = last.ledger_ms + passed_ms - _boottime_ms()

    def now_ms(self) -> int:
        """The ledger's time."""
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000 + self._offset_ms

    def moment(self) -> Moment:
        """Now, as it is stored."""
        return Moment(self.now_ms(), _wall_ms(), self._boot_id, self._offset_ms)


def _boottime_ms() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000
