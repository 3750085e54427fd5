"""What nodes say to each other about rights, what must be on the disk, and in which order.

A step of the core changes its own memory at once and returns `Ready`:

    persist     records that must be durable ...
    send        ... before any of these messages leaves this node

The messages of a step that persists nothing may leave at once. If the disk fails, the messages are never sent; memory
then holds less than the disk allows, never more. A record replaces an earlier one with the same `where`; a value of
None takes it away.

Messages may be lost, repeated, delayed and reordered at will. All times are milliseconds of the clock of the node that
*asked*: an answer repeats the asker's time, so that nobody ever reads somebody else's clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from postmeter.core.meters import MetersId

Meter = tuple[MetersId, str]
"""One window of one limit, and a key."""


class LoanId(NamedTuple):
    """Never used twice: `incarnation` grows with every start of the borrower, `number` with every question it asks."""

    borrower: str
    incarnation: int
    number: int


# --- messages -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ask:
    """Borrower to lender: lend me up to `amount` for `lifetime_ms`. `urgent` if somebody waits for it.

    `instead` are earlier loans that are over: what is left of them is to be part of the new one.
    """

    loan: LoanId
    meter: Meter
    amount: int
    urgent: bool
    asked_ms: int
    lifetime_ms: int
    instead: tuple[LoanId, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """Lender to borrower: the loan is of `amount` (0: none), for as long as was asked, from `asked_ms`.

    If nothing new is lent, `wait_ms` is how long that will stay so as far as the lender can tell. `again` are nodes
    that may soon have something: those to whom it has just given something back, and itself if it is asking others.
    """

    loan: LoanId
    amount: int
    asked_ms: int
    wait_ms: int = 0
    again: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Offer:
    """To one that was told to wait: something has come back meanwhile, ask again if you still need it."""

    meter: Meter


@dataclass(frozen=True, slots=True)
class Return:
    """Borrower to lender: so much of the loan is given back altogether. The borrower's cell: it only grows."""

    loan: LoanId
    returned: int


@dataclass(frozen=True, slots=True)
class Returned:
    """Lender to borrower: that is on my disk."""

    loan: LoanId
    returned: int


@dataclass(frozen=True, slots=True)
class Excess:
    """A part of what the sender of a Handover has used or lent beyond its new share: a loan from the receiver."""

    loan: LoanId
    meter: Meter
    amount: int


@dataclass(frozen=True, slots=True)
class Handover:
    """To every other node of the old and the new generation: I spend by this generation now.

    `unclean_ms` is how long ago the sender last started after an unclean stop; -1 if that is longer than any window.
    """

    generation: int
    excess: tuple[Excess, ...]
    unclean_ms: int = -1


@dataclass(frozen=True, slots=True)
class Accepted:
    """The answer to a Handover: it is on my disk."""

    generation: int


Message = Ask | Answer | Offer | Return | Returned | Handover | Accepted


# --- records ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lent:
    """The lender's cells of a loan. Until `back_ms` on its own clock the lender does not use `amount` - `returned`."""

    loan: LoanId
    meter: Meter
    amount: int
    back_ms: int
    returned: int = 0

    @property
    def left(self) -> int:
        """What is still lent."""
        return self.amount - self.returned


@dataclass(slots=True)
class Borrowed:
    """A loan as its borrower sees it. It is a record only while the node is stopped, after a clean stop.

    `generation` is the handover that it came with, -1 if it was asked for; `accepted` is False until the lender has
    accepted that. `covers` is None while the loan lives, and then what it still stands for: slice -> amount.
    """

    meter: Meter
    lender: str
    amount: int
    asked_ms: int
    lifetime_ms: int
    returned: int = 0
    acknowledged: int = 0
    generation: int = -1
    accepted: bool = True
    covers: dict[int, int] | None = None

    @property
    def until_ms(self) -> int:
        """Nothing may be admitted by it from then on."""
        return self.asked_ms + self.lifetime_ms

    @property
    def may_be_merged(self) -> bool:
        """Whether it is over, and did not come with a handover."""
        return self.covers is not None and self.generation < 0

    @property
    def left(self) -> int:
        """What has not been given back."""
        return self.amount - self.returned

    def free(self, oldest: int) -> int:
        """What is left but does not stand for anything in slices that still count."""
        return self.left - sum(amount for number, amount in (self.covers or {}).items() if number >= oldest)


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a node stands in the roster; see roster.py. One record, always written as a whole."""

    node: str
    generations: tuple[tuple[int, tuple[str, ...]], ...]
    born: int
    handed: tuple[tuple[str, int], ...]
    stopped: tuple[tuple[str, int], ...]
    lingers: tuple[tuple[str, int], ...]
    unclean_ms: int | None


@dataclass(frozen=True, slots=True)
class Before:
    """The `max` that a key, or (None) all without one of their own, had until lately: while somebody may use by it."""

    id: MetersId
    key: str | None
    until_ms: int
    max: int


Record = Lent | Borrowed | Standing | Handover | Before
Place = LoanId | tuple[str, int] | tuple[str, MetersId, str | None] | str


class Put(NamedTuple):
    """Write `record` at `where`, or take away what is there. A Handover lies at (receiver, generation)."""

    where: Place
    record: Record | None


class Send(NamedTuple):
    """One message to one node."""

    to: str
    message: Message


@dataclass(slots=True)
class Ready:
    """First all of `persist`, durably; then all of `send`, in order."""

    persist: list[Put] = field(default_factory=list)
    send: list[Send] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.persist or self.send)

    def add(self, other: Ready) -> None:
        """Do that, too."""
        self.persist.extend(other.persist)
        self.send.extend(other.send)


def join(steps: Iterable[Ready]) -> Ready:
    """Several steps as one."""
    ready = Ready()
    for step in steps:
        ready.add(step)
    return ready
