"""YAML as an operator wrote it: every value with its line, and all problems of a file at once.

The settings, the limits file and single limits in etcd are read in two steps. `compose` makes nodes out of text. Then
*readers*, functions of a node, make values: a reader returns one or raises RefusedError, and `attempt` (or `take`, for
an entry of a mapping) notes that as a problem and goes on with a default. Nothing counts before `Problems.check`:

    problems = Problems("postmeter.yaml")
    entries = fields(compose(text, problems), ("shadow", "note"))
    shadow = take(entries, "shadow", boolean, False)
    problems.check()

A problem names the source, the line, the path, what is wrong, and what would be right:

    limits.yaml:12: limits.per-user.max: "2oo" is not a number; write a number such as 200, or {1h: 200, 24h: 1000}

The YAML is less than YAML 1.1. A scalar is the text that was written, so that `1:30`, `on`, `010` and `2027-01-31` are
what they look like. Refused are names that stand twice (PyYAML takes the last), anchors, aliases, tags, a second
document, and more than DEPTH_MAX levels. A mapping of which everything is commented out is an empty mapping.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from postmeter.defaults import CONDITION_DEPTH_MAX, FILE_BYTES_MAX
from postmeter.errors import ConfigError

Plain = str | list["Plain"] | dict[str, "Plain"]

T = TypeVar("T")
S = TypeVar("S", bound=str)

# libyaml's own composer overflows the C stack at some 10,000 levels; a limit with the deepest condition has fewer.
DEPTH_MAX = 8 + 2 * CONDITION_DEPTH_MAX
# Who has more reads no further.
PROBLEMS_MAX = 100

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_CONTROL = re.compile("[^\t\n\r -~\x85\xa0-\ud7ff\ue000-\U0010ffff]")
# What needs no quotes, wherever it stands.
_BARE = re.compile("[A-Za-z0-9_/.][A-Za-z0-9_/.@%+-]*( [A-Za-z0-9_/.@%+-]+)*")
_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class RefusedError(ConfigError):
    """A value cannot be taken: what is wrong with it, and what would be right."""

    def __init__(self, wrong: str, right: str) -> None:
        super().__init__([f"{wrong}; {right}"])


class Problems:
    """What is wrong with one source, so far."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._found: list[tuple[int, str]] = []

    def add(self, line: int, path: str, problem: RefusedError) -> None:
        """Note one."""
        place = f"{self.source}:{line}: {path}: " if path else f"{self.source}:{line}: "
        self._found.append((line, f"{place}{problem}"))

    def check(self) -> None:
        """Raise ConfigError if there are any."""
        if self._found:
            raise self.error()

    def error(self) -> ConfigError:
        """All of them, in the order of their lines."""
        texts = [text for _, text in sorted(self._found, key=lambda found: found[0])]
        if len(texts) > PROBLEMS_MAX:
            more = len(texts) - PROBLEMS_MAX
            texts[PROBLEMS_MAX:] = [f"{self.source}: {more} more problems; correct these first"]
        return ConfigError(texts)


@dataclass(slots=True, eq=False)
class Node:
    """A scalar as the text that was written, a list, or a mapping; and where it stands."""

    value: str | list[Node] | dict[str, Node]
    line: int
    name: str
    parent: Node | None
    problems: Problems

    @property
    def path(self) -> str:
        """The names that lead here, such as `limits.per-user.exempt[2]`."""
        above = self.parent.path if self.parent else ""
        name = printable(self.name[:80])
        return f"{above}.{name}" if above and not name.startswith("[") else above + name

    def refuse(self, wrong: str, right: str) -> None:
        """Note a problem of this value."""
        self.problems.add(self.line, self.path, RefusedError(wrong, right))


