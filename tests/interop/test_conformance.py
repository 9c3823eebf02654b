"""Statements of the standards that no other test covers; each test names its statement."""

from __future__ import annotations

import socket
import threading

import pytest

from harness import links, paho, wire
from harness.names import fresh
from harness.process import wait_until
from harness.raw import Raw

QUICK = {"backoff_min": "20ms", "backoff_max": "200ms"}


@pytest.fixture
def before(own_broker, own_edge):
    """A Tidegate before a mosquitto with additional configuration lines."""

    def make(extra: str = "", of_listener: str = "", **upstream):
        broker = own_broker(extra=extra, of_listener=of_listener)
        edge = own_edge(broker.url, ("tcp",), upstream={"servers": [broker.url]} | QUICK | upstream).start()
        edge.wait_log(r"Link to the broker is up")
        return broker, edge

    return make


@pytest.mark.parametrize("retain", (False, True))
@pytest.mark.parametrize("version", (5, 4))
def test_a_will_is_retained_if_it_says_so(edge, client, retain, version):
    """[MQTT-3.1.2-14] and -15; of 3.1.1 [MQTT-3.1.2-16] and -17."""
    topic, watcher = fresh(), client(edge)
    watcher.subscribe(topic)
    way = links.Way(edge, "tcp")
    try:
        one = paho.Paho(way, fresh("w"), version=version, will={"topic": topic, "payload": "gone", "qos": 1, "retain": retain})
        way.cut()
        one.abandon()
    finally:
        way.close()
    assert watcher.next().text == "gone"
    late = client(edge)
    late.subscribe(topic)
    if retain:
        got = late.next()
        assert (got.text, got.retain) == ("gone", True)
        watcher.publish(topic, "", retain=True)
    else:
        assert late.until_marker(watcher, topic) == []


@pytest.mark.parametrize("protocol", ("5", "3.1.1"))
def test_an_idle_link_pings_within_its_keep_alive(before, protocol):
    """[MQTT-3.1.2-20]; of 3.1.1 [MQTT-3.1.2-23]."""
    broker, edge = before(keepalive="1s", protocol=protocol)
    since = broker.mark()
    for link in ("d0", "d1", "p0", "p1", "r0"):
        wait_until(f"{link} pings twice", lambda: len([l for l in broker.received("PINGREQ", since) if l.endswith(f"-{link}")]) >= 2)
    assert edge.metrics().sum("tidegate_upstream_link_disconnects_total") == 0


def test_the_brokers_keep_alive_overrides_ours(before):
    """[MQTT-3.1.2-21], [MQTT-3.2.2-21]: mosquitto sends Server Keep Alive."""
    broker, edge = before("max_keepalive 10\n", keepalive="60s")
    since = broker.mark()
    wait_until("d0 pings", lambda: [l for l in broker.received("PINGREQ", since) if l.endswith("-d0")], 20)
    assert edge.metrics().sum("tidegate_upstream_link_disconnects_total") == 0


@pytest.mark.parametrize("version", (5, 4))
@pytest.mark.parametrize("name", ("a", "0", "Z", "0123456789abcdefghijklm", "nopqrstuvwxyzABCDEFGHIJ", "KLMNOPQRSTUVWXYZ0123456"))
def test_client_identifiers_of_letters_and_digits_are_accepted(edge, version, name):
    """[MQTT-3.1.3-5]."""
    with Raw(edge["tcp"].port, version=version) as raw:
        assert raw.connect(name).reason == 0


@pytest.mark.parametrize("version", (5, 4))
def test_nothing_behind_a_refused_connect_is_processed(edge, client, version):
    """[MQTT-3.1.4-6]; of 3.1.1 [MQTT-3.1.4-5]."""
    topic, watcher = fresh(), client(edge)
    watcher.subscribe(topic)
    with Raw(edge["tcp"].port, version=version) as raw:
        method = {"props": b"\x15\x00\x01x"} if version == 5 else {"clean": False}
        raw.send(wire.connect("" if version == 4 else fresh("x"), version=version, **method) + wire.publish(topic, b"no", version=version))
        packets, _ = raw.wait_closed()
        assert len(packets) == 1 and packets[0].kind == wire.CONNACK and packets[0].body[1] != 0
    assert watcher.until_marker(watcher, topic) == []


def test_a_malformed_connect_of_3_1_1_gets_no_connack(edge):
    """[MQTT-3.1.4-1] of 3.1.1."""
    with Raw(edge["tcp"].port, version=4) as raw:
        raw.send(wire.packet(wire.CONNECT, b"\x00\x04MQTT\x04\x02\x00\x3c\x00\x09short"))
        assert raw.wait_closed()[0] == []


def test_an_unknown_level_is_answered_with_return_code_1(edge):
    """[MQTT-3.1.2-2] of 3.1.1."""
    with Raw(edge["tcp"].port, version=4) as raw:
        raw.send(wire.packet(wire.CONNECT, b"\x00\x04MQTT\x02\x02\x00\x3c\x00\x04abcd"))
        (connack,), _ = raw.wait_closed()
        assert connack.kind == wire.CONNACK and connack.body[:2] == b"\x00\x01"


