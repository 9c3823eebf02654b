"""Several streams of one QUIC connection: the stream of each packet, the effect of faults, and the behaviour of clients in the field."""

from __future__ import annotations

import random
import time

import pytest

from harness import wire
from harness.names import fresh
from harness.phone import Gone, Phone, write
from harness.process import wait_until


@pytest.fixture
def phone(edge):
    made = []

    def make(connect: bool = True, client_id: str | None = None, port: int | None = None, **kwargs) -> Phone:
        options = kwargs.pop("dial", {})
        one = Phone(port or edge["quic"].port, edge.pki.ca, **options)
        made.append(one)
        if connect:
            one.connect(client_id or fresh("id"), **kwargs)
        return one

    yield make
    for one in made:
        one.__exit__()


def resets(edge, reason: str) -> float:
    return edge.metrics().sum("tidegate_quic_streams_reset_total", reason=reason)


def test_early_streams_wait_for_connect(edge, phone, client):
    """Data streams may come first; their packets take effect only after CONNECT is accepted, and then all of them."""
    topic = fresh()
    watcher = client(edge)
    watcher.subscribe(topic)
    one = phone(connect=False)
    one.send(4, wire.publish(topic, b"early", 1, 7))
    one.send(8, wire.subscribe(3, (topic, 1)))
    # The control stream is served and in the middle of CONNECT.
    connect = wire.connect(fresh("id"))
    one.send(0, connect[:10])
    client(edge).publish(topic, "before")
    assert watcher.next().text == "before"
    one.send(0, connect[10:])
    assert one.recv().kind == wire.CONNACK
    assert watcher.next().text == "early"
    assert (one.recv(4).kind, one.recv(8).kind) == (wire.PUBACK, wire.SUBACK)


def test_publishes_are_acknowledged_and_delivered_on_their_own_streams(edge, phone, client):
    a, b = fresh(), fresh()
    one = phone()
    one.subscribe(4, (a, 2), packet_id=1)
    one.subscribe(8, (b, 1), packet_id=1)
    pub = client(edge)
    pub.publish(a, "for 4", qos=2)
    pub.publish(b, "for 8", qos=1)
    first, second = one.recv(4), one.recv(8)
    assert (first.payload, second.payload) == (b"for 4", b"for 8")
    # Packet identifiers belong to the connection: that suits clients with one table, and with a table for each stream.
    assert first.packet_id != second.packet_id
    one.send(8, wire.ack(wire.PUBACK, second.packet_id))
    one.send(4, wire.ack(wire.PUBREC, first.packet_id))
    released = one.recv(4)
    assert (released.kind, released.packet_id) == (wire.PUBREL, first.packet_id)
    one.send(4, wire.ack(wire.PUBCOMP, first.packet_id))
    one.send(12, wire.publish(b, b"own", 2, 5))
    assert one.recv(12).kind == wire.PUBREC
    one.send(12, wire.ack(wire.PUBREL, 5))
    assert one.recv(12).kind == wire.PUBCOMP
    assert one.recv(8).payload == b"own"
    one.pinged()
    # After a new SUBSCRIBE on the control stream, messages come there.
    one.subscribe(0, (a, 1), packet_id=9)
    pub.publish(a, "for 0")
    assert one.recv(0).payload == b"for 0"


def test_two_streams_may_use_one_identifier_at_once(edge, phone, client):
    """Two different QoS 2 messages have identifier 1: both arrive once, whatever the client sends again."""
    topic = fresh()
    watcher = client(edge)
    watcher.subscribe((topic, 2))
    one = phone()
    for stream in (4, 8):
        one.send(stream, wire.publish(topic, b"of %d" % stream, 2, 1))
    for stream in (4, 8):
        assert (one.recv(stream).kind, one.packets[stream]) == (wire.PUBREC, [])
    # A copy on the same stream is the same message.
    one.send(4, wire.publish(topic, b"of 4", 2, 1, dup=True))
    assert one.recv(4).kind == wire.PUBREC
    for stream in (8, 4):
        one.send(stream, wire.ack(wire.PUBREL, 1))
        completed = one.recv(stream)
        assert (completed.kind, completed.reason) == (wire.PUBCOMP, 0)
    # The identifier is free again.
    one.send(4, wire.publish(topic, b"next", 2, 1))
    assert one.recv(4).kind == wire.PUBREC
    # PUBREL may come on any stream.
    one.send(0, wire.ack(wire.PUBREL, 1))
    assert one.recv(0).reason == 0
    got = [m.text for m in watcher.until_marker(client(edge), topic, 2)]
    assert sorted(got) == ["next", "of 4", "of 8"]


