"""What a node knows, through restarts, crashes, failing disks, and changed limits."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import example, given, settings
from hypothesis import strategies as st

from postmeter import flusher as flusher_module
from postmeter import node as node_module
from postmeter.clock import Clock
from postmeter.core.meters import OVERFLOW_ROW, unflushed_max
from postmeter.errors import ConfigError, ProtocolError, StorageError
from postmeter.node import DUNNO, FAIL_SAFE, Node
from postmeter.settings import Settings
from tests.unit.support import HOUR_MS, message
from tests.unit.test_flusher import PATIENCE_S, Disk, eventually
from tests.unit.test_logs import logged

ALICE, BOB = "alice@example.com", "bob@example.com"

LIMITS = """
limits:
  per-user: {key: sasl_username, count: recipients, max: 100, per: 1h}
"""


def given_settings(directory: Path, limits: str = LIMITS, **given: Any) -> Settings:
    """Settings for a node below a directory, with these limits in its file."""
    (directory / "limits.yaml").write_text(limits)
    return Settings(state_dir=directory / "state", limits=directory / "limits.yaml", **given)


class Asked:
    """A request that a node was asked, and what it has answered so far."""

    def __init__(self, node: Node, **attributes: object) -> None:
        self.reply = node.answer(message(**attributes), "test", self._told)
        self.at_once = self.reply is not None

    def _told(self, reply: bytes) -> None:
        assert self.reply is None, "a second reply"
        self.reply = reply

    async def answer(self) -> bytes:
        """Wait for the reply."""
        await eventually(lambda: self.reply is not None)
        assert self.reply is not None
        return self.reply


async def ask(node: Node, **attributes: object) -> bytes:
    """The reply to one request."""
    return await Asked(node, **attributes).answer()


def used(node: Node, who: str = ALICE, limit: str = "per-user") -> int:
    """What the node counts, on the limit's longest window."""
    several = [meters for id, meters in node.ledger.meters.items() if id.limit == limit]
    meters = max(several, key=lambda meters: meters.id.window_ms)
    return meters.usage(meters.keys.rows.get(who), node.now_ms())


def allowance(node: Node, who: str = ALICE) -> int:
    """What usage may rise to, on the only limit."""
    [meters] = node.ledger.meters.values()
    return meters.allowance(who, node.now_ms())


@asynccontextmanager
async def running(settings: Settings, kill: bool = False) -> AsyncIterator[Node]:
    """A node that runs, and is stopped as SIGTERM does; or as kill -9 does: with nothing more written."""
    node = Node(settings)
    task = asyncio.create_task(node.run())
    await asyncio.sleep(0)
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield node
    finally:
        if kill:
            node._flusher._thread.shutdown()
            while not task.done():  # Python 3.11's wait_for may swallow one
                task.cancel()
                await asyncio.wait({task}, timeout=0.01)
        else:
            node.stop()
            await task


@contextmanager
def disk_of(node: Node) -> Iterator[Disk]:
    """The disk below a node, mended at the end."""
    disk = Disk(node._storage)
    try:
        yield disk
    finally:
        disk.close()


def play(story: Coroutine[None, None, None]) -> None:
    """Run a test that waits."""
    uvloop.run(story)


Fast = Callable[..., None]


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> Fast:
    """Give constants of the flusher other values."""

    def change(**constants: float) -> None:
        for name, value in constants.items():
            monkeypatch.setattr(flusher_module, name, value)

    return change


# --- what waits for the disk ------------------------------------------------------------------------------------------


def test_the_first_charge_waits_for_the_disk(tmp_path: Path) -> None:
    """When it is answered it is stored, and so is the mark that the state is in use; after it a few need not wait."""

    async def story() -> None:
        async with running(given_settings(tmp_path)) as node:
            with disk_of(node) as disk:
                assert disk.clean
                first = Asked(node)
                assert not first.at_once
                assert DUNNO == await first.answer()
                assert (1, False) == (disk.used(ALICE), disk.clean)
                assert Asked(node).at_once

    play(story())


def test_a_twentieth_may_be_answered_before_it_is_stored(tmp_path: Path, fast: Fast) -> None:
    """Of 100 that are 5; the sixth waits, and then all are stored. Another key, and a look, need not wait."""
    fast(FLUSH_INTERVAL_S=60.0)

    async def story() -> None:
        async with running(given_settings(tmp_path)) as node:
            await ask(node, sasl_username=BOB)
            several = [Asked(node) for _ in range(7)]
            assert [True] * 5 + [False] * 2 == [asked.at_once for asked in several]
            assert Asked(node, sasl_username=BOB).at_once
            assert Asked(node, protocol_state="RCPT").at_once
            with disk_of(node) as disk:
                assert DUNNO == await several[-1].answer()
                assert 7 == disk.used(ALICE)

    play(story())


def test_a_clean_stop_loses_nothing(tmp_path: Path) -> None:
    """What was used is still used, and nothing is assumed."""

    async def story() -> None:
        given = given_settings(tmp_path)
        async with running(given) as node:
            await ask(node, recipient_count=90)
            assert Asked(node, recipient_count=3).at_once
        async with running(given) as node:
            assert (93, 100) == (used(node), allowance(node))

    play(story())


