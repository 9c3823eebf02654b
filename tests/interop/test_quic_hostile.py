"""Hostile QUIC peers: other clients keep their service and their latency, memory stays bounded, and the metrics count the attacks."""

from __future__ import annotations

import socket
import threading
import time

import pytest
from aioquic.quic.connection import QuicConnectionId
from aioquic.quic.packet import QuicFrameType

from harness import wire
from harness.names import fresh
from harness.phone import Gone, Phone, first_flight, write
from harness.process import PATIENCE, wait_until

# These tests run one at a time: they measure memory and delay.
pytestmark = pytest.mark.xdist_group("floods")

MIB = 1 << 20
SLACK = 24 * MIB


class Bystander:
    """A well-behaved client over QUIC, which publishes to itself all the time."""

    def __init__(self, edge):
        self.edge, self.topic = edge, fresh()
        self.phone = Phone(edge["quic"].port, edge.pki.ca)
        self.phone.connect(fresh("bystander"), keep_alive=0)
        self.phone.subscribe(4, (self.topic, 0))
        self.before = edge.service.rss_bytes()
        self.took: list[float] = []
        self.error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._guard, daemon=True)
        self._thread.start()

    def _guard(self) -> None:
        try:
            n = 0
            while not self._stop.is_set():
                n += 1
                began = time.monotonic()
                self.phone.send(8, wire.publish(self.topic, b"%d" % n))
                assert self.phone.recv(4).payload == b"%d" % n
                self.took.append(time.monotonic() - began)
                self._stop.wait(0.02)
        except BaseException as error:
            self.error = error

    def judge(self) -> None:
        """Asserts that the bystander was served all the time, that a new client is served, and that memory did not grow much."""
        served = len(self.took)
        wait_until("it is still served", lambda: self.error or len(self.took) > served + 3)
        self._stop.set()
        self._thread.join(15 * PATIENCE)
        assert self.error is None, self.error
        assert sorted(self.took)[len(self.took) // 2] < 0.5 * PATIENCE, sorted(self.took)
        with Phone(self.edge["quic"].port, self.edge.pki.ca) as late:
            late.connect(fresh("late"))
            late.pinged()
        self.phone.close()
        grown = self.edge.service.rss_bytes() - self.before
        assert grown < SLACK, grown
        self.edge.assert_sane()


@pytest.fixture
def alone(own_edge):
    """A Tidegate of the test's own, and a bystander; further sections as of `own_edge`."""
    made = []

    def make(**sections):
        edge = own_edge("embedded:", ("tcp", "quic"), **sections).start()
        made.append(Bystander(edge))
        return edge, made[-1]

    yield make


def test_a_thousand_half_open_connections_block_no_client(alone):
    """Initials come from many addresses, and none is continued: when half of the places are taken, clients must prove their address, which needs no memory."""
    edge, bystander = alone(limits={"handshakes_max": 40, "accept_deadline": "2s"})
    count, socks = 1000, []
    for _ in range(100):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.connect(("127.0.0.1", edge["quic"].port))
        socks.append(sock)
    for n, flight in enumerate([first_flight(edge["quic"].port, edge.pki.ca) for _ in range(count)]):
        for raw in flight:
            socks[n % len(socks)].send(raw)
    edge.wait_metric("they are asked for proof", lambda m: m.sum("tidegate_quic_retries_total") >= count - 40, 20)
    # Meanwhile a client that proves its address gets in.
    with Phone(edge["quic"].port, edge.pki.ca) as one:
        one.connect(fresh("id"))
    edge.wait_metric("the stuck ones time out", lambda m: m.sum("tidegate_handshakes_failed_total", reason="timeout") > 0, 20)
    bystander.judge()
    for sock in socks:
        sock.close()


def test_connections_without_a_stream_are_closed(alone, full):
    """Connections that finish the handshake and then fall silent are closed at the deadline."""
    edge, bystander = alone(limits={"accept_deadline": "1s"})
    phones = [Phone(edge["quic"].port, edge.pki.ca) for _ in range(200 if full else 40)]
    for one in phones:
        one.wait("the close", lambda one=one: one.closed, 15)
        assert one.closed.error_code == 1
    bystander.judge()


@pytest.mark.parametrize("stream", (0, 8))
def test_an_endless_packet_is_cut_off(alone, stream):
    """A packet never ends: on a data stream the stream is reset, on the control stream the connection ends."""
    edge, bystander = alone(limits={"packet_deadline": "1s"})
    with Phone(edge["quic"].port, edge.pki.ca) as one:
        one.connect(fresh("id"))
        raw = wire.publish(fresh(), b"." * 1000, 1, 1)

        def over():
            return one.closed or stream in one.ended

        for at in range(100):
            if over():
                break
            try:
                one.send(stream, raw[at : at + 1])
            except RuntimeError:
                # The stream has ended since the check.
                break
            time.sleep(0.05)
        one.wait("the end", over)
        if stream == 0:
            assert one.recv(0).reason == 0x97
        else:
            with pytest.raises(Gone) as gone:
                one.recv(stream)
            assert gone.value.code == 0x97
            edge.wait_metric("it is counted", lambda m: m.sum("tidegate_quic_streams_reset_total", reason="packet_deadline") == 1)
            one.pinged()
    bystander.judge()


@pytest.mark.parametrize("how", ("fin", "reset", "fault", "bind"))
def test_a_flood_of_streams_keeps_memory_bounded(alone, full, how):
    """As many streams as flow control allows, each ended at once: with FIN, with RESET, by a fault, or with subscriptions on it."""
    edge, bystander = alone()
    topic = fresh()
    with Phone(edge["quic"].port, edge.pki.ca) as one:
        one.connect(fresh("id"))
        streams = range(4, 4 * (4000 if full else 800), 4)
        for stream in streams:
            if how == "fin":
                steps = [write(stream, wire.publish(topic, b"x"), True)]
            elif how == "fault":
                steps = [write(stream, wire.PING)]
            elif how == "bind":
                steps = [write(stream, wire.subscribe(1, (f"{topic}/{stream % 40}", 1)), True)]
            else:
                steps = [write(stream, wire.publish(topic, b"x")[:9]), lambda q, s=stream: q.reset_stream(s, 31)]
            # The client opens no more streams than its credit allows.
            wait_until("credit", lambda: one.closed or one.quic._remote_max_streams_bidi > stream // 4, 20, 0.001)
            one.do(*steps)
        last = streams[-1]
        one.wait("the last is ended", lambda: one.closed or last in one.ended, 30)
        assert one.closed is None
        one.pinged()
    bystander.judge()


def test_a_client_that_takes_no_answers_loses_its_stream(alone):
    """A client publishes on a stream and never accepts the acknowledgements: the server stops reading the stream and then resets it."""
    edge, bystander = alone(limits={"write_stall": "1s", "receive_max": 65535})
    with Phone(edge["quic"].port, edge.pki.ca, options={"max_stream_data": 1024}) as one:
        credit = one.quic._write_stream_limits
        one.quic._write_stream_limits = lambda stream, **more: None if stream.stream_id == 4 else credit(stream=stream, **more)
        one.connect(fresh("id"))
        topic = fresh()
        n = 0
        for _ in range(300):
            if 4 in one.stopped or one.closed:
                break
            packets = []
            for _ in range(200):
                n = n % 60000 + 1
                packets.append(wire.publish(topic, b"x", 1, n))
            send = write(4, b"".join(packets))
            # STOP_SENDING may come before the reset.
            one.do(lambda quic, send=send: None if 4 in one.stopped else send(quic))
            time.sleep(0.01)
        one.wait("the stream is given up", lambda: 4 in one.ended or one.closed, 15)
        assert one.closed is None
        one.pinged()
    bystander.judge()


def test_a_client_that_takes_a_byte_now_and_then_loses_its_stream(alone):
    """A byte now and then does not count as progress: the stream is reset as if the client took none."""
    edge, bystander = alone(limits={"write_stall": "1s"})
    with Phone(edge["quic"].port, edge.pki.ca, options={"max_stream_data": 1024}) as one:
        credit = one.quic._write_stream_limits
        due = False

        def drip(builder, space, stream):
            nonlocal due
            if stream.stream_id != 4:
                return credit(builder=builder, space=space, stream=stream)
            if not due:
                return None
            due = False
            stream.max_stream_data_local += 1
            frame = builder.start_frame(QuicFrameType.MAX_STREAM_DATA, capacity=17)
            frame.push_uint_var(stream.stream_id)
            frame.push_uint_var(stream.max_stream_data_local)

        one.quic._write_stream_limits = drip
        one.connect(fresh("id"))
        one.send(4, wire.unsubscribe(7, *["a"] * 4000))
        end = time.monotonic() + 15
        while 4 not in one.ended and not one.closed and time.monotonic() < end:
            due = True
            one.pinged()
            time.sleep(0.05)
        assert 4 in one.ended and one.closed is None
        assert len(one.buffers[4]) > 1024, "the client took no bytes"
        one.pinged()
    bystander.judge()


def test_endlessly_retired_connection_identifiers_keep_memory_bounded(alone, full):
    edge, bystander = alone()
    with Phone(edge["quic"].port, edge.pki.ca) as one:
        one.connect(fresh("id"))
        for _ in range(2000 if full else 400):
            one.do(lambda q: q.change_connection_id())
        one.pinged()
    bystander.judge()


def test_too_many_offered_connection_identifiers_end_the_connection(alone):
    edge, bystander = alone()
    with Phone(edge["quic"].port, edge.pki.ca) as one:
        one.connect(fresh("id"))

        def offer(quic):
            for n in range(200):
                number = 1000 + n
                quic._host_cids.append(QuicConnectionId(cid=number.to_bytes(8, "big"), sequence_number=number, stateless_reset_token=bytes(16)))

        one.do(offer)
        one.wait("the close", lambda: one.closed)
        # CONNECTION_ID_LIMIT_ERROR or PROTOCOL_VIOLATION.
        assert one.closed.error_code in (0x9, 0xA), one.closed
    bystander.judge()


def test_a_client_beyond_its_credit_loses_its_connection(alone):
    """A client that sends more than flow control allows loses its connection."""
    edge, bystander = alone()
    with Phone(edge["quic"].port, edge.pki.ca) as one:
        one.connect(fresh("id"))

        def greedy(quic):
            write(4)(quic)
            stream = quic._streams[4]
            quic._remote_max_data = stream.max_stream_data_remote = 1 << 40
            stream.sender._buffer_start = stream.sender._buffer_stop = 10 * MIB
            write(4, b"far away")(quic)

        one.do(greedy)
        one.wait("the close", lambda: one.closed, 15)
        # FLOW_CONTROL_ERROR.
        assert one.closed.error_code == 0x3, one.closed
    bystander.judge()
