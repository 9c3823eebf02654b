"""Floods: memory stays under its budgets, the metrics count dropped messages, and clients that behave get all messages."""

from __future__ import annotations

import fcntl
import multiprocessing
import re
import selectors
import socket
import ssl
import threading
import time

import pytest

from harness import wire
from harness.names import fresh
from harness.phone import Phone
from harness.process import PATIENCE, wait_until
from harness.raw import Raw, frame

# These tests run one at a time: they measure memory and delay.
pytestmark = pytest.mark.xdist_group("floods")

MIB = 1 << 20
# Memory may exceed the named budgets by this: allocator slack, tables of sessions and connections.
SLACK = 48 * MIB


def high_socket() -> socket.socket:
    """A socket with a high descriptor: paho waits with select(), which ends at 1,024."""
    low = socket.socket()
    high = socket.socket(fileno=fcntl.fcntl(low.fileno(), fcntl.F_DUPFD_CLOEXEC, 1024))
    low.close()
    return high


class Crowd:
    """Many plain TCP clients of one process, without a thread each."""

    def __init__(self, port: int, names: list[str], *, version: int = 5, window: int = 200, **connect):
        self.version = version
        self.names = names
        self.socks: list[socket.socket] = []
        for first in range(0, len(names), window):
            batch = []
            for one in names[first : first + window]:
                sock = high_socket()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                # A small buffer, so that the server soon notices a client that does not read.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
                sock.connect(("127.0.0.1", port))
                sock.sendall(wire.connect(one, version=version, **connect))
                batch.append(sock)
            for sock in batch:
                got = read_packets(sock, 1, version)
                assert got[0].kind == wire.CONNACK and got[0].reason == 0, got
            self.socks += batch

    def each(self, make, answers: int = 1, window: int = 200) -> list[list[wire.Packet]]:
        """Sends every client its own bytes and reads that many packets back from each."""
        out = []
        for first in range(0, len(self.socks), window):
            batch = self.socks[first : first + window]
            for n, sock in enumerate(batch, first):
                sock.sendall(make(n))
            out += [read_packets(sock, answers, self.version) for sock in batch]
        return out

    def close(self) -> None:
        for sock in self.socks:
            sock.close()


def read_packets(sock: socket.socket, count: int, version: int = 5, timeout: float = 20) -> list[wire.Packet]:
    buffer, got = bytearray(), []
    sock.settimeout(timeout * PATIENCE)
    while len(got) < count:
        chunk = sock.recv(65536)
        assert chunk, f"closed after {got}"
        buffer += chunk
        got += wire.split(buffer, version)
    return got


def flood(port: int, topics: list[str], rounds: int, payload: bytes, qos: int = 1, window: int = 32) -> int:
    """Publishes to every topic that many times, keeping the server's Receive Maximum."""
    sent = 0
    with Raw(port, timeout=60) as raw:
        raw.connect(fresh("flood"), keep_alive=0)
        for n in range(rounds):
            for first in range(0, len(topics), window):
                batch = topics[first : first + window]
                raw.send(b"".join(wire.publish(t, payload, qos, 1 + i) for i, t in enumerate(batch)))
                sent += len(batch)
                for _ in batch if qos else ():
                    assert raw.recv().kind == wire.PUBACK
        raw.send(wire.PING)
        while raw.recv().kind != wire.PINGRESP:
            pass
    return sent


