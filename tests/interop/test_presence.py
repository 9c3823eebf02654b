"""Tidegate publishes clients' presence to the broker and hides flaps."""

from __future__ import annotations

import json
import time

import pytest

from harness import links, paho
from harness.names import fresh


@pytest.fixture
def told(broker, own_edge, client):
    """A Tidegate that publishes presence, and a client that receives it."""

    def make(grace: str):
        base = fresh()
        edge = own_edge(broker.url, ("tcp",), session={"will_grace": grace, "presence_topic": f"{base}/%c"}).start()
        name = fresh("watcher")
        watcher = client(edge, client_id=name)
        watcher.subscribe(f"{base}/+")
        # The watcher's own arrival is published just before or just after it subscribes.
        assert [m for m in watcher.until_marker(watcher, f"{base}/marker") if word(m) != (name, True)] == []
        way = links.Way(edge, "tcp")
        made.append(way)
        return edge, watcher, way, base

    made: list = []
    yield make
    for one in made:
        one.close()


def word(m) -> tuple[str, bool]:
    said = json.loads(m.payload)
    assert m.qos == 1 and not m.retain and m.topic.endswith("/" + said["client_id"])
    assert abs(said["at"] / 1000 - time.time()) < 60
    return said["client_id"], said["online"]


@pytest.mark.parametrize("expiry", (0, 300))
def test_each_arrival_and_departure_is_published(told, expiry):
    _, watcher, way, _ = told("0s")
    name = fresh("phone")
    one = paho.Paho(way, name, expiry=expiry)
    assert word(watcher.next()) == (name, True)
    one.close()
    assert word(watcher.next()) == (name, False)
    one = paho.Paho(way, name, expiry=expiry, clean=False)
    assert word(watcher.next()) == (name, True)
    way.cut()
    one.abandon()
    assert word(watcher.next()) == (name, False)


@pytest.mark.parametrize("kind", ("clean", "kept", "old"))
def test_a_short_flap_is_hidden(told, client, kind):
    edge, watcher, way, base = told("2s")
    how = {"clean": {}, "kept": {"expiry": 300, "clean": False}, "old": {"version": 4, "clean": False}}[kind]
    name, topic = fresh("phone"), fresh()
    wills = client(edge, client_id=fresh("wills"))
    assert word(watcher.next())[1]
    wills.subscribe(topic)
    will = {"topic": topic, "payload": "gone", "qos": 1}
    one = paho.Paho(way, name, will=will, **how)
    assert word(watcher.next()) == (name, True)
    for _ in range(3):
        way.cut()
        one.abandon()
        one = paho.Paho(way, name, will=will, **how)
    assert watcher.until_marker(watcher, f"{base}/marker") == []
    assert wills.until_marker(wills, topic) == []
    # The absence of a client that stays away is published once, with its will.
    began = time.monotonic()
    way.cut()
    one.abandon()
    assert wills.next().text == "gone"
    assert word(watcher.next()) == (name, False)
    assert time.monotonic() - began > 1.9
    # A client that sends DISCONNECT does not flap.
    one = paho.Paho(way, name, will=will, **how)
    assert word(watcher.next()) == (name, True)
    one.close()
    assert word(watcher.next()) == (name, False)
    assert wills.until_marker(wills, topic) == []


def test_a_session_that_ends_within_the_grace_keeps_its_will_until_then(told, client):
    edge, _, way, _ = told("3s")
    topic, wills = fresh(), client(edge)
    wills.subscribe(topic)
    will = {"topic": topic, "payload": "gone", "qos": 1}
    name = fresh("phone")
    one = paho.Paho(way, name, will=will, expiry=1)
    way.cut()
    one.abandon()
    time.sleep(1.5)  # Real time must pass: the session ends, the grace period goes on.
    one = paho.Paho(way, name, will=will, expiry=1)
    assert wills.until_marker(wills, topic) == []
    way.cut()
    one.abandon()
    assert wills.next().text == "gone"


def test_a_name_that_cannot_be_part_of_a_topic_is_not_published(told):
    edge, watcher, way, _ = told("0s")
    paho.Paho(way, "a/b").close()
    name = fresh("phone")
    paho.Paho(way, name)
    assert word(watcher.next()) == (name, True)
    edge.service.wait_line(r"presence is not published")
