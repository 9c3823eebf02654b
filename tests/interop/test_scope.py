"""Mount points, and publishes that name their sender."""

from __future__ import annotations

import subprocess

import pytest

from harness import links, paho, wire
from harness.edge import BINARY, Edge, config, listener
from harness.names import fresh
from harness.phone import Phone
from harness.process import run

QUICK = {"backoff_min": "20ms", "backoff_max": "200ms"}
USERS = {"alice": "a", "bob": "b", "a/b": "c"}


@pytest.fixture(scope="module")
def tenants(tmp_path_factory, broker, pki):
    directory = tmp_path_factory.mktemp("scope")
    users = directory / "users"
    for user, password in USERS.items():
        assert run([BINARY, "passwd", users, user], input=f"{password}\n").returncode == 0
    table = config(
        broker.url,
        pki,
        listeners=[listener("tcp", auth="file", mount="tenants/%u/"), listener("tcp", "whole"), listener("tcp", "devices", mount="devices/%c/"), listener("quic")],
        auth={"mode": "anonymous", "file": str(users), "acl": "rules"},
        acl=[{"who": "*", "allow": ["publish", "subscribe"], "topics": ["#", "$kept/#"]}],
        upstream={"servers": [broker.url], "sender_properties": ["client_id", "username", "listener", "address"]} | QUICK,
    )
    edge = Edge(directory, table, pki).start()
    yield edge
    edge.assert_sane()
    edge.close()


@pytest.fixture
def at(tenants):
    made = []

    def make(name: str = "whole", client_id: str = "", expect: int = 0, **kwargs) -> paho.Paho:
        way = links.Way(tenants, "tcp", name)
        one = paho.Paho(way, client_id or fresh("c"), connect=False, **kwargs)
        one.connect(expect=expect)
        made.extend([one, way])
        return one

    yield make
    for one in made:
        one.close()


def as_user(name: str) -> dict:
    return {"user": name, "password": USERS[name]}


@pytest.mark.parametrize("version", (5, 4))
def test_a_tenant_sees_its_topics_and_no_other(at, version):
    topic = fresh()
    alice, bob, whole = at("tcp", version=version, **as_user("alice")), at("tcp", version=version, **as_user("bob")), at()
    for one in (alice, bob):
        one.subscribe(f"{topic}/#", "#")
    whole.subscribe(f"tenants/+/{topic}/#")
    alice.publish(f"{topic}/x", "of alice", qos=2)
    got = alice.next()
    assert (got.topic, got.text) == (f"{topic}/x", "of alice")
    got = whole.next()
    assert (got.topic, got.text) == (f"tenants/alice/{topic}/x", "of alice")
    whole.publish(f"tenants/bob/{topic}/y", "for bob")
    got = bob.next()
    assert (got.topic, got.text) == (f"{topic}/y", "for bob")
    assert alice.until_marker(alice, f"{topic}/end") == []
    # A client unsubscribes by the same name as it subscribed.
    alice.unsubscribe(f"{topic}/#")
    alice.unsubscribe("#")
    alice.subscribe(f"{topic}/end")
    alice.publish(f"{topic}/x", "nobody's")
    assert alice.until_marker(alice, f"{topic}/end") == []


def test_a_tenant_cannot_see_its_mount_as_a_topic(at):
    """A tenant's `#` would match the mount as well [MQTT-4.7.1-2], but the mount has no name below itself."""
    topic = fresh()
    alice, whole = at("tcp", **as_user("alice")), at()
    alice.subscribe("#")
    whole.publish("tenants/alice", "nameless")
    whole.publish(f"tenants/alice/{topic}", "named")
    assert alice.next().topic == topic
    assert alice.until_marker(alice, f"{topic}/end") == []


def test_wildcards_below_a_mount_leave_out_topics_with_a_dollar(at):
    """[MQTT-4.7.2-1]; the broker sees the mount before the `$` and would deliver such topics."""
    topic = fresh()
    alice, whole = at("tcp", **as_user("alice")), at()
    alice.publish(f"$kept/{topic}", "kept", retain=True)
    wide, named, both = (at("tcp", **as_user("alice")) for _ in range(3))
    wide.subscribe("#", f"+/{topic}")
    named.subscribe(f"$kept/{topic}")
    both.subscribe("#", f"$kept/{topic}")
    whole.subscribe(f"tenants/alice/+/{topic}")
    for one in (named, both, whole):
        one.until("kept")
    alice.publish(f"$kept/{topic}", "live")
    for one in (named, both, whole):
        one.until("live")
    alice.publish(f"$kept/{topic}", "", retain=True)
    end = f"{topic}/end"
    assert [m.topic for m in wide.until_own_marker(alice, end) if m.topic.startswith("$")] == []
    # A group below the mount does not match it either.
    member, plain = at("tcp", **as_user("bob")), at("tcp", **as_user("bob"))
    member.subscribe("$share/g/#")
    plain.subscribe(f"$kept/{topic}")
    plain.publish(f"$kept/{topic}", "group")
    assert plain.next().text == "group"
    assert [m for m in member.until_own_marker(plain, end) if m.text == "group"] == []


