"""Bytes that no client library would send: each gets its reason code and log line, and other clients are not disturbed."""

from __future__ import annotations

import random
import socket
import time

import pytest

from harness import wire
from harness.edge import TRANSPORTS, Edge, config, listener
from harness.links import Way
from harness.loop import call
from harness.names import fresh
from harness.paho import Paho
from harness.quic_relay import QuicRelay, dial, vanish
from harness.raw import Closed, Raw, frame

PACKET_MAX = 65536
DEADLINE = 2.0


@pytest.fixture(scope="module")
def target(tmp_path_factory, broker, pki):
    """A binary with short deadlines and a small packet limit."""
    limits = {"packet_max": "64KiB", "accept_deadline": "2s", "packet_deadline": "2s", "receive_max": 10, "topic_alias_max": 5}
    # The noise tests have their own listeners, because lines about failed handshakes are limited per listener.
    listeners = [listener(t) for t in TRANSPORTS] + [listener(t, f"noise-{t}") for t in TRANSPORTS]
    edge = Edge(tmp_path_factory.mktemp("bad"), config(broker.url, pki, limits=limits, listeners=listeners), pki).start()
    yield edge
    edge.assert_sane()
    edge.close()


@pytest.fixture(scope="module")
def bystanders(target):
    """Clients on other transports that must not notice anything."""
    topic = fresh("bystander")
    ways = [Way(target, t) for t in ("tcp", "ws", "quic")]
    clients = [Paho(w, fresh("bystander"), keepalive=5) for w in ways]
    for one in clients:
        one.subscribe(f"{topic}/#")
    yield topic, clients
    for one in clients:
        one.close()
    for way in ways:
        way.close()


@pytest.fixture(autouse=True)
def nobody_else_is_disturbed(target, bystanders):
    since = target.mark()
    yield
    target.assert_sane(since)
    topic, clients = bystanders
    text = fresh("round")
    clients[0].publish(topic, text)
    for one in clients:
        assert [m.text for m in one.until(text)] == []
        assert not one.ended.is_set()


def with_code(me: str, code: int) -> str:
    """A log line that names the client and the reason code, in any order."""
    return rf"(?=.*{me})(?=.*(?:0x{code:02x}|code=\"?{code})\b).*"


def until_logged(target: Edge, attempt) -> None:
    """Repeats an attempt until its log line appears, because lines about refusals are limited in rate.

    `attempt` does it once and gives the pattern of its own line.
    """
    for _ in range(20):
        since = target.mark()
        pattern = attempt()
        try:
            target.wait_log(pattern, since, 0.5)
            return
        except AssertionError:
            continue
    raise AssertionError(f"never logged: {pattern}")


def peer(raw: Raw) -> str:
    return f"127.0.0.1:{raw.sock.getsockname()[1]}"


