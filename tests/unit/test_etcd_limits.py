"""Limits and overrides as they are in etcd: what is in force after what was put, good and bad."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from math import inf

import pytest

from postmeter import etcd_limits
from postmeter.core.limits import Limit, Override
from postmeter.core.meters import UNLIMITED
from postmeter.errors import ConfigError
from postmeter.etcd_limits import Change, EtcdLimits, encode, parse_limit, parse_override
from tests.unit.support import DAY_MS, HOUR_MS

USER = "{key: sasl_username, count: recipients, max: 100, per: 1h}"
TWO_WINDOWS = "{key: sasl_username, count: recipients, max: {1h: 100, 24h: 500}}"


def put(limits: EtcdLimits, now_s: float = 0.0, /, **values: str | None) -> Change:
    """Put values, and take what changes. In names `__` is for a slash, `_` for a hyphen."""
    keys = {key.replace("__", "/").replace("_", "-"): value for key, value in values.items()}
    return put_keys(limits, keys, now_s)


def put_keys(limits: EtcdLimits, values: Mapping[str, str | None], now_s: float = 0.0) -> Change:
    """The same with keys as they are."""
    limits.apply({key: None if value is None else value.encode() for key, value in values.items()})
    while limits.settle(2):
        pass
    return limits.take(now_s)


def in_force(limits: EtcdLimits) -> dict[str, Limit]:
    """The limits by name, with their overrides as they are now."""
    return {name: replace(limit, overrides=dict(limit.overrides)) for name, limit in limits._limits.items()}


def maxes(limits: EtcdLimits, name: str = "per-user") -> dict[str, int]:
    """The overrides of a limit of one window."""
    return {key: override.max[HOUR_MS] for key, override in limits._limits[name].overrides.items()}


# --- limits -----------------------------------------------------------------------------------------------------------


def test_limits_come_and_go() -> None:
    """In the order of their names, whatever the order in which they were put; other keys are not theirs."""
    limits = EtcdLimits()
    changed = put_keys(limits, {"roster": "x", "limits/b": USER, "limits/a": TWO_WINDOWS, "nodes/1": "{"}).limits
    assert changed == [parse_limit("a", TWO_WINDOWS), parse_limit("b", USER)]
    assert put_keys(limits, {"limits/a": None, "limits/c": None}).limits == [parse_limit("b", USER)]
    assert put_keys(limits, {"limits/c": None, "roster": None}).limits is None
    assert put_keys(limits, {"limits/b": USER}).limits is None
    assert [] == put_keys(limits, {"limits/b": None}).limits
    assert [] == list(limits.problems())


def test_a_bad_limit_leaves_the_last_good_one() -> None:
    """With every reason; the next good one is in force, and deleting it deletes the last good one, too."""
    limits = EtcdLimits()
    put_keys(limits, {"limits/per-user": USER})
    assert put_keys(limits, {"limits/per-user": USER.replace("100", "1oo").replace("key", "kex")}).limits is None
    assert 100 == in_force(limits)["per-user"].windows[HOUR_MS]
    assert [
        ("limits/per-user", "key is missing; write key: sasl_username"),
        ("limits/per-user", "kex: unknown name; did you mean key?"),
        (
            "limits/per-user",
            'max: "1oo" is not a number; write a number such as 200, or {1h: 200, 24h: 1000}',
        ),
    ] == list(limits.problems())
    put_keys(limits, {"limits/per-user": USER.replace("100", "50")})
    assert (50, []) == (in_force(limits)["per-user"].windows[HOUR_MS], list(limits.problems()))
    put_keys(limits, {"limits/per-user": "bad"})
    put_keys(limits, {"limits/per-user": None})
    assert ({}, []) == (in_force(limits), list(limits.problems()))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (b"", "key is missing; write key: sasl_username"),
        (b"\xff", "is not UTF-8; save the file as UTF-8"),
        (b"{", "line 2: is not YAML"),
        (b"x" * 70_000, "has 70000 bytes; write at most 65536"),
        (b"{}\n---\n{}", "has a second document"),
    ],
)
def test_what_is_no_limit_is_refused(value: bytes, problem: str) -> None:
    """Whatever was put."""
    limits = EtcdLimits()
    put_keys(limits, {"limits/x": USER})
    limits.apply({"limits/x": value})
    limits.settle(1)
    assert [] != [each for _, each in limits.problems() if each.startswith(problem)]
    assert ["x"] == list(in_force(limits))


def test_names_of_limits() -> None:
    """Are the same as in a file."""
    limits = EtcdLimits()
    put_keys(limits, {"limits/": USER, "limits/Per User": USER, "limits/a/b": USER})
    assert ["limits/", "limits/Per User", "limits/a/b"] == [key for key, _ in limits.problems()]


def test_limits_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is too many is taken as soon as there is room."""
    monkeypatch.setattr(etcd_limits, "LIMITS_MAX", 2)
    limits = EtcdLimits()
    for name in "abc":
        put_keys(limits, {f"limits/{name}": USER})
    assert [("limits/c", "there are 2 limits already; remove some")] == list(limits.problems())
    put_keys(limits, {"limits/a": USER.replace("100", "50")})
    put_keys(limits, {"limits/b": None})
    assert (["a", "c"], []) == (sorted(in_force(limits)), list(limits.problems()))


