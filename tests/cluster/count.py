"""count - whether the cap held, and whether anybody was refused who need not have been, from what the clients saw.

    most_admitted(replies, window_s)              the most that was admitted in any interval of one window
    first_full(replies, max, window_s)            when the first window began in which all of `max` was admitted
    refused_wrongly(replies, caps, counted_s)     refusals for which there certainly was room

A client knows when it asked and when it was answered; the agent decided somewhere in between. So both judgements leave
the benefit of the doubt to the agent, and nothing else to chance:

  - Admissions are counted together only if the first was asked for, and the last one answered, within one window: they
    were certainly decided within it. A count above `max` is therefore a broken cap, whatever the delays were.
  - A refusal is wrong only if everything that can possibly have counted at that moment leaves room for it: all that was
    answered less than `counted_s` before it was asked for, and that was asked for before it was answered. What was
    never answered because the agent died may have counted; it was not admitted, as Postfix lets no mail through for it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

Meter = tuple[str, str]
Verdict = Literal["admitted", "refused", "failed", "lost"]


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of one request. Times are of this machine's monotonic clock.

    verdict     admitted; refused for its rate; failed: any other answer; lost: none, the connection ended then
    meters      the meters that it counts on
    """

    node: str
    meters: tuple[Meter, ...]
    amount: int
    asked_s: float
    answered_s: float
    verdict: Verdict
    text: str = ""


def by_meter(replies: Iterable[Reply]) -> dict[Meter, list[Reply]]:
    """The replies that count on each meter, in the order in which they were asked for."""
    found: defaultdict[Meter, list[Reply]] = defaultdict(list)
    for reply in sorted(replies, key=lambda reply: reply.asked_s):
        for meter in reply.meters:
            found[meter].append(reply)
    return dict(found)


def most_admitted(replies: Iterable[Reply], window_s: float) -> int:
    """The most that was certainly admitted in one window, of replies on one meter."""
    return max((total for _, total in _windows(replies, window_s)), default=0)


def first_full(replies: Iterable[Reply], max: int, window_s: float) -> float | None:
    """When the first window began in which all of `max` was certainly admitted, of replies on one meter."""
    return next((from_s for from_s, total in _windows(replies, window_s) if total >= max), None)


def _windows(replies: Iterable[Reply], window_s: float) -> Iterator[tuple[float, int]]:
    """Each window that begins with an admission: when, and what was certainly admitted in it."""
    admitted = sorted((reply for reply in replies if reply.verdict == "admitted"), key=lambda reply: reply.asked_s)
    asked_s = [reply.asked_s for reply in admitted]
    for at, first in enumerate(admitted):
        end_s = first.asked_s + window_s
        within = admitted[at : bisect_right(asked_s, end_s)]
        yield first.asked_s, sum(reply.amount for reply in within if reply.answered_s <= end_s)


def refused_wrongly(replies: Iterable[Reply], caps: Mapping[Meter, int], counted_s: float) -> list[Reply]:
    """The refusals of requests that certainly fitted all their meters. `counted_s`: how long a node counts a charge."""
    meters = by_meter(replies)
    used = {meter: _Used(of_meter) for meter, of_meter in meters.items()}
    refused = {reply: None for of_meter in meters.values() for reply in of_meter if reply.verdict == "refused"}
    return [
        reply
        for reply in refused
        if all(
            used[meter].at_most(reply.asked_s - counted_s, reply.answered_s) + reply.amount <= caps[meter]
            for meter in reply.meters
        )
    ]


class _Used:
    """What may have been charged on a meter: sums over its charges, in the order of asking and of answering."""

    def __init__(self, replies: Sequence[Reply]) -> None:
        charges = [reply for reply in replies if reply.verdict in ("admitted", "lost")]
        asked = sorted((reply.asked_s, reply.amount) for reply in charges)
        answered = sorted((reply.answered_s, reply.amount) for reply in charges)
        self._asked_s, self._asked = [at_s for at_s, _ in asked], _sums(asked)
        self._answered_s, self._answered = [at_s for at_s, _ in answered], _sums(answered)

    def at_most(self, from_s: float, until_s: float) -> int:
        """The most that can have been charged between two moments: asked before the later, answered after the first."""
        until = self._asked[bisect_right(self._asked_s, until_s)]
        return until - self._answered[bisect_left(self._answered_s, from_s)]


def _sums(amounts: Iterable[tuple[float, int]]) -> list[int]:
    return [0, *accumulate(amount for _, amount in amounts)]
