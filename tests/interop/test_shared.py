"""Shared subscriptions: one member gets each message, whether the broker or Tidegate distributes."""

from __future__ import annotations

from collections import Counter

import pytest

from harness import wire
from harness.links import BrokerWay
from harness.names import fresh
from harness.process import wait_until
from harness.raw import Raw

QUICK = {"backoff_min": "20ms", "backoff_max": "200ms"}


def before(broker, own_edge, transports=("tcp",), session=None, **upstream):
    sections = {"upstream": {"servers": [broker.url]} | QUICK | upstream}
    if session:
        sections["session"] = session
    return own_edge(broker.url, transports, **sections).start()


def drained(member) -> list:
    got = []
    while not member.incoming.empty():
        got.append(member.incoming.get())
    return got


def test_each_message_reaches_one_member(edge, client):
    """Three protocol versions share one group; a plain subscriber beside it gets all messages."""
    topic = fresh()
    group = f"$share/workers/{topic}/#"
    members = [client(edge, transport, version=version) for transport, version in (("tcp", 5), ("ws", 4), ("wss", 5))]
    members[0].subscribe((group, 1), identifier=7)
    members[1].subscribe((group, 1))
    members[2].subscribe((group, 2))
    watcher, pub = client(edge), client(edge)
    watcher.subscribe((f"{topic}/#", 1))
    sent = [f"m{n}" for n in range(60)]
    for text in sent:
        pub.publish(f"{topic}/x", text)
    assert [watcher.next().text for _ in sent] == sent
    got: list[list] = [[] for _ in members]

    def all_there() -> bool:
        for into, member in zip(got, members):
            into += drained(member)
        return sum(map(len, got)) >= len(sent)

    wait_until("the members have all", all_there)
    watcher.until_marker(pub, f"{topic}/x")
    all_there()
    texts = [m.text for of in got for m in of if m.text in sent]
    assert Counter(texts) == Counter(sent), "a message was lost or came twice"
    assert all(len(of) >= 15 for of in got), [len(of) for of in got]
    for of in got:
        numbers = [int(m.text[1:]) for m in of if m.text in sent]
        assert numbers == sorted(numbers), "a member got messages out of order"
    assert all(m.props.SubscriptionIdentifier == [7] for m in got[0])


def test_a_group_is_one_member_at_the_broker(own_broker, own_edge, client):
    broker = own_broker()
    edge = before(broker, own_edge)
    topic = fresh()
    members = [client(edge) for _ in range(4)]
    for member in members:
        member.subscribe((f"$share/g/{topic}", 1))
    assert len(broker.service.wait_lines(rf"\$share/g/{topic} \(QoS")) == 1, "not exactly one SUBSCRIBE for the group"
    # The group has a link of its own.
    broker.service.wait_line(r"as tidegate-[\w-]+-s0 ")
    links = {link["name"]: link for link in edge.api("/api/v1/links")["links"]}
    assert links["s0"]["role"] == "shared" and links["s0"]["filters"] == 1
    # Another consumer at the broker itself is a member like Tidegate.
    direct = client(broker, via=BrokerWay(broker))
    direct.subscribe((f"$share/g/{topic}", 1))
    pub = client(edge)
    for n in range(40):
        pub.publish(topic, f"m{n}")
    wait_until("all came", lambda: sum(m.incoming.qsize() for m in members) + direct.incoming.qsize() >= 40)
    assert direct.incoming.qsize() == 20, "the broker does not balance between Tidegate and others"
    since = broker.mark()
    for member in members:
        member.unsubscribe(f"$share/g/{topic}")
    wait_until("the group is left", lambda: broker.service.grep(r"Received UNSUBSCRIBE from \S*-s0", since))
    for n in range(20):
        pub.publish(topic, f"late{n}")
    wait_until("the rest goes to the others", lambda: direct.incoming.qsize() >= 40)


def test_groups_get_no_retained_messages_and_plain_subscriptions_get_their_own_copies(edge, client):
    topic = fresh()
    pub = client(edge)
    pub.publish(topic, "kept", retain=True)
    one = client(edge)
    one.subscribe((f"$share/g/{topic}", 1), identifier=2)
    one.subscribe((topic, 1), identifier=3, retainHandling=2)
    pub.publish(topic, "live")
    got = sorted(one.next().props.SubscriptionIdentifier for _ in range(2))
    assert got == [[2], [3]], "a subscriber did not get exactly one copy"
    assert [m.text for m in one.until_own_marker(pub, topic)] == []


def test_connected_members_come_before_absent_ones(edge, client, way):
    topic = fresh()
    group = f"$share/g/{topic}"
    line = way(edge)
    away = client(edge, client_id=fresh("away"), via=line, expiry=300, clean=True)
    away.subscribe((group, 1))
    here, pub = client(edge), client(edge)
    here.subscribe((group, 1))
    line.cut()
    away.abandon()
    edge_gone(edge, away)
    for n in range(10):
        pub.publish(topic, f"m{n}")
    assert [here.next().text for _ in range(10)] == [f"m{n}" for n in range(10)]
    here.close()
    pub.publish(topic, "waits")
    away.reconnect()
    assert away.session_present and away.next().text == "waits", "the last member's queue lost the message"


