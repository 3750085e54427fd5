"""What was charged comes to the disk, and whoever waits for that is told the truth in time.

A `Disk` takes part in these tests: another connection to the same SQLite file, which looks at what is really stored,
and which can make writing hang or fail by holding the lock that writing needs.
"""

from __future__ import annotations

import asyncio
import sqlite3
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
import uvloop

from postmeter import flusher as flusher_module
from postmeter.clock import Clock
from postmeter.core.meters import Ledger, Meters, MetersId
from postmeter.errors import StorageError
from postmeter.flusher import Flusher
from postmeter.storage import Storage

ID = MetersId("per-user", "sasl_username", "recipients", 3_600_000)
PATIENCE_S = 20.0


async def eventually(happened: Callable[[], bool]) -> None:
    """Wait until it has happened, or fail."""
    async with asyncio.timeout(PATIENCE_S):
        while not happened():  # noqa: ASYNC110 - what is on the disk sets no event
            await asyncio.sleep(0.001)


class Disk:
    """The disk below a storage: what is on it, and what is wrong with it."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._db = sqlite3.connect(storage.directory / "state.sqlite", isolation_level=None)

    def used(self, key: str, limit: str = ID.limit) -> int:
        """What is stored of a key on a limit, on its longest window."""
        query = "SELECT row FROM keys WHERE name = ?"
        [row] = self._db.execute(query, (key,)).fetchone() or [0]
        stored_of = "FROM usage JOIN meters ON meters.id = meters WHERE name = ?"
        query = f"""SELECT slice, amounts {stored_of} AND window_ms = (SELECT max(window_ms) {stored_of})
            ORDER BY usage.id"""
        found: dict[int, int] = {}
        for slice, data in self._db.execute(query, (limit, limit)):
            numbers = array("q", data)
            stored = dict(zip(numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :], strict=True))
            found[slice] = stored.get(row, found.get(slice, 0))
        return sum(found.values())

    @property
    def clean(self) -> bool:
        """Whether a stop now would be taken for a clean one."""
        row = self._db.execute("SELECT value FROM node WHERE name = 'clean'").fetchone()
        return row is None or bool(row[0])

    def hang(self) -> None:
        """Writing takes until `mend`."""
        self._storage._db.execute("PRAGMA busy_timeout = 60000")
        self._db.execute("BEGIN IMMEDIATE")

    def fail(self) -> None:
        """Writing fails until `mend`."""
        self._storage._db.execute("PRAGMA busy_timeout = 0")
        self._db.execute("BEGIN IMMEDIATE")

    def mend(self) -> None:
        """All is well again."""
        self._db.execute("ROLLBACK")

    def close(self) -> None:
        self._db.close()


class Bench:
    """A flusher over a real state directory, with one limit of 100."""

    def __init__(self, directory: Path) -> None:
        self.storage = Storage(directory)
        self.disk = Disk(self.storage)
        self.ledger = Ledger()
        self.meters: Meters = self.ledger.open(ID)
        self.meters.set_max(100, {})
        self.failures: list[str] = []
        self.flusher = Flusher(self.storage, self.ledger, Clock(None), self.failures.append)
        self.told: dict[str, bool] = {}

    def charge(self, key: str, amount: int = 1) -> None:
        """Charge as the policy does."""
        meters, row = self.meters, self.meters.keys.row(key)
        row = meters.keys.open(key) if row is None else row
        meters.advance(self.flusher._clock.now_ms())
        meters.charge(row, key, amount)

    def hold(self, key: str, amount: int = 1) -> None:
        """Charge, and wait to be told; at that moment it must be on the disk."""
        self.charge(key, amount)
        row = self.meters.keys.rows[key]
        charged = self.meters.used[row]

        def told(stored: bool) -> None:
            assert not stored or self.disk.used(key) >= charged
            self.told[key] = stored

        self.flusher.hold(told)

    async def stop(self) -> None:
        """Stop, and wait until it has."""
        self.flusher.stop()
        await self.running

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Let it flush; stop it at the end unless the test has."""
        self.running = asyncio.create_task(self.flusher.run())
        try:
            yield
            if not self.running.done():
                await self.stop()
        finally:
            self.running.cancel()
            self.storage.thread.shutdown()
            self.disk.close()
            self.storage.close()