def test_a_flood_to_detached_sessions_stays_under_the_budget(own_broker, own_edge, full):
    """Each session's queue could hold the flood, all together cannot: the least recently connected sessions lose their messages first."""
    count = 10_000 if full else 400
    budget = 64 * MIB if full else 4 * MIB
    broker = own_broker(quiet=True)
    edge = own_edge(broker.url, memory={"max": "2GiB", "queues": f"{budget}"}, limits={"connect_rate_max": 100_000}).start()
    port, base = edge["tcp"].port, fresh()
    names = [f"{base}-{n}" for n in range(count)]
    crowd = Crowd(port, names, expiry=3600)
    crowd.each(lambda n: wire.subscribe(1, (f"{base}/{n}", 1)))
    for first in range(0, count, 50):
        for sock in crowd.socks[first : first + 50]:
            sock.close()
        edge.wait_metric("these are detached", lambda m: m.sum("tidegate_sessions", state="detached") >= min(first + 50, count), 30)
    edge.wait_metric("all are detached", lambda m: m.sum("tidegate_sessions", state="detached") == count, 30)
    before = edge.service.rss_bytes()
    payload = b"x" * 4096
    rounds = budget * 3 // (count * len(payload))
    peak = Peak(edge)
    sent = flood(port, [f"{base}/{n}" for n in range(count)], rounds, payload)
    edge.wait_metric("the last is queued or dropped", lambda m: m.sum("tidegate_queue_messages") + m.sum("tidegate_messages_dropped_total") >= sent, 60)
    now = peak.stop()
    metrics = edge.metrics()
    waiting, dropped = metrics.sum("tidegate_queue_messages"), metrics.sum("tidegate_messages_dropped_total", reason="budget")
    assert metrics.sum("tidegate_queue_bytes") <= budget
    assert now["queue_bytes"] <= budget * 1.02, now
    assert dropped >= sent * 0.5 and waiting + dropped == sent, (sent, waiting, dropped)
    assert waiting >= budget * 0.7 / len(payload), "much less kept than the budget allows"
    assert edge.service.rss_bytes() - before <= budget + SLACK
    # Clients that connected last have kept their messages; the first have not.
    last = [len(come_back(port, one)) for one in names[-20:]]
    first = [len(come_back(port, one)) for one in names[:20]]
    assert sum(last) >= 0.9 * 20 * rounds, f"the last connected kept {last} of {rounds} each, the first {first}"
    assert sum(first) <= 0.5 * 20 * rounds, f"the first connected kept {first} of {rounds} each"
    edge.assert_sane()


def come_back(port: int, me: str) -> list[bytes]:
    with Raw(port) as raw:
        assert raw.connect(me, clean=False, expiry=3600).session_present
        got = []
        raw.send(wire.PING)
        quiet = False
        # Deliveries come in windows; a PINGRESP after an acknowledged window shows that the queue is empty.
        while True:
            packet = raw.recv()
            if packet.kind == wire.PUBLISH:
                quiet = False
                got.append(packet.payload)
                raw.send(wire.ack(wire.PUBACK, packet.packet_id))
            elif packet.kind == wire.PINGRESP:
                if quiet:
                    return got
                quiet = True
                raw.send(wire.PING)


class Peak:
    """Watches the metrics while a flood runs."""

    def __init__(self, edge):
        self.edge, self.most, self._stop = edge, {"queue_bytes": 0.0, "publishes_waiting_bytes": 0.0, "rss": 0.0}, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            try:
                metrics = self.edge.metrics()
            except OSError:
                continue
            for name in ("queue_bytes", "publishes_waiting_bytes"):
                self.most[name] = max(self.most[name], metrics.sum(f"tidegate_{name}"))
            self.most["rss"] = max(self.most["rss"], self.edge.service.rss_bytes())

    def stop(self) -> dict:
        self._stop.set()
        self._thread.join(5)
        return self.most