def test_a_broker_with_session_present_for_a_new_session_loses_the_link(own_edge):
    """[MQTT-3.2.2-4]: the link closes."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                one, _ = server.accept()
            except OSError:
                return
            try:
                one.recv(1000)
                one.sendall(wire.packet(wire.CONNACK, b"\x01\x00\x00"))
                one.recv(1000)
                one.close()
            except OSError:
                pass

    threading.Thread(target=serve, daemon=True).start()
    try:
        url = f"mqtt://127.0.0.1:{server.getsockname()[1]}"
        edge = own_edge(url, ("tcp",), upstream={"servers": [url], "probe": "off"} | QUICK).start()
        edge.wait_log(r"No link to the broker is up: the broker says Session Present")
    finally:
        server.close()


def test_a_broker_without_qos_2_gets_qos_1(before, client):
    """[MQTT-3.2.2-9] to [MQTT-3.2.2-12]."""
    _, edge = before(of_listener="max_qos 1\n")
    one, old = client(edge), client(edge, version=4)
    assert one.connack_props.MaximumQoS == 1
    topic = fresh()
    assert one.subscribe((topic, 2), expect=None) == [1]
    old.publish(topic, "old", qos=2)
    got = one.next()
    assert (got.text, got.qos) == ("old", 1)
    with Raw(edge["tcp"].port) as raw:
        raw.connect(fresh("x"))
        raw.send(wire.publish(topic, b"no", 2, 1))
        packets, _ = raw.wait_closed()
        assert packets[-1].kind == wire.DISCONNECT and packets[-1].body[0] == 0x9B
    refused = paho.Paho(links.Way(edge, "tcp"), fresh("w"), will={"topic": topic, "payload": "x", "qos": 2}, connect=False)
    refused.connect(expect=0x9B)
    assert one.until_marker(one, topic) == []


def test_a_broker_without_retained_messages_gets_no_retain_flag(before, client):
    """[MQTT-3.2.2-13], [MQTT-3.2.2-14]."""
    broker, edge = before("retain_available false\n")
    one, old, topic = client(edge), client(edge, version=4), fresh()
    assert one.connack_props.RetainAvailable == 0
    one.subscribe(topic)
    # A 3.1.1 client cannot be answered with a reason; its publish is forwarded without RETAIN.
    old.publish(topic, "old", retain=True)
    assert one.next().text == "old"
    assert [l for l in broker.received("PUBLISH") if topic in l and ", r0," in l]
    assert not [l for l in broker.received("PUBLISH") if topic in l and ", r1," in l]
    refused = paho.Paho(links.Way(edge, "tcp"), fresh("w"), will={"topic": topic, "payload": "x", "retain": True}, connect=False)
    refused.connect(expect=0x9A)
    assert edge.metrics().sum("tidegate_upstream_link_disconnects_total") == 0


def test_a_publish_that_grows_above_the_brokers_maximum_packet_size_is_not_sent(before, client):
    """[MQTT-3.2.2-15]: a 3.1.1 publish grows on its way to an MQTT 5 broker by the property for No Local."""
    _, edge = before("max_packet_size 2000\n")
    one, topic = client(edge), fresh()
    assert one.connack_props.MaximumPacketSize <= 2000
    one.subscribe(topic, noLocal=True)
    most = one.connack_props.MaximumPacketSize
    with Raw(edge["tcp"].port) as raw:
        raw.connect(fresh("x"))
        raw.subscribe((topic, 1))
        for size in range(most - 60 - len(topic), most - 4 - len(topic)):
            packet = wire.publish(topic, b"x" * size, 1, 7)
            if len(packet) > most:
                break
            raw.send(packet)
            while (answer := raw.recv()).kind == wire.PUBLISH:
                raw.send(wire.ack(wire.PUBACK, answer.packet_id))
            assert answer.kind == wire.PUBACK
    assert edge.metrics().sum("tidegate_upstream_link_disconnects_total") == 0


@pytest.mark.parametrize("first", (True, False))
def test_the_codes_of_an_unsuback_are_in_order(edge, first):
    """[MQTT-3.11.3-1]."""
    topic = fresh()
    with Raw(edge["tcp"].port) as raw:
        raw.connect(fresh("x"))
        raw.subscribe((topic, 1))
        names = [topic, f"{topic}/unknown"] if first else [f"{topic}/unknown", topic]
        body = b"\x00\x09\x00" + b"".join(wire.text(n) for n in names)
        raw.send(wire.packet(wire.UNSUBSCRIBE, body, 2))
        unsuback = raw.recv()
        assert unsuback.body[3:] == (b"\x00\x11" if first else b"\x11\x00")


@pytest.mark.parametrize("version", (5, 4))
@pytest.mark.parametrize("transport", ("tcp", "ws"))
def test_suback_comes_first_then_retained_messages_then_live_ones(edge, client, transport, version):
    """The order of a broker; filters that are new to the broker, and then filters that it has."""
    topic, publisher = fresh(), client(edge)
    names = [f"{topic}/a", f"{topic}/b"]
    for name in names:
        publisher.publish(name, "stored", retain=True)
    for _ in range(3):
        with Raw(edge[transport].port, transport, version=version) as raw:
            raw.connect(fresh("x"))
            raw.send(wire.subscribe(1, (names[0], 1), (f"{topic}/b/#", 1), version=version))
            assert raw.recv().kind == wire.SUBACK
            for name in names:
                publisher.publish(name, "live")
            got = [raw.recv() for _ in range(4)]
            assert all(packet.kind == wire.PUBLISH for packet in got)
            for name in names:
                mine = [packet.body for packet in got if name.encode() in packet.body]
                assert [body.endswith(b"stored") for body in mine] == [True, False], mine
    for name in names:
        publisher.publish(name, "", retain=True)


def test_our_disconnect_has_no_session_expiry_interval(edge):
    """[MQTT-3.14.2-2]."""
    name = fresh("x")
    with Raw(edge["tcp"].port) as one, Raw(edge["tcp"].port) as two:
        one.connect(name, expiry=100)
        two.connect(name, expiry=100)
        packets, _ = one.wait_closed()
        said = packets[-1]
        assert said.kind == wire.DISCONNECT and said.body[0] == 0x8E
        assert b"\x11" not in said.body[2:3]


@pytest.mark.parametrize("qos", (1, 2))
def test_a_delivery_that_a_client_refused_does_not_come_again(edge, client, qos):
    """[MQTT-4.4.0-2]."""
    name, topic, pub = fresh("x"), fresh(), client(edge)
    with Raw(edge["tcp"].port) as raw:
        raw.connect(name, expiry=100)
        raw.subscribe((topic, 2))
        pub.publish(topic, "refused", qos)
        got = raw.recv()
        kind = wire.PUBACK if qos == 1 else wire.PUBREC
        raw.send(wire.packet(kind, got.packet_id.to_bytes(2, "big") + b"\x83\x00"))
        raw.send(wire.PING)
        assert raw.recv().kind == wire.PINGRESP
    with Raw(edge["tcp"].port) as raw:
        raw.connect(name, clean=False, expiry=100)
        pub.publish(topic, "next", qos)
        assert raw.recv().payload == b"next"


def test_members_of_a_group_get_their_own_qos(edge, client):
    """[MQTT-4.8.2-3]."""
    topic, pub = fresh(), client(edge)
    members = {level: client(edge) for level in (0, 1)}
    for level, member in members.items():
        member.subscribe((f"$share/g/{topic}", level))
    for n in range(20):
        pub.publish(topic, str(n), qos=2)
    got: dict = {level: [] for level in members}

    def all_came() -> bool:
        for level, member in members.items():
            while not member.incoming.empty():
                got[level].append(member.incoming.get())
        return sum(map(len, got.values())) == 20

    wait_until("all came", all_came)
    assert all(m.qos == level for level, all_of in got.items() for m in all_of) and all(got.values())


def test_a_qos_2_delivery_of_a_group_ends_with_its_members_session(edge, client):
    """[MQTT-4.8.2-5]."""
    topic, pub, other = fresh(), client(edge), client(edge)
    with Raw(edge["tcp"].port) as raw:
        raw.connect(fresh("x"))
        raw.subscribe((f"$share/g/{topic}", 2))
        pub.publish(topic, "its own", qos=2)
        assert raw.recv().payload == b"its own"
        other.subscribe((f"$share/g/{topic}", 2))
    pub.publish(topic, "next", qos=2)
    assert other.next().text == "next"
    assert other.until_marker(pub, topic) == []


def test_the_newest_retained_message_counts_whatever_its_qos(edge, client):
    """[MQTT-3.3.1-7] of 3.1.1."""
    topic, pub = fresh(), client(edge, version=4)
    pub.publish(topic, "first", 1, retain=True)
    pub.publish(topic, "second", 0, retain=True)
    pub.publish(fresh(), "behind it", 1)
    late = client(edge, version=4)
    late.subscribe(topic)
    assert late.next().text == "second"
    pub.publish(topic, "", retain=True)


@pytest.mark.parametrize("protocol", ("5", "3.1.1"))
def test_a_links_last_packet_is_disconnect(before, protocol):
    """[MQTT-3.14.4-1], [MQTT-3.14.4-2] of 3.1.1: DISCONNECT is a link's last packet."""
    broker, edge = before(protocol=protocol)
    since = broker.mark()
    assert edge.stop() == 0
    links_of = ("d0", "d1", "p0", "p1", "r0")
    wait_until("all said it", lambda: len([l for l in broker.received("DISCONNECT", since) if l.endswith(tuple(f"-{n}" for n in links_of))]) == len(links_of))
    for name in links_of:
        mine = [l for l in broker.service.grep(rf"Received \w+ from \S+-{name}\b", since)]
        assert "DISCONNECT" in mine[-1]