def read_text(path: Path) -> str:
    """A file as text. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        right = "name a file that exists and that this user may read"
        raise ConfigError([f"{path}: cannot be read ({error.strerror}); {right}"]) from None
    return decode(data, str(path))


def decode(data: bytes, source: str) -> str:
    """The text of a document. Raises ConfigError if it is not UTF-8, or larger than FILE_BYTES_MAX."""
    if len(data) > FILE_BYTES_MAX:
        raise ConfigError([f"{source}: is larger than {FILE_BYTES_MAX} bytes; make it smaller"])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError([f"{source}:{line}: is not UTF-8; save the file as UTF-8"]) from None


# --- text to nodes ----------------------------------------------------------------------------------------------------


def compose(text: str, problems: Problems) -> Node:
    """The root of a document. Raises ConfigError if it is not YAML or nested too deep, and notes what is refused."""
    control = _CONTROL.search(text)
    if control:
        line = text.count("\n", 0, control.start()) + 1
        problems.add(line, "", RefusedError(f"contains the control character {quote(control[0])}", "remove it"))
        raise problems.error()
    root = _from_json(text, problems)
    if root:
        return root
    try:
        return _Composer(text, problems).root()
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        problems.add(line, "", _explain(error, text.split("\n")[line - 1 : line]))
        raise problems.error() from None


def _from_json(text: str, problems: Problems) -> Node | None:
    """The root of a mapping in one line of JSON, which is YAML that can be read four times as fast; None if it is not.

    If something is wrong it is left to YAML to say what.
    """
    if text[:1] != "{" or "\n" in text:
        return None
    try:
        value = _JSON.decode(text)
        if "\\u" in text:
            # Half a pair of surrogates is no character.
            json.dumps(value, ensure_ascii=False).encode()
        return _filled(Node("", 1, "", None, problems), value, 0)
    except (ValueError, RecursionError):
        return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError
    return entries


_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_int=str, parse_float=str, parse_constant=str)


def _filled(node: Node, value: Any, depth: int) -> Node:
    """The node, with a value of JSON. Raises ValueError if it is nested too deep."""
    if depth > DEPTH_MAX:
        raise ValueError

    def inner(name: str, each: Any) -> Node:
        return _filled(Node("", 1, name, node, node.problems), each, depth + 1)

    if isinstance(value, dict):
        node.value = {name: inner(name, each) for name, each in value.items()}
    elif isinstance(value, list):
        node.value = [inner(f"[{place}]", each) for place, each in enumerate(value, 1)]
    else:
        node.value = value if isinstance(value, str) else json.dumps(value)
    return node


class _Composer:
    """Makes nodes of PyYAML's events."""

    def __init__(self, text: str, problems: Problems) -> None:
        self._problems = problems
        self._events = yaml.parse(text, Loader=_LOADER)

    def root(self) -> Node:
        next(self._events)
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return Node({}, 1, "", None, self._problems)
        root = self._node(next(self._events), None, "", 1, 0)
        next(self._events)
        if not isinstance(next(self._events), yaml.StreamEndEvent):
            root.refuse("has a second document behind ---", "keep one of them")
        return root

    def _node(self, event: yaml.Event, parent: Node | None, name: str, line: int, depth: int) -> Node:
        node = Node("", line, name, parent, self._problems)
        if depth > DEPTH_MAX:
            node.refuse(f"is nested more than {DEPTH_MAX} levels deep", "write it with fewer levels")
            raise self._problems.error()
        if isinstance(event, yaml.AliasEvent):
            node.refuse("is a YAML alias (*), which is not used here", "write the value out, or text in quotes")
        elif getattr(event, "anchor", None):
            node.refuse("is a YAML anchor (&), which is not used here", "remove it, or write text in quotes")
        elif getattr(event, "tag", None):
            node.refuse("is a YAML tag (!), which is not used here", "remove it, or write text in quotes")
        if isinstance(event, yaml.ScalarEvent):
            node.value = event.value
        elif isinstance(event, yaml.SequenceStartEvent):
            node.value = self._items(node, depth + 1)
        elif isinstance(event, yaml.MappingStartEvent):
            node.value = self._entries(node, depth + 1)
        return node

    def _items(self, node: Node, depth: int) -> list[Node]:
        items: list[Node] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            items.append(self._node(event, node, f"[{len(items) + 1}]", _line(event), depth))
        return items

    def _entries(self, node: Node, depth: int) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._node(event, node, "", _line(event), depth)
            name = key.value if isinstance(key.value, str) else ""
            entry = self._node(next(self._events), node, name, key.line, depth)
            if name is not key.value:
                entry.refuse(
                    "has a list or a mapping for a name", "write name: value, and names with brackets in quotes"
                )
            elif name in entries:
                entry.refuse(f"stands twice, first in line {entries[name].line}", "remove one of them")
            else:
                entries[name] = entry
        return entries


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 0


def _explain(error: Exception, lines: list[str]) -> RefusedError:
    if any(re.match(" *\t", line) for line in lines):
        return RefusedError("is indented with a tab", "indent with spaces")
    wrong = getattr(error, "problem", None) or "an escape that stands for no character"
    right = 'indent with spaces, and quote text that begins with one of * & ! % @ { [ or contains ": "'
    return RefusedError(f"is not YAML: {wrong}", right)


