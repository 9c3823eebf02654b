"""The probe's record of a broker, for mosquitto and for the embedded broker with its quirks."""

from __future__ import annotations

import re
import socket
import threading
import time

import pytest

from harness import brokers, wire
from harness.edge import tidegate
from harness.names import fresh
from harness.raw import Raw

QUICK = {"backoff_min": "20ms", "backoff_max": "200ms"}


def broker_of(edge) -> dict:
    return edge.api("/api/v1/links")["broker"]


def test_the_record_of_mosquitto_is_shown_everywhere(own_broker, own_edge, client):
    broker = own_broker()
    edge = own_edge(broker.url, upstream={"servers": [broker.url]} | QUICK).start()
    line = edge.wait_log(r"The broker was probed")
    assert "mosquitto" in line and "mapping=\"identifiers\"" in line, line
    record = broker_of(edge)
    assert record["source"] == "probed", record
    assert record["identifiers"] == "working"
    assert record["copies"] == "many"
    assert record["overlap_qos"] == "each"
    assert record["shared"] == "alive"
    assert record["window"] == 64
    for yes in ("retain_handling", "retain_as_published", "retained_wildcard", "retained_marker", "properties"):
        assert record[yes] is True, (yes, record)
    series = [labels for labels, value in edge.metrics().series("tidegate_broker_info") if value == 1]
    assert len(series) == 1 and series[0]["mapping"] == "identifiers", series
    assert len(broker.service.wait_lines(r"New client connected .* as .*-probe ")) == 1, "one probe for all links"
    watcher = client(edge)
    watcher.subscribe(("#", 1))
    watcher.publish(fresh(), "end")
    assert [m for m in watcher.until("end") if m.topic.startswith("tidegate/")] == [], "a message of the probe was left behind"


def test_the_record_of_an_unconfigured_mosquitto_is_complete(own_broker):
    """Each of mosquitto's answers waits 40 ms for a TCP acknowledgement; the probe allows for that time."""
    broker = own_broker(extra="set_tcp_nodelay false\n")
    result = tidegate("probe", broker.url)
    record = dict(re.split(r"  +", line, maxsplit=1) for line in result.stdout.splitlines() if "  " in line)
    assert record["shared subscriptions"] == "alive", result.stdout
    assert "missing" not in record, result.stdout


# mosquitto as Debian ships it, over the harness's configuration.
DEBIAN = "set_tcp_nodelay false\nmax_inflight_messages 20\nmax_queued_messages 1000\npersistence false\n"


@pytest.mark.parametrize("protocol", ("5", "3.1.1"))
def test_the_probe_of_a_mosquitto_as_debian_ships_it_is_short_and_complete(own_broker, own_edge, protocol):
    broker = own_broker(extra=DEBIAN)
    edge = own_edge(broker.url, upstream={"servers": [broker.url], "protocol": protocol} | QUICK).start()
    line = edge.wait_log(r"The broker was probed")
    took = int(re.search(r"took_ms=(\d+)", line).group(1))
    assert took < 500, line
    record = broker_of(edge)
    assert record["source"] == "probed" and record["nodelay"] is False, record
    result = tidegate("probe", broker.url)
    assert re.search(r"software +mosquitto version 2", result.stdout), result.stdout
    assert "set_tcp_nodelay true" in result.stdout, result.stdout
    assert "EMQX" not in result.stdout and "HiveMQ" not in result.stdout, result.stdout
    # Where it is on, it is not advised.
    assert "set_tcp_nodelay" not in tidegate("probe", own_broker().url).stdout


def test_qos_0_publishes_wait_while_the_broker_is_probed(own_broker, own_edge, client):
    broker = own_broker(extra=DEBIAN)
    with Raw(broker.port) as watcher:
        topic = fresh()
        watcher.connect(fresh("watcher"))
        watcher.subscribe((f"{topic}/#", 0))
        edge = own_edge(broker.url, upstream={"servers": [broker.url]}).start()
        pub = client(edge)
        for n in range(50):
            pub.publish(f"{topic}/a", f"{n}", 0)
        assert [watcher.recv().payload for _ in range(50)] == [f"{n}".encode() for n in range(50)]
    assert edge.metrics().sum("tidegate_messages_dropped_total", reason="upstream_away_qos0") == 0


def test_a_shared_subscription_that_brings_nothing_is_dead(tmp_path):
    """aedes takes `$share/...` for a plain filter and grants it; other messages of the probe arrive meanwhile."""
    broker = brokers.Aedes(tmp_path / "aedes").start()
    try:
        for _ in range(5):
            result = tidegate("probe", broker.url)
            assert re.search(r"shared subscriptions +dead", result.stdout), result.stdout
    finally:
        broker.close()


