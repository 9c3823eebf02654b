"""A healthy connected client gets every message, however small the limits for clients that are away are."""

from __future__ import annotations

import threading

import pytest

from harness import wire
from harness.edge import listener
from harness.loop import call
from harness.names import fresh
from harness.phone import Phone
from harness.raw import Raw
from harness.webtransport import dial

MIB = 1 << 20
# Numbers and sizes of the messages: more than may wait for a client that is away.
LOADS = {"many": (200, 10_000), "large": (5, MIB), "larger": (8, MIB + 10), "both": (200, 100_000), "small": (3000, 10)}


class OnStream:
    """A client whose publishes and subscriptions use one stream of a QUIC connection."""

    def __init__(self, edge, stream: int):
        self.phone, self.stream = Phone(edge["quic"].port, edge.pki.ca), stream

    def connect(self, client_id: str, **kwargs):
        self.phone.connect(client_id, **kwargs)

    def subscribe(self, *filters: tuple[str, int]):
        self.phone.subscribe(self.stream, *filters)

    def send(self, raw: bytes):
        self.phone.send(self.stream, raw)

    def recv(self) -> wire.Packet:
        return self.phone.recv(self.stream)

    def close(self):
        self.phone.close()


class WebTransport:
    """A client of one WebTransport session."""

    def __init__(self, edge):
        self.edge, self.buffer, self.packets = edge, bytearray(), []
        call(self._dial())

    async def _dial(self):
        self.http = await dial(self.edge["quic"].port, self.edge.pki.ca)
        session, status = await self.http.ask("CONNECT", "/mqtt")
        assert status == 200
        self.stream = self.http.open(session)

    def connect(self, client_id: str, **kwargs):
        self.send(wire.connect(client_id, **kwargs))
        assert self.recv().kind == wire.CONNACK

    def subscribe(self, *filters: tuple[str, int]):
        self.send(wire.subscribe(1, *filters))
        assert self.recv().kind == wire.SUBACK

    def send(self, raw: bytes):
        async def run():
            self.http.send(self.stream, raw)

        call(run())

    def recv(self) -> wire.Packet:
        while not self.packets:
            self.buffer += call(self.http.received[self.stream].get())
            self.packets += wire.split(self.buffer)
        return self.packets.pop(0)

    def close(self):
        async def run():
            self.http.close()

        call(run())


@pytest.fixture
def roomy_edge(own_broker, own_edge):
    """The limits for clients that are away are small; those of memory and packets are not."""
    broker = own_broker(quiet=True)
    small = {"queue_messages_max": 50, "queue_bytes_max": "256KiB"}
    listeners = [listener("tcp"), listener("tls"), listener("ws"), listener("wss"), listener("quic", webtransport=True)]
    return own_edge(broker.url, listeners=listeners, session=small, limits={"packet_max": "4MiB"}).start()


@pytest.fixture
def subscriber(roomy_edge):
    made = []

    def make(transport: str, **kwargs):
        if transport == "webtransport":
            one = WebTransport(roomy_edge)
        elif transport in ("quic", "stream"):
            one = OnStream(roomy_edge, 0 if transport == "quic" else 4)
        else:
            one = Raw(roomy_edge[transport].port, transport, ca=roomy_edge.pki.ca, timeout=20)
        made.append(one)
        one.connect(fresh("sub"), keep_alive=0, **kwargs)
        return one

    yield make
    for one in made:
        one.close()


def publish_all(port: int, topic: str, count: int, size: int, qos: int = 1, retain: bool = False, each: str = "") -> None:
    """Publishes numbered messages. Returns when each is acknowledged."""
    with Raw(port, timeout=60) as raw:
        raw.connect(fresh("pub"), keep_alive=0)
        # Larger messages would exceed the publisher's share of the publishes that wait for the broker.
        window, acknowledged = (20 if size < MIB else 3), 0
        for n in range(count):
            payload = b"%06d" % n
            raw.send(wire.publish(topic + each.format(n), payload.ljust(size, b"."), qos, 1 + n % window, retain=retain))
            while n + 1 - acknowledged >= window or acknowledged < n + 1 == count:
                packet = raw.recv()
                assert packet.reason in (0, 0x10), packet
                if packet.kind == wire.PUBREC:
                    raw.send(wire.ack(wire.PUBREL, packet.packet_id))
                else:
                    assert packet.kind in (wire.PUBACK, wire.PUBCOMP), packet
                    acknowledged += 1


def take_all(one, count: int) -> list[int]:
    """Reads and acknowledges that many messages. Returns their numbers."""
    numbers = []
    while len(numbers) < count:
        packet = one.recv()
        if packet.kind == wire.PUBLISH:
            numbers.append(int(packet.payload[:6]))
            if packet.qos:
                one.send(wire.ack(wire.PUBACK if packet.qos == 1 else wire.PUBREC, packet.packet_id))
        elif packet.kind == wire.PUBREL:
            one.send(wire.ack(wire.PUBCOMP, packet.packet_id))
        else:
            raise AssertionError(f"got {packet}")
    return numbers


def assert_nothing_is_lost(edge) -> None:
    metrics = edge.metrics()
    assert metrics.sum("tidegate_messages_dropped_total") == 0, metrics.series("tidegate_messages_dropped_total")
    assert all(one["gaps"] == 0 for one in edge.api("/api/v1/sessions")["sessions"])


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("transport", ["tcp", "tls", "ws", "wss", "quic", "stream", "webtransport"])
def test_a_connected_subscriber_gets_everything(roomy_edge, subscriber, transport, load):
    count, size = LOADS[load]
    topic = fresh()
    one = subscriber(transport)
    one.subscribe((topic, 1))
    publisher = threading.Thread(target=publish_all, args=(roomy_edge["tcp"].port, topic, count, size), daemon=True)
    publisher.start()
    assert take_all(one, count) == list(range(count))
    publisher.join()
    assert_nothing_is_lost(roomy_edge)


@pytest.mark.parametrize("name,qos,receive_maximum", [("", 2, None), ("$share/g/", 1, None), ("", 1, 1)])
def test_other_subscriptions_of_a_connected_client_get_everything(roomy_edge, subscriber, name, qos, receive_maximum):
    """QoS 2 and shared subscriptions; a small Receive Maximum, with which nearly all messages wait in the queue."""
    topic, (count, size) = fresh(), LOADS["many"]
    one = subscriber("tcp", receive_maximum=receive_maximum)
    one.subscribe((name + topic, qos))
    publish_all(roomy_edge["tcp"].port, topic, count, size, qos)
    assert take_all(one, count) == list(range(count))
    assert_nothing_is_lost(roomy_edge)


@pytest.mark.parametrize("transport", ["tcp", "quic"])
def test_a_connected_subscriber_gets_all_retained_messages(roomy_edge, subscriber, transport):
    """More bytes than may wait for a client that is away."""
    topic, count = fresh(), 200
    publish_all(roomy_edge["tcp"].port, topic, count, 100_000, retain=True, each="/{}")
    one = subscriber(transport)
    send_subscribe(one, topic + "/#")
    assert sorted(take_all(one, count)) == list(range(count))
    assert_nothing_is_lost(roomy_edge)


def send_subscribe(one, name: str) -> None:
    """The SUBACK may come before or after the retained messages."""
    recv, packets = one.recv, []
    one.send(wire.subscribe(1, (name, 1)))

    def without_suback() -> wire.Packet:
        packet = recv()
        while packet.kind == wire.SUBACK:
            packets.append(packet)
            packet = recv()
        return packet

    one.recv = without_suback
