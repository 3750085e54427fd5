"""The state directory: what is stored is whole, and is there again; what cannot be used is refused with the reason."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postmeter.core.meters import MetersId
from postmeter.defaults import FORGET_PARTS_MAX
from postmeter.errors import StorageError
from postmeter.storage import Flush, Moment, State, Storage, packed

USER = MetersId("per-user", "sasl_username", "recipients", 3_600_000)
DOMAIN = MetersId("per-domain", "sasl_domain", "bytes", 86_400_000)
MOMENT = Moment(ledger_ms=1_000, wall_ms=1_700_000_000_000, boot_id="boot", offset_ms=-7)

Rows = list[tuple[int, str, int]]


_rows: dict[str, int] = {}


def row(key: str) -> int:
    """A row for each key."""
    return _rows.setdefault(key, len(_rows) + 1)


def flush(
    *amounts: tuple[MetersId, int, list[tuple[str, int]]],
    clean: bool = False,
    resets: tuple[tuple[MetersId, int, str], ...] = (),
    retired: tuple[MetersId, ...] = (),
    oldest: tuple[tuple[MetersId, int], ...] = (),
) -> Flush:
    """What one transaction stores."""
    made = Flush(MOMENT, clean, [17], list(retired), oldest=list(oldest))
    made.amounts += [(id, slice, packed([row(key)], [0])) for id, slice, key in resets]
    for id, slice, stored in amounts:
        made.names.append((id.key, json.dumps({row(key): key for key, _ in stored})))
        made.amounts.append((id, slice, packed([row(key) for key, _ in stored], [amount for _, amount in stored])))
    return made


def rows(storage: Storage, id: MetersId = USER, oldest: int = 0) -> Rows:
    """All that is stored of some meters; nothing if there are none."""
    if id not in storage.load().meters:
        return []
    names = dict(storage.names(id.key))
    found = {(slice, names[row]): amount for slice, part in storage.amounts(id, oldest) for row, amount in part.items()}
    return sorted((slice, key, amount) for (slice, key), amount in found.items() if amount)


@contextmanager
def small_disk(directory: Path, size_kb: int = 512) -> Iterator[Path]:
    """A file system of its own that is soon full. Only root can have one."""
    if os.geteuid():
        pytest.skip("mounting a small file system needs root")
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_kb}k", "none", str(directory)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(directory: Path) -> Path:
    """Leave no byte free. Returns the file to remove."""
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (65_536, 1):
            try:
                while file.write(b"x" * size):
                    pass
            except OSError:
                continue
    return filler


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def storage(directory: Path) -> Iterator[Storage]:
    with closing(Storage(directory)) as made:
        yield made


def test_a_new_directory_is_clean_and_empty(directory: Path) -> None:
    """It is made, with its parents, and is nobody else's business; there is no moment to go on from."""
    umask = os.umask(0)
    try:
        with closing(Storage(directory / "deep")) as storage:
            assert State(None, True, [], []) == storage.load()
    finally:
        os.umask(umask)
    assert 0 == (directory / "deep").stat().st_mode & 0o027


@pytest.mark.parametrize("clean", [True, False])
def test_what_was_stored_is_there_again(directory: Path, clean: bool) -> None:
    """The moment, the mark of a clean stop, the tolls, and every amount of every meter, from the slice that counts."""
    with closing(Storage(directory)) as storage:
        storage.write(
            flush((USER, 5, [("alice", 3), ("bob", 1)]), (USER, 6, [("alice", 4)]), (DOMAIN, 5, [("x", 10**18)]))
        )
        storage.write(flush((USER, 6, [("alice", 9)]), clean=clean))
    with closing(Storage(directory)) as storage:
        assert State(MOMENT, clean, [17], [USER, DOMAIN]) == storage.load()
        assert [(5, "alice", 3), (5, "bob", 1), (6, "alice", 9)] == rows(storage)
        assert [(6, "alice", 9)] == rows(storage, oldest=6)
        assert [(5, "x", 10**18)] == rows(storage, DOMAIN)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    """One state directory for all examples of a property."""
    with closing(Storage(tmp_path_factory.mktemp("state"))) as made:
        yield made


any_bytes = st.binary(min_size=1, max_size=12).map(lambda key: key.decode("utf-8", "surrogateescape"))
any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@given(keys=st.lists(any_text | any_bytes.filter(lambda key: "\0" not in key), unique=True))
@settings(max_examples=150, deadline=None)
def test_keys_of_any_bytes_survive(kept: Storage, keys: list[str]) -> None:
    """Quotes, backslashes, emoji, and bytes that are not UTF-8 come back as they were, and can be reset."""
    kept.write(flush((USER, 1, [(key, number) for number, key in enumerate(keys, 1)]), retired=(USER,)))
    assert [(1, key, number) for number, key in enumerate(keys, 1)] == sorted(rows(kept), key=lambda row: row[2])
    kept.write(flush(resets=tuple((USER, 1, key) for key in keys[::2])))
    assert set(keys[1::2]) == {key for _, key, _ in rows(kept)}