# --- overrides --------------------------------------------------------------------------------------------------------


def test_overrides_are_merged_into_their_limit() -> None:
    """As a number, a word, by window, or with an end, a note and an author."""
    limits = EtcdLimits()
    put(
        limits,
        limits__per_user=TWO_WINDOWS,
        overrides__per_user__a="unlimited",
        overrides__per_user__b="blocked",
        overrides__per_user__c="{24h: 1000}",
        overrides__per_user__d="{max: {1h: 1, 24h: 2}, until: 2027-01-31, note: the fair, author: kim}",
        overrides__per_user__e='{"max": {"1h": 7}, "note": "the fair"}',
    )
    assert {
        "a": Override({HOUR_MS: UNLIMITED, DAY_MS: UNLIMITED}),
        "b": Override({HOUR_MS: 0, DAY_MS: 0}),
        "c": Override({DAY_MS: 1000}),
        "d": Override({HOUR_MS: 1, DAY_MS: 2}, 1_801_440_000.0, "the fair", "kim"),
        "e": Override({HOUR_MS: 7}, note="the fair"),
    } == in_force(limits)["per-user"].overrides


def test_a_changed_override_does_not_change_its_limit() -> None:
    """It is told by itself, and the limits that were handed out follow."""
    limits = EtcdLimits()
    given = put(limits, limits__per_user=USER, overrides__per_user__a="1").limits
    assert given is not None
    assert {"a": Override({HOUR_MS: 1})} == given[0].overrides
    change = put(limits, overrides__per_user__a="2", overrides__per_user__b="3")
    assert (None, {"per-user": {"a": Override({HOUR_MS: 2}), "b": Override({HOUR_MS: 3})}}) == change_of(change)
    assert (None, {"per-user": {"a": None}}) == change_of(put(limits, overrides__per_user__a=None))
    assert (None, {}) == change_of(put(limits, overrides__per_user__b="3"))
    assert {"b": Override({HOUR_MS: 3})} == given[0].overrides


def change_of(change: Change) -> tuple[object, object]:
    """Without the texts."""
    return change.limits, change.overrides


def test_a_bad_override_leaves_the_last_good_one() -> None:
    """Of that key; the others go their way."""
    limits = EtcdLimits()
    put(limits, limits__per_user=USER, overrides__per_user__a="1", overrides__per_user__b="1")
    change = put(limits, overrides__per_user__a="many", overrides__per_user__b="2", overrides__per_user__c="{until: x}")
    assert {"overrides/per-user/a", "overrides/per-user/c"} == set(change.refused)
    assert {"a": 1, "b": 2} == maxes(limits)
    assert {} == put(limits, limits__per_user=USER.replace("100", "50")).refused
    number = "write a number such as 200, or {1h: 200, 24h: 1000}, or unlimited, or blocked"
    day = "write a day such as 2027-01-31, or a time such as 2027-01-31 18:00+01:00"
    assert [
        ("overrides/per-user/a", f'"many" is not a number; {number}'),
        ("overrides/per-user/c", "max is missing; write max: 1000"),
        ("overrides/per-user/c", f'until: "x" is no date; {day}'),
    ] == list(limits.problems())
    put(limits, overrides__per_user__a=None, overrides__per_user__c=None)
    assert ({"b": 2}, []) == (maxes(limits), list(limits.problems()))