LONG = b"\x00\x05" + b"hello"
AFTER_CONNECT = {
    # The sent bytes -> the reason codes that fit them.
    "second CONNECT": (wire.connect("again"), {0x82}),
    "oversized, by its header alone": (b"\x30" + wire.varint(PACKET_MAX + 1), {0x95}),
    "the largest length there is": (b"\x30\xff\xff\xff\x7f", {0x95}),
    "length of five bytes": (b"\x30\x80\x80\x80\x80\x01", {0x81}),
    "length not in its shortest form": (b"\xc0\x80\x00", {0x81}),
    "topic longer than its packet": (b"\x30\x05\x00\x10abc", {0x81}),
    "body cut before the packet id": (wire.packet(wire.PUBLISH, b"\x00\x01a\x00", 2), {0x81}),
    "properties longer than the packet": (wire.packet(wire.PUBLISH, b"\x00\x01a\x7f\x01\x01"), {0x81}),
    "bad UTF-8 in a topic": (wire.publish(b"a\xc3\x28", b"x"), {0x81}),
    "a surrogate in a topic": (wire.publish(b"a\xed\xa0\x80", b"x"), {0x81}),
    "an overlong encoding in a topic": (wire.publish(b"\xc0\xaf", b"x"), {0x81}),
    "U+0000 in a topic": (wire.publish(b"a\x00b", b"x"), {0x81}),
    "bad UTF-8 in a filter": (wire.packet(wire.SUBSCRIBE, b"\x00\x01\x00\x00\x02\xff\xfe\x00", 2), {0x81}),
    "bad UTF-8 in a user property": (wire.publish("a", b"x", props=b"\x26\x00\x01\xff\x00\x01v"), {0x81}),
    "wildcard + in a topic": (wire.publish("a/+", b"x"), {0x90}),
    "wildcard # in a topic": (wire.publish("#", b"x"), {0x90}),
    "wildcard in a response topic": (wire.publish("a", b"x", props=b"\x08\x00\x01#"), {0x81, 0x82, 0x90}),
    "empty topic without an alias": (wire.publish("", b"x"), {0x82}),
    "alias 0": (wire.publish("a", b"x", props=b"\x23\x00\x00"), {0x82, 0x94}),
    "alias above the maximum": (wire.publish("a", b"x", props=b"\x23\x00\x06"), {0x94}),
    "alias never set": (wire.publish("", b"x", props=b"\x23\x00\x05"), {0x82}),
    "QoS 3": (wire.packet(wire.PUBLISH, b"\x00\x01a\x00\x01\x00x", 6), {0x81}),
    "QoS 0 with DUP": (wire.packet(wire.PUBLISH, b"\x00\x01a\x00x", 8), {0x81, 0x82}),
    "packet id 0": (wire.publish("a", b"x", 1, 0), {0x81, 0x82}),
    "reserved flags of PINGREQ": (b"\xc1\x00", {0x81}),
    "reserved flags of SUBSCRIBE": (wire.packet(wire.SUBSCRIBE, b"\x00\x01\x00\x00\x01a\x00", 0), {0x81}),
    "reserved flags of PUBREL": (wire.packet(wire.PUBREL, b"\x00\x01", 0), {0x81}),
    "reserved flags of DISCONNECT": (b"\xe1\x00", {0x81}),
    "packet type 0": (b"\x00\x00", {0x81, 0x82}),
    "PINGREQ with a body": (b"\xc0\x01x", {0x81}),
    "CONNACK from a client": (wire.packet(wire.CONNACK, b"\x00\x00\x00"), {0x82}),
    "SUBACK from a client": (wire.packet(wire.SUBACK, b"\x00\x01\x00\x00"), {0x82}),
    "PINGRESP from a client": (b"\xd0\x00", {0x82}),
    "SUBSCRIBE without a filter": (wire.packet(wire.SUBSCRIBE, b"\x00\x01\x00", 2), {0x82}),
    "UNSUBSCRIBE without a filter": (wire.packet(wire.UNSUBSCRIBE, b"\x00\x01\x00", 2), {0x82}),
    "reserved bits of subscription options": (wire.subscribe(1, ("a", 0xC0)), {0x81}),
    "QoS 3 in subscription options": (wire.subscribe(1, ("a", 3)), {0x81, 0x82}),
    "retain handling 3": (wire.subscribe(1, ("a", 0x30)), {0x82, 0x81}),
    "subscription identifier 0": (wire.subscribe(1, ("a", 0), props=b"\x0b\x00"), {0x82}),
    "No Local on a shared subscription": (wire.subscribe(1, ("$share/g/a", 4)), {0x82}),
    "a subscription identifier in a PUBLISH": (wire.publish("a", b"x", props=b"\x0b\x01"), {0x82}),
    "an unknown property": (wire.publish("a", b"x", props=b"\x7e\x00"), {0x81}),
    "a property of another packet": (wire.publish("a", b"x", props=b"\x11\x00\x00\x00\x01"), {0x81, 0x82}),
    "the same property twice": (wire.publish("a", b"x", props=b"\x01\x00\x01\x00"), {0x82}),
    "payload format 2": (wire.publish("a", b"x", props=b"\x01\x02"), {0x82}),
    "AUTH without a method": (wire.packet(wire.AUTH, b"\x18\x00"), {0x82}),
    "more than the Receive Maximum": (b"".join(wire.publish("over/the/limit", b"x", 2, n) for n in range(1, 13)), {0x93}),
    "an expiry set after none": (wire.packet(wire.DISCONNECT, b"\x00" + wire.properties(b"\x11\x00\x00\x01\x00")), {0x82}),
}