def test_attached_clients_that_do_not_read_stay_under_the_budget(own_broker, own_edge, client, full):
    """Their messages fill sockets and queues, not the process; a client that reads gets everything in time."""
    count = 1000 if full else 60
    budget = 16 * MIB
    broker = own_broker(quiet=True)
    edge = own_edge(broker.url, memory={"max": "2GiB", "queues": f"{budget}"}, limits={"connect_rate_max": 100_000, "write_stall": "60s"}).start()
    port, base = edge["tcp"].port, fresh()
    stalled = Crowd(port, [f"{base}-{n}" for n in range(count)], receive_maximum=65535, keep_alive=0)
    # Each also has a topic of its own, so that nothing is shared between the queues.
    stalled.each(lambda n: wire.subscribe(1, (f"{base}/all", 1), (f"{base}/own/{n}", 1)))
    reader = client(edge)
    reader.subscribe(f"{base}/all")
    before = edge.service.rss_bytes()
    peak = Peak(edge)
    payload = b"y" * 16384
    rounds = 400
    per_own = max(2, 64 * MIB // (count * len(payload)))
    worker = threading.Thread(target=flood, args=(port, [f"{base}/own/{n}" for n in range(count)], per_own, payload), daemon=True)
    worker.start()
    flood(port, [f"{base}/all"], rounds, payload)
    latency = []
    for n in range(20):
        began = time.monotonic()
        reader_publish(port, f"{base}/all", f"tick-{n}".encode())
        reader.until(f"tick-{n}")
        latency.append(time.monotonic() - began)
    worker.join(120 * PATIENCE)
    assert not worker.is_alive()
    now = peak.stop()
    assert now["queue_bytes"] <= budget * 1.02, now
    # Beside the queues, each socket has some bytes encoded ahead.
    assert now["rss"] - before <= budget + count * 128 * 1024 + SLACK, now
    assert sorted(latency)[len(latency) // 2] < 0.5 * PATIENCE, latency
    dropped = edge.metrics()
    # The budget alone bounds the queues of connected clients, and each loss has its signs.
    lost = dropped.sum("tidegate_messages_dropped_total", reason="budget")
    assert lost > 0 and lost == dropped.sum("tidegate_messages_dropped_total"), dropped.series("tidegate_messages_dropped_total")
    edge.wait_log(r"WARN.*Messages for connected clients were dropped")
    assert sum(one["gaps"] for one in edge.api("/api/v1/sessions?limit=1000")["sessions"]) > 0
    stalled.close()
    edge.assert_sane()


def test_large_messages_to_clients_that_do_not_read_stay_under_the_budgets(own_broker, own_edge, client, full):
    """Three messages of 1 MB for each: the process keeps each message once. A client that reads gets them at once, the others when they read."""
    count = 1500 if full else 300
    broker = own_broker(quiet=True)
    edge = own_edge(broker.url, memory={"max": "512MiB"}, limits={"packet_max": "2MiB", "connect_rate_max": 100_000}).start()
    port, topic = edge["tcp"].port, fresh()
    stalled = Crowd(port, [fresh("stalled") for _ in range(count)], keep_alive=0)
    stalled.each(lambda n: wire.subscribe(1, (topic, 1)))
    reader = client(edge)
    reader.subscribe(topic)
    before = edge.service.rss_bytes()
    peak = Peak(edge)
    payload = b"z" * MIB
    began = time.monotonic()
    flood(port, [topic], 3, payload)
    assert [len(m.payload) for m in reader.take(3)] == [MIB] * 3
    assert time.monotonic() - began < 10 * PATIENCE
    now = peak.stop()
    assert now["rss"] - before <= SLACK + count * 16 * 1024, now
    for sock in (stalled.socks[0], stalled.socks[-1]):
        for packet in read_packets(sock, 3):
            assert (packet.kind, packet.payload) == (wire.PUBLISH, payload)
    metrics = edge.metrics()
    assert metrics.sum("tidegate_messages_dropped_total") == 0, metrics.series("tidegate_messages_dropped_total")
    stalled.close()
    edge.assert_sane()


def test_websockets_that_do_not_read_stay_under_the_budget(own_broker, own_edge):
    """Unread messages of a WebSocket wait in the session, under its budget, and not in frames; answers to pings do not pile up."""
    count, budget = 12, 8 * MIB
    broker = own_broker(quiet=True)
    edge = own_edge(broker.url, ("tcp", "ws", "wss"), memory={"max": "2GiB", "queues": f"{budget}"}).start()
    topic, payload, rounds = fresh(), b"y" * 65536, 150
    stalled = [Raw(edge[t].port, t, ca=edge.pki.ca) for t in ("ws", "wss") for _ in range(count)]
    for raw in stalled:
        raw.connect(fresh("stalled"), keep_alive=0)
        raw.subscribe((topic, 1))
    before = edge.service.rss_bytes()
    peak = Peak(edge)
    flood(edge["tcp"].port, [topic], rounds, payload)
    pings = b"".join(frame(b"%124d" % n, 9) for n in range(2000))
    for _ in range(5):
        stalled[0].send_bytes(pings)
    now = peak.stop()
    # Without a bound it would be three times as much, since each client's frames are copies of their own.
    assert count * 2 * rounds * len(payload) > 3 * (budget + SLACK)
    assert now["queue_bytes"] <= budget * 1.02 and now["rss"] - before <= budget + SLACK, now
    # A client that reads again gets whole packets, from where it stopped.
    for raw in (stalled[0], stalled[-1]):
        for _ in range(16):
            packet = raw.recv()
            assert (packet.kind, packet.payload) == (wire.PUBLISH, payload)
            raw.send(wire.ack(wire.PUBACK, packet.packet_id))
    for raw in stalled:
        raw.close()
    edge.assert_sane()


def reader_publish(port: int, topic: str, payload: bytes) -> None:
    with Raw(port) as raw:
        raw.connect(fresh("tick"))
        raw.send(wire.publish(topic, payload, 1, 1))
        assert raw.recv().kind == wire.PUBACK


def test_a_socket_that_takes_nothing_is_closed(own_broker, own_edge):
    broker = own_broker(quiet=True)
    edge = own_edge(broker.url, limits={"write_stall": "1s"}).start()
    port, topic = edge["tcp"].port, fresh()
    crowd = Crowd(port, [fresh("stalled")], keep_alive=0)
    # At QoS 0 only the socket limits deliveries.
    crowd.each(lambda n: wire.subscribe(1, (topic, 0)))
    flood(port, [topic], 1500, b"z" * 16384)
    edge.wait_metric("it is closed", lambda m: m.sum("tidegate_disconnects_total", reason="write_stall") >= 1, 15)
    crowd.close()


@pytest.mark.parametrize("version", (5, 4))
def test_publishes_while_the_broker_is_away_stay_under_the_budget(own_broker, own_edge, client, version, full):
    """Publishes that wait for the broker have a budget. Beyond it, MQTT 5 clients get 0x97, 3.1.1 clients are not read, QoS 0 is dropped, and no acknowledged message is lost."""
    count = 1000 if full else 50
    budget = 4 * MIB
    broker = own_broker(quiet=True)
    up = {"servers": [broker.url], "backoff_min": "50ms", "backoff_max": "200ms", "publishes_waiting": f"{budget}"}
    # The subscriber is slow and must lose nothing.
    roomy = {"queue_bytes_max": "512MiB", "queue_messages_max": 1_000_000}
    edge = own_edge(broker.url, upstream=up, session=roomy, memory={"max": "4GiB", "queues": "1GiB"}, limits={"connect_rate_max": 100_000, "receive_max": 64}).start()
    port, base = edge["tcp"].port, fresh()
    sub = client(edge, "tcp", fresh("sub"), expiry=300)
    sub.subscribe((f"{base}/#", 1))
    broker.stop()
    before = edge.service.rss_bytes()
    peak = Peak(edge)
    crowd = Crowd(port, [f"{base}-{n}" for n in range(count)], version=version, keep_alive=0)
    each = 20
    payload = b"w" * (12 * 1024 if not full else 4096)
    flooding = Publishers(crowd, base, each, payload, version)
    flooding.start()
    if version == 5:
        edge.wait_metric("refusals are counted", lambda m: m.sum("tidegate_publishes_deferred_total", reason="client_share|budget") > 0, 30)
    edge.wait_metric("what waits is counted", lambda m: m.sum("tidegate_publishes_waiting") > 0, 10)
    # QoS 0 over the budget is dropped and counted.
    flood(port, [f"{base}/zero"], 200, payload, qos=0)
    metrics = edge.wait_metric("QoS 0 is counted", lambda m: m if m.sum("tidegate_messages_dropped_total", reason="upstream") > 0 else None, 10)
    assert metrics.sum("tidegate_publishes_waiting_bytes") <= budget
    # All clients stay connected, and their pings are answered.
    assert not sub.ended.is_set()
    # 3.x sockets may be left unread past their limit, so only MQTT 5 must answer now.
    if version == 5:
        flooding.ping_all()
    broker.start()
    flooding.finish()
    now = peak.stop()
    assert now["publishes_waiting_bytes"] <= budget * 1.02, now
    assert now["rss"] - before <= budget + count * 128 * 1024 + SLACK, now
    accepted = flooding.accepted
    assert flooding.answered == count * each
    if version == 4:
        assert len(accepted) == count * each
    else:
        assert 0 < len(accepted) < count * each, (len(accepted), count * each)
    # Everything that was acknowledged arrives, once, each client's in order.
    sub_publish = client(edge)
    got = [(m.topic, m.payload[:8]) for m in sub.until_marker(sub_publish, f"{base}/end") if not m.topic.endswith("/zero")]
    assert sorted(set(got)) == sorted(got), "some messages came twice"
    assert set(got) >= accepted, f"{len(accepted - set(got))} acknowledged messages are lost"
    per = {}
    for topic, head in got:
        per.setdefault(topic, []).append(head)
    assert all(v == sorted(v) for v in per.values()), "messages of one client came out of order"
    crowd.close()
    edge.assert_sane()


class Publishers:
    """Each client of a crowd publishes `each` QoS 1 messages and reads its answers, all in one thread."""

    def __init__(self, crowd: Crowd, base: str, each: int, payload: bytes, version: int):
        self.crowd, self.base, self.each, self.payload, self.version = crowd, base, each, payload, version
        self.accepted: set[tuple[str, bytes]] = set()
        self.answered = 0
        self.pongs = 0
        self.error: BaseException | None = None
        self._ping = threading.Event()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._guard, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ping_all(self, timeout: float = 20) -> None:
        self._ping.set()
        wait_until("every ping is answered", lambda: self.error or self.pongs >= len(self.crowd.socks), timeout)
        assert not self.error, self.error

    def finish(self, timeout: float = 60) -> None:
        wait_until("every publish is answered", lambda: self.error or self.answered >= len(self.crowd.socks) * self.each, timeout)
        self._done.set()
        self._thread.join(5)
        assert not self.error, self.error

    def _guard(self) -> None:
        try:
            self._run()
        except BaseException as error:
            self.error = error

    def _run(self) -> None:
        selector = selectors.DefaultSelector()
        for n, sock in enumerate(self.crowd.socks):
            sock.setblocking(False)
            out = bytearray()
            for m in range(self.each):
                out += wire.publish(self._topic(n), b"%08d" % m + self.payload, 1, 1 + m, version=self.version)
            selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE, [n, out, bytearray(), False])
        while not self._done.is_set():
            for key, events in selector.select(0.05):
                n, out, buffer, pinged = key.data
                if events & selectors.EVENT_WRITE and out:
                    try:
                        del out[: key.fileobj.send(out[:65536])]
                    except BlockingIOError:
                        pass
                    if not out:
                        selector.modify(key.fileobj, selectors.EVENT_READ, key.data)
                if events & selectors.EVENT_READ:
                    chunk = key.fileobj.recv(65536)
                    assert chunk, f"publisher {n} was disconnected"
                    buffer += chunk
                    for packet in wire.split(buffer, self.version):
                        self._take(n, packet)
            if self._ping.is_set():
                for key in list(selector.get_map().values()):
                    if not key.data[3]:
                        key.data[3] = True
                        key.data[1].extend(wire.PING)
                        selector.modify(key.fileobj, selectors.EVENT_READ | selectors.EVENT_WRITE, key.data)

    def _topic(self, n: int) -> str:
        return f"{self.base}/pub/{n}"

    def _take(self, n: int, packet: wire.Packet) -> None:
        if packet.kind == wire.PINGRESP:
            self.pongs += 1
        elif packet.kind == wire.PUBACK:
            self.answered += 1
            if packet.reason in (0, 0x10):
                self.accepted.add((self._topic(n), b"%08d" % (packet.packet_id - 1)))
            else:
                assert packet.reason == 0x97, hex(packet.reason)
        else:
            raise AssertionError(f"publisher {n} got {packet}")


def flood_with_pings(port: int, count: int, ready) -> None:
    """Connections that send PINGREQ as fast as they are read, and read the answers; ends by a signal."""
    with selectors.DefaultSelector() as selector:
        for _ in range(count):
            sock = socket.create_connection(("127.0.0.1", port))
            sock.sendall(wire.connect(fresh("flood")))
            assert read_packets(sock, 1)[0].reason == 0
            sock.setblocking(False)
            selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE)
        ready.set()
        while True:
            for key, events in selector.select():
                try:
                    if events & selectors.EVENT_READ:
                        assert key.fileobj.recv(1 << 17)
                    if events & selectors.EVENT_WRITE:
                        key.fileobj.send(wire.PING * 32768)
                except BlockingIOError:
                    pass


