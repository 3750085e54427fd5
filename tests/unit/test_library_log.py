"""What the gRPC library says of connections, in the log's words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from postmeter.certificates import make_authority, make_certificate

STORY = """
import os, sys
from pathlib import Path

import grpc
import uvloop

from postmeter import library_log, logs
from tests.unit.clusters import Log, Nodes, call

async def story(directory, foreign):
    library_log.follow()
    credentials = {
        "nobody": grpc.ssl_channel_credentials((directory / "ca.pem").read_bytes()),
        "foreign": grpc.ssl_channel_credentials(
            *(path.read_bytes() for path in (directory / "ca.pem", foreign / "mx2.key", foreign / "mx2.pem"))
        ),
        "plain": None,
    }
    with Log() as log:
        async with Nodes(directory) as nodes:
            mx1 = await nodes.add("mx1")
            for used in credentials.values():
                for _ in range(3):
                    await call(mx1.address, b"", used)
        os.write(2, b"a line of nobody\\nI0101 00:00:00.000001   1 x.cc:1] hello\\n")
        print("and Python", file=sys.stderr)
        await log.until(lambda: len(log.starting("TLS handshake failed")) == 3 and log.starting("gRPC says"))

logs.set_up("info", "json")
uvloop.run(story(*map(Path, sys.argv[1:])))
"""


def test_reasons_for_refusing_a_connection_are_logged_once(tmp_path: Path) -> None:
    """In the log's form, and other lines as they are; the log and Python go on."""
    for directory in (tmp_path / "ca", tmp_path / "foreign"):
        make_authority(directory, 100)
        for node in ("mx1", "mx2"):
            make_certificate(node, directory, [], 100)
    command = [sys.executable, "-c", STORY, str(tmp_path / "ca"), str(tmp_path / "foreign")]
    ran = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    plain = [line for line in ran.stderr.splitlines() if not line.startswith("{")]
    events = [json.loads(line) for line in ran.stderr.splitlines() if line.startswith("{")]
    assert {"a line of nobody", "and Python"} == set(plain)
    expected = ["peer did not return a certificate", "unable to get local issuer certificate", "wrong version number"]
    assert expected == sorted(event["reason"] for event in events if event["event"] == "TLS handshake failed")
    assert ["hello"] == [event["text"] for event in events if event["event"] == "gRPC says"]