@pytest.mark.parametrize("what", AFTER_CONNECT)
def test_a_bad_packet_after_connect_gets_its_reason_code(target, what):
    raw_bytes, codes = AFTER_CONNECT[what]
    me = fresh("bad")
    with Raw(target["tcp"].port) as raw:
        since = target.mark()
        raw.connect(me, expiry=0)
        raw.send(raw_bytes)
        packets, _ = raw.wait_closed()
        ends = [p for p in packets if p.kind == wire.DISCONNECT]
        assert len(ends) == 1 and packets[-1].kind == wire.DISCONNECT, packets
        assert ends[0].reason in codes, f"DISCONNECT {ends[0].reason:#x}, expected {[hex(c) for c in codes]}"
        line = target.wait_log(with_code(me, ends[0].reason), since)
        assert "127.0.0.1:" in line


@pytest.mark.parametrize("transport", ("tls", "ws", "wss", "quic"))
def test_the_reason_code_gets_through_on_every_transport(target, transport):
    me = fresh("bad")
    relay = QuicRelay(target["quic"].port, target.pki.ca) if transport == "quic" else None
    port = relay.port if relay else target[transport].port
    with Raw(port, "tcp" if relay else transport, ca=target.pki.ca) as raw:
        since = target.mark()
        raw.connect(me)
        raw.send(wire.publish("a/#", b"x"))
        packets, _ = raw.wait_closed()
        assert [p.reason for p in packets] == [0x90]
        line = target.wait_log(with_code(me, 0x90), since)
        assert transport in line
    if relay:
        relay.close()


@pytest.mark.parametrize("transport", ("tcp", "quic"))
@pytest.mark.parametrize("version", (4, 5))
@pytest.mark.parametrize("qos,kind", ((1, wire.PUBACK), (2, wire.PUBREC)))
def test_a_publish_with_too_many_levels_is_answered_and_the_connection_goes_on(target, transport, version, qos, kind):
    relay = QuicRelay(target["quic"].port, target.pki.ca) if transport == "quic" else None
    port = relay.port if relay else target[transport].port
    with Raw(port, "tcp", version=version) as raw:
        raw.connect(fresh("deep"))
        # A client with a store sends it again.
        for dup in (False, True):
            raw.send(wire.publish("a" + "/b" * 128, b"x", qos, 7, version=version, dup=dup) + wire.PING)
            answer = raw.recv()
            assert (answer.kind, answer.packet_id, answer.reason) == (kind, 7, 0x90 if version == 5 else 0)
            assert raw.recv().kind == wire.PINGRESP
    if relay:
        relay.close()


@pytest.mark.parametrize("what", ["second CONNECT", "wildcard # in a topic", "bad UTF-8 in a topic", "QoS 3", "reserved flags of PINGREQ", "the largest length there is"])
def test_a_bad_packet_of_3_1_1_closes_the_connection(target, what):
    me = fresh("bad")
    bad = {
        "second CONNECT": wire.connect("again", version=4),
        "wildcard # in a topic": wire.publish("#", b"x", version=4),
        "bad UTF-8 in a topic": wire.publish(b"\xff", b"x", version=4),
        "QoS 3": wire.packet(wire.PUBLISH, b"\x00\x01a\x00\x01x", 6),
        "reserved flags of PINGREQ": b"\xc1\x00",
        "the largest length there is": b"\x30\xff\xff\xff\x7f",
    }[what]
    with Raw(target["tcp"].port, version=4) as raw:
        since = target.mark()
        assert raw.connect(me).reason == 0
        raw.send(bad)
        assert raw.wait_closed()[0] == []
        target.wait_log(rf"(?=.*{me})(?=.*(malformed|protocol_error|topic|packet_too_large)).*", since)


