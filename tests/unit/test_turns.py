"""Work in pieces that may wait."""

from __future__ import annotations

import asyncio

from postmeter.turns import Turns


def test_one_piece_at_a_time_and_others_between_any_two() -> None:
    """However many have such work: what else is due runs after each piece."""

    async def story() -> list[str]:
        turns, done, loop = Turns(), list[str](), asyncio.get_running_loop()

        async def work(name: str) -> None:
            for _ in range(3):
                async with turns:
                    done.append(name)
                    loop.call_soon(done.append, "request")

        await asyncio.gather(work("a"), work("b"))
        return done

    assert ["a", "request", "b", "request"] * 3 == asyncio.run(story())
