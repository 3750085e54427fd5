"""The log: one line per event, in words that can be searched for, whatever a client sent."""

from __future__ import annotations

import io
import json
import logging
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postmeter import logs
from postmeter.defaults import OUTAGE_LOG_S
from postmeter.settings import LogFormat, LogLevel

HOSTILE = [
    "alice@example.com\nrefused key=bob",
    "\r\x1b[31m\x00\x7f\x85",
    "a\u2028b\u2029c",
    "\udcff\udc80",
    'key="x" y=z',
    "back\\slash",
    "\u202egnp.exe",
    "",
    " ",
]


class Log:
    """What was logged so far."""

    def __init__(self) -> None:
        self.stream = io.StringIO()

    @property
    def lines(self) -> list[str]:
        """Without the time."""
        return [re.sub(r"^\d{4}-\S+ ", "", line) for line in self.stream.getvalue().split("\n")[:-1]]

    def of(self, event: str) -> list[str]:
        """The lines of one event."""
        return [line for line in self.lines if re.search(rf"^\w+ {event}( |$)", line)]


@contextmanager
def logged(level: LogLevel = "info", format: LogFormat = "text") -> Iterator[Log]:
    """Log as the agent does, into a `Log`."""
    log, logger = Log(), logging.getLogger("postmeter")
    before = logger.handlers, logger.propagate, logger.level
    with redirect_stderr(log.stream):
        logs.set_up(level, format)
    try:
        yield log
    finally:
        logger.handlers, logger.propagate = before[:2]
        logger.setLevel(before[2])


@pytest.fixture(autouse=True)
def outside_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests, lines begin with the time."""
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)


def test_a_line_is_time_level_event_and_fields() -> None:
    """As logfmt writes them; a field that is None is left out, one that is empty is not."""
    with logged() as log:
        logs.event(logging.WARNING, "refused", key="alice@example.com", used=20, queue_id=None, sender="", text="a b")
    [line] = log.stream.getvalue().splitlines()
    time, rest = line.split(" ", 1)
    assert datetime.fromisoformat(time).tzinfo is not None
    assert 'warning refused key=alice@example.com used=20 sender="" text="a b"' == rest


def test_json_lines() -> None:
    """The same, as one JSON object in a line."""
    with logged(format="json") as log:
        logs.event(logging.ERROR, "storage fails", reason="disk full", left=0, missing=None)
    [line] = log.stream.getvalue().splitlines()
    read = json.loads(line)
    datetime.fromisoformat(read.pop("time"))
    assert {"level": "error", "event": "storage fails", "reason": "disk full", "left": 0} == read


def test_in_the_journal_a_line_has_its_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service manager takes `<4>` off and keeps it as the priority; it has the time already."""
    monkeypatch.setenv("JOURNAL_STREAM", "8:12345")
    with logged("debug") as log:
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            logs.event(level, "said")
    assert ["<7>said", "<6>said", "<4>said", "<3>said"] == log.lines


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_levels(level: LogLevel) -> None:
    """From the level that was asked for on; and who wants to make an expensive line can ask first."""
    levels = ["debug", "info", "warning", "error"]
    with logged(level) as log:
        for name in levels:
            logs.event(getattr(logging, name.upper()), "said")
        assert (level == "debug") == logs.is_asked(logging.DEBUG)
    assert [f"{name} said" for name in levels[levels.index(level) :]] == log.lines


def test_the_log_is_not_written_twice() -> None:
    """Setting it up again replaces what was set up before."""
    with logged() as log, redirect_stderr(log.stream):
        logs.set_up("info", "text")
        logs.event(logging.INFO, "said")
    assert ["info said"] == log.lines


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("format", ["text", "json"])
def test_hostile_values_are_escaped(value: str, format: LogFormat) -> None:
    """No line break of any kind, no control character, nothing that is not UTF-8; in JSON it is the value again."""
    with logged(format=format) as log:
        logs.event(logging.WARNING, "refused", key=value, after="x")
    [line] = log.stream.getvalue().splitlines()
    assert line.isprintable()
    assert line.encode("utf-8")
    if format == "json":
        assert value == json.loads(line)["key"]
    else:
        [key] = re.findall(" key=(.*) after=x$", line)
        assert value == (json.loads(key) if key.startswith('"') else key)


@given(st.dictionaries(st.from_regex("[a-z_]{1,8}", fullmatch=True), st.text(), max_size=5))
def test_no_value_pretends_to_be_another_field(fields: dict[str, str]) -> None:
    """A line can be taken apart again: as many words as there were fields, each with its name."""
    with logged() as log:
        logs.event(logging.INFO, "said", **fields)
    [line] = log.lines
    words = re.findall(r' ([a-z_]+)=("(?:[^"\\]|\\.)*"|[^ "]*)', line)
    assert "info said" + "".join(f" {name}={value}" for name, value in words) == line
    assert list(fields) == [name for name, _ in words]
    assert list(fields.values()) == [json.loads(text) if text.startswith('"') else text for _, text in words]


@pytest.mark.parametrize(
    "key", ["alice@example.com", "jürgen@exämple.com", "2001:db8::/64", "alice,example.com", "o'neil"]
)
@pytest.mark.parametrize("format", ["text", "json"])
def test_a_line_is_found_by_its_key(key: str, format: LogFormat) -> None:
    """`grep KEY` finds it: a key that can be printed is written as it is."""
    with logged(format=format) as log:
        logs.event(logging.WARNING, "refused", key=key)
    assert key in log.stream.getvalue()


def test_a_bug_is_one_line_with_its_traceback() -> None:
    """Also the traceback is escaped, so that it stays with its event."""
    with logged() as log:
        try:
            raise RuntimeError("broken\nin two")
        except RuntimeError as error:
            logs.failure("no decision", error)
    [line] = log.lines
    assert line.startswith('error no decision traceback="Traceback (most recent call last):\\n')
    assert line.endswith('RuntimeError: broken\\nin two"')
    assert 4 == len(shlex.split(line))


def test_an_outage_is_told_when_it_begins_and_when_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is tried in between; what lasts is told again after a while, with the reason of then."""
    now_s = 1_000.0
    monkeypatch.setattr("postmeter.logs.time.monotonic", lambda: now_s)
    reasons: list[str] = []
    outage = logs.Outage("it", reasons.append)
    with logged() as log:
        outage.over()
        for reason in ("a", "a", "b"):
            outage.failed(reason)
        now_s += OUTAGE_LOG_S
        outage.failed("c")
        outage.over()
        outage.over()
        outage.failed("d")
    assert ["", "a", "b", "c", "", "d"] == reasons
    assert [
        "warning it fails reason=a",
        "warning it fails reason=c",
        f"info it works again lasted={OUTAGE_LOG_S:.1f}s reason=c",
        "warning it fails reason=d",
    ] == log.lines
