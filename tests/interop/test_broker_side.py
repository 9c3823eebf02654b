"""The broker goes and comes back, restarts, or shows a wrong certificate: clients notice as little as possible."""

from __future__ import annotations

import re
import signal
import threading
import time

import pytest

from harness import certs, wire
from harness.names import fresh
from harness.process import wait_until
from harness.raw import Raw

# Short times to notice an outage and to come back, so that a test does not wait.
QUICK = {"backoff_min": "50ms", "backoff_max": "200ms"}


def upstream(broker, **more) -> dict:
    return {"servers": [broker.url]} | QUICK | more


def publish_until(pub, sub, topic: str, timeout: float = 15) -> None:
    """Publishes until one message arrives, because a client cannot see when the links are back."""
    count = 0

    def once() -> bool:
        nonlocal count
        pub.publish(topic, f"probe-{count}", 0)
        count += 1
        # A message of another publisher proves nothing about this publisher's link.
        while not sub.incoming.empty():
            if sub.incoming.get().topic == topic:
                return True
        return False

    wait_until(f"messages flow again on {topic}", once, timeout, 0.1)
    while not sub.incoming.empty():
        sub.incoming.get()


@pytest.mark.parametrize("how", (signal.SIGTERM, signal.SIGKILL), ids=("remembers", "forgets"))
def test_clients_stay_while_the_broker_is_away(own_broker, own_edge, client, how):
    broker = own_broker()
    edge = own_edge(broker.url, ("tcp", "ws", "quic"), upstream=upstream(broker)).start()
    topic = fresh()
    subs = [client(edge, t, fresh("id"), version=v, **({"expiry": 300} if v == 5 else {"clean": False})) for t, v in (("tcp", 5), ("ws", 4), ("quic", 5))]
    pub = client(edge)
    for one in subs:
        one.subscribe(f"{topic}/#")
    pub.publish(f"{topic}/a", "before")
    assert all(one.next().text == "before" for one in subs)
    broker.stop(how)
    if how == signal.SIGKILL:
        broker.forget()
    # While the broker is away, all clients stay connected and are answered, and a publish waits.
    mids = [pub.publish(f"{topic}/a", f"away-{n}", 1, wait=False) for n in range(5)]
    with Raw(edge["tcp"].port) as raw:
        assert raw.connect(fresh("new")).reason == 0
        raw.send(wire.PING)
        assert raw.recv().kind == wire.PINGRESP
    assert edge.http("/readyz")[0] == 200 and edge.http("/healthz")[0] == 200
    broker.start()
    for mid in mids:
        pub.wait_published(mid, 20)
    # The subscriptions are older, so messages that the broker takes now arrive. Waiting messages arrive too, unless the broker
    # got them before it knew the filters again (the recorded gap of a broker that forgets).
    publish_until(pub, subs[0], f"{topic}/a")
    for n in range(3):
        pub.publish(f"{topic}/b", f"after-{n}")
    for one in subs:
        got = []
        while not got or got[-1].text != "after-2":
            got.append(one.next())
        assert [m.text for m in got if m.text.startswith("after")] == [f"after-{n}" for n in range(3)]
        assert not one.ended.is_set()
    assert not pub.ended.is_set()


def test_nothing_acknowledged_is_lost_over_a_broker_that_remembers(own_broker, own_edge, client):
    """QoS 1 both ways, the broker restarted in the middle: each acknowledged publish arrives."""
    broker = own_broker()
    edge = own_edge(broker.url, upstream=upstream(broker)).start()
    topic = fresh()
    sub, pub = client(edge, "tcp", fresh("id"), expiry=300), client(edge, "tcp", fresh("id"), expiry=300)
    sub.subscribe((topic, 1))
    mids = []
    for n in range(60):
        mids.append(pub.publish(topic, f"{n}", 1, wait=False))
        if n == 30:
            broker.stop(signal.SIGTERM)
            broker.start()
    for mid in mids:
        pub.wait_published(mid, 20)
    pub.publish(topic, "end", 1)
    got = [m.text for m in sub.until("end", 20)]
    assert [t for i, t in enumerate(got) if t not in got[:i]] == [f"{n}" for n in range(60)]


