"""The state directory: usage in SQLite, one agent at a time, and what is needed to go on after a stop of any kind.

    DIR/lock           held (flock) while an agent runs
    DIR/state.sqlite   usage by meters, slice and row; the keys of the rows; the clock; whether the last stop was clean;
                       in a cluster who this node is, its records of rights, and where it stands in the roster
    DIR/limits.yaml    the last good limits, for a start while the limits file is wrong
    DIR/etcd-limits.jsonl   the last good limits of etcd, for a start while etcd is away

Usage is a log: a flush appends what has changed, in portions with the sums of a slice by row, and the last word
on a row holds. That costs little however many keys there are, and the interpreter is free meanwhile. When a
slice has been written several times over, the caller has it replaced as a whole.

Keys may hold bytes that are not UTF-8; they are kept as lone surrogates, encoded as three bytes each.

Every error of the file system or of SQLite becomes a StorageError that names the directory.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from postmeter.core.identity import Identity
from postmeter.core.meters import MetersId
from postmeter.defaults import FORGET_PARTS_MAX
from postmeter.errors import StorageError

_VERSION = 2
_RECORDS = "CREATE TABLE IF NOT EXISTS records (place TEXT PRIMARY KEY, record BLOB NOT NULL) WITHOUT ROWID;"
_SCHEMA = f"""
CREATE TABLE node (name TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
CREATE TABLE meters (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, key TEXT NOT NULL, count TEXT NOT NULL, window_ms INTEGER NOT NULL,
    UNIQUE (name, key, count, window_ms));
CREATE TABLE keys (kind TEXT NOT NULL, row INTEGER NOT NULL, name TEXT, PRIMARY KEY (kind, row)) WITHOUT ROWID;
CREATE TABLE usage (id INTEGER PRIMARY KEY, meters INTEGER NOT NULL, slice INTEGER NOT NULL, amounts BLOB NOT NULL);
CREATE INDEX usage_by_slice ON usage (meters, slice);
{_RECORDS}
PRAGMA user_version = {_VERSION};
"""
_NAME = """
WITH parts AS MATERIALIZED (
    SELECT json_extract(value, '$[0]') AS kind, json_extract(value, '$[1]') AS names FROM json_each(?))
INSERT OR REPLACE INTO keys (kind, row, name)
SELECT kind, key, atom FROM parts, json_each(names)
"""
_FORGET = """
DELETE FROM usage WHERE id IN (SELECT id FROM usage WHERE meters = ? AND slice < ? LIMIT ?)
"""


@dataclass(frozen=True, slots=True)
class Moment:
    """A moment of the ledger's clock (ms) and the same moment of the wall clock (ms since 1970) in one boot."""

    ledger_ms: int
    wall_ms: int
    boot_id: str
    offset_ms: int


@dataclass(slots=True)
class Flush:
    """What one transaction stores: amounts (meters, slice, `packed` rows), and before that what is forgotten.

    `names` are (kind of key, JSON of row -> key) of rows that belong to another key than before, or to none.
    What was stored of a slice in `replaced` is forgotten; `oldest` are the oldest slices that still count; `retired`
    meters are forgotten as a whole. `alive_ms` is now if the node is confirmed in the roster, else None.
    """

    moment: Moment
    clean: bool
    tolls_ms: list[int]
    retired: list[MetersId] = field(default_factory=list)
    names: list[tuple[str, str]] = field(default_factory=list)
    replaced: list[tuple[MetersId, int]] = field(default_factory=list)
    amounts: list[tuple[MetersId, int, bytes]] = field(default_factory=list)
    oldest: list[tuple[MetersId, int]] = field(default_factory=list)
    alive_ms: int | None = None


@dataclass(frozen=True, slots=True)
class State:
    """What an earlier run left. `moment` is None in a new directory, `identity` where it was in no cluster.

    `alive_ms` is when it was last known to run while it was confirmed in the roster.
    """

    moment: Moment | None
    clean: bool
    tolls_ms: list[int]
    meters: list[MetersId]
    identity: Identity | None = None
    alive_ms: int = 0


class Storage:
    """The state directory of this agent, locked. While several write, all do so in `thread`, one after the other."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.thread = ThreadPoolExecutor(1, "storage")
        self._forgotten: dict[int, int] = {}
        with self._errors("cannot use the state directory"), ExitStack() as undo:
            directory.mkdir(parents=True, exist_ok=True, mode=0o750)
            self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
            undo.callback(os.close, self._lock)
            self._take_lock()
            self._db = sqlite3.connect(directory / "state.sqlite", isolation_level=None, check_same_thread=False)
            undo.callback(self._db.close)
            self._prepare()
            self._ids = self._stored_ids()
            undo.pop_all()

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._lock, 20, 0).decode("ascii", "replace").strip()
            raise StorageError(
                f"{self.directory}: another agent (process {owner or 'unknown'}) uses this state directory;"
                " stop it, or give this one a state_dir of its own"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, str(os.getpid()).encode(), 0)

    def _prepare(self) -> None:
        self._db.text_factory = _text
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            self._db.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
        elif version == 1:
            self._db.executescript(f"BEGIN; {_RECORDS} PRAGMA user_version = {_VERSION}; COMMIT;")
        elif version != _VERSION:
            raise StorageError(
                f"{self.directory}: the state is of version {version}, this agent reads version {_VERSION};"
                " run the version of Postmeter that wrote it, or move the directory away and start with empty meters"
            )

    def load(self) -> State:
        """What an earlier run left, without the amounts."""
        with self._errors("cannot read"):
            node = dict(self._db.execute("SELECT name, value FROM node"))
        if "ledger_ms" not in node:
            return State(None, True, [], [])
        moment = Moment(node["ledger_ms"], node["wall_ms"], node["boot_id"], node["offset_ms"])
        identity = None
        if "incarnation" in node:
            identity = Identity(node["node"], node["incarnation"], moment.ledger_ms, node["machine"], node["directory"])
        tolls_ms = json.loads(node.get("tolls_ms", "[]"))
        return State(
            moment, bool(node.get("clean", True)), tolls_ms, list(self._ids), identity, node.get("alive_ms", 0)
        )

    def names(self, kind: str) -> Iterator[tuple[int, str]]:
        """(row, key) of a kind of key."""
        with self._errors("cannot read"):
            yield from self._db.execute("SELECT row, name FROM keys WHERE kind = ? AND name IS NOT NULL", (kind,))

    def amounts(self, id: MetersId, oldest: int) -> Iterator[tuple[int, dict[int, int]]]:
        """(slice, row -> amount) of some meters, from slice `oldest` on; the last word on a row holds."""
        query = "SELECT slice, amounts FROM usage WHERE meters = ? AND slice >= ? ORDER BY id"
        with self._errors("cannot read"):
            for slice, amounts in self._db.execute(query, (self._ids[id], oldest)):
                yield slice, _unpacked(amounts)

    def records(self) -> Iterator[tuple[str, bytes]]:
        """(place, record) of the records of rights."""
        with self._errors("cannot read"):
            yield from self._db.execute("SELECT place, record FROM records")

    def begin(self, identity: Identity, moment: Moment, anew: bool) -> None:
        """Begin a run as a node; `anew`: without the records of an earlier one. Raises StorageError."""
        with self._transaction():
            self._set(
                moment,
                node=identity.node,
                incarnation=identity.incarnation,
                machine=identity.machine,
                directory=identity.directory,
            )
            if anew:
                self._db.execute("DELETE FROM records")

    def write_records(
        self, puts: Iterable[tuple[str, bytes | None]], moment: Moment, alive_ms: int | None = None
    ) -> None:
        """Store records (None: forget), and make sure that they are on the disk. Raises StorageError."""
        with self._transaction():
            self._set(moment, alive_ms=alive_ms)
            for place, record in puts:
                if record is None:
                    self._db.execute("DELETE FROM records WHERE place = ?", (place,))
                else:
                    self._db.execute("INSERT OR REPLACE INTO records (place, record) VALUES (?, ?)", (place, record))

    def write(self, flush: Flush) -> None:
        """Store a flush as a whole, and make sure that it is on the disk. Raises StorageError."""
        with self._transaction():
            self._write(flush)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors("cannot write"):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                self._ids = self._stored_ids()
                raise

    def _set(self, moment: Moment, **values: str | int | None) -> None:
        values |= {
            "ledger_ms": moment.ledger_ms,
            "wall_ms": moment.wall_ms,
            "boot_id": moment.boot_id,
            "offset_ms": moment.offset_ms,
        }
        given = json.dumps({name: value for name, value in values.items() if value is not None})
        self._db.execute("INSERT OR REPLACE INTO node SELECT key, atom FROM json_each(?)", (given,))

    def _write(self, flush: Flush) -> None:
        run = self._db.execute
        self._set(flush.moment, clean=int(flush.clean), tolls_ms=json.dumps(flush.tolls_ms), alive_ms=flush.alive_ms)
        for id in flush.retired:
            number = self._ids.pop(id, None)
            run("DELETE FROM usage WHERE meters = ?", (number,))
            run("DELETE FROM meters WHERE id = ?", (number,))
        if flush.names:
            names = (f"[{json.dumps(kind)}, {rows}]" for kind, rows in flush.names)
            run(_NAME, (f"[{','.join(names)}]",))
        for id, slice in flush.replaced:
            run("DELETE FROM usage WHERE meters = ? AND slice = ?", (self._number(id), slice))
        for id, slice, amounts in flush.amounts:
            run("INSERT INTO usage (meters, slice, amounts) VALUES (?, ?, ?)", (self._number(id), slice, amounts))
        self._forget(flush.oldest)

    def _forget(self, oldest: Sequence[tuple[MetersId, int]]) -> None:
        left = FORGET_PARTS_MAX
        for id, slice in oldest:
            number = self._number(id)
            if left > 0 and self._forgotten.get(number) != slice:
                gone = self._db.execute(_FORGET, (number, slice, left)).rowcount
                if gone < left:
                    self._forgotten[number] = slice
                left -= gone

    def _stored_ids(self) -> dict[MetersId, int]:
        return {MetersId(*row[1:]): row[0] for row in self._db.execute("SELECT * FROM meters")}

    def _number(self, id: MetersId) -> int:
        number = self._ids.get(id)
        if number is None:
            row = self._db.execute(
                "INSERT INTO meters (name, key, count, window_ms) VALUES (?, ?, ?, ?) RETURNING id", id
            ).fetchone()
            number = self._ids[id] = int(row[0])
        return number

    def close(self) -> None:
        """Release the directory."""
        self.thread.shutdown()
        self._db.close()
        os.close(self._lock)

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise StorageError(f"{self.directory}: {what}: {error}") from error


def packed(rows: list[int], amounts: list[int]) -> bytes:
    """Rows and their amounts as `Flush` takes them: 8 bytes each, all rows first, in this machine's byte order."""
    return array("q", rows + amounts).tobytes()


def _unpacked(data: bytes) -> dict[int, int]:
    numbers = array("q", data)
    return dict(zip(numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :], strict=True))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")
