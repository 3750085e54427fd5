"""The decision: limits compiled for speed, and what to tell Postfix about one request.

A request is *charged* on every limit that covers it, or on none. Postfix asks at several stages; a limit is charged at
one of them and only looked at before:

    stage            charges                                  looks
    RCPT             limits that need `recipient`, and all    the others: one recipient, SIZE= as claimed
                     with charge_at=rcpt
    DATA             -                                        the others, with all accepted recipients
    END-OF-MESSAGE   the others                               -
    any other        -                                        -

`decide` walks through the limits of a stage. If one of them is exceeded it starts again with `readings`, slower and in
the order of the file, which say how every limit stands; the answer is made from those. `readings` never charge and are
what `postmeter ask` shows, too.

Of several limits that are exceeded one answers: one that the charge could never fit, else the first in the file. One in
shadow, or one whose action lets the mail pass (WARN, FILTER, ...), is not charged when it is exceeded, but keeps none of
the others from being charged.

A charge may be answered at once while no more than `unflushed_max` of its meter is not on disk; else `Decision.held`
carries it, and the caller answers after a flush, or calls `undo` and answers with the fail-safe.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Literal, NamedTuple

from postmeter.core.answer import effect, fill, fill_never, is_temporary
from postmeter.core.conditions import compile_all
from postmeter.core.limits import Limit
from postmeter.core.meters import OVERFLOW_KEY, OVERFLOW_ROW, Keys, Ledger, Meters, MetersId
from postmeter.core.request import END_OF_MESSAGE, Request, attribute, number
from postmeter.defaults import REPEATS_MAX

ChargeAt = Literal["end-of-message", "rcpt"]


class Charge(NamedTuple):
    """An amount that was added to a slice of a meter."""

    meters: Meters
    row: int
    key: str
    slice: int
    amount: int


@dataclass(frozen=True, slots=True)
class Reading:
    """How one meter stands for one request, in the limit's unit.

    `wait_ms` is the time until `amount` would fit: 0 now, None never. `charging` says whether this is the stage that
    charges it.
    """

    limit: Limit
    meters: Meters
    key: str
    used: int
    max: int
    amount: int
    wait_ms: int | None
    charging: bool

    @property
    def exceeded(self) -> bool:
        """Whether the amount does not fit now."""
        return self.wait_ms != 0

    @property
    def hopeless(self) -> bool:
        """Whether the amount can never fit."""
        return self.amount > self.max

    @property
    def refuses(self) -> bool:
        """Whether the mail must not pass as it is. Where nothing is charged only a refusal is of use."""
        if not self.exceeded or self.limit.shadow:
            return False
        return effect(self.limit.action) in (("refuse", "divert") if self.charging else ("refuse",))

    @property
    def action(self) -> str:
        """What Postfix is told if this reading answers."""
        limit, window_ms = self.limit, self.meters.id.window_ms
        if self.hopeless and is_temporary(limit.action):
            return fill_never(limit, self.key, self.amount, self.max, window_ms)
        return fill(limit, self.key, self.used, self.max, window_ms, self.wait_ms or window_ms)


@dataclass(frozen=True, slots=True)
class Decision:
    """What to tell Postfix. `exceeded` are readings worth a log line; if `refused`, the first one answers.

    `held`, if not None, are charges that must be on disk before the action is sent; none, for a repeated request whose
    first charge may not be. `marks` are what it will be recognised by.
    """

    action: str
    refused: bool = False
    exceeded: tuple[Reading, ...] = ()
    held: tuple[Charge, ...] | None = None
    marks: tuple[str, ...] = ()


PERMIT = Decision("DUNNO")
REPEATED = Decision("DUNNO", held=())


class Repeats:
    """Marks of the requests that were charged last, so that a repeat is not charged again."""

    __slots__ = ("_order", "marks")

    def __init__(self) -> None:
        self.marks: dict[str, None] = {}
        self._order: deque[str] = deque()

    def add(self, mark: str) -> None:
        """Remember a mark, and forget the oldest one if there are too many."""
        self.marks[mark] = None
        self._order.append(mark)
        if len(self._order) > REPEATS_MAX:
            self.marks.pop(self._order.popleft(), None)

    def forget(self, mark: str) -> None:
        """The request was not let through after all."""
        self.marks.pop(mark, None)


class Policy:
    """Limits at work on a ledger. Not changed once made: other limits make another policy on the same ledger."""

    def __init__(self, limits: Sequence[Limit], ledger: Ledger, charge_at: ChargeAt, repeats: Repeats) -> None:
        self.limits = tuple(limits)
        self._ledger = ledger
        self._repeats = repeats
        self._rules = [_Rule(limit, ledger, charge_at) for limit in limits]
        self._plans = {stage: _Plan(stage, self._rules) for stage in ("RCPT", "DATA", END_OF_MESSAGE)}

    @property
    def ids(self) -> set[MetersId]:
        """What the limits count."""
        return {meters.id for rule in self._rules for meters in rule.meters}

    def apply_overrides(self, wall_s: float) -> float:
        """Put `max` and the overrides that are in force at this time (seconds since 1970) into the meters.

        Returns when it is to be called again: when the next override ends, or infinity.
        """
        ends = [o.until_s for limit in self.limits for o in limit.overrides.values() if o.until_s is not None]
        for rule in self._rules:
            for meters in rule.meters:
                window_ms, overrides = meters.id.window_ms, rule.limit.overrides.items()
                in_force = {key: o.max for key, o in overrides if o.until_s is None or wall_s < o.until_s}
                meters.set_max(
                    rule.limit.windows[window_ms],
                    {key: max[window_ms] for key, max in in_force.items() if window_ms in max},
                )
        return min((end for end in ends if end > wall_s), default=inf)

    def decide(self, request: Request, now_ms: int) -> Decision:
        """Answer one parsed request, and charge it if this is the stage for it. Raises ProtocolError."""
        plan = self._plans.get(_stage(request))
        if plan is None or not plan.groups:
            return PERMIT
        instance, mark = plan.mark(request)
        if mark and mark in self._repeats.marks:
            return REPEATED
        amounts = plan.amounts(request)
        charges: list[_Todo] = []
        for cut_key, keys, entries in plan.groups:
            key = cut_key(request)
            if not key:
                continue
            row = keys.rows.get(key)
            if row is None and keys.full:
                key, row = OVERFLOW_KEY, OVERFLOW_ROW
            for covers, exempt_keys, unit, charging, once, several in entries:
                if (covers is not None and not covers(request)) or (exempt_keys and key in exempt_keys):
                    continue
                if once and instance and _once_mark(instance, once, key) in self._repeats.marks:
                    continue
                amount = amounts[unit]
                for meters in several:
                    if now_ms >= meters.slice_end_ms:
                        meters.advance(now_ms)
                    used = amount if row is None else meters.used[row] + amount
                    if used > meters.quick_max and meters.usage(row, now_ms) + amount > meters.allowance(key, now_ms):
                        return self._decide_closely(request, now_ms)
                if charging and amount:
                    charges.append((keys, key, row, several, amount, once))
        return self._charge(charges, instance, mark) if charges else PERMIT

    def explain(self, request: Request, now_ms: int) -> list[tuple[Limit, str, list[Reading]]]:
        """Every limit in the order of the file: why it does not apply to the request, or its readings. Never charges.

        Raises ProtocolError.
        """
        stage = _stage(request)
        plan = self._plans.get(stage)
        if plan is None:
            return [(limit, f"nothing is counted at {stage or 'an unnamed stage'}", []) for limit in self.limits]
        instance, mark = plan.mark(request)
        if mark and mark in self._repeats.marks:
            return [(limit, "the request was charged before", []) for limit in self.limits]
        amounts = plan.amounts(request)
        explained: list[tuple[Limit, str, list[Reading]]] = []
        for rule in self._rules:
            key = rule.cut_key(request)
            why_not = rule.why_not(request, key, stage)
            readings: list[Reading] = []
            if not why_not and instance and rule.once and _once_mark(instance, rule.once, key) in self._repeats.marks:
                why_not = "the message was charged before"
            if not why_not:
                readings = [rule.read(meters, key, amounts[rule.unit], stage, now_ms) for meters in rule.meters]
            explained.append((rule.limit, why_not, readings))
        return explained

    def undo(self, decision: Decision) -> None:
        """Take held charges back: they could not be stored, and the mail is not let through."""
        for charge in decision.held or ():
            charge.meters.refund(charge.row, charge.key, charge.slice, charge.amount)
        for mark in decision.marks:
            self._repeats.forget(mark)

    def _decide_closely(self, request: Request, now_ms: int) -> Decision:
        readings = [reading for _, _, several in self.explain(request, now_ms) for reading in several]
        decision = answer(readings)
        if decision.refused:
            return decision
        instance, mark = self._plans[_stage(request)].mark(request)
        once = self._plans[_stage(request)].once
        charges: list[_Todo] = [
            (r.meters.keys, r.key, r.meters.keys.row(r.key), (r.meters,), r.amount, r.limit.name if once else "")
            for r in readings
            if r.charging and r.amount and not r.exceeded
        ]
        charged = self._charge(charges, instance, mark) if charges else PERMIT
        return replace(decision, held=charged.held, marks=charged.marks)

    def _charge(self, charges: list[_Todo], instance: str, mark: str) -> Decision:
        held = not self._ledger.answer_unflushed
        marks = [mark] if mark else []
        for keys, key, row, several, amount, once in charges:
            if row is None:
                row = keys.row(key)
                if row is None:
                    row = keys.add(key)
            for meters in several:
                meters.used[row] += amount
                current, fresh = meters.current, meters.fresh
                current[row] = current.get(row, 0) + amount
                fresh[row] = unflushed = fresh.get(row, 0) + amount
                if (unflushed > meters.quick_unflushed_max or meters.waiting) and meters.must_wait(key, row):
                    held = True
            if once and instance:
                marks.append(_once_mark(instance, once, key))
        for mark in marks:
            self._repeats.add(mark)
        if not held:
            return PERMIT
        done = (
            Charge(meters, keys.rows.get(key, OVERFLOW_ROW), key, meters.slice, amount)
            for keys, key, _, several, amount, _ in charges
            for meters in several
        )
        return Decision("DUNNO", held=tuple(done), marks=tuple(marks))


def answer(readings: Iterable[Reading]) -> Decision:
    """What these readings, in the order of the file, add up to, before anything is charged."""
    exceeded = [reading for reading in readings if reading.exceeded]
    refusing = [reading for reading in exceeded if reading.refuses]
    if not refusing:
        worth_a_line = tuple(reading for reading in exceeded if reading.charging)
        actions = [reading.action for reading in worth_a_line if not reading.limit.shadow]
        return Decision(actions[0] if actions else PERMIT.action, exceeded=worth_a_line)
    hopeless = [reading for reading in refusing if reading.hopeless]
    first = (hopeless or refusing)[0]
    alike = [reading for reading in refusing if reading.limit is first.limit and not hopeless]
    answering = max(alike, key=lambda reading: reading.wait_ms or inf, default=first)
    return Decision(answering.action, True, (answering, *(other for other in exceeded if other is not answering)))


_Todo = tuple[Keys, str, int | None, tuple[Meters, ...], int, str]
"""What is to be charged: rows, key and its row (None if new), meters, amount, limit if once a message."""

_Entry = tuple[Callable[[Request], bool] | None, frozenset[str], int, bool, str, tuple[Meters, ...]]
"""A rule at one stage: covers, exempt keys, unit, whether it charges here, limit if once a message, meters."""

_UNITS = ("messages", "recipients", "bytes")

_stage = attribute("protocol_state")
_instance = attribute("instance")
_recipient = attribute("recipient")
_queue_id = attribute("queue_id")
_recipient_count = number("recipient_count")
_size = number("size")


def _once_mark(instance: str, limit: str, key: str) -> str:
    return f"{instance}\n{limit}\n{key}"


class _Rule:
    """A limit with its meters."""

    def __init__(self, limit: Limit, ledger: Ledger, charge_at: ChargeAt) -> None:
        self.limit = limit
        self.stage = "RCPT" if charge_at == "rcpt" or limit.needs_recipient else END_OF_MESSAGE
        self.unit = _UNITS.index(limit.count)
        # Asked once for every recipient, the message itself and its size must count only once.
        self.once = limit.name if self.stage == "RCPT" and limit.count != "recipients" else ""
        self.cut_key = limit.key.compile()
        self.keys = ledger.keys(str(limit.key))
        self.meters = tuple(
            ledger.open(MetersId(limit.name, str(limit.key), limit.count, window_ms)) for window_ms in limit.windows
        )
        self._match = compile_all(limit.match)
        self._exempt = [exempt for conditions in limit.exempt if (exempt := compile_all(conditions))]

    def asked_at(self, stage: str) -> bool:
        """Whether the limit is charged or looked at."""
        return stage == self.stage or (self.stage == END_OF_MESSAGE)

    @property
    def covers(self) -> Callable[[Request], bool] | None:
        """A function of the request, None if the limit covers all."""
        match, exempt = self._match, self._exempt
        if not exempt:
            return match
        return lambda request: (match is None or match(request)) and not any(spared(request) for spared in exempt)

    def why_not(self, request: Request, key: str, stage: str) -> str:
        """Why the limit does not apply to a request; "" if it does."""
        if not self.asked_at(stage):
            return f"is charged at {self.stage} and not asked at {stage}"
        if not key:
            return f"the request has no {self.limit.key}"
        for condition in self.limit.match:
            value = attribute(condition.attribute)(request)
            if not condition.holds(value):
                return f"does not match: {condition.attribute} is {value!r}, wanted: {condition.written}"
        if key in self.limit.exempt_keys:
            return f"{key} is exempt"
        if any(spared(request) for spared in self._exempt):
            return "the request is exempt"
        return ""

    def read(self, meters: Meters, key: str, amount: int, stage: str, now_ms: int) -> Reading:
        """How one of its meters stands."""
        row = self.keys.row(key)
        if row == OVERFLOW_ROW:
            key = OVERFLOW_KEY
        return Reading(
            limit=self.limit,
            meters=meters,
            key=key,
            used=meters.max_of(key) - meters.allowance(key, now_ms) + meters.usage(row, now_ms),
            max=meters.max_of(key),
            amount=amount,
            wait_ms=meters.wait_ms(key, row, amount, now_ms),
            charging=stage == self.stage,
        )


class _Plan:
    """What is asked at one stage, grouped by key so that a key is cut and looked up once."""

    def __init__(self, stage: str, rules: Iterable[_Rule]) -> None:
        asked = [rule for rule in rules if rule.asked_at(stage)]
        self.charges = any(rule.stage == stage for rule in asked)
        self.once = any(rule.once for rule in asked)
        self._at_rcpt = stage == "RCPT"
        self._units = {rule.unit for rule in asked}
        by_key: dict[str, list[_Rule]] = {}
        for rule in asked:
            by_key.setdefault(str(rule.limit.key), []).append(rule)
        self.groups = [
            (alike[0].cut_key, alike[0].keys, tuple(_entry(rule, stage) for rule in alike)) for alike in by_key.values()
        ]

    def mark(self, request: Request) -> tuple[str, str]:
        """(instance, what the request is recognised by); both "" where nothing is charged or `instance` is empty."""
        instance = _instance(request) if self.charges else ""
        if not instance:
            return "", ""
        if self._at_rcpt:
            return instance, f"{instance}\n{_recipient(request)}"
        # If another service refuses the message, the client may add recipients and send it again as the same instance.
        return instance, f"{instance}\n{_queue_id(request)}\n{_recipient_count(request)}"

    def amounts(self, request: Request) -> tuple[int, int, int]:
        """Messages, recipients and bytes of the request, as far as they are counted."""
        recipients = 1 if self._at_rcpt or 1 not in self._units else _recipient_count(request) or 1
        return 1, recipients, _size(request) if 2 in self._units else 0


def _entry(rule: _Rule, stage: str) -> _Entry:
    charging = rule.stage == stage
    return rule.covers, rule.limit.exempt_keys, rule.unit, charging, rule.once if charging else "", rule.meters
