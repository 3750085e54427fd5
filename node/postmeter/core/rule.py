"""A limit at work: one `Rule` with its meters, and what it makes of a request (`Reading`).

Postfix asks at several stages; a limit is charged at one of them and only looked at before:

    stage            charges                                  looks
    RCPT             limits that need `recipient`, and all    the others: one recipient, SIZE= as claimed
                     with charge_at=rcpt
    DATA             -                                        the others, with all accepted recipients
    END-OF-MESSAGE   the others                               -
    any other        -                                        -
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from postmeter.core.answer import effect, fill, fill_never, is_temporary
from postmeter.core.conditions import compile_all
from postmeter.core.limits import Limit
from postmeter.core.meters import OVERFLOW_KEY, OVERFLOW_ROW, Ledger, Meters, MetersId
from postmeter.core.request import END_OF_MESSAGE, Request, attribute, number

ChargeAt = Literal["end-of-message", "rcpt"]

# What a charged request is recognised by. If another service refuses the message, the client may add recipients and
# send it again as the same instance.
MARKED = {"RCPT": ("instance", "recipient"), END_OF_MESSAGE: ("instance", "queue_id", "recipient_count")}

_instance = attribute("instance")
_marked = {stage: [attribute(name) for name in names] for stage, names in MARKED.items()}
_recipient_count = number("recipient_count")
_size = number("size")


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


class Rule:
    """A limit with its meters. `stage` is where it is charged; `once`, that it is charged once a message there."""

    def __init__(self, limit: Limit, ledger: Ledger, charge_at: ChargeAt) -> None:
        self.limit = limit
        self.stage = "RCPT" if charge_at == "rcpt" or limit.needs_recipient else END_OF_MESSAGE
        # Asked for every recipient, the message itself and its size must count only with the first.
        self.once = self.stage == "RCPT" and limit.count != "recipients"
        self.cut_key = limit.key.compile()
        self.keys = ledger.keys(str(limit.key))
        self.meters = tuple(
            ledger.open(MetersId(limit.name, str(limit.key), limit.count, window_ms)) for window_ms in limit.windows
        )
        self._match = compile_all(limit.match)
        self._exempt = [exempt for conditions in limit.exempt if (exempt := compile_all(conditions))]

    def asked_at(self, stage: str) -> bool:
        """Whether the limit is charged or looked at."""
        return self.stage in (stage, END_OF_MESSAGE)

    @property
    def covers(self) -> Callable[[Request, str], bool] | None:
        """A function of the request and the key; None if the limit covers all."""
        match, exempt, exempt_keys = self._match, self._exempt, self.limit.exempt_keys
        if match is None and not exempt and not exempt_keys:
            return None

        def covers(request: Request, key: str) -> bool:
            if key in exempt_keys or not (match is None or match(request)):
                return False
            return not any(spared(request) for spared in exempt)

        return covers

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

    def amount(self, request: Request, stage: str) -> int:
        """What the request costs. Raises ProtocolError."""
        if self.limit.count == "messages":
            return 1
        if self.limit.count == "bytes":
            return _size(request)
        return 1 if stage == "RCPT" else _recipient_count(request) or 1

    def read(self, meters: Meters, request: Request, key: str, stage: str, now_ms: int) -> Reading:
        """How one of its meters stands."""
        row = self.keys.row(key)
        if row == OVERFLOW_ROW:
            key = OVERFLOW_KEY
        amount = self.amount(request, stage)
        return Reading(
            limit=self.limit,
            meters=meters,
            key=key,
            used=meters.counted(key, row, now_ms),
            max=meters.max_of(key),
            amount=amount,
            wait_ms=meters.wait_ms(key, row, amount, now_ms),
            charging=stage == self.stage,
        )


def mark(request: Request, stage: str) -> int:
    """What a charged request is recognised by if Postfix repeats it; 0 if it cannot be.

    64 bits with a secret of this process: that two are alike by chance will not happen.
    """
    marked = tuple(value(request) for value in _marked[stage])
    return hash(marked) if marked[0] else 0


def once_mark(request: Request, limit: str, key: str) -> int:
    """What a message is recognised by that a limit has charged with an earlier recipient."""
    return hash((_instance(request), limit, key))
