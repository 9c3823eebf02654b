"""Trouble on one link does not affect other clients: poison publishes, failover, a second node of the same name."""

from __future__ import annotations

import statistics
import threading
import time

import pytest

from harness import wire
from harness.cable import Cable
from harness.links import BrokerWay
from harness.names import fresh
from harness.process import wait_until
from harness.raw import Raw

QUICK = {"backoff_min": "20ms", "backoff_max": "200ms"}


def test_a_publish_that_makes_the_broker_close_the_link_is_quarantined(own_broker, own_edge, client):
    """An MQTT 3.1.1 broker cannot announce its largest packet: it closes the connection."""
    broker = own_broker(extra="max_packet_size 4000\n")
    upstream = {"servers": [broker.url], "protocol": "3.1.1", "publish_links": 1} | QUICK
    edge = own_edge(broker.url, ("tcp",), upstream=upstream).start()
    bad, good, old, sub = client(edge), client(edge), client(edge, version=4), client(edge)
    topic = fresh()
    sub.subscribe(f"{topic}/#")
    wait_until("the broker's record", lambda: edge.service.grep(r"The broker was probed"))
    mids = [good.publish(f"{topic}/good", f"before-{n}", wait=False) for n in range(20)]
    poison = [bad.publish(f"{topic}/bad", "x" * 5000, wait=False), old.publish(f"{topic}/old", "y" * 5000, wait=False)]
    mids += [good.publish(f"{topic}/good", f"after-{n}", wait=False) for n in range(20)]
    for mid in mids:
        good.wait_published(mid)
    # An MQTT 5 client gets a reason code; a 3.1.1 client gets just an acknowledgement.
    assert bad.wait_published(poison[0]) == 0x83
    old.wait_published(poison[1])
    got = []
    while len(set(got)) < 40:
        got.append(sub.next().text)
    assert list(dict.fromkeys(got)) == [f"before-{n}" for n in range(20)] + [f"after-{n}" for n in range(20)]
    bad.publish(f"{topic}/bad", "fine")
    assert sub.next().text == "fine"
    assert len(edge.service.wait_lines(r"A publish was quarantined", 2)) == 2
    assert edge.metrics().sum("tidegate_messages_dropped_total", reason="quarantined") == 2
    assert edge.metrics().sum("tidegate_upstream_disconnects_total", link="d0") == 0


def servers_of(edge) -> list[str]:
    return [link["server"] for link in edge.api("/api/v1/links")["links"] if link["state"] == "up"]


def test_all_links_go_to_the_next_server_together(own_broker, own_edge, client):
    first, second = own_broker(), own_broker()
    upstream = {"servers": [first.url, second.url]} | QUICK
    edge = own_edge(first.url, ("tcp",), upstream=upstream).start()
    one, pub, topic = client(edge), client(edge), fresh()
    one.subscribe(f"{topic}/#")
    everywhere = lambda broker: lambda: servers_of(edge) == [broker.url] * 5
    wait_until("the links are at the first", everywhere(first))
    first.stop()
    wait_until("the links are at the second", everywhere(second))
    pub.publish(f"{topic}/a", "over the second")
    assert one.next().text == "over the second"
    # The links stay at a server that serves, even when the first is back.
    first.start()
    pub.publish(f"{topic}/a", "still")
    assert one.next().text == "still"
    assert servers_of(edge) == [second.url] * 5
    second.stop()
    wait_until("the links are at the first again", everywhere(first))
    pub.publish(f"{topic}/a", "over the first")
    assert one.next().text == "over the first"
    assert len(edge.service.wait_lines(r"The links go to the next of upstream.servers", 2)) == 2
    assert not edge.service.grep(r"second Tidegate")
    assert not one.ended.is_set() and not pub.ended.is_set()


@pytest.mark.parametrize("broker", ("mosquitto", "mosquitto 3.1.1", "says why"))
def test_a_second_process_of_the_same_name_is_logged(own_broker, own_edge, broker):
    if broker == "says why":
        # Tidegate sends DISCONNECT with Session taken over; mosquitto only closes the connection.
        far = own_edge("embedded:", ("tcp",)).start()
        url = f"mqtt://127.0.0.1:{far['tcp'].port}"
    else:
        url = own_broker().url
    upstream = {"servers": [url], "protocol": "3.1.1" if "3.1.1" in broker else "5"} | QUICK
    node = {"id": fresh("twin")}
    edges = [own_edge(url, ("tcp",), upstream=upstream, node=node).start() for _ in range(2)]
    said = lambda what: lambda: any(edge.service.grep(what) for edge in edges)
    wait_until("it is said", said(r"second Tidegate with this node.id\?"), 20)
    if broker == "says why":
        wait_until("it says why", said(r"Link to the broker ended.*reason=taken_over"))


