"""The settings file: defaults, every form of a listener, and each mistake in the words that the operator reads."""

from __future__ import annotations

import grp
import os
import pwd
import re
import socket
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postmeter import settings
from postmeter.errors import ConfigError
from postmeter.settings import (
    HELP,
    SOCKET_PATH_BYTES_MAX,
    ClusterSettings,
    EtcdSettings,
    Listener,
    Settings,
    parse_listener,
    parse_settings,
    read_settings,
)

EXAMPLE = Path(__file__).parents[2] / "deploy/examples/postmeter.yaml"

ME = pwd.getpwuid(os.getuid()).pw_name
MY_GROUP = grp.getgrgid(os.getgid()).gr_name
ENDPOINT = "write http://HOST:PORT or https://HOST:PORT, such as https://etcd1.example.org:2379"
ADDRESS = "write HOST:PORT, such as mx1.example.com:10044 or [2001:db8::1]:10044"
LISTENER = "write inet:127.0.0.1:10040, inet:[::1]:10040 or unix:/path/of/socket"


def read(text: str) -> Settings:
    """Settings from a text, as if from a file in /etc/x."""
    return parse_settings(text, "x.yaml", Path("/etc/x"))


def problems_of(text: str) -> list[str]:
    """What is wrong with a text."""
    try:
        read(text)
    except ConfigError as error:
        return error.problems
    return []


def test_nothing_needs_to_be_set() -> None:
    """An empty file, and sections of which all is commented out, are the defaults."""
    assert Settings() == read("") == read("# nothing") == read("log:\n  # level: debug\n")


def test_the_example_shows_every_default() -> None:
    """Each setting stands in the example with its explanation, and with the value that it has anyway."""
    text = EXAMPLE.read_text()
    assert Settings() == parse_settings(text, "postmeter.yaml", Path("/"))
    for name in (field.name for field in fields(Settings)):
        assert f"# {HELP[name]}" in text
        assert re.search(f"(?m)^#? *{name.removeprefix('log_')}:", text)


def test_the_example_shows_how_to_use_etcd() -> None:
    """All of its settings with their explanations; uncommented (but for one of the two passwords) they are right."""
    text = EXAMPLE.read_text()
    for name in (field.name for field in fields(EtcdSettings)):
        assert f"  # {HELP[f'etcd_{name}']}\n" in text
    used = re.sub("(?m)^  #(?!password:)(?=[a-z])", "  ", text)
    etcd = parse_settings(used, "postmeter.yaml", Path("/")).etcd
    assert etcd is not None
    assert {"password"} == {field.name for field in fields(etcd) if not getattr(etcd, field.name)}


def test_the_cluster_in_the_example_shows_every_default() -> None:
    """All of its settings with their explanations; uncommented they are right, and what they are anyway."""
    for name in (field.name.removesuffix("_ms") for field in fields(ClusterSettings)):
        assert f"  # {HELP[f'cluster_{name}']}\n" in EXAMPLE.read_text()
    text = re.sub("(?m)^( *)#(?!password:)(?=[a-z])", r"\1", EXAMPLE.read_text())
    expected = ClusterSettings(
        listen="192.0.2.1:10044",
        address="mx1.example.com:10044",
        ca=Path("/etc/postmeter/ca.pem"),
        certificate=Path("/etc/postmeter/mx1.pem"),
        key=Path("/etc/postmeter/mx1.key"),
    )
    settings = parse_settings(text, "postmeter.yaml", Path("/"))
    assert ("mx1", expected) == (settings.node, settings.cluster)


