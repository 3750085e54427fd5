"""What a node knows, through restarts, crashes, failing disks, and changed limits."""

from __future__ import annotations

import asyncio
import os
import re
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from postmeter import flusher as flusher_module
from postmeter import node as node_module
from postmeter.clock import Clock
from postmeter.core.meters import OVERFLOW_ROW, unflushed_max
from postmeter.errors import ConfigError, ProtocolError, StorageError
from postmeter.node import DUNNO, FAIL_SAFE, Node
from postmeter.settings import OnError, Settings
from tests.unit.support import HOUR_MS, message
from tests.unit.test_flusher import PATIENCE_S, Disk, eventually
from tests.unit.test_logs import logged
from tests.unit.test_storage import fill, small_disk

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

    def __init__(self, node: Node, data: bytes = b"", /, **attributes: object) -> None:
        self.reply = node.answer(data or message(**attributes), "test", self._told)
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
    return await Asked(node, b"", **attributes).answer()


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
            node.storage.thread.shutdown()
            while not task.done():  # Python 3.11's wait_for may swallow one
                task.cancel()
                await asyncio.wait({task}, timeout=0.01)
        else:
            node.stop()
            await task


@contextmanager
def disk_of(node: Node) -> Iterator[Disk]:
    """The disk below a node, mended at the end."""
    disk = Disk(node.storage)
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
                node.clock._offset_ms += HOUR_MS + HOUR_MS // 60
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
    looks = count()
    is_due = flusher_module.Flusher._is_due
    monkeypatch.setattr(flusher_module.Flusher, "_is_due", lambda self: [next(looks), is_due(self)][1])

    async def story() -> None:
        async with running(given_settings(tmp_path)) as node:
            for _ in range(100):
                await asyncio.sleep(0)
            await ask(node)
            for _ in range(100):
                await asyncio.sleep(0)
            assert next(looks) <= 3

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
        self.disk = Disk(self.node.storage)
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
        self.node.storage.close()
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
@settings(max_examples=100, deadline=None)
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
            machine.node.storage.close()

    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=memory) as directory:
        patch.setattr(node_module, "Clock", SetClock)
        uvloop.run(story(Path(directory)))


# --- a disk that fails ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_error", ["defer", "dunno"])
def test_what_cannot_be_stored_is_answered_with_the_fail_safe(tmp_path: Path, fast: Fast, on_error: OnError) -> None:
    """As `on_error` says; it is not charged, health says why, and when the disk works again so does everything else."""
    fast(FLUSH_INTERVAL_S=0.01, FLUSH_RETRY_S_MAX=0.02)
    changes: list[str] = []

    async def story() -> None:
        async with running(given_settings(tmp_path, on_error=on_error)) as node:
            node.on_health.append(lambda: changes.append(node.health["storage"]))
            await ask(node, recipient_count=10)
            with disk_of(node) as disk:
                disk.fail()
                several = [Asked(node, recipient_count=6) for _ in range(3)]
                assert [FAIL_SAFE[on_error]] * 3 == [await asked.answer() for asked in several]
                reason = f"{tmp_path}/state: cannot write: database is locked"
                assert (reason, [reason]) == (node.health["storage"], changes)
                assert FAIL_SAFE[on_error] == await ask(node, sasl_username=BOB)
                assert (10, 0) == (used(node), used(node, BOB))
                disk.mend()
                await eventually(lambda: node.health["storage"] == "")
                assert [reason, ""] == changes
                assert DUNNO == await ask(node, recipient_count=6)
                assert (16, 16) == (used(node), disk.used(ALICE))

    with logged() as log:
        play(story())
    assert [1, 1] == [len(log.of(event)) for event in ("storage fails", "storage works again")]


