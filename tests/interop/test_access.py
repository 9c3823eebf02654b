"""Who may do what, as an attacker and an operator see it: reserved topics, names in rules, principals, shares by address."""

from __future__ import annotations

import signal
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest

from harness import wire
from harness.edge import BINARY, TRANSPORTS, listener, tidegate
from harness.names import fresh
from harness.process import run, wait_until
from harness.raw import Raw

RESERVED = ("$CONTROL/dynamic-security/v1", "$aws/things/t/shadow/update", "$delayed/1/a", "$SYS/x", "tidegate/probe/x", "tidegate")
RESPONSE_TOPIC = 0x08


def passwd(file, user: str, password: str) -> None:
    done = run([BINARY, "passwd", file, user], input=f"{password}\n")
    assert done.returncode == 0, done.stderr


def delete(edge, path: str, **headers) -> int:
    url = f"http://127.0.0.1:{edge['admin'].port}{path}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="DELETE", headers=headers), timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def will(topic: str, client_id: str, props: bytes = b"") -> bytes:
    body = wire.text("MQTT") + bytes([5, 0x02 | 0x04]) + b"\x00\x3c\x00" + wire.text(client_id) + wire.properties(props) + wire.text(topic) + wire.text("w")
    return wire.packet(wire.CONNECT, body)


def response(topic: str) -> bytes:
    return bytes([RESPONSE_TOPIC]) + wire.text(topic)


# ---------------------------------------------------------------- reserved topics


@pytest.mark.parametrize("topic", RESERVED)
def test_an_open_acl_opens_no_reserved_topic(edge, client, topic):
    one = client(edge)
    one.publish(topic, "x", expect=0x87)
    one.subscribe((topic, 1), (f"$share/g/{topic}", 1), (f"{topic}/#", 1), expect=[0x87] * 3)
    old = client(edge, version=4)
    old.subscribe((topic, 1), expect=[0x80])
    with Raw(edge["tcp"].port) as raw:
        assert raw.send(will(topic, fresh("id"))).recv().reason == 0x87


def test_a_rule_that_names_a_reserved_topic_opens_it(broker, own_edge, client):
    acl = [{"who": "*", "allow": ["publish", "subscribe"], "topics": ["#", "$delayed/#"]}]
    edge = own_edge(broker.url, auth={"acl": "rules"}, acl=acl).start()
    one = client(edge)
    topic = fresh("t")
    one.subscribe(f"$delayed/{topic}")
    one.publish(f"$delayed/{topic}", "x")
    assert one.next().text == "x"
    one.publish("$CONTROL/x", "x", expect=0x87)


@pytest.mark.parametrize("prefix,mount,name", [("tidegate/probe", "%c/", "tidegate"), ("outer/probe", "outer/%c/", "probe")])
def test_no_name_leads_a_mount_to_the_probes(broker, own_edge, client, prefix, mount, name):
    listeners = [listener("tcp", mount=mount), listener("tcp", "whole")]
    edge = own_edge(broker.url, listeners=listeners, upstream={"servers": [broker.url], "probe_topic": prefix}).start()
    inside = client(edge, client_id=name)
    inside.publish("probe/x" if name == "tidegate" else "x", "x", expect=0x87)
    inside.subscribe(("#", 1), ("$share/g/#", 1), expect=[0x87, 0x87])
    beside = client(edge, client_id=f"{name}s")
    beside.subscribe("#")
    beside.publish("x", "x")
    assert beside.next().text == "x"


def test_a_mount_below_the_probes_is_refused(tmp_path, pki, broker):
    from harness.edge import config, toml

    for mount in ("tidegate/", "tidegate/%c/", "outer/probe/x/"):
        file = tmp_path / "t.toml"
        file.write_text(toml(config(broker.url, pki, listeners=[listener("tcp", mount=mount)], upstream={"servers": [broker.url], "probe_topic": "outer/probe"})))
        done = tidegate("check", "--config", file)
        assert done.returncode == 64 and "mount" in done.stderr, done.stderr


# ---------------------------------------------------------------- rules and response topics


@pytest.mark.parametrize("name", ("a/b", "+", "#"))
def test_a_rule_that_denies_by_an_unusable_name_fails_closed(broker, own_edge, client, name):
    acl = [
        {"who": "*", "allow": [], "topics": ["private/%c/#"]},
        {"who": "*", "allow": ["publish", "subscribe"], "topics": ["#"]},
    ]
    edge = own_edge(broker.url, auth={"acl": "rules"}, acl=acl).start()
    one = client(edge, client_id=name)
    one.publish(f"private/{name.replace('+', 'x').replace('#', 'x')}/x", "x", expect=0x87)
    one.subscribe(("private/a/b/x", 1), ("#", 1), expect=[0x87, 0x87])
    one.publish("public/x", "x")