def test_everything_can_be_set() -> None:
    """Each setting in another form than its default."""
    text = f"""
        listen: ["inet:[::1]:25000", {{unix: /run/p.sock, owner: {ME}, group: {MY_GROUP}, mode: 0600}}]
        state_dir: state
        admin_socket: {{unix: /run/a.sock, mode: "0o640"}}
        limits: /srv/limits.yaml
        charge_at: RCPT
        on_error: dunno
        log: {{level: debug, format: json}}
        etcd:
          endpoints: ["https://a.example.org:2379", "https://[::1]:2379"]
          prefix: /mail/limits/
          ca: ca.pem
          certificate: /etc/etcd.pem
          key: /etc/etcd.key
          user: u
          password_file: secret
        node: mx1.example.com
        cluster: {{
            listen: "0.0.0.0:1", address: "[2001:db8::1]:2", insecure: true, join: manual,
            borrow_timeout: 5s, exchange_interval: 100 ms, exchange_peers: 64
        }}
    """
    etcd = EtcdSettings(
        ("https://a.example.org:2379", "https://[::1]:2379"),
        prefix="/mail/limits/",
        ca=Path("/etc/x/ca.pem"),
        certificate=Path("/etc/etcd.pem"),
        key=Path("/etc/etcd.key"),
        user="u",
        password_file=Path("/etc/x/secret"),
    )
    assert Settings(
        listen=(Listener("::1", 25000), Listener(path=Path("/run/p.sock"), owner=ME, group=MY_GROUP, mode=0o600)),
        state_dir=Path("/etc/x/state"),
        admin_socket=Listener(path=Path("/run/a.sock"), mode=0o640),
        limits=Path("/srv/limits.yaml"),
        charge_at="rcpt",
        on_error="dunno",
        log_level="debug",
        log_format="json",
        etcd=etcd,
        node="mx1.example.com",
        cluster=ClusterSettings(
            listen="0.0.0.0:1",
            address="[2001:db8::1]:2",
            insecure=True,
            join="manual",
            borrow_timeout_ms=5_000,
            exchange_interval_ms=100,
            exchange_peers=64,
        ),
    ) == read(text)


def test_an_etcd_without_tls() -> None:
    """One endpoint needs no list, and the password no file; it is not shown by accident."""
    etcd = read("etcd: {endpoints: http://127.0.0.1:2379, user: u, password: p}").etcd
    assert EtcdSettings(("http://127.0.0.1:2379",), user="u", password="p") == etcd
    assert "'p'" not in repr(etcd)
    assert read("etcd:\n  #endpoints: x").etcd is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("inet:127.0.0.1:10040", Listener("127.0.0.1", 10040)),
        ("inet:[::1]:10040", Listener("::1", 10040)),
        ("inet:localhost:1", Listener("localhost", 1)),
        ("unix:/run/p.sock", Listener(path=Path("/run/p.sock"))),
    ],
)
def test_listeners_have_a_short_form(text: str, expected: Listener) -> None:
    """It is what they are printed as, too."""
    assert expected == parse_listener(text)
    assert text == str(expected)