def test_an_override_may_come_before_its_limit_and_stay_after_it() -> None:
    """It says that it waits."""
    limits = EtcdLimits()
    put(limits, overrides__per_user__a="1", overrides__per_user__b="bad")
    assert [("overrides/per-user/", "there is no limit per-user, for which 2 overrides wait")] == list(
        limits.problems()
    )
    put(limits, limits__per_user=USER)
    assert {"a": 1} == maxes(limits)
    assert ["overrides/per-user/b"] == [key for key, _ in limits.problems()]
    put(limits, limits__per_user=None)
    assert ["overrides/per-user/"] == [key for key, _ in limits.problems()][:1]
    put(limits, limits__per_user=USER)
    assert {"a": 1} == maxes(limits)


def test_an_override_beats_the_one_in_the_value_of_the_limit() -> None:
    """Which is in force again when it is gone, and when it ends."""
    inner = USER.replace("}", ", overrides: {a: 1, b: 1, c: 1}}")
    limits = EtcdLimits()
    put(limits, limits__per_user=inner, overrides__per_user__a="2", overrides__per_user__b="2")
    assert {"a": 2, "b": 2, "c": 1} == maxes(limits)
    put(limits, overrides__per_user__a=None, overrides__per_user__b="{max: 3, until: 1970-01-01}")
    assert {"a": 1, "b": 3, "c": 1} == maxes(limits)
    assert {"per-user": {"b": Override({HOUR_MS: 1})}} == put(limits, 86_400.0).overrides
    put(limits, 86_400.0, limits__per_user=USER.replace("}", ", overrides: {b: 4, d: 4}}"))
    assert {"b": 4, "d": 4} == maxes(limits)


def test_a_limit_that_changes_keeps_its_overrides() -> None:
    """They are read again if its key, its windows or what it counts is another."""
    limits = EtcdLimits()
    put(limits, limits__per_user=USER, overrides__per_user__a="1", overrides__per_user__b="{24h: 2}")
    assert ["overrides/per-user/b"] == [key for key, _ in limits.problems()]
    put(limits, limits__per_user=USER.replace("100", "200"))
    assert {"a": 1} == maxes(limits)
    put(limits, limits__per_user=TWO_WINDOWS)
    assert {"b": Override({DAY_MS: 2})} == in_force(limits)["per-user"].overrides
    assert ["is one number for a limit of several windows; write {1h: 1, 24h: 1}"] == [
        problem for _, problem in limits.problems()
    ]


def test_a_key_has_one_spelling() -> None:
    """Else two nodes could differ about which of two holds."""
    limits = EtcdLimits()
    put_keys(
        limits,
        {
            "limits/per-user": USER,
            "limits/net": USER.replace("sasl_username", "client_address"),
            "overrides/per-user/Alice@Example.com": "1",
            "overrides/net/2001:DB8::1": "1",
            "overrides/net/2001:db8::/64": "1",
            "overrides/net/none": "1",
            "overrides/net": "1",
        },
    )
    wrong = "is not spelled as requests are counted; put it as"
    assert [
        '"" is no client_address; write it as the requests have it',
        f'"2001:DB8::1" {wrong} overrides/net/2001:db8::/64',
        '"none" is no client_address; write it as the requests have it',
        f'"Alice@Example.com" {wrong} overrides/per-user/alice@example.com',
    ] == [problem for _, problem in limits.problems()]
    assert {"2001:db8::/64": 1} == maxes(limits, "net")


