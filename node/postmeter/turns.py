"""Work that may wait: some of it at a time in the whole process, and requests of Postfix between any two.

await turns.take(step)          call `step` again and again, until it returns False
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import perf_counter

from postmeter.defaults import TURN_S


class Turns:
    """For all who have such work, in the order in which they ask."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def take(self, step: Callable[[], bool]) -> None:
        """As many turns as it takes. A step takes some 0.2 ms at most, and others run at the latest after TURN_S."""
        more = True
        while more:
            async with self._lock:
                end_s = perf_counter() + TURN_S
                while (more := step()) and perf_counter() < end_s:
                    pass
                await asyncio.sleep(0)
