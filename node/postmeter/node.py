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
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import islice
from math import inf
from pathlib import Path

from postmeter import logs
from postmeter.clock import Clock
from postmeter.cluster import Cluster, Wanted
from postmeter.core.answer import amount_text
from postmeter.core.limits import Limit, Override, duration_text
from postmeter.core.meters import Ledger, MetersId
from postmeter.core.policy import PERMIT, Decision, Policy, Repeats
from postmeter.core.request import Parser, Request, attribute
from postmeter.core.roster import Roster
from postmeter.core.rule import Reading
from postmeter.core.shared import SharedLedger, Terms
from postmeter.defaults import EXPIRE_ENTRIES_MAX, EXPIRE_PAUSE_S, OVERRIDES_LOGGED_MAX, TIDY_INTERVAL_S
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
        self.health = {"policy": "starting", "storage": ""}
        if settings.etcd is not None:
            self.health["etcd"] = "has not answered yet"
        if settings.cluster is not None:
            self.health["peers"] = "none has been reached yet"
        self.on_health: list[Callable[[], None]] = []
        self._troubles = {"start": "starting"}
        self._unready = settings.etcd is not None
        self._overrides_end_s = inf
        self.cluster: Cluster | None = None
        self._log_all = settings.log_level == "debug"
        self._fail_safe = FAIL_SAFE[settings.on_error]
        self._repeats = Repeats()
        self.storage = Storage(settings.state_dir)
        try:
            self.state = self.storage.load()
            self.clock = Clock(self.state.moment)
            self.ledger = (
                Ledger() if settings.cluster is None else SharedLedger(Roster(settings.node, {0: ()}, 0, {}), Terms())
            )
            self._restore()
            self._flusher = Flusher(self.storage, self.ledger, self.clock, self._storage_changed)
            if isinstance(self.ledger, SharedLedger):
                self.cluster = Cluster(settings, self.ledger, self.storage, self.clock, self._part_changed)
                self._flusher.on_charged, self._flusher.alive_ms = self.cluster.charged, self.cluster.alive_ms
            # Those of etcd are not known yet, and what they count must not be forgotten.
            later = settings.etcd is not None
            self.policy = self._policy([]) if later else self._put_in_force(self._first_limits())
        except BaseException:
            self.storage.close()
            raise

    def now_ms(self) -> int:
        """The ledger's clock."""
        return self.clock.now_ms()

    # --- requests -----------------------------------------------------------------------------------------------------

    def answer(self, data: bytes, client: str, reply: Reply) -> bytes | None:
        """The reply to one policy request; or None, and `reply` is called with it when disk or peers have answered.

        Raises ProtocolError.
        """
        request = self.parser.parse(data)
        if self._unready:
            return self._fail_safe
        now_ms = self.clock.now_ms()
        decision = self.policy.decide(request, now_ms)
        if decision is PERMIT and not self._log_all:
            return DUNNO
        if decision.refused and self.cluster is not None and (wanted := self.cluster.wants(decision, now_ms)):
            self._borrow(wanted, request, client, reply)
            return None
        return self._conclude(decision, request, client, reply)

    def _borrow(self, wanted: Wanted, request: Request, client: str, reply: Reply) -> None:
        """Decide again when peers have lent what lacks, or after the time that Postfix may wait for that."""
        cluster = self.cluster
        assert cluster is not None
        until_ms = self.clock.now_ms() + cluster.settings.borrow_timeout_ms

        def resume() -> None:
            now_ms = self.clock.now_ms()
            answer: bytes | None = self._fail_safe
            try:
                decision = self.policy.decide(request, now_ms)
                if decision.refused and now_ms < until_ms and (still := cluster.wants(decision, now_ms)):
                    cluster.wait(still, until_ms - now_ms, resume)
                    return
                answer = self._conclude(decision, request, client, reply)
            except Exception as error:  # noqa: BLE001 - a bug must not leave Postfix without an answer
                logs.failure("no decision", error)
            if answer is not None:
                reply(answer)

        cluster.wait(wanted, cluster.settings.borrow_timeout_ms, resume)

    def _conclude(self, decision: Decision, request: Request, client: str, reply: Reply) -> bytes | None:
        """Log a decision and answer; after the disk has, if the charge has to be there first."""
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
        if self.settings.etcd is not None:
            logs.event(
                logging.INFO, "nothing to reload", reason="limits come from etcd, and changes apply by themselves"
            )
            return
        path = self.settings.limits
        text = await asyncio.to_thread(read_text, path)
        self.policy = self._put_in_force(await asyncio.to_thread(read_limits, text, str(path)))
        await asyncio.to_thread(keep, self._last_good, text)

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
        keep(self._last_good, text)
        return limits

    def put_in_force(self, limits: list[Limit]) -> None:
        """These limits hold from now on."""
        self.policy = self._put_in_force(limits)

    def change_overrides(self, changes: Mapping[str, Mapping[str, Override | None]]) -> None:
        """These hold from now on, by limit and key; None for what does not any more."""
        self.policy.change_overrides(changes, self._changing)
        for name, overrides in changes.items():
            for key, override in islice(overrides.items(), OVERRIDES_LOGGED_MAX):
                logs.event(logging.INFO, "override in force" if override else "override ended", limit=name, key=key)

    def _policy(self, limits: list[Limit]) -> Policy:
        return Policy(limits, self.ledger, self.settings.charge_at, self._repeats)

    def _put_in_force(self, limits: list[Limit]) -> Policy:
        policy = self._policy(limits)
        self._flusher.forget(retired=self.ledger.retain(policy.ids))
        self._overrides_end_s = policy.apply_overrides(time.time(), self._changing)
        # The columns live as long as the limits: the garbage collector need not walk through them.
        gc.collect()
        gc.freeze()
        logs.event(logging.INFO, "limits in force", limits=",".join(limit.name for limit in limits))
        return policy

    def _changing(self, id: MetersId, keys: Iterable[str | None]) -> None:
        if self.cluster is not None:
            self.cluster.change(id, keys)

    @property
    def _last_good(self) -> Path:
        return self.settings.state_dir / "limits.yaml"

    # --- usage --------------------------------------------------------------------------------------------------------

    async def reset(self, key: str, limit: str | None) -> list[tuple[MetersId, int]]:
        """Forget what a key has used, on one limit or on all; returns what that was. Raises StorageError."""
        forgotten: list[tuple[MetersId, int]] = []
        resets: list[tuple[MetersId, int, int]] = []
        for id, meters in self.ledger.meters.items():
            row = meters.keys.rows.get(key)
            if row is not None and limit in (None, id.limit) and (used := meters.usage(row, self.now_ms())):
                forgotten.append((id, used))
                # While the row has its name.
                for number, _ in meters.slices(row, self.now_ms()):
                    self._flusher.on_charged(meters, number, [row], [0])
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

    def _restore(self) -> None:
        """Take over what an earlier run left."""
        state, ledger, now_ms = self.state, self.ledger, self.clock.now_ms()
        longest_ms = max((2 * id.window_ms for id in state.meters), default=0)
        ledger.tolls_ms = [toll_ms for toll_ms in state.tolls_ms if now_ms - toll_ms < longest_ms]
        if not state.clean:
            logs.event(logging.WARNING, "unclean stop", assumed="what was not on the disk yet counts as used")
            if self.settings.cluster is None:
                ledger.tolls_ms.append(now_ms)
        for kind in {id.key for id in state.meters}:
            ledger.keys(kind).restore(self.storage.names(kind))
        for id in state.meters:
            meters = ledger.restore(id)
            meters.restore(self.storage.amounts(id, meters.oldest(now_ms)))
        ledger.tidy()

    # --- running ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Flush and tidy up until `stop`. Raises StorageError if the last flush fails, and what ends the sharing."""
        tidying = asyncio.create_task(self._tidy())
        sharing = asyncio.create_task(self.cluster.run()) if self.cluster is not None else None
        try:
            if sharing is not None:
                sharing.add_done_callback(lambda _: self.stop())
            await self._flusher.run()
        finally:
            tidying.cancel()
            if sharing is not None and self.cluster is not None:
                stopping = asyncio.create_task(self.cluster.stop())
                await asyncio.wait({sharing, stopping}, return_when=asyncio.FIRST_COMPLETED)
                stopping.cancel()
                sharing.cancel()
            self.storage.close()
        if sharing is not None:
            with suppress(asyncio.CancelledError):
                await stopping
            with suppress(asyncio.CancelledError):
                await sharing

    def stop(self) -> None:
        """Let `run` end with everything stored. Nothing may be asked any more."""
        self._flusher.stop()

    def set_trouble(self, what: str, reason: str) -> None:
        """Something that answering Postfix needs is not there, and why; or is there again ("")."""
        self._troubles[what] = reason
        self._unready = bool(self._troubles.get("limits")) or (self.cluster is not None and self.cluster.rights is None)
        self.set_health("policy", "; ".join(filter(None, self._troubles.values())))

    def set_health(self, part: str, reason: str) -> None:
        """A part serves (""), or does not, and why."""
        self.health[part] = reason
        for changed in self.on_health:
            changed()

    async def _tidy(self) -> None:
        while True:
            more = self.ledger.expire(self.now_ms(), EXPIRE_ENTRIES_MAX)
            if time.time() >= self._overrides_end_s:
                self._overrides_end_s = self.policy.apply_overrides(time.time(), self._changing)
            await asyncio.sleep(EXPIRE_PAUSE_S if more else TIDY_INTERVAL_S)

    def _part_changed(self, part: str, reason: str) -> None:
        if part == "storage":
            self._storage_changed(reason)
        else:
            self.set_health(part, reason)

    def _storage_changed(self, reason: str) -> None:
        if bool(reason) == bool(self.health["storage"]):
            return
        if reason:
            logs.event(logging.ERROR, "storage fails", reason=reason, answer=self.settings.on_error)
        else:
            logs.event(logging.INFO, "storage works again")
        self.set_health("storage", reason)


def keep(path: Path, text: str) -> None:
    """Keep limits for a start without their source; a file that is there is replaced as a whole."""
    draft = path.with_suffix(".new")
    try:
        draft.write_text(text, "utf-8")
        os.replace(draft, path)
    except OSError as error:
        logs.event(logging.WARNING, "last good limits not kept", file=path, error=error)


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