def test_publish_links_are_added_while_the_window_limits(own_broker, own_edge, client):
    """30 clients publish to a distant broker, 50 ms away in each direction, with a window of 20."""
    broker = own_broker()
    far = Cable(broker.port, delay=0.05)
    try:
        url = f"mqtt://127.0.0.1:{far.port}"
        edge = own_edge(url, ("tcp",), upstream={"servers": [url], "protocol": "3.1.1"} | QUICK).start()
        up = lambda: [link["name"] for link in edge.api("/api/v1/links")["links"] if link["role"] == "publish" and link["state"] == "up"]
        wait_until("two links", lambda: len(up()) == 2)
        idle = [link for link in edge.api("/api/v1/links")["links"] if link["state"] == "idle"]
        # Two data links are in use, and no client has a shared subscription.
        more = {"d": range(2, 8), "s": range(8), "p": range(2, 8)}
        assert {link["name"] for link in idle} == {f"{role}{n}" for role, numbers in more.items() for n in numbers}
        # A link that is not needed yet does not count as down.
        assert {labels["link"] for labels, _ in edge.metrics().series("tidegate_upstream_link_up")} == {"d0", "d1", "p0", "p1", "r0"}
        topic = fresh()
        # At the broker: a data link that lags on a busy machine would limit the publishes in the place of the window.
        sub = client(broker, via=BrokerWay(broker))
        sub.subscribe(f"{topic}/#")
        pubs = [client(edge) for _ in range(30)]
        sent = 0

        def more() -> bool:
            nonlocal sent
            mids = [(pub, pub.publish(f"{topic}/{n}", str(sent), wait=False)) for n, pub in enumerate(pubs) for _ in range(20)]
            for pub, mid in mids:
                pub.wait_published(mid, 30)
            sent += 20
            return len(up()) > 3

        wait_until("more links", more, 60, 0)
        # Idle clients move to the new link, and each client's order holds.
        seen: dict[str, int] = {}
        for m in sub.take(sent * 30, 30):
            assert int(m.text) >= seen.get(m.topic, 0)
            seen[m.topic] = int(m.text)
        edge.service.wait_line(r"A publish link is added")
    finally:
        far.close()


LARGE = b"x" * 3_000_000


@pytest.mark.parametrize("protocol", ("3.1.1", "5"))
@pytest.mark.parametrize("qos", (0, 1, 2))
def test_a_message_that_is_too_large_is_skipped_and_all_others_arrive(own_broker, own_edge, client, protocol, qos):
    """Live on a data link, retained on the retained link, and on a shared link; `packet_max` is 1 MiB."""
    broker = own_broker()
    edge = own_edge(broker.url, ("tcp",), upstream={"servers": [broker.url], "protocol": protocol} | QUICK).start()
    topic = fresh()
    me = fresh("sub")
    sub, group = client(edge, client_id=me), client(edge)
    sub.subscribe((f"{topic}/live/#", 2))
    group.subscribe((f"$share/g/{topic}/group/#", 2))
    with Raw(broker.port) as raw:
        raw.connect(fresh("far"))
        for n in range(20):
            for kind in ("live", "group"):
                raw.send(wire.publish(f"{topic}/{kind}/a", f"{n}".encode(), 0))
            if n == 10:
                for at, kind in enumerate(("live", "group", "state")):
                    raw.send(wire.publish(f"{topic}/{kind}/large", LARGE, qos, 1 + at if qos else 0, retain=kind == "state"))
        raw.send(wire.publish(f"{topic}/state/small", b"kept", 0, retain=True))
        for answered in range(3 if qos else 0):
            assert raw.recv().kind in (wire.PUBACK, wire.PUBREC)
        for at in range(3 if qos == 2 else 0):
            raw.send(wire.ack(wire.PUBREL, 1 + at))
            assert raw.recv().kind == wire.PUBCOMP
        for one in (sub, group):
            assert [m.text for m in one.take(20)] == [f"{n}" for n in range(20)]
        late = client(edge)
        late.subscribe((f"{topic}/state/#", 1))
        assert late.next().text == "kept"
    skipped = lambda kind: [line for line in edge.service.grep(r"A message of the broker was skipped") if f"{topic}/{kind}/large" in line]
    for kind in ("live", "group", "state"):
        wait_until(f"the log names {kind}", lambda: skipped(kind))
        assert len(skipped(kind)) == 1
    assert edge.metrics().sum("tidegate_messages_dropped_total", reason="upstream_too_large") == 3
    assert edge.metrics().sum("tidegate_upstream_disconnects_total") == 0
    wait_until("the session shows the gap", lambda: edge.api(f"/api/v1/sessions/{me}")["gaps"] == 1)


