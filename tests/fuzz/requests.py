"""requests - what is sent to the agent in order to break it, and what it must make of it.

NAME
    Fuzzer - makes requests out of those in corpus/: as they are, with other values, or damaged
    expect - what must come back for some bytes

DESCRIPTION
    The corpus has a file for each kind of request: those of Postfix, by version and stage, and those of somebody who
    is no Postfix, or who puts into an address what does not belong there.

    A Fuzzer with the same seed makes the same requests. It invents a new sender most of the time, so that everything
    that is kept by key has to be forgotten again.

    `expect` knows the protocol from the same dumb twin that the parser is tested with.
"""

from __future__ import annotations

import random
from enum import Enum
from pathlib import Path

from tests.unit.test_request import dumb_parse

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.request"))
END = b"\n\n"
# Larger ones are sent by themselves: while a reply waits for the disk, the agent keeps no more than one request.
BATCH_BYTES_MAX = 16_384

_STAGES = ("RCPT", "DATA", "END-OF-MESSAGE")
_NAMES = (
    b"request",
    b"sasl_username",
    b"sender",
    b"recipient",
    b"client_address",
    b"instance",
    b"protocol_state",
    b"size",
)
_TOKENS = (
    *(
        b"\n",
        b"\n\n",
        b"\r\n",
        b"=",
        b"==",
        b"\0",
        b"\xff",
        b"\xed\xa0\x80",
        b"\xc3",
        b"\x1b[0m",
        b"\\",
        b'"',
        b"{key}",
        b"%",
    ),
    *(
        b"request=smtpd_access_policy\n",
        b"action=OK\n\n",
        b"\nprotocol_state=END-OF-MESSAGE\n",
        b"\nsasl_username=",
        b"@",
    ),
    *(
        "\u2028".encode(),
        "\u202e".encode(),
        "İ".encode(),
        b"-1",
        b"9" * 19,
        b"A" * 300,
        b" ",
        b"\t",
        b",",
        b"/64",
        b"::",
    ),
)


class Outcome(Enum):
    """What must follow a request."""

    REPLY = "one reply"
    CLOSE = "no reply, and the end of the connection"
    EITHER = "one of both: a number is none, and it depends on the limits whether it is read"


def expect(data: bytes) -> tuple[list[Outcome], bytes]:
    """What must follow each whole request in these bytes, up to the first that may end it all; and the bytes so far."""
    outcomes: list[Outcome] = []
    start = 0
    while (end := data.find(END, start)) >= 0 and (not outcomes or outcomes[-1] is Outcome.REPLY):
        outcomes.append(_outcome(data[start : end + 2]))
        start = end + 2
    return outcomes, data[:start]


def _outcome(request: bytes) -> Outcome:
    found = dumb_parse(request)
    if found is None:
        return Outcome.CLOSE
    numbers = (found.get("recipient_count", ""), found.get("size", ""))
    if found.get("protocol_state") not in _STAGES or all(map(_is_number, numbers)):
        return Outcome.REPLY
    return Outcome.EITHER


def _is_number(text: str) -> bool:
    return not text or (len(text) <= 18 and all("0" <= char <= "9" for char in text))


class Fuzzer:
    """Makes requests, always the same ones for a seed."""

    def __init__(self, seed: int) -> None:
        self._choice = random.Random(seed)
        self._corpus = [path.read_bytes() for path in CORPUS]
        self._sound = [data for data in self._corpus if expect(data) == ([Outcome.REPLY], data) and len(data) < 2000]
        self._usual = [path.read_bytes() for path in CORPUS if path.stem.startswith("postfix-3.7-")]

    def batch(self, requests_max: int) -> tuple[list[Outcome], bytes]:
        """Some requests to be sent together, and what must follow: replies, and at the end perhaps something else."""
        outcomes, data = expect(self.request())
        while outcomes[-1] is Outcome.REPLY and len(outcomes) < requests_max:
            more_outcomes, more = expect(self.request())
            if len(data) + len(more) > BATCH_BYTES_MAX:
                break
            outcomes += more_outcomes
            data += more
        return outcomes, data

    def request(self) -> bytes:
        """One request, or what a hostile client takes for one."""
        what = self._choice.random()
        if what < 0.02:
            return self._choice.choice(self._corpus)
        data = self._invent(self._choice.choice(self._usual if self._choice.random() < 0.6 else self._sound))
        if what < 0.75:
            return data
        if what < 0.76:
            return self._choice.randbytes(self._choice.randrange(2_000)) + END
        for _ in range(self._choice.randrange(1, 4)):
            data = self._damage(data)
        return data if data.endswith(END) else data + END

    def _invent(self, data: bytes) -> bytes:
        """Another sender, on another client, with another message."""
        choice = self._choice
        number = choice.randrange(10**9)
        user = f"u{number}@d{number % 300}.test".encode()
        recipients = choice.choice((0, 1, 1, 1, 2, 7, 15, 500))
        instance = number % (10**9 if number % 10 == 0 else 500)
        values = {
            b"sasl_username": user if choice.random() < 0.8 else None,
            b"sender": user if choice.random() < 0.5 else None,
            b"client_address": f"10.{number % 7}.{number % 251}.{number % 241}".encode(),
            b"recipient_count": str(recipients).encode() if choice.random() < 0.5 else None,
            b"instance": f"i{instance}".encode() if choice.random() < 0.03 else b"",
        }
        lines = []
        for line in data[:-2].split(b"\n"):
            name = line.partition(b"=")[0]
            value = values.get(name)
            lines.append(line if value is None else name + b"=" + value)
        return b"\n".join(lines) + END

    def _damage(self, data: bytes) -> bytes:
        choice = self._choice
        at = choice.randrange(len(data) + 1)
        end = min(len(data), at + choice.choice((1, 1, 2, 10, 100)))
        lines = data.split(b"\n")
        line = choice.randrange(len(lines))
        match choice.randrange(9):
            case 0:
                return data[:at] + bytes([choice.randrange(256)]) + data[at + 1 :]
            case 1:
                return data[:at] + choice.choice(_TOKENS) + data[at:]
            case 2:
                return data[:at] + data[end:]
            case 3:
                return data[:end] + data[at:]
            case 4:
                lines.insert(choice.randrange(len(lines)), lines[line])
            case 5:
                del lines[line]
            case 6:
                lines[line] += choice.choice(_TOKENS) * choice.choice((1, 1, 3, 50))
            case 7:
                lines.insert(line, choice.choice(_NAMES) + b"=" + choice.choice(_TOKENS))
            case _:
                choice.shuffle(lines)
        return b"\n".join(lines)
