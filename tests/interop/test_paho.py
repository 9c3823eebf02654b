"""paho-mqtt: MQTT 5 features end to end, over every transport."""

from __future__ import annotations

import json
import time

import pytest

from harness.edge import TRANSPORTS
from harness.names import fresh
from harness.process import wait_until
from harness.raw import Raw
from harness import wire

each_transport = pytest.mark.parametrize("transport", TRANSPORTS)


@each_transport
@pytest.mark.parametrize("version", (4, 5))
def test_messages_of_each_qos_arrive_in_order(edge, client, transport, version):
    topic = fresh()
    sub, pub = client(edge, transport, version=version), client(edge, transport, version=version)
    sub.subscribe((f"{topic}/#", 2))
    for qos in (0, 1, 2):
        mids = [pub.publish(f"{topic}/{qos}", f"{n}", qos, wait=False) for n in range(40)]
        for mid in mids:
            pub.wait_published(mid)
    got = sub.take(120)
    for qos in (0, 1, 2):
        mine = [m for m in got if m.topic == f"{topic}/{qos}"]
        assert [m.text for m in mine] == [f"{n}" for n in range(40)]
        assert {m.qos for m in mine} == {qos} and not any(m.dup or m.retain for m in mine)
    assert sub.until_marker(pub, f"{topic}/end") == []


@each_transport
def test_properties_round_trip(edge, client, transport):
    topic = fresh()
    sub, pub = client(edge, transport), client(edge, transport)
    sub.subscribe(topic)
    users = [("b", "2"), ("a", "1"), ("b", "3"), ("ü", "snow ☃")]
    pub.publish(topic, "hello", 1, UserProperty=users, ContentType="text/plain", ResponseTopic="reply/here", CorrelationData=b"\x00\x01\xff", PayloadFormatIndicator=1, MessageExpiryInterval=100)
    got = sub.next()
    assert got.props.UserProperty == users
    assert (got.props.ContentType, got.props.ResponseTopic, got.props.CorrelationData, got.props.PayloadFormatIndicator) == ("text/plain", "reply/here", b"\x00\x01\xff", 1)
    assert 95 <= got.props.MessageExpiryInterval <= 100
    assert not hasattr(got.props, "SubscriptionIdentifier") and not hasattr(got.props, "TopicAlias")


def test_message_expiry_counts_down_and_expired_messages_are_dropped(edge, client, way):
    topic, me = fresh(), fresh("id")
    line = way(edge)
    sub = client(edge, via=line, client_id=me, expiry=300)
    sub.subscribe(topic)
    line.cut()
    sub.abandon()
    pub = client(edge)
    pub.publish(topic, "short", 1, MessageExpiryInterval=1)
    pub.publish(topic, "long", 1, MessageExpiryInterval=60)
    # Real time must pass here, because expiry is in whole seconds.
    time.sleep(2.2)
    back = client(edge, client_id=me, clean=False, expiry=300)
    assert back.session_present
    (only,) = back.until_marker(pub, topic)
    assert only.text == "long" and 50 <= only.props.MessageExpiryInterval <= 58


def test_topic_aliases_from_the_client_are_resolved(edge, client):
    """paho never sends topic aliases, so the test sends hand-made packets and receives with paho."""
    topic = fresh()
    sub = client(edge)
    sub.subscribe(f"{topic}/#")
    with Raw(edge["tcp"].port) as raw:
        connack = raw.connect(fresh("id"))
        assert b"\x22" in connack.body, "CONNACK announces no Topic Alias Maximum"
        alias = b"\x23\x00\x01"
        raw.send(wire.publish(f"{topic}/a", b"1", 1, 1, props=alias) + wire.publish("", b"2", 1, 2, props=alias))
        raw.send(wire.publish(f"{topic}/b", b"3", 1, 3, props=alias) + wire.publish("", b"4", 1, 4, props=alias))
        assert [raw.recv().packet_id for _ in range(4)] == [1, 2, 3, 4]
    got = sub.take(4)
    assert [(m.topic, m.text) for m in got] == [(f"{topic}/a", "1"), (f"{topic}/a", "2"), (f"{topic}/b", "3"), (f"{topic}/b", "4")]
    assert not any(hasattr(m.props, "TopicAlias") for m in got)


