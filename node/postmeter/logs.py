"""One log line per event, on standard error, in words that can be searched for.

    text    NAME key=value key="a value"    (logfmt; under systemd with a priority, elsewhere with the time)
    json    {"time": ..., "level": ..., "event": ..., "key": ...}

Values from outside are escaped: no control character, no line break, nothing that is not UTF-8.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from datetime import datetime
from typing import Literal, TextIO

from postmeter.defaults import OUTAGE_LOG_S

_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}

_log = logging.getLogger("postmeter")


def event(level: int, name: str, /, **fields: object) -> None:
    """Log an event at a level of `logging`. Fields that are None are left out."""
    if _log.isEnabledFor(level):
        _log.log(level, name, extra={"fields": {key: value for key, value in fields.items() if value is not None}})


def failure(name: str, error: BaseException) -> None:
    """Log a bug with its traceback, in one line."""
    _log.error(name, exc_info=error, extra={"fields": {}})


def is_asked(level: int) -> bool:
    """Whether lines of this level are written at all."""
    return _log.isEnabledFor(level)


def set_up(level: str, format: Literal["text", "json"]) -> None:
    """Write to standard error from this level on: debug, info, warning or error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if format == "json" else _Text())
    _log.handlers = [handler]
    _log.propagate = False
    _log.setLevel(level.upper())


def write_to(stream: TextIO) -> None:
    """Write there from now on."""
    for handler in _log.handlers:
        assert isinstance(handler, logging.StreamHandler)
        handler.setStream(stream)


class Outage:
    """What fails for a while: one line when it begins, one when it is over, and in between one every OUTAGE_LOG_S.

    `on_change` is called with the reason whenever that changes, and with "" when all is well, also for the first time.
    """

    def __init__(self, name: str, on_change: Callable[[str], None]) -> None:
        self.reason: str | None = None
        self._name = name
        self._on_change = on_change
        self._began_s = 0.0
        self._logged_s = 0.0

    def failed(self, reason: str) -> None:
        """It fails, or still does."""
        now_s = time.monotonic()
        if not self.reason:
            self._began_s = now_s
        if not self.reason or now_s - self._logged_s >= OUTAGE_LOG_S:
            self._logged_s = now_s
            event(logging.WARNING, f"{self._name} fails", reason=reason)
        if reason != self.reason:
            self.reason = reason
            self._on_change(reason)

    def over(self) -> None:
        """It works, or still does."""
        if self.reason:
            lasted = f"{time.monotonic() - self._began_s:.1f}s"
            event(logging.INFO, f"{self._name} works again", lasted=lasted, reason=self.reason)
        if self.reason != "":
            self.reason = ""
            self._on_change("")


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__()
        self._in_journal = "JOURNAL_STREAM" in os.environ

    def format(self, record: logging.LogRecord) -> str:
        words = [record.getMessage(), *(f"{key}={_quoted(value)}" for key, value in _fields(record).items())]
        if self._in_journal:
            return f"<{_PRIORITIES.get(record.levelno, 6)}>" + " ".join(words)
        time = datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")
        return " ".join([time, record.levelname.lower(), *words])


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname.lower(), "event": record.getMessage(), **_fields(record)}
        # A key that can be printed is found by grep as it is.
        text = json.dumps(line, default=str, ensure_ascii=False)
        return text if text.isprintable() else json.dumps(line, default=str)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    fields: dict[str, object] = getattr(record, "fields", {})
    if record.exc_info:
        return {**fields, "traceback": logging.Formatter().formatException(record.exc_info)}
    return fields


def _quoted(value: object) -> str:
    text = str(value)
    if text and text.isprintable() and not any(char in ' "=\\' for char in text):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())
