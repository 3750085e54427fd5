"""Fixtures of the tests against a real etcd: one server for the tests of a module that leave it as it was.

Where etcd is missing, every test that asks for one is skipped, and says why.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .server import EtcdServer, unavailable


@pytest.fixture(autouse=True)
def _etcd() -> None:
    why_not = unavailable()
    if why_not is not None:
        pytest.skip(why_not)


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """Run an empty etcd."""
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as running:
        yield running
