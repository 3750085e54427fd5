"""What the gRPC library writes to standard error, as log events: above all why it refused a connection.

    follow()        in the event loop, after `logs.set_up`

The library verifies certificates by itself, tells nobody, and writes a line in a form of its own:

    I1122 16:57:24.789313   31451 ssl_transport_security.cc:2563] Handshake failed with error SSL_ERROR_SSL: ...

From then on descriptor 2 is a pipe that is read here; Python and the log write to where it led before. The same text is
logged once a minute. Lines of other forms pass as they are. If the process is killed by the library, its last line may
be lost, and Python's traceback tells where that was.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import re
import sys
from functools import cache
from typing import TextIO

from postmeter import logs
from postmeter.defaults import LIBRARY_LINE_REPEAT_S, LIBRARY_LINES_MAX, LIBRARY_READ_BYTES

_LINE = re.compile(r"[IWEF][0-9]{4} [0-9:.]+ +[0-9]+ (?P<place>\S+:[0-9]+)\] (?P<text>.*)")
_HANDSHAKE = re.compile("Handshake failed with .*OPENSSL_internal:(?P<name>[A-Z0-9_]+)(: (?P<detail>.*))?")


def follow() -> None:
    """Turn the library's lines into log events, as long as this event loop runs."""
    reading, lines = _divert()
    asyncio.get_running_loop().add_reader(reading, lambda: lines.add(os.read(reading, LIBRARY_READ_BYTES)))


@cache
def _divert() -> tuple[int, _Lines]:
    """Where to read what is written to descriptor 2, and what takes it; the process has only one."""
    stream = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    sys.stderr = stream
    logs.write_to(stream)
    faulthandler.enable(stream)
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    os.dup2(writing, 2)
    os.close(writing)
    return reading, _Lines(stream)


class _Lines:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._begun = b""
        self._logged: dict[str, float] = {}

    def add(self, data: bytes) -> None:
        """Some bytes that were written."""
        *lines, self._begun = (self._begun + data).split(b"\n")
        self._begun = self._begun[-LIBRARY_READ_BYTES:]
        for line in lines:
            self._log(line.decode(errors="backslashreplace"))

    def _log(self, line: str) -> None:
        match = _LINE.fullmatch(line)
        if match is None:
            print(line, file=self._stream)
            return
        now_s = asyncio.get_running_loop().time()
        if now_s < self._logged.get(match["text"], now_s):
            return
        if len(self._logged) >= LIBRARY_LINES_MAX:
            self._logged.clear()
        self._logged[match["text"]] = now_s + LIBRARY_LINE_REPEAT_S
        handshake = _HANDSHAKE.fullmatch(match["text"])
        if handshake is None:
            logs.event(logging.WARNING, "gRPC says", text=match["text"], place=match["place"])
            return
        name, detail = handshake["name"], handshake["detail"]
        reason = detail if name == "CERTIFICATE_VERIFY_FAILED" else name.lower().replace("_", " ")
        logs.event(logging.WARNING, "TLS handshake failed", reason=reason)