@pytest.mark.parametrize("dup_on,release_on", [(0, 0), (0, 4), (4, 0), (8, 4)])
def test_qos_2_continues_on_any_stream_of_the_next_connection(edge, phone, client, dup_on, release_on):
    """The connection ends in the middle of the exchange: copies are recognised on any stream, and each message arrives once."""
    topic, me = fresh(), fresh("id")
    watcher = client(edge)
    watcher.subscribe((topic, 2))
    one = phone(client_id=me, clean=False, expiry=300)
    # The server has sent PUBREC for two messages; the client has received one, and the server has not seen a third message.
    one.send(4, wire.publish(topic, b"a", 2, 1)).send(8, wire.publish(topic, b"b", 2, 1))
    assert (one.recv(4).kind, one.recv(8).kind) == (wire.PUBREC, wire.PUBREC)
    one.vanish()
    two = phone(connect=False)
    assert two.connect(me, clean=False, expiry=300).session_present
    two.send(release_on, wire.ack(wire.PUBREL, 1))
    assert two.recv(release_on).kind == wire.PUBCOMP
    two.send(dup_on, wire.publish(topic, b"b", 2, 1, dup=True))
    assert two.recv(dup_on).kind == wire.PUBREC
    two.send(dup_on, wire.ack(wire.PUBREL, 1))
    assert two.recv(dup_on).kind == wire.PUBCOMP
    two.send(12, wire.publish(topic, b"c", 2, 1, dup=True))
    assert two.recv(12).kind == wire.PUBREC
    got = [m.text for m in watcher.until_marker(client(edge), topic, 2)]
    assert sorted(got) == ["a", "b", "c"]


