"""What this node knows and does, whoever asks: limits, meters, and the state directory behind them.

`answer` takes the bytes of a policy request and gives the bytes of the reply, at once where nothing has to reach the
disk first. What cannot be stored is not let through: the charge is taken back, and Postfix gets the fail-safe
(`on_error`). `reload` puts the limits file into force as a whole or not at all; a copy of the last good one is kept in
the state directory, for a start while the file is wrong.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from postmeter import logs
from postmeter.clock import Clock
from postmeter.core.answer import amount_text
from postmeter.core.limits import Limit, duration_text
from postmeter.core.meters import Ledger, MetersId
from postmeter.core.policy import PERMIT, Decision, Policy, Repeats
from postmeter.core.request import Parser, Request, attribute
from postmeter.core.rule import Reading
from postmeter.defaults import EXPIRE_ENTRIES_MAX, EXPIRE_PAUSE_S, TIDY_INTERVAL_S
from postmeter.documents import read_text
from postmeter.errors import ConfigError, StorageError
from postmeter.flusher import Flusher
from postmeter.limits_document import read_limits
from postmeter.settings import Settings
from postmeter.storage import Storage

Reply = Callable[[bytes], None]

DUNNO = b"action=DUNNO\n\n"
FAIL_SAFE = {
    "defer": b"action=451 4.3.0 The policy service cannot count this message now, please try again later\n\n",
    "dunno": DUNNO,
}

# What is logged of an answer that is not a refusal.
_EVENTS = {"HOLD": "held", "DISCARD": "discarded", "REDIRECT": "redirected", "DUNNO": "let pass", "WARN": "let pass"}
_LOGGED = ("protocol_state", "queue_id", "instance", "client_address", "sasl_username", "sender", "recipient")
_logged = [(name, attribute(name)) for name in _LOGGED]


class Node:
    """Everything but the sockets. To be used from one event loop.

    `health` maps a part to "" while it serves, else to the reason why not; `on_health` is called when that changes.
    """

    def __init__(self, settings: Settings) -> None:
        """Lock the state directory, and load it and the limits. Raises StorageError and ConfigError."""
        self.settings = settings
        self.parser = Parser()
        self.ledger = Ledger()
        self.health = {"policy": "starting", "storage": ""}
        self.on_health: list[Callable[[], None]] = []
        self._log_all = settings.log_level == "debug"
        self._fail_safe = FAIL_SAFE[settings.on_error]
        self._repeats = Repeats()
        self._storage = Storage(settings.state_dir)
        try:
            self._clock = self._restore()
            self._flusher = Flusher(self._storage, self.ledger, self._clock, self._storage_changed)
            self.policy = self._put_in_force(self._first_limits())
        except BaseException:
            self._storage.close()
            raise

    def now_ms(self) -> int:
        """The ledger's clock."""
        return self._clock.now_ms()

    # --- requests -----------------------------------------------------------------------------------------------------

    def answer(self, data: bytes, client: str, reply: Reply) -> bytes | None:
        """The reply to one policy request; or None, and `reply` is called with it when the disk has answered.

        Raises ProtocolError.
        """
        request = self.parser.parse(data)
        decision = self.policy.decide(request, self._clock.now_ms())
        if decision is PERMIT and not self._log_all:
            return DUNNO
        for reading in decision.exceeded:
            _log_exceeded(reading, decision, request, client)
        answer = f"action={decision.action}\n\n".encode()
        if decision.held is None:
            _log_answer(decision.action, request, client)
            return answer

        def settle(stored: bool) -> None:
            if not stored:
                self.policy.undo(decision)
            _log_answer(decision.action if stored else "fail-safe", request, client)
            reply(answer if stored else self._fail_safe)

        self._flusher.hold(settle)
        return None

    def fail_safe(self) -> bytes:
        """The reply where no decision can be made."""
        return self._fail_safe

    # --- limits -------------------------------------------------------------------------------------------------------

    async def reload(self) -> None:
        """Put the limits file into force. Raises ConfigError with all its problems; the limits stay as they were."""
        path = self.settings.limits
        text = await asyncio.to_thread(read_text, path)
        self.policy = self._put_in_force(await asyncio.to_thread(read_limits, text, str(path)))
        await asyncio.to_thread(self._keep, text)

    def _first_limits(self) -> list[Limit]:
        try:
            text = read_text(self.settings.limits)
            limits = read_limits(text, str(self.settings.limits))
        except ConfigError as error:
            if not self._last_good.exists():
                raise
            log_problems("limits refused", error)
            logs.event(logging.ERROR, "last good limits in force", file=self._last_good)
            return read_limits(read_text(self._last_good), str(self._last_good))
        self._keep(text)
        return limits

    def _put_in_force(self, limits: list[Limit]) -> Policy:
        policy = Policy(limits, self.ledger, self.settings.charge_at, self._repeats)
        self._flusher.forget(retired=self.ledger.retain(policy.ids))
        self._overrides_end_s = policy.apply_overrides(time.time())
        # The columns live as long as the limits: the garbage collector need not walk through them.
        gc.collect()
        gc.freeze()
        logs.event(logging.INFO, "limits in force", limits=",".join(limit.name for limit in limits))
        return policy

    @property
    def _last_good(self) -> Path:
        return self.settings.state_dir / "limits.yaml"

    def _keep(self, text: str) -> None:
        draft = self._last_good.with_suffix(".new")
        try:
            draft.write_text(text, "utf-8")
            os.replace(draft, self._last_good)
        except OSError as error:
            logs.event(logging.WARNING, "last good limits not kept", file=self._last_good, error=error)

    # --- usage --------------------------------------------------------------------------------------------------------

    async def reset(self, key: str, limit: str | None) -> list[tuple[MetersId, int]]:
        """Forget what a key has used, on one limit or on all; returns what that was. Raises StorageError."""
        forgotten: list[tuple[MetersId, int]] = []
        resets: list[tuple[MetersId, int, int]] = []
        for id, meters in self.ledger.meters.items():
            row = meters.keys.rows.get(key)
            if row is not None and limit in (None, id.limit) and (used := meters.usage(row, self.now_ms())):
                forgotten.append((id, used))
                resets += [(id, number, row) for number in meters.reset(row)]
        if not forgotten:
            return []
        stored = asyncio.get_running_loop().create_future()
        self._flusher.forget(resets=resets)

        def told(done: bool) -> None:
            # Who asked may have gone away since.
            if not stored.done():
                stored.set_result(done)

        self._flusher.hold(told)
        if not await stored:
            raise StorageError("forgotten here, but not on the disk yet: it will be when the disk can be written again")
        logs.event(logging.INFO, "reset", key=key, limits=",".join(sorted({id.limit for id, _ in forgotten})))
        return forgotten

    def _restore(self) -> Clock:
        state = self._storage.load()
        clock = Clock(state.moment)
        now_ms = clock.now_ms()
        longest_ms = max((2 * id.window_ms for id in state.meters), default=0)
        self.ledger.tolls_ms = [toll_ms for toll_ms in state.tolls_ms if now_ms - toll_ms < longest_ms]
        if not state.clean:
            self.ledger.tolls_ms.append(now_ms)
            logs.event(logging.WARNING, "unclean stop", assumed="what was not on the disk yet counts as used")
        for kind in {id.key for id in state.meters}:
            self.ledger.keys(kind).restore(self._storage.names(kind))
        for id in state.meters:
            meters = self.ledger.restore(id)
            meters.restore(self._storage.amounts(id, meters.oldest(now_ms)))
        self.ledger.tidy()
        return clock

    # --- running ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Flush and tidy up until `stop`. Raises StorageError if the last flush fails."""
        tidying = asyncio.create_task(self._tidy())
        try:
            await self._flusher.run()
        finally:
            tidying.cancel()
            self._storage.close()

    def stop(self) -> None:
        """Let `run` end with everything stored. Nothing may be asked any more."""
        self._flusher.stop()

    def set_health(self, part: str, reason: str) -> None:
        """A part serves (""), or does not, and why."""
        self.health[part] = reason
        for changed in self.on_health:
            changed()

    async def _tidy(self) -> None:
        while True:
            more = self.ledger.expire(self.now_ms(), EXPIRE_ENTRIES_MAX)
            if time.time() >= self._overrides_end_s:
                self._overrides_end_s = self.policy.apply_overrides(time.time())
            await asyncio.sleep(EXPIRE_PAUSE_S if more else TIDY_INTERVAL_S)

    def _storage_changed(self, reason: str) -> None:
        if reason:
            logs.event(logging.ERROR, "storage fails", reason=reason, answer=self.settings.on_error)
        else:
            logs.event(logging.INFO, "storage works again")
        self.set_health("storage", reason)