def test_an_amount_that_is_zero_is_not_loaded(storage: Storage) -> None:
    """What was taken back is no usage."""
    storage.write(flush((USER, 1, [("alice", 3), ("bob", 2)])))
    storage.write(flush((USER, 1, [("alice", 0)])))
    assert [(1, "bob", 2)] == rows(storage)


def test_a_reset_comes_before_what_is_charged_after_it(storage: Storage) -> None:
    """All slices of the key are forgotten, no other key is, and the same flush may hold what the key used since."""
    storage.write(flush((USER, 1, [("alice", 3), ("bob", 2)]), (USER, 2, [("alice", 4)]), (DOMAIN, 1, [("alice", 9)])))
    storage.write(flush((USER, 2, [("alice", 1)]), resets=((USER, 1, "alice"), (USER, 2, "alice"))))
    assert [(1, "bob", 2), (2, "alice", 1)] == rows(storage)
    assert [(1, "alice", 9)] == rows(storage, DOMAIN)


def test_retired_meters_are_gone(directory: Path) -> None:
    """Their amounts, too; and if the limit comes back later it begins with nothing."""
    with closing(Storage(directory)) as storage:
        storage.write(flush((USER, 1, [("alice", 3)]), (DOMAIN, 1, [("x", 5)])))
        storage.write(flush(retired=(USER, USER._replace(window_ms=1))))
        assert [DOMAIN] == storage.load().meters
    with closing(Storage(directory)) as storage:
        assert [DOMAIN] == storage.load().meters
        storage.write(flush((USER, 9, [("bob", 1)])))
        assert [(9, "bob", 1)] == rows(storage)
        assert [(1, "x", 5)] == rows(storage, DOMAIN)


def test_expired_rows_are_deleted_in_portions(storage: Storage) -> None:
    """A large slice that runs out holds no flush up: each deletes a portion, over all meters, until nothing is left."""
    many = [(USER, 1, [(f"user{number}", 1)]) for number in range(2 * FORGET_PARTS_MAX + 10)]
    storage.write(flush(*many, (USER, 3, [("alice", 1)])))
    storage.write(flush((DOMAIN, 1, [("x", 1)])))
    left = []
    for _ in range(4):
        storage.write(flush(oldest=((USER, 2), (DOMAIN, 2))))
        left.append(len(rows(storage)) + len(rows(storage, DOMAIN)))
    assert [2 + 10 + FORGET_PARTS_MAX, 2 + 10, 1, 1] == left
    assert [(3, "alice", 1)] == rows(storage)


# --- one agent at a time ----------------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from postmeter.storage import Storage
storage = Storage(Path(sys.argv[1]))
print("holding", flush=True)
sys.stdin.read()
"""

WRITE = """
import json
import sys
from itertools import count
from pathlib import Path
from postmeter.core.meters import MetersId
from postmeter.storage import Flush, Moment, Storage, packed
storage = Storage(Path(sys.argv[1]))
ids = [MetersId(f"limit{place}", "sasl_username", "recipients", 3_600_000) for place in range(5)]
for number in count(1):
    names = [("sasl_username", json.dumps({place: f"user{place}" for place in range(1, 201)}))]
    amounts = [(id, 1, packed(list(range(1, 201)), [number] * 200)) for id in ids]
    storage.write(Flush(Moment(number, 0, "boot", 0), False, [], names=names, amounts=amounts))
    print(number, flush=True)