def connect_with(name=b"MQTT", level=5, flags=2, body=b"\x00\x3c\x00\x00\x04abcd") -> bytes:
    return wire.packet(wire.CONNECT, wire.data(name) + bytes([level, flags]) + body)


BAD_CONNECTS = {
    # name -> (bytes, reason codes of a CONNACK; an empty set: no CONNACK may come)
    "PINGREQ first": (wire.PING, set()),
    "PUBLISH first": (wire.publish("a", b"x"), set()),
    "SUBSCRIBE first": (wire.subscribe(1, ("a", 0)), set()),
    "DISCONNECT first": (wire.BYE, set()),
    "HTTP on a port of MQTT": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", set()),
    "version 6": (connect_with(level=6), {0x84}),
    "another protocol's name": (connect_with(name=b"MQTX"), {0x84}),
    "reserved CONNECT flag": (connect_with(flags=3), {0x81}),
    "will QoS without a will": (connect_with(flags=0x0A), {0x81}),
    "will QoS 3": (connect_with(flags=0x1E), {0x81}),
    "trailing bytes": (connect_with(body=b"\x00\x3c\x00\x00\x04abcdef"), {0x81}),
    "client id cut short": (connect_with(body=b"\x00\x3c\x00\x00\x09abcd"), {0x81}),
    "client id not UTF-8": (connect_with(body=b"\x00\x3c\x00\x00\x02\xff\xfe"), {0x81, 0x85}),
    "Receive Maximum 0": (wire.connect("x", props=b"\x21\x00\x00"), {0x82}),
    "Maximum Packet Size 0": (wire.connect("x", props=b"\x27\x00\x00\x00\x00"), {0x82}),
    "authentication data without a method": (wire.connect("x", props=b"\x16\x00\x01x"), {0x82}),
    "an authentication method we have not": (wire.connect("x", props=b"\x15\x00\x05SCRAM"), {0x8C}),
    "the same property twice": (wire.connect("x", expiry=1, props=b"\x11\x00\x00\x00\x01"), {0x82}),
    "a will topic with a wildcard": (wire.packet(wire.CONNECT, wire.data(b"MQTT") + b"\x05\x06\x00\x3c\x00" + wire.text("x") + b"\x00" + wire.text("a/#") + wire.text("w")), {0x81, 0x82, 0x90}),
    "larger than is allowed before authentication": (wire.connect("x", props=b"".join(b"\x26" + wire.text("k") + wire.text("v" * 1000) for _ in range(200))), {0x95, 0x81}),
    "flags of the fixed header": (b"\x11" + connect_with()[1:], {0x81, 0x82}),
}


@pytest.mark.parametrize("what", BAD_CONNECTS)
def test_a_bad_connect_gets_its_reason_code(target, what):
    raw_bytes, codes = BAD_CONNECTS[what]

    def attempt() -> str:
        with Raw(target["tcp"].port) as raw:
            raw.send(raw_bytes)
            packets, _ = raw.wait_closed()
            # MQTT 5 lets a server close without a CONNACK after a malformed CONNECT; if a code comes, it must be the right one.
            assert len(packets) <= 1 and all(p.kind == wire.CONNACK and p.reason in codes for p in packets), packets
            if what in ("version 6", "an authentication method we have not", "reserved CONNECT flag", "Receive Maximum 0"):
                assert packets, "no CONNACK"
            return peer(raw)

    until_logged(target, attempt)


