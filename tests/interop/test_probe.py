"""What Tidegate finds out about a broker, against mosquitto and the embedded broker with its quirks."""

from __future__ import annotations

import re

import pytest

from harness.edge import tidegate
from harness.names import fresh

QUICK = {"backoff_min": "20ms", "backoff_max": "200ms"}


def core_of(edge) -> dict:
    return edge.api("/api/v1/links")["core"]


def test_the_record_of_mosquitto_is_shown_everywhere(own_core, own_edge, client):
    core = own_core()
    edge = own_edge(core.url, upstream={"servers": [core.url]} | QUICK).start()
    line = edge.wait_log(r"The broker was probed")
    assert "mosquitto" in line and "mapping=\"identifiers\"" in line, line
    record = core_of(edge)
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
    assert len(core.service.grep(r"New client connected .* as .*-probe ")) == 1, "one probe for all links"
    watcher = client(edge)
    watcher.subscribe(("#", 1))
    watcher.publish(fresh(), "end")
    assert [m for m in watcher.until("end") if m.topic.startswith("tidegate/")] == [], "nothing is left of it"


def test_a_mosquitto_as_it_comes_is_seen_whole(own_core):
    """Each of its answers waits 40 ms for our acknowledgement: the probe has time for that."""
    core = own_core(extra="set_tcp_nodelay false\n")
    result = tidegate("probe", core.url)
    record = dict(re.split(r"  +", line, maxsplit=1) for line in result.stdout.splitlines() if "  " in line)
    assert record["shared subscriptions"] == "alive", result.stdout
    assert "missing" not in record, result.stdout


def test_a_probe_that_runs_is_not_shown_to_clients(own_core, own_edge, client):
    """Another node's probe goes by while a client of this one watches everything."""
    core = own_core()
    edge = own_edge(core.url, upstream={"servers": [core.url]} | QUICK).start()
    watcher = client(edge)
    watcher.subscribe(("#", 2))
    direct = core.mark()
    result = tidegate("probe", core.url)
    assert result.returncode == 0, result.stderr
    assert core.service.grep(r"Received PUBLISH .*'tidegate/probe/", direct), "it went through the core"
    watcher.publish(fresh(), "end")
    assert [m.topic for m in watcher.until("end")] == []


def test_an_old_mosquitto_is_mapped_by_disjoint_placement(own_core, own_edge):
    core = own_core()
    edge = own_edge(core.url, upstream={"servers": [core.url], "protocol": "3.1.1"} | QUICK).start()
    edge.wait_log(r"The broker was probed")
    record = core_of(edge)
    assert record["protocol"] == "3.1.1" and record["identifiers"] == "none"
    # mosquitto 2.0: one copy, at the QoS of the filter that its tree has first.
    assert record["copies"] == "one" and record["overlap_qos"] == "lower", record


def test_a_denied_probe_leads_to_the_worst_record(own_core, own_edge, tmp_path, client):
    acl = tmp_path / "acl"
    acl.write_text("pattern readwrite open/#\ntopic readwrite open/#\n")
    core = own_core(extra=f"acl_file {acl}\n")
    edge = own_edge(core.url, upstream={"servers": [core.url]} | QUICK).start()
    edge.wait_log(r"assumed at its worst")
    record = core_of(edge)
    assert record["source"] == "partly" and record["missing"], record
    assert record["identifiers"] == "assumed"
    topic = f"open/{fresh()}"
    one = client(edge)
    one.subscribe((topic, 1))
    one.publish(topic, "it works")
    assert one.next().text == "it works"


def test_no_probe_if_it_is_off(own_core, own_edge):
    core = own_core()
    edge = own_edge(core.url, upstream={"servers": [core.url], "probe": "off"} | QUICK).start()
    edge.wait_metric("a link is up", lambda m: m.sum("tidegate_upstream_link_up") >= 1)
    assert core_of(edge)["source"] == "connack"
    assert not core.service.grep(r"-probe ")


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


def test_the_command_gives_advice_and_errors(own_core):
    core = own_core()
    result = tidegate("probe", core.url)
    assert "max_queued_messages" in result.stdout, result.stdout
    result = tidegate("probe", "mqtt://127.0.0.1:1")
    assert result.returncode == 75 and "refused" in result.stderr, (result.returncode, result.stderr)
    result = tidegate("probe", "http://core")
    assert result.returncode == 64, result.returncode