"""


@contextmanager
def another_process(code: str, directory: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that runs this code, until the end of the `with`."""
    command = [sys.executable, "-c", code, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    """The next line that it prints."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_second_agent_is_refused(directory: Path) -> None:
    """It is told which process has the directory, and what to do; when that is killed, the directory is free."""
    with another_process(HOLD, directory) as process:
        assert "holding" == line(process)
        with pytest.raises(StorageError, match=rf"another agent \(process {process.pid}\) .* state_dir of its own"):
            Storage(directory)
        process.kill()
        process.wait()
        Storage(directory).close()


def test_a_killed_writer_leaves_whole_flushes(directory: Path) -> None:
    """After kill -9 in the middle of writing: the last flush that was answered is there, and no part of another."""
    for _ in range(3):
        with another_process(WRITE, directory) as process:
            for _ in range(5):
                answered = int(line(process))
            process.send_signal(signal.SIGKILL)
            process.wait()
        with closing(Storage(directory)) as storage:
            state = storage.load()
            found = {amount for id in state.meters for _, _, amount in rows(storage, id)}
            assert state.moment is not None
            assert {state.moment.ledger_ms} == found
            assert state.moment.ledger_ms >= answered
            assert 1_000 == sum(len(rows(storage, id)) for id in state.meters)
            storage.write(flush(retired=tuple(state.meters)))


# --- what cannot be used ----------------------------------------------------------------------------------------------


def test_state_of_another_version_is_refused(directory: Path) -> None:
    """An older agent does not touch what a newer one wrote, and says which versions these are."""
    Storage(directory).close()
    with closing(sqlite3.connect(directory / "state.sqlite")) as db:
        db.execute("PRAGMA user_version = 7")
    with pytest.raises(StorageError, match="the state is of version 7, this agent reads version 2; run the version"):
        Storage(directory)
    with closing(sqlite3.connect(directory / "state.sqlite")) as db:
        assert (7,) == db.execute("PRAGMA user_version").fetchone()
        db.execute("PRAGMA user_version = 1")
    Storage(directory).close()


@pytest.mark.parametrize("name", ["state.sqlite", "lock"])
def test_a_directory_that_cannot_be_used_is_named(directory: Path, name: str) -> None:
    """Something else in the place of its files; afterwards it is not locked by the one who was refused."""
    (directory / name).mkdir(parents=True)
    with pytest.raises(StorageError, match=f"^{directory}: cannot use the state directory: "):
        Storage(directory)
    (directory / name).rmdir()
    Storage(directory).close()


def test_a_file_in_the_place_of_the_directory(directory: Path) -> None:
    """It is named, and left alone."""
    directory.write_text("mine")
    with pytest.raises(StorageError, match=f"^{directory}: cannot use the state directory: .*File exists"):
        Storage(directory)
    assert "mine" == directory.read_text()


def test_a_database_that_is_none(directory: Path) -> None:
    """Overwritten, or emptied by hand: a StorageError, not a crash."""
    Storage(directory).close()
    (directory / "state.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(StorageError, match="file is not a database"):
        Storage(directory)
    (directory / "state.sqlite").unlink()
    with closing(sqlite3.connect(directory / "state.sqlite")) as db:
        db.execute("PRAGMA user_version = 1")
    with pytest.raises(StorageError, match="no such table: meters"):
        Storage(directory)


def test_a_write_that_fails_half_way_stores_nothing(directory: Path, storage: Storage) -> None:
    """Neither amounts nor meters of it; and the next one finds everything as it was."""
    storage.write(flush((USER, 1, [("alice", 3)])))
    with closing(sqlite3.connect(directory / "state.sqlite")) as db:
        db.execute(
            "CREATE TRIGGER broken BEFORE INSERT ON usage WHEN hex(NEW.amounts) LIKE '%9401000000000000%'"
            " BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
    with pytest.raises(StorageError, match=f"^{directory}: cannot write: no$"):
        storage.write(flush((DOMAIN, 1, [("x", 5), ("broken", 404)]), clean=True, retired=(USER,)))
    assert State(MOMENT, False, [17], [USER]) == storage.load()
    assert [(1, "alice", 3)] == rows(storage)
    storage.write(flush((DOMAIN, 1, [("x", 6)]), (USER, 2, [("alice", 1)])))
    assert [(1, "x", 6)] == rows(storage, DOMAIN)
    assert [(1, "alice", 3), (2, "alice", 1)] == rows(storage)


def test_a_full_disk(tmp_path: Path) -> None:
    """With no space left a write raises StorageError and stores nothing; with space again it stores all."""
    many = [(f"user{number}@example.com", 1) for number in range(1000)]
    with small_disk(tmp_path / "disk") as disk:
        with closing(Storage(disk / "state")) as storage:
            storage.write(flush((USER, 1, [("alice", 3)])))
            filler = fill(disk)
            for _ in range(2):
                with pytest.raises(StorageError, match=rf"^{disk}/state: cannot write: .*(full|space|I/O)"):
                    storage.write(flush((USER, 1, [("alice", 4)]), (DOMAIN, 1, many), clean=True))
            assert [(1, "alice", 3)] == rows(storage)
            assert ([USER], False) == (storage.load().meters, storage.load().clean)
            filler.unlink()
            storage.write(flush((USER, 1, [("alice", 4)]), (DOMAIN, 1, many)))
        with closing(Storage(disk / "state")) as storage:
            assert [(1, "alice", 4)] == rows(storage)
            assert sorted((1, key, amount) for key, amount in many) == rows(storage, DOMAIN)


def test_a_full_disk_at_the_start(tmp_path: Path) -> None:
    """The agent cannot begin without a place for its state, and is told why."""
    with small_disk(tmp_path / "disk") as disk:
        filler = fill(disk)
        with pytest.raises(StorageError, match=r"cannot use the state directory: .*(full|space|I/O)"):
            Storage(disk / "state")
        filler.unlink()
        Storage(disk / "state").close()