def test_an_unknown_protocol_level_is_refused_with_return_code_1(target):
    with Raw(target["tcp"].port, version=4) as raw:
        raw.send(connect_with(level=2, body=b"\x00\x3c\x00\x04abcd"))
        packets, _ = raw.wait_closed()
        assert packets == [] or packets[0].body in (b"\x00\x01", b"\x00\x84\x00"), packets


@pytest.mark.parametrize("transport", ("tcp", "tls", "ws", "wss", "quic"))
def test_a_silent_client_is_closed_at_the_accept_deadline(target, transport):
    """From accept to CONNECT there is one deadline, wherever the peer stops."""
    began, since = time.monotonic(), target.mark()
    if transport == "quic":
        protocol = call(dial(target["quic"].port, target.pki.ca, ["mqtt"]))
        call(wait_quic_closed(protocol))
    elif transport in ("tls", "wss"):
        # Not even a ClientHello.
        with socket.create_connection(("127.0.0.1", target[transport].port)) as sock:
            sock.settimeout(10)
            assert drain(sock) == b""
    else:
        with Raw(target[transport].port, transport) as raw:
            packets, _ = raw.wait_closed()
            assert packets == []
    took = time.monotonic() - began
    assert DEADLINE * 0.7 <= took <= DEADLINE * 2.5, took
    target.wait_log(r"127\.0\.0\.1:\d+.*(deadline|timed out|time-?out|in time|no CONNECT)|(deadline|timed out|time-?out|in time|no CONNECT).*127\.0\.0\.1:\d+", since)


async def wait_quic_closed(protocol):
    import asyncio

    await asyncio.wait_for(protocol.wait_closed(), 10)


def drain(sock) -> bytes:
    got = b""
    try:
        while chunk := sock.recv(4096):
            got += chunk
    except ConnectionError:
        pass
    return got


def test_an_unfinished_connect_is_closed_at_the_accept_deadline(target):
    with Raw(target["tcp"].port) as raw:
        began = time.monotonic()
        raw.send(wire.connect("slow")[:10])
        assert raw.wait_closed()[0] == []
        assert DEADLINE * 0.7 <= time.monotonic() - began <= DEADLINE * 2.5


def test_a_trickle_does_not_move_the_deadline(target):
    with Raw(target["tcp"].port) as raw:
        began = time.monotonic()
        try:
            for byte in wire.connect("trickle" * 10):
                raw.send(bytes([byte]))
                time.sleep(0.1)
        except OSError:
            pass
        with pytest.raises((Closed, OSError)):
            while True:
                assert raw.recv().kind != wire.CONNACK
        assert time.monotonic() - began <= DEADLINE * 2.5


def test_an_unfinished_packet_has_a_deadline(target):
    """After authentication an unfinished packet has a deadline; silence between packets has none."""
    me = fresh("bad")
    with Raw(target["tcp"].port) as raw, Raw(target["tcp"].port) as quiet:
        quiet.connect(fresh("quiet"))
        raw.connect(me)
        since, began = target.mark(), time.monotonic()
        raw.send(wire.publish("a/b", b"x" * 100)[:50])
        packets, _ = raw.wait_closed()
        assert DEADLINE * 0.7 <= time.monotonic() - began <= DEADLINE * 3
        assert all(p.kind == wire.DISCONNECT and p.reason >= 0x80 for p in packets), packets
        target.wait_log(me, since)
        quiet.send(wire.PING)
        assert quiet.recv().kind == wire.PINGRESP


def test_a_truncated_packet_at_the_end_of_the_connection_disturbs_no_client(target):
    me = fresh("bad")
    since = target.mark()
    with Raw(target["tcp"].port) as raw:
        raw.connect(me)
        raw.send(wire.publish("a/b", b"x" * 100)[:50])
    target.wait_log(me, since)


# WebSocket ------------------------------------------------------------------


