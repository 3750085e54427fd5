"""Work in pieces that may wait: one piece at a time in the whole process, and requests of Postfix between any two.

async with turns:
...             a piece: some 0.2 ms, and nothing to await
"""

from __future__ import annotations

import asyncio
from types import TracebackType


class Turns:
    """For all who have such work, in the order in which they ask."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> None:
        await self._lock.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await asyncio.sleep(0)
        finally:
            self._lock.release()