@pytest.fixture(scope="module")
def asked(tmp_path_factory, broker, pki):
    """Clients may publish requests and their own replies, behind a mount and without one; `strict` refuses other Response Topics."""
    from harness.edge import Edge, config

    acl = [{"who": "*", "allow": ["publish", "subscribe"], "topics": ["request/#", "reply/%c"]}]
    made = []
    for n, rule in enumerate(("remove", "refuse")):
        directory = tmp_path_factory.mktemp("asked")
        listeners = [listener("tcp"), listener("tcp", "mounted", mount=f"tenant{n}/")]
        edge = Edge(directory, config(broker.url, pki, listeners=listeners, auth={"acl": "rules", "response_topic": rule}, acl=acl), pki)
        made.append(edge.start())
    yield made
    for edge in made:
        edge.assert_sane()
        edge.close()


def test_a_response_topic_needs_the_right_to_publish_there(asked, client, broker):
    lax, strict = asked
    topic = f"request/{fresh()}"
    me = fresh("me")
    server = client(lax)
    server.subscribe(topic)
    one = client(lax, client_id=me)
    one.publish(topic, "mine", ResponseTopic=f"reply/{me}")
    assert server.next().props.ResponseTopic == f"reply/{me}"
    one.publish(topic, "foreign", ResponseTopic="reply/somebody", CorrelationData=b"c")
    got = server.next()
    assert got.text == "foreign" and not hasattr(got.props, "ResponseTopic") and got.props.CorrelationData == b"c"
    one.publish(topic, "reserved", ResponseTopic="$CONTROL/x")
    assert not hasattr(server.next().props, "ResponseTopic")
    assert lax.metrics().sum("tidegate_response_topics_denied_total") == 2
    refused = client(strict, client_id=me)
    refused.publish(topic, "mine", ResponseTopic=f"reply/{me}")
    refused.publish(topic, "foreign", expect=0x87, ResponseTopic="reply/somebody")
    with Raw(strict["tcp"].port) as raw:
        assert raw.send(will("request/x", fresh("id"), response("reply/somebody"))).recv().reason == 0x87


def test_a_response_topic_is_mounted(asked, client):
    lax, _ = asked
    topic, me = f"request/{fresh()}", fresh("me")
    inside = client(lax, name="mounted")
    inside.subscribe(topic)
    one = client(lax, client_id=me, name="mounted")
    one.publish(topic, "x", ResponseTopic=f"reply/{me}")
    # Behind the same mount it is as it was sent; at the broker it has the mount before it.
    assert inside.next().props.ResponseTopic == f"reply/{me}"
    with Raw(lax["mounted"].port) as raw:
        me = fresh("will")
        assert raw.send(will(topic, me, response(f"reply/{me}"))).recv().reason == 0
        raw.reset()
    got = inside.next()
    assert got.text == "w" and got.props.ResponseTopic == f"reply/{me}"


def test_the_broker_sees_mounted_response_topics(asked, broker):
    lax, _ = asked
    topic, me = f"request/{fresh()}", fresh("me")
    with Raw(broker.port) as watcher, Raw(lax["mounted"].port) as raw:
        watcher.connect(fresh("watcher"))
        watcher.subscribe((f"tenant0/{topic}", 0))
        raw.connect(me)
        raw.send(wire.publish(topic, b"x", 1, 1, props=response(f"reply/{me}")))
        got = watcher.recv()
        assert response(f"tenant0/reply/{me}") in got.body


# ---------------------------------------------------------------- sessions and their owners


