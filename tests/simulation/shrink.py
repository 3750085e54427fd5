"""Makes a story that breaks something as short as it can: first whole stretches of steps go, then single ones.

Taking a step away keeps the time that it took: it goes to the next step.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.simulation.script import Step, run
from tests.simulation.world import Setting


def shrink(setting: Setting, steps: list[Step], breaks: Callable[[list[Step]], bool] | None = None) -> list[Step]:
    """The shortest list of steps found that still breaks."""
    still_breaks = breaks or (lambda some: bool(run(setting, some).broken))
    steps = steps[: run(setting, steps).steps_done + 1] if breaks is None else steps
    size = max(1, len(steps) // 2)
    while size:
        start, removed = 0, False
        while start < len(steps):
            fewer = _without(steps, start, size)
            if still_breaks(fewer):
                steps, removed = fewer, True
            else:
                start += size
        if not removed or size > 1:
            size //= 2
    return _rounded(steps, still_breaks)


def _without(steps: list[Step], start: int, size: int) -> list[Step]:
    kept, waited_ms = steps[:start], sum(step.by_ms for step in steps[start : start + size])
    rest = steps[start + size :]
    if rest and waited_ms:
        rest = [rest[0]._replace(by_ms=rest[0].by_ms + waited_ms), *rest[1:]]
    return kept + rest


def _rounded(steps: list[Step], still_breaks: Callable[[list[Step]], bool]) -> list[Step]:
    """With plainer times, where that breaks as well."""
    for place, step in enumerate(steps):
        for by_ms in (0, 1, 10, step.by_ms // 10 * 10):
            if by_ms < step.by_ms:
                plainer = [*steps[:place], step._replace(by_ms=by_ms), *steps[place + 1 :]]
                if still_breaks(plainer):
                    steps = plainer
                    break
    return steps