@pytest.mark.parametrize("transport", ("ws", "wss"))
def test_text_frames_close_the_websocket(target, transport):
    me = fresh("bad")
    with Raw(target[transport].port, transport, ca=target.pki.ca) as raw:
        since = target.mark()
        raw.connect(me)
        raw.send_bytes(frame(b"hello", 1))
        packets, code = raw.wait_closed()
        assert code == 1003, (packets, code)
        assert all(p.kind == wire.DISCONNECT for p in packets)
        target.wait_log(me, since)

    def first() -> str:
        with Raw(target[transport].port, transport, ca=target.pki.ca) as raw:
            raw.send_bytes(frame(wire.connect("text"), 1))
            assert raw.wait_closed() == ([], 1003)
            return peer(raw)

    until_logged(target, first)


@pytest.mark.parametrize("offer,status", [("mqtt", 101), ("mqttv3.1", 101), ("chat, mqtt", 101), ("chat", 400), (None, 400), ("MQTT5", 400)])
def test_subprotocols_are_negotiated(target, offer, status):
    with Raw(target["ws"].port, "ws", subprotocol=offer) as raw:
        since, address = target.mark(), peer(raw)
        if status == 101:
            assert raw.upgrade_status == 101, raw.upgrade
            chosen = "mqttv3.1" if offer == "mqttv3.1" else "mqtt"
            assert f"sec-websocket-protocol: {chosen}\r\n" in (raw.upgrade + "\r\n").lower()
            assert "sec-websocket-extensions" not in raw.upgrade.lower()
            assert raw.connect(fresh("id")).reason == 0
        else:
            assert 400 <= raw.upgrade_status < 500, raw.upgrade
            with pytest.raises(Closed):
                raw.recv()
            target.wait_log(address, since)


def test_an_unknown_path_is_refused(target):
    with Raw(target["ws"].port, "ws", path="/elsewhere") as raw:
        assert raw.upgrade_status == 404, raw.upgrade


