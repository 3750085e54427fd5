"""Meters of a cluster: this node may use only its part of `max`, more what it borrowed, less what it lent.

The single node's decision compares one column with one number. That stays so: lent rights are added to the column as if
they were used, borrowed ones are subtracted (`move`), and the number is the least base share that any key can have.
What exceeds that gets the closer look, at `allowance` and `usage` as they are.

    Terms           how long loans live, and how wrong a clock may go
    SharedMeters    Meters with a base share instead of `max`
    SharedLedger    all of them, with what they all need to know: the roster, whether this node may spend at all

A borrowed right ends at a moment of this node's clock, and no charge may use it a millisecond later. So the end of the
slice, which every decision compares the time with anyway, is put forward to it (`wake_ms`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from postmeter.core.effects import Before
from postmeter.core.meters import OVERFLOW_KEY, OVERFLOW_ROW, UNLIMITED, Keys, Ledger, Meters, MetersId, unflushed_max
from postmeter.core.roster import Members, Roster, least_share, share
from postmeter.defaults import CLOCK_DRIFT_PPM, KEYS_MAX, LOAN_MS, LOAN_NOW_MS, LOAN_WINDOW_PART, WAIT_MARGIN_MS

NEVER_MS = 1 << 62


@dataclass(frozen=True, slots=True)
class Terms:
    """Loans live `loan_ms`, or a part of the window if that is longer, and never longer than the window.

    What is borrowed for one message only lives `loan_now_ms`.
    `drift_ppm`: how many millionths the rate of a clock may be off; `margin_ms`: added to what a lender waits.
    """

    loan_ms: int = LOAN_MS
    drift_ppm: int = CLOCK_DRIFT_PPM
    margin_ms: int = WAIT_MARGIN_MS
    loan_window_part: int = LOAN_WINDOW_PART
    loan_now_ms: int = LOAN_NOW_MS

    def stretch_ms(self, span_ms: int) -> int:
        """How much longer than `span_ms` a node must wait by its own clock to be sure that as much has passed."""
        return -(-span_ms * self.drift_ppm // 1_000_000)

    def lifetime_ms(self, window_ms: int) -> int:
        """How long a borrower may spend, from when it asked, by its own clock."""
        return min(window_ms, max(self.loan_ms, window_ms // self.loan_window_part))

    def now_lifetime_ms(self, window_ms: int) -> int:
        """The same for what is needed at once."""
        return min(self.loan_now_ms, self.lifetime_ms(window_ms))

    def wait_ms(self, window_ms: int, lifetime_ms: int) -> int:
        """How long a lender must not spend what it lent, from when it granted, by its own clock."""
        span_ms = lifetime_ms + window_ms
        return span_ms + 3 * self.stretch_ms(span_ms) + self.margin_ms

    def longest_wait_ms(self, window_ms: int) -> int:
        """The same for any loan."""
        return self.wait_ms(window_ms, self.lifetime_ms(window_ms))

    def stopped_wait_ms(self, window_ms: int) -> int:
        """How long, from when it learns of it, a node must take one that is stopped to be spending.

        What is lent beyond a new share may stand on a loan from the stopped node. The reading of the roster that it
        came with is no more than a lifetime old then, and no older than the stop.
        """
        return self.wait_ms(window_ms, 2 * self.lifetime_ms(window_ms))

    def toll_wait_ms(self, window_ms: int) -> int:
        """How long, from a start after an unclean stop, what was lost then counts, by anybody's clock."""
        return window_ms + 3 * self.stretch_ms(window_ms) + self.margin_ms


class SharedKeys(Keys):
    """Rows that are kept while rights are lent or borrowed for them."""

    __slots__ = ()

    def release(self, row: int) -> None:
        """Forget a row that nobody uses any more."""
        shared = (meters for meters in self.meters if isinstance(meters, SharedMeters))
        if not any(row in meters.moved or row in meters.living for meters in shared):
            super().release(row)


