"""Certificates: what is made is what nodes and openssl accept, and what does not fit is refused in words."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from postmeter.certificates import CertificateFiles, make_authority, make_certificate, read_certificates
from postmeter.cli import main
from postmeter.errors import ConfigError
from postmeter.settings import ClusterSettings, parse_settings
from tests.unit.clusters import Log

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    """A CA with a certificate for mx1."""
    make_authority(tmp_path, 100)
    make_certificate("mx1", tmp_path, ["mx1.example.com", "192.0.2.1"], 10)
    return tmp_path


def read(directory: Path, node: str = "mx1", ca: str = "ca.pem", chain: str = "mx1.pem", key: str = "mx1.key") -> str:
    """What is wrong with three files; "" if nothing."""
    try:
        read_certificates(directory / ca, directory / chain, directory / key, node)
    except ConfigError as error:
        return str(error).replace(f"{directory}/", "")
    return ""


def openssl(*words: str) -> str:
    """What openssl says."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    return subprocess.run(["openssl", *words], check=True, capture_output=True, text=True).stdout


# --- making -----------------------------------------------------------------------------------------------------------


def test_what_is_made_is_right(authority: Path) -> None:
    """For this program, and for others."""
    assert "" == read(authority)
    path = str(authority / "mx1.pem")
    verified = openssl("verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", str(authority / "ca.pem"), path)
    assert f"{path}: OK\n" == verified
    openssl("verify", "-x509_strict", "-purpose", "sslclient", "-CAfile", str(authority / "ca.pem"), path)
    shown = openssl("x509", "-in", path, "-noout", "-ext", "subjectAltName")
    assert "DNS:mx1, DNS:mx1.example.com, IP Address:192.0.2.1" in shown


def test_keys_are_for_their_owner_only(authority: Path) -> None:
    """Whatever the umask is, and so is a directory that was made."""
    umask = os.umask(0)
    try:
        make_authority(authority / "new", 1)
    finally:
        os.umask(umask)
    modes = [stat.S_IMODE((authority / path).stat().st_mode) for path in ("new", "new/ca.key", "new/ca.pem", "mx1.key")]
    assert [0o700, 0o600, 0o644, 0o600] == modes


def test_nothing_is_written_over(authority: Path) -> None:
    """Neither a key nor a certificate; and no half of a pair is written beside the other one."""
    before = {path: path.read_bytes() for path in authority.iterdir()}
    with pytest.raises(ConfigError, match=r"ca\.pem: is there already; move it away, or choose another directory"):
        make_authority(authority, 1)
    (authority / "mx1.pem").unlink()
    with pytest.raises(ConfigError, match=r"mx1\.key: is there already"):
        make_certificate("mx1", authority, [], 1)
    del before[authority / "mx1.pem"]
    assert before == {path: path.read_bytes() for path in authority.iterdir()}


def test_no_certificate_outlives_its_ca(authority: Path) -> None:
    """It would not be good any more anyway."""
    make_certificate("mx2", authority, [], 10_000)
    found = read_certificates(authority / "ca.pem", authority / "mx2.pem", authority / "mx2.key", "mx2")
    ends = [openssl("x509", "-noout", "-enddate", "-in", str(authority / name)) for name in ("ca.pem", "mx2.pem")]
    assert ends[0] == ends[1]
    assert "" == found.trouble()


@pytest.mark.parametrize(
    ("node", "addresses", "expected"),
    [
        ("MX2", [], "'MX2' is no name of a node; write one in lower case, such as mx1 or mx1.example.com"),
        ("../mx2", [], "'../mx2' is no name of a node"),
        ("mx2", ["a b"], "'a b' is no address; write a name in lower case, or an IP address"),
    ],
)
def test_names_are_checked(authority: Path, node: str, addresses: list[str], expected: str) -> None:
    """Before anything is written."""
    with pytest.raises(ConfigError) as caught:
        make_certificate(node, authority, addresses, 1)
    assert str(caught.value).startswith(expected)
    assert {"ca.key", "ca.pem", "mx1.key", "mx1.pem"} == {path.name for path in authority.iterdir()}


def test_a_ca_must_be_whole(authority: Path, tmp_path: Path) -> None:
    """With its own key."""
    shutil.copy(authority / "mx1.key", authority / "ca.key")
    with pytest.raises(ConfigError, match=r"ca\.key: is not the key of .*ca\.pem; take both from the same CA"):
        make_certificate("mx2", authority, [], 1)
    with pytest.raises(ConfigError, match=r"nowhere/ca\.pem: cannot be read \(No such file or directory\)"):
        make_certificate("mx2", tmp_path / "nowhere", [], 1)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused(authority: Path) -> None:
    """Each file, with what to do."""
    make_authority(authority / "other", 1)
    make_certificate("mx2", authority / "other", [], 1)
    assert "mx1.pem: names mx1, mx1.example.com, not mx9; make one with `postmeter certs node mx9 DIR`" == read(
        authority, "mx9"
    )
    assert "other/mx2.key: is not the key of mx1.pem; copy both together" == read(authority, key="other/mx2.key")
    assert "mx1.pem: is not signed by other/ca.pem; take both from the same CA" == read(authority, ca="other/ca.pem")
    assert "mx1.key: has no certificate; write a file in PEM form: -----BEGIN ..." == read(authority, chain="mx1.key")
    assert read(authority, key="ca.pem").startswith("ca.pem: is no private key, or one with a password; ")
    assert read(authority, ca="nothing").startswith("nothing: cannot be read (No such file or directory); ")
    (authority / "binary").write_bytes(bytes(range(256)))
    assert read(authority, ca="binary").startswith("binary: has no certificate; ")