def test_a_crash_costs_a_twentieth_for_one_window(tmp_path: Path) -> None:
    """What was not stored is covered by what is assumed used, and that is forgotten after one window."""

    async def story() -> None:
        given = given_settings(tmp_path)
        async with running(given, kill=True) as node:
            await ask(node, recipient_count=90)
            assert Asked(node, recipient_count=5).at_once
        with logged() as log:
            async with running(given) as node:
                assert 90 <= used(node) <= 95
                assert 95 == allowance(node)
                assert DUNNO == await ask(node, recipient_count=95 - used(node))
                refusal = await ask(node)
                assert b"100 of 100 recipients" in refusal
                node._clock._offset_ms += HOUR_MS + HOUR_MS // 60
                assert (0, 100) == (used(node), allowance(node))
        assert 1 == len(log.of("unclean stop"))

    play(story())


def test_crashes_add_up_and_clean_stops_do_not_forget_them(tmp_path: Path) -> None:
    """Each unclean stop within the window has its cost, also after a clean one between them."""

    async def story() -> None:
        given = given_settings(tmp_path)
        for kill, cost in ((True, 0), (False, 5), (True, 5), (True, 10), (False, 15), (False, 15)):
            async with running(given, kill=kill) as node:
                assert 100 - cost == allowance(node)
                await ask(node)

    play(story())


def test_a_crash_while_idle_costs_nothing(tmp_path: Path, fast: Fast) -> None:
    """After a while without mail everything is stored, and the state says so."""
    fast(FLUSH_INTERVAL_S=0.01, IDLE_CLEAN_S=0.05)

    async def story() -> None:
        given = given_settings(tmp_path)
        async with running(given, kill=True) as node:
            await ask(node, recipient_count=7)
            with disk_of(node) as disk:
                await eventually(lambda: disk.clean and not node.ledger.answer_unflushed)
            assert not Asked(node, protocol_state="VRFY").reply is None
        async with running(given, kill=True) as node:
            assert (7, 100) == (used(node), allowance(node))
            assert not Asked(node).at_once

    play(story())


def test_a_crash_before_the_first_charge_costs_nothing(tmp_path: Path) -> None:
    """An agent that is killed again and again while it starts does not eat up the limits."""

    async def story() -> None:
        given = given_settings(tmp_path)
        for _ in range(4):
            async with running(given, kill=True) as node:
                assert 100 == allowance(node)

    play(story())