def test_client_identifiers_are_per_mount(broker, own_edge, client):
    listeners = [listener("tcp", "a", mount="a/"), listener("tcp", "b", mount="b/"), listener("tcp", "whole")]
    edge = own_edge(broker.url, listeners=listeners).start()
    name, topic = fresh("twice"), fresh("t")
    ones = {at: client(edge, client_id=name, name=at, clean=False, expiry=300) for at in ("a", "b", "whole")}
    for at, one in ones.items():
        one.subscribe(topic)
    for at, one in ones.items():
        one.publish(topic, at)
        assert one.next().text == at and not one.ended.is_set()
    assert edge.http(f"/api/v1/sessions/{name}")[0] == 409
    page = edge.api("/api/v1/sessions")
    assert [s["mount"] for s in page["sessions"] if s["client_id"] == name] == ["", "a/", "b/"]
    first = edge.api("/api/v1/sessions?limit=1")
    rest = edge.api("/api/v1/sessions?limit=10&after=" + urllib.request.quote(first["next"], safe=""))
    assert len(rest["sessions"]) == len(page["sessions"]) - 1
    # Each one resumes its own.
    ones["a"].close()
    wait_until("the session of a/ to be detached", lambda: edge.api(f"/api/v1/sessions/{name}?mount=a/")["attached"] is False)
    assert edge.api(f"/api/v1/sessions/{name}?mount=b/")["attached"] is True
    again = client(edge, client_id=name, name="a", clean=False, expiry=300)
    assert again.session_present and not ones["b"].ended.is_set()
    assert delete(edge, f"/api/v1/sessions/{name}?mount=b/") == 204
    assert ones["b"].wait_ended() == 0x98
    assert edge.http(f"/api/v1/sessions/{name}?mount=b/")[0] == 404 and not again.ended.is_set()


def test_an_operator_frees_a_client_identifier(tmp_path, broker, own_edge, client):
    users = tmp_path / "users"
    for user in ("alice", "bob"):
        passwd(users, user, "secret")
    edge = own_edge(broker.url, auth={"mode": "file", "file": str(users), "acl": "open"}).start()
    me = fresh("id")
    one = client(edge, client_id=me, expiry=300, user="alice", password="secret")
    one.subscribe("x")
    for version, code in ((5, 0x85), (4, 2)):
        with Raw(edge["tcp"].port, version=version) as raw:
            assert raw.connect(me, user="bob", password=b"secret").reason == code
    one.close()
    with Raw(edge["tcp"].port) as raw:
        assert raw.connect(me, user="bob", password=b"secret").reason == 0x85
    since = edge.mark()
    assert delete(edge, f"/api/v1/sessions/{me}", Origin="https://evil.example") == 403
    assert delete(edge, f"/api/v1/sessions/{me}") == 204
    assert delete(edge, f"/api/v1/sessions/{me}") == 404
    edge.wait_log("An operator ended a session", since)
    assert edge.metrics().sum("tidegate_sessions_ended_total", reason="admin") == 1
    with Raw(edge["tcp"].port) as raw:
        connack = raw.connect(me, user="bob", password=b"secret", clean=False)
        assert connack.reason == 0 and not connack.session_present


# ---------------------------------------------------------------- reload


def test_sighup_reads_rules_and_users_again(tmp_path, broker, own_edge, client):
    users = tmp_path / "users"
    for user in ("alice", "bob"):
        passwd(users, user, "secret")
    acl = [{"who": "*", "allow": ["publish"], "topics": ["a"]}]
    edge = own_edge(broker.url, auth={"mode": "file", "file": str(users), "acl": "rules"}, acl=acl).start()
    alice, bob = (client(edge, user=user, password="secret", expiry=300) for user in ("alice", "bob"))
    alice.publish("a", "x")
    alice.publish("b", "x", expect=0x87)
    text = edge.file.read_text()

    def hangup(pattern: str) -> None:
        since = edge.mark()
        edge.service.kill(signal.SIGHUP)
        edge.wait_log(pattern, since)

    edge.file.write_text(text.replace('["a"]', '["b"]'))
    hangup("INFO.*access rules were read again")
    alice.publish("a", "x", expect=0x87)
    alice.publish("b", "x")
    # All or nothing: with a wrong rule, the removed user stays too.
    good = users.read_text()
    users.write_text("".join(line + "\n" for line in good.splitlines() if not line.startswith("bob:")))
    edge.file.write_text(text.replace('["a"]', '["a#"]'))
    hangup("ERROR.*could not be read again")
    bob.publish("b", "x")
    # And with a damaged password file, the earlier rules.
    edge.file.write_text(text)
    users.write_text("damaged\n" + good)
    hangup("ERROR.*could not be read again")
    alice.publish("b", "x")
    users.write_text("".join(line + "\n" for line in good.splitlines() if not line.startswith("bob:")))
    hangup("INFO.*The password file was read again.*removed=1.*closed=1")
    assert bob.wait_ended() == 0x87
    alice.publish("a", "x")
    assert not alice.ended.is_set()
    with Raw(edge["tcp"].port) as raw:
        assert raw.connect(fresh("id"), user="bob", password=b"secret").reason == 0x86


# ---------------------------------------------------------------- files