@pytest.mark.parametrize("protocol", ("3.1.1", "5"))
def test_qos_0_publishes_that_the_broker_closes_the_link_for_cost_others_little(own_broker, own_edge, client, protocol):
    """Five a second from one client, and another client's publishes on the same link, at QoS 0 and 1."""
    # MQTT 5: a topic of more levels than mosquitto takes; 3.1.1: a packet over the broker's limit.
    broker = own_broker(extra="max_packet_size 4000\n")
    upstream = {"servers": [broker.url], "protocol": protocol, "publish_links": 1}
    edge = own_edge(broker.url, ("tcp",), upstream=upstream, limits={"topic_levels_max": 1000}).start()
    bad, good, sub = client(edge), client(edge), client(edge)
    topic = fresh()
    sub.subscribe((f"{topic}/good/#", 1))
    wait_until("the broker's record", lambda: edge.service.grep(r"The broker was probed"))
    good.publish(f"{topic}/good/first")
    sub.next()
    sent, took = {}, {}
    begun = time.monotonic()
    n = 0
    while time.monotonic() - begun < 8:
        match protocol:
            case "3.1.1":
                bad.publish(f"{topic}/bad", "x" * 5000, 0, wait=False)
            case _:
                bad.publish(f"{topic}/bad" + "/x" * 250, "x", 0, wait=False)
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            sent[f"{n}"] = time.monotonic()
            good.publish(f"{topic}/good/{n % 2}", f"{n}", n % 2, wait=False)
            n += 1
            time.sleep(0.02)
            collect(sub, sent, took)
    wait_until("the last is there", lambda: collect(sub, sent, took) or f"{n - 1}" in took)
    wait_until("every QoS 1 publish is there", lambda: collect(sub, sent, took) or all(f"{i}" in took for i in range(1, n, 2)))
    times = sorted(took.values())
    assert times[int(len(times) * 0.99)] < 1, times[-10:]
    # The link ends a few times until the client is found, and then after ever longer pauses.
    ends = edge.metrics().sum("tidegate_upstream_disconnects_total", link="p0")
    assert 2 <= ends <= 10
    assert len(took) >= n - 3 * ends, "a QoS 0 publish may be lost where the link ends"
    edge.service.wait_line(r"A publish was quarantined.*qos=0")
    assert edge.metrics().sum("tidegate_messages_dropped_total", reason="quarantined") > 5
    assert edge.metrics().sum("tidegate_messages_dropped_total", reason="upstream_away_qos0") == 0


def collect(sub, sent, took) -> None:
    while not sub.incoming.empty():
        m = sub.incoming.get()
        took.setdefault(m.text, time.monotonic() - sent[m.text])