def test_retained_messages_wills_and_groups_work_below_a_mount(at, tenants):
    topic = fresh()
    alice, whole = at("tcp", **as_user("alice")), at()
    alice.publish(f"{topic}/kept", "kept", retain=True)
    late = at("tcp", **as_user("alice"))
    late.subscribe(f"{topic}/+")
    got = late.next()
    assert (got.topic, got.text, got.retain) == (f"{topic}/kept", "kept", True)
    alice.publish(f"{topic}/kept", "", retain=True)
    assert late.next().payload == b""
    whole.subscribe(f"tenants/alice/{topic}/will")
    way = links.Way(tenants, "tcp", "tcp")
    try:
        dying = paho.Paho(way, fresh("w"), will={"topic": f"{topic}/will", "payload": "gone", "qos": 1}, **as_user("alice"))
        way.cut()
        dying.abandon()
        assert whole.next().text == "gone"
    finally:
        way.close()
    member = at("tcp", **as_user("bob"))
    member.subscribe(f"$share/g/{topic}/job")
    whole.publish(f"tenants/bob/{topic}/job", "work")
    got = member.next()
    assert (got.topic, got.text) == (f"{topic}/job", "work")


def test_topic_aliases_and_offline_queues_work_below_a_mount(at):
    name, topic = fresh("q"), fresh()
    one, whole = at("tcp", name, expiry=300, **as_user("alice")), at()
    one.subscribe(f"{topic}/#")
    one.close()
    for n in range(5):
        whole.publish(f"tenants/alice/{topic}/same", f"m{n}")
    again = at("tcp", name, expiry=300, clean=False, **as_user("alice"))
    assert again.session_present
    assert [(m.topic, m.text) for m in again.take(5)] == [(f"{topic}/same", f"m{n}") for n in range(5)]


def test_names_that_cannot_be_part_of_a_topic_are_refused(at):
    assert at("tcp", version=5, expect=0x87, **as_user("a/b")) is not None
    assert at("devices", "a+b", expect=0x87) is not None


def test_one_client_identifier_behind_two_mounts_is_two_sessions(at):
    name, topic = fresh("twice"), fresh()
    first = at("tcp", name, **as_user("alice"))
    second = at("whole", name)
    for one in (first, second):
        one.subscribe(topic)
    first.publish(topic, "first")
    second.publish(topic, "second")
    assert first.next().text == "first"
    assert second.next().text == "second"
    assert not first.ended.is_set()


def test_publishes_name_their_sender_to_the_broker(at, broker, tenants):
    topic = fresh()
    watcher = subprocess.Popen(
        ["stdbuf", "-oL", "mosquitto_sub", "-p", str(broker.port), "-V", "5", "-t", f"tenants/alice/{topic}", "-F", "%P", "-C", "1", "-W", "20", "-d"], stdout=subprocess.PIPE, text=True
    )
    try:
        for line in watcher.stdout:
            if "Subscribed" in line:
                break
        name = fresh("sender")
        alice, seen = at("tcp", name, **as_user("alice")), at()
        seen.subscribe(f"tenants/alice/{topic}")
        # Properties that pretend to be Tidegate's are not passed on.
        alice.publish(topic, "x", UserProperty=[("k", "v"), ("tidegate-user", "root"), ("tidegate", "1.1"), ("tidegates", "fine")])
        told = [line for line in watcher.stdout.read().splitlines() if "tidegate-user" in line][0]
        for part in ("k:v", "tidegates:fine", f"tidegate-client-id:{name}", "tidegate-user:alice", "tidegate-listener:tcp", "tidegate-address:127.0.0.1"):
            assert part in told, told
        assert "root" not in told and "tidegate:1.1" not in told
        # Other clients do not see these properties.
        assert seen.next().props.UserProperty == [("k", "v"), ("tidegates", "fine")]
    finally:
        watcher.kill()
        watcher.wait()


def test_a_sender_that_moved_is_named_with_its_new_address(broker, tenants):
    topic = fresh()
    watcher = subprocess.Popen(["stdbuf", "-oL", "mosquitto_sub", "-p", str(broker.port), "-V", "5", "-t", topic, "-F", "%P", "-C", "2", "-W", "20", "-d"], stdout=subprocess.PIPE, text=True)
    try:
        for line in watcher.stdout:
            if "Subscribed" in line:
                break
        with Phone(tenants["quic"].port, tenants.pki.ca) as one:
            one.connect(fresh("mobile"))
            one.send(0, wire.publish(topic, b"x", 1, 1))
            assert one.recv().kind == wire.PUBACK
            one.move("127.0.0.2")
            one.send(0, wire.publish(topic, b"x", 1, 2))
            assert one.recv().kind == wire.PUBACK
        told = [line for line in watcher.stdout.read().splitlines() if "tidegate-address" in line]
        assert ["tidegate-address:127.0.0.1" in told[0], "tidegate-address:127.0.0.2" in told[1]] == [True, True], told
    finally:
        watcher.kill()
        watcher.wait()


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"mount": "no-slash"}, "must end with /"),
        ({"mount": "a/+/"}, "wildcard"),
        ({"mount": "a/%x/"}, "only u .* and c"),
        ({"mount": "a/%u/", "auth": "anonymous"}, "user name"),
    ],
)
def test_an_invalid_mount_is_refused(tmp_path, pki, entry, says):
    import re

    from harness.edge import tidegate, toml

    file = tmp_path / "tidegate.toml"
    file.write_text(toml(config("embedded:", pki, listeners=[listener("tcp", **entry)])))
    done = tidegate("check", "--config", file)
    assert done.returncode != 0
    assert re.search(rf"mount.*{says}", done.stdout + done.stderr), done.stdout + done.stderr