def test_topic_aliases_to_the_client_name_the_right_topics(edge, client):
    """Within the client's maximum the server may use them; each message's topic must be right all the same."""
    topic = fresh()
    pub = client(edge)
    with Raw(edge["tcp"].port) as raw:
        raw.connect(fresh("id"), props=b"\x22\x00\x02")
        raw.subscribe((f"{topic}/#", 1))
        names = [f"{topic}/{n % 4}" for n in range(20)]
        for n, one in enumerate(names):
            pub.publish(one, f"{n}")
        known, seen = {}, []
        for _ in names:
            packet = raw.recv()
            assert packet.kind == wire.PUBLISH
            raw.send(wire.ack(wire.PUBACK, packet.packet_id))
            alias = alias_of(packet)
            said = packet.topic
            if alias is not None:
                assert 1 <= alias <= 2
                if said:
                    known[alias] = said
                said = known[alias]
            seen.append((said, packet.payload.decode()))
        assert seen == [(one, f"{n}") for n, one in enumerate(names)]


def alias_of(packet) -> int | None:
    raw = packet.body
    at = 2 + int.from_bytes(raw[:2], "big") + (2 if packet.qos else 0)
    size, at = wire.read_varint(raw, at)
    props = raw[at : at + size]
    # The only possible property is an alias, since the publisher sets none.
    return int.from_bytes(props[1:3], "big") if props[:1] == b"\x23" else None


@pytest.mark.parametrize("version", (4, 5))
def test_a_retained_message_comes_only_where_there_is_one(edge, client, version):
    topic = fresh()
    pub = client(edge, version=version)
    pub.publish(f"{topic}/a", "kept", 1, retain=True)
    first, second = client(edge, "ws", version=version), client(edge, "tls", version=version)
    for one in (first, second):
        one.subscribe(f"{topic}/#")
        got = one.next()
        assert (got.text, got.retain, got.topic) == ("kept", True, f"{topic}/a")
    # A topic without a retained message yields none, at the first and at the second SUBSCRIBE.
    for one in (first, second):
        one.subscribe(f"{topic}/none/+")
        assert one.until_own_marker(pub, f"{topic}/b") == []
    # A client does not see another's fetch: `first` gets no message when `second` subscribes again.
    second.subscribe(f"{topic}/#")
    assert [m.text for m in second.until_own_marker(pub, f"{topic}/b")] == ["kept"]
    first.until_own_marker(pub, f"{topic}/b")
    pub.publish(f"{topic}/a", "", 1, retain=True)


@pytest.mark.parametrize("handling,first,again", [(0, 1, 1), (1, 1, 0), (2, 0, 0)])
def test_retain_handling_is_obeyed(edge, client, handling, first, again):
    topic = fresh()
    pub, sub = client(edge), client(edge)
    pub.publish(topic, "kept", 1, retain=True)
    for expected in (first, again):
        sub.subscribe(topic, retainHandling=handling)
        assert [m.text for m in sub.until_marker(pub, topic)] == ["kept"] * expected


def test_retain_as_published_is_obeyed(edge, client):
    topic = fresh()
    pub, plain, asis = client(edge), client(edge), client(edge)
    plain.subscribe(topic)
    asis.subscribe(topic, retainAsPublished=True)
    pub.publish(topic, "r", 1, retain=True)
    pub.publish(topic, "n", 1)
    assert [(m.text, m.retain) for m in plain.take(2)] == [("r", False), ("n", False)]
    assert [(m.text, m.retain) for m in asis.take(2)] == [("r", True), ("n", False)]
    pub.publish(topic, "", 1, retain=True)


def test_no_local_hides_the_clients_own_messages(edge, client):
    topic = fresh()
    me, other = client(edge), client(edge)
    me.subscribe(topic, noLocal=True)
    me.publish(topic, "mine")
    other.publish(topic, "theirs")
    assert me.next().text == "theirs"
    # An identical message of another client is not the client's own.
    me.publish(topic, "same")
    other.publish(topic, "same")
    assert [m.text for m in me.until_marker(other, topic)] == ["same"]


@pytest.mark.parametrize("version", (4, 5))
def test_overlapping_filters_give_one_copy_at_the_highest_qos(edge, client, version):
    topic = fresh()
    sub, other, pub = client(edge, version=version), client(edge, version=version), client(edge)
    sub.subscribe((f"{topic}/#", 0), (f"{topic}/+", 2), (f"{topic}/a", 1))
    other.subscribe((f"{topic}/a", 1))
    for n in range(10):
        pub.publish(f"{topic}/a", f"{n}", 2)
    got = sub.take(10)
    assert [(m.text, m.qos) for m in got] == [(f"{n}", 2) for n in range(10)]
    assert [(m.text, m.qos) for m in other.take(10)] == [(f"{n}", 1) for n in range(10)]
    assert sub.until_marker(pub, f"{topic}/a", 2) == [] and [m.text for m in other.incoming.queue][1:] == []