def test_files_that_all_may_read_are_told(tmp_path, pki, broker, own_edge):
    users = tmp_path / "users"
    passwd(users, "alice", "secret")
    edge = own_edge(broker.url, auth={"mode": "file", "file": str(users), "acl": "open"})
    assert "chmod" not in tidegate("check", "--config", edge.file).stdout
    users.chmod(0o644)
    assert f"chmod o-r {users}" in tidegate("check", "--config", edge.file).stdout
    edge.start()
    edge.wait_log(f"WARN.*auth.file: every user of this machine may read {users}")


def test_a_costly_password_hash_is_refused(tmp_path, broker, own_edge):
    users = tmp_path / "users"
    passwd(users, "alice", "secret")
    text = users.read_text()
    users.write_text(text.replace("m=19456", "m=1048576"))
    edge = own_edge(broker.url, auth={"mode": "file", "file": str(users), "acl": "open"})
    done = tidegate("check", "--config", edge.file)
    assert done.returncode == 64 and "1048576 KiB" in done.stderr, done.stderr


def test_byte_order_marks_hide_nothing(tmp_path, pki, broker, own_edge, client):

    def marked(name: str, content: bytes):
        file = tmp_path / name
        file.write_bytes(b"\xef\xbb\xbf" + content)
        file.chmod(0o600)
        return file

    users = tmp_path / "plain"
    passwd(users, "alice", "secret")
    users = marked("users", users.read_bytes())
    tls = [{"name": "default", "cert": str(marked("cert", pki.cert.read_bytes())), "key": str(marked("key", pki.key.read_bytes()))}]
    edge = own_edge(broker.url, transports=("tcp", "tls"), tls=tls, auth={"mode": "file", "file": str(users), "acl": "open"}).start()
    client(edge, "tls", user="alice", password="secret").publish("x", "x")


def test_relative_paths_of_a_configuration_without_a_directory(tmp_path, pki, broker, own_edge, client):
    edge = own_edge(broker.url, transports=("tls",))
    text = edge.file.read_text().replace("[[tls]]\n", '[[tls]]\nkey_log = "keys.log"\n')
    edge.file.write_text(text)
    done = tidegate("check", "--config", edge.file.name, cwd=edge.directory)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- shares by address


def connect_of(will_bytes: int, property_bytes: int) -> bytes:
    props = b"\x26" + wire.text("k") + wire.text("v" * property_bytes)
    body = wire.text("MQTT") + bytes([5, 0x02 | 0x04]) + b"\x00\x3c" + wire.properties(props) + wire.text(fresh("id"))
    return wire.packet(wire.CONNECT, body + b"\x00" + wire.text("w") + wire.data(b"x" * will_bytes))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("version", (5, 4))
def test_a_large_password_fits_into_connect(edge, client, transport, version):
    client(edge, transport, version=version, user="u", password="p" * 17_000).publish("x", "x")


@pytest.mark.parametrize("transport", ("tcp", "ws"))
def test_large_wills_and_passwords_fit_into_connect(edge, transport):
    port = edge[transport].port
    with Raw(port, transport) as raw:
        assert raw.connect(fresh("id"), user="u", password=b"p" * 17_000).reason == 0
    for will_bytes, property_bytes in ((17_000, 0), (65_000, 60_000)):
        with Raw(port, transport) as raw:
            assert raw.send(connect_of(will_bytes, property_bytes)).recv().reason == 0
    with Raw(port, transport) as raw:
        raw.send(connect_of(65_535, 65_535))
        packets, code = raw.wait_closed()
        assert [p.reason for p in packets] == [0x95] or code == 1009, (packets, code)


def test_a_client_may_have_ten_thousand_subscriptions(broker, own_edge):
    edge = own_edge(broker.url).start()
    with Raw(edge["tcp"].port, timeout=60) as raw:
        raw.connect(fresh("id"))
        for block in range(10):
            filters = [(f"building/{block}/floor/room-{n:05}/temperature", 0) for n in range(1000)]
            assert set(raw.subscribe(*filters, packet_id=block + 1)) == {0}
        assert raw.subscribe(("one/more", 0), packet_id=99) == b"\x97"


def test_silent_connections_of_one_address_leave_room(broker, own_edge):
    edge = own_edge(broker.url, limits={"connections_max": 100, "accept_deadline": "60s"}).start()
    port = edge["tcp"].port
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(150)]
    for source in ("127.0.0.2", "127.0.0.3"):
        for _ in range(5):
            with Raw(port, source=source) as raw:
                assert raw.connect(fresh("id")).reason == 0
    for one in silent:
        one.close()