def test_a_flood_of_pings_leaves_others_their_turn(own_broker, own_edge):
    """Small packets come by the ten thousand in one read."""
    edge = own_edge(own_broker().url).start()
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    flood = fork.Process(target=flood_with_pings, args=(edge["tcp"].port, 16, ready), daemon=True)
    flood.start()
    try:
        assert ready.wait(10 * PATIENCE)
        took = []
        with Raw(edge["tcp"].port, timeout=30) as raw:
            raw.connect(fresh("id"))
            for _ in range(50):
                began = time.monotonic()
                raw.send(wire.PING)
                assert raw.recv().kind == wire.PINGRESP
                took.append(time.monotonic() - began)
        assert flood.is_alive()
        # A turn of 64 KiB, eight times over, took half a second.
        assert sorted(took)[25] < 0.15 * PATIENCE, took
    finally:
        flood.terminate()
        flood.join()


def test_a_sessions_queue_limits_drop_the_oldest_messages(own_broker, own_edge, client):
    """queue_messages_max and queue_bytes_max of one session: the oldest messages are dropped and counted by reason."""
    broker = own_broker(quiet=True)
    edge = own_edge(broker.url, session={"queue_messages_max": 10, "queue_bytes_max": "64KiB"}).start()
    port, topic = edge["tcp"].port, fresh()
    me = fresh("id")
    one = client(edge, "tcp", me, expiry=300)
    one.subscribe((topic, 1))
    one.close()
    edge.wait_metric("detached", lambda m: m.sum("tidegate_sessions", state="detached") == 1)
    pub = client(edge)
    for n in range(10):
        pub.publish(topic, f"{n}")
    assert edge.wait_metric("ten wait", lambda m: m.sum("tidegate_queue_messages") == 10)
    assert edge.metrics().sum("tidegate_messages_dropped_total") == 0
    pub.publish(topic, "10")
    edge.wait_metric("one is dropped", lambda m: m.sum("tidegate_messages_dropped_total", reason="^queue_full$") == 1)
    assert come_back(port, me) == [b"%d" % n for n in range(1, 11)]
    edge.wait_metric("it is away again", lambda m: m.sum("tidegate_sessions", state="detached") == 1)
    for n in range(10):
        pub.publish(topic, f"{n}" + "x" * 10_000)
    edge.wait_metric("bytes are counted", lambda m: m.sum("tidegate_messages_dropped_total", reason="^queue_bytes$") >= 3)
    got = come_back(port, me)
    assert 4 <= len(got) <= 7 and [g[:1] for g in got] == [b"%d" % n for n in range(10 - len(got), 10)]


