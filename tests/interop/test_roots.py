"""Roots: permanent filters, so that clients' filters inside them cost the broker nothing."""

from __future__ import annotations

import pytest

from harness.edge import tidegate
from harness.names import fresh
from harness.process import wait_until

QUICK = {"backoff_min": "20ms", "backoff_max": "200ms"}


def rooted(own_broker, own_edge, topic: str, **upstream):
    broker = own_broker()
    edge = own_edge(broker.url, upstream={"servers": [broker.url], "roots": [f"{topic}/#"]} | QUICK | upstream).start()
    edge.wait_log(r"Link to the broker is up.*link=\"?d0")
    return broker, edge


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_filters_inside_a_root_cost_the_broker_nothing(protocol, own_broker, own_edge, client):
    topic = fresh()
    broker, edge = rooted(own_broker, own_edge, topic, protocol=protocol)
    clients = [client(edge) for _ in range(8)]
    pub = client(edge)
    clients[0].subscribe((f"{topic}/#", 1))
    since = broker.mark()
    for n, one in enumerate(clients[1:], 1):
        one.subscribe((f"{topic}/dev/{n}", n % 3), (f"{topic}/+/all", 1))
    for n in range(1, 8):
        pub.publish(f"{topic}/dev/{n}", f"own{n}", qos=2)
    pub.publish(f"{topic}/x/all", "all")
    for n, one in enumerate(clients[1:], 1):
        # paho hands a QoS 2 message over at its PUBREL, so a later message may appear before it.
        own, everyone = sorted((one.next(), one.next()), key=lambda m: m.text == "all")
        assert (own.text, own.qos) == (f"own{n}", n % 3)
        assert everyone.text == "all"
        assert one.incoming.empty()
    assert [m.text for m in clients[0].take(8)] == [f"own{n}" for n in range(1, 8)] + ["all"]
    subscribes = [line for line in broker.received("SUBSCRIBE", since) if "-d" in line]
    assert subscribes == [], "a data link sent SUBSCRIBE"


def test_overlapping_filters_inside_and_outside_a_root_give_one_copy(own_broker, own_edge, client):
    """Each client gets one copy, by a root or by filters of its own."""
    topic = fresh()
    broker, edge = rooted(own_broker, own_edge, topic)
    one, pub = client(edge), client(edge)
    one.subscribe((f"{topic}/a", 0), identifier=1)
    one.subscribe(("+/a", 2), identifier=2)
    one.subscribe((f"{topic}/+", 1), identifier=3)
    one.subscribe((f"{topic}/#", 1), identifier=4)
    pub.publish(f"{topic}/a", "x", qos=2)
    got = one.next()
    assert (got.text, got.qos) == ("x", 2)
    assert sorted(got.props.SubscriptionIdentifier) == [1, 2, 3, 4]
    assert one.until_own_marker(pub, f"{topic}/a", 2) == []
    one.unsubscribe("+/a")
    pub.publish(f"{topic}/a", "y", qos=2)
    got = one.next()
    assert (got.text, got.qos) == ("y", 1)


def test_retained_messages_inside_a_root_come_once(own_broker, own_edge, client):
    topic = fresh()
    broker, edge = rooted(own_broker, own_edge, topic)
    pub = client(edge)
    for n in range(5):
        pub.publish(f"{topic}/r/{n}", f"kept{n}", retain=True)
    for _ in range(2):
        one = client(edge)
        one.subscribe((f"{topic}/r/+", 1))
        got = one.take(5)
        assert sorted(m.text for m in got) == [f"kept{n}" for n in range(5)] and all(m.retain for m in got)
        assert one.until_own_marker(pub, f"{topic}/r/x") == []


def test_a_root_comes_back_with_the_broker(own_broker, own_edge, client):
    topic = fresh()
    broker, edge = rooted(own_broker, own_edge, topic)
    one, pub = client(edge), client(edge)
    one.subscribe((f"{topic}/a", 1))
    broker.stop()
    broker.forget()
    two = client(edge)
    broker.start()

    def comes() -> bool:
        pub.publish(f"{topic}/a", "again")
        return not one.incoming.empty()

    wait_until("the root is back", comes, 20, 0.2)
    two.subscribe((f"{topic}/b", 1))
    pub.publish(f"{topic}/b", "b")
    assert two.next().text == "b"


def test_a_subscribe_while_the_broker_is_away_waits(own_broker, own_edge, client):
    topic = fresh()
    broker = own_broker()
    broker.stop()
    edge = own_edge(broker.url, upstream={"servers": [broker.url], "roots": [f"{topic}/#"]} | QUICK).start()
    one = client(edge)
    _, mid = one.client.subscribe(f"{topic}/a", qos=1)
    broker.start()
    assert [r.value for r in one._wait_ack("subscribe", mid)] == [1]
    one.publish(f"{topic}/a", "x")
    assert one.next().text == "x"


def test_a_refused_root_refuses_its_filters(own_edge, client):
    """The broker is a Tidegate with rules: mosquitto 2.0 grants filters whose messages it will not deliver."""
    rules = [{"who": "*", "allow": ["publish", "subscribe"], "topics": ["open/#", "probes/#"]}]
    broker = own_edge("embedded:", upstream={"servers": ["embedded:"]}, auth={"acl": "rules"}, acl=rules).start()
    url = f"mqtt://127.0.0.1:{broker['tcp'].port}"
    edge = own_edge(url, upstream={"servers": [url], "roots": ["closed/#"], "probe_topic": "probes"} | QUICK).start()
    edge.wait_log(r"The broker refused a filter")
    one = client(edge)
    assert one.subscribe((f"closed/{fresh()}", 1), ("open/x", 1), expect=None) == [0x87, 1]


def test_overlapping_roots_are_refused_at_start(tmp_path):
    file = tmp_path / "t.toml"
    file.write_text('version = 1\n[node]\nid = "e"\n[[listeners]]\nname = "t"\ntransport = "tcp"\nbind = "127.0.0.1:0"\n[auth]\nacl = "open"\n[upstream]\nservers = ["mqtt://127.0.0.1:1"]\nroots = ["a/#", "+/b"]\n')
    result = tidegate("check", "--config", file)
    assert result.returncode == 64 and "upstream.roots[1]" in result.stderr and "overlaps" in result.stderr, result.stderr


def test_the_log_names_the_root_to_configure(own_edge, client):
    edge = own_edge("embedded:").start()
    topic = fresh()
    some = [client(edge) for _ in range(3)]
    for n, one in enumerate(some):
        names = [(f"{topic}/fleet/{n}-{m}/cmd", 1) for m in range(400)]
        for at in range(0, 400, 100):
            one.subscribe(*names[at : at + 100])
        one.subscribe((f"{topic}-other/{n}", 1))
    edge.wait_log(rf"upstream.roots = ..?{topic}/fleet/#")