def log_problems(name: str, error: ConfigError) -> None:
    """One line for every problem of a file."""
    for problem in error.problems:
        logs.event(logging.ERROR, name, problem=problem)


def _log_exceeded(reading: Reading, decision: Decision, request: Request, client: str) -> None:
    limit = reading.limit
    verb = decision.action.split(None, 1)[0]
    if limit.shadow:
        name, level = "would refuse", logging.INFO
    elif reading is decision.exceeded[0]:
        name, level = _EVENTS.get(verb, "refused"), logging.WARNING
    else:
        name, level = "exceeded too", logging.INFO
    logs.event(
        level,
        name,
        limit=limit.name,
        key=reading.key,
        used=amount_text(limit.count, reading.used),
        max=amount_text(limit.count, reading.max),
        per=duration_text(reading.meters.id.window_ms),
        charge=amount_text(limit.count, reading.amount),
        wait=None if reading.wait_ms is None else duration_text(reading.wait_ms),
        action=verb,
        peer=client,
        **_attributes(request),
    )


def _log_answer(action: str, request: Request, client: str) -> None:
    if logs.is_asked(logging.DEBUG):
        logs.event(logging.DEBUG, "answered", action=action, peer=client, **_attributes(request))


def _attributes(request: Request) -> dict[str, str | None]:
    return {name: cut(request) or None for name, cut in _logged}
