"""The clock of the ledger: it goes on where it was, and never goes back."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from postmeter.clock import Clock
from postmeter.storage import Moment

BOOT_ID = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
# What may pass between two lines of a test on a busy machine.
PATIENCE_MS = 60_000


def boottime_ms() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


def wall_ms() -> int:
    return time.time_ns() // 1_000_000


def assert_about(wanted_ms: int, got_ms: int) -> None:
    """The time that was wanted, or what has passed since."""
    assert wanted_ms <= got_ms <= wanted_ms + PATIENCE_MS


def test_a_first_start_begins_with_the_time_since_boot() -> None:
    """There is nothing to go on from."""
    assert_about(boottime_ms(), Clock(None).now_ms())


def test_time_passes() -> None:
    """As CLOCK_BOOTTIME does, in milliseconds."""
    clock = Clock(None)
    before = clock.now_ms()
    end_s = time.monotonic() + 0.01
    while time.monotonic() < end_s:
        assert clock.now_ms() >= before
    assert_about(before + 10, clock.now_ms())


@pytest.mark.parametrize("wall_went_ms", [-10_000_000, 0, 10_000_000])
def test_within_one_boot_nobody_can_set_it(wall_went_ms: int) -> None:
    """Whatever was done to the wall clock between stop and start: what passed is what CLOCK_BOOTTIME says."""
    stopped = Moment(boottime_ms() + 500_000, wall_ms() - wall_went_ms, BOOT_ID, offset_ms=500_000)
    assert_about(stopped.ledger_ms, Clock(stopped).now_ms())


def test_across_a_reboot_the_wall_clock_tells_what_passed() -> None:
    """An hour off is an hour later, wherever CLOCK_BOOTTIME begins now."""
    for ledger_ms in (0, 10**12):
        stopped = Moment(ledger_ms, wall_ms() - 3_600_000, "another boot", offset_ms=12_345)
        assert_about(ledger_ms + 3_600_000, Clock(stopped).now_ms())


def test_a_wall_clock_that_went_back_does_not_take_time_back() -> None:
    """A machine without a clock of its own starts in 1970: no time has passed, and usage is kept for longer."""
    stopped = Moment(10**12, wall_ms() + 3_600_000, "another boot", offset_ms=0)
    assert_about(10**12, Clock(stopped).now_ms())


@pytest.mark.parametrize("boot_id", [BOOT_ID, "another boot"])
def test_the_stored_moment_leads_on(boot_id: str) -> None:
    """From restart to restart, with a reboot among them, the clock goes on."""
    clock = Clock(Moment(10**12, wall_ms() - 1_000, boot_id, offset_ms=7_000_000))
    for _ in range(3):
        moment = clock.moment()
        assert BOOT_ID == moment.boot_id
        assert_about(wall_ms() - PATIENCE_MS, moment.wall_ms)
        clock = Clock(moment)
        assert_about(moment.ledger_ms, clock.now_ms())