def edge_gone(edge, one) -> None:
    name = one.client._client_id.decode()
    wait_until("the session is detached", lambda: not edge.api(f"/api/v1/sessions/{name}")["attached"])


def test_unacknowledged_messages_of_an_ended_member_go_to_another(edge, client, way):
    topic = fresh()
    group = f"$share/g/{topic}"
    line = way(edge)
    stuck = client(edge, client_id=fresh("stuck"), via=line, clean=True, manual_ack=True, receive_maximum=2)
    stuck.subscribe((group, 1))
    pub = client(edge)
    for n in range(4):
        pub.publish(topic, f"m{n}")
    assert [m.text for m in stuck.take(2)] == ["m0", "m1"], "the member did not get its window"
    other = client(edge)
    other.subscribe((group, 1))
    line.cut()
    # Without expiry the session ends with its connection.
    assert sorted(m.text for m in other.take(4)) == ["m0", "m1", "m2", "m3"]
    assert other.until_own_marker(pub, topic) == []


def test_a_member_that_is_away_for_long_loses_its_messages_to_others(own_broker, own_edge, client, way):
    edge = before(own_broker(), own_edge, session={"shared_redeliver_after": "500ms"})
    topic = fresh()
    group = f"$share/g/{topic}"
    name, pub = fresh("away"), client(edge)
    with Raw(edge["tcp"].port) as raw:
        raw.connect(name, expiry=300)
        assert raw.subscribe((group, 2)) == b"\x02"
        pub.publish(topic, "one", qos=1)
        pub.publish(topic, "two", qos=2)
        assert [raw.recv().payload for _ in range(2)] == [b"one", b"two"]
        other = client(edge)
        other.subscribe((group, 2))
    assert other.next().text == "one", "the QoS 1 message did not move to another member"
    with Raw(edge["tcp"].port) as raw:
        raw.connect(name, expiry=300, clean=False)
        again = raw.recv()
        assert (again.payload, again.qos, again.dup) == (b"two", 2, True), "the QoS 2 message did not stay with its member [MQTT-4.8.2-4]"
    assert other.incoming.empty()


def test_a_refused_delivery_goes_to_no_other_member(edge, client):
    """After a PUBACK with 0x80 or above, no other member gets the message [MQTT-4.8.2-6]."""
    topic = fresh()
    group = f"$share/g/{topic}"
    with Raw(edge["tcp"].port) as raw:
        raw.connect(fresh("refuser"))
        assert raw.subscribe((group, 1)) == b"\x01"
        pub = client(edge)
        pub.publish(topic, "poison")
        packet = raw.recv()
        other = client(edge)
        other.subscribe((group, 1))
        raw.send(wire.packet(wire.PUBACK, packet.packet_id.to_bytes(2, "big") + b"\x83\x00"))
        raw.send(wire.packet(wire.DISCONNECT, b"\x00\x00"))
        raw.wait_closed()
    assert other.until_own_marker(pub, topic) == []


@pytest.mark.parametrize("quirks", ["dead-shared", "no-shared"])
def test_groups_that_the_broker_cannot_serve_are_refused(quirks, own_edge, client):
    edge = own_edge("embedded:", upstream={"servers": [f"embedded:{quirks}"]}).start()
    # A probe's result holds for clients from the first link on.
    edge.wait_log(r"Link to the broker is up")
    five, four = client(edge), client(edge, version=4)
    assert five.connack_props.SharedSubscriptionAvailable == 0
    topic = fresh()
    assert five.subscribe((f"$share/g/{topic}", 1), (topic, 1), expect=None) == [0x9E, 1]
    assert four.subscribe((f"$share/g/{topic}", 1), expect=None) == [0x80]


BROKERS = [(quirks, "broker") for quirks in ("", "one", "no-ids", "small-window", "3.1.1", "lowest-qos")]
# Tidegate distributes, whatever the broker's support for groups.
BROKERS += [(quirks, "local") for quirks in ("", "dead-shared", "no-shared", "no-ids,dead-shared", "3.1.1,two-queues")]


@pytest.mark.parametrize(("quirks", "shared"), BROKERS)
def test_groups_work_before_each_broker(quirks, shared, own_edge, client):
    edge = own_edge("embedded:", upstream={"servers": [f"embedded:{quirks}"], "shared": shared}).start()
    edge.wait_log(r"The broker was probed")
    topic = fresh()
    members = [client(edge) for _ in range(2)]
    for member in members:
        member.subscribe((f"$share/g/{topic}/+", 1))
    pub = client(edge)
    sent = [f"m{n}" for n in range(30)]
    for text in sent:
        pub.publish(f"{topic}/x", text)
    got: list = []

    def all_there() -> bool:
        for member in members:
            got.extend(m.text for m in drained(member))
        return len(got) >= len(sent)

    wait_until("all came", all_there)
    assert Counter(got) == Counter(sent)


def test_a_group_is_there_again_after_the_broker_lost_it(own_broker, own_edge, client):
    broker = own_broker()
    edge = before(broker, own_edge)
    topic = fresh()
    one = client(edge)
    one.subscribe((f"$share/g/{topic}", 1))
    broker.stop()
    broker.forget()
    broker.start()
    pub = client(edge)

    def comes() -> bool:
        pub.publish(topic, "again")
        return not one.incoming.empty()

    wait_until("the group is back", comes, 20, 0.2)
