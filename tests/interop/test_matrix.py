"""Checks which of MQTT's semantics hold through Tidegate before each broker. The run makes the table in the documents."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from harness import brokers, links, paho
from harness.mosquitto import Mosquitto
from harness.edge import Edge, config
from harness.names import fresh
from harness.paho import publish_props

PAGE = Path(__file__).parents[2] / "docs" / "broker-compatibility.md"
BEGIN, END = "<!-- brokers: begin -->", "<!-- brokers: end -->"
QUICK = {"backoff_min": "20ms", "backoff_max": "200ms"}

NAMES = {
    "embedded": "embedded",
    "mosquitto": "mosquitto 2.0, MQTT 5",
    "mosquitto3": "mosquitto 2.0, MQTT 3.1.1",
    "rabbitmq": "RabbitMQ 3.10",
    "aedes": "aedes 1.2",
    "rumqttd": "rumqttd 0.20",
}
DEFAULT = ["embedded", "mosquitto", "mosquitto3"]
TIER = list(NAMES) if os.environ.get("TIDEGATE_FULL") == "1" else DEFAULT
# Semantics that a broker lacks cannot hold before it.
MISSING = {
    "mosquitto3": {"No Local": "refused", "RETAIN as published": "no", "user properties": "no", "message expiry at the broker": "no"},
    "rabbitmq": {
        "No Local": "refused",
        "RETAIN as published": "no",
        "user properties": "no",
        "message expiry at the broker": "no",
        "shared subscriptions": "refused",
        "retained, wildcard": "no",
        "QoS 2": "as QoS 1",
    },
    "aedes": {
        "No Local": "refused",
        "RETAIN as published": "no",
        "user properties": "no",
        "message expiry at the broker": "no",
        "shared subscriptions": "refused",
    },
    "rumqttd": {"RETAIN as published": "no"},
}


class Bench:
    """One Tidegate before one broker, with clients for the checks."""

    def __init__(self, name: str, directory: Path, pki):
        self.name = name
        self.made: list = []
        upstream = dict(QUICK)
        if name == "embedded":
            self.broker, url = None, "embedded:"
        elif name in ("mosquitto", "mosquitto3"):
            self.broker = Mosquitto(directory / "broker").start()
            url = self.broker.url
            if name == "mosquitto3":
                upstream["protocol"] = "3.1.1"
        else:
            kind = {"rabbitmq": brokers.RabbitMq, "aedes": brokers.Aedes, "rumqttd": brokers.Rumqttd}[name]
            self.broker = kind(directory / "broker").start()
            url = self.broker.url
        upstream["servers"] = [url]
        self.edge = Edge(directory / "edge", config(url, pki, ("tcp",), upstream=upstream), pki).start()
        self.edge.wait_log(r"The broker was probed", timeout=20)
        self.way = links.Way(self.edge, "tcp")

    def client(self, **kwargs) -> paho.Paho:
        one = paho.Paho(self.way, kwargs.pop("client_id", fresh("m")), **kwargs)
        self.made.append(one)
        return one

    def close(self) -> None:
        for one in self.made:
            one.close()
        self.way.close()
        self.edge.close()
        if self.broker:
            self.broker.close()


def settled(pub, one, topic: str) -> list:
    return [m for m in one.until_own_marker(pub, topic)]


def qos(level: int):
    def check(bench: Bench) -> str:
        one, pub, topic = bench.client(), bench.client(), fresh()
        one.subscribe((topic, level), expect=None)
        pub.publish(topic, "x", qos=level)
        got = one.next()
        assert got.text == "x" and settled(pub, one, topic) == []
        return "yes" if got.qos == level else f"as QoS {got.qos}"

    return check


def between_clients(bench: Bench) -> str:
    """Each of several clients with overlapping filters gets one copy."""
    topic = fresh()
    filters = [f"{topic}/a", f"{topic}/+", f"{topic}/#"]
    clients = [bench.client() for _ in filters]
    for one, name in zip(clients, filters):
        one.subscribe((name, 1))
    pub = bench.client()
    pub.publish(f"{topic}/a", "x")
    for one in clients:
        assert one.next().text == "x" and settled(pub, one, f"{topic}/a") == []
    return "yes"


def of_one_client(bench: Bench) -> str:
    """One copy, highest QoS, all its identifiers."""
    one, pub, topic = bench.client(), bench.client(), fresh()
    for identifier, (name, level) in enumerate([(f"{topic}/a", 0), (f"{topic}/+", 1), (f"{topic}/#", 0)], 1):
        one.subscribe((name, level), identifier=identifier)
    pub.publish(f"{topic}/a", "x", qos=1)
    got = one.next()
    assert (got.text, got.qos) == ("x", 1) and sorted(got.props.SubscriptionIdentifier) == [1, 2, 3], got
    assert settled(pub, one, f"{topic}/a") == []
    return "yes"


def retained_exact(bench: Bench) -> str:
    pub, topic = bench.client(), fresh()
    pub.publish(topic, "kept", retain=True)
    one = bench.client()
    one.subscribe((topic, 1))
    got = one.next()
    assert got.text == "kept" and got.retain
    return "yes"


def retained_wildcard(bench: Bench) -> str:
    pub, topic = bench.client(), fresh()
    for n in range(30):
        pub.publish(f"{topic}/{n}", f"kept{n}", retain=True)
    one = bench.client()
    one.subscribe((f"{topic}/+", 1))
    got = [m.text for m in settled(pub, one, f"{topic}/x")]
    time_left = time.monotonic() + 2
    while len(got) < 30 and time.monotonic() < time_left:
        got += [m.text for m in settled(pub, one, f"{topic}/x")]
    if not got:
        return "no"
    assert sorted(got) == sorted(f"kept{n}" for n in range(30)), got
    return "yes"


def retained_delete(bench: Bench) -> str:
    pub, topic = bench.client(), fresh()
    pub.publish(topic, "kept", retain=True)
    first = bench.client()
    first.subscribe((topic, 1))
    assert first.next().text == "kept"
    pub.publish(topic, "", retain=True)
    assert first.next().payload == b""
    second = bench.client()
    second.subscribe((topic, 1))
    assert settled(pub, second, topic) == []
    return "yes"


def retain_as_published(bench: Bench) -> str:
    one, pub, topic = bench.client(), bench.client(), fresh()
    one.subscribe((topic, 1), retainAsPublished=True, retainHandling=2)
    pub.publish(topic, "x", retain=True)
    return "yes" if one.next().retain else "no"


def shared(bench: Bench) -> str:
    members, pub, topic = [bench.client() for _ in range(3)], bench.client(), fresh()
    for member in members:
        if member.subscribe((f"$share/g/{topic}", 1), expect=None) != [1]:
            return "refused"
    for n in range(30):
        pub.publish(topic, f"m{n}")
    got: list[str] = []
    end = time.monotonic() + 10
    while len(got) < 30 and time.monotonic() < end:
        for member in members:
            while not member.incoming.empty():
                got.append(member.incoming.get().text)
        time.sleep(0.02)
    assert sorted(got) == sorted(f"m{n}" for n in range(30)), got
    return "yes"


def no_local(bench: Bench) -> str:
    one, other, topic = bench.client(), bench.client(), fresh()
    if one.subscribe((topic, 1), noLocal=True, expect=None)[0] >= 0x80:
        return "refused"
    other.subscribe((topic, 1))
    one.publish(topic, "mine")
    assert other.next().text == "mine"
    other.publish(topic, "theirs")
    assert one.next().text == "theirs"
    return "yes"


def user_properties(bench: Bench) -> str:
    one, pub, topic = bench.client(), bench.client(), fresh()
    one.subscribe((topic, 1))
    pairs = [("a", "1"), ("b", "2"), ("a", "3")]
    pub.publish(topic, "x", UserProperty=pairs, ContentType="t", CorrelationData=b"c", ResponseTopic="r")
    got = one.next().props
    if not hasattr(got, "UserProperty"):
        return "no"
    assert got.UserProperty == pairs and (got.ContentType, got.CorrelationData, got.ResponseTopic) == ("t", b"c", "r")
    return "yes"


def expiry(bench: Bench) -> str:
    one, pub, topic = bench.client(), bench.client(), fresh()
    one.subscribe((topic, 1))
    pub.publish(topic, "x", MessageExpiryInterval=100)
    left = getattr(one.next().props, "MessageExpiryInterval", None)
    if left is None:
        return "no"
    assert 90 <= left <= 100, left
    return "yes"


def resumed(bench: Bench) -> str:
    """A client that was away gets the messages of that time, in order, once."""
    name, pub, topic = fresh("r"), bench.client(), fresh()
    one = bench.client(client_id=name, expiry=300)
    one.subscribe((topic, 1))
    one.close()
    for n in range(50):
        pub.publish(topic, f"m{n}")
    again = bench.client(client_id=name, expiry=300, clean=False)
    assert again.session_present
    assert [m.text for m in again.take(50)] == [f"m{n}" for n in range(50)]
    return "yes"


def in_order(bench: Bench) -> str:
    one, pub, topic = bench.client(), bench.client(), fresh()
    one.subscribe((topic, 1))
    mids = [pub.publish(topic, f"m{n}", wait=False) for n in range(300)]
    for mid in mids:
        pub.wait_published(mid)
    assert [m.text for m in one.take(300)] == [f"m{n}" for n in range(300)]
    return "yes"


def will(bench: Bench) -> str:
    watcher, topic = bench.client(), fresh()
    watcher.subscribe((topic, 1))
    way = links.Way(bench.edge, "tcp")
    try:
        one = paho.Paho(way, fresh("w"), will={"topic": topic, "payload": "gone", "qos": 1})
        way.cut()
        one.abandon()
        assert watcher.next().text == "gone"
    finally:
        way.close()
    return "yes"


CHECKS = {
    "QoS 0": qos(0),
    "QoS 1": qos(1),
    "QoS 2": qos(2),
    "overlapping filters of several clients": between_clients,
    "overlapping filters of one client": of_one_client,
    "order, and nothing lost at QoS 1": in_order,
    "sessions resume, offline queue": resumed,
    "wills": will,
    "retained, exact topic": retained_exact,
    "retained, wildcard": retained_wildcard,
    "retained, deleted": retained_delete,
    "RETAIN as published": retain_as_published,
    "shared subscriptions": shared,
    "No Local": no_local,
    "user properties": user_properties,
    "message expiry at the broker": expiry,
}


@pytest.mark.xdist_group("matrix")
@pytest.mark.parametrize("name", TIER)
def test_semantics_before_each_broker_match_the_documents(name, tmp_path, pki):
    """The column of the table in the documents equals the results of this run. TIDEGATE_WRITE_TABLE=1 writes the column."""
    bench = Bench(name, tmp_path, pki)
    try:
        seen = {}
        for what, check in CHECKS.items():
            expected = MISSING.get(name, {}).get(what, "yes")
            seen[what] = check(bench)
            assert seen[what] == expected, f"{what} before {name}: {seen[what]}, expected {expected}"
    finally:
        bench.close()
    table = read_table()
    if os.environ.get("TIDEGATE_WRITE_TABLE") == "1":
        table[name] = seen
        write_table(table)
    assert table.get(name) == seen


def read_table() -> dict[str, dict[str, str]]:
    """The table of the documents, column by column."""
    lines = PAGE.read_text().split(BEGIN)[1].split(END)[0].strip().splitlines()
    cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    if not cells:
        return {}
    ours = {title: name for name, title in NAMES.items()}
    return {ours[title]: {row[0]: row[at] for row in cells[2:]} for at, title in enumerate(cells[0]) if title in ours}


def write_table(table: dict[str, dict[str, str]]) -> None:
    names = [name for name in NAMES if name in table]
    lines = ["| | " + " | ".join(NAMES[name] for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {what} | " + " | ".join(table[name].get(what, "") for name in names) + " |" for what in CHECKS]
    text = PAGE.read_text()
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{head}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{tail}")