def test_a_broker_that_is_frozen_and_goes_on_delivers_each_qos_2_message_once(own_broker, own_edge, client, full):
    """SIGSTOP: the links find that it is silent, and their CONNECTs have no answer until it goes on."""
    broker = own_broker()
    edge = own_edge(broker.url, upstream=upstream(broker, keepalive="5s", connect_timeout="1s")).start()
    topic = fresh()
    sub, pub = client(edge, "tcp", fresh("id"), expiry=300), client(edge, "tcp", fresh("id"), expiry=300)
    sub.subscribe((topic, 2))
    pub.publish(topic, "first", 2)
    assert sub.next().text == "first"
    # Many are under way, in both directions, when it freezes.
    mids = [pub.publish(topic, f"{n}", 2, wait=False) for n in range(2000)]
    early = [m.text for m in sub.take(200)]
    broker.service.process.send_signal(signal.SIGSTOP)
    edge.wait_log(r"no CONNACK within upstream.connect_timeout", timeout=40)
    if full:
        time.sleep(30)  # More CONNECTs go without an answer.
    broker.service.process.send_signal(signal.SIGCONT)
    for mid in mids:
        pub.wait_published(mid, 30)
    pub.publish(topic, "end", 2)
    got = early + [m.text for m in sub.until("end", 30)]
    assert sorted(got, key=int) == [f"{n}" for n in range(2000)], "each once"


@pytest.mark.parametrize("transport", ("tcp", "tls", "ws"))
@pytest.mark.parametrize("past", (0, 1))
def test_a_client_may_have_as_many_publishes_unanswered_as_the_hard_limit_allows(own_broker, own_edge, transport, past):
    broker = own_broker()
    limits = {"receive_max": 20, "receive_max_hard": 100}
    edge = own_edge(broker.url, (transport,), limits=limits).start()
    with Raw(edge[transport].port, transport, ca=edge.pki.ca) as raw:
        raw.connect(fresh("id"), keep_alive=1)
        broker.service.process.send_signal(signal.SIGSTOP)
        raw.send(b"".join(wire.publish("a", f"{n}".encode(), 1, n) for n in range(1, 101 + past)))
        if past:
            packets, _ = raw.wait_closed()
            assert [p.reason for p in packets] == [0x93]
            broker.service.process.send_signal(signal.SIGCONT)
            return
        edge.wait_metric("it is left unread", lambda m: m.sum("tidegate_publishes_deferred_total", reason="receive_maximum"))
        time.sleep(2.5)  # Real time must pass: its keep alive does not run while it is left unread.
        broker.service.process.send_signal(signal.SIGCONT)
        assert [(p.kind, p.packet_id) for p in (raw.recv() for _ in range(100))] == [(wire.PUBACK, n) for n in range(1, 101)]


def test_tidegate_starts_without_a_broker(own_broker, own_edge, client):
    broker = own_broker()
    broker.stop()
    edge = own_edge(broker.url, upstream=upstream(broker, subscribe_wait="1s")).start()
    topic = fresh()
    one = client(edge)
    # The SUBSCRIBE waits for a while and is then granted, and a gap is recorded.
    one.subscribe(topic)
    assert edge.http("/readyz")[0] == 200
    broker.start()
    publish_until(one, one, topic)


def test_subscribe_while_away_can_be_refused(own_broker, own_edge, client):
    broker = own_broker()
    edge = own_edge(broker.url, upstream=upstream(broker, subscribe_wait="500ms", subscribe_while_away="refuse")).start()
    topic = fresh()
    one = client(edge)
    one.subscribe(f"{topic}/held")
    broker.stop(signal.SIGKILL)
    edge.wait_metric("no link is up", lambda m: m.series("tidegate_upstream_link_up") and m.sum("tidegate_upstream_link_up") == 0)
    (code,) = one.subscribe(f"{topic}/new", expect=None)
    assert code >= 0x80
    # A filter that was granted before is granted at once.
    one.subscribe(f"{topic}/held", expect=[1])