def test_an_admin_socket_is_just_a_path() -> None:
    """Or a listener on a unix socket."""
    assert Listener(path=Path("/run/a")) == read("admin_socket: /run/a").admin_socket
    assert Listener(path=Path("/run/a")) == read("admin_socket: unix:/run/a").admin_socket


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("limts: x", "limts: unknown name; did you mean limits?"),
        ("log: {levl: x}", "log.levl: unknown name; did you mean level?"),
        ("log: debug", "log: is not a mapping; write name: value, one below the other and indented alike"),
        ("log: {level: chatty}", 'log.level: "chatty" is unknown; write one of debug, error, info, warning'),
        ("charge_at: end-of-mesage", 'charge_at: "end-of-mesage" is unknown; did you mean end-of-message?'),
        ("on_error: reject", 'on_error: "reject" is unknown; write one of defer, dunno'),
        ("on_error:", "on_error: is empty; write one of defer, dunno"),
        ("state_dir: [a]", "state_dir: is a list; write a path"),
        ('state_dir: "a\\0"', 'state_dir: "a\\x00" is no path; write one without control characters'),
        ("listen: []", "listen: is an empty list; write at least one value, or remove it"),
        ("listen: 127.0.0.1:10040", f'listen: "127.0.0.1:10040" is no place to listen; {LISTENER}'),
        ("listen: inet:::1:10040", f'listen: "inet:::1:10040" is no place to listen; {LISTENER}'),
        ("listen: inet:127.0.0.1:99999", f'listen: "inet:127.0.0.1:99999" is no place to listen; {LISTENER}'),
        ("listen: inet:127.0.0.1:0", f'listen: "inet:127.0.0.1:0" is no place to listen; {LISTENER}'),
        ("listen: inet:127.0.0.300:1", f'listen: "127.0.0.300" is no address; {LISTENER}'),
        ("listen: inet:[1::2::3]:1", f'listen: "1::2::3" is no address; {LISTENER}'),
        (
            "listen: unix:private/p",
            'listen: "private/p" is no path of a unix socket; write one such as /run/postmeter/x.sock',
        ),
        (
            f"listen: unix:/{'x' * SOCKET_PATH_BYTES_MAX}",
            f'listen: "/{"x" * 59}..." is too long for a unix socket; write at most {SOCKET_PATH_BYTES_MAX} bytes',
        ),
        ("listen: {path: /x, unix: /y}", "listen.path: unknown name; write one of group, mode, owner, unix"),
        ("listen: {mode: 0600}", "listen: unix is missing; write unix: /path/of/socket"),
        ("listen: {unix: /x, mode: 0999}", 'listen.mode: "0999" is no mode; write three octal digits, such as "0660"'),
        ("listen: {unix: /x, mode: rw}", 'listen.mode: "rw" is no mode; write three octal digits, such as "0660"'),
        (
            "listen: {unix: /x, owner: no such}",
            'listen.owner: there is no user "no such" here; write the name of an existing user',
        ),
        (
            "listen: {unix: /x, group: no such}",
            'listen.group: there is no group "no such" here; write the name of an existing group',
        ),
        ("etcd: {prefix: /x/}", "etcd: endpoints is missing; write endpoints: [https://etcd1.example.org:2379]"),
        (
            "etcd: {endpoints: 127.0.0.1:2379}",
            f'etcd.endpoints: "127.0.0.1:2379" is no endpoint of etcd; {ENDPOINT}',
        ),
        (
            "etcd: {endpoints: [http://a:0]}",
            f'etcd.endpoints[1]: "http://a:0" is no endpoint of etcd; {ENDPOINT}',
        ),
        (
            "etcd: {endpoints: [http://a:1, https://b:1]}",
            "etcd.endpoints: has http:// and https:// endpoints; write all of them with https://",
        ),
        ("etcd: {endpoints: []}", "etcd.endpoints: is an empty list; write at least one value, or remove it"),
        (
            "etcd: {endpoints: https://a:1}",
            "etcd: ca is missing; write ca: /etc/ssl/certs/ca-certificates.crt, or the file of your own CA",
        ),
        (
            "etcd: {endpoints: http://a:1, ca: x}",
            "etcd.ca: is not used with http://; write https:// endpoints, or remove it",
        ),
        (
            "etcd: {endpoints: https://a:1, ca: x, key: y}",
            "etcd.key: stands there without certificate; write certificate beside it, or remove it",
        ),
        (
            "etcd: {endpoints: http://a:1, user: x}",
            "etcd.user: needs a password or a password_file; write one of them",
        ),
        (
            "etcd: {endpoints: http://a:1, password: x}",
            "etcd.password: stands there without user; write user beside it, or remove it",
        ),
        (
            "etcd: {endpoints: http://a:1, prefix: postmeter}",
            'etcd.prefix: "postmeter" is no prefix; write one such as /postmeter/, with / at both ends',
        ),
        (
            "node: MX1",
            'node: "MX1" is no name of a node; write a host\'s name in lower case, such as mx1 or mx1.example.com',
        ),
        ("cluster: {join: auto}", "cluster: listen is missing; write listen: 192.0.2.1:10044"),
        ("cluster: {listen: x}", f'cluster.listen: "x" is no address with a port; {ADDRESS}'),
        ("cluster: {listen: '::1:1'}", f'cluster.listen: "::1:1" is no address with a port; {ADDRESS}'),
        ("cluster: {listen: '127.0.0.300:1'}", f'cluster.listen: "127.0.0.300" is no address; {ADDRESS}'),
        (
            "cluster: {listen: '192.0.2.1:1'}",
            "cluster.listen: anybody who can connect there could take the cluster's rights, because there are no"
            " certificates; write ca, certificate and key, made by `postmeter certs`, or insecure: true",
        ),
        (
            "cluster: {listen: 'mx1:1', ca: x, key: y}",
            "cluster.ca: stands without the others; write all three of ca, certificate and key",
        ),
        (
            "cluster: {listen: 'mx1:1', ca: x, certificate: z, key: y, insecure: true}",
            "cluster.insecure: is not used beside certificates; remove it, or the certificates",
        ),
        (
            "cluster: {listen: '[::]:1', insecure: true}",
            "cluster.listen: is nothing that others can connect to; write address: mx1.example.com:10044",
        ),
        (
            "cluster: {listen: '127.0.0.1:1', borrow_timeout: 6s}",
            'cluster.borrow_timeout: "6s" is no such duration; write 0ms to 5s, such as 250ms or 1s',
        ),
        (
            "cluster: {listen: 'localhost:1', exchange_peers: 0}",
            'cluster.exchange_peers: "0" is none; write a number of peers, 1 to 64',
        ),
        (
            "admin_socket: inet:127.0.0.1:1",
            'admin_socket: "inet:127.0.0.1:1" is no path of a unix socket; write one such as /run/postmeter/x.sock',
        ),
    ],
)
def test_each_mistake_says_what_is_wrong_and_what_would_be_right(text: str, expected: str) -> None:
    """One problem for one mistake, with its line and path."""
    assert [f"x.yaml:1: {expected}"] == problems_of(text)


