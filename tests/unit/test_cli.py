"""The command line: what it prints, its exit codes, and that it never shows a traceback."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from postmeter import __version__
from postmeter.cli import ask, client, command, main, make_parser
from postmeter.errors import AgentError
from postmeter.settings import Settings
from tests.unit.nodes import LIMITS, RunningNode, running_node
from tests.unit.support import message

Captured = pytest.CaptureFixture[str]

COMMANDS = ("agent", "lint", "health", "ask", "show", "top", "reset", "reload", "certs", "limits", "override")
ASKING = (("health",), ("ask", "sasl_username=x"), ("show", "x"), ("top",), ("reset", "x"), ("reload",))


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningNode]:
    """A node whose admin socket is the default one."""
    with running_node(tmp_path) as running:
        monkeypatch.setenv("POSTMETER_SOCKET", str(running.socket))
        yield running


def start(*words: str, **environ: str) -> subprocess.Popen[str]:
    """The command as a process of its own, which SIGINT ends though the tests may run in the background."""
    heed = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    script = f"import signal, sys; {heed}; from postmeter.cli import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", script, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environ},
    )


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_a_small_manual_page(name: str, capsys: Captured) -> None:
    """The help of every command describes it, and has examples and exit codes."""
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    text = capsys.readouterr().out
    assert 0 == ended.value.code
    description, examples = text.split("\n\n")[1], text.partition("\nexamples:\n")[2]
    assert len(description) > 80
    assert f"      postmeter {name}" in examples
    assert "\nexit codes:\n  0  " in examples
    assert "\n  2  " in examples
    assert "--json" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_can_be_parsed(name: str, capsys: Captured) -> None:
    """What the help shows as an example is a command line that is taken."""
    with pytest.raises(SystemExit):
        main([name, "--help"])
    examples = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("      postmeter ")]
    for example in examples:
        for part in example.split(" | ")[0].split(" && "):
            make_parser().parse_args(shlex.split(part)[1:])


def test_help_lists_all_commands_and_exit_codes(capsys: Captured) -> None:
    """`postmeter --help` is where to begin."""
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n    {name}" in text for name in COMMANDS)
    assert all(f"\n  {status} " in text for status in (0, 1, 2, 3, 70, 130, 141))


def test_version(capsys: Captured) -> None:
    """`--version` says which one it is."""
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert (0, f"postmeter {__version__}\n") == (ended.value.code, capsys.readouterr().out)


@pytest.mark.parametrize(
    "words", [[], ["nothing"], ["ask", "--nothing"], ["show"], ["top", "-n", "0"], ["top", "-n", "x"]]
)
def test_usage_errors(words: list[str], capsys: Captured) -> None:
    """A wrong command line ends with exit code 2 and a usage."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert 2 == ended.value.code
    assert "usage: postmeter" in capsys.readouterr().err


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "inf", "x", "1e9"])
def test_watch_interval_is_a_sensible_number(interval: str) -> None:
    """Neither a busy loop nor for ever."""
    with pytest.raises(SystemExit) as ended:
        main(["top", f"--watch={interval}"])
    assert 2 == ended.value.code


@pytest.mark.parametrize("words", [["--help"], ["lint", "limits.yaml"], ["show", "x", "--socket", "nothing"]])
def test_grpc_is_not_waited_for(tmp_path: Path, words: list[str]) -> None:
    """Without an agent to talk to gRPC is not even imported."""
    (tmp_path / "limits.yaml").write_text(LIMITS)
    script = (
        "import sys\nfrom postmeter.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "sys.exit('grpc' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, *words], cwd=tmp_path, check=True, capture_output=True)


# --- ask --------------------------------------------------------------------------------------------------------------


