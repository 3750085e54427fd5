"""Brings the records of rights to the disk, and lets messages go only when what they promise is there.

`carry_out` takes what a step of the core wants done (`Ready`, see core/effects.py). Records are written at once, in one
transaction with all that wait; the messages of a step leave when everything that was wanted up to then is durable, so
they never overtake a record. If the disk fails, the messages that wait are dropped, which they may be at any time, and
the records are tried again until they are stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential

from postmeter.clock import Clock
from postmeter.core.effects import Place, Ready, Record, Send
from postmeter.defaults import FLUSH_INTERVAL_S, FLUSH_RETRY_S_MAX, FLUSH_WAIT_S_MAX
from postmeter.errors import StorageError
from postmeter.records import write_place, write_record
from postmeter.storage import Moment, Storage


class RecordKeeper:
    """To `run` in a task, and cancel when `durable` has been awaited.

    `transmit` takes messages that may leave. `on_failing` is called with the reason, and with "" when all is well.
    `alive_ms` is the time if the node is confirmed in the roster.
    """

    def __init__(
        self,
        storage: Storage,
        clock: Clock,
        transmit: Callable[[Iterable[Send]], None],
        on_failing: Callable[[str], None],
        alive_ms: Callable[[], int | None],
    ) -> None:
        self._storage = storage
        self._clock = clock
        self._transmit = transmit
        self._on_failing = on_failing
        self._alive_ms = alive_ms
        self._failing = False
        self._records: dict[Place, Record | None] = {}
        self._sends: list[Send] = []
        self._wanted = asyncio.Event()
        self._writing = False
        self._waiters: list[asyncio.Future[bool]] = []
        self._served: list[asyncio.Future[bool]] = []
        self._written_ms = 0

    def carry_out(self, ready: Ready) -> None:
        """Store, then send."""
        if ready.persist:
            self._records.update(ready.persist)
            self._wanted.set()
        if self._failing:
            return
        if self._records or self._writing:
            self._sends += ready.send
        elif ready.send:
            self._transmit(ready.send)

    async def durable(self) -> bool:
        """Wait until everything that was wanted so far is stored. False if it cannot be."""
        if not self._records and not self._writing:
            return True
        if self._failing:
            return False
        return await self._next_write()

    async def sign_of_life(self) -> int:
        """Store what time it is. Returns the time of the last entry on the disk."""
        self._wanted.set()
        await self._next_write()
        return self._written_ms

    def _next_write(self) -> asyncio.Future[bool]:
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        return waiter

    async def run(self) -> None:
        """Store what there is, for ever."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            attempts = AsyncRetrying(
                retry=retry_if_exception_type(StorageError),
                wait=wait_exponential(multiplier=FLUSH_INTERVAL_S, max=FLUSH_RETRY_S_MAX),
                before_sleep=self._failed_attempt,
            )
            async for attempt in attempts:
                with attempt:
                    await self._write()

    async def _write(self) -> None:
        records, self._records = self._records, {}
        sends, self._sends = self._sends, []
        self._served, self._waiters = self._waiters, []
        puts = [(write_place(where), write_record(record) if record else None) for where, record in records.items()]
        moment = self._clock.moment()
        self._writing = True
        try:
            await self._write_to_disk(puts, moment)
        except StorageError:
            self._records = {**records, **self._records}
            raise
        finally:
            self._writing = False
        self._written_ms = moment.ledger_ms
        if self._failing:
            self._failing = False
            self._on_failing("")
        if not self._records:
            # What was wanted meanwhile needs no records of its own.
            sends, self._sends = sends + self._sends, []
            self._served, self._waiters = self._served + self._waiters, []
        if sends:
            self._transmit(sends)
        _tell(self._served, True)

    async def _write_to_disk(self, puts: list[tuple[str, bytes | None]], moment: Moment) -> None:
        loop, storage = asyncio.get_running_loop(), self._storage
        writing = loop.run_in_executor(storage.thread, storage.write_records, puts, moment, self._alive_ms())
        done, _ = await asyncio.wait({writing}, timeout=FLUSH_WAIT_S_MAX)
        if not done:
            self._fail(f"{storage.directory}: the disk has not answered for {FLUSH_WAIT_S_MAX:g} s")
        await writing

    def _failed_attempt(self, state: RetryCallState) -> None:
        if state.outcome is not None:
            self._fail(str(state.outcome.exception()))

    def _fail(self, reason: str) -> None:
        self._failing = True
        self._sends.clear()
        waiters, self._served, self._waiters = self._served + self._waiters, [], []
        _tell(waiters, False)
        self._on_failing(reason)


def _tell(waiters: Iterable[asyncio.Future[bool]], stored: bool) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(stored)
