"""`postmeter limits` and `postmeter override`: what they print, what they put, and that nobody's change is lost."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from postmeter import etcd
from postmeter.cli import main
from postmeter.cli.store import Store
from postmeter.etcd import Entry

from .server import EtcdServer

USER = "key: sasl_username\ncount: recipients\nmax: {1h: 200, 24h: 1000}\n"
DOMAIN = "key: sasl_domain\ncount: recipients\nmax: 2000\nper: 1h\n"
FILE = """\
limits:
  per-user:
    key: sasl_username
    count: recipients
    max: {1h: 200, 24h: 1000}
  per-domain: {key: sasl_domain, count: recipients, max: 2000, per: 1h}
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(server: EtcdServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command: its exit status, output, and what it complains of."""
    monkeypatch.setenv("SUDO_USER", "kim")

    def command(*words: str, input: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(input.encode())))
        try:
            status = main([*words, "--etcd", server.endpoint])
        except SystemExit as ended:
            status = int(ended.code or 0)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return command


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Write a file of two limits."""
    path = tmp_path / "limits.yaml"
    path.write_text(FILE)
    return path


def value(server: EtcdServer, key: str) -> str:
    """What is under a key."""
    return server.etcdctl("get", "--print-value-only", "/postmeter/" + key).removesuffix("\n")


# --- limits -----------------------------------------------------------------------------------------------------------


def test_all_limits_of_a_file(run: Run, server: EtcdServer, file: Path) -> None:
    """Are put with who and why, once; a comparison says so before and after."""
    assert (1, "per-domain: only in the file\nper-user: only in the file\n", "") == run("limits", "diff", str(file))
    assert (0, "put: per-user\nput: per-domain\n", "") == run("limits", "put", "--all", str(file), "--note", "spring")
    assert f"{USER}note: spring\nauthor: kim\n" == value(server, "limits/per-user")
    assert f"{DOMAIN}note: spring\nauthor: kim\n" == value(server, "limits/per-domain")
    assert (0, "unchanged: per-user\nunchanged: per-domain\n", "") == run("limits", "put", "--all", str(file))
    assert (0, "no differences\n", "") == run("limits", "diff", str(file))
    table = """\
LIMIT       KEY            MAX                                             OVERRIDES  REVISION  AUTHOR  NOTE
per-domain  sasl_domain    2000 recipients per 1h                                  0         3  kim     spring
per-user    sasl_username  200 recipients per 1h, 1000 recipients per 24h          0         2  kim     spring
"""
    assert (0, table, "") == run("limits", "list")


def test_one_limit_is_shown_changed_and_put_again(run: Run, server: EtcdServer, file: Path) -> None:
    """Only if nobody has changed it since, if that is asked for."""
    assert (0, "put: per-user\n", "") == run("limits", "put", "per-user", str(file), "--revision", "0")
    status, text, _ = run("limits", "show", "per-user")
    assert (0, f"# limit per-user, revision 2\n{USER}author: kim\n") == (status, text)
    changed = text.replace("200", "300")
    assert (0, "put: per-user\n", "") == run("limits", "put", "per-user", "-", "--revision", "2", input=changed)
    status, _, error = run("limits", "put", "per-user", "-", "--revision", "2", input=text)
    assert (3, "postmeter: per-user is at revision 3: somebody has changed it; look at it, and do it again\n") == (
        status,
        error,
    )
    difference = """\
per-domain: only in the file
--- etcd/per-user
+++ file/per-user
-max: {1h: 300, 24h: 1000}
+max: {1h: 200, 24h: 1000}
"""
    assert (1, difference, "") == run("limits", "diff", str(file))
    assert (0, "put: per-user\n", "") == run("limits", "put", "per-user", "-", "--author", "pat", input=USER)
    assert f"{USER}author: pat\n" == value(server, "limits/per-user")


def test_a_change_at_the_same_time_is_not_lost(run: Run, server: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes second is told, whatever it is about to do."""
    server.put("limits/per-user", USER)
    server.put("overrides/per-user/a", "blocked")
    get = Store.get

    async def late(store: Store, key: str) -> Entry | None:
        entry = await get(store, key)
        server.put(key, "blocked" if key.startswith("overrides") else USER.replace("200", "100"))
        return entry

    monkeypatch.setattr(Store, "get", late)
    again = "somebody else has changed it at the same time; look at it, and do it again\n"
    mine = USER.replace("200", "300")
    assert (3, "", f"postmeter: limits/per-user: {again}") == run("limits", "put", "per-user", "-", input=mine)
    assert (3, "", f"postmeter: limits/per-user: {again}") == run("limits", "rm", "per-user")
    assert USER.replace("200", "100") == value(server, "limits/per-user")
    assert (3, "", f"postmeter: overrides/per-user/a: {again}") == run("override", "put", "per-user", "a", "unlimited")
    assert (3, "", f"postmeter: overrides/per-user/a: {again}") == run("override", "rm", "per-user", "a")
    assert "blocked" == value(server, "overrides/per-user/a")


def test_wrong_limits_are_not_put(run: Run, server: EtcdServer, file: Path) -> None:
    """With the line of each problem; of several, none is put if one is wrong."""
    file.write_text(FILE.replace("max: 2000", "max: 2ooo"))
    problem = '"2ooo" is not a number; write a number such as 200, or {1h: 200, 24h: 1000}'
    assert (2, "", f"postmeter: {file}:6: limits.per-domain.max: {problem}\n") == run(
        "limits", "put", "--all", str(file)
    )
    missing = "postmeter: standard input:1: max is missing; write max: {1h: 200, 24h: 1000}\n"
    assert (2, "", missing) == run("limits", "put", "x", "-", input="{key: sender, count: messages}")
    wrong = f"postmeter: {file}: has no limit x; it has per-user, per-domain\n"
    assert (2, "", wrong) == run("limits", "put", "x", str(file))
    usage = "postmeter: name one limit, with or without --revision, or all of a file with --all\n"
    assert (2, "", usage) == run("limits", "put", str(file))
    assert (2, "", usage) == run("limits", "put", "--all", "--revision", "1", str(file))
    large = f"{USER}overrides: {{{', '.join(f'u{number}: blocked' for number in range(5_000))}}}"
    advice = "put its overrides with `postmeter override put`"
    assert (2, "", f"postmeter: x: has more than 65536 bytes; {advice}\n") == run(
        "limits", "put", "x", "-", input=large
    )
    assert "" == server.etcdctl("get", "--prefix", "/postmeter/")


def test_what_others_put_is_shown_as_it_is(run: Run, server: EtcdServer) -> None:
    """With what the agents find wrong with it."""
    server.put("limits/per-user", USER)
    server.put("limits/bad", "{key: sasl_username, count: recipients, max: \x1b[1m}")
    server.put("overrides/per-user/a", "many")
    server.put("overrides/ghost/b", "1")
    status, text, error = run("limits", "list")
    assert (1, ["LIMIT", "per-user"]) == (status, [line.split()[0] for line in text.splitlines()])
    assert [
        "postmeter: overrides/ghost/: there is no limit ghost, for which 1 overrides wait",
        'postmeter: limits/bad: contains the control character "\\\\x1b"; remove it',
        "postmeter: overrides/per-user/a: "
        '"many" is not a number; write a number such as 200, or {1h: 200, 24h: 1000}, or unlimited, or blocked',
    ] == error.splitlines()
    status, text, _ = run("limits", "list", "--json")
    listed = json.loads(text)
    assert [("per-user", USER)] == [(limit["name"], limit["text"]) for limit in listed["limits"]]
    assert 3 == len(listed["problems"])
    status, text, error = run("limits", "show", "bad")
    assert (1, "{key: sasl_username, count: recipients, max: \\x1b[1m}") == (status, text.splitlines()[1])
    assert "postmeter: bad: contains the control character" in error


def test_lint_finds_what_never_binds(run: Run, server: EtcdServer) -> None:
    """As in a file."""
    server.put("limits/per-user", USER)
    assert (0, "nothing found\n", "") == run("limits", "lint", "--no-postfix")
    server.put("limits/per-user", USER.replace("24h: 1000", "24h: 9000"))
    status, text, _ = run("limits", "lint", "--no-postfix")
    assert (1, True) == (status, text.startswith("warning: per-user: 9000 per 24h is never reached"))
    status, text, _ = run("limits", "lint", "--no-postfix", "--json")
    assert (1, ["warning"]) == (status, [each["severity"] for each in json.loads(text)["findings"]])


def test_deleting_a_limit(run: Run, server: EtcdServer) -> None:
    """Leaves its overrides; what is not there cannot be shown or deleted."""
    server.put("limits/per-user", USER)
    server.put("overrides/per-user/a", "blocked")
    assert (0, "deleted: per-user; its overrides stay: 1\n", "") == run("limits", "rm", "per-user")
    unknown = "postmeter: there is no limit per-user; `postmeter limits list` shows all\n"
    assert (1, "", unknown) == run("limits", "rm", "per-user")
    assert (1, "", unknown) == run("limits", "show", "per-user")
    assert (0, "there are no limits\n") == (
        run("limits", "put", "per-user", "-", input=USER)[0],
        "there are no limits\n",
    )


def test_a_limit_that_does_not_fit_its_overrides(run: Run, server: EtcdServer) -> None:
    """Is put, and that is said."""
    server.put("overrides/per-user/a", "{24h: 5}")
    shorter = USER.replace(", 24h: 1000", "")
    warning = "postmeter: per-user: refused overrides: 1; `postmeter override list per-user` shows which\n"
    assert (0, "put: per-user\n", warning) == run("limits", "put", "per-user", "-", input=shorter)


# --- overrides --------------------------------------------------------------------------------------------------------


def test_overrides_are_put_listed_and_deleted(run: Run, server: EtcdServer) -> None:
    """As requests are counted, with who, why, and until when."""
    server.put("limits/per-user", USER)
    launch = ("--until", "2027-01-31", "--note", "the läunch")
    assert (0, "put: per-user / alice@example.com: 500 per 1h\n", "") == run(
        "override", "put", "per-user", "Alice@Example.com", "{1h: 500}", *launch
    )
    text = '{"max": {"1h": 500}, "until": "2027-01-31", "note": "the läunch", "author": "kim"}'
    assert text == value(server, "overrides/per-user/alice@example.com")
    assert (0, "put: per-user / bob: blocked\n", "") == run("override", "put", "per-user", "bob", "blocked")
    assert 0 == run("override", "put", "per-user", "cy", "{max: unlimited, until: 2020-01-01, note: n}")[0]
    table = """\
LIMIT     KEY                MAX         UNTIL                             AUTHOR  NOTE
per-user  alice@example.com  500 per 1h  2027-02-01 00:00 UTC              kim     the läunch
per-user  bob                blocked                                       kim
per-user  cy                 unlimited   2020-01-02 00:00 UTC (has ended)  kim     n
"""
    assert (0, table, "") == run("override", "list")
    status, text, _ = run("override", "list", "per-user", "bob", "--json")
    assert (0, ["bob"]) == (status, [each["key"] for each in json.loads(text)["overrides"]])
    assert (0, "deleted: per-user / alice@example.com\n", "") == run("override", "rm", "per-user", "ALICE@example.com")
    gone = "postmeter: per-user has no override for ALICE@example.com\n"
    assert (1, "", gone) == run("override", "rm", "per-user", "ALICE@example.com")


def test_wrong_overrides_are_not_put(run: Run, server: EtcdServer) -> None:
    """And what would be right is said."""
    server.put("limits/per-user", USER)
    server.put("limits/bad", "x")
    several = "postmeter: max: is one number for a limit of several windows; write {1h: 10, 24h: 10}\n"
    assert (2, "", several) == run("override", "put", "per-user", "a", "10")
    for name in ("ghost", "bad"):
        unknown = f"postmeter: there is no limit {name}, or it is refused; `postmeter limits list` shows all\n"
        assert (2, "", unknown) == run("override", "put", name, "a", "10")
    assert 2 == run("override", "put", "per-user", "a", "blocked", "--until", "tomorrow")[0]
    assert 2 == run("override", "put", "per-user", "", "blocked")[0]
    assert (1, "", "postmeter: there are none\n") == run("override", "list")


def test_overrides_that_are_refused_can_be_seen_and_deleted(run: Run, server: EtcdServer) -> None:
    """By the name that they have in etcd."""
    server.put("limits/per-user", USER)
    server.put("overrides/per-user/Bob", "blocked")
    server.put("overrides/ghost/a", "1")
    status, _, error = run("override", "list")
    assert (1, 2) == (status, len(error.splitlines()))
    assert 'per-user / Bob: "Bob" is not spelled as requests are counted; put it as overrides/per-user/bob' in error
    assert (0, "deleted: per-user / Bob\n", "") == run("override", "rm", "per-user", "Bob")
    assert (0, "deleted: ghost / a\n", "") == run("override", "rm", "ghost", "a")


# --- etcd -------------------------------------------------------------------------------------------------------------


def test_etcd_comes_from_the_settings(server: EtcdServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With prefix and all; without any, what to do is said."""
    settings = tmp_path / "postmeter.yaml"
    settings.write_text(f"etcd: {{endpoints: {server.endpoint}, prefix: /mail/}}")
    server.etcdctl("put", "/mail/limits/x", USER)
    assert 0 == main(["limits", "show", "x", "--settings", str(settings)])
    assert f"# limit x, revision 2\n{USER}" == capsys.readouterr().out
    settings.write_text("")
    assert 2 == main(["limits", "list", "--settings", str(settings)])
    advice = "write it there, name other settings with --settings, or an endpoint with --etcd"
    expected = f"postmeter: {settings} has no etcd, or this user may not read it; {advice}\n"
    assert expected == capsys.readouterr().err
    assert 2 == main(["limits", "list", "--settings", str(settings), "--etcd", "https://a:1"])
    assert "needs etcd.ca in the settings" in capsys.readouterr().err
    assert 2 == main(["limits", "list", "--etcd", "a"])
    assert "is no endpoint of etcd" in capsys.readouterr().err


def test_an_etcd_that_is_away(run: Run, server: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 3, with the reason."""
    monkeypatch.setattr(etcd, "ETCD_PATIENCE_S", 0.2)
    server.kill()
    assert (3, "", f"postmeter: etcd does not answer: {server.endpoint}: Connection refused\n") == run("limits", "list")