class Trickle(threading.Thread):
    """A path to a broker on which the probe's connection gets one byte of CONNACK each second, or a flood."""

    def __init__(self, port: int, flood: bool):
        super().__init__(daemon=True)
        self.to, self.flood = port, flood
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.sent = 0
        self.start()

    def run(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(near,), daemon=True).start()

    def serve(self, near: socket.socket) -> None:
        far = socket.create_connection(("127.0.0.1", self.to))
        connect = near.recv(65536)
        far.sendall(connect)
        probes = b"-probe" in connect
        threading.Thread(target=self.copy, args=(near, far), daemon=True).start()
        if not probes:
            return self.copy(far, near)
        try:
            while chunk := far.recv(65536):
                if not self.flood:
                    for byte in chunk:
                        near.sendall(bytes([byte]))
                        time.sleep(1)
                    continue
                near.sendall(chunk)
                for _ in range(1000):
                    near.sendall(wire.publish("tidegate/probe/flood", b"x" * 60_000))
                    self.sent += 60_000
        except OSError:
            pass

    @staticmethod
    def copy(near: socket.socket, far: socket.socket) -> None:
        try:
            while chunk := near.recv(65536):
                far.sendall(chunk)
        except OSError:
            pass
        for one in (near, far):
            one.close()


@pytest.mark.parametrize("flood", (False, True), ids=("trickles", "floods"))
def test_a_broker_that_trickles_or_floods_while_it_is_probed(own_broker, own_edge, client, flood):
    broker = own_broker()
    path = Trickle(broker.port, flood)
    url = f"mqtt://127.0.0.1:{path.port}"
    edge = own_edge(url, upstream={"servers": [url]} | QUICK).start()
    # The probe is cut short soon, and stalls the links no further.
    begun = time.monotonic()
    edge.wait_log(r"assumed at its worst")
    edge.wait_metric("all links are up", lambda m: m.sum("tidegate_upstream_link_up") == 5)
    assert time.monotonic() - begun < 5
    # Far more than it takes was not read.
    assert path.sent < 30_000_000, path.sent
    topic = fresh()
    one = client(edge)
    one.subscribe((topic, 1))
    one.publish(topic, "it works")
    assert one.next().text == "it works"
    path.listener.close()


def test_a_probe_that_runs_is_not_shown_to_clients(own_broker, own_edge, client):
    """Another node's probe goes by while a client of this one watches everything."""
    broker = own_broker()
    edge = own_edge(broker.url, upstream={"servers": [broker.url]} | QUICK).start()
    watcher = client(edge)
    watcher.subscribe(("#", 2))
    direct = broker.mark()
    result = tidegate("probe", broker.url)
    assert result.returncode == 0, result.stderr
    # The probe passes through the broker.
    broker.service.wait_line(r"Received PUBLISH .*'tidegate/probe/", since=direct)
    watcher.publish(fresh(), "end")
    assert [m.topic for m in watcher.until("end")] == []


def test_an_old_mosquitto_is_mapped_by_disjoint_placement(own_broker, own_edge):
    broker = own_broker()
    edge = own_edge(broker.url, upstream={"servers": [broker.url], "protocol": "3.1.1"} | QUICK).start()
    edge.wait_log(r"The broker was probed")
    record = broker_of(edge)
    assert record["protocol"] == "3.1.1" and record["identifiers"] == "none"
    # mosquitto 2.0: one copy, at the QoS of the filter that its tree has first.
    assert record["copies"] == "one" and record["overlap_qos"] == "lower", record


def test_a_denied_probe_leads_to_the_most_careful_record(own_broker, own_edge, tmp_path, client):
    acl = tmp_path / "acl"
    acl.write_text("pattern readwrite open/#\ntopic readwrite open/#\n")
    broker = own_broker(extra=f"acl_file {acl}\n")
    edge = own_edge(broker.url, upstream={"servers": [broker.url]} | QUICK).start()
    edge.wait_log(r"assumed at its worst")
    record = broker_of(edge)
    assert record["source"] == "partly" and record["missing"], record
    assert record["identifiers"] == "assumed"
    topic = f"open/{fresh()}"
    one = client(edge)
    one.subscribe((topic, 1))
    one.publish(topic, "it works")
    assert one.next().text == "it works"


def test_a_probe_that_is_off_is_not_sent(own_broker, own_edge):
    broker = own_broker()
    edge = own_edge(broker.url, upstream={"servers": [broker.url], "probe": "off"} | QUICK).start()
    edge.wait_metric("a link is up", lambda m: m.sum("tidegate_upstream_link_up") >= 1)
    assert broker_of(edge)["source"] == "connack"
    assert not broker.service.grep(r"-probe ")


@pytest.mark.parametrize("quirks, shown", [
    ("", {"shared subscriptions": "alive", "mapping": "identifiers"}),
    ("no-ids,dead-shared", {"shared subscriptions": "dead", "mapping": "disjoint placement"}),
    ("small-window,no-rap", {"send window": "10", "retain as published": "no"}),
    ("3.1.1", {"protocol": "3.1.1", "mapping": "disjoint placement"}),
])
def test_the_command_prints_the_record(quirks, shown):
    result = tidegate("probe", f"embedded:{quirks}")
    assert result.returncode == 0, result.stderr
    lines = {line[:24].strip(): line[24:].strip() for line in result.stdout.splitlines() if line[:24].strip()}
    for name, value in shown.items():
        assert lines[name] == value, result.stdout


def test_the_command_gives_advice_and_errors(own_broker):
    broker = own_broker()
    result = tidegate("probe", broker.url)
    assert "max_queued_messages" in result.stdout, result.stdout
    result = tidegate("probe", "mqtt://127.0.0.1:1")
    assert result.returncode == 75 and "refused" in result.stderr, (result.returncode, result.stderr)
    result = tidegate("probe", "http://broker")
    assert result.returncode == 64, result.returncode