def test_connects_of_one_address_leave_a_rate_for_the_others(broker, own_edge):
    edge = own_edge(broker.url, limits={"connect_rate_max": 80}).start()
    port = edge["tcp"].port
    stop = threading.Event()
    refused = []

    def flood() -> None:
        while not stop.is_set():
            try:
                with Raw(port, version=5) as raw:
                    refused.append(raw.connect(fresh("f")).reason == 0x9F)
            except (OSError, Exception):  # noqa: B014
                refused.append(True)

    threads = [threading.Thread(target=flood) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until("the flood is refused", lambda: sum(refused) > 20, 20)
    answers = []
    for _ in range(20):
        with Raw(port, source="127.0.0.2") as raw:
            answers.append(raw.connect(fresh("id")).reason)
        time.sleep(0.2)  # five a second: below the share
    stop.set()
    for thread in threads:
        thread.join()
    assert answers == [0] * 20


def test_wrong_passwords_of_one_address_keep_nobody_out(tmp_path, broker, own_edge):
    users = tmp_path / "users"
    passwd(users, "alice", "secret")
    edge = own_edge(broker.url, auth={"mode": "file", "file": str(users), "acl": "open"}, limits={"accept_deadline": "5s"}).start()
    port = edge["tcp"].port
    guesses = []
    for n in range(400):
        raw = Raw(port)
        raw.send(wire.connect(f"g{n}", user="alice", password=b"wrong%d" % n))
        guesses.append(raw)
    begun = time.monotonic()
    with Raw(port, source="127.0.0.2") as raw:
        assert raw.connect(fresh("id"), user="alice", password=b"secret").reason == 0
    assert time.monotonic() - begun < 3
    # The checks that still wait end with their clients, and at the deadline.
    for raw in guesses[:200]:
        raw.close()
    answers = []
    for raw in guesses[200:]:
        try:
            answers.append(raw.recv(8).reason)
        except Exception:
            answers.append(None)
    assert set(answers) <= {0x86, 0x89, None} and 0x89 in answers, set(answers)
    assert time.monotonic() - begun < 12
    begun = time.monotonic()
    with Raw(port) as raw:
        assert raw.connect(fresh("id"), user="alice", password=b"other").reason == 0x86
    assert time.monotonic() - begun < 2


def test_incomplete_requests_do_not_delay_the_health_check(edge):
    port = edge["admin"].port
    held = []
    for _ in range(64):
        one = socket.create_connection(("127.0.0.1", port))
        one.sendall(b"GET /hea")
        held.append(one)
    for _ in range(3):
        begun = time.monotonic()
        assert edge.http("/healthz")[0] == 200
        assert time.monotonic() - begun < 2
    for one in held:
        one.close()


# ---------------------------------------------------------------- loops and pages


def test_a_server_that_is_an_own_listener_is_refused(tmp_path, pki, broker, own_edge):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"mqtt://localhost:{port}"
    edge = own_edge(url, listeners=[listener("tcp") | {"bind": f"127.0.0.1:{port}"}])
    for command in ("check", "run"):
        done = tidegate(command, "--config", edge.file)
        assert done.returncode == 64 and "upstream.servers[0]" in done.stderr and '"tcp"' in done.stderr, done.stderr


def test_a_probe_that_comes_back_is_recognised(pki, broker, own_edge):
    """Behind another address, such as a balancer's, only the probe shows that a server is this Tidegate."""
    from harness.cable import Cable

    edge = own_edge(broker.url)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cable = Cable(port)
    text = edge.file.read_text().replace(broker.url, f"mqtt://127.0.0.1:{cable.port}").replace('"127.0.0.1:0"', f'"127.0.0.1:{port}"', 1)
    edge.file.write_text(text)
    try:
        edge.start()
        edge.wait_log("leads to a listener of this Tidegate")
        links = edge.api("/api/v1/links")["links"]
        assert all(link["state"] != "up" for link in links)
    finally:
        edge.close()
        cable.close()


def test_listed_origins_are_compared_in_their_normal_form(broker, own_edge, tmp_path):
    origins = ["null", "https://*.example.com", "https://x:443"]
    edge = own_edge(broker.url, listeners=[listener("ws", origins=origins)]).start()
    for origin, good in (("null", True), ("https://a.example.com", True), ("https://x", True), ("https://x:443", True), ("https://a.b.example.com", False), ("https://example.com", False), ("http://x", False)):
        try:
            with Raw(edge["ws"].port, "ws", headers=f"Origin: {origin}\r\n") as raw:
                assert raw.connect(fresh("id")).reason == 0 and good, origin
        except AssertionError:
            assert not good, origin
        except Exception:
            assert not good, origin