def test_what_charges_nothing_needs_no_disk(tmp_path: Path, fast: Fast) -> None:
    """While it fails refusals are given as ever, and so are looks, and mail that no limit covers."""
    fast(FLUSH_INTERVAL_S=0.01, FLUSH_RETRY_S_MAX=0.02)

    async def story() -> None:
        async with running(given_settings(tmp_path)) as node:
            await ask(node, recipient_count=100)
            with disk_of(node) as disk:
                disk.fail()
                assert FAIL_SAFE["defer"] == await ask(node, sasl_username=BOB, recipient_count=6)
                assert (Asked(node).reply or b"").startswith(b"action=450 4.7.1 ")
                assert (Asked(node, protocol_state="RCPT").reply or b"").startswith(b"action=450 4.7.1 ")
                assert DUNNO == Asked(node, sasl_username=BOB, protocol_state="RCPT").reply
                assert DUNNO == Asked(node, sasl_username="").reply

    play(story())


def test_a_disk_that_hangs(tmp_path: Path, fast: Fast) -> None:
    """Postfix waits no longer than FLUSH_WAIT_S_MAX; who comes later is told at once; and it recovers by itself."""
    fast(FLUSH_WAIT_S_MAX=0.1)

    async def story() -> None:
        async with running(given_settings(tmp_path)) as node:
            with disk_of(node) as disk:
                disk.hang()
                asked_s = asyncio.get_running_loop().time()
                assert FAIL_SAFE["defer"] == await ask(node)
                assert FAIL_SAFE["defer"] == await ask(node)
                assert asyncio.get_running_loop().time() - asked_s < PATIENCE_S / 2
                assert node.health["storage"].endswith("the disk has not answered for 0.1 s")
                disk.mend()
                await eventually(lambda: node.health["storage"] == "")
                assert DUNNO == await ask(node)
                assert 1 == used(node)

    play(story())