def test_plain_http_on_a_websocket_port_is_answered(target):
    with socket.create_connection(("127.0.0.1", target["ws"].port)) as sock:
        sock.settimeout(10)
        sock.sendall(b"GET /mqtt HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = drain(sock)
        assert answer == b"" or answer.startswith((b"HTTP/1.1 4",)), answer


def test_a_request_head_without_end_is_limited(target):
    with socket.create_connection(("127.0.0.1", target["ws"].port)) as sock:
        sock.settimeout(10)
        began = time.monotonic()
        try:
            sock.sendall(b"GET /mqtt HTTP/1.1\r\n" + b"X-Filler: " + b"x" * 1000 + b"\r\n")
            while time.monotonic() - began < 6:
                sock.sendall(b"X-Filler: " + b"x" * 1000 + b"\r\n")
        except OSError:
            pass
        drain(sock)
        assert time.monotonic() - began < 6


BAD_FRAMES = {
    "not masked": (frame(wire.PING, masked=False), {1002}),
    "reserved bits": (b"\xf2" + frame(wire.PING)[1:], {1002}),
    "reserved opcode": (frame(wire.PING, opcode=3), {1002}),
    "a ping in pieces": (frame(b"x", opcode=9, fin=False), {1002}),
    "a continuation of nothing": (frame(wire.PING, opcode=0), {1002}),
    "far too large a frame": (b"\x82\xff" + (1 << 40).to_bytes(8, "big") + b"abcd", {1009}),
}


@pytest.mark.parametrize("what", BAD_FRAMES)
def test_bad_frames_close_the_websocket(target, what):
    raw_bytes, codes = BAD_FRAMES[what]
    me = fresh("bad")
    with Raw(target["ws"].port, "ws") as raw:
        since = target.mark()
        raw.connect(me)
        raw.send_bytes(raw_bytes)
        packets, code = raw.wait_closed()
        assert code in codes | {None}, code
        assert all(p.kind == wire.DISCONNECT for p in packets)
        target.wait_log(me, since)


def test_packets_need_not_align_with_frames(target):
    """[MQTT-6.0.0-2]: one packet over many frames and fragments, many packets in one frame, pings between."""
    topic = fresh()
    with Raw(target["ws"].port, "ws") as raw:
        for byte in wire.connect(fresh("id")):
            raw.send(bytes([byte]))
        assert raw.recv().reason == 0
        whole = wire.subscribe(1, (topic, 1)) + wire.publish(topic, b"one", 1, 2) + wire.publish(topic, b"two", 1, 3)
        raw.send_bytes(frame(whole[:7], fin=False) + frame(b"are you there", opcode=9) + frame(whole[7:9], opcode=0, fin=False) + frame(whole[9:], opcode=0))
        got = [raw.recv() for _ in range(5)]
        assert sorted(p.payload for p in got if p.kind == wire.PUBLISH) == [b"one", b"two"]
        assert sorted(p.kind for p in got) == [wire.PUBLISH, wire.PUBLISH, wire.PUBACK, wire.PUBACK, wire.SUBACK]


def test_a_message_of_many_legal_packets_may_be_large(target):
    topic = fresh()
    with Raw(target["ws"].port, "ws") as raw:
        raw.connect(fresh("id"))
        raw.subscribe((topic, 0))
        one = wire.publish(topic, b"x" * 8000)
        raw.send(one * 12)
        for _ in range(12):
            assert len(raw.recv().payload) == 8000


# QUIC -----------------------------------------------------------------------


@pytest.mark.parametrize("alpn", [["h3"], ["mqttx"], ["MQTT"], None])
def test_a_wrong_alpn_is_refused(target, alpn):
    since = target.mark()
    with pytest.raises(ConnectionError) as refused:
        call(dial(target["quic"].port, target.pki.ca, alpn))
    # 0x178: the TLS alert no_application_protocol.
    assert "0x178" in str(refused.value), refused.value
    target.wait_log(r"127\.0\.0\.1:\d+", since)


def test_garbage_datagrams_are_ignored(target):
    noise = random.Random(7)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _ in range(300):
            sock.sendto(noise.randbytes(noise.randrange(1, 1400)), ("127.0.0.1", target["noise-quic"].port))
        # An Initial of an unknown version is answered with the known versions; nothing else matters here.
        sock.sendto(b"\xc0\x0a\x0a\x0a\x0a\x08" + noise.randbytes(8) + b"\x08" + noise.randbytes(8) + b"\x00" * 1200, ("127.0.0.1", target["noise-quic"].port))
        sock.settimeout(5)
        answer, _ = sock.recvfrom(2000)
        assert answer[1:5] == b"\x00\x00\x00\x00"


# Noise ----------------------------------------------------------------------


@pytest.mark.parametrize("transport", ("tcp", "tls", "ws", "wss"))
@pytest.mark.parametrize("seed", range(10))
def test_random_bytes_disturb_no_client(target, transport, seed):
    noise = random.Random(seed)
    with socket.create_connection(("127.0.0.1", target[f"noise-{transport}"].port)) as sock:
        sock.settimeout(10)
        try:
            sock.sendall(noise.randbytes(4000))
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        drain(sock)


@pytest.mark.parametrize("seed", range(10))
def test_random_bytes_after_connect_disturb_no_client(target, seed):
    """Valid packets with some bytes changed."""
    noise = random.Random(1000 + seed)
    for _ in range(10):
        with Raw(target["tcp"].port) as raw:
            raw.connect(fresh("noise"))
            good = bytearray(wire.subscribe(1, ("noise/#", 1)) + wire.publish("noise/a", b"x" * 20, 1, 2, props=b"\x01\x01\x08\x00\x01r") + wire.publish("noise/b", b"y", 2, 3) + wire.ack(wire.PUBREL, 3))
            for _ in range(noise.randrange(1, 4)):
                good[noise.randrange(len(good))] = noise.randrange(256)
            raw.send(bytes(good))
            raw.send(wire.BYE)
            try:
                raw.wait_closed(3)
            except TimeoutError:
                # A changed length can swallow the DISCONNECT; then the packet's deadline closes the connection.
                pass