def test_ask_prints_the_action(node: RunningNode, capsys: Captured) -> None:
    """0 and DUNNO if the mail would pass; 1 and the refusal if not. What is missing is filled in."""
    assert 0 == main(["ask", "sasl_username=alice@example.com"])
    assert "DUNNO\n" == capsys.readouterr().out
    node.charge(recipient_count=20)
    assert 1 == main(["ask", "sasl_username=alice@example.com"])
    assert capsys.readouterr().out.startswith(
        "450 4.7.1 per-user: alice@example.com has used 20 of 20 recipients per 1h"
    )


def test_ask_explains(node: RunningNode, capsys: Captured) -> None:
    """One row for each window of the limits that apply, one line for each of the others."""
    node.charge(recipient_count=19)
    words = ["sasl_username=alice@example.com", "recipient_count=2", "size=1000000", "client_address=10.0.0.1"]
    assert 1 == main(["ask", "--explain", *words])
    action, empty, heading, *rows = capsys.readouterr().out.splitlines()
    assert ("450", "") == (action.split()[0], empty)
    assert ["LIMIT", "PER", "KEY", "COSTS", "USED", "MAX", "LEFT", "ACCEPTED"] == heading.split()
    assert ["per-user", "1h", "alice@example.com", "2", "19", "20", "1", "in"] == rows[0].split()[:8]
    assert ["per-user", "24h", "alice@example.com", "2", "19", "100", "81", "now"] == rows[1].split()
    assert rows[3].endswith("now (in shadow: only logged)")
    assert rows[4].startswith("bytes: does not apply: does not match: client_address is '10.0.0.1'")


