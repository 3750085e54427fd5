"""Brings what was charged to the disk, in batches and in a thread of its own, and answers for it.

A batch is written every FLUSH_INTERVAL_S while there is something to write, and at once when somebody waits (`hold`).
If writing fails or takes longer than FLUSH_WAIT_S_MAX, everybody who waits is told so, and so is everybody who asks
from then on; writing is tried again until it succeeds.

The mark on the disk that tells a clean stop from any other is taken off before anything is answered that is not
stored (`Ledger.answer_unflushed`), and put on again after IDLE_CLEAN_S without a charge and by `stop`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential

from postmeter.clock import Clock
from postmeter.core.meters import Batch, Keys, Ledger, Meters, MetersId
from postmeter.defaults import (
    FLUSH_INTERVAL_S,
    FLUSH_RETRY_S_MAX,
    FLUSH_ROWS_MAX,
    FLUSH_WAIT_S_MAX,
    IDLE_CLEAN_S,
    LOG_PART_MAX,
)
from postmeter.errors import StorageError
from postmeter.storage import Flush, Storage, packed

Waiter = Callable[[bool], None]


class Flusher:
    """To `run` in a task, `stop`, and await. `on_failing` is called with the reason, and with "" when all is well.

    In a cluster `on_charged` is called with meters, a slice, and rows with their amounts in it before these are stored;
    `alive_ms` is the time if the node is confirmed in the roster.
    """

    def __init__(self, storage: Storage, ledger: Ledger, clock: Clock, on_failing: Callable[[str], None]) -> None:
        self._storage = storage
        self._ledger = ledger
        self._clock = clock
        self._on_failing = on_failing
        self._failing = ""
        self._waiters: list[Waiter] = []
        self._resets: list[tuple[MetersId, int, int]] = []
        self._logged: dict[tuple[MetersId, int], int] = {}
        self._retired: list[MetersId] = []
        self._wanted = asyncio.Event()
        self._stopping = False
        self._charged_s = time.monotonic()
        self.on_charged: Callable[[Meters, int, list[int], list[int]], object] = lambda *_: None
        self.alive_ms: Callable[[], int | None] = lambda: None

    def hold(self, waiter: Waiter) -> None:
        """Call `waiter` with True when all that is charged now is on the disk; with False if it cannot be stored."""
        if self._failing:
            asyncio.get_running_loop().call_soon(waiter, False)
        else:
            self._waiters.append(waiter)
            self._wanted.set()

    def forget(self, resets: Iterable[tuple[MetersId, int, int]] = (), retired: Iterable[MetersId] = ()) -> None:
        """Forget (meters, slice, row), or whole meters, with the next flush."""
        self._resets.extend(resets)
        self._retired.extend(retired)
        self._wanted.set()

    async def run(self) -> None:
        """Flush until stopped; then once more, and mark the state clean. Only that last one raises StorageError."""
        while not self._stopping:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wanted.wait(), FLUSH_INTERVAL_S)
            self._wanted.clear()
            if self._is_due():
                await self._flush_until_done()
            elif self._ledger.answer_unflushed and time.monotonic() - self._charged_s > IDLE_CLEAN_S:
                self._ledger.answer_unflushed = False
                await self._flush_until_done(clean=True)
        self._ledger.answer_unflushed = False
        await self._flush(clean=True)

    def stop(self) -> None:
        """Let `run` end. Nothing may be charged any more."""
        self._stopping = True
        self._wanted.set()

    def _is_due(self) -> bool:
        charged = not all(meters.all_flushed for meters in self._ledger.meters.values())
        if charged:
            self._charged_s = time.monotonic()
        renamed = any(keys.renamed for keys in self._ledger.kinds.values())
        return bool(charged or renamed or self._waiters or self._resets or self._retired)

    async def _flush_until_done(self, clean: bool = False) -> None:
        attempts = AsyncRetrying(
            retry=retry_if_exception_type(StorageError),
            wait=wait_exponential(multiplier=FLUSH_INTERVAL_S, max=FLUSH_RETRY_S_MAX),
            stop=lambda state: self._stopping,
            before_sleep=self._failed_attempt,
            reraise=True,
        )
        try:
            async for attempt in attempts:
                with attempt:
                    await self._flush(clean)
        except StorageError as error:
            self._fail(str(error))

    def _failed_attempt(self, state: RetryCallState) -> None:
        if state.outcome is not None:
            self._fail(str(state.outcome.exception()))

    async def _flush(self, clean: bool) -> None:
        waiters = len(self._waiters)
        resets, retired = list(self._resets), list(self._retired)
        batches = [(meters, meters.take_unflushed()) for meters in self._ledger.meters.values()]
        renamed = [(kind, keys, keys.take_renamed()) for kind, keys in self._ledger.kinds.items()]
        try:
            flush = Flush(self._clock.moment(), clean, list(self._ledger.tolls_ms), retired, alive_ms=self.alive_ms())
            flush.amounts += [(id, number, packed([row], [0])) for id, number, row in resets]
            await self._add_names(flush, renamed)
            await self._add_amounts(flush, batches)
            await self._write(flush)
        except StorageError:
            for _, keys, names in renamed:
                keys.put_back(names)
            raise
        for meters, taken in batches:
            meters.flushed(taken)
        del self._resets[: len(resets)], self._retired[: len(retired)]
        self._ledger.answer_unflushed = not clean
        if self._failing:
            self._failing = ""
            self._on_failing("")
        answered, self._waiters = self._waiters[:waiters], self._waiters[waiters:]
        for waiter in answered:
            waiter(True)

    async def _add_names(self, flush: Flush, renamed: Iterable[tuple[str, Keys, dict[int, str | None]]]) -> None:
        for kind, _, names in renamed:
            for rows in _portions(list(names)):
                flush.names.append((kind, json.dumps({row: names[row] for row in rows})))
                await asyncio.sleep(0)

    async def _add_amounts(self, flush: Flush, batches: Iterable[tuple[Meters, list[Batch]]]) -> None:
        for meters, taken in batches:
            flush.oldest.append((meters.id, meters.oldest(flush.moment.ledger_ms)))
            for batch in taken:
                number, rows = batch.slice, batch.rows
                logged = self._logged.get((meters.id, number), 0) + len(rows)
                if logged > FLUSH_ROWS_MAX + LOG_PART_MAX * len(meters.rows(number)):
                    flush.replaced.append((meters.id, number))
                    rows = list(meters.rows(number))
                    logged = len(rows)
                self._logged[meters.id, number] = logged
                for portion in _portions(rows):
                    amounts = meters.sums(number, portion)
                    flush.amounts.append((meters.id, number, packed(portion, amounts)))
                    self.on_charged(meters, number, portion, amounts)
                    await asyncio.sleep(0)
        oldest = dict(flush.oldest)
        self._logged = {key: count for key, count in self._logged.items() if key[1] >= oldest.get(key[0], key[1] + 1)}

    async def _write(self, flush: Flush) -> None:
        writing = asyncio.get_running_loop().run_in_executor(self._storage.thread, self._storage.write, flush)
        done, _ = await asyncio.wait({writing}, timeout=FLUSH_WAIT_S_MAX)
        if not done:
            self._fail(f"{self._storage.directory}: the disk has not answered for {FLUSH_WAIT_S_MAX:g} s")
        await writing

    def _fail(self, reason: str) -> None:
        self._ledger.answer_unflushed = False
        if reason != self._failing:
            self._failing = reason
            self._on_failing(reason)
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter(False)


def _portions(rows: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(rows), FLUSH_ROWS_MAX):
        yield rows[start : start + FLUSH_ROWS_MAX]
