"""Dependencies point inwards only. What may import what is this table; a module that is not in it has no place yet."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import postmeter

ROOT = Path(postmeter.__file__).parent

# From the outside to the inside: a module may import what stands in a row below it. Those in one row know nothing of
# each other.
LAYERS = {
    "command line": {"cli"},
    "process": {"agent"},
    "who asks the node": {"postfix", "control"},
    "what it follows": {"etcd_follower"},
    "its place in the cluster, and its limits": {"membership", "limits_follower"},
    "node": {"node"},
    "node's parts": {"flusher", "cluster"},
    "cluster's part": {"record_keeper"},
    "time": {"clock"},
    "storage": {"storage"},
    "etcd": {"mirror", "presence"},
    "etcd's client": {"etcd"},
    "checks": {"lint"},
    "peers": {"peers"},
    "their port": {"peer_port"},
    "the way to one": {"link"},
    "whom to believe": {"certificates"},
    "the machine": {"sockets", "wiring"},
    "what lies there": {"roster_document", "etcd_limits", "limits_copy"},
    "documents": {"settings", "limits_document"},
    "parts of documents": {"answers_document", "conditions_document"},
    "speech": {"speech"},
    "the library's words": {"library_log"},
    "what nodes say and store": {"packet", "records"},
    "its parts": {"messages"},
    "tools": {"documents", "logs", "systemd", "turns", "v1", "etcdpb"},
    "core": {"core"},
    "ground": {"", "defaults", "errors"},
}

# All that the core may know of Python: nothing that has a clock, a die, a file, or a network.
PURE = frozenset(
    """__future__ array bisect collections dataclasses enum fnmatch functools hashlib heapq ipaddress itertools math
    operator re typing""".split()
)

# One way to do each thing: these are at home in the modules that are named, and nowhere else.
AT_HOME = {
    "sqlite3": {"storage"},
    "fcntl": {"storage"},
    "yaml": {"documents"},
    "tenacity": {"etcd", "flusher", "peer_port", "record_keeper"},
    "grpc": {"control", "cli", "etcd", "link", "peer_port", "v1", "etcdpb"},
    "grpc_health": {"control", "cli"},
    "google": {"v1", "etcdpb", "cli", "packet", "records"},
    "uvloop": {"agent"},
    "signal": {"agent", "cli"},
    "cryptography": {"certificates"},
    "asyncio": set(
        """agent cli cluster control etcd etcd_follower flusher library_log limits_follower link membership mirror node
        peer_port peers postfix presence record_keeper turns""".split()
    ),
    "threading": set(),
    "concurrent": {"storage"},
    "random": {"peers"},
    "requests": set(),
}

Import = tuple[str, int]
"""What is imported, and in which line."""


def imports(source: str) -> Iterator[Import]:
    """All imports, wherever they stand; of `from postmeter import logs` that is postmeter.logs."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if _is_module(whole) else str(node.module), node.lineno


def _is_module(name: str) -> bool:
    place = ROOT.parent / name.replace(".", "/")
    return place.is_dir() or place.with_suffix(".py").exists()


def part(module: str) -> str:
    """The name in the table: of postmeter.core.meters that is core, of postmeter itself ""."""
    return [*module.split("."), ""][1]


def layer(name: str) -> int:
    """The row of the table that it stands in, counted from the outside."""
    rows = [row for row, names in enumerate(LAYERS.values()) if name in names]
    assert len(rows) == 1, f"{name} must stand in one row of LAYERS"
    return rows[0]


def violations(module: str, source: str) -> list[str]:
    """What a module must not import."""
    own, found = part(module), []
    for imported, line in imports(source):
        top = imported.partition(".")[0]
        if top == "postmeter":
            if part(imported) != own and layer(part(imported)) <= layer(own):
                found.append(f"{module}:{line}: {imported} does not stand further inside")
        elif own not in AT_HOME.get(top, {own}):
            found.append(f"{module}:{line}: {top} is at home in {sorted(AT_HOME[top])}")
        elif own == "core" and top not in PURE:
            found.append(f"{module}:{line}: {top} is nothing for the core")
    return found


MODULES = {
    ".".join(["postmeter", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_inwards(module: str) -> None:
    """And the core is pure, and each library stays in its place."""
    assert [] == violations(module, MODULES[module].read_text())


def test_the_table_has_no_place_for_what_is_not_there() -> None:
    """Every name in it is a module or a package."""
    assert {part(module) for module in MODULES} == {name for names in LAYERS.values() for name in names}


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("postmeter.core.meters", "import time", ["time is nothing for the core"]),
        ("postmeter.core.meters", "def f():\n    from os.path import join", ["os is nothing for the core"]),
        ("postmeter.core.meters", "from postmeter import logs", ["postmeter.logs does not stand further inside"]),
        ("postmeter.core.meters", "from postmeter.node import Node", ["postmeter.node does not stand further inside"]),
        (
            "postmeter.storage",
            "from postmeter.flusher import Waiter",
            ["postmeter.flusher does not stand further inside"],
        ),
        ("postmeter.node", "import postmeter.postfix", ["postmeter.postfix does not stand further inside"]),
        ("postmeter.agent", "from postmeter.cli import main", ["postmeter.cli does not stand further inside"]),
        (
            "postmeter.errors",
            "from postmeter.core.limits import Key",
            ["postmeter.core.limits does not stand further inside"],
        ),
        ("postmeter.control", "import postmeter.postfix", ["postmeter.postfix does not stand further inside"]),
        ("postmeter.lint", "import yaml", ["yaml is at home in ['documents']"]),
        ("postmeter.cli.top", "from postmeter.node import Node\nimport grpc\nimport time", []),
        ("postmeter.core.meters", "import array\nfrom postmeter import defaults", []),
    ],
)
def test_the_test_can_fail(module: str, source: str, wrong: list[str]) -> None:
    """What it must find is found, wherever the import stands, and nothing else."""
    assert wrong == [violation.split(": ", 1)[1] for violation in violations(module, source)]
