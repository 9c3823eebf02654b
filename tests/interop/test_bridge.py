"""Bridges: a mosquitto that connects to Tidegate as its remote broker, and the bridge bit of the protocol level."""

from __future__ import annotations

import pytest

from harness import wire
from harness.mosquitto import Mosquitto
from harness.names import fresh
from harness.paho import Paho
from harness.phone import Phone
from harness.raw import Raw

VERSIONS = ("mqttv31", "mqttv311", "mqttv50")


class Place:
    """The listener of a mosquitto, as paho's helper names it."""

    transport = "tcp"

    def __init__(self, broker: Mosquitto):
        self.port = broker.port

    def cut(self) -> None:
        raise NotImplementedError


@pytest.fixture
def bridged(own_broker):
    """Makes a mosquitto that bridges the topics below `both`, `up` (out) and `down` (in) to Tidegate."""

    def make(port: int, version: str, topic: str, **more) -> Mosquitto:
        lines = [
            # The defaults. With 65535, mosquitto 2.0.11 as a bridge of MQTT 5 sends Receive Maximum 0.
            "max_inflight_messages 20",
            "max_queued_messages 1000",
            "connection edge",
            f"address 127.0.0.1:{port}",
            f"bridge_protocol_version {version}",
            f"remote_clientid {fresh('bridge')}",
            f"topic {topic}/both/# both 1",
            f"topic {topic}/up/# out 1",
            f"topic {topic}/down/# in 1",
            "restart_timeout 1",
            *(f"{key} {value}" for key, value in more.items()),
        ]
        return own_broker(extra="\n".join(lines) + "\n")

    return make


@pytest.fixture
def inside():
    """Makes paho clients of the mosquitto that is the bridge."""
    made = []

    def make(broker: Mosquitto, **kwargs) -> Paho:
        one = Paho(Place(broker), fresh("inner"), **kwargs)
        made.append(one)
        return one

    yield make
    for one in made:
        one.close()


def wait_bridged(edge, outer: Paho, inner: Paho, topic: str) -> None:
    """Waits until messages pass the bridge in both directions."""
    inner.subscribe(f"{topic}/both/ready/#")
    outer.subscribe(f"{topic}/both/ready/#")
    inner.publish(f"{topic}/both/ready/up", "up")
    assert outer.next(30).text == "up"
    outer.publish(f"{topic}/both/ready/down", "down")
    assert outer.next().text == "down"
    assert inner.take(2)[1].text == "down"
    for one in (inner, outer):
        one.unsubscribe(f"{topic}/both/ready/#")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_mosquitto_bridge_with_its_defaults_carries_each_message_once(edge, client, bridged, inside, version):
    topic, since, before = fresh(), edge.mark(), edge.metrics()
    broker = bridged(edge["tcp"].port, version, topic)
    inner, outer = inside(broker), client(edge)
    wait_bridged(edge, outer, inner, topic)
    for one in (inner, outer):
        one.subscribe(f"{topic}/#")
    for n in range(20):
        inner.publish(f"{topic}/both/x", f"inner {n}", 1, wait=False)
        outer.publish(f"{topic}/both/x", f"outer {n}", 1, wait=False)
    inner.publish(f"{topic}/up/x", "up")
    outer.publish(f"{topic}/down/x", "down")
    wanted = sorted([f"{side} {n}" for side in ("inner", "outer") for n in range(20)] + ["up", "down"])
    # An echo would come in the order of the topic, so before the marker.
    got = []
    for one in (outer, inner):
        taken = one.take(len(wanted))
        got.append(sorted(m.text for m in taken))
    assert got == [wanted, wanted]
    for one, other in ((inner, outer), (outer, inner)):
        one.publish(f"{topic}/both/x", "marker")
        assert [one.next().text, other.next().text] == ["marker", "marker"]
    # The bridge's will and its retained notification are dropped, counted, and no offence.
    def dropped(metrics):
        return metrics.sum("tidegate_messages_dropped_total", reason="^acl$")

    edge.wait_metric("the state of the bridge is dropped twice", lambda m: dropped(m) >= dropped(before) + 2)
    assert not edge.service.grep("Denied: ", since)
    assert not edge.service.grep("Connection refused", since)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_bridge_gets_live_messages_with_retain_as_published(edge, client, bridged, inside, version):
    topic = fresh()
    broker = bridged(edge["tcp"].port, version, topic)
    inner, outer = inside(broker), client(edge)
    wait_bridged(edge, outer, inner, topic)
    inner.subscribe(f"{topic}/down/live")
    outer.publish(f"{topic}/down/live", "kept", retain=True)
    assert inner.next().text == "kept"
    late = inside(broker)
    late.subscribe(f"{topic}/down/#")
    got = late.next()
    assert (got.text, got.retain) == ("kept", True)
    outer.publish(f"{topic}/down/live", "", retain=True)
    assert late.next().payload == b""