Story = Callable[[Bench], Awaitable[None]]
Play = Callable[..., None]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    """Run a story on a bench; constants of the flusher may be given other values."""

    def play(story: Story, **constants: float) -> None:
        for name, value in constants.items():
            monkeypatch.setattr(flusher_module, name, value)

        async def played() -> None:
            bench = Bench(tmp_path / "state")
            async with bench.run(), asyncio.timeout(PATIENCE_S):
                await story(bench)

        uvloop.run(played())

    return play


def test_who_waits_is_told_when_it_is_stored(play: Play) -> None:
    """At once, not at the next interval; many who wait share a flush."""

    async def story(bench: Bench) -> None:
        for number in range(100):
            bench.hold(f"user{number}", number + 1)
        await eventually(lambda: len(bench.told) == 100)
        assert {True} == set(bench.told.values())
        assert 100 == bench.disk.used("user99")

    play(story, FLUSH_INTERVAL_S=60.0)


def test_what_nobody_waits_for_is_stored_soon(play: Play) -> None:
    """Every interval, and nobody has to ask."""

    async def story(bench: Bench) -> None:
        bench.charge("alice", 1)
        await eventually(lambda: bench.disk.used("alice") == 1)
        bench.charge("alice", 2)
        await eventually(lambda: bench.disk.used("alice") == 3)
        assert [] == bench.failures

    play(story, FLUSH_INTERVAL_S=0.01)


def test_charged_while_the_disk_writes(play: Play) -> None:
    """What comes during a write waits for the next one: the first does not hold it."""

    async def story(bench: Bench) -> None:
        bench.disk.hang()
        bench.hold("alice")
        await eventually(lambda: bench.storage.thread._work_queue.empty())
        bench.hold("bob")
        bench.charge("alice")
        bench.disk.mend()
        await eventually(lambda: {"alice", "bob"} == set(bench.told))
        assert {"alice": True, "bob": True} == bench.told
        await eventually(lambda: bench.disk.used("alice") == 2)

    play(story)


def test_nothing_is_answered_unflushed_before_the_stop_mark_is_off(play: Play) -> None:
    """On a clean disk the first charge takes the mark off; only then others may be answered before they are stored."""

    async def story(bench: Bench) -> None:
        assert not bench.ledger.answer_unflushed
        bench.hold("alice")
        await eventually(lambda: "alice" in bench.told)
        assert (True, False) == (bench.ledger.answer_unflushed, bench.disk.clean)

    play(story)


def test_idle_state_becomes_clean(play: Play) -> None:
    """After a while without a charge a crash costs nothing; the next charge has to wait for the disk again."""

    async def story(bench: Bench) -> None:
        for _ in range(2):
            bench.hold("alice")
            await eventually(lambda: "alice" in bench.told)
            assert bench.told.pop("alice")
            await eventually(lambda: not bench.ledger.answer_unflushed and bench.disk.clean)
        assert 2 == bench.disk.used("alice")

    play(story, FLUSH_INTERVAL_S=0.01, IDLE_CLEAN_S=0.05)


def test_a_busy_agent_is_not_idle(play: Play) -> None:
    """The mark is never on the disk while charges may be answered that are not."""

    async def story(bench: Bench) -> None:
        bench.hold("alice")
        await eventually(lambda: "alice" in bench.told)
        for number in range(200):
            bench.charge("alice")
            await asyncio.sleep(0)
            if bench.ledger.answer_unflushed:
                assert not bench.disk.clean
            elif number % 7 == 0:
                bench.hold(f"user{number}")

    play(story, FLUSH_INTERVAL_S=0.001, IDLE_CLEAN_S=0.0)


def test_a_stop_stores_everything(play: Play) -> None:
    """Whoever still waits is told, and the state is marked clean."""

    async def story(bench: Bench) -> None:
        bench.charge("alice", 7)
        bench.hold("bob", 2)
        await bench.stop()
        assert (7, 2, True) == (bench.disk.used("alice"), bench.disk.used("bob"), bench.disk.clean)
        assert {"bob": True} == bench.told
        assert not bench.ledger.answer_unflushed

    play(story, FLUSH_INTERVAL_S=60.0)