class SharedMeters(Meters):
    """One window of one limit for all its keys, and this node's part of it.

    `moved` maps a row to what is lent less what is borrowed, in the limit's unit. `covers` is what of `moved` belongs
    to loans that are over: by slice, what was admitted there by them. It counts as borrowed as long as its slice
    counts, so that it can never be used again. `living` counts the borrowed loans of a row that are not over yet.
    `overdraft` is the part of its base share that a node may exceed its allowance by while `ledger.isolated`. `before`
    has what `max` was, by key, while somebody may still be using by it. `suspended`: nothing may be charged. `wake` is
    called with the time when `wake_ms` is over, and returns the next.
    """

    __slots__ = (
        "_settled",
        "before",
        "covers",
        "ledger",
        "living",
        "moved",
        "opens",
        "overdraft",
        "suspended",
        "wake",
        "wake_ms",
    )

    def __init__(self, id: MetersId, keys: Keys, ledger: SharedLedger) -> None:
        self.ledger = ledger
        self.moved: dict[int, int] = {}
        self.covers: dict[int, dict[int, int]] = {}
        self.living: dict[int, int] = {}
        self._settled: list[int] = []
        self.opens: list[Members] = []
        self.overdraft = 0.0
        self.suspended = False
        self.before: dict[str | None, Before] = {}
        self.wake_ms = NEVER_MS
        self.wake: Callable[[SharedMeters, int], int] = lambda meters, now_ms: NEVER_MS
        super().__init__(id, keys)

    # --- time ---------------------------------------------------------------------------------------------------------

    def oldest(self, now_ms: int) -> int:
        """The oldest slice that still counts, if this node's clock is as fast as it may be."""
        return (now_ms - self.id.window_ms - self.ledger.terms.stretch_ms(self.id.window_ms)) // self.slice_ms

    def advance(self, now_ms: int) -> None:
        """Begin the slice that `now_ms` lies in, and end the loans that end before."""
        if now_ms < self.slice_end_ms:
            return
        super().advance(now_ms)
        oldest = min(self._slices)
        for number in [number for number in self.covers if number < oldest]:
            for row, amount in self.covers.pop(number).items():
                self._move(row, amount)
        if now_ms >= self.wake_ms:
            self.wake_ms = self.wake(self, now_ms)
        # The stretched window is no multiple of a slice: one may stop counting in the middle of another.
        self.slice_end_ms = min(self.slice_end_ms, self.wake_ms, self.freed_ms(oldest))

    def wake_at(self, at_ms: int) -> None:
        """Call `wake` at that time, or earlier."""
        self.wake_ms = min(self.wake_ms, at_ms)
        self.slice_end_ms = min(self.slice_end_ms, self.wake_ms)

    def refresh(self, now_ms: int) -> None:
        """The roster has changed, or time has passed: find out which generations are open."""
        ledger = self.ledger
        window_ms, terms = self.id.window_ms, ledger.terms
        self.opens = ledger.roster.open(now_ms, terms.stopped_wait_ms(window_ms), terms.toll_wait_ms(window_ms))
        self._set_quick()

    def _set_quick(self) -> None:
        if not self.spends:
            self.quick_max = self.quick_unflushed_max = -UNLIMITED
            return
        node = self.ledger.roster.node
        shares = (least_share(self.max, len(members)) if node in members else 0 for members in self.opens)
        least = min(shares, default=0)
        alike = not self._tolls_ms and not self.overrides
        self.quick_max = least if alike else -UNLIMITED
        self.quick_unflushed_max = unflushed_max(least) if alike else -1

    # --- rights -------------------------------------------------------------------------------------------------------

    @property
    def spends(self) -> bool:
        """Whether anything may be charged at all."""
        return self.ledger.spends and not self.suspended

    def row_of(self, key: str) -> int | None:
        """The row of a key, which may be OVERFLOW_KEY."""
        return OVERFLOW_ROW if key == OVERFLOW_KEY else self.keys.rows.get(key)

    def _open_row(self, key: str) -> int:
        return OVERFLOW_ROW if key == OVERFLOW_KEY else self.keys.open(key)

    def base(self, key: str) -> int:
        """The base share: what this node may use without asking anybody."""
        max = self.max_of(key)
        return min((self.share(key, max, members) for members in self.opens), default=0)

    def share(self, key: str, max: int, members: Members) -> int:
        """The node's part of `max` in a generation."""
        return share(max, members, self.ledger.roster.node, (self.id, key))

    def ceiling(self, key: str, now_ms: int) -> int:
        """The largest `max` that a node may have used by within the window."""
        return max(self.max_of(key), self.earlier(key, now_ms))

    def earlier(self, key: str | None, now_ms: int) -> int:
        """The largest `max` that was changed of late; 0: none. `key` None is for all that have none of their own."""
        before = self.before.get(key)
        if before is None and key not in self.overrides:
            before = self.before.get(None)
        return before.max if before is not None and now_ms < before.until_ms else 0

    def toll(self, key: str) -> int:
        """What is assumed to be used because of unclean stops within the window.

        Today's share in the newest generation will do, which is no less than the base: while a toll counts, nobody's
        share rises because this node's has fallen.
        """
        if not self._tolls_ms:
            return 0
        share = self.share(key, self.max_of(key), self.ledger.roster.members)
        return len(self._tolls_ms) * unflushed_max(share)

    def rights(self, key: str, now_ms: int) -> int:
        """What usage may rise to: base share, less lent, more borrowed, less the toll. May be negative."""
        self.advance(now_ms)
        row = self.row_of(key)
        moved = self.moved.get(row, 0) if row is not None else 0
        return self.base(key) - moved - self.toll(key)

    def allowance(self, key: str, now_ms: int) -> int:
        """`rights`, and the overdraft if this node is cut off; less than nothing if it must not spend at all."""
        rights = self.rights(key, now_ms)
        if not self.spends:
            return min(rights, -1) if self.max_of(key) < UNLIMITED else rights
        if self.overdraft and self.ledger.isolated:
            rights += int(self.base(key) * self.overdraft)
        return rights

    def move(self, key: str, amount: int) -> None:
        """Rights go out (`amount` > 0: lent, or a borrowed loan ends) or come in."""
        self._move(self._open_row(key), amount)

    def _move(self, row: int, amount: int) -> None:
        self.used[row] += amount
        moved = self.moved.get(row, 0) + amount
        if moved:
            self.moved[row] = moved
        else:
            self.moved.pop(row, None)
            self._settled.append(row)

    def hold(self, key: str, loans: int) -> None:
        """Keep the row while such loans live. `advance` ends them, and the row must not come into being by that.

        A decision looks up the row first; for one that is not there it would see nothing of what is lent.
        """
        row = self._open_row(key)
        living = self.living.get(row, 0) + loans
        if living:
            self.living[row] = living
        else:
            self.living.pop(row, None)
            self._settled.append(row)

    def cover(self, key: str, amount: int, now_ms: int, again: Mapping[int, int] | None = None) -> dict[int, int]:
        """A loan is over: let it stand for what was admitted last. Returns slice -> amount, in all at most `amount`.

        `again`: what it covered before a restart, and not more of any slice.
        """
        row, covered = self.row_of(key), dict[int, int]()
        if row is None:
            return covered
        for number, used in reversed(self.slices(row, now_ms)):
            rows = self.covers.get(number, {})
            part = min(amount, used - rows.get(row, 0))
            if again is not None:
                part = min(part, again.get(number, 0))
            if part > 0:
                rows[row] = rows.get(row, 0) + part
                self.covers[number] = rows
                covered[number] = part
                amount -= part
        if covered:
            self.move(key, -sum(covered.values()))
        return covered

    def uncover(self, key: str, covered: Mapping[int, int]) -> None:
        """Such a loan lives again, and counts as borrowed as a whole."""
        row = self.row_of(key)
        for number, amount in covered.items():
            rows = self.covers.get(number, {})
            if row is not None and row in rows:
                self._move(row, min(amount, rows[row]))
                rows[row] -= min(amount, rows[row])

    def covered(self, row: int) -> int:
        """What of the row's usage loans stand for that are over."""
        return sum(rows.get(row, 0) for rows in self.covers.values())

    def tidy(self) -> None:
        """Forget rows whose rights are back. Not in `move`: a decision may have its hand on one."""
        for row in self._settled:
            if not self.used[row]:
                self.keys.release(row)
        self._settled.clear()

    # --- what Meters asks ---------------------------------------------------------------------------------------------

    def usage(self, row: int | None, now_ms: int) -> int:
        """Used within the window, exactly."""
        used = super().usage(row, now_ms)
        return used - self.moved.get(row, 0) if row is not None else used

    def counted(self, key: str, row: int | None, now_ms: int) -> int:
        """What counts as used in the whole cluster, as far as this node has heard."""
        return max(super().counted(key, row, now_ms), self.ledger.total_seen(self.id, key))

    def wait_ms(self, key: str, row: int | None, amount: int, now_ms: int) -> int | None:
        """How long until `amount` could be charged if nobody lends anything: 0 if now, None if that cannot be told."""
        excess = self.usage(row, now_ms) + amount - self.allowance(key, now_ms)
        if excess <= 0:
            return 0
        for number, freed in self.slices(row, now_ms):
            excess -= freed
            if excess <= 0:
                return self.freed_ms(number) - now_ms
        return None

    def freed_ms(self, number: int) -> int:
        """When a slice stops counting."""
        window_ms = self.id.window_ms
        return (number + 1) * self.slice_ms + window_ms + self.ledger.terms.stretch_ms(window_ms)

    def must_wait(self, key: str, row: int) -> bool:
        """Whether more is charged to the row and not on disk than may be answered before it is."""
        return self.pending(row) > unflushed_max(self.base(key))

    def refund(self, row: int, key: str, number: int, amount: int) -> None:
        """Take a charge back; a loan that stood for it does not any more."""
        super().refund(row, key, number, amount)
        rows = self.covers.get(number, {})
        over = rows.get(row, 0) - self._slices.get(number, {}).get(row, 0)
        if over > 0:
            rows[row] -= over
            self._move(row, over)

    def recent(self, row: int | None, span_ms: int, now_ms: int) -> int:
        """What was used of late: in the last `span_ms`."""
        since = (now_ms - span_ms) // self.slice_ms
        return sum(amount for number, amount in self.slices(row, now_ms) if number > since)

    def retire(self) -> None:
        """Nobody asks any more. If somebody does again, `opened` tells what is lent and borrowed."""
        for row, moved in self.moved.items():
            self.used[row] -= moved
        self._settled += [*self.moved, *self.living]
        self.moved, self.living, self.covers = {}, {}, {}
        self.tidy()
        super().retire()

    def reset(self, row: int) -> list[int]:
        """Forget what the row has used; what is lent and borrowed stays."""
        for rows in self.covers.values():
            self._move(row, rows.pop(row, 0))
        numbers = super().reset(row)
        self.used[row] = self.moved.get(row, 0)
        return numbers


class SharedLedger(Ledger):
    """All meters of this node, and what they need to know.

    `spends` is False while this node must admit nothing on limited meters: it is not in the roster, or does not know.
    `isolated` is set by whoever talks to the peers: none of them can be reached. `opened` is called with new meters.
    `total_seen` tells what all nodes have used of a meter, as far as is known; it is shown, and no cap depends on it.
    """

    keys_class = SharedKeys

    def __init__(self, roster: Roster, terms: Terms, keys_max: int = KEYS_MAX) -> None:
        super().__init__(keys_max)
        self.roster = roster
        self.terms = terms
        self.isolated = False
        self.spends = False
        self.opened: Callable[[SharedMeters], None] = lambda meters: None
        self.total_seen: Callable[[MetersId, str], int] = lambda _, key: 0

    def restore(self, id: MetersId) -> Meters:
        """The meters that an earlier run had, empty: the caller loads them."""
        meters = self.meters[id] = SharedMeters(id, self.keys(id.key), self)
        meters.set_tolls(self.tolls_ms)
        self.opened(meters)
        return meters

    def shared(self, id: MetersId) -> SharedMeters | None:
        """The meters with this id, if there are any."""
        meters = self.meters.get(id)
        return meters if isinstance(meters, SharedMeters) else None