def test_ask_reads_a_file(node: RunningNode, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file, or standard input, in the form of the protocol; attributes of the command line take its place."""
    (tmp_path / "request").write_bytes(message(recipient_count=21))
    assert 1 == main(["ask", "--file", str(tmp_path / "request")])
    assert 0 == main(["ask", "--file", str(tmp_path / "request"), "recipient_count=1"])
    with (tmp_path / "request").open("rb") as file:
        piped = os.dup(0)
        os.dup2(file.fileno(), 0)
        try:
            assert 1 == main(["ask", "--file", "-"])
        finally:
            os.dup2(piped, 0)
            os.close(piped)
    assert ["550", "DUNNO", "550"] == [line.split()[0] for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "say what to ask about"),
        (["alice@example.com"], "is not name=value"),
        (["--file", "/nonexistent"], "/nonexistent: cannot be read (No such file or directory)"),
        (["--file", "/dev/zero"], "this is no policy request"),
        (["request=other"], "this is no policy request of Postfix"),
        (["sasl_username=x", "recipient_count=many", "client_address=192.0.2.1"], "is not a number"),
    ],
)
def test_ask_refuses_what_is_no_request(node: RunningNode, capsys: Captured, words: list[str], said: str) -> None:
    """2, and what is wrong with it."""
    assert 2 == main(["ask", *words])
    assert said in capsys.readouterr().err


def test_ask_notes_names_that_postfix_does_not_send(node: RunningNode, capsys: Captured) -> None:
    """A misspelt attribute is pointed out, with the name that is likely meant."""
    assert 0 == main(["ask", "sasl_usrname=alice@example.com"])
    assert "no attribute called sasl_usrname; did you mean sasl_username?" in capsys.readouterr().err


def test_ask_notes_that_the_agent_does_not_serve(node: RunningNode, capsys: Captured) -> None:
    """The action is of no use while the agent cannot store what it counts."""
    node.set_health("storage", "the disk is full")
    assert 0 == main(["ask", "sasl_username=alice@example.com"])
    assert "the agent does not serve now: storage: the disk is full" in capsys.readouterr().err


# --- health -----------------------------------------------------------------------------------------------------------


def test_health_says_what_is_wrong(node: RunningNode, capsys: Captured) -> None:
    """0 and one word while the agent serves; else 1 and the reasons."""
    assert 0 == main(["health"])
    assert "serving\n" == capsys.readouterr().out
    node.set_health("storage", "the disk is full")
    assert 1 == main(["health"])
    assert "not serving\nstorage: the disk is full\n" == capsys.readouterr().out
    assert 1 == main(["health", "--json"])
    assert {"serving": False, "troubles": ["storage: the disk is full"]} == json.loads(capsys.readouterr().out)


def test_health_waits_until_it_serves(node: RunningNode, capsys: Captured) -> None:
    """With --wait it ends when the agent serves, or when the time is over."""
    node.set_health("storage", "the disk is full")
    assert 1 == main(["health", "--wait", "0.05"])
    capsys.readouterr()
    healing = threading.Timer(0.1, node.set_health, ("storage", ""))
    healing.start()
    assert 0 == main(["health", "--wait", "60"])
    healing.join()
    assert "serving\n" == capsys.readouterr().out


# --- show, top, reset, reload -----------------------------------------------------------------------------------------


def test_show_prints_usage_and_bars(node: RunningNode, capsys: Captured) -> None:
    """Each window has a row, and below it a bar whose right end is now."""
    node.charge(recipient_count=3)
    assert 0 == main(["show", "alice@example.com"])
    heading, hour, bar, *_ = capsys.readouterr().out.splitlines()
    assert ["LIMIT", "PER", "KEY", "COUNTS", "USED", "MAX", "LEFT"] == heading.split()
    assert ["per-user", "1h", "alice@example.com", "recipients", "3", "20", "17"] == hour.split()
    assert bar.startswith("  1h ago |")
    assert bar.rstrip("| now")[-1] == "█"


def test_show_prints_unlimited_and_blocked(node: RunningNode, capsys: Captured) -> None:
    """Overrides are shown in words."""
    assert 0 == main(["show", "boss@example.com"])
    assert 0 == main(["show", "evil@example.com"])
    text = capsys.readouterr().out
    assert "unlimited" in text
    assert "blocked" in text


def test_show_of_an_unknown_key(node: RunningNode, capsys: Captured) -> None:
    """1, and the keys that are like it."""
    node.charge()
    assert 1 == main(["show", "alcie@example.com"])
    assert [
        "",
        "postmeter: no limit counts alcie@example.com at present\npostmeter: there are: alice@example.com\n",
    ] == [*capsys.readouterr()]


def test_what_clients_chose_is_escaped(node: RunningNode, capsys: Captured) -> None:
    """Control characters and bytes that are not UTF-8 do not reach a terminal; JSON carries them."""
    key = "e\udcffv\x1b[31mil\u202e@x\\y.example"
    node.charge(sasl_username=key)
    assert 0 == main(["show", key])
    assert 0 == main(["top", "per-user"])
    assert 1 == main(["show", key + "x"])
    shown = capsys.readouterr()
    assert all(char.isprintable() or char == "\n" for char in shown.out + shown.err)
    assert 5 == shown.out.count(r"e\xffv\x1b[31mil\u202e@x\\y.example")
    assert 0 == main(["show", "--json", key])
    assert {key} == {usage["meter"]["key"] for usage in json.loads(capsys.readouterr().out)["usages"]}


def test_top_prints_each_window(node: RunningNode, capsys: Captured) -> None:
    """The largest first, as many as asked for."""
    for number in (1, 2, 3):
        node.charge(sasl_username=f"user{number}@example.net", recipient_count=5 * number)
    assert 0 == main(["top", "per-user", "-n", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert "per-user: recipients per 1h" == lines[0]
    assert ["USED", "MAX", "LEFT", "OF", "MAX", "KEY"] == lines[1].split()
    assert ["15", "20", "5", "75", "%", "user3@example.net"] == lines[2].split()
    assert ["10", "20", "10", "50", "%", "user2@example.net"] == lines[3].split()
    assert ["", "per-user: recipients per 24h"] == lines[4:6]


def test_top_of_all_limits(node: RunningNode, capsys: Captured) -> None:
    """Without a limit the first few of all of them; nobody is said to be nobody."""
    assert 0 == main(["top"])
    text = capsys.readouterr().out
    assert 5 == text.count("nobody has used any")
    assert "bytes: bytes per 1h" in text


def test_top_of_an_unknown_limit(node: RunningNode, capsys: Captured) -> None:
    """2, and the limits that there are."""
    assert 2 == main(["top", "per-usr"])
    assert "there are per-user, per-domain, per-client, bytes" in capsys.readouterr().err


def test_top_watches_until_interrupted(node: RunningNode) -> None:
    """It draws again and again, and Ctrl-C ends it cleanly."""
    node.charge()
    watching = start("top", "--watch", "0.1", "--json")
    assert watching.stdout is not None
    drawn = [json.loads(watching.stdout.readline()) for _ in range(3)]
    watching.send_signal(signal.SIGINT)
    _, errors = watching.communicate(timeout=30)
    assert (0, "") == (watching.returncode, errors)
    assert all("per-user" == each["rankings"][0]["limit"] for each in drawn)


def test_reset_says_what_was_forgotten(node: RunningNode, capsys: Captured) -> None:
    """0 and what it was; a second time 1, for there is nothing more."""
    node.charge(recipient_count=20)
    assert 0 == main(["reset", "alice@example.com", "--limit", "per-user"])
    assert (
        "forgotten: 20 recipients of alice@example.com on per-user per 1h\n"
        "forgotten: 20 recipients of alice@example.com on per-user per 24h\n"
    ) == capsys.readouterr().out
    assert 1 == main(["reset", "alice@example.com", "--limit", "per-user"])
    assert "postmeter: no limit counts alice@example.com" in capsys.readouterr().err


def test_reload_says_what_is_in_force(node: RunningNode, capsys: Captured) -> None:
    """0 if the file is good; else 2, all problems with their lines, and that the last good limits stay."""
    assert 0 == main(["reload"])
    assert "limits in force: 4\n" == capsys.readouterr().out
    node.limits_file.write_text("limits:\n  a: {key: x}\n  b: {max: y}\n")
    assert 2 == main(["reload"])
    text = capsys.readouterr().err
    assert f"{node.limits_file}:2: limits.a" in text
    assert f"{node.limits_file}:3: limits.b" in text
    assert text.endswith("the last good limits stay in force: 4\n")


@pytest.mark.parametrize("words", ASKING)
def test_json_is_one_line(node: RunningNode, capsys: Captured, words: tuple[str, ...]) -> None:
    """--json prints one line of JSON and nothing else, with the exit code of the table."""
    assert main(list(words)) == main([*words, "--json"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert isinstance(json.loads(line), dict)


def test_json_tells_what_is_absent(node: RunningNode, capsys: Captured) -> None:
    """Unlimited is null, never is null, and numbers are numbers."""
    assert 0 == main(["show", "--json", "boss@example.com"])
    meter = json.loads(capsys.readouterr().out)["usages"][0]["meter"]
    assert (None, None, 0, 3_600_000) == (meter["max"], meter["left"], meter["used"], meter["window_ms"])
    assert 1 == main(["ask", "--json", "sasl_username=x", "recipient_count=21"])
    assert json.loads(capsys.readouterr().out)["limits"][0]["readings"][0]["wait_ms"] is None


# --- lint and agent ---------------------------------------------------------------------------------------------------


def test_lint_of_a_good_file(tmp_path: Path, capsys: Captured) -> None:
    """0; notes are no mistakes."""
    path = tmp_path / "limits.yaml"
    path.write_text(LIMITS.replace("shadow: true", "shadow: false"))
    assert 0 == main(["lint", "--no-postfix", str(path)])
    assert f"{path}: ok\n" == capsys.readouterr().out
    path.write_text(LIMITS)
    assert 0 == main(["lint", "--no-postfix", str(path)])
    assert f"{path}:13: note: per-client: shadow" in capsys.readouterr().out


def test_lint_of_a_wrong_file(tmp_path: Path, capsys: Captured) -> None:
    """2, and all problems at once."""
    path = tmp_path / "limits.yaml"
    path.write_text("limits:\n  a: {key: x}\n  b: {max: y}\n")
    assert 2 == main(["lint", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert {f"{path}:2", f"{path}:3"} == {line.partition(": ")[0] for line in lines}
    assert 2 == main(["lint", "--json", str(path)])
    assert lines == json.loads(capsys.readouterr().out)["problems"]
    assert 2 == main(["lint", str(tmp_path / "none.yaml")])


def test_lint_warns(tmp_path: Path, capsys: Captured) -> None:
    """1 if a limit does not do what it seems to."""
    path = tmp_path / "limits.yaml"
    path.write_text(LIMITS.replace("{1h: 20, 24h: 100}", "{1h: 20, 24h: 1000}"))
    assert 1 == main(["lint", "--no-postfix", str(path)])
    assert f"{path}:3: warning: per-user: 1000 per 24h is never reached" in capsys.readouterr().out


def test_agent_check(tmp_path: Path, capsys: Captured) -> None:
    """`ok`, or the problems of the settings and of the limits together, and 2."""
    settings, limits = tmp_path / "postmeter.yaml", tmp_path / "limits.yaml"
    limits.write_text(LIMITS)
    settings.write_text("limits: limits.yaml\n")
    assert 0 == main(["agent", "--check", "--settings", str(settings)])
    assert "ok\n" == capsys.readouterr().out
    settings.write_text("lissten: inet:127.0.0.1:1\n")
    limits.write_text("limits: {a: {key: x}}")
    assert 2 == main(["agent", "--check", "--settings", str(settings), "--limits", str(limits)])
    text = capsys.readouterr().out
    assert f"{settings}:1: lissten: unknown name; did you mean listen?" in text
    assert f"{limits}:1: limits.a" in text


def test_agent_check_needs_no_limits_file_with_etcd(tmp_path: Path, capsys: Captured) -> None:
    """A node that follows etcd has no file of limits; one that is named is checked all the same."""
    settings = tmp_path / "postmeter.yaml"
    settings.write_text("limits: nowhere.yaml\netcd: {endpoints: ['http://127.0.0.1:2379']}\n")
    assert 0 == main(["agent", "--check", "--settings", str(settings)])
    assert 2 == main(["agent", "--check", "--settings", str(settings), "--limits", str(tmp_path / "nowhere.yaml")])
    assert "nowhere.yaml: cannot be read" in capsys.readouterr().out


def test_agent_runs_with_settings_and_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options take the place of what the file says; the agent's exit status is that of the command."""
    ran: list[Settings] = []

    def run(settings: Settings) -> int:
        ran.append(settings)
        return 7

    monkeypatch.setattr("postmeter.agent.run", run)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "postmeter.yaml").write_text("state_dir: /there\nlimits: /there/limits.yaml\non_error: dunno\n")
    options = [
        "--limits",
        "l.yaml",
        "--listen",
        "inet:127.0.0.1:1",
        "--listen",
        "unix:/x/y",
        "--admin-socket",
        "a.sock",
    ]
    assert 7 == main(["agent", "--settings", "postmeter.yaml", *options])
    [made] = ran
    assert (tmp_path / "l.yaml", Path("/there"), "dunno") == (made.limits, made.state_dir, made.on_error)
    assert ["inet:127.0.0.1:1", "unix:/x/y"] == [str(listener) for listener in made.listen]
    assert tmp_path / "a.sock" == made.admin_socket.path


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ASKING)
def test_no_agent(tmp_path: Path, capsys: Captured, words: tuple[str, ...]) -> None:
    """3, at which socket nobody answers, and what to do."""
    path = tmp_path / "admin.sock"
    assert 3 == main([*words, "--socket", str(path)])
    assert (
        f"postmeter: no agent answers at {path}: is it running? systemctl status postmeter;"
        " another socket: --socket or POSTMETER_SOCKET\n"
    ) == capsys.readouterr().err