FAULTS = {
    "malformed": (b"\x36\x02\x00\x00", "malformed", 0x81),
    "forbidden": (wire.PING, "protocol_error", 0x82),
    "connect": (wire.connect("again"), "protocol_error", 0x82),
    "disconnect": (wire.BYE, "protocol_error", 0x82),
    "server's": (wire.packet(wire.SUBACK, b"\x00\x01\x00\x00"), "protocol_error|malformed", None),
    "oversized": (b"\x30\xff\xff\xff\x7f", "packet_too_large", 0x95),
    "topic": (wire.publish("a/#", b"x", 1, 1), "malformed|protocol_error", None),
    "alias": (wire.publish("", b"x", 1, 1, props=b"\x23\x00\x09"), "protocol_error", 0x82),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_its_stream_only(edge, phone, name):
    raw, reason, code = FAULTS[name]
    topic = fresh()
    one = phone()
    one.subscribe(4, (topic, 1))
    before = resets(edge, reason)
    one.send(8, raw)
    with pytest.raises(Gone) as gone:
        one.recv(8)
    assert gone.value.code and (code is None or gone.value.code == code), gone.value
    one.wait("STOP_SENDING", lambda: one.stopped.get(8) == gone.value.code)
    edge.wait_metric("it is counted", lambda m: m.sum("tidegate_quic_streams_reset_total", reason=reason) > before)
    # Other streams and the control stream go on.
    one.pinged().send(12, wire.publish(topic, b"goes on", 1, 3))
    assert one.recv(12).kind == wire.PUBACK
    assert one.recv(4).payload == b"goes on"


def test_half_a_packet_at_the_end_of_a_stream_is_a_fault(edge, phone):
    one = phone()
    before = resets(edge, "incomplete")
    one.send(4, wire.publish("t", b"never ends", 1, 1)[:-3], end=True)
    with pytest.raises(Gone) as gone:
        one.recv(4)
    assert gone.value.code == 0x81
    edge.wait_metric("it is counted", lambda m: m.sum("tidegate_quic_streams_reset_total", reason="incomplete") > before)
    one.pinged()


def test_a_fault_on_the_control_stream_ends_the_connection(phone):
    one = phone()
    one.send(0, b"\x36\x02\x00\x00")
    assert (one.recv().kind, 1) == (wire.DISCONNECT, 1)
    one.wait("the close", lambda: one.closed)
    assert one.closed.error_code == 1


@pytest.mark.parametrize("how", ("fin", "reset"))
def test_the_end_of_the_control_stream_is_the_connection_s(edge, phone, client, how):
    topic = fresh()
    watcher = client(edge)
    watcher.subscribe(topic)
    body = wire.text("MQTT") + bytes([5, 0x02 | 0x04 | 0x08]) + b"\x00\x3c\x00" + wire.text(fresh("id")) + b"\x00" + wire.text(topic) + wire.text("gone")
    one = phone(connect=False)
    one.send(0, wire.packet(wire.CONNECT, body))
    assert one.recv().reason == 0
    if how == "fin":
        one.send(0, end=True)
    else:
        one.reset(0, 5)
    one.wait("the close", lambda: one.closed)
    # As EMQX does: the control stream has ended.
    assert one.closed.error_code == 1
    assert watcher.next().text == "gone"


@pytest.mark.parametrize("said", (b"", wire.connect("half")[:10]))
def test_a_control_stream_that_ends_before_connect_is_code_1(edge, phone, said):
    one = phone(connect=False)
    one.send(0, said, end=True)
    one.wait("the close", lambda: one.closed)
    assert one.closed.error_code == 1


def test_disconnect_with_fin_ends_with_code_0(edge, phone):
    one = phone()
    one.send(0, wire.BYE, end=True)
    one.wait("the close", lambda: one.closed)
    assert one.closed.error_code == 0


def test_disconnect_ends_with_code_0_and_earlier_packets_count(edge, phone, client):
    topic = fresh()
    watcher = client(edge)
    watcher.subscribe(topic)
    one = phone()
    # One flight: streams are not ordered among each other.
    one.do(
        write(0, wire.BYE),
        write(4, wire.publish(topic, b"last")),
        write(8, wire.publish(topic, b"words")),
    )
    one.wait("the close", lambda: one.closed)
    assert one.closed.error_code == 0
    assert sorted(watcher.next().text for _ in range(2)) == ["last", "words"]


def test_answers_still_come_on_a_stream_that_the_client_ended(edge, phone, client):
    """PUBLISH and FIN come together: the server answers with PUBACK and FIN."""
    one = phone()
    one.send(4, wire.publish(fresh(), b"x", 1, 1) + wire.subscribe(2, (fresh(), 1)), end=True)
    assert {one.recv(4).kind, one.recv(4).kind} == {wire.PUBACK, wire.SUBACK}
    with pytest.raises(Gone) as gone:
        one.recv(4)
    assert gone.value.code is None
    one.pinged()


@pytest.mark.parametrize("how", ("fin", "reset", "stop"))
def test_deliveries_fall_back_to_control_when_their_stream_ends(edge, phone, client, how):
    """Unacknowledged messages of the stream come again with DUP; later messages come once."""
    topic = fresh()
    one = phone()
    one.subscribe(4, (topic, 1))
    pub = client(edge)
    pub.publish(topic, "first")
    first = one.recv(4)
    assert first.payload == b"first"
    if how == "fin":
        one.send(4, end=True)
    elif how == "reset":
        one.reset(4, 31)
    else:
        one.stop(4, 31)
    again = one.recv(0)
    assert (again.payload, again.dup, again.packet_id) == (b"first", True, first.packet_id)
    one.send(0, wire.ack(wire.PUBACK, again.packet_id))
    pub.publish(topic, "second")
    assert one.recv(0).payload == b"second"
    with pytest.raises(Gone) as gone:
        one.recv(4)
    assert gone.value.code == (None if how == "fin" else 31)


def no_credit(one: Phone, number: int) -> None:
    """Keeps the stream at its initial flow control limit, until `_write_stream_limits` is deleted."""
    credit = one.quic._write_stream_limits
    one.quic._write_stream_limits = lambda stream, **more: None if stream.stream_id == number else credit(stream=stream, **more)


def test_an_unread_stream_delays_no_other(edge, phone, client):
    """Its client's flow control is closed: after a moment its messages come on the control stream."""
    slow, quick = fresh(), fresh()
    one = phone(dial={"options": {"max_stream_data": 8192}})
    no_credit(one, 4)
    one.subscribe(4, (slow, 1))
    one.subscribe(8, (quick, 1))
    pub = client(edge)
    for n in range(12):
        pub.publish(slow, f"{n}" + "." * 4000)
    pub.publish(quick, "quick")
    assert one.recv(8).payload == b"quick"
    assert one.recv(0).payload.endswith(b"....")
    one.send(0, wire.PING)
    while one.recv(0).kind != wire.PINGRESP:
        pass


@pytest.mark.parametrize("what", ("deliveries", "answers"))
def test_messages_for_an_unread_stream_leave_the_other_streams_served(edge, phone, client, what):
    """Messages exceed the bytes that may be encoded ahead: the client's packets on other streams still get their answers."""
    slow, quick = fresh(), fresh()
    one = phone(keep_alive=4, dial={"options": {"max_stream_data": 8192}})
    no_credit(one, 4)
    one.subscribe(4, (slow, 1))
    one.subscribe(8, (quick, 1))
    pub = client(edge)
    for n in range(3):
        if what == "answers":
            one.send(4, wire.unsubscribe(7 + n, *["a"] * 60_000))
        else:
            pub.publish(slow, "." * 100_000, qos=1)
    pub.publish(quick, "quick", qos=1)
    assert one.recv(8).payload == b"quick"
    for n in range(3):
        one.send(0, wire.PING)
        # After a moment the messages that wait for stream 4 come here.
        while one.recv(0).kind != wire.PINGRESP:
            pass
        one.send(8, wire.publish(fresh(), b"x", 1, 10 + n))
        assert one.recv(8).kind == wire.PUBACK


def test_keep_alive_ignores_time_in_which_packets_wait_unread(edge, phone):
    """The client's packets on a stream with untaken answers wait unread, so the silence is the server's doing."""
    one = phone(keep_alive=1, dial={"options": {"max_stream_data": 8192}})
    no_credit(one, 4)
    for n in range(3):
        one.send(4, wire.unsubscribe(7 + n, *["a"] * 60_000))
    end = time.monotonic() + 4
    n = 10
    while time.monotonic() < end:
        n += 1
        one.send(4, wire.publish("t", b"x", 1, n))
        time.sleep(0.25)
    assert one.closed is None
    # The client takes them; all its packets have been waiting for that.
    del one.quic._write_stream_limits
    one.do(lambda quic: None)
    assert [one.recv(4).kind for _ in range(3)] == [wire.UNSUBACK] * 3
    assert [one.recv(4).packet_id for _ in range(11, n + 1)] == list(range(11, n + 1))
    one.wait("its own silence ends it", lambda: one.closed, 5)


def test_keep_alive_begins_anew_when_all_is_read_again(edge, phone):
    """After the stream moves again, the client's packets need a moment to arrive."""
    one = phone(keep_alive=2, dial={"options": {"max_stream_data": 8192}})
    no_credit(one, 4)
    for n in range(3):
        one.send(4, wire.unsubscribe(7 + n, *["a"] * 60_000))
    # The deadline is after 3 s, and again after 6 s.
    time.sleep(5)
    del one.quic._write_stream_limits
    one.do(lambda quic: None)
    assert [one.recv(4).kind for _ in range(3)] == [wire.UNSUBACK] * 3
    time.sleep(1.5)
    assert one.closed is None
    one.pinged()


def test_a_stream_of_half_a_packet_delays_no_other(edge, phone):
    topic = fresh()
    one = phone()
    one.send(4, wire.publish(topic, b"slow" * 100, 1, 1)[:20])
    one.subscribe(8, (topic, 1))
    one.send(12, wire.publish(topic, b"quick", 1, 1))
    assert one.recv(8).payload == b"quick"


def test_keep_alive_counts_packets_of_all_streams(edge, phone):
    one = phone(keep_alive=1)
    end = time.monotonic() + 2.5
    n = 0
    while time.monotonic() < end:
        n += 1
        one.send(4 + 4 * (n % 2), wire.publish("t", b"x", 1, n))
        assert one.recv(4 + 4 * (n % 2)).kind == wire.PUBACK
        time.sleep(0.25)
    assert one.closed is None
    one.pinged()
    one.wait("silence ends it", lambda: one.closed, 5)


def test_sixteen_streams_are_served(edge, phone):
    """Control and fifteen more streams, silent ones among them."""
    topic = fresh()
    one = phone()
    streams = [4 * n for n in range(1, 16)]
    for stream in streams:
        one.send(stream)
    for stream in streams[::2]:
        one.send(stream, wire.publish(topic, b"x", 1, 1))
    for stream in streams[::2]:
        assert one.recv(stream).kind == wire.PUBACK
    one.pinged()


def test_aliases_belong_to_their_stream(edge, phone, client):
    a, b = fresh(), fresh()
    watcher = client(edge)
    watcher.subscribe(a)
    watcher.subscribe(b)
    one = phone()
    alias = b"\x23\x00\x01"
    for stream, topic in ((4, a), (8, b)):
        one.send(stream, wire.publish(topic, b"defined", 1, 1, props=alias))
        assert one.recv(stream).kind == wire.PUBACK
    for stream in (4, 8):
        one.send(stream, wire.publish("", b"used", 1, 2, props=alias))
        assert one.recv(stream).kind == wire.PUBACK
    got = sorted((m.topic, m.text) for m in (watcher.next() for _ in range(4)))
    assert got == sorted([(a, "defined"), (a, "used"), (b, "defined"), (b, "used")])


class NanoMq(Phone):
    """Opens five streams at once, subscribes on one of two, publishes on one of two others, by chance, and answers on the stream of the delivery."""

    def __init__(self, seed: int, *args):
        super().__init__(*args)
        self.chance = random.Random(seed)
        self.do(*(write(s) for s in (0, 4, 8, 12, 16)))
        self.got: list[bytes] = []
        self.acked: set[int] = set()
        self.next_id = 0

    def id(self) -> int:
        self.next_id += 1
        return self.next_id

    def ask(self, *filters) -> None:
        self.send(self.chance.choice((4, 8)), wire.subscribe(self.id(), *filters))

    def tell(self, topic: str, payload: bytes, qos: int) -> None:
        self.send(self.chance.choice((12, 16)), wire.publish(topic, payload, qos, self.id() if qos else 0))

    def work(self, done) -> None:
        """Answers packets on all streams until `done`."""

        def step():
            for stream, packets in self.packets.items():
                while packets:
                    return stream, packets.pop(0)
            return done() and (None, None)

        while True:
            stream, packet = self.wait("what is to come", step)
            if packet is None:
                return
            if packet.kind == wire.PUBLISH:
                self.got.append(packet.payload)
                if packet.qos:
                    self.send(stream, wire.ack((wire.PUBACK, wire.PUBREC)[packet.qos - 1], packet.packet_id))
            elif packet.kind in (wire.PUBREC, wire.PUBREL):
                self.send(stream, wire.ack(packet.kind + 1, packet.packet_id))
            elif packet.kind in (wire.PUBACK, wire.PUBCOMP, wire.SUBACK):
                self.acked.add(packet.packet_id)

    def leave(self) -> None:
        """Ends without DISCONNECT: the streams are reset with NNG_ECONNSHUT, and the connection is closed."""
        self.do(*(lambda q, s=s: q.reset_stream(s, 31) for s in (4, 8, 12, 16)))
        self.close(0)


def test_nanomq_is_served_without_loss(edge, client):
    topic, me = fresh(), fresh("nano")
    watcher = client(edge)
    watcher.subscribe((f"{topic}/up", 2))
    pub = client(edge)
    up, down = [], []
    for visit in range(3):
        one = NanoMq(visit, edge["quic"].port, edge.pki.ca)
        connack = one.connect(me, clean=False, expiry=300)
        assert connack.session_present == (visit > 0)
        one.ask((f"{topic}/down", 2))
        one.work(lambda: 1 in one.acked)
        for n in range(30):
            up.append(b"%d/%d" % (visit, n))
            one.tell(f"{topic}/up", up[-1], n % 3)
            down.append(b"%d/%d" % (visit, n))
            pub.publish(f"{topic}/down", down[-1], qos=n % 3)
        one.work(lambda: len(one.got) >= 30 and len(one.acked) == 1 + 20)
        # Messages of one stream are in order.
        assert one.got == down[-30:]
        # QoS 0 is not answered, so its messages must be under way before the end.
        one.pinged()
        one.leave()
        edge.wait_metric("it is gone", lambda m: edge.api(f"/api/v1/sessions/{me}")["attached"] is False)
    got = [m.payload for m in watcher.until_marker(pub, f"{topic}/up", 2)]
    assert sorted(got) == sorted(up)
    edge.assert_sane()