# --- nodes to values --------------------------------------------------------------------------------------------------


def attempt(node: Node, reader: Callable[[Node], T], default: T) -> T:
    """What the reader makes of the node; the default, and a problem noted, if it refuses."""
    try:
        return reader(node)
    except RefusedError as problem:
        node.problems.add(node.line, node.path, problem)
        return default


def take(entries: Mapping[str, Node], name: str, reader: Callable[[Node], T], default: T) -> T:
    """What the reader makes of an entry; the default if there is none."""
    return attempt(entries[name], reader, default) if name in entries else default


def fields(node: Node, known: Collection[str], required: Mapping[str, str] | None = None) -> dict[str, Node]:
    """The known entries of a mapping. Notes unknown ones, and the required ones (name: example) that it lacks."""
    entries = attempt(node, mapping, None)
    if entries is None:
        return {}
    for name, example in (required or {}).items():
        if name not in entries:
            node.refuse(f"{name} is missing", f"write {example}")
    for name, entry in entries.items():
        if name not in known:
            entry.refuse("unknown name", nearest(name, known))
    return {name: entry for name, entry in entries.items() if name in known}


def mapping(node: Node) -> dict[str, Node]:
    """A mapping with any names."""
    if node.value == "":
        return {}
    if not isinstance(node.value, dict):
        raise RefusedError("is not a mapping", "write name: value, one below the other and indented alike")
    return node.value


def listed(node: Node) -> Sequence[Node]:
    """A list, or one value in place of a list of one."""
    if node.value == []:
        raise RefusedError("is an empty list", "write at least one value, or remove it")
    return node.value if isinstance(node.value, list) else [node]


def scalar(node: Node, right: str) -> str:
    """One value, as text. `right` is what to say where there is none."""
    if isinstance(node.value, str) and node.value:
        return node.value
    kind = "a list" if isinstance(node.value, list) else "a mapping" if node.value else "empty"
    raise RefusedError(f"is {kind}", right)


def boolean(node: Node) -> bool:
    """True or false."""
    text = scalar(node, "write true or false")
    if text.lower() not in _TRUTH:
        raise RefusedError(f"{quote(text)} is neither true nor false", "write true or false")
    return _TRUTH[text.lower()]


def choice(options: Sequence[S]) -> Callable[[Node], S]:
    """A reader of one of several words."""

    def reader(node: Node) -> S:
        text = scalar(node, f"write one of {', '.join(options)}")
        if text.lower() not in options:
            raise RefusedError(f"{quote(text)} is unknown", nearest(text, options))
        return options[options.index(text.lower())]

    return reader


# --- values to text ---------------------------------------------------------------------------------------------------


def plain(node: Node) -> Plain:
    """The values alone."""
    if isinstance(node.value, dict):
        return {name: plain(entry) for name, entry in node.value.items()}
    return node.value if isinstance(node.value, str) else [plain(item) for item in node.value]


def to_yaml(entries: Mapping[str, Plain]) -> str:
    """A mapping as an operator would write it, one entry a line. `plain` of what `compose` makes of it is the same."""
    return "".join(f"{_flow(name)}: {_flow(value)}\n" for name, value in entries.items()) or "{}\n"


def _flow(value: Plain) -> str:
    if isinstance(value, str):
        return value if _BARE.fullmatch(value) else f'"{"".join(map(_escaped, value))}"'
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    return f"{{{', '.join(f'{_flow(name)}: {_flow(each)}' for name, each in value.items())}}}"


def _escaped(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    return char if char.isprintable() else f"\\U{ord(char):08x}"


# --- words for problems -----------------------------------------------------------------------------------------------


def nearest(name: str, known: Iterable[str]) -> str:
    """What to write in place of an unknown name."""
    spelled = {option.lower(): option for option in sorted(known)}
    found = difflib.get_close_matches(name[:64].lower(), spelled, 1)
    return f"did you mean {spelled[found[0]]}?" if found else f"write one of {', '.join(spelled.values())}"


def quote(text: str) -> str:
    """A value in quotes, not too long."""
    return f'"{printable(text[:60])}{"..." if len(text) > 60 else ""}"'


def printable(text: str) -> str:
    """The text in one line, with escapes for what cannot be seen."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
