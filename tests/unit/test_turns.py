"""Work that may wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from postmeter import turns as module
from postmeter.turns import Turns


def test_some_work_at_a_time_and_others_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many have such work: what else is due runs after each piece."""
    monkeypatch.setattr(module, "TURN_S", 0)

    async def story() -> list[str]:
        turns, done, loop = Turns(), list[str](), asyncio.get_running_loop()

        def work(name: str) -> Callable[[], bool]:
            def step() -> bool:
                done.append(name)
                loop.call_soon(done.append, "request")
                return done.count(name) < 3

            return step

        await asyncio.gather(turns.take(work("a")), turns.take(work("b")))
        return done

    assert ["a", "request", "b", "request"] * 3 == asyncio.run(story())


def test_small_steps_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there is time for."""
    monkeypatch.setattr(module, "TURN_S", 60)

    async def story() -> list[str]:
        done, loop = list[str](), asyncio.get_running_loop()

        def step() -> bool:
            done.append("step")
            loop.call_soon(done.append, "request")
            return len(done) < 3

        await Turns().take(step)
        return done

    assert ["step"] * 3 == asyncio.run(story())[:3]
