"""QUIC with aioquic: several streams, a changed address, a resumed ticket, ways to end."""

from __future__ import annotations

import asyncio

import pytest

from harness import wire
from harness.loop import call, loop
from harness.names import fresh
from harness.phone import Phone
from harness.process import wait_until
from harness.quic_relay import QuicRelay, dial, vanish
from harness.raw import Raw


@pytest.fixture
def relay(edge):
    one = QuicRelay(edge["quic"].port, edge.pki.ca)
    yield one
    one.close()


async def exchange(reader, writer, raw: bytes, count: int = 1) -> list[wire.Packet]:
    writer.write(raw)
    buffer, got = bytearray(), []
    while len(got) < count:
        chunk = await asyncio.wait_for(reader.read(65536), 10)
        if not chunk:
            break
        buffer += chunk
        got += wire.split(buffer)
    return got


def test_a_second_stream_does_not_hang(relay):
    topic = fresh()
    with Raw(relay.port) as raw:
        raw.connect(fresh("id"))
        raw.subscribe((topic, 1))
        (answer,) = call(exchange(*relay.second_stream(), wire.publish(topic, b"over the second", 1, 9)))
        # The server acknowledges on the stream of arrival and delivers on the stream of the subscription.
        assert (answer.kind, answer.packet_id) == (wire.PUBACK, 9)
        assert raw.recv().payload == b"over the second"


def test_five_streams_at_once_are_served(relay, edge, client):
    """A NanoMQ client subscribes on one stream and publishes on others. Every packet is answered, on any stream."""
    topic = fresh()
    with Raw(relay.port) as raw:
        raw.connect(fresh("id"))
        streams = [relay.second_stream() for _ in range(4)]
        answers: list[wire.Packet] = []

        async def listen(reader):
            buffer = bytearray()
            while chunk := await reader.read(65536):
                buffer.extend(chunk)
                answers.extend(wire.split(buffer))

        for reader, _ in streams:
            asyncio.run_coroutine_threadsafe(listen(reader), loop())
        loop().call_soon_threadsafe(streams[0][1].write, wire.subscribe(1, (topic, 1)))
        wait_until("SUBACK", lambda: [p for p in answers if p.kind == wire.SUBACK and p.codes == b"\x01"])
        for n, (_, writer) in enumerate(streams[2:]):
            loop().call_soon_threadsafe(writer.write, wire.publish(topic, b"%d" % n, 1, 10 + n))
        wait_until("PUBACKs", lambda: {p.packet_id for p in answers if p.kind == wire.PUBACK} == {10, 11})
        # A stream abandoned in the middle of a packet delays no other stream.
        loop().call_soon_threadsafe(streams[1][1].write, wire.publish(topic, b"never ends")[:5])
        client(edge).publish(topic, "from elsewhere")
        raw.send(wire.PING)
        wait_until("PINGRESP", lambda: raw.recv().kind == wire.PINGRESP)


def test_the_address_may_change(relay):
    """A NAT forgets its mapping: the same connection comes from another port."""
    with Raw(relay.port) as raw:
        raw.connect(fresh("id"))
        relay.rebind()
        for _ in range(3):
            raw.send(wire.PING)
            assert raw.recv().kind == wire.PINGRESP


@pytest.mark.parametrize("how", ("close", "fin"))
def test_ends_without_disconnect_fire_the_will(edge, client, how):
    topic = fresh()
    watcher = client(edge)
    watcher.subscribe(topic)
    body = wire.text("MQTT") + bytes([5, 0x02 | 0x04 | 0x08]) + b"\x00\x3c\x00" + wire.text(fresh("id")) + b"\x00" + wire.text(topic) + wire.text("gone")

    async def visit():
        protocol = await dial(edge["quic"].port, edge.pki.ca, ["mqtt"])
        reader, writer = await protocol.create_stream()
        (connack,) = await exchange(reader, writer, wire.packet(wire.CONNECT, body))
        assert connack.reason == 0
        if how == "close":
            protocol.close()
        else:
            writer.write_eof()
        await asyncio.wait_for(protocol.wait_closed(), 10)

    call(visit())
    assert watcher.next().text == "gone"


def test_many_unfinished_handshakes_block_no_client(edge, client):
    """Clients vanish in the middle of the handshake; others connect as before."""

    async def vanish_many():
        protocols = await asyncio.gather(*(dial(edge["quic"].port, edge.pki.ca, ["mqtt"]) for _ in range(20)))
        for protocol in protocols:
            vanish(protocol)

    call(vanish_many())
    one = client(edge, "quic")
    topic = fresh()
    one.subscribe(topic)
    one.publish(topic, "x")
    assert one.next().text == "x"


def test_a_connection_from_another_network_resumes(edge, client):
    """The first connection falls silent and never sends DISCONNECT."""
    topic, me = fresh(), fresh("id")
    one = Phone(edge["quic"].port, edge.pki.ca)
    one.connect(me, clean=False, expiry=300)
    one.subscribe(4, (topic, 1))
    one.vanish()
    client(edge).publish(topic, "meanwhile")
    with Phone(edge["quic"].port, edge.pki.ca) as two:
        assert two.connect(me, clean=False, expiry=300).session_present
        # The stream of the subscription ended with its connection.
        got = two.recv(0)
        assert got.payload == b"meanwhile"
        two.send(0, wire.ack(wire.PUBACK, got.packet_id))
        client(edge).publish(topic, "afterwards")
        assert two.recv(0).payload == b"afterwards"
