r"""The quick way to a decision: for each stage and layout of request, a function written for just these limits.

Nearly all requests fit, and for those everything but the look-ups and additions can be settled beforehand: which line a
key stands in, which meters it has, what is charged. So `compile_stage` writes the steps out, one after the other, as
dataclasses and named tuples write their methods, and lets Python compile them. For the limits of
deploy/examples/limits.yaml at END-OF-MESSAGE that is, shortened:

    value13, value14, value15, value20 = values[13], values[14], values[15], values[20]
    mark = hash((value15, value14, value13)) if value15 else 0
    marked = mark & 524286
    if marks[marked] == mark or marks[marked + 1] == mark: return REPEATED
    ...
    key0 = value20
    row0 = rows0.get(key0)
    if row0 is None: ...  # cut from it: in lower case, not too long
    if key0:
        if now_ms >= meters0.slice_end_ms: meters0.advance(now_ms)
        if (amount0 if row0 is None else used0[row0] + amount0) > meters0.quick_max and ...: return closely(...)
    ...
    if key0:
        if row0 is None: row0 = keys0.open(key0)
        used0[row0] += amount0
        ...  # as Meters.charge
    marks[marked + 1], marks[marked] = marks[marked], mark

Whatever is not plain goes the slow way, `closely`: it gives the same answers, and a test holds that it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from postmeter.core.limits import ADDRESS_ATTRIBUTES
from postmeter.core.meters import OVERFLOW_KEY, OVERFLOW_ROW, PLACES
from postmeter.core.request import DERIVED, END_OF_MESSAGE, Request
from postmeter.core.rule import MARKED, Rule, once_mark
from postmeter.defaults import KEY_CHARS_MAX, REPEAT_PAIRS

Decide = Callable[[Request, int], Any]

REPEATS_MASK = 2 * (REPEAT_PAIRS - 1)
"""What of a mark is its place."""


def compile_stage(stage: str, rules: Iterable[Rule], places: Mapping[str, int], known: Mapping[str, Any]) -> Decide:
    """A function of (request, now_ms) that decides at one stage, for requests whose attributes stand at these places.

    `known` are the things it uses: PERMIT, REPEATED, repeats and their marks, ledger, closely, hold.
    """
    return _Writer(stage, [rule for rule in rules if rule.asked_at(stage)], places, known).compile()


class _Writer:
    """Writes the source of one function. `rules` and what belongs to them are numbered: key0, rows0, meters0, ..."""

    def __init__(self, stage: str, rules: list[Rule], places: Mapping[str, int], known: Mapping[str, Any]) -> None:
        self._at_rcpt = stage == "RCPT"
        self._places = places
        self._names: dict[str, Any] = {**known, "once_mark": once_mark}
        self._lines: list[str] = []
        self._cut: set[int] = set()
        self._keys: dict[str, int] = {}
        self._rules = [(number, rule, rule.stage == stage) for number, rule in enumerate(rules)]
        for _, rule, _ in self._rules:
            self._keys.setdefault(str(rule.limit.key), len(self._keys))

    def compile(self) -> Decide:
        """The function."""
        charging = [(number, rule) for number, rule, charges in self._rules if charges]
        if charging:
            self._write(
                1,
                f"mark = {self._mark()}",
                f"marked = mark & {REPEATS_MASK}",
                "if mark and (marks[marked] == mark or marks[marked + 1] == mark): return REPEATED",
            )
        self._write_amounts()
        for text, number in self._keys.items():
            self._write_key(number, next(rule for _, rule, _ in self._rules if str(rule.limit.key) == text))
        for number, rule, charges in self._rules:
            self._write_check(number, rule, charges)
        if charging:
            self._write_charges(charging)
        self._write(1, "return PERMIT")
        cuts = [f"    value{place} = values[{place}]" for place in sorted(self._cut)]
        source = "\n".join(["def decide(request, now_ms):", "    values = request[0]", *cuts, *self._lines])
        exec(compile(source, "<limits>", "exec"), self._names)  # noqa: S102 - names and numbers only, nothing from outside
        decide: Decide = self._names["decide"]
        return decide

    def _write(self, depth: int, *lines: str) -> None:
        self._lines += ["    " * depth + line for line in lines]

    def _value(self, name: str) -> str:
        place = self._places.get(name)
        if place is None:
            return '""'
        self._cut.add(place)
        return f"value{place}"

    def _mark(self) -> str:
        if "instance" not in self._places:
            return "0"
        instance, *rest = map(self._value, MARKED["RCPT" if self._at_rcpt else END_OF_MESSAGE])
        return f"hash(({instance}, {', '.join(rest)},)) if {instance} else 0"

    def _write_amounts(self) -> None:
        counts = {rule.limit.count for _, rule, _ in self._rules}
        self._write(1, "messages = 1")
        if "recipients" in counts:
            one = "" if self._at_rcpt else f' if {self._value("recipient_count")} == "1" else count(request) or 1'
            self._write(1, f"recipients = 1{one}")
        if "bytes" in counts:
            self._write(1, "bytes = size(request)")

    def _write_key(self, number: int, rule: Rule) -> None:
        self._names |= {f"keys{number}": rule.keys, f"rows{number}": rule.keys.rows, f"cut{number}": rule.cut_key}
        name = rule.limit.key.parts[0].attribute
        key, row = f"key{number}", f"row{number}"
        if len(rule.limit.key.parts) > 1 or name in ADDRESS_ATTRIBUTES:
            self._write(1, f"{key} = cut{number}(request)", f"{row} = rows{number}.get({key})")
        else:
            # What a key was cut from is nearly always the key: it is cut only if there is no row for it.
            if name in DERIVED:
                whole = self._value(DERIVED[name])
                self._write(1, f'at = {whole}.rfind("@") + 1', f'{key} = {whole}[at:] if at else ""')
            else:
                self._write(1, f"{key} = {self._value(name)}")
            self._write(
                1,
                f"{row} = rows{number}.get({key})",
                f"if {row} is None:",
                f"    {key} = {key}.lower()[:{KEY_CHARS_MAX}]",
                f"    {row} = rows{number}.get({key})",
            )
        self._write(
            1, f"if {row} is None and {key} and keys{number}.full: {key}, {row} = {OVERFLOW_KEY!r}, {OVERFLOW_ROW}"
        )

    def _write_check(self, number: int, rule: Rule, charges: bool) -> None:
        key = self._keys[str(rule.limit.key)]
        asked = f"key{key}"
        if rule.covers is not None:
            self._names[f"covers{number}"] = rule.covers
            asked += f" and covers{number}(request, key{key})"
        if rule.once and charges:
            asked += f" and not (mark and once_mark(request, {rule.limit.name!r}, key{key}) in repeats)"
        amount = rule.limit.count
        self._write(1, f"asked{number} = {asked}", f"if asked{number}:")
        for window, meters in enumerate(rule.meters):
            name = f"meters{number}_{window}"
            used = f"used{number}_{window}"
            self._names |= {name: meters, used: meters.used}
            self._write(
                2,
                f"if now_ms >= {name}.slice_end_ms: {name}.advance(now_ms)",
                f"if ({amount} if row{key} is None else {used}[row{key}] + {amount}) > {name}.quick_max"
                f" and {name}.usage(row{key}, now_ms) + {amount} > {name}.allowance(key{key}, now_ms):",
                "    return closely(request, now_ms)",
            )

    def _write_charges(self, charging: list[tuple[int, Rule]]) -> None:
        self._write(1, f"if not ({' or '.join(f'asked{number}' for number, _ in charging)}): return PERMIT")
        self._write(1, "held = not ledger.answer_unflushed")
        for number, rule in charging:
            key, amount = self._keys[str(rule.limit.key)], rule.limit.count
            self._write(1, f"if asked{number}{' and bytes' if amount == 'bytes' else ''}:")
            self._write(2, f"if row{key} is None: row{key} = keys{key}.open(key{key})", f"place = row{key} % {PLACES}")
            for window, meters in enumerate(rule.meters):
                name, unflushed = f"meters{number}_{window}", f"unflushed{number}_{window}"
                self._names[unflushed] = meters.unflushed
                self._write(
                    2,
                    f"used{number}_{window}[row{key}] += {amount}",
                    f"if {amount} == 1: {name}.ones.append(row{key})",
                    f"else: {name}.add(row{key}, {amount})",
                    f"{unflushed}[place] = unflushed = {unflushed}[place] + {amount}",
                    f"if unflushed + {name}.waiting_max > {name}.quick_unflushed_max"
                    f" and {name}.must_wait(key{key}, row{key}): held = True",
                )
            if rule.once:
                self._write(2, f"if mark: repeats.add(once_mark(request, {rule.limit.name!r}, key{key}))")
        self._write(
            1,
            "if mark:",
            "    marks[marked + 1] = marks[marked]",
            "    marks[marked] = mark",
            "if held:",
            "    charges = []",
            "    once = []",
        )
        for number, rule in charging:
            key, amount = self._keys[str(rule.limit.key)], rule.limit.count
            self._write(2, f"if asked{number} and {amount}:")
            for window in range(len(rule.meters)):
                self._write(3, f"charges.append((meters{number}_{window}, row{key}, key{key}, {amount}))")
            if rule.once:
                self._write(3, f"once.append(once_mark(request, {rule.limit.name!r}, key{key}))")
        self._write(2, "return hold(charges, [mark, *once] if mark else [])")