@pytest.mark.parametrize("version", ("mqttv311", "mqttv50"))
def test_a_bridge_that_comes_back_gets_no_echoes(edge, client, bridged, inside, version):
    topic = fresh()
    broker = bridged(edge["tcp"].port, version, topic)
    inner, outer = inside(broker), client(edge)
    wait_bridged(edge, outer, inner, topic)
    inner.close()
    since = edge.mark()
    broker.stop()
    edge.wait_log(r"Connection ended: .*client_id=\"bridge-", since)
    outer.publish(f"{topic}/down/x", "while away")
    broker.start()
    inner = inside(broker)
    wait_bridged(edge, outer, inner, topic)
    outer.subscribe(f"{topic}/#")
    inner.subscribe(f"{topic}/both/#")
    inner.publish(f"{topic}/both/x", "mine")
    outer.until("mine")
    outer.publish(f"{topic}/both/x", "marker")
    assert [m.text for m in inner.until("marker")] == ["mine"]


def test_before_a_broker_of_311_a_bridge_falls_back_to_the_plain_protocol(own_broker, own_edge, client, bridged, inside):
    """No Local is impossible there, so the bridge is told that its level is not served."""
    edge = own_edge(own_broker().url, upstream={"protocol": "3.1.1"}).start()
    edge.wait_log(r"The broker was probed")
    topic, since = fresh(), edge.mark()
    broker = bridged(edge["tcp"].port, "mqttv311", topic)
    inner, outer = inside(broker), client(edge)
    outer.subscribe(f"{topic}/up/#")
    edge.wait_log(r"Connection refused: a bridge asks for No Local", since)
    edge.wait_log(r"Client connected|Session resumed", since, 40)
    inner.publish(f"{topic}/up/x", "up")
    assert outer.next(30).text == "up"


def connack(edge, transport: str, raw_bytes: bytes, version: int) -> wire.Packet:
    if transport == "quic":
        with Phone(edge["quic"].port, edge.pki.ca, version=version) as phone:
            return phone.send(0, raw_bytes).recv()
    with Raw(edge[transport].port, transport, ca=edge.pki.ca, version=version) as raw:
        return raw.send(raw_bytes).recv()


@pytest.mark.parametrize("transport", ("tcp", "tls", "ws", "wss", "quic"))
@pytest.mark.parametrize("version", (3, 4))
def test_the_bridge_bit_is_served_over_every_transport(edge, transport, version):
    packet = wire.connect(fresh("bit"), version=version, bridge=True)
    assert connack(edge, transport, packet, version).body == b"\x00\x00"


UNKNOWN = {
    # name and level -> (version of the answer, its body)
    (b"MQTT", 0x85): (5, b"\x00\x84\x00"),
    (b"MQTT", 0x86): (5, b"\x00\x84\x00"),
    (b"MQTT", 0x06): (5, b"\x00\x84\x00"),
    (b"MQTT", 0x03): (4, b"\x00\x01"),
    (b"MQTT", 0x83): (4, b"\x00\x01"),
    (b"MQTT", 0x80): (4, b"\x00\x01"),
    (b"MQIsdp", 0x04): (3, b"\x00\x01"),
    (b"MQIsdp", 0x84): (3, b"\x00\x01"),
    (b"MQIsdp", 0x05): (3, b"\x00\x01"),
}


