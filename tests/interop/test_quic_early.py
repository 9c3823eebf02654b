"""Tickets and 0-RTT: early packets take effect only after the handshake is confirmed, and never twice."""

from __future__ import annotations

import socket

import pytest

from harness import wire
from harness.edge import Edge, config, listener
from harness.names import fresh
from harness.phone import Phone, write


@pytest.fixture(scope="module")
def _takes(tmp_path_factory, broker, pki):
    listeners = [listener("tcp"), listener("quic", early_data=True, webtransport=True)]
    one = Edge(tmp_path_factory.mktemp("early"), config(broker.url, pki, listeners=listeners), pki).start()
    yield one
    one.close()


@pytest.fixture
def takes(_takes):
    """A binary that accepts early data."""
    since = _takes.mark()
    yield _takes
    _takes.assert_sane(since)


def ticket(edge):
    tickets = []
    with Phone(edge["quic"].port, edge.pki.ca, on_ticket=tickets.append) as one:
        one.connect(fresh("id"))
        one.wait("a ticket", lambda: tickets)
    return tickets[0]


def flight(topic: str):
    """A first flight: CONNECT and a PUBLISH on the control stream, another on a data stream."""
    return (
        write(0, wire.connect(fresh("id")) + wire.publish(topic, b"early", 1, 1)),
        write(4, wire.publish(topic, b"early too", 1, 2)),
    )


def unfinished(edge, given, topic: str) -> None:
    """A client that sends its first flight and no more: it hears nothing, so its handshake never ends."""
    stuck = Phone(edge["quic"].port, edge.pki.ca, ticket=given, wait=False)
    stuck.protocol.datagram_received = lambda *_: None
    stuck.do(*flight(topic))
    assert [p for p in stuck.quic._loss.spaces[2].sent_packets.values()], "the client sent no early data"
    stuck.vanish()


def served(edge, given, topic: str, sent: list[bytes] | None = None):
    """A client that sends the same first flight and finishes; returns the outcome of its handshake."""
    with Phone(edge["quic"].port, edge.pki.ca, ticket=given, wait=False) as one:
        if sent is not None:
            transport, send = one.protocol._transport, one.protocol._transport.sendto
            transport.sendto = lambda data, addr=None: (sent.append(data), send(data, addr))
        one.do(*flight(topic))
        one.wait("the handshake", lambda: one.handshake)
        assert (one.recv(0).kind, one.recv(0).kind, one.recv(4).kind) == (wire.CONNACK, wire.PUBACK, wire.PUBACK)
        return one.handshake


def texts(watcher, client, topic: str) -> list[str]:
    return sorted(m.text for m in watcher.until_marker(client, topic))


def test_a_ticket_resumes_in_one_round_trip_and_offers_no_early_data(edge):
    given = ticket(edge)
    assert not given.max_early_data_size
    with Phone(edge["quic"].port, edge.pki.ca, ticket=given) as one:
        assert one.handshake.session_resumed and not one.handshake.early_data_accepted
        one.connect(fresh("id"))


def test_early_data_without_an_offer_is_not_executed_and_not_lost(edge, client):
    topic = fresh()
    watcher = client(edge)
    watcher.subscribe(topic)
    given = ticket(edge)
    given.max_early_data_size = 0xFFFFFFFF
    unfinished(edge, given, topic)
    assert watcher.until_marker(client(edge), topic) == []
    assert not served(edge, given, topic).early_data_accepted
    assert texts(watcher, client(edge), topic) == ["early", "early too"]


def test_accepted_early_data_waits_for_the_handshake(takes, client):
    topic = fresh()
    watcher = client(takes)
    watcher.subscribe(topic)
    given = ticket(takes)
    assert given.max_early_data_size == 0xFFFFFFFF
    unfinished(takes, given, topic)
    assert watcher.until_marker(client(takes), topic) == []
    # The ticket has been used, so its early data is refused and the client sends it again.
    again = served(takes, given, topic)
    assert not again.session_resumed and not again.early_data_accepted
    assert texts(watcher, client(takes), topic) == ["early", "early too"]
    once = served(takes, ticket(takes), topic)
    assert once.session_resumed and once.early_data_accepted
    assert texts(watcher, client(takes), topic) == ["early", "early too"]


def test_a_replayed_first_flight_has_no_effect(takes, client):
    """RFC 9001 section 9.2: an attacker who recorded a first flight can send it from anywhere, any number of times."""
    topic = fresh()
    watcher = client(takes)
    watcher.subscribe(topic)
    sent = []
    assert served(takes, ticket(takes), topic, sent).early_data_accepted
    assert texts(watcher, client(takes), topic) == ["early", "early too"]
    for _ in range(3):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for raw in sent:
                sock.sendto(raw, ("127.0.0.1", takes["quic"].port))
    # The server has read them all by the time that it has served another.
    with Phone(takes["quic"].port, takes.pki.ca) as other:
        other.connect(fresh("id"))
    assert watcher.until_marker(client(takes), topic) == []