def test_in_a_cluster_the_node_must_have_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's name is its default, if a node may be called so."""
    text = "cluster: {listen: '[::1]:1'}"
    monkeypatch.setattr(socket, "gethostname", lambda: "MX2.example.com")
    assert "mx2" == read(text).node
    monkeypatch.setattr(socket, "gethostname", lambda: "mx_2")
    assert ["x.yaml:1: cluster: this host's name cannot be the name of a node; write node: mx1 above"] == problems_of(
        text
    )
    assert "mx2" == read(f"node: mx2\n{text}").node


def test_all_problems_come_at_once() -> None:
    """In the order of their lines."""
    problems = problems_of("on_error: x\nlisten:\n- inet:1\n- unix:y\nlogs: z")
    assert [1, 3, 4, 5] == [int(problem.split(":")[1]) for problem in problems]


def test_a_file_that_is_named_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one in the usual place need not."""
    monkeypatch.setattr(settings, "DEFAULT_PATH", tmp_path / "postmeter.yaml")
    assert Settings() == read_settings(None)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_settings(tmp_path / "postmeter.yaml")


def test_paths_start_at_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the agent was started."""
    path = tmp_path / "postmeter.yaml"
    path.write_text("limits: limits.yaml")
    monkeypatch.setattr(settings, "DEFAULT_PATH", path)
    assert tmp_path / "limits.yaml" == read_settings(path).limits == read_settings(None).limits


@given(
    st.lists(st.sampled_from(["listen", "log", "mode", "unix", ": ", "{", "}", "[", "]", "\n", "- ", "/x", "0"])).map(
        "".join
    )
    | st.builds(
        "{}: {}".format,
        st.sampled_from(["listen", "state_dir", "admin_socket", "log", "etcd", "node", "cluster"]),
        st.text(),
    )
)
def test_any_text_is_read_or_refused(text: str) -> None:
    """Nothing but ConfigError is raised, and every problem has a source, a line and a remedy."""
    assert all(re.match("x.yaml:[0-9]+: .*; ", problem) for problem in problems_of(text))