@pytest.mark.parametrize("policy,expected", [("newest", [0, 1, 2]), ("end_session", None)])
def test_a_full_queue_follows_its_policy(own_broker, own_edge, client, policy, expected):
    broker = own_broker(quiet=True)
    edge = own_edge(broker.url, session={"queue_messages_max": 3, "queue_full": policy}).start()
    port, topic, me = edge["tcp"].port, fresh(), fresh("id")
    one = client(edge, "tcp", me, expiry=300)
    one.subscribe((topic, 1))
    one.close()
    pub = client(edge)
    for n in range(5):
        pub.publish(topic, f"{n}")
    if expected is None:
        edge.wait_metric("the session is ended", lambda m: m.sum("tidegate_sessions_ended_total", reason="queue_full") == 1)
        with Raw(port) as raw:
            assert not raw.connect(me, clean=False, expiry=300).session_present
    else:
        edge.wait_metric("two are dropped", lambda m: m.sum("tidegate_messages_dropped_total", reason="queue_full") == 2)
        assert come_back(port, me) == [b"%d" % n for n in expected]


def test_handshakes_are_limited_and_block_nobody(own_broker, own_edge, client):
    """One address opens more TLS handshakes than it may have and finishes none: other addresses are served at once, and later this one, too."""
    broker = own_broker(quiet=True)
    edge = own_edge(broker.url, ("tcp", "tls", "wss", "quic"), limits={"handshakes_max": 40, "accept_deadline": "3s"}).start()
    here = client(edge)
    topic = fresh()
    here.subscribe(topic)

    def served(way: str, address: str) -> bool:
        context = ssl.create_default_context(cafile=edge.pki.ca)
        with socket.create_connection(("127.0.0.1", edge[way].port), 0.5, (address, 0)) as sock:
            try:
                context.wrap_socket(sock, server_hostname="localhost").close()
            except TimeoutError:
                return False
        return True

    held = []
    try:
        for n in range(80):
            held.append(socket.create_connection(("127.0.0.1", edge[("tls", "wss")[n % 2]].port), 5))
            held[-1].sendall(b"\x16\x03\x01")
        wait_until("all that it can have is taken", lambda: not served("tls", "127.0.0.1"), 2)
        assert served("tls", "127.0.0.2") and served("wss", "127.0.0.2")
        with Phone(edge["quic"].port, edge.pki.ca) as one:
            one.connect(fresh("id"))
        for n in range(10):
            here.publish(topic, f"{n}")
            assert here.next().text == f"{n}"
        edge.wait_metric("they end at the deadline", lambda m: m.sum("tidegate_handshakes_failed_total", reason="timeout") >= 80, 20)
        assert served("tls", "127.0.0.1")
    finally:
        for sock in held:
            sock.close()


