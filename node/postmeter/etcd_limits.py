"""The limits in force, out of what is in etcd, where anybody may put anything.

    limits/NAME            one limit, as limits_document.py describes it
    overrides/NAME/KEY     another max for one key of that limit: 1000, unlimited, blocked, {24h: 1000}, or
                           {max: 1000, until: 2027-01-31, note: the fair, author: kim}

    limits = EtcdLimits()
    limits.load(cached)                            # what was in force the last time, for a start without etcd
    limits.apply({"limits/per-user": b"{...}"})    # what changed, None for what is gone; other keys are ignored
    while limits.settle(500): ...                  # the work, in portions
    change = limits.take(time.time())              # what is different now

Each key stands or falls by itself. One that is refused is in `problems`, and its last good value stays in force; one
that is deleted is gone. An override beats one for the same key in the value of the limit. Its KEY is spelled as
requests are counted (lower case, addresses as networks), so that there is only one for each. It may be there before its
limit is, and it ends by itself: `take` is to be called again at `next_end_s`.

What did not change is not read again, so 100,000 overrides may be there. The `overrides` of the limits that are handed
out are views: they follow every later change, of which `Change.overrides` tells.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from heapq import heapify, heappop, heappush
from math import inf
from types import MappingProxyType

from postmeter.core.limits import Count, Limit, Override
from postmeter.defaults import LIMIT_BYTES_MAX, LIMITS_MAX, OVERRIDE_BYTES_MAX, OVERRIDE_TEXTS_MAX, OVERRIDES_MAX
from postmeter.documents import Problems, RefusedError, attempt, compose, decode, quote
from postmeter.errors import ConfigError
from postmeter.limits_document import fold, read_limit, read_override

LIMITS, OVERRIDES = "limits/", "overrides/"


@dataclass(frozen=True, slots=True)
class Change:
    """What is different. `limits`: all that are in force, by name; None if they are the same but for `overrides`.

    `overrides` has, by limit and key, those that changed of limits that are the same else; None for what is not in
    force any more. `texts` is what to `encode` and append to what will be loaded; `refused`, keys with their problems.
    """

    limits: list[Limit] | None
    overrides: dict[str, dict[str, Override | None]]
    texts: dict[str, str | None]
    refused: dict[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class _Refused:
    """What is under a key and cannot be used, and why; None for what never can."""

    value: bytes | None
    problems: tuple[str, ...]


class EtcdLimits:
    """What is in etcd, and what of it is in force."""

    def __init__(self) -> None:
        # Last good texts: of limits; and of overrides, by limit and key, also of limits that are not there.
        self._limit_texts: dict[str, str] = {}
        self._texts: dict[str, dict[str, str]] = {}
        self._texts_count = 0
        # By key of etcd; and which of them may be good when there are not too many any more.
        self._refused: dict[str, _Refused] = {}
        self._beyond: dict[str, dict[str, None]] = {LIMITS: {}, OVERRIDES: {}}
        # Of limits in force: the overrides in their value, and all overrides.
        self._limits: dict[str, Limit] = {}
        self._inner: dict[str, Mapping[str, Override]] = {}
        self._overrides: dict[str, dict[str, Override]] = {}
        # (until, limit, key), some of overrides that have changed since.
        self._ends: list[tuple[float, str, str]] = []
        self._ends_max = 1_000
        # What is to be settled, by key of etcd; and what is to be taken.
        self._waiting: dict[str, dict[str, bytes | None]] = {LIMITS: {}, OVERRIDES: {}}
        self._renewed: set[str] = set()
        self._changed: dict[str, dict[str, Override | None]] = {}
        self._changed_texts: dict[str, str | None] = {}
        self._newly_refused: dict[str, tuple[str, ...]] = {}

    # --- in -----------------------------------------------------------------------------------------------------------

    def apply(self, changes: Mapping[str, bytes | None]) -> None:
        """Note what changed in etcd, for `settle`."""
        for key, value in changes.items():
            for kind, waiting in self._waiting.items():
                if key.startswith(kind):
                    waiting[key] = value

    def keep(self, keys: Collection[str]) -> None:
        """Forget all but these keys: the others were deleted while nobody watched."""
        mine = (
            *(key for key, _ in self._all_texts()),
            *self._refused,
            *self._waiting[LIMITS],
            *self._waiting[OVERRIDES],
        )
        self.apply({key: None for key in mine if key not in keys})

    def settle(self, keys_max: int) -> bool:
        """Read what waits, so many keys. Returns whether there is more."""
        limits, overrides = self._waiting.values()
        for _ in range(keys_max):
            if limits:
                self._settle_limit(*limits.popitem())
            elif overrides:
                self._settle_override(*overrides.popitem())
        return bool(limits or overrides)

    # --- out ----------------------------------------------------------------------------------------------------------

    @property
    def next_end_s(self) -> float:
        """When the next override ends, in seconds since 1970; infinity if none does."""
        return self._ends[0][0] if self._ends else inf

    def take(self, now_s: float) -> Change:
        """What is different since the last time, now (seconds since 1970), when all is settled."""
        assert not any(self._waiting.values())
        self._end(now_s)
        limits = [self._limits[name] for name in sorted(self._limits)] if self._renewed else None
        overrides = {name: changed for name, changed in self._changed.items() if name not in self._renewed}
        change = Change(limits, overrides, self._changed_texts, self._newly_refused)
        self._renewed, self._changed, self._changed_texts, self._newly_refused = set(), {}, {}, {}
        return change

    def problems(self) -> Iterator[tuple[str, str]]:
        """What is not in force: keys of etcd, or what they begin with, and why."""
        for name, texts in sorted(self._texts.items()):
            if name not in self._limits:
                yield f"{OVERRIDES}{name}/", f"there is no limit {name}, for which {len(texts)} overrides wait"
        for key, refused in sorted(self._refused.items()):
            yield from ((key, problem) for problem in refused.problems)

    def dump(self) -> Iterator[str]:
        """All last good texts, for `load`, line by line."""
        return (encode({key: text}) for key, text in self._all_texts())

    def load(self, text: str) -> None:
        """Begin with what was dumped, and with changes encoded and appended since. Raises ConfigError.

        What has no end of its line was cut off when it was written.
        """
        try:
            for line in text.split("\n")[:-1]:
                for key, value in json.loads(line).items():
                    self.apply({key: None if value is None else value.encode()})
        except (ValueError, AttributeError):
            problem = "the copy of etcd's limits is damaged; remove it, and start while etcd is there"
            raise ConfigError([problem]) from None

    def _all_texts(self) -> Iterator[tuple[str, str]]:
        for name, text in self._limit_texts.items():
            yield LIMITS + name, text
        for name, texts in self._texts.items():
            for who, text in texts.items():
                yield f"{OVERRIDES}{name}/{who}", text

    # --- limits -------------------------------------------------------------------------------------------------------

    def _settle_limit(self, key: str, value: bytes | None) -> None:
        name = key.removeprefix(LIMITS)
        if value is None:
            self._refused.pop(key, None)
            if self._limit_texts.pop(name, None) is not None:
                self._changed_texts[key] = None
                del self._limits[name], self._inner[name], self._overrides[name]
                self._renewed.add(name)
                self._readmit(LIMITS)
            return
        try:
            text = _decode(value, LIMIT_BYTES_MAX)
            if text == self._limit_texts.get(name):
                self._refused.pop(key, None)
                return
            limit = parse_limit(name, text)
        except ConfigError as error:
            self._refuse(key, value, error)
            return
        if name not in self._limits and len(self._limits) >= LIMITS_MAX:
            self._refuse_for_now(LIMITS, key, value, LIMITS_MAX)
            return
        self._refused.pop(key, None)
        self._limit_texts[name] = self._changed_texts[key] = text
        self._put_in_force(limit)

    def _put_in_force(self, limit: Limit) -> None:
        name = limit.name
        before, inner_before = self._limits.get(name), self._inner.get(name, {})
        texts = self._texts.get(name, {})
        if before and _shape(before) == _shape(limit):
            overrides = self._overrides[name]
            inner = inner_before.keys() | limit.overrides.keys()
            again = [who for who in inner if who in texts]
            for who in inner.difference(again):
                overrides.pop(who, None)
                if who in limit.overrides:
                    overrides[who] = limit.overrides[who]
        else:
            overrides, again = dict(limit.overrides), list(texts)
        waiting = self._waiting[OVERRIDES]
        # What is put last goes before what was good last.
        for key, refused in self._refused.items():
            if key.startswith(f"{OVERRIDES}{name}/") and refused.value is not None:
                waiting.setdefault(key, refused.value)
        for who in again:
            waiting.setdefault(f"{OVERRIDES}{name}/{who}", texts[who].encode())
        self._inner[name], self._overrides[name] = limit.overrides, overrides
        self._limits[name] = replace(limit, overrides=MappingProxyType(overrides))
        self._renewed.add(name)
        for who, each in limit.overrides.items():
            self._remember_end(name, who, each)

    # --- overrides ----------------------------------------------------------------------------------------------------

    def _settle_override(self, key: str, value: bytes | None) -> None:
        name, _, who = key.removeprefix(OVERRIDES).partition("/")
        if value is None:
            self._refused.pop(key, None)
            self._drop(name, who)
            return
        texts, limit = self._texts.get(name, {}), self._limits.get(name)
        if who not in texts and self._texts_count >= OVERRIDES_MAX:
            self._refuse_for_now(OVERRIDES, key, value, OVERRIDES_MAX)
            return
        try:
            text = _decode(value, OVERRIDE_BYTES_MAX)
            override = parse_override(limit, who, text) if limit else None
        except ConfigError as error:
            self._refuse(key, value, error)
            self._fall_back(name, who)
            return
        self._refused.pop(key, None)
        if text != texts.get(who):
            self._texts_count += who not in texts
            self._texts.setdefault(name, {})[who] = self._changed_texts[key] = text
        if override:
            self._force(name, who, override)

    def _fall_back(self, name: str, who: str) -> None:
        """Go on with the last good text, if it is good for the limit as it is now."""
        limit, text = self._limits.get(name), self._texts.get(name, {}).get(who)
        if limit and text is not None:
            try:
                self._force(name, who, parse_override(limit, who, text))
            except ConfigError:
                self._drop(name, who)

    def _drop(self, name: str, who: str) -> None:
        texts = self._texts.get(name, {})
        if texts.pop(who, None) is None:
            return
        if not texts:
            del self._texts[name]
        self._changed_texts[f"{OVERRIDES}{name}/{who}"] = None
        self._texts_count -= 1
        self._readmit(OVERRIDES)
        if name in self._limits:
            self._force(name, who, self._inner[name].get(who))

    def _force(self, name: str, who: str, override: Override | None) -> None:
        overrides = self._overrides[name]
        if override == overrides.get(who):
            return
        if override:
            overrides[who] = override
            self._remember_end(name, who, override)
        else:
            del overrides[who]
        self._changed.setdefault(name, {})[who] = override

    # --- ends ---------------------------------------------------------------------------------------------------------

    def _remember_end(self, name: str, who: str, override: Override) -> None:
        if override.until_s is None:
            return
        heappush(self._ends, (override.until_s, name, who))
        if len(self._ends) > self._ends_max:
            self._ends = [end for end in self._ends if self._is_current(*end)]
            heapify(self._ends)
            self._ends_max = 2 * len(self._ends) + 1_000

    def _is_current(self, until_s: float, name: str, who: str) -> bool:
        override = self._overrides.get(name, {}).get(who)
        return override is not None and override.until_s == until_s

    def _end(self, now_s: float) -> None:
        while self.next_end_s <= now_s:
            end = heappop(self._ends)
            if self._is_current(*end):
                _, name, who = end
                inner = self._inner[name].get(who)
                lasts = inner is not None and (inner.until_s is None or now_s < inner.until_s)
                self._force(name, who, inner if lasts else None)

    # --- refusals -----------------------------------------------------------------------------------------------------

    def _refuse(self, key: str, value: bytes, error: ConfigError) -> None:
        refused = _Refused(value if len(value) <= LIMIT_BYTES_MAX else None, tuple(error.problems))
        if refused != self._refused.get(key):
            self._newly_refused[key] = refused.problems
        self._refused[key] = refused

    def _refuse_for_now(self, kind: str, key: str, value: bytes, most: int) -> None:
        self._beyond[kind][key] = None
        self._refuse(key, value, RefusedError(f"there are {most} {kind.rstrip('/')} already", "remove some"))

    def _readmit(self, kind: str) -> None:
        """One is gone: take one of those that were too many."""
        while self._beyond[kind]:
            key, _ = self._beyond[kind].popitem()
            refused = self._refused.get(key)
            if refused and refused.value is not None:
                self._waiting[kind].setdefault(key, refused.value)
                return


def encode(texts: Mapping[str, str | None]) -> str:
    """Texts as lines that `load` reads."""
    return "".join(json.dumps({key: text}) + "\n" for key, text in texts.items())


def parse_limit(name: str, text: str) -> Limit:
    """A limit, as it is in etcd. Raises ConfigError with all problems."""
    problems = Problems("")
    try:
        limit = read_limit(name, compose(text, problems))
        problems.check()
    except ConfigError as error:
        raise ConfigError(list(_told(error))) from None
    return limit


def parse_override(limit: Limit, who: str, text: str) -> Override:
    """An override of a limit for a key, as it is in etcd. Raises ConfigError with all problems."""
    folded = fold(limit.key, who)
    if folded != who:
        right = f"put it as {OVERRIDES}{limit.name}/{folded}"
        raise RefusedError(f"{quote(who)} is not spelled as requests are counted", right)
    override = _override(text, tuple(limit.windows), limit.count)
    if isinstance(override, Override):
        return override
    raise ConfigError(list(override))


@lru_cache(maxsize=OVERRIDE_TEXTS_MAX)
def _override(text: str, windows: tuple[int, ...], count: Count) -> Override | tuple[str, ...]:
    """The override, or its problems."""
    problems = Problems("")
    try:
        override = attempt(compose(text, problems), partial(read_override, windows=windows, count=count), Override({}))
        problems.check()
    except ConfigError as error:
        return _told(error)
    return override


def _told(error: ConfigError) -> tuple[str, ...]:
    """Its problems, without the line where that is the first."""
    return tuple(
        re.sub("^:([0-9]+): ", lambda line: "" if line[1] == "1" else f"line {line[1]}: ", problem)
        for problem in error.problems
    )


def _decode(value: bytes, bytes_max: int) -> str:
    if len(value) > bytes_max:
        raise RefusedError(f"has {len(value)} bytes", f"write at most {bytes_max}")
    try:
        return decode(value, "")
    except ConfigError as error:
        raise ConfigError(list(_told(error))) from None


def _shape(limit: Limit) -> tuple[object, ...]:
    """What an override is read with."""
    return limit.key, limit.count, tuple(limit.windows)