def test_subscription_identifiers_are_the_clients_own(edge, client):
    topic = fresh()
    one, two, pub = client(edge), client(edge), client(edge)
    one.subscribe(f"{topic}/#", identifier=7)
    one.subscribe(f"{topic}/+", identifier=268435455)
    two.subscribe(f"{topic}/a", identifier=9)
    pub.publish(f"{topic}/a", "x")
    assert sorted(one.next().props.SubscriptionIdentifier) == [7, 268435455]
    assert two.next().props.SubscriptionIdentifier == [9]
    one.subscribe(f"{topic}/+")
    pub.publish(f"{topic}/a", "y")
    assert one.next().props.SubscriptionIdentifier == [7]


@pytest.mark.parametrize("first,second", [("tcp", "wss"), ("ws", "tcp"), ("quic", "ws"), ("tls", "quic"), ("wss", "wss")])
def test_a_second_connection_takes_the_session_over(edge, client, first, second):
    me, topic = fresh("id"), fresh()
    old = client(edge, first, me, expiry=300, will={"topic": f"{topic}/will", "payload": "gone", "qos": 1})
    watcher = client(edge)
    watcher.subscribe(f"{topic}/#")
    old.subscribe(f"{topic}/mine")
    new = client(edge, second, me, clean=False, expiry=300)
    assert new.session_present
    assert old.wait_ended() == 0x8E and old.end_by_server
    watcher.publish(f"{topic}/mine", "x")
    assert new.next().text == "x"
    # The session goes on, but the old connection ended without DISCONNECT and with a will delay of 0.
    got = [m.text for m in watcher.until_own_marker(watcher, f"{topic}/end")]
    assert sorted(got) == ["gone", "x"]


def test_a_silent_client_is_closed_after_its_keep_alive(edge, client):
    with Raw(edge["tcp"].port) as raw:
        since = edge.mark()
        me = fresh("id")
        raw.connect(me, keep_alive=1)
        began = time.monotonic()
        packets, _ = raw.wait_closed()
        took = time.monotonic() - began
        assert 1.2 <= took <= 4, took
        assert [p.reason for p in packets if p.kind == wire.DISCONNECT] == [0x8D]
        edge.wait_log(me, since)


def test_pings_keep_a_quiet_client(edge, client):
    quiet = client(edge, keepalive=1)
    time.sleep(4)
    assert not quiet.ended.is_set()


@each_transport
def test_the_server_assigns_a_client_id(edge, client, transport):
    one, two = client(edge, transport, ""), client(edge, transport, "")
    ids = [c.connack_props.AssignedClientIdentifier for c in (one, two)]
    assert all(ids) and ids[0] != ids[1]
    given = client(edge, transport, fresh("id"))
    assert not hasattr(given.connack_props, "AssignedClientIdentifier")


def test_an_empty_client_id_of_3_1_1_needs_a_clean_session(edge):
    with Raw(edge["tcp"].port, version=4) as raw:
        assert raw.connect("", clean=True).reason == 0
    with Raw(edge["tcp"].port, version=4) as raw:
        assert raw.connect("", clean=False).reason == 2
        assert raw.wait_closed()[0] == []


@pytest.mark.parametrize("version", (4, 5))
def test_session_present_tells_the_truth(edge, client, version):
    me = fresh("id")
    keep = {"version": version} | ({"expiry": 300} if version == 5 else {})

    def come(clean: bool, **more) -> bool:
        one = client(edge, client_id=me, clean=clean, **(keep | more))
        one.close()
        left()
        return one.session_present

    def left() -> None:
        # DISCONNECT and the next CONNECT come on two connections, so their order is not fixed.
        def away() -> bool:
            status, body = edge.http(f"/api/v1/sessions/{me}")
            return status == 404 or not json.loads(body)["attached"]

        wait_until("the connection has ended", away)

    assert come(False) is False
    assert come(False) is True
    assert come(True) is False
    if version == 5:
        # A session that begins with Clean Start and an expiry is kept.
        assert come(False) is True
        assert come(False, expiry=0) is True
        assert come(False) is False
        # DISCONNECT may shorten the expiry.
        one = client(edge, client_id=me, clean=False, expiry=300)
        from harness.paho import PacketTypes, props
        from paho.mqtt.reasoncodes import ReasonCode

        one.close(reasoncode=ReasonCode(PacketTypes.DISCONNECT, "Normal disconnection"), properties=props(PacketTypes.DISCONNECT, SessionExpiryInterval=0))
        left()
        assert come(False) is False
    else:
        # Clean Session 1 ends with its connection.
        assert come(False) is False


