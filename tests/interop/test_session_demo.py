"""The main promise: a client breaks off over one transport, comes back over another, and misses no message."""

from __future__ import annotations

import itertools

import pytest

from harness.edge import TRANSPORTS
from harness.names import fresh


@pytest.mark.parametrize("leave,back", list(itertools.product(TRANSPORTS, TRANSPORTS)))
def test_a_session_moves_from_one_transport_to_another(edge, client, way, leave, back):
    topic, me = fresh(), fresh("id")
    line = way(edge, leave)
    pub = client(edge)
    one = client(edge, leave, me, via=line, expiry=300)
    assert not one.session_present
    one.subscribe((topic, 1))
    pub.publish(topic, "before")
    assert one.next().text == "before"
    # The first message proves nothing about its PUBACK; the second is answered after it.
    assert one.until_marker(pub, topic) == []
    line.cut()
    one.abandon()
    for n in range(5):
        pub.publish(topic, f"m{n}", 1)
    again = client(edge, back, me, clean=False, expiry=300)
    assert again.session_present
    got = again.until_marker(pub, topic)
    # Messages from before the cut may come again with DUP, since their PUBACK may be lost with the connection.
    fresh_ones = [m for m in got if not (m.dup and (m.text == "before" or m.payload.startswith(b"marker-")))]
    assert [m.text for m in fresh_ones] == [f"m{n}" for n in range(5)]
    assert {m.topic for m in got} == {topic}
    # The session is complete: live messages follow.
    pub.publish(topic, "after")
    assert again.next().text == "after"


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("version", (3, 4))
def test_a_session_of_3_1_1_resumes(edge, client, way, transport, version):
    topic, me = fresh(), fresh("i")[-20:]
    line = way(edge, transport)
    pub = client(edge)
    one = client(edge, transport, me, via=line, version=version, clean=False)
    one.subscribe((topic, 1))
    line.cut()
    one.abandon()
    for n in range(5):
        pub.publish(topic, f"m{n}", 1)
    again = client(edge, transport, me, version=version, clean=False)
    # 3.1 has no Session Present: its CONNACK's first byte is always 0.
    assert again.session_present == (version == 4)
    assert [m.text for m in again.until_marker(pub, topic)] == [f"m{n}" for n in range(5)]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_unacknowledged_messages_come_again_with_dup_in_order(edge, client, way, transport):
    topic, me = fresh(), fresh("id")
    line = way(edge, transport)
    pub = client(edge)
    one = client(edge, transport, me, via=line, expiry=300, manual_ack=True)
    one.subscribe((topic, 1))
    for n in range(5):
        pub.publish(topic, f"m{n}")
    first = one.take(5)
    assert not any(m.dup for m in first)
    line.cut()
    one.abandon()
    pub.publish(topic, "m5")
    again = client(edge, transport, me, clean=False, expiry=300)
    got = again.until_marker(pub, topic)
    assert [m.text for m in got] == [f"m{n}" for n in range(6)]
    # The last message had not been sent before, unless the server did not yet know of the cut (QUIC).
    assert [m.dup for m in got][:5] == [True] * 5


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_publisher_flaps_and_each_message_arrives_once(edge, client, way, transport):
    """A QoS 2 publisher is cut and sends again: every message arrives once, in order."""
    topic, me = fresh(), fresh("id")
    sub = client(edge)
    sub.subscribe((topic, 2))
    line = way(edge, transport)
    pub = client(edge, transport, me, via=line, expiry=300)
    # At most 15 at a time: on a resume paho forgets its own limit and sends all its messages.
    for first in range(0, 90, 15):
        mids = [pub.publish(topic, f"{n}", 2, wait=False) for n in range(first, first + 15)]
        line.cut()
        pub.reconnect()
        assert pub.session_present
        for mid in mids:
            pub.wait_published(mid)
    got = sub.take(90)
    assert [m.text for m in got] == [f"{n}" for n in range(90)]
    assert sub.until_marker(client(edge), topic, 2) == []
