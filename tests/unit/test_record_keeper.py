"""Records of rights reach the disk before what they promise is said, whatever the disk does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import uvloop

from postmeter import record_keeper
from postmeter.clock import Clock
from postmeter.core.effects import Accepted, Before, Put, Ready, Send
from postmeter.core.meters import MetersId
from postmeter.record_keeper import RecordKeeper
from postmeter.records import read_record
from postmeter.storage import Storage
from tests.unit.test_flusher import Disk, eventually

ID = MetersId("per-user", "sasl_username", "recipients", 3_600_000)


def step(number: int, persist: bool = True) -> Ready:
    """A step that says `number`, after it has stored that."""
    record = Before(ID, None, number, number)
    return Ready([Put(("before", ID, None), record)] if persist else [], [Send("mx2", Accepted(number))])


class Desk:
    """A keeper over a real state directory. `said` is checked against the disk as it is said."""

    def __init__(self, directory: Path) -> None:
        self.storage = Storage(directory)
        self.disk = Disk(self.storage)
        self.said: list[int] = []
        self.stored: list[int] = []
        self.failures: list[str] = []
        self.keeper = RecordKeeper(self.storage, Clock(None), self._say, self.failures.append, lambda: 7)

    def _say(self, sends: Iterable[Send]) -> None:
        for _, message in sends:
            assert isinstance(message, Accepted)
            self.said.append(message.generation)
            self.stored.append(self.on_disk())

    def on_disk(self) -> int:
        """The number that is stored."""
        found = self.disk._db.execute("SELECT record FROM records").fetchall()
        records = [read_record(row[0]) for row in found]
        return max((record.max for record in records if isinstance(record, Before)), default=0)

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Let it store."""
        running = asyncio.create_task(self.keeper.run())
        try:
            yield
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
            self.disk.close()
            self.storage.close()


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """A keeper with an empty state directory."""
    return Desk(tmp_path / "state")


def test_what_is_said_is_on_the_disk(desk: Desk) -> None:
    """Each message leaves after the record of its step, and in order."""

    async def story() -> None:
        async with desk.run():
            for number in range(1, 50):
                desk.keeper.carry_out(step(number))
                if number % 7 == 0:
                    await asyncio.sleep(0)
            assert await desk.keeper.durable()
            assert list(range(1, 50)) == desk.said
            assert all(stored >= said for said, stored in zip(desk.said, desk.stored, strict=True))

    uvloop.run(story())


def test_a_message_without_a_record_does_not_overtake(desk: Desk) -> None:
    """It leaves at once if nothing is being stored, else behind what was said before."""

    async def story() -> None:
        async with desk.run():
            desk.keeper.carry_out(step(1, persist=False))
            assert [1] == desk.said
            desk.disk.hang()
            desk.keeper.carry_out(step(2))
            await eventually(lambda: desk.keeper._writing)
            desk.keeper.carry_out(step(3, persist=False))
            waiting = asyncio.ensure_future(desk.keeper.durable())
            await asyncio.sleep(0)
            assert ([1], False) == (desk.said, waiting.done())
            desk.disk.mend()
            assert await waiting
            assert [1, 2, 3] == desk.said

    uvloop.run(story())


def test_a_failing_disk_silences_the_node_until_it_works(desk: Desk) -> None:
    """What waits is dropped, nothing is promised, the records come later, and then all goes on."""

    async def story() -> None:
        async with desk.run():
            desk.disk.fail()
            desk.keeper.carry_out(step(1))
            assert not await desk.keeper.durable()
            desk.keeper.carry_out(step(2))
            desk.keeper.carry_out(step(3, persist=False))
            assert not await desk.keeper.durable()
            assert ([], 1) == (desk.said, len(desk.failures))
            assert "cannot write" in desk.failures[0]
            desk.disk.mend()
            await eventually(lambda: desk.failures[-1] == "")
            assert ([], 2) == (desk.said, desk.on_disk())
            desk.keeper.carry_out(step(4))
            assert await desk.keeper.durable()
            assert [4] == desk.said

    uvloop.run(story())


def test_a_disk_that_hangs_fails_those_who_wait_for_it(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose record is being written, too. In the end it is written, and said."""
    monkeypatch.setattr(record_keeper, "FLUSH_WAIT_S_MAX", 0.1)

    async def story() -> None:
        async with desk.run():
            desk.disk.hang()
            desk.keeper.carry_out(step(1))
            waiting = asyncio.ensure_future(desk.keeper.durable())
            assert not await asyncio.wait_for(waiting, 10)
            desk.disk.mend()
            await eventually(lambda: desk.failures[-1] == "")
            assert ([1], 1) == (desk.said, desk.on_disk())

    uvloop.run(story())


def test_a_sign_of_life_is_stored(desk: Desk) -> None:
    """Without any record; the time that it tells is the one on the disk."""

    async def story() -> None:
        async with desk.run():
            written_ms = await desk.keeper.sign_of_life()
            values = dict(desk.disk._db.execute("SELECT name, value FROM node"))
            assert (written_ms, 7) == (values["ledger_ms"], values["alive_ms"])

    uvloop.run(story())
