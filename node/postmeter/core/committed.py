"""What every node has committed of a meter, as far as is known: used + lent - borrowed. It rides on the usage view.

    committed.note(id, key, moved, now_ms)      this node has lent so much more of a meter than it has borrowed
    committed.refresh(now_ms, meters_max)       now and then: what still holds is said again before it is forgotten
    committed.seen(id, key)                     node -> committed; for `Rights.committed_seen`
    committed.used(id, key)                     what all others have used; for `Rights.used_seen`

Rights look at it to ask those first who probably have something, and nobody in vain. It may be late, incomplete or
wrong: then somebody is asked in vain, or not asked, and never more than `max` admitted.

What a node has lent or borrowed is an entry of the view like any other, on meters of its own: with a unit that no limit
has, and a window of VIEW_LOANS_MS, after which nothing is known of it any more unless it was said again. A change is an
entry in the present slice, and one of 0 in the slice of the one before.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import islice, takewhile

from postmeter.core.effects import Meter
from postmeter.core.meters import MetersId
from postmeter.core.view import View
from postmeter.defaults import SLICES_PER_WINDOW, VIEW_LOANS_MS

_SLICE_MS = -(-VIEW_LOANS_MS // SLICES_PER_WINDOW)


@lru_cache(maxsize=1024)
def lent_id(id: MetersId) -> MetersId:
    """The meters on which is noted what was lent."""
    return id._replace(unit=f"{id.unit} per {id.window_ms} ms lent", window_ms=VIEW_LOANS_MS)


@lru_cache(maxsize=1024)
def borrowed_id(id: MetersId) -> MetersId:
    """The meters on which is noted what was borrowed."""
    return id._replace(unit=f"{id.unit} per {id.window_ms} ms borrowed", window_ms=VIEW_LOANS_MS)


class Committed:
    """What is noted stands in `_noted`, the oldest first: meter -> (slice, lent - borrowed), without zeros."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._noted: dict[Meter, tuple[int, int]] = {}

    def note(self, id: MetersId, key: str, moved: int, now_ms: int) -> None:
        """Say that this node has lent `moved` more than it has borrowed; less than 0: borrowed more than lent."""
        before = self._noted.pop((id, key), None)
        if before is not None:
            self._say(id, key, before[0], before[1], 0, now_ms)
        if moved:
            self._noted[id, key] = now_ms // _SLICE_MS, moved
            self._say(id, key, now_ms // _SLICE_MS, moved, abs(moved), now_ms)

    def _say(self, id: MetersId, key: str, slice: int, moved: int, amount: int, now_ms: int) -> None:
        self._view.count(lent_id(id) if moved > 0 else borrowed_id(id), slice, [(key, amount)], now_ms)

    def refresh(self, now_ms: int, meters_max: int) -> bool:
        """Say again what was said half of VIEW_LOANS_MS ago, at most so much. True if there may be more."""
        due = now_ms // _SLICE_MS - SLICES_PER_WINDOW // 2
        oldest = takewhile(lambda noted: noted[1][0] <= due, self._noted.items())
        late = [(meter, moved) for meter, (_, moved) in islice(oldest, meters_max)]
        for (id, key), moved in late:
            self.note(id, key, moved, now_ms)
        return len(late) == meters_max

    def seen(self, id: MetersId, key: str) -> dict[str, int]:
        """What each node has committed, without those of whom nothing is known."""
        committed = self._view.usage(id, key)
        for node, amount in self._view.usage(lent_id(id), key).items():
            committed[node] = committed.get(node, 0) + amount
        for node, amount in self._view.usage(borrowed_id(id), key).items():
            committed[node] = committed.get(node, 0) - amount
        return committed

    def used(self, id: MetersId, key: str) -> int:
        """What all others have used. Since nobody's usage falls but by time, they have used no less by now."""
        usage = self._view.usage(id, key)
        return sum(usage.values()) - usage.get(self._view.node, 0)