def test_an_agent_that_goes_away(tmp_path: Path) -> None:
    """An agent that stops between two questions is missed at the second one."""
    with running_node(tmp_path) as running:
        asking = client.Client(running.socket)
        asking.reload()
    with asking, pytest.raises(AgentError, match="went away"):
        asking.reload()


def test_socket_that_may_not_be_used(tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """3, and that it is a matter of rights."""

    def connect(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr("socket.socket.connect", connect)
    assert 3 == main(["reload", "--socket", str(tmp_path / "admin.sock")])
    assert "this user may not ask the agent: use sudo, or the group of the socket" in capsys.readouterr().err


def test_which_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment goes before the settings file, and that before the default."""
    monkeypatch.delenv("POSTMETER_SOCKET", raising=False)
    settings = tmp_path / "postmeter.yaml"
    monkeypatch.setattr("postmeter.settings.DEFAULT_PATH", settings)
    assert Path("/run/postmeter/admin.sock") == client.default_path()
    settings.write_text("admin_socket: /there/admin.sock\n")
    assert Path("/there/admin.sock") == client.default_path()
    monkeypatch.setenv("POSTMETER_SOCKET", "/here/admin.sock")
    assert Path("/here/admin.sock") == client.default_path()


def test_settings_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may not read the settings of the agent may still use its default socket."""
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert Settings() == command.local_settings()


def test_a_bug_shows_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    """70, and how to see more; who asks for the traceback gets it."""
    monkeypatch.setattr(ask, "_note_unknown", lambda lines: 1 / 0)
    assert 70 == main(["ask", "sasl_username=x"])
    assert (
        "postmeter: a bug: ZeroDivisionError: division by zero; POSTMETER_TRACEBACK=1 shows where\n"
        == capsys.readouterr().err
    )
    monkeypatch.setenv("POSTMETER_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main(["ask", "sasl_username=x"])


def test_a_closed_pipe_is_quiet(node: RunningNode) -> None:
    """`postmeter top --watch 1 | head -1` ends without a word."""
    writing = start("top", "--watch", "0.1", "--json")
    assert writing.stdout is not None
    writing.stdout.readline()
    writing.stdout.close()
    assert 141 == writing.wait(30)
    assert writing.stderr is not None
    assert "" == writing.stderr.read()


def test_a_full_disk_is_explained(tmp_path: Path) -> None:
    """What cannot be written is an error in one line."""
    (tmp_path / "limits.yaml").write_text(LIMITS)
    script = "import sys; from postmeter.cli import main; sys.exit(main())"
    with open("/dev/full", "w") as full:
        writing = subprocess.run(
            [sys.executable, "-c", script, "lint", str(tmp_path / "limits.yaml")],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert (3, "postmeter: [Errno 28] No space left on device\n") == (writing.returncode, writing.stderr)


def test_an_interrupt_is_quiet(tmp_path: Path) -> None:
    """Ctrl-C while it reads a request ends it without a word."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = start("ask", "--file", str(pipe))
    with pipe.open("wb"):  # opened when the command has opened it, too
        reading.send_signal(signal.SIGINT)
        _, errors = reading.communicate(timeout=30)
    assert (130, "") == (reading.returncode, errors)


def test_terminals_of_ascii(node: RunningNode) -> None:
    """A terminal that cannot show blocks, or a letter of a key, gets characters that it can show."""
    node.charge(sasl_username="é@example.com")
    shown = start("show", "é@example.com", PYTHONIOENCODING="ascii")
    text, errors = shown.communicate(timeout=30)
    assert (0, "") == (shown.returncode, errors)
    assert "@| now" in text
    assert r"\xe9@example.com" in text