@pytest.mark.parametrize("transport", ("tcp", "ws", "quic"))
@pytest.mark.parametrize("name, level", UNKNOWN)
def test_an_unknown_level_is_answered_in_the_clients_form(edge, transport, name, level):
    version, body = UNKNOWN[name, level]
    rest = b"\x02\x00\x3c" + (b"\x00" if level & 0x7F >= 5 and name == b"MQTT" else b"") + wire.text("x")
    packet = wire.packet(wire.CONNECT, wire.data(name) + bytes([level]) + rest)
    assert connack(edge, transport, packet, version).body == body


def test_the_bridge_bit_decides_about_a_resumed_session_too(edge, client):
    """The options of all subscriptions follow the connection, in both directions."""
    topic, me = fresh(), fresh("flip")
    other = client(edge)

    def session(bridge: bool) -> Paho:
        return client(edge, client_id=me, version=4, clean=False, bridge=bridge)

    def hears(one: Paho, mark: str) -> list[tuple[str, bool]]:
        one.publish(topic, f"own {mark}", 1, retain=True)
        other.publish(topic, f"other {mark}", 1, retain=True)
        got = [one.next()]
        while got[-1].text != f"other {mark}":
            got.append(one.next())
        # The acknowledgement of the last message may not have left before the connection ended.
        return [(m.text, m.retain) for m in got if not m.dup]

    one = session(bridge=True)
    one.subscribe(topic)
    for mark, bridge in enumerate((True, False, False, True)):
        one.close()
        one = session(bridge)
        assert one.session_present
        own = [] if bridge else [(f"own {mark}", False)]
        assert hears(one, str(mark)) == [*own, (f"other {mark}", bridge)]
    other.publish(topic, "", 1, retain=True)
    one.close()


def with_will(version: int, topic: str, bridge: bool) -> bytes:
    level = version | (0x80 if bridge else 0)
    flags = 0x02 | 0x04 | 0x20 | 1 << 3
    five = b"\x00" if version == 5 else b""
    body = wire.data(b"MQTT") + bytes([level, flags]) + b"\x00\x3c" + five + wire.text(fresh("will")) + five + wire.text(topic) + wire.text("0")
    return wire.packet(wire.CONNECT, body)


@pytest.mark.parametrize("version, bridge", ((4, True), (4, False), (5, False)))
@pytest.mark.parametrize("mount", ("", "tenant/"))
def test_the_state_of_a_bridge_is_dropped_without_a_refusal(own_broker, own_edge, version, bridge, mount):
    edge = own_edge(own_broker().url, listeners=[{"name": "tcp", "transport": "tcp", "bind": "127.0.0.1:0"} | ({"mount": mount} if mount else {})]).start()
    with Raw(edge["tcp"].port, version=version) as raw:
        state = "$SYS/broker/connection/a/b/state"
        assert raw.send(with_will(version, state, bridge)).recv().reason == 0
        for qos, answers in ((0, []), (1, [wire.PUBACK]), (2, [wire.PUBREC])):
            raw.send(wire.publish(state, b"1", qos, packet_id=qos, retain=True, version=version))
            for answer in answers:
                packet = raw.recv()
                assert (packet.kind, packet.reason) == (answer, 0)
        assert raw.send(wire.PING).recv().kind == wire.PINGRESP
        assert edge.metrics().sum("tidegate_messages_dropped_total", reason="^acl$") == 4
        assert edge.metrics().sum("tidegate_denied_total") == 0
        # Nothing else below $SYS is excepted.
        with Raw(edge["tcp"].port, version=version) as other:
            assert other.send(with_will(version, "$SYS/broker/connection/state", bridge)).recv().reason != 0
