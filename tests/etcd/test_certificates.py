"""Agents that know each other by certificates: as processes on this machine, with a real etcd."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from postmeter.certificates import make_authority, make_certificate
from tests.postfix.mailhost import wait_until

from .nodes import Node, Nodes
from .server import EtcdServer

ALICE = "alice@example.com"
SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    """A CA with certificates for two nodes, and for a monitor."""
    directory = tmp_path / "ca"
    make_authority(directory, 100)
    for name in ("mx1", "mx2", "monitor"):
        make_certificate(name, directory, [], 100)
    return directory


@pytest.fixture
def pair(tmp_path: Path, server: EtcdServer, authority: Path) -> Iterator[list[Node]]:
    """Two agents, in one cluster."""
    with Nodes(tmp_path, server) as nodes:
        for name in ("mx1", "mx2"):
            files = {"ca": "ca.pem", "certificate": f"{name}.pem", "key": f"{name}.key"}
            nodes.add(name, **{setting: str(authority / file) for setting, file in files.items()}).launch()
        nodes.wait_for_members("mx1", "mx2")
        for node in nodes.all:
            nodes.wait_for_health(node)
        yield nodes.all


def health(node: Node, credentials: grpc.ChannelCredentials) -> health_pb2.HealthCheckResponse:
    """What any client of the standard health service gets at the port of the peers."""
    options = [("grpc.ssl_target_name_override", node.name)]
    with grpc.secure_channel(node.address, credentials, options) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return stub.Check(health_pb2.HealthCheckRequest(service="postmeter.peers"), timeout=20)


def test_they_share_one_cap(pair: list[Node]) -> None:
    """As without certificates."""
    mx1, mx2 = pair
    assert ["DUNNO"] * 30 == [mx1.ask(ALICE) for _ in range(30)]
    assert mx2.ask(ALICE).startswith("450 4.7.1 per-user: ")


def test_who_has_a_certificate_may_ask_for_the_health(pair: list[Node], authority: Path) -> None:
    """Over TLS, at the port of the peers; who has none is refused, and that is logged."""
    mx1, _ = pair
    ca = (authority / "ca.pem").read_bytes()
    key, chain = ((authority / f"monitor.{kind}").read_bytes() for kind in ("key", "pem"))
    credentials = grpc.ssl_channel_credentials(ca, key, chain)
    wait_until("mx1 to reach mx2", lambda: health(mx1, credentials).status == SERVING)
    with pytest.raises(grpc.RpcError):
        health(mx1, grpc.ssl_channel_credentials(ca))
    mx1.wait_for_log('TLS handshake failed reason="peer did not return a certificate"')