def test_a_failing_disk(play: Play) -> None:
    """Who waits is told, and who comes then; it is tried again until it succeeds, and then everything is stored."""

    async def story(bench: Bench) -> None:
        bench.hold("before")
        await eventually(lambda: "before" in bench.told)
        bench.disk.fail()
        bench.charge("alice", 3)
        bench.hold("bob")
        await eventually(lambda: "bob" in bench.told)
        assert [f"{bench.storage.directory}: cannot write: database is locked"] == bench.failures
        assert not bench.ledger.answer_unflushed
        bench.hold("carol")
        assert "carol" not in bench.told, "told before `hold` has returned"
        await eventually(lambda: "carol" in bench.told)
        bench.disk.mend()
        await eventually(lambda: len(bench.failures) == 2)
        assert "" == bench.failures[-1]
        bench.hold("dave")
        await eventually(lambda: "dave" in bench.told)
        assert {"before": True, "bob": False, "carol": False, "dave": True} == bench.told
        assert 3 == bench.disk.used("alice")

    play(story, FLUSH_INTERVAL_S=0.01, FLUSH_RETRY_S_MAX=0.02)


def test_a_hanging_disk(play: Play) -> None:
    """Nobody waits for longer than FLUSH_WAIT_S_MAX; when the disk answers at last, all is well again by itself."""

    async def story(bench: Bench) -> None:
        bench.disk.hang()
        bench.hold("alice")
        asked_s = asyncio.get_running_loop().time()
        await eventually(lambda: "alice" in bench.told)
        assert 0.09 <= asyncio.get_running_loop().time() - asked_s < PATIENCE_S / 2
        assert [f"{bench.storage.directory}: the disk has not answered for 0.1 s"] == bench.failures
        bench.hold("bob")
        await eventually(lambda: "bob" in bench.told)
        assert {"alice": False, "bob": False} == bench.told
        bench.disk.mend()
        await eventually(lambda: len(bench.failures) == 2)
        bench.hold("carol")
        await eventually(lambda: "carol" in bench.told)
        assert bench.told["carol"]

    play(story, FLUSH_WAIT_S_MAX=0.1)


def test_a_stop_while_the_disk_fails(play: Play) -> None:
    """It ends, with the error, and with everybody told; the mark of a clean stop is not on the disk."""

    async def story(bench: Bench) -> None:
        bench.hold("alice")
        await eventually(lambda: "alice" in bench.told)
        bench.disk.fail()
        bench.charge("alice")
        bench.hold("bob")
        await eventually(lambda: "bob" in bench.told)
        with pytest.raises(StorageError, match="cannot write"):
            await bench.stop()
        assert {"alice": True, "bob": False} == bench.told
        assert not bench.disk.clean

    play(story, FLUSH_INTERVAL_S=0.01, FLUSH_RETRY_S_MAX=0.02)


def test_what_is_forgotten_is_forgotten_on_the_disk(play: Play) -> None:
    """Keys and meters; while the disk fails it stays to be done."""

    async def story(bench: Bench) -> None:
        bench.charge("alice", 3)
        bench.hold("bob", 2)
        await eventually(lambda: "bob" in bench.told)
        bench.disk.fail()
        row = bench.meters.keys.rows["alice"]
        bench.flusher.forget(resets=[(ID, number, row) for number in bench.meters.reset(row)])
        await eventually(lambda: len(bench.failures) == 1)
        assert 3 == bench.disk.used("alice")
        bench.disk.mend()
        await eventually(lambda: bench.disk.used("alice") == 0)
        assert 2 == bench.disk.used("bob")
        bench.flusher.forget(retired=bench.ledger.retain([]))
        await eventually(lambda: bench.disk.used("bob") == 0)

    play(story, FLUSH_INTERVAL_S=0.01, FLUSH_RETRY_S_MAX=0.02)


def test_the_event_loop_goes_on_while_the_disk_works(play: Play) -> None:
    """A flush of many meters, and a disk that takes its time, keep nobody from being answered."""

    async def story(bench: Bench) -> None:
        bench.disk.hang()
        for number in range(5_000):
            bench.charge(f"user{number}")
        bench.hold("alice")
        for _ in range(1_000):
            await asyncio.sleep(0)
        assert {} == bench.told
        bench.disk.mend()
        await eventually(lambda: bench.told == {"alice": True})

    play(story)


def test_the_bench_can_fail(tmp_path: Path) -> None:
    """The disk of these tests really hangs and fails, so that the tests above mean something."""
    with closing(Storage(tmp_path / "state")) as storage:
        disk = Disk(storage)
        disk.fail()
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            storage._db.execute("BEGIN IMMEDIATE")
        disk.mend()
        storage._db.execute("BEGIN IMMEDIATE")
        storage._db.execute("ROLLBACK")
        disk.close()
