r"""How answers look: tables, bars and JSON.

What a client of Postfix chose (a key) is never written as it is: characters that cannot be seen become \xNN, \uNNNN,
and so do bytes that are not UTF-8. In JSON such bytes are lone surrogates, as Python's `surrogateescape` makes them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from postmeter.core.answer import amount_text
from postmeter.core.limits import duration_text

if TYPE_CHECKING:
    from postmeter.v1 import control_pb2 as pb

_BLOCKS = " ▁▂▃▄▅▆▇█"
_ASCII_BLOCKS = " .:-=+*#@"

USAGE_COLUMNS = (">USED", ">MAX", ">LEFT")


def to_key(argument: str) -> bytes:
    """The bytes of a key that was given on the command line."""
    return argument.encode("utf-8", "surrogateescape")


def key_text(key: bytes) -> str:
    """A key for a terminal."""
    return visible(key.decode("utf-8", "surrogateescape"))


def visible(text: str) -> str:
    """The text with escapes for what cannot be seen; a backslash becomes two."""
    return "".join(char if char.isprintable() and char != "\\" else _escape(char) for char in text)


def _escape(char: str) -> str:
    if "\udc80" <= char <= "\udcff":
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()


def usage_cells(meter: pb.Meter) -> list[str]:
    """Cells for USAGE_COLUMNS."""
    if not meter.HasField("max"):
        return [amount_text(meter.count, meter.used), "unlimited", ""]
    if not meter.max:
        return [amount_text(meter.count, meter.used), "blocked", ""]
    return [amount_text(meter.count, amount) for amount in (meter.used, meter.max, meter.left)]


def window_text(meter: pb.Meter | pb.Ranking | pb.Forgotten) -> str:
    """The length of a window."""
    return duration_text(meter.window_ms)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines, the headings first. A column whose heading begins with > is aligned to the right."""
    lines = [[column.lstrip(">") for column in columns], *rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    aligns = [">" if column.startswith(">") else "<" for column in columns]
    return [
        "  ".join(f"{cell:{align}{width}}" for cell, align, width in zip(cells, aligns, widths, strict=True)).rstrip()
        for cells in lines
    ]


def bar(amounts: Sequence[int]) -> str:
    """One character for each amount, the largest one full, none empty but zero."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    blocks = _BLOCKS if utf8 else _ASCII_BLOCKS
    largest = max(amounts, default=0) or 1
    return "".join(blocks[-(-amount * (len(blocks) - 1) // largest)] for amount in amounts)


def print_json(value: object) -> None:
    """A message, or plain values, as one line of JSON. What is absent from a message is null."""
    print(json.dumps(value, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return {field.name: _field(value, field) for field in value.DESCRIPTOR.fields}


def _field(message: Any, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.is_repeated:
        return list(value)
    return value if not field.has_presence or message.HasField(field.name) else None