@pytest.mark.parametrize("protocol", ("3.1.1", "5"))
@pytest.mark.parametrize("version", (4, 5))
def test_a_subscribe_that_the_broker_closes_the_link_for_is_refused_and_costs_others_little(own_broker, own_edge, client, protocol, version):
    """MQTT 5: a filter of more levels than mosquitto takes; 3.1.1: a packet over the broker's limit."""
    broker = own_broker(extra="max_packet_size 4000\n" if protocol == "3.1.1" else "")
    upstream = {"servers": [broker.url], "protocol": protocol, "data_links": 1}
    edge = own_edge(broker.url, ("tcp",), upstream=upstream, limits={"topic_levels_max": 1000}).start()
    topic = fresh()
    bad, pub, sub = client(edge, version=version), client(edge), client(edge)
    sub.subscribe((f"{topic}/good/#", 1))
    for n in range(0, 40, 10):
        pub.publish(f"{topic}/state{n}/a", "retained", retain=True)
    wait_until("the broker's record", lambda: edge.service.grep(r"The broker was probed"))
    name = lambda n: f"{topic}/{n}/" + ("x" * 5000 if protocol == "3.1.1" else "x/" * 250)
    asked = threading.Thread(target=lambda: codes.extend(bad.subscribe((name(0), 1), expect=None)))
    codes: list[int] = []
    asked.start()
    took = []
    for n in range(40):
        begun = time.monotonic()
        pub.publish(f"{topic}/good/a", f"{n}")
        assert sub.next().text == f"{n}"
        took.append(time.monotonic() - begun)
        if n % 10 == 0:
            # New filters of others, and retained messages, wait behind the link's end at most.
            begun = time.monotonic()
            new = client(edge)
            new.subscribe((f"{topic}/state{n}/a", 1))
            assert new.next().text == "retained"
            took.append(time.monotonic() - begun)
    assert max(took) < 2 and sorted(took)[len(took) // 2] < 0.2, took
    asked.join(15)
    assert codes == [0x87 if version == 5 else 0x80]
    # Asked again, and for others like it, the broker is not asked at once.
    since = edge.mark()
    assert bad.subscribe((name(0), 1), expect=None) == codes
    assert bad.subscribe((name(1), 1), expect=None)[0] >= 0x80
    assert not edge.service.grep(r"Link to the broker ended", since)
    assert edge.metrics().sum("tidegate_upstream_disconnects_total", link="d0") <= 4
    assert len(edge.service.wait_lines(r"A filter was quarantined")) == 1
    assert not edge.service.grep(r"second Tidegate")
    bad.subscribe((f"{topic}/good/fine", 1), expect=None)


def test_qos_2_messages_one_after_the_other_take_little_longer_than_at_the_broker(own_broker, own_edge):
    """mosquitto as Debian ships it holds small packets back until earlier ones are acknowledged."""
    broker = own_broker(extra="set_tcp_nodelay false\n")
    edge = own_edge(broker.url, ("tcp",), upstream={"servers": [broker.url]}).start()
    edge.wait_log(r"The broker was probed")

    def times(port: int) -> list[float]:
        topic, took = fresh(), []
        with Raw(port) as pub:
            pub.connect(fresh("pub"))
            for n in range(1, 101):
                begun = time.monotonic()
                pub.send(wire.publish(topic, b"x", 2, n))
                assert pub.recv().kind == wire.PUBREC
                pub.send(wire.ack(wire.PUBREL, n))
                assert pub.recv().kind == wire.PUBCOMP
                took.append(time.monotonic() - begun)
        return took

    times(edge["tcp"].port)
    # The mean: at the broker itself some of them wait for an acknowledgement.
    own, ours = (statistics.mean(times(port)) for port in (broker.port, edge["tcp"].port))
    assert ours < max(2 * own, 0.004), (ours, own)


def test_a_broker_that_takes_the_user_name_for_the_client_identifier_is_recognised(own_broker, own_edge):
    broker = own_broker(of_listener="use_username_as_clientid true\n")
    upstream = {"servers": [broker.url], "username": "edge", "backoff_min": "20ms", "backoff_max": "2s"}
    for protocol in ("5", "3.1.1"):
        edge = own_edge(broker.url, ("tcp",), upstream=upstream | {"protocol": protocol}).start()
        edge.wait_log(r"use_username_as_clientid", timeout=30)
        assert not edge.service.grep(r"second Tidegate")
        edge.stop()


@pytest.mark.parametrize("protocol", ("5", "3.1.1"))
def test_a_broker_that_restarts_again_and_again_is_no_second_process(own_broker, own_edge, protocol):
    broker = own_broker()
    upstream = {"servers": [broker.url], "protocol": protocol, "backoff_min": "300ms", "backoff_max": "400ms"}
    edge = own_edge(broker.url, ("tcp",), upstream=upstream).start()
    for _ in range(7):
        edge.wait_metric("all links are up", lambda m: m.sum("tidegate_upstream_link_up") == 5)
        # It is back before a link tries to connect again.
        broker.stop()
        broker.start()
        edge.wait_metric("a link has noticed", lambda m: m.sum("tidegate_upstream_link_up") < 5)
    edge.wait_metric("all links are up", lambda m: m.sum("tidegate_upstream_link_up") == 5)
    assert not edge.service.grep(r"second Tidegate|use_username_as_clientid")