def test_overrides_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In number, with or without a limit, and in size."""
    monkeypatch.setattr(etcd_limits, "OVERRIDES_MAX", 2)
    limits = EtcdLimits()
    put(limits, limits__per_user=USER, overrides__ghost__a="1")
    put(limits, overrides__per_user__a="1")
    put(limits, overrides__per_user__b="1")
    put(limits, overrides__per_user__a="x" * 5_000)
    assert {"a": 1} == maxes(limits)
    assert [
        "there is no limit ghost, for which 1 overrides wait",
        "has 5000 bytes; write at most 4096",
        "there are 2 overrides already; remove some",
    ] == [problem for _, problem in limits.problems()]
    put(limits, overrides__ghost__a=None)
    assert {"a": 1, "b": 1} == maxes(limits)


# --- ends -------------------------------------------------------------------------------------------------------------


def test_an_override_ends_by_itself() -> None:
    """At the end of its last day in UTC; until then it is said when."""
    limits = EtcdLimits()
    put(limits, limits__per_user=USER, overrides__per_user__a="{max: 1, until: 1970-01-02}")
    assert ({"a": 1}, 2 * 86_400.0) == (maxes(limits), limits.next_end_s)
    put(limits, 2 * 86_400.0 - 1, overrides__per_user__b="{max: 1, until: 1970-01-03 01:00:01+01:00}")
    assert {"a": 1, "b": 1} == maxes(limits)
    assert {"per-user": {"a": None}} == put(limits, 2 * 86_400.0).overrides
    assert {"per-user": {"b": None}} == put(limits, 2 * 86_400.0 + 1).overrides
    assert ({}, inf) == (maxes(limits), limits.next_end_s)


def test_an_override_that_has_ended_when_it_is_put() -> None:
    """Never is in force, also if its limit changes; put again with a later end it is."""
    limits = EtcdLimits()
    ended = "{max: 1, until: 1970-01-01}"
    change = put(limits, 86_400.0, limits__per_user=USER, overrides__per_user__a=ended)
    assert change.limits is not None
    assert {} == change.limits[0].overrides
    put(limits, 86_400.0, limits__per_user=TWO_WINDOWS)
    put(limits, 86_400.0, limits__per_user=USER)
    assert {} == maxes(limits)
    put(limits, 86_400.0, overrides__per_user__a="{max: 1, until: 1970-01-02}")
    assert {"a": 1} == maxes(limits)
    assert {} == put(limits, 86_401.0).overrides


def test_ends_of_what_was_changed_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is changed."""
    limits = EtcdLimits()
    limits._ends_max = 3
    put(limits, limits__per_user=USER, overrides__per_user__b="{max: 1, until: 1970-01-30}")
    for day in range(10, 30):
        put(limits, overrides__per_user__a=f"{{max: 1, until: 1970-01-{day}}}")
        limits._ends_max = 3
    assert len(limits._ends) <= 4
    assert {"per-user": {"a": None}} == put(limits, 29 * 86_400.0).overrides
    assert {"b": 1} == maxes(limits)


# --- the copy ---------------------------------------------------------------------------------------------------------


def test_what_was_good_is_loaded_again() -> None:
    """As a whole, or with the changes since; what was refused is not."""
    limits = EtcdLimits()
    put(limits, limits__per_user=USER, overrides__per_user__a="1", overrides__ghost__x="1")
    dumped = "".join(limits.dump())
    texts = put(limits, overrides__per_user__a="bad", overrides__per_user__b="2", overrides__ghost__x=None).texts
    assert {"overrides/per-user/b": "2", "overrides/ghost/x": None} == texts
    for copy in ("".join(limits.dump()), dumped + encode(texts), dumped + encode(texts) + '{"limits/per-us'):
        loaded = EtcdLimits()
        loaded.load(copy)
        put(loaded)
        assert ({"a": 1, "b": 2}, []) == (maxes(loaded), list(loaded.problems()))


def test_what_was_deleted_meanwhile_is_forgotten() -> None:
    """After a start from the copy, when etcd is seen again; whether it was settled before or not."""
    limits = EtcdLimits()
    put(limits, limits__per_user=USER, limits__other=USER, overrides__per_user__a="1", overrides__per_user__b="1")
    for settled in (True, False):
        loaded = EtcdLimits()
        loaded.load("".join(limits.dump()))
        if settled:
            put(loaded)
        loaded.keep({"limits/per-user", "overrides/per-user/b"})
        put(loaded)
        assert ({"b": 1}, ["per-user"]) == (maxes(loaded), list(in_force(loaded)))