def test_a_chain_of_another_ca_will_do(authority: Path) -> None:
    """A node's certificate, with the one that signed it behind it: only the root need be in `ca`."""
    config = authority / "v3.cnf"
    config.write_text("basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\n")
    node = authority / "node.cnf"
    node.write_text("subjectAltName=DNS:mx7\n")
    names = {name: str(authority / name) for name in ("mid.key", "mid.csr", "mid.pem", "mx7.key", "mx7.csr", "mx7.pem")}
    root = ("-CA", str(authority / "ca.pem"), "-CAkey", str(authority / "ca.key"))
    middle = ("-CA", names["mid.pem"], "-CAkey", names["mid.key"])
    for name, issuer, extensions in (("mid", root, config), ("mx7", middle, node)):
        key, request, pem = names[f"{name}.key"], names[f"{name}.csr"], names[f"{name}.pem"]
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", request, "-subj", f"/CN={name}")
        openssl("x509", "-req", "-in", request, *issuer, "-days", "5", "-extfile", str(extensions), "-out", pem)
    chain = authority / "chain.pem"
    chain.write_bytes((authority / "mx7.pem").read_bytes() + (authority / "mid.pem").read_bytes())
    assert "" == read(authority, "mx7", chain="chain.pem", key="mx7.key")
    assert read(authority, "mx7", chain="mx7.pem", key="mx7.key").startswith("mx7.pem: is not signed by ca.pem; ")


@pytest.mark.parametrize(("days", "expected"), [(10, "expires on "), (0, "has expired on "), (100, "")])
def test_an_end_is_told_in_time(tmp_path: Path, days: int, expected: str) -> None:
    """A month before."""
    make_authority(tmp_path, 200)
    make_certificate("mx1", tmp_path, [], days)
    found = read_certificates(tmp_path / "ca.pem", tmp_path / "mx1.pem", tmp_path / "mx1.key", "mx1")
    assert found.trouble().startswith(f"the certificate {expected}" if expected else "")
    assert bool(expected) == bool(found.trouble())


def test_new_files_count_when_they_fit(authority: Path) -> None:
    """What is wrong is logged once, and the last good ones go on."""
    chain, key = authority / "mx1.pem", authority / "mx1.key"
    cluster = ClusterSettings("", "", ca=authority / "ca.pem", certificate=chain, key=key)
    files = CertificateFiles(cluster, "mx1")
    first = files.current
    chain.unlink()
    with Log() as log:
        assert [False, False] == [files.refresh(), files.refresh()]
        key.unlink()
        make_certificate("mx1", authority, [], 10)
        assert files.refresh()
    assert first != files.current
    assert key.read_bytes() == files.current.key
    assert 1 == len(log.lines) == len(log.starting("certificates refused, the last good ones go on: "))


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_makes_them_and_says_what_to_do(tmp_path: Path, capsys: Captured) -> None:
    """The settings that it prints are right as they are, with an address in them."""
    directory = tmp_path / "ca"
    assert 0 == main(["certs", "ca", str(directory)])
    assert f"made {directory}/ca.key and {directory}/ca.pem\n" in capsys.readouterr().out
    assert 0 == main(["certs", "node", "mx1", str(directory), "--address", "mx1.example.com", "--days", "5"])
    text = capsys.readouterr().out
    written = text.partition("postmeter.yaml:\n")[2].replace("ADDRESS", "192.0.2.1")
    settings = parse_settings(written, "x", Path("/"))
    expected = ClusterSettings(
        "192.0.2.1:10044",
        "192.0.2.1:10044",
        ca=Path("/etc/postmeter/ca.pem"),
        certificate=Path("/etc/postmeter/mx1.pem"),
        key=Path("/etc/postmeter/mx1.key"),
    )
    assert ("mx1", expected) == (settings.node, settings.cluster)
    assert "" == read(directory)
    assert 2 == main(["certs", "node", "mx1", str(directory)])
    assert "is there already" in capsys.readouterr().err


def test_the_command_speaks_json(tmp_path: Path, capsys: Captured) -> None:
    """Wherever --json stands."""
    assert 0 == main(["certs", "--json", "ca", str(tmp_path)])
    assert {"key": f"{tmp_path}/ca.key", "certificate": f"{tmp_path}/ca.pem"} == json.loads(capsys.readouterr().out)
    assert 0 == main(["certs", "node", "mx1", str(tmp_path), "--json"])
    assert {"key": f"{tmp_path}/mx1.key", "certificate": f"{tmp_path}/mx1.pem"} == json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "words", [[], ["ca"], ["node", "mx1"], ["ca", "x", "--days", "0"], ["ca", "x", "--days", "1e3"]]
)
def test_the_command_checks_its_words(words: list[str], capsys: Captured) -> None:
    """Exit code 2, and a usage."""
    with pytest.raises(SystemExit) as ended:
        main(["certs", *words])
    assert 2 == ended.value.code
    assert "usage: postmeter certs" in capsys.readouterr().err