def test_a_restarted_process_never_delivers_by_anothers_identifiers(own_broker, own_edge, client):
    """The broker kept the old process's session and its identifiers; the new one asks for other filters."""
    broker = own_broker()
    edge = own_edge(broker.url, upstream=upstream(broker)).start()
    base = fresh()
    old = client(edge, "tcp", fresh("id"), expiry=300)
    old.subscribe(*[f"{base}/old/{n}/#" for n in range(20)])
    stop = threading.Event()
    flood = threading.Thread(target=flood_broker, args=(broker.port, base, stop), daemon=True)
    flood.start()
    try:
        old.take(50)
        for round_ in range(3):
            edge.stop(signal.SIGKILL)
            # The broker queues for the dead process's session meanwhile.
            edge.start()
            new = client(edge, "tcp", fresh("id"))
            mine = [f"{base}/new/{round_}/{n}/#" for n in range(20)]
            new.subscribe(*mine)
            seen = new.take(50)
            allowed = re.compile(rf"^{re.escape(base)}/new/{round_}/")
            foreign = [m.topic for m in seen if not allowed.match(m.topic)]
            assert not foreign, foreign[:5]
            # Each message matches one of the client's own filters and comes once.
            assert len({(m.topic, m.payload) for m in seen}) == len(seen)
            new.close()
    finally:
        stop.set()
        flood.join(10)


def flood_broker(port: int, base: str, stop: threading.Event) -> None:
    """Publishes directly at the broker, to old and to new topics."""
    with Raw(port) as raw:
        raw.connect(fresh("flood"))
        count = 0
        while not stop.is_set():
            batch = b""
            for n in range(20):
                batch += wire.publish(f"{base}/old/{n}/x", f"{count}".encode())
                for round_ in range(3):
                    batch += wire.publish(f"{base}/new/{round_}/{n}/x", f"{count}".encode())
                count += 1
            raw.send(batch)
            stop.wait(0.02)


def test_restart_answers_session_present_truthfully(own_broker, own_edge, client):
    broker = own_broker()
    edge = own_edge(broker.url, upstream=upstream(broker)).start()
    me = fresh("id")
    one = client(edge, "tcp", me, expiry=300)
    one.subscribe("x/#")
    edge.stop(signal.SIGKILL)
    one.abandon()
    edge.start()
    # Memory mode: the session ended with the process, and the CONNACK says so.
    assert not client(edge, "tcp", me, clean=False, expiry=300).session_present


def test_links_use_tls_to_the_broker(own_broker, own_edge, client, tmp_path):
    theirs = certs.make(tmp_path / "theirs", "broker")
    broker = own_broker(tls=theirs)
    edge = own_edge(broker.tls_url, upstream={"servers": [broker.tls_url], "tls": {"ca": str(theirs.ca)}}).start()
    topic = fresh()
    one = client(edge)
    one.subscribe(topic)
    one.publish(topic, "over tls")
    assert one.next().text == "over tls"


@pytest.mark.parametrize("wrong", ("ca", "name", "date"))
def test_a_wrong_certificate_of_the_broker_is_logged_and_clients_stay(own_broker, own_edge, client, tmp_path, wrong):
    theirs = certs.make(tmp_path / "theirs", "broker", names="DNS:elsewhere.example" if wrong == "name" else "DNS:localhost,IP:127.0.0.1", days="-1" if wrong == "date" else "30")
    other = certs.make(tmp_path / "other")
    broker = own_broker(tls=theirs)
    ca = other.ca if wrong == "ca" else theirs.ca
    edge = own_edge(broker.tls_url, upstream={"servers": [broker.tls_url], "tls": {"ca": str(ca)}, "subscribe_wait": "500ms"} | QUICK).start()
    line = edge.wait_log({"ca": r"(?i)unknown ?issuer|unknown ca|not trusted", "name": r"(?i)certificate.*(name|not valid for)", "date": r"(?i)expired"}[wrong])
    assert re.search(r"(?i)certificate|tls", line), line
    edge.wait_metric("a metric counts it", lambda m: any(v > 0 for n, labels, v in m.samples if re.search(r"upstream|link", n) and re.search(r"tls|certificate", f"{n} {labels}")))
    # Clients do not notice the fault: they connect, subscribe and are answered.
    topic = fresh()
    one = client(edge)
    one.subscribe(topic)
    with Raw(edge["tcp"].port) as raw:
        raw.connect(fresh("id"))
        raw.send(wire.PING)
        assert raw.recv().kind == wire.PINGRESP
    assert not one.ended.is_set()


def test_the_second_server_is_tried(own_broker, own_edge, client):
    away, here = own_broker(), own_broker()
    away.stop()
    edge = own_edge(here.url, upstream={"servers": [away.url, here.url]} | QUICK).start()
    topic = fresh()
    one = client(edge)
    one.subscribe(topic)
    one.publish(topic, "x")
    assert one.next().text == "x"


