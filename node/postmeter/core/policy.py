"""The decision: what to tell Postfix about one request, and what to charge.

A request is charged on every limit that covers it, or on none. `decide` takes the quick way (`compiled.py`) as long as
everything fits. If something does not, `explain` looks at every limit in the order of the file, and the answer is made
of its readings. It never charges, and is what `postmeter ask` shows, too.

Of several limits that are exceeded one answers: one that the charge could never fit, else the first in the file. One in
shadow, or one whose action lets the mail pass (WARN, FILTER, ...), is not charged when it is exceeded; that keeps none
of the others from being charged.

A charge may be answered at once while no more than `unflushed_max` of its meter is not on disk; else `Decision.held`
carries it, and the caller answers after a flush, or calls `undo` and answers with the fail-safe.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

from postmeter.core.compiled import REPEATS_MASK, Decide, compile_stage
from postmeter.core.limits import Limit, Override
from postmeter.core.meters import Ledger, Meters, MetersId
from postmeter.core.request import STAGES, Layout, Request, attribute, number
from postmeter.core.rule import ChargeAt, Reading, Rule, mark, once_mark
from postmeter.core.shared import SharedMeters
from postmeter.defaults import REPEAT_PAIRS

Changing = Callable[[MetersId, Collection[str | None]], object]

_stage = attribute("protocol_state")


class Charge(NamedTuple):
    """An amount that was added to a slice of a meter."""

    meters: Meters
    row: int
    key: str
    slice: int
    amount: int


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
    marks: tuple[int, ...] = ()


PERMIT = Decision("DUNNO")
REPEATED = Decision("DUNNO", held=())


class Repeats:
    """Marks of the requests that were charged last, so that a repeat is not charged again.

    Each has its pair of places in a table, where the last two are kept: so of the next 1,000 marks the probability that
    they displace a certain one is 1 in 100,000, of the next 10,000 it is 1 in 1,000.
    """

    __slots__ = ("marks",)

    def __init__(self) -> None:
        self.marks = array("q", bytes(16 * REPEAT_PAIRS))

    def __contains__(self, mark: int) -> bool:
        place = mark & REPEATS_MASK
        return mark != 0 and mark in (self.marks[place], self.marks[place + 1])

    def add(self, mark: int) -> None:
        """Remember a mark. (`compiled.py` does the same in place.)"""
        place = mark & REPEATS_MASK
        self.marks[place + 1] = self.marks[place]
        self.marks[place] = mark

    def forget(self, mark: int) -> None:
        """The request was not let through after all."""
        place = mark & REPEATS_MASK
        kept = [each for each in self.marks[place : place + 2] if each not in (0, mark)]
        self.marks[place], self.marks[place + 1] = [*kept, 0, 0][:2]


class Policy:
    """Limits at work on a ledger. Not changed once made: other limits make another policy on the same ledger."""

    def __init__(self, limits: Sequence[Limit], ledger: Ledger, charge_at: ChargeAt, repeats: Repeats) -> None:
        self.limits = tuple(limits)
        self._ledger = ledger
        self._repeats = repeats
        self._rules = [Rule(limit, ledger, charge_at) for limit in limits]
        self._compiled: dict[Layout, dict[str, Decide]] = {}

    @property
    def ids(self) -> set[MetersId]:
        """What the limits count."""
        return {meters.id for rule in self._rules for meters in rule.meters}

    def apply_overrides(self, wall_s: float, changing: Changing = lambda *_: None) -> float:
        """Put `max` and the overrides that are in force at this time (seconds since 1970) into the meters.

        `changing` is called before they are changed for some meters, with the keys (None: all without an override).
        Returns when this is to be called again: when the next override ends, or infinity.
        """
        ends = [o.until_s for limit in self.limits for o in limit.overrides.values() if o.until_s is not None]
        for rule in self._rules:
            for meters in rule.meters:
                window_ms, overrides = meters.id.window_ms, rule.limit.overrides.items()
                in_force = {key: o.max for key, o in overrides if o.until_s is None or wall_s < o.until_s}
                max, of_keys = rule.limit.windows[window_ms], {}
                for key, by_window in in_force.items():
                    if window_ms in by_window:
                        of_keys[key] = by_window[window_ms]
                changed: set[str | None] = {key for key, _ in of_keys.items() ^ meters.overrides.items()}
                if max != meters.max:
                    changed.add(None)
                if changed:
                    changing(meters.id, changed)
                    meters.set_max(max, of_keys)
                if isinstance(meters, SharedMeters):
                    meters.overdraft = rule.limit.overdraft
        return min((end for end in ends if end > wall_s), default=inf)

    def change_overrides(self, changes: Mapping[str, Mapping[str, Override | None]], changing: Changing) -> None:
        """Put overrides into force, by limit and key; None for what is not any more. `changing` as above."""
        for rule in self._rules:
            for key, override in changes.get(rule.limit.name, {}).items():
                for meters in rule.meters:
                    max = override.max.get(meters.id.window_ms) if override is not None else None
                    if meters.overrides.get(key) != max:
                        changing(meters.id, [key])
                        meters.set_override(key, max)

    def decide(self, request: Request, now_ms: int) -> Decision:
        """Answer one parsed request, and charge it if this is the stage for it. Raises ProtocolError."""
        values, layout = request
        stages = self._compiled.get(layout)
        if stages is None:
            if not layout.learned:
                return self._decide_closely(request, now_ms)
            stages = self._compile(layout)
        decide = stages.get(values[layout.stage_place])
        return PERMIT if decide is None else decide(request, now_ms)

    def _compile(self, layout: Layout) -> dict[str, Decide]:
        known = {
            "PERMIT": PERMIT,
            "REPEATED": REPEATED,
            "repeats": self._repeats,
            "marks": self._repeats.marks,
            "ledger": self._ledger,
            "closely": self._decide_closely,
            "hold": _hold,
            "count": number("recipient_count"),
            "size": number("size"),
        }
        stages = {stage: compile_stage(stage, self._rules, layout.places, known) for stage in STAGES}
        self._compiled[layout] = stages
        return stages

    def explain(self, request: Request, now_ms: int) -> list[tuple[Limit, str, list[Reading]]]:
        """Every limit in the order of the file: why it does not apply to the request, or its readings. Never charges.

        Raises ProtocolError.
        """
        stage = _stage(request)
        if stage not in STAGES:
            return [(limit, f"nothing is counted at {stage or 'an unnamed stage'}", []) for limit in self.limits]
        if self._is_repeated(request, stage):
            return [(limit, "the request was charged before", []) for limit in self.limits]
        explained: list[tuple[Limit, str, list[Reading]]] = []
        for rule in self._rules:
            key = rule.cut_key(request)
            why_not = rule.why_not(request, key, stage)
            readings: list[Reading] = []
            if not why_not and rule.once and once_mark(request, rule.limit.name, key) in self._repeats:
                why_not = "the message was charged before"
            if not why_not:
                readings = [rule.read(meters, request, key, stage, now_ms) for meters in rule.meters]
            explained.append((rule.limit, why_not, readings))
        return explained

    def undo(self, decision: Decision) -> None:
        """Take held charges back: they could not be stored, and the mail is not let through."""
        for charge in decision.held or ():
            charge.meters.refund(charge.row, charge.key, charge.slice, charge.amount)
        for each in decision.marks:
            self._repeats.forget(each)

    def _is_repeated(self, request: Request, stage: str) -> bool:
        return any(rule.stage == stage for rule in self._rules) and mark(request, stage) in self._repeats

    def _decide_closely(self, request: Request, now_ms: int) -> Decision:
        stage = _stage(request)
        if self._is_repeated(request, stage):
            return REPEATED
        readings = [reading for _, _, several in self.explain(request, now_ms) for reading in several]
        decision = answer(readings)
        charged = [reading for reading in readings if reading.charging and reading.amount and not reading.exceeded]
        if decision.refused or not charged:
            return decision
        charges = [(each.meters, each.meters.keys.open(each.key), each.key, each.amount) for each in charged]
        must_wait = [meters.charge(row, key, amount) for meters, row, key, amount in charges]
        marks = [each for each in [mark(request, stage)] if each]
        if marks:
            once = {rule.limit.name for rule in self._rules if rule.once}
            marks += {once_mark(request, r.limit.name, r.key) for r in charged if r.limit.name in once}
        for each in marks:
            self._repeats.add(each)
        if self._ledger.answer_unflushed and not any(must_wait):
            return decision
        held = _hold(charges, marks)
        return replace(decision, held=held.held, marks=held.marks)


def _hold(charges: Iterable[tuple[Meters, int, str, int]], marks: Iterable[int]) -> Decision:
    held = tuple(Charge(meters, row, key, meters.slice, amount) for meters, row, key, amount in charges)
    return Decision("DUNNO", held=held, marks=tuple(marks))


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