def test_session_present_outlives_only_its_expiry(edge, client):
    me = fresh("id")
    one = client(edge, client_id=me, expiry=1)
    one.close()
    time.sleep(2.2)
    assert not client(edge, client_id=me, clean=False, expiry=1).session_present


def test_the_clients_receive_maximum_is_obeyed(edge, client):
    topic = fresh()
    pub = client(edge)
    with Raw(edge["tcp"].port) as raw:
        raw.connect(fresh("id"), receive_maximum=3)
        raw.subscribe((topic, 1))
        for n in range(10):
            pub.publish(topic, f"{n}")
        held = [raw.recv() for _ in range(3)]
        with pytest.raises(TimeoutError):
            raw.recv(0.3)
        assert not any(p.dup for p in held)
        seen = []
        while len(seen) < 10:
            packet = held.pop(0) if held else raw.recv()
            seen.append(packet.payload.decode())
            raw.send(wire.ack(wire.PUBACK, packet.packet_id))
        assert seen == [f"{n}" for n in range(10)]


def test_the_clients_maximum_packet_size_is_obeyed(edge, client):
    topic = fresh()
    small, normal, pub = client(edge, packet_maximum=200), client(edge), client(edge)
    for one in (small, normal):
        one.subscribe(topic)
    pub.publish(topic, "x" * 1000)
    pub.publish(topic, "fits")
    assert small.next().text == "fits"
    assert [len(m.payload) for m in normal.take(2)] == [1000, 4]


@each_transport
def test_qos_2_messages_arrive_once_across_a_cut(edge, client, way, transport):
    """A subscriber that is cut in the middle of many QoS 2 messages gets each message once."""
    topic, me = fresh(), fresh("id")
    line = way(edge, transport)
    sub = client(edge, transport, me, via=line, expiry=300)
    sub.subscribe((topic, 2))
    pub = client(edge)
    mids = [pub.publish(topic, f"{n}", 2, wait=False) for n in range(200)]
    got = sub.take(20)
    line.cut()
    for mid in mids:
        pub.wait_published(mid)
    sub.reconnect()
    assert sub.session_present
    rest = sub.until_marker(pub, topic, 2)
    assert [m.text for m in got + rest] == [f"{n}" for n in range(200)]


def test_a_resume_cancels_a_delayed_will(edge, client, way):
    topic, me = fresh(), fresh("id")
    watcher = client(edge)
    watcher.subscribe(f"{topic}/#")
    with Raw(edge["tcp"].port) as raw:
        raw.send(will_connect(me, f"{topic}/will", 2))
        assert raw.recv().reason == 0
        raw.reset()
    back = client(edge, client_id=me, clean=False, expiry=300)
    assert back.session_present
    time.sleep(2.5)
    assert watcher.until_marker(watcher, f"{topic}/end") == []
    # A will that is not cancelled fires once.
    with Raw(edge["tcp"].port) as raw:
        raw.send(will_connect(fresh("id"), f"{topic}/will", 1))
        assert raw.recv().reason == 0
        raw.reset()
    assert watcher.next().text == "gone"
    assert watcher.until_marker(watcher, f"{topic}/end") == []


def will_connect(me: str, topic: str, delay: int) -> bytes:
    body = wire.text("MQTT") + bytes([5, 0x02 | 0x04 | 0x08]) + (60).to_bytes(2, "big") + wire.properties(b"\x11" + (300).to_bytes(4, "big"))
    body += wire.text(me) + wire.properties(b"\x18" + delay.to_bytes(4, "big")) + wire.text(topic) + wire.text("gone")
    return wire.packet(wire.CONNECT, body)


def test_unsubscribe_ends_deliveries(edge, client):
    topic = fresh()
    sub, other, pub = client(edge), client(edge), client(edge)
    for one in (sub, other):
        one.subscribe(f"{topic}/a", f"{topic}/b")
    sub.unsubscribe(f"{topic}/a")
    pub.publish(f"{topic}/a", "x")
    pub.publish(f"{topic}/b", "y")
    assert sub.next().text == "y"
    assert [m.text for m in other.take(2)] == ["x", "y"]
    (code,) = sub.unsubscribe(f"{topic}/never")
    assert code.value == 0x11