@pytest.mark.parametrize("text", ["x", "[]", "{", "1", '{"limits/x": 1}', "{}\n\x00"])
def test_a_damaged_copy_is_not_loaded(text: str) -> None:
    """And what to do is said."""
    with pytest.raises(ConfigError, match="is damaged; remove it"):
        EtcdLimits().load(f"{text}\n")


# --- as a whole -------------------------------------------------------------------------------------------------------


class Twin:
    """The same, by reading everything again after each change."""

    def __init__(self) -> None:
        self.put: dict[str, str] = {}
        self.good: dict[str, str] = {}

    def apply(self, changes: Mapping[str, str | None]) -> None:
        """What changed."""
        for key, value in changes.items():
            if value is None:
                self.put.pop(key, None)
                self.good.pop(key, None)
            else:
                self.put[key] = value
        for key in sorted(self.put):
            if key.startswith("limits/") and self.reads(key, self.put[key]):
                self.good[key] = self.put[key]
        for key in self.put:
            limit = "limits/" + key.split("/")[1]
            if key.startswith("overrides/") and (key in changes or limit in self.good):
                texts = [self.put[key], *([self.good.pop(key)] if key in self.good else [])]
                good = [text for text in texts if self.reads(key, text)]
                if good:
                    self.good[key] = good[0]

    def reads(self, key: str, text: str) -> Limit | Override | None:
        """What a text is, if it is good; an override without a limit may be."""
        kind, name, *who = key.split("/")
        try:
            if kind == "limits":
                return parse_limit(name, text)
            if f"limits/{name}" not in self.good:
                return Override({})
            return parse_override(parse_limit(name, self.good[f"limits/{name}"]), who[0], text)
        except ConfigError:
            return None

    def in_force(self) -> dict[str, Limit]:
        """The limits by name."""
        found = {}
        for key, text in self.good.items():
            kind, name, *who = key.split("/")
            if kind == "limits":
                found[name] = parse_limit(name, text)
        for key in self.good:
            kind, name, *who = key.split("/")
            override = self.reads(key, self.good[key])
            if kind == "overrides" and name in found and isinstance(override, Override):
                found[name] = replace(found[name], overrides={**found[name].overrides, who[0]: override})
        return found


LIMIT_TEXTS = [
    USER,
    USER.replace("100", "7"),
    TWO_WINDOWS,
    "bad",
    USER.replace("}", ", overrides: {a: 9, c: 8}}"),
    None,
]
OVERRIDE_TEXTS = ["1", "2", "unlimited", "{24h: 3}", "{1h: 4}", "bad", '{"max": 5, "note": "x"}', None]


@pytest.mark.parametrize("seed", range(50))
def test_it_is_what_reading_everything_again_would_give(seed: int) -> None:
    """For random changes; and the changes that are told add up to it."""
    rng = random.Random(seed)
    limits, twin = EtcdLimits(), Twin()
    told: dict[str, Limit] = {}
    for _ in range(20):
        changes: dict[str, str | None] = {}
        for _ in range(rng.randint(1, 4)):
            name = rng.choice("xy")
            if rng.random() < 0.3:
                changes[f"limits/{name}"] = rng.choice(LIMIT_TEXTS)
            else:
                changes[f"overrides/{name}/{rng.choice('abB')}"] = rng.choice(OVERRIDE_TEXTS)
        twin.apply(changes)
        change = put_keys(limits, changes)
        if change.limits is not None:
            told = {limit.name: replace(limit, overrides=dict(limit.overrides)) for limit in change.limits}
        for name, changed in change.overrides.items():
            overrides = {**told[name].overrides, **changed}
            merged = {who: override for who, override in overrides.items() if override}
            told[name] = replace(told[name], overrides=merged)
        assert twin.in_force() == in_force(limits) == told
        loaded = EtcdLimits()
        loaded.load("".join(limits.dump()))
        put(loaded)
        assert in_force(loaded) == told
    put_keys(limits, dict.fromkeys(twin.put))
    assert ({}, {}, {}, 0) == (limits._limits, limits._texts, limits._refused, limits._texts_count)