def test_an_idle_node_sleeps(tmp_path: Path, fast: Fast, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing to store it looks once an interval whether there is something, from its start on."""
    fast(FLUSH_INTERVAL_S=60.0)
    looks = []
    is_due = flusher_module.Flusher._is_due
    monkeypatch.setattr(flusher_module.Flusher, "_is_due", lambda self: looks.append(1) or is_due(self))

    async def story() -> None:
        async with running(given_settings(tmp_path)) as node:
            for _ in range(100):
                await asyncio.sleep(0)
            await ask(node)
            for _ in range(100):
                await asyncio.sleep(0)
            assert len(looks) <= 3

    play(story())


# --- the property: any schedule of charges, flushes, crashes and failures ---------------------------------------------


@dataclass
class Twin:
    """Every message with its time, as dumb as can be. `charged` are those that were not refused."""

    windows: dict[int, int]
    admitted: list[tuple[int, str, int]] = field(default_factory=list)
    charged: list[tuple[int, str, int]] = field(default_factory=list)
    crashes_ms: list[int] = field(default_factory=list)

    def admit(self, at_ms: int, who: str, amount: int) -> None:
        """Postfix was told to let it pass: within any window's length that is never more than max."""
        self.admitted.append((at_ms, who, amount))
        for window_ms, most in self.windows.items():
            for end_ms, _, _ in self.admitted:
                within = [
                    n for then_ms, whose, n in self.admitted if whose == who and 0 <= end_ms - then_ms < window_ms
                ]
                assert sum(within) <= most, f"{sum(within)} admitted within {window_ms} ms, of {most}"

    def counted(self, messages: list[tuple[int, str, int]], window_ms: int, now_ms: int, who: str) -> int:
        """What these amount to for one key, if a slice counts until its end is a window old."""
        return sum(n for then_ms, whose, n in messages if whose == who and self._counts(then_ms, window_ms, now_ms))

    def assumed(self, window_ms: int, now_ms: int) -> int:
        """What the crashes may cost."""
        crashes = sum(self._counts(then_ms, window_ms, now_ms) for then_ms in self.crashes_ms)
        return crashes * unflushed_max(self.windows[window_ms])

    def _counts(self, then_ms: int, window_ms: int, now_ms: int) -> bool:
        slice_ms = -(-window_ms // 60)
        return (then_ms // slice_ms + 1) * slice_ms + window_ms > now_ms


class SetClock(Clock):
    """A clock that a test sets."""

    time_ms = 0

    def now_ms(self) -> int:
        return SetClock.time_ms


class Machine:
    """A machine on which a node is asked, killed, stopped and started again, beside its twin."""

    def __init__(self, directory: Path, windows: dict[int, int]) -> None:
        limits = ", ".join(f"{window_ms // 1000}s: {most}" for window_ms, most in windows.items())
        text = f"limits: {{per-user: {{key: sasl_username, count: recipients, max: {{{limits}}}}}}}"
        self.settings = given_settings(directory, text)
        self.twin = Twin(windows)
        SetClock.time_ms = 10**9
        self.start()

    def start(self) -> None:
        """Start the node, on a disk that works."""
        self.node = Node(self.settings)
        self.disk = Disk(self.node._storage)
        self.broken = False

    async def do(self, what: str, who: str, amount: int, passed_ms: int) -> None:
        """One step; then usage lies between what was admitted and what was charged, but for the cost of crashes."""
        await getattr(self, what)(who, amount, passed_ms)
        await asyncio.sleep(0)
        for id, meters in self.node.ledger.meters.items():
            for key in (ALICE, BOB):
                now_ms, window_ms = SetClock.time_ms, id.window_ms
                usage = meters.usage(meters.keys.rows.get(key), now_ms)
                assert usage <= self.twin.counted(self.twin.charged, window_ms, now_ms, key)
                most = usage + self.twin.assumed(window_ms, now_ms)
                assert self.twin.counted(self.twin.admitted, window_ms, now_ms, key) <= most

    async def charge(self, who: str, amount: int, _: int) -> None:
        """A message arrives."""
        twin, now_ms = self.twin, SetClock.time_ms
        arrived = (now_ms, who, amount)
        full = any(
            twin.counted(twin.charged, window_ms, now_ms, who) + twin.assumed(window_ms, now_ms) + amount > most
            for window_ms, most in twin.windows.items()
        )
        twin.charged.append(arrived)

        def told(reply: bytes) -> None:
            if reply == DUNNO:
                twin.admit(*arrived)
            else:
                assert FAIL_SAFE["defer"] == reply
                twin.charged.remove(arrived)

        reply = self.node.answer(message(sasl_username=who, recipient_count=amount), "test", told)
        if reply == DUNNO:
            twin.admit(*arrived)
        elif reply is not None:
            assert full, f"refused without need: {reply!r}"
            twin.charged.remove(arrived)

    async def wait(self, _: str, amount: int, passed_ms: int) -> None:
        """Time passes, and a few entries expire."""
        SetClock.time_ms += passed_ms
        self.node.ledger.expire(SetClock.time_ms, amount)

    async def flush(self, *_: object) -> None:
        """The flusher's turn."""
        try:
            await self.node._flusher._flush(clean=False)
        except StorageError as error:
            self.node._flusher._fail(str(error))

    async def idle(self, *_: object) -> None:
        """The flusher's turn after a while without a charge."""
        self.node.ledger.answer_unflushed = False
        try:
            await self.node._flusher._flush(clean=True)
        except StorageError as error:
            self.node._flusher._fail(str(error))

    async def spoil(self, *_: object) -> None:
        """The disk fails from now on, or works again."""
        if self.broken:
            self.disk.mend()
        else:
            self.disk.fail()
        self.broken = not self.broken

    async def stop(self, *_: object) -> None:
        """SIGTERM, and a start; if the disk fails it is as good as a crash."""
        self.node.stop()
        try:
            await self.node.run()
        except StorageError:
            self._end()
        else:
            self.disk.close()
        self.start()

    async def crash(self, *_: object) -> None:
        """Kill -9, and a start."""
        self.node._flusher._thread.shutdown()
        self.node._storage.close()
        self._end()
        self.start()

    def _end(self) -> None:
        if not self.disk.clean:
            self.twin.crashes_ms.append(SetClock.time_ms)
        self.disk.close()


STEPS = ["charge"] * 12 + ["flush"] * 3 + ["wait", "crash", "crash", "idle", "idle", "stop", "spoil"]


@given(
    windows=st.sampled_from([{1_000: 1}, {60_000: 10}, {3_600_000: 100}, {60_000: 40, 600_000: 100}]),
    steps=st.lists(
        st.tuples(
            st.sampled_from(STEPS),
            st.sampled_from([ALICE, ALICE, BOB]),
            st.sampled_from([1, 1, 1, 2, 5, 12]),
            st.sampled_from([0, 1, 500, 1_100, 5_000, 61_000, 300_000, 700_000]),
        ),
        min_size=15,
        max_size=60,
    ),
)
@settings(max_examples=150, deadline=None)
def test_never_one_too_many_and_a_crash_costs_at_most_k(
    windows: dict[int, int], steps: list[tuple[str, str, int, int]]
) -> None:
    """Whatever happens in whatever order: max holds in every window, and a refusal is needed but for K a crash."""

    async def story(directory: Path) -> None:
        machine = Machine(directory, windows)
        try:
            for step in steps:
                await machine.do(*step)
        finally:
            machine.disk.close()
            machine.node._storage.close()

    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=memory) as directory:
        patch.setattr(node_module, "Clock", SetClock)
        uvloop.run(story(Path(directory)))
