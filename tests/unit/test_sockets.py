"""Listening sockets: who may connect, and from when; what was left there; what cannot be listened on."""

from __future__ import annotations

import grp
import os
import pwd
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from postmeter.errors import ConfigError
from postmeter.settings import Listener
from postmeter.sockets import bind

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away, or be somebody else")


@contextmanager
def nobody() -> Iterator[None]:
    """Be a user without rights."""
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


def connects(path: Path) -> bool:
    """Whether somebody answers there."""
    with closing(socket.socket(socket.AF_UNIX)) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
    return True


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "policy.sock"


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory for everybody, which pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="postmeter-") as directory:
        Path(directory).chmod(0o777)
        yield Path(directory)


@as_root
def test_owner_group_and_mode(path: Path) -> None:
    """As the listener says: what a chrooted smtpd needs in the queue directory's private/."""
    user, group = pwd.getpwuid(NOBODY).pw_name, grp.getgrgid(1).gr_name
    with closing(bind(Listener(path=path, owner=user, group=group, mode=0o606))):
        found = path.stat()
        assert (NOBODY, 1, 0o606) == (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode))
        assert stat.S_ISSOCK(found.st_mode)


@pytest.mark.parametrize("umask", [0, 0o077])
def test_the_mode_does_not_depend_on_the_umask(path: Path, umask: int) -> None:
    """Neither more nor less than what was asked for."""
    before = os.umask(umask)
    try:
        with closing(bind(Listener(path=path))):
            assert 0o660 == stat.S_IMODE(path.stat().st_mode)
    finally:
        os.umask(before)


@as_root
def test_nobody_connects_before_the_socket_has_its_owner_and_mode(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It listens only when it has them, and under its name it is never seen without."""
    listen, replace, seen = socket.socket.listen, os.replace, []
    wanted = (NOBODY, 0o600)

    def owner_and_mode(of: Path) -> tuple[int, int]:
        return of.stat().st_uid, stat.S_IMODE(of.stat().st_mode)

    def watched_listen(self: socket.socket, *backlog: int) -> None:
        draft = Path(self.getsockname())
        assert not connects(draft)
        assert not path.exists()
        seen.append(owner_and_mode(draft))
        listen(self, *backlog)

    def watched_replace(draft: Path, place: Path) -> None:
        assert connects(draft)
        seen.append(owner_and_mode(draft))
        replace(draft, place)

    monkeypatch.setattr(socket.socket, "listen", watched_listen)
    monkeypatch.setattr(os, "replace", watched_replace)
    with closing(bind(Listener(path=path, owner=pwd.getpwuid(NOBODY).pw_name, mode=0o600))):
        assert [wanted, wanted] == seen
        assert connects(path)
        assert [path] == list(path.parent.iterdir())


@as_root
def test_who_may_connect(public: Path) -> None:
    """The mode is what decides: another user is kept out by 0660, and let in by 0666."""
    path = public / "policy.sock"
    for mode, wanted in ((0o660, False), (0o666, True)):
        with closing(bind(Listener(path=path, mode=mode))), nobody():
            assert wanted == connects(path)


def test_a_stale_socket_is_replaced(path: Path) -> None:
    """An agent that was killed leaves its socket file behind; the next one takes its place."""
    bind(Listener(path=path)).close()
    assert path.is_socket()
    assert not connects(path)
    with closing(bind(Listener(path=path))):
        assert connects(path)
        assert [path] == list(path.parent.iterdir())


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_socket_is_left_alone(path: Path, kind: str) -> None:
    """A slip of the pen in the settings does not cost the operator a file."""
    if kind == "directory":
        path.mkdir()
    elif kind == "file":
        path.write_text("precious")
    else:
        path.with_name("target").write_text("precious")
        path.symlink_to(path.with_name("target"))
    before = sorted(path.parent.iterdir())
    with pytest.raises(
        ConfigError, match=f"^cannot listen on unix:{path}: something is there that is no socket; remove it, or"
    ):
        bind(Listener(path=path))
    assert before == sorted(path.parent.iterdir())
    assert kind == "directory" or path.read_text() == "precious"


def test_a_missing_directory(tmp_path: Path) -> None:
    """Nobody makes the queue directory but Postfix."""
    path = tmp_path / "absent" / "policy.sock"
    with pytest.raises(ConfigError, match=f"^cannot listen on unix:{path}: No such file or directory; make its dir"):
        bind(Listener(path=path))


@as_root
def test_a_directory_of_others(tmp_path: Path) -> None:
    """The agent's user must be allowed to write there."""
    with nobody(), pytest.raises(ConfigError, match="Permission denied; run the agent as a user who may, or choose"):
        bind(Listener(path=tmp_path / "policy.sock"))


@as_root
def test_a_socket_that_cannot_be_given_away(public: Path) -> None:
    """Only root can; and what was begun is removed."""
    with nobody(), pytest.raises(ConfigError, match="Operation not permitted; run the agent as a user who may"):
        bind(Listener(path=public / "policy.sock", owner="root"))
    assert [] == list(public.iterdir())


@pytest.mark.parametrize(("host", "text"), [("127.0.0.1", "inet:127.0.0.1"), ("::1", r"inet:\[::1\]")])
def test_an_inet_socket(host: str, text: str) -> None:
    """Bound to its address; taken, it says by whom that can be found out; free again, it can be taken at once."""
    with closing(bind(Listener(host, 0))) as sock:
        port = sock.getsockname()[1]
        sock.listen()
        with pytest.raises(ConfigError, match=rf"^cannot listen on {text}:{port}: Address already in use; stop what"):
            bind(Listener(host, port))
        client = socket.create_connection((host, port))
        server, _ = sock.accept()
        server.close()
        client.close()
    with closing(bind(Listener(host, port))) as sock:
        assert (host, port) == sock.getsockname()[:2]


def test_ipv6_does_not_take_ipv4_with_it() -> None:
    """Both can be listened on side by side."""
    with closing(bind(Listener("::", 0))) as six, closing(bind(Listener("0.0.0.0", six.getsockname()[1]))):
        pass


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "no-such-host.invalid"])
def test_an_address_that_is_not_here(host: str) -> None:
    """It is named."""
    with pytest.raises(ConfigError, match=r"^cannot listen on inet:.*; .*choose another address"):
        bind(Listener(host, 10040))