@pytest.mark.parametrize("passed_ms", [0, HOUR_MS // 60])
def test_what_was_taken_back_is_taken_back_on_the_disk(tmp_path: Path, fast: Fast, passed_ms: int) -> None:
    """A write that ends after all, when its mail has been refused, is no usage after a restart."""
    fast(FLUSH_WAIT_S_MAX=0.1)

    async def story() -> None:
        given = given_settings(tmp_path)
        async with running(given) as node:
            with disk_of(node) as disk:
                disk.hang()
                asked = Asked(node, recipient_count=50)
                node.clock._offset_ms += passed_ms
                assert (Asked(node, recipient_count=101).reply or b"").startswith(b"action=550 5.7.1 ")
                assert FAIL_SAFE["defer"] == await asked.answer()
                disk.mend()
                await eventually(lambda: node.health["storage"] == "")
                assert 0 == used(node)
        async with running(given) as node:
            assert 0 == used(node)

    play(story())


def test_a_message_that_met_a_failing_disk_is_charged_when_it_comes_again(tmp_path: Path, fast: Fast) -> None:
    """Under the same instance: it was not let through, so it is no repeat; and then it is one."""
    fast(FLUSH_INTERVAL_S=0.01, FLUSH_RETRY_S_MAX=0.02)

    async def story() -> None:
        async with running(given_settings(tmp_path)) as node:
            with disk_of(node) as disk:
                disk.fail()
                first, repeat = (Asked(node, instance="i.1", recipient_count=7) for _ in range(2))
                assert [FAIL_SAFE["defer"]] * 2 == [await first.answer(), await repeat.answer()]
                disk.mend()
                await eventually(lambda: node.health["storage"] == "")
                for _ in range(2):
                    assert DUNNO == await ask(node, instance="i.1", recipient_count=7)
                assert (7, 7) == (used(node), disk.used(ALICE))

    play(story())


def test_a_repeat_waits_for_what_it_repeats(tmp_path: Path) -> None:
    """The first charge may not be on the disk yet: the repeat is not let through before it is, and costs nothing."""

    async def story() -> None:
        async with running(given_settings(tmp_path)) as node:
            with disk_of(node) as disk:
                disk.hang()
                both = [Asked(node, instance="i.1", recipient_count=7) for _ in range(2)]
                assert [None, None] == [asked.reply for asked in both]
                disk.mend()
                assert [DUNNO, DUNNO] == [await asked.answer() for asked in both]
                assert 7 == disk.used(ALICE)

    play(story())


def test_a_real_full_disk(tmp_path: Path, fast: Fast) -> None:
    """No space left: the fail-safe; space again: all is well, and nothing that was let through is missing."""
    fast(FLUSH_INTERVAL_S=0.01, FLUSH_RETRY_S_MAX=0.02)

    async def story(disk: Path) -> None:
        given = replace(given_settings(tmp_path), state_dir=disk / "state")
        async with running(given) as node:
            await ask(node, recipient_count=10)
            filler = fill(disk)
            replies: list[bytes] = []
            while FAIL_SAFE["defer"] not in replies:
                replies.append(await ask(node, sasl_username=f"user{len(replies)}@example.com", recipient_count=6))
                assert len(replies) < 1000
            assert "state: cannot write: " in node.health["storage"]
            filler.unlink()
            await eventually(lambda: node.health["storage"] == "")
            assert DUNNO == await ask(node, recipient_count=3)
        async with running(given) as node:
            assert 13 == used(node)
            for number, reply in enumerate(replies):
                assert 6 * (reply == DUNNO) == used(node, f"user{number}@example.com")

    with small_disk(tmp_path / "disk") as disk:
        play(story(disk))


def test_a_stop_with_a_failing_disk_is_an_unclean_one(tmp_path: Path, fast: Fast) -> None:
    """It ends with the error, so that the exit status tells; the next start assumes the worst."""
    fast(FLUSH_INTERVAL_S=0.01, FLUSH_RETRY_S_MAX=0.02)

    async def story() -> None:
        given = given_settings(tmp_path)

        async def stop_in_trouble() -> None:
            async with running(given) as node:
                await ask(node, recipient_count=10)
                assert Asked(node).at_once
                Disk(node.storage).fail()

        with pytest.raises(StorageError, match="cannot write"):
            await stop_in_trouble()
        async with running(given) as node:
            assert (10, 95) == (used(node), allowance(node))

    play(story())


# --- reset ------------------------------------------------------------------------------------------------------------


TWO_LIMITS = """
limits:
  per-user: {key: sasl_username, count: recipients, max: {1h: 100, 24h: 500}}
  per-domain: {key: sasl_domain, count: recipients, max: 100, per: 1h}
  bytes: {key: sasl_username, count: bytes, max: 1MB, per: 1h}
"""


def test_a_reset_is_durable_when_it_returns(tmp_path: Path) -> None:
    """On one limit or on all it forgets one key, says what that was, and a crash does not bring it back."""

    async def story() -> None:
        given = given_settings(tmp_path, TWO_LIMITS)
        async with running(given, kill=True) as node:
            await ask(node, recipient_count=7, size=500)
            await ask(node, sasl_username=BOB, recipient_count=2)
            forgotten = await node.reset(ALICE, "per-user")
            assert [("per-user", HOUR_MS, 7), ("per-user", 24 * HOUR_MS, 7)] == [
                (id.limit, id.window_ms, amount) for id, amount in forgotten
            ]
            assert [("bytes", 500)] == [(id.limit, amount) for id, amount in await node.reset(ALICE, None)]
            assert [] == await node.reset(ALICE, None)
            assert [] == await node.reset("nobody", None)
        async with running(given) as node:
            assert [0, 0, 2, 9] == [
                used(node),
                used(node, limit="bytes"),
                used(node, BOB),
                used(node, "example.com", "per-domain"),
            ]

    play(story())


def test_a_reset_that_cannot_be_stored_says_so_and_is_stored_later(tmp_path: Path, fast: Fast) -> None:
    """It counts at once; on the disk it is done when the disk works again."""
    fast(FLUSH_INTERVAL_S=0.01, FLUSH_RETRY_S_MAX=0.02)

    async def story() -> None:
        async with running(given_settings(tmp_path)) as node:
            await ask(node, recipient_count=7)
            with disk_of(node) as disk:
                disk.fail()
                with pytest.raises(StorageError, match="forgotten here, but not on the disk yet"):
                    await node.reset(ALICE, None)
                assert (0, 7) == (used(node), disk.used(ALICE))
                disk.mend()
                await eventually(lambda: disk.used(ALICE) == 0)

    play(story())


def test_who_resets_may_go_away(tmp_path: Path) -> None:
    """A command line that is interrupted while the disk hangs does not take the node with it."""

    async def story() -> None:
        async with running(given_settings(tmp_path)) as node:
            await ask(node, recipient_count=7)
            with disk_of(node) as disk:
                disk.hang()
                resetting = asyncio.create_task(node.reset(ALICE, None))
                await asyncio.sleep(0)
                resetting.cancel()
                await asyncio.wait({resetting})
                disk.mend()
                assert DUNNO == await ask(node)
                await eventually(lambda: disk.used(ALICE) == 1)

    play(story())


# --- limits -----------------------------------------------------------------------------------------------------------


def rewrite(node: Node, limits: str) -> None:
    """Give the node another limits file."""
    node.settings.limits.write_text(limits)


def test_a_reload_keeps_the_counts(tmp_path: Path) -> None:
    """Another max, another text, another match: what was used is still used, now and after a restart."""

    async def story() -> None:
        given = given_settings(tmp_path)
        async with running(given) as node:
            await ask(node, recipient_count=7)
            rewrite(node, LIMITS.replace("max: 100", 'max: 8, text: "no", match: {sender_domain: example.com}'))
            await node.reload()
            assert 7 == used(node)
            assert DUNNO == await ask(node)
            assert b"action=450 4.7.1 no\n\n" == await ask(node)
        async with running(given) as node:
            assert 8 == used(node)

    play(story())


def test_changed_windows_keep_the_counts(tmp_path: Path) -> None:
    """A longer or shorter window begins with what the other one knows; on the disk, too."""

    async def story() -> None:
        given = given_settings(tmp_path)
        async with running(given, kill=True) as node:
            await ask(node, recipient_count=7)
            for windows in ("{24h: 100}", "{30m: 100, 2h: 100}"):
                rewrite(node, LIMITS.replace("100, per: 1h", windows))
                await node.reload()
                assert {7} == {m.usage(m.keys.rows[ALICE], node.now_ms()) for m in node.ledger.meters.values()}
            with disk_of(node) as disk:
                await eventually(lambda: disk.used(ALICE) == 7)
        async with running(given) as node:
            assert {7} == {m.usage(m.keys.rows[ALICE], node.now_ms()) for m in node.ledger.meters.values()}

    play(story())


def test_another_key_or_unit_is_another_count(tmp_path: Path) -> None:
    """And a limit that is taken away is forgotten: with it again, counting begins anew."""

    async def story() -> None:
        async with running(given_settings(tmp_path)) as node:
            await ask(node, recipient_count=7)
            rewrite(node, LIMITS.replace("count: recipients", "count: messages"))
            await node.reload()
            assert 0 == used(node)
            await ask(node, recipient_count=7)
            assert 1 == used(node)
            rewrite(node, LIMITS)
            await node.reload()
            assert 0 == used(node)
            with disk_of(node) as disk:
                await eventually(lambda: disk.used(ALICE) == 0)

    play(story())


def test_a_charge_may_wait_while_its_limit_is_changed(tmp_path: Path) -> None:
    """It is answered, whatever became of the limit."""

    async def story() -> None:
        async with running(given_settings(tmp_path, TWO_LIMITS)) as node:
            with disk_of(node) as disk:
                disk.hang()
                asked = Asked(node)
                rewrite(node, LIMITS)
                await node.reload()
                disk.mend()
                assert DUNNO == await asked.answer()
                assert 1 == used(node)

    play(story())


def test_wrong_limits_are_refused_whole(tmp_path: Path) -> None:
    """All problems are told, and nothing of the file is in force: not its right part, either."""

    async def story() -> None:
        async with running(given_settings(tmp_path)) as node:
            before = node.policy
            rewrite(
                node, "limits:\n  good: {key: sender, count: messages, max: 1, per: 1h}\n  bad: {key: nose, max: -1}"
            )
            with pytest.raises(ConfigError) as refused:
                await node.reload()
            assert 4 == len(refused.value.problems)
            assert all("limits.yaml:3: limits.bad" in problem for problem in refused.value.problems)
            assert before is node.policy
            node.settings.limits.unlink()
            with pytest.raises(ConfigError, match=r"limits\.yaml: cannot be read"):
                await node.reload()
            assert DUNNO == await ask(node)

    play(story())


def test_the_last_good_limits_are_used_at_the_next_start(tmp_path: Path) -> None:
    """While the file is wrong: those that were in force last, and a log that says so; then the file again."""

    async def story() -> None:
        given = given_settings(tmp_path)
        async with running(given) as node:
            rewrite(node, LIMITS.replace("100", "3"))
            await node.reload()
            rewrite(node, "limits: [")
            with pytest.raises(ConfigError):
                await node.reload()
        with logged() as log:
            async with running(given) as node:
                assert 3 == allowance(node)
                assert 1 == len(log.of("limits refused"))
                in_force = f"error last good limits in force file={given.state_dir}/limits.yaml"
                assert [in_force] == log.of("last good limits in force")
                rewrite(node, LIMITS.replace("100", "5"))
                await node.reload()
                assert 5 == allowance(node)

    play(story())


def test_without_any_good_limits_a_node_does_not_start(tmp_path: Path) -> None:
    """It says what is wrong, and lets go of the state directory."""
    given = given_settings(tmp_path, "limits: {per-user: {}}")
    for _ in range(2):
        with pytest.raises(ConfigError) as refused:
            Node(given)
        assert all("limits.yaml:1: limits.per-user" in problem for problem in refused.value.problems)


def test_overrides_end_at_their_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before `until` the key has a max of its own, from then on that of all others, without a reload."""
    monkeypatch.setattr(node_module, "TIDY_INTERVAL_S", 0.01)
    until = datetime.now(UTC) + timedelta(seconds=1)
    overrides = f"""
    overrides:
      {ALICE}: {{max: 1000, until: "{until}"}}
      {BOB}: {{max: 1000, until: 2000-01-31}}
      carol@example.com: blocked
"""
    limits = (
        "limits:\n  per-user:\n    key: sasl_username\n    count: recipients\n    max: 100\n    per: 1h" + overrides
    )

    async def story() -> None:
        async with running(given_settings(tmp_path, limits)) as node:
            if datetime.now(UTC) < until:
                assert 1000 == allowance(node)
            assert 100 == allowance(node, BOB)
            assert (Asked(node, sasl_username="Carol@example.com").reply or b"").startswith(b"action=550 5.7.1 ")
            await eventually(lambda: allowance(node) == 100)
            assert datetime.now(UTC) >= until

    play(story())


def test_when_there_are_too_many_keys_the_shared_meter_survives_a_restart(tmp_path: Path) -> None:
    """New keys beyond the maximum share one meter: what they used is theirs after a restart, too."""

    async def story() -> None:
        given = given_settings(tmp_path)
        async with running(given) as node:
            node.ledger.keys("sasl_username").rows_max = 1
            await ask(node, recipient_count=7)
            for number in range(3):
                await ask(node, sasl_username=f"invented{number}@example.com")
            [meters] = node.ledger.meters.values()
            assert 3 == meters.usage(OVERFLOW_ROW, node.now_ms())
        async with running(given) as node:
            [meters] = node.ledger.meters.values()
            assert 3 == meters.usage(OVERFLOW_ROW, node.now_ms())
            assert [ALICE] == list(meters.keys.rows)

    play(story())


# --- what is logged ---------------------------------------------------------------------------------------------------


def test_one_line_for_a_refusal(tmp_path: Path) -> None:
    """Who, which limit, used, max, the message and the client; and no line for mail that is let through."""
    limits = LIMITS + "  seen: {key: sasl_username, count: messages, max: 1, per: 1h, shadow: true}\n"
    attributes = {"sasl_username": "Al ice", "queue_id": "4F", "instance": "1.2", "sender": "", "recipient": "=\udcff"}

    async def story() -> None:
        with logged() as log:
            async with running(given_settings(tmp_path, limits)) as node:
                start = len(log.lines)
                await ask(node, recipient_count=100, sasl_username="al ice")
                assert start == len(log.lines)
                node.answer(message(**attributes), "192.0.2.1:99", lambda _: None)
                [refused, seen] = log.lines[start:]
        assert (
            'warning refused limit=per-user key="al ice" used=100 max=100 per=1h charge=1 wait="1h 1m" action=450'
            " peer=192.0.2.1:99 protocol_state=END-OF-MESSAGE queue_id=4F instance=1.2 client_address=192.0.2.7"
            ' sasl_username="Al ice" recipient="=\\udcff"'
        ) == re.sub(r'wait=("[^"]*"|\S+)', 'wait="1h 1m"', refused)
        assert seen.startswith('info would refuse limit=seen key="al ice" used=1 max=1 per=1h charge=1 ')

    play(story())


def test_every_answer_is_logged_if_asked_for(tmp_path: Path) -> None:
    """At level debug, one line each, whatever the way it was answered."""

    async def story() -> None:
        with logged("debug") as log:
            async with running(given_settings(tmp_path, log_level="debug")) as node:
                for attributes in ({}, {}, {"protocol_state": "RCPT"}, {"recipient_count": 101}):
                    await ask(node, **attributes)
        actions = [re.findall(r'action=("[^"]*"|\S+)', line)[0][:11] for line in log.of("answered")]
        assert ["DUNNO", "DUNNO", "DUNNO", '"550 5.7.1 '] == actions

    play(story())


def test_what_no_postfix_sends_is_told_to_the_caller(tmp_path: Path) -> None:
    """The node charges nothing for it, and answers nothing."""

    async def story() -> None:
        async with running(given_settings(tmp_path)) as node:
            for wrong in (b"\n\n", message(recipient_count="many"), message(request="junk")):
                with pytest.raises(ProtocolError):
                    node.answer(wrong, "test", lambda _: None)
            assert {} == next(iter(node.ledger.meters.values())).keys.rows

    play(story())


def test_any_attribute_may_be_absent(tmp_path: Path) -> None:
    """Or empty: at every stage a request of any older or newer Postfix is decided, and a repeat of it is the same."""
    limits = (
        TWO_LIMITS
        + "  pair: {key: [sender, recipient_domain], count: messages, max: 100, per: 1h}\n"
        + "  client: {key: client_address, count: messages, max: 100, per: 1h, match: {size: {not: {equal: 5}}}}\n"
    )

    async def story() -> None:
        async with running(given_settings(tmp_path, limits)) as node:
            for stage in ("RCPT", "DATA", "END-OF-MESSAGE", "VRFY"):
                whole = message(protocol_state=stage, queue_id="4F", instance="1.2").decode().splitlines()[:-1]
                for place, line in enumerate(whole[1:], 1):
                    for instead in ([], [line.partition("=")[0] + "="]):
                        lines = [*whole[:place], *instead, *whole[place + 1 :]]
                        data = "\n".join([*lines, "\n"]).encode()
                        for _ in range(2):
                            assert DUNNO == await Asked(node, data).answer()

    play(story())
