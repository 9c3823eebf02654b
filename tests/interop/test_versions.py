"""Each client version before each broker version: the features of both work, and a missing feature breaks nothing."""

from __future__ import annotations

import time

import pytest

from harness.names import fresh

QUICK = {"backoff_min": "20ms", "backoff_max": "200ms"}
BROKERS = ("5", "3.1.1")


@pytest.fixture(scope="module", params=BROKERS)
def before(request, tmp_path_factory, pki, broker):
    from harness.edge import Edge, config

    directory = tmp_path_factory.mktemp("versions")
    upstream = {"servers": [broker.url], "protocol": request.param} | QUICK
    edge = Edge(directory, config(broker.url, pki, ("tcp",), upstream=upstream), pki).start()
    edge.wait_log(r"The broker was probed")
    edge.broker_version = request.param
    yield edge
    edge.assert_sane()
    edge.close()


@pytest.mark.parametrize("sender", (5, 4, 3))
@pytest.mark.parametrize("receiver", (5, 4, 3))
def test_each_qos_and_retained_between_all_versions(before, client, sender, receiver):
    pub, sub, topic = client(before, version=sender), client(before, version=receiver), fresh()
    pub.publish(f"{topic}/kept", "kept", retain=True)
    sub.subscribe((f"{topic}/#", 2))
    got = sub.next()
    assert (got.text, got.retain) == ("kept", True)
    for qos in (0, 1, 2):
        pub.publish(f"{topic}/live", f"q{qos}", qos)
    got = sub.take(3)
    assert {(m.text, m.qos, m.retain) for m in got} == {("q0", 0, False), ("q1", 1, False), ("q2", 2, False)}
    pub.publish(f"{topic}/kept", "", retain=True)
    assert sub.next().payload == b""


def test_properties_reach_clients_as_far_as_the_broker_carries_them(before, client):
    pub, sub, old, topic = client(before), client(before), client(before, version=4), fresh()
    sub.subscribe(f"{topic}/#")
    old.subscribe(f"{topic}/#")
    pairs = [("b", "2"), ("a", "1"), ("b", "3"), ("", "")]
    pub.publish(
        f"{topic}/x", "x", UserProperty=pairs, ContentType="text/plain", PayloadFormatIndicator=1, CorrelationData=b"\x00\x01", ResponseTopic=f"{topic}/answer", MessageExpiryInterval=100
    )
    got = sub.next()
    assert got.text == "x" and old.next().text == "x"
    if before.broker_version == "5":
        assert got.props.UserProperty == pairs
        assert (got.props.ContentType, got.props.PayloadFormatIndicator, got.props.CorrelationData) == ("text/plain", 1, b"\x00\x01")
        assert got.props.ResponseTopic == f"{topic}/answer"
        assert 95 <= got.props.MessageExpiryInterval <= 100
    else:
        # The broker speaks 3.1.1, which cannot carry properties.
        assert not any(hasattr(got.props, name) for name in ("UserProperty", "ContentType", "CorrelationData", "ResponseTopic", "MessageExpiryInterval"))


def test_request_and_response_work(before, client):
    topic = fresh()
    # Where a 3.1.1 broker drops the Response Topic, both know it.
    known = f"{topic}/answer/me"
    asker, answerer = client(before), client(before)
    answerer.subscribe(f"{topic}/ask")
    asker.subscribe(f"{topic}/answer/me")
    for n in range(3):
        asker.publish(f"{topic}/ask", f"q{n}", ResponseTopic=known, CorrelationData=bytes([n]))
        got = answerer.next()
        assert getattr(got.props, "ResponseTopic", known) == known
        answerer.publish(known, f"a{n}", CorrelationData=getattr(got.props, "CorrelationData", b"?"))
        back = asker.next()
        assert back.text == f"a{n}"
        if before.broker_version == "5":
            assert (got.props.ResponseTopic, back.props.CorrelationData) == (known, bytes([n]))


def test_one_delivery_carries_several_identifiers(before, client):
    one, pub, topic = client(before), client(before), fresh()
    for identifier, name in ((7, f"{topic}/+"), (268_435_455, f"{topic}/a"), (9, f"{topic}/#")):
        one.subscribe(name, identifier=identifier)
    # A replaced subscription has the new identifier alone [MQTT-3.8.4-3].
    one.subscribe(f"{topic}/a", identifier=8)
    # A subscription without an identifier gets none of the others'.
    other = client(before)
    other.subscribe(f"{topic}/#")
    for n in range(10):
        pub.publish(f"{topic}/a", f"m{n}")
    for n in range(10):
        got = one.next()
        assert got.text == f"m{n}" and sorted(got.props.SubscriptionIdentifier) == [7, 8, 9]
        assert not hasattr(other.next().props, "SubscriptionIdentifier")
    pub.publish(f"{topic}/b", "b")
    assert sorted(one.next().props.SubscriptionIdentifier) == [7, 9]


def test_expiry_counts_down_in_the_offline_queue(before, client):
    """Queued messages expire in Tidegate, whether the broker knows the interval or not."""
    name, topic, pub = fresh("x"), fresh(), client(before)
    one = client(before, client_id=name, expiry=300)
    one.subscribe(topic)
    one.close()
    pub.publish(topic, "soon over", MessageExpiryInterval=1)
    pub.publish(topic, "stays", MessageExpiryInterval=100)
    time.sleep(1.2)  # Real time must pass.
    again = client(before, client_id=name, expiry=300, clean=False)
    got = [again.next().text]
    if before.broker_version != "5":
        # The interval was lost on the way.
        assert got == ["soon over"]
        got = [again.next().text]
    assert got == ["stays"]


def test_dollar_topics_are_hidden_from_clients_by_default(before, client):
    """`#` does not match the broker's own topics, and $SYS is refused where no rule names it."""
    one, pub, topic = client(before), client(before), fresh()
    assert one.subscribe(("$SYS/#", 0), ("#", 0), ("+/broker/version", 0), expect=None) == [0x87, 0, 0]
    got = one.until_own_marker(pub, topic)
    assert not [m for m in got if m.topic.startswith("$")]
