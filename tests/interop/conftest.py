"""Fixtures: a broker and a binary that a test process shares, or a pair for one test."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from harness import certs, edge as edges, links, paho  # noqa: E402
from harness.mosquitto import Mosquitto  # noqa: E402
from harness.edge import Edge, config  # noqa: E402
from harness.names import fresh  # noqa: E402

FULL = os.environ.get("TIDEGATE_FULL") == "1"


def pytest_report_header(config):
    return f"tidegate: {edges.BINARY}, tier: {'full' if FULL else 'default'}"


@pytest.fixture(scope="session")
def full() -> bool:
    return FULL


@pytest.fixture(scope="session")
def pki(tmp_path_factory) -> certs.Pki:
    return certs.make(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="session")
def broker(tmp_path_factory):
    """The shared broker: never stopped by a test."""
    one = Mosquitto(tmp_path_factory.mktemp("broker")).start()
    yield one
    one.close()


@pytest.fixture(scope="session")
def shared_edge(tmp_path_factory, broker, pki):
    one = Edge(tmp_path_factory.mktemp("edge"), config(broker.url, pki), pki).start()
    yield one
    one.assert_sane()
    one.close()


@pytest.fixture
def edge(shared_edge):
    """The shared binary: every transport, anonymous, before the shared broker."""
    since = shared_edge.mark()
    yield shared_edge
    shared_edge.assert_sane(since)


@pytest.fixture
def own_broker(tmp_path):
    """Makes brokers that a test may stop and start."""
    made = []

    def make(**kwargs) -> Mosquitto:
        one = Mosquitto(tmp_path / f"broker{len(made)}", **kwargs)
        made.append(one)
        return one.start()

    yield make
    for one in made:
        one.close()


@pytest.fixture
def own_edge(tmp_path, pki):
    """Makes binaries with a configuration of the test's own; not started."""
    made = []

    def make(broker_url: str, transports=("tcp",), **sections) -> Edge:
        one = Edge(tmp_path / f"edge{len(made)}", config(broker_url, pki, transports, **sections), pki)
        made.append(one)
        return one

    yield make
    for one in made:
        one.close()
        assert not (one.service and one.service.grep(r"panicked at")), one.service.grep(r"panicked at")


@pytest.fixture
def way(request):
    """Makes relayed paths to listeners and closes them at the end of the test."""
    made = []

    def make(edge: Edge, transport: str = "tcp", name: str | None = None) -> links.Way:
        one = links.Way(edge, transport, name)
        made.append(one)
        return one

    yield make
    for one in made:
        one.close()


@pytest.fixture
def client(way):
    """Makes paho clients: `client(edge, "ws", "id", expiry=300)`."""
    made = []

    def make(edge: Edge, transport: str = "tcp", client_id: str | None = None, *, via: links.Way | None = None, name: str | None = None, **kwargs) -> paho.Paho:
        one = paho.Paho(via or way(edge, transport, name), fresh("c") if client_id is None else client_id, **kwargs)
        made.append(one)
        return one

    yield make
    for one in made:
        one.close()