def test_links_log_in_with_a_password(own_broker, own_edge, client, tmp_path):
    import subprocess

    passwords = tmp_path / "passwords"
    passwords.touch(0o600)
    subprocess.run(["mosquitto_passwd", "-b", str(passwords), "edge", "sesame"], check=True, capture_output=True)
    broker = own_broker(extra=f"password_file {passwords}\n", anonymous=False)
    secret = tmp_path / "secret"
    secret.write_text("sesame\n")
    secret.chmod(0o600)
    edge = own_edge(broker.url, upstream=upstream(broker, username="edge", password_file=str(secret))).start()
    topic = fresh()
    one = client(edge)
    one.subscribe(topic)
    one.publish(topic, "x")
    assert one.next().text == "x"
    # A wrong password appears in the log, and clients stay connected.
    secret.write_text("wrong\n")
    edge.stop()
    one.abandon()
    edge.start()
    edge.wait_log(r"(?i)not authori[sz]ed|0x87|bad user ?name|0x86")
    two = client(edge)
    assert not two.ended.is_set()


def test_flaps_cost_the_broker_nothing(own_broker, own_edge, client, way, full):
    """Clients of each kind come and go; the broker's log shows nothing but the publishes."""
    broker = own_broker()
    edge = own_edge(broker.url, ("tcp", "ws"), upstream=upstream(broker)).start()
    topic = fresh()
    ways = {t: way(edge, t) for t in ("tcp", "ws")}
    kinds = [{"version": 5, "expiry": 300}, {"version": 4, "clean": False}, {"version": 4, "clean": True}, {"version": 5, "clean": True}]
    count = 40 if full else 12
    subs = []
    for n in range(count):
        kind = kinds[n % len(kinds)]
        one = client(edge, client_id=fresh("flap"), via=ways["ws" if n % 2 else "tcp"], **kind)
        one.subscribe((f"{topic}/{n % 4}", 1), (f"{topic}/all", 1))
        subs.append((one, kind, set()))
    pub = client(edge)
    pub.publish(f"{topic}/all", "start")
    for one, _, _ in subs:
        assert one.next().text == "start"
    # The effects of subscribing, fetches of retained messages among them, are over.
    quiet(broker)
    since = broker.mark()
    published = 1
    for flap in range(5):
        for line in ways.values():
            line.cut()
        pub.publish(f"{topic}/all", f"gap-{flap}")
        for n, (one, kind, _) in enumerate(subs):
            keeps = not (kind.get("clean") is True)
            clean, one.clean = one.clean, not keeps
            one.abandon()
            one.connected.clear(), one.ended.clear()
            one.connect()
            assert one.session_present == keeps
            if not keeps:
                one.subscribe((f"{topic}/{n % 4}", 1), (f"{topic}/all", 1))
        pub.publish(f"{topic}/all", f"live-{flap}")
        published += 2
        for one, kind, before in subs:
            # Messages that were not acknowledged before the cut come again with DUP; the
            # acknowledgement may be lost in several cuts, one after the other.
            got = [m.text for m in one.until(f"live-{flap}") if not (m.dup and m.text in before)]
            before |= {f"gap-{flap}", f"live-{flap}"}
            # A client with a clean session loses the messages of the gap.
            assert got == ([f"gap-{flap}"] if kind.get("clean") is not True else []), got
    lines = broker.service.lines(since)
    assert not [l for l in lines if "New client connected" in l or "SUBSCRIBE" in l], "the broker noticed a flap"
    wait_until("the broker's log has all", lambda: len(published_on_all(broker, since, topic)) >= published - 1)
    assert len(published_on_all(broker, since, topic)) == published - 1
    assert edge.metrics().sum("tidegate_flaps_absorbed_total") >= 5 * count // 2


def published_on_all(broker, since: int, topic: str) -> list[str]:
    return broker.service.grep(rf"Received PUBLISH from .*'{topic}/all'", since)


def quiet(broker, still: float = 1.0) -> None:
    """Waits until the broker's log has stood still for a while."""
    last, at = -1, 0.0

    def stands() -> bool:
        nonlocal last, at
        if broker.mark() != last:
            last, at = broker.mark(), time.monotonic()
        return time.monotonic() - at >= still

    wait_until("the broker is quiet", stands, 15, 0.1)


