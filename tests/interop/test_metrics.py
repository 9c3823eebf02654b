"""The admin listener: a scrape that Prometheus' own tool accepts, health, and the read-only API."""

from __future__ import annotations

import json
import subprocess

from harness.names import fresh
from harness.raw import Raw

EXPECTED = {
    "tidegate_flaps_absorbed_total",
    "tidegate_connections_open",
    "tidegate_connections_total",
    "tidegate_sessions",
    "tidegate_queue_bytes",
    "tidegate_queue_messages",
    "tidegate_messages_dropped_total",
    "tidegate_upstream_link_up",
    "tidegate_upstream_window",
    "tidegate_upstream_connects_total",
    "tidegate_upstream_subscribes_total",
    "tidegate_upstream_unsubscribes_total",
}


def test_promtool_accepts_the_scrape(edge, client):
    topic = fresh()
    for transport in ("tcp", "wss", "quic"):
        one = client(edge, transport)
        one.subscribe(topic)
        one.publish(topic, "x", 2)
        one.next()
    status, body = edge.http("/metrics")
    assert status == 200
    done = subprocess.run(["promtool", "check", "metrics"], input=body, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0 and done.stdout + done.stderr == "", done.stdout + done.stderr


def test_metrics_exist_and_their_labels_are_bounded(edge, client):
    client_id, topic = fresh("secretclient"), fresh("secrettopic")
    one = client(edge, "ws", client_id)
    one.subscribe(topic)
    one.publish(topic, "x")
    one.next()
    metrics = edge.metrics()
    assert EXPECTED <= metrics.names(), EXPECTED - metrics.names()
    assert client_id not in metrics.text and topic not in metrics.text
    assert any(n.endswith("_bucket") and n.startswith("tidegate_") for n in metrics.names()), "no histogram"
    assert metrics.sum("tidegate_connections_open", transport="^ws$") >= 1
    assert metrics.sum("tidegate_upstream_link_up") >= 2
    assert len(metrics.samples) < 2000


def test_counters_match_the_traffic(own_broker, own_edge, client, way):
    broker = own_broker()
    edge = own_edge(broker.url, ("tcp", "ws")).start()
    topic, me = fresh(), fresh("id")
    line = way(edge, "ws")
    one = client(edge, client_id=me, via=line, expiry=300)
    one.subscribe(f"{topic}/a", f"{topic}/b")
    line.cut()
    one.abandon()
    edge.wait_metric("detached", lambda m: m.sum("tidegate_sessions", state="detached") == 1 and m.sum("tidegate_connections_open") == 0)
    pub = client(edge)
    for n in range(4):
        pub.publish(f"{topic}/a", "x" * 100)
    metrics = edge.wait_metric("four wait", lambda m: m if m.sum("tidegate_queue_messages") == 4 else None)
    assert 400 <= metrics.sum("tidegate_queue_bytes") <= 4 * 1024
    back = client(edge, "tcp", me, clean=False, expiry=300)
    back.take(4)
    # The table by which the publisher's messages are recognised counts among the queues.
    pub.close()
    metrics = edge.wait_metric("nothing waits", lambda m: m if m.sum("tidegate_queue_messages") == 0 and m.sum("tidegate_queue_bytes") == 0 else None)
    assert metrics.sum("tidegate_flaps_absorbed_total") == 1
    assert metrics.sum("tidegate_messages_received_total", qos="1") == 4
    edge.wait_metric("four are delivered", lambda m: m.sum("tidegate_messages_delivered_total", qos="1") == 4)
    # The counts of CONNECT and SUBSCRIBE equal the broker's own counts.
    assert metrics.sum("tidegate_upstream_connects_total") == len(broker.connects())
    assert metrics.sum("tidegate_upstream_subscribes_total") >= 2


def test_health_and_readiness_answer(edge):
    assert edge.http("/healthz")[0] == 200
    assert edge.http("/readyz")[0] == 200
    assert edge.http("/nothing")[0] == 404


def test_the_sessions_api_shows_no_payload(edge, client):
    ids = sorted(fresh("api") for _ in range(5))
    made = [client(edge, "ws", one, expiry=300) for one in ids]
    topic = fresh()
    made[0].subscribe(topic)
    made[1].subscribe(topic)
    made[1].close()
    made[0].publish(topic, "a payload nobody may see")
    made[0].next()
    body = json.dumps(edge.api("/api/v1/sessions"))
    assert "a payload nobody may see" not in body
    one = edge.api(f"/api/v1/sessions/{ids[0]}")
    assert ids[0] in json.dumps(one) and topic in json.dumps(one) and "payload nobody" not in json.dumps(one)
    assert edge.http("/api/v1/sessions/no-such-client")[0] == 404
    links = edge.api("/api/v1/links")
    assert len(json.dumps(links)) > 20


def test_the_sessions_api_is_paged(own_broker, own_edge):
    edge = own_edge(own_broker().url).start()
    ids = {f"page-{n:03}" for n in range(25)}
    held = []
    for one in sorted(ids):
        raw = Raw(edge["tcp"].port)
        raw.connect(one, expiry=300)
        held.append(raw)
    seen, path, pages = [], "/api/v1/sessions?limit=10", 0
    while path:
        page = edge.api(path)
        items = next(v for v in page.values() if isinstance(v, list))
        assert len(items) <= 10
        seen += [i["client_id"] for i in items]
        pages += 1
        assert pages < 10
        cursor = page.get("next")
        path = f"/api/v1/sessions?limit=10&after={cursor}" if cursor else None
    assert sorted(seen) == sorted(ids) and pages == 3
    for raw in held:
        raw.close()


def test_the_api_is_read_only_and_odd_names_are_safe(edge):
    import urllib.error
    import urllib.request

    url = f"http://127.0.0.1:{edge['admin'].port}/api/v1/sessions/x"
    for method in ("POST", "PUT", "DELETE"):
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method=method, data=b""), timeout=5) as answer:
                raise AssertionError(f"{method}: {answer.status}")
        except urllib.error.HTTPError as error:
            assert error.code in (404, 405)
    with Raw(edge["tcp"].port) as raw:
        raw.connect('odd/"name"<script> \u2028', expiry=0)
        assert edge.http("/api/v1/sessions/odd%2F%22name%22%3Cscript%3E%20%E2%80%A8")[0] == 200
        json.loads(edge.http("/api/v1/sessions")[1])