@pytest.mark.parametrize("way", ("tls", "wss", "ws"))
def test_one_byte_a_second_ends_at_the_deadline(own_broker, own_edge, way):
    """A client that keeps sending does not extend the handshake's deadline."""
    edge = own_edge(own_broker(quiet=True).url, (way,), limits={"accept_deadline": "2s"}).start()
    said = b"GET /mqtt HTTP/1.1\r\nHost: x\r\n" if way == "ws" else b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
    with socket.create_connection(("127.0.0.1", edge[way].port), 1) as sock:
        begun = time.monotonic()
        for byte in said:
            try:
                sock.send(bytes([byte]))
                if not sock.recv(1):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        assert 1 < time.monotonic() - begun < 5
    edge.wait_metric("it is counted", lambda m: m.sum("tidegate_handshakes_failed_total", reason="timeout") == 1, 5)


def try_connect(port: int) -> bool:
    try:
        with Raw(port, timeout=3) as raw:
            return raw.connect(fresh("late")).reason == 0
    except Exception:
        return False


def test_connections_beyond_connections_max_are_refused(own_broker, own_edge):
    broker = own_broker(quiet=True)
    edge = own_edge(broker.url, limits={"connections_max": 5}).start()
    port = edge["tcp"].port
    held = [Raw(port) for _ in range(5)]
    for n, one in enumerate(held):
        assert one.connect(f"held-{n}").reason == 0
    try:
        with Raw(port) as raw:
            raw.send(wire.connect("sixth"))
            packets, _ = raw.wait_closed()
            assert [p.reason for p in packets] in ([], [0x97], [0x89]), packets
    except OSError:
        pass
    edge.wait_metric("it is counted", lambda m: m.sum("tidegate_connects_refused_total", reason="connections_max") + m.sum("tidegate_handshakes_failed_total", reason="limit") >= 1)
    held.pop().close()
    wait_until("there is room again", lambda: try_connect(port), 5)
    for one in held:
        one.send(wire.PING)
        assert one.recv().kind == wire.PINGRESP
        one.close()