def test_a_resent_publish_does_not_reach_the_broker_twice(own_broker, own_edge, client):
    """The publisher is cut before its PUBACK and sends again with DUP while the broker is away."""
    broker = own_broker()
    edge = own_edge(broker.url, upstream=upstream(broker)).start()
    topic, me = fresh(), fresh("id")
    sub, pub = client(edge), client(edge)
    sub.subscribe(f"{topic}/#")
    broker.stop(signal.SIGTERM)
    with Raw(edge["tcp"].port) as raw:
        raw.connect(me, expiry=300)
        raw.send(wire.publish(f"{topic}/once", b"once", 1, 7) + wire.PING)
        assert raw.recv().kind == wire.PINGRESP
        raw.reset()
    with Raw(edge["tcp"].port, timeout=20) as raw:
        assert raw.connect(me, clean=False, expiry=300).session_present
        raw.send(wire.publish(f"{topic}/once", b"once", 1, 7, dup=True))
        broker.start()
        answer = raw.recv()
        assert (answer.kind, answer.packet_id) == (wire.PUBACK, 7)
    publish_until(pub, sub, f"{topic}/probe")
    wait_until("the broker's log has the probe", lambda: [l for l in broker.received("PUBLISH") if f"{topic}/probe" in l])
    assert len([l for l in broker.received("PUBLISH") if f"{topic}/once" in l]) == 1


# Legal MQTT, but Debian's mosquitto closes the connection on a discouraged code point.
POISON = {
    "control character in a topic": (lambda t: wire.publish(f"{t}/a\x1db", b"x", 1, 9), True),
    "control character in a topic, QoS 0": (lambda t: wire.publish(f"{t}/a\x1db", b"x", 0), False),
    "U+007F in a topic": (lambda t: wire.publish(f"{t}/a\x7f", b"x", 1, 9), True),
    "a noncharacter in a topic": (lambda t: wire.publish(f"{t}/a\uffff", b"x", 1, 9), True),
    "control character in a filter": (lambda t: wire.subscribe(9, (f"{t}/a\x1db", 1)), True),
    "control character in a user property": (lambda t: wire.publish(f"{t}/a", b"x", 1, 9, props=b"\x26" + wire.text("k\x01") + wire.text("v\x02")), True),
    "control character in a content type": (lambda t: wire.publish(f"{t}/a", b"x", 1, 9, props=b"\x03" + wire.text("c\x01")), True),
    "control character in a response topic": (lambda t: wire.publish(f"{t}/a", b"x", 1, 9, props=b"\x08" + wire.text("r\x01")), True),
    "a topic of very many levels": (lambda t: wire.publish(f"{t}" + "/x" * 250, b"x", 1, 9), True),
    "a topic under $SYS": (lambda t: wire.publish("$SYS/broker/x", b"x", 1, 9), True),
}


@pytest.mark.parametrize("what", POISON)
def test_a_packet_that_the_broker_punishes_affects_only_its_sender(own_broker, own_edge, client, what):
    """The links are shared: whatever a client sends, other clients' messages go on, and the sender gets an answer."""
    broker = own_broker()
    edge = own_edge(broker.url, upstream=upstream(broker, data_links=1, publish_links=1)).start()
    topic = fresh()
    other = client(edge)
    other.subscribe(f"{topic}/other")
    make, answered = POISON[what]
    with Raw(edge["tcp"].port, timeout=20) as raw:
        raw.connect(fresh("poison"))
        raw.send(make(topic))
        for n in range(20):
            other.publish(f"{topic}/other", f"{n}")
            assert other.next().text == f"{n}"
        # The answer is an acknowledgement with any reason code, or a DISCONNECT with a reason.
        if answered:
            answer = raw.recv()
            assert answer.kind in (wire.PUBACK, wire.SUBACK, wire.DISCONNECT), answer
            assert answer.kind != wire.DISCONNECT or answer.reason >= 0x80
    wait_until("the broker's log has the last", lambda: len([l for l in broker.received("PUBLISH") if f"{topic}/other" in l]) == 20)
    # A link may have been lost while Tidegate found the packet, but not again and again.
    assert len(broker.connects()) <= 3 + 4, broker.connects()
