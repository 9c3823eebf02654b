"""Tidegate behind nginx, HAProxy and hand-made headers: the client's address, silence, health checks."""

from __future__ import annotations

import re
import socket
import ssl
import subprocess
import threading
import time
import urllib.request

import pytest

from harness import wire
from harness.edge import Edge, config, listener, tidegate, toml
from harness.names import fresh
from harness.proxies import HaProxy, Nginx, binary, line, tlv
from harness.raw import Closed, Raw

CLIENT, PROXY, STRANGER = "127.0.0.2", "127.0.0.1", "127.0.0.3"
DEADLINE = 2.0


@pytest.fixture(scope="module")
def behind(tmp_path_factory, broker, pki):
    """Listeners that trust 127.0.0.1 and 127.0.0.16/28; clients come from other addresses of loopback."""
    trusted = {"trusted_proxies": [PROXY, "127.0.0.16/28"]}
    listeners = [listener(t, f"proxy-{t}", proxy_protocol="required", **trusted) for t in ("tcp", "tls", "ws", "wss")]
    listeners += [
        listener("ws", "proxy-both", proxy_protocol="required", real_ip_header="X-Forwarded-For", **trusted),
        listener("ws", "xff", ping_interval="1s", **trusted),
        listener("ws", "silent", ping_interval="none", **trusted),
        listener("wss", "forwarded", real_ip_header="Forwarded", **trusted),
        listener("ws", "nobody", path=["/mqtt", "/"]),
        listener("tcp", "plain"),
        listener("tls", "plain-tls"),
    ]
    upstream = {"servers": [broker.url], "sender_properties": ["address"]}
    table = config(broker.url, pki, listeners=listeners, upstream=upstream, limits={"accept_deadline": f"{DEADLINE:.0f}s"}, log={"level": "debug"})
    edge = Edge(tmp_path_factory.mktemp("behind"), table, pki).start()
    yield edge
    edge.assert_sane()
    edge.close()


@pytest.fixture(scope="module")
def haproxy(tmp_path_factory, behind):
    checked = "check inter 100ms fall 1 rise 1"
    health = "option httpchk GET /healthz"
    one = HaProxy(
        tmp_path_factory.mktemp("haproxy"),
        {
            "tcp": (behind["proxy-tcp"].port, f"send-proxy {checked} check-send-proxy", ""),
            "tls": (behind["proxy-tls"].port, f"send-proxy-v2 {checked} check-send-proxy", ""),
            "ws": (behind["proxy-ws"].port, f"send-proxy-v2 {checked} check-send-proxy", health),
            "wss": (behind["proxy-wss"].port, f"send-proxy-v2 {checked} check-send-proxy", ""),
            "xff": (behind["xff"].port, checked, f"{health}\n  option forwardfor"),
        },
    )
    yield one
    one.close()


@pytest.fixture(scope="module")
def nginx(tmp_path_factory, behind):
    one = Nginx(tmp_path_factory.mktemp("nginx"), {"/mqtt": behind["xff"].port, "/silent": behind["silent"].port}, read_timeout="3s")
    yield one
    one.close()


def connects_as(edge: Edge, raw: Raw, address: str) -> None:
    """Checks the address in the log at the begin and end of a connection, and in the API between."""
    me, since, shown = fresh("id"), edge.mark(), re.escape(address)
    assert raw.connect(me, expiry=0).reason == 0
    edge.wait_log(rf"Client connected.*client_id=\"?{me}\b.* peer={shown}\b", since)
    # Without a port in the header, the log shows none.
    assert edge.api(f"/api/v1/sessions/{me}")["peer"] == address
    raw.send(wire.BYE)
    raw.wait_closed()
    edge.wait_log(rf"Connection ended.*client_id=\"?{me}\b.* peer={shown}\b", since)


# Real proxies ---------------------------------------------------------------


@pytest.mark.parametrize("name", ("tcp", "tls", "ws", "wss"))
def test_haproxy_passes_the_address_by_the_proxy_protocol(behind, haproxy, name):
    with Raw(haproxy.ports[name], name, ca=behind.pki.ca, source=CLIENT) as raw:
        connects_as(behind, raw, raw.address)


def test_haproxy_passes_the_address_by_x_forwarded_for(behind, haproxy):
    """HAProxy adds a header line of its own, after the client's."""
    with Raw(haproxy.ports["xff"], "ws", source=CLIENT, headers="X-Forwarded-For: 203.0.113.9\r\n") as raw:
        connects_as(behind, raw, f"{CLIENT}:0")


def test_haproxy_finds_it_healthy_and_the_log_stays_quiet(behind, haproxy):
    before = behind.metrics().sum("tidegate_health_checks_total")
    since, theirs = behind.mark(), haproxy.service.mark()
    behind.wait_metric("checked over HTTP", lambda m: m.sum("tidegate_health_checks_total") >= before + 6)
    assert haproxy.service.grep(r"is DOWN|Layer[467]", theirs) == []
    assert behind.service.grep(r"INFO.*(Handshake failed|Connection refused)", since) == []


def test_nginx_passes_the_address_by_x_forwarded_for(behind, nginx):
    """nginx appends the address to the client's own header line."""
    with Raw(nginx.port, "ws", source=CLIENT, headers="X-Forwarded-For: 203.0.113.9\r\nForwarded: for=203.0.113.9\r\n") as raw:
        connects_as(behind, raw, f"{CLIENT}:0")


def test_pings_keep_nginx_from_cutting_a_silent_client(behind, nginx):
    with Raw(nginx.port, "ws") as pinged, Raw(nginx.port, "ws", path="/silent") as silent:
        for raw in (pinged, silent):
            raw.connect(fresh("quiet"), keep_alive=0)
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            # The client answers pings by itself and gets no other packet.
            pinged.recv(4.5)
        with pytest.raises(Closed):
            silent.recv(5)
        assert time.monotonic() - began < 6
        pinged.send(wire.PING)
        assert pinged.recv().kind == wire.PINGRESP


def test_the_broker_receives_the_clients_address(behind, haproxy, broker):
    topic = fresh()
    watcher = subprocess.Popen(["stdbuf", "-oL", "mosquitto_sub", "-p", str(broker.port), "-V", "5", "-t", topic, "-F", "%P", "-C", "1", "-W", "20", "-d"], stdout=subprocess.PIPE, text=True)
    try:
        next(line for line in watcher.stdout if "Subscribed" in line)
        with Raw(haproxy.ports["tcp"], source=CLIENT) as raw:
            raw.connect(fresh("id"))
            raw.send(wire.publish(topic, b"x", 1, 1))
            assert raw.recv().kind == wire.PUBACK
        assert f"tidegate-address:{CLIENT}\n" in watcher.stdout.read()
    finally:
        watcher.kill()
        watcher.wait()


# Hand-made headers ------------------------------------------------------------

GOOD = {
    # name -> (bytes, the shown address; None: the proxy's own)
    "version 1, IPv4": (line("198.51.100.7", 4711), "198.51.100.7:4711"),
    "version 1, IPv6": (line("2001:db8::7", 4711, "::1"), "[2001:db8::7]:4711"),
    "version 1, unknown": (b"PROXY UNKNOWN\r\n", None),
    "version 1, unknown with more": (b"PROXY UNKNOWN x y z\r\n", None),
    "version 2, IPv4": (binary("198.51.100.7", 4711), "198.51.100.7:4711"),
    "version 2, IPv6": (binary("2001:db8::7", 4711), "[2001:db8::7]:4711"),
    "version 2, an IPv4 address mapped into IPv6": (binary("::ffff:198.51.100.7", 4711), "198.51.100.7:4711"),
    "version 2, with TLVs": (binary("198.51.100.7", 4711, tlvs=tlv(2, b"edge.example") + tlv(0xEA, b"\x01vpce-0123456789") + tlv(4, b"\0" * 40)), "198.51.100.7:4711"),
    "version 2, as large as may be": (binary("198.51.100.7", 4711, tlvs=tlv(0xEE, b"x" * (4096 - 31))), "198.51.100.7:4711"),
    "version 2, no address": (binary(), None),
    "version 2, AF_UNIX": (binary(family=0x31, body=b"/run/x".ljust(108, b"\0") * 2), None),
    "version 2, LOCAL": (binary(command=0), None),
    "version 2, LOCAL with an address": (binary("198.51.100.7", 4711, command=0), None),
}


@pytest.mark.parametrize("what", GOOD)
def test_a_header_shows_the_clients_address(behind, what):
    header, address = GOOD[what]
    with Raw(behind["proxy-tcp"].port, preamble=header) as raw:
        connects_as(behind, raw, address or raw.address)


@pytest.mark.parametrize("transport", ("tcp", "tls", "ws", "wss"))
@pytest.mark.parametrize("header", (line("198.51.100.7", 4711), binary("198.51.100.7", 4711, tlvs=tlv(2, b"edge.example"))), ids=("v1", "v2"))
def test_a_header_may_come_byte_by_byte_or_with_the_first_packets(behind, transport, header):
    port, ca = behind[f"proxy-{transport}"].port, behind.pki.ca
    with Raw(port, transport, ca=ca, preamble=header) as raw:
        connects_as(behind, raw, "198.51.100.7:4711")
    with Slow(port, header) as slow, Raw(slow.port, transport, ca=ca) as raw:
        connects_as(behind, raw, "198.51.100.7:4711")
    if transport == "tcp":
        with Raw(port, preamble=header + wire.connect(fresh("at-once"))) as raw:
            assert raw.recv().reason == 0


class Slow:
    """A relay that sends the header byte by byte and passes the rest on."""

    def __init__(self, target: int, header: bytes):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]

        def pump(a, b):
            try:
                while chunk := a.recv(65536):
                    b.sendall(chunk)
                b.shutdown(socket.SHUT_WR)
            except OSError:
                pass

        def serve():
            near, _ = self.listener.accept()
            far = socket.create_connection(("127.0.0.1", target))
            far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in header:
                far.sendall(bytes([byte]))
                time.sleep(0.001)
            threading.Thread(target=pump, args=(far, near), daemon=True).start()
            pump(near, far)

        threading.Thread(target=serve, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.close()


BAD = {
    # name -> (bytes, the text in the log)
    "none": (wire.connect("x"), "no PROXY protocol header"),
    "none but HTTP": (b"GET /healthz HTTP/1.1\r\n\r\n", "no PROXY protocol header"),
    "a line without end": (b"PROXY TCP4 " + b"1" * 200, "longer than 107"),
    "not an address": (b"PROXY TCP4 x y 1 2\r\n", "malformed"),
    "version 3": (b"\r\n\r\n\x00\r\nQUIT\n\x31\x11\x00\x00", "unknown version"),
    "too few bytes for its addresses": (binary(family=0x11, body=b"\x01\x02"), "malformed"),
    "a datagram": (binary("198.51.100.7", 1, family=0x12), "datagram"),
    "larger than 4 KiB": (binary("198.51.100.7", 1, tlvs=tlv(0xEE, b"x" * 4096)), "larger than 4 KiB"),
}


def until_logged(edge: Edge, pattern: str, attempt) -> str:
    """The line that names the pattern and the address that `attempt` came from; lines about failures are limited in rate."""
    for _ in range(20):
        since = edge.mark()
        address = attempt()
        try:
            return edge.wait_log(rf"(?=.*{pattern})(?=.*{re.escape(address)}\b).*", since, 0.6)
        except AssertionError:
            continue
    raise AssertionError(f"never logged: {pattern}")


def refused(edge: Edge, name: str, say: bytes, pattern: str, source: str | None = None) -> None:
    """Closed without an answer, counted and logged."""

    def attempt() -> str:
        with Raw(edge[name].port, source=source) as raw:
            try:
                raw.send(say)
                assert raw.wait_closed() == ([], None)
            except (BrokenPipeError, ConnectionResetError):
                pass
            return raw.address

    before = edge.metrics().sum("tidegate_handshakes_failed_total", reason="proxy_protocol")
    until_logged(edge, f"PROXY protocol.*{pattern}", attempt)
    assert edge.metrics().sum("tidegate_handshakes_failed_total", reason="proxy_protocol") > before


@pytest.mark.parametrize("what", BAD)
def test_a_broken_header_is_refused(behind, what):
    say, pattern = BAD[what]
    refused(behind, "proxy-tcp", say, pattern)


def test_a_header_from_an_untrusted_address_is_refused(behind):
    refused(behind, "proxy-tcp", line("198.51.100.7", 1), "in none of trusted_proxies", STRANGER)
    with Raw(behind["proxy-tcp"].port, source="127.0.0.17", preamble=line("198.51.100.7", 4711)) as raw:
        connects_as(behind, raw, "198.51.100.7:4711")


def test_a_header_has_the_accept_deadline(behind):
    """The deadline holds wherever the header stops: before it, after half a line, after half of version 2, or behind it."""
    began = time.monotonic()
    slow = [Raw(behind["proxy-tcp"].port, preamble=say) for say in (b"", b"PROXY TCP4 198.51.100.7 1", binary("198.51.100.7", 1)[:20], line("198.51.100.7", 1))]
    for raw in slow:
        assert raw.wait_closed() == ([], None)
        assert DEADLINE * 0.7 <= time.monotonic() - began <= DEADLINE * 2.5


@pytest.mark.parametrize("header", (line("198.51.100.7", 1), binary("198.51.100.7", 1)), ids=("v1", "v2"))
@pytest.mark.parametrize("name", ("plain", "plain-tls", "nobody"))
def test_an_unexpected_header_is_refused(behind, name, header):
    def attempt() -> str:
        with Raw(behind[name].port) as raw:
            # The bytes that follow the header.
            raw.send(header + b"GET /mqtt HTTP/1.1\r\nHost: x\r\n\r\n")
            try:
                raw.wait_closed()
            except (BrokenPipeError, ConnectionResetError):
                pass
            return raw.address

    said = until_logged(behind, "a PROXY protocol header", attempt)
    assert 'proxy_protocol = "required"' in said.replace("\\", "")


# Hand-made HTTP headers -------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "header", "source", "shown"),
    [
        ("xff", "X-Forwarded-For: 198.51.100.7", PROXY, "198.51.100.7:0"),
        ("xff", "X-Forwarded-For: 203.0.113.9, 198.51.100.7, 127.0.0.20", PROXY, "198.51.100.7:0"),
        ("xff", "Forwarded: for=198.51.100.7", PROXY, None),
        ("xff", "X-Forwarded-For: unknown", PROXY, None),
        ("xff", "X-Forwarded-For: 198.51.100.7", STRANGER, None),
        ("forwarded", 'Forwarded: for="[2001:db8::7]:4711";proto=https', PROXY, "[2001:db8::7]:4711"),
        ("forwarded", "Forwarded: for=203.0.113.9\r\nForwarded: by=_x;for=198.51.100.7, for=127.0.0.20", PROXY, "198.51.100.7:0"),
        ("forwarded", 'Forwarded: for=", for=198.51.100.7', PROXY, None),
        ("forwarded", "X-Forwarded-For: 198.51.100.7", PROXY, None),
        ("nobody", "X-Forwarded-For: 198.51.100.7", PROXY, None),
        ("proxy-both", "X-Forwarded-For: 198.51.100.7", PROXY, "192.0.2.1:99"),
    ],
)
def test_headers_of_a_request_show_the_clients_address(behind, name, header, source, shown):
    transport = behind[name].transport
    # Behind both: the balancer names the proxy behind it, and a trusted proxy's header names the client.
    preamble = line("192.0.2.1", 99) if name == "proxy-both" else b""
    with Raw(behind[name].port, transport, ca=behind.pki.ca, source=source, headers=f"{header}\r\n", preamble=preamble) as raw:
        assert raw.upgrade_status == 101, raw.upgrade
        connects_as(behind, raw, shown or raw.address)
    if name == "proxy-both":
        with Raw(behind[name].port, transport, headers=f"{header}\r\n", preamble=line("127.0.0.20", 99)) as raw:
            connects_as(behind, raw, "198.51.100.7:0")
        # A proxy that passes connections on unchanged has not checked headers, so they count only where the configuration says so.
        with Raw(behind["proxy-ws"].port, transport, headers=f"{header}\r\n", preamble=line("127.0.0.20", 99)) as raw:
            connects_as(behind, raw, "127.0.0.20:99")


# Plain HTTP on a port of WebSocket ------------------------------------------

REQUESTS = {
    # name -> (request, status line, required lines, the text in the log; None: no line at all)
    "health": ("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", "200 OK", [], None),
    "health over HTTP/1.0": ("GET /healthz HTTP/1.0\r\n\r\n", "200 OK", [], None),
    "HEAD of health": ("HEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\n", "200 OK", [], None),
    "POST to health": ("POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi", "405 Method Not Allowed", ["Allow: GET, HEAD"], "HTTP 405"),
    "a page": ("GET /mqtt HTTP/1.1\r\nHost: x\r\n\r\n", "426 Upgrade Required", ["Upgrade: websocket", "Connection: close, Upgrade"], "HTTP 426.*Upgrade and Connection"),
    "another path": ("GET /favicon.ico HTTP/1.1\r\nHost: x\r\n\r\n", "404 Not Found", [], 'HTTP 404: path .*"/favicon.ico'),
    "another method": ("PUT /mqtt HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", "405 Method Not Allowed", ["Allow: GET"], "HTTP 405"),
    "an old draft": ("GET /mqtt HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 8\r\n\r\n", "426 Upgrade Required", ["Sec-WebSocket-Version: 13"], "HTTP 426.*must be 13"),
    "HTTP/1.0": ("GET /mqtt HTTP/1.0\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", "426 Upgrade Required", [], "HTTP 426: HTTP/1.1 is needed"),
    "HTTP/2": ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", "505 HTTP Version Not Supported", [], "HTTP 505.*HTTP/2"),
    "TLS": ("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "400 Bad Request", [], "HTTP 400.*but TLS"),
    "MQTT": ("\x10\x10\0\4MQTT\4\2\0\x3c\0\4abcd", "400 Bad Request", [], "HTTP 400.*but MQTT"),
    "nonsense": ("HELLO\r\n\r\n", "400 Bad Request", [], "HTTP 400: malformed"),
}


@pytest.mark.parametrize("what", REQUESTS)
def test_plain_http_requests_are_answered(edge, what):
    request, status, lines, logged = REQUESTS[what]

    def attempt() -> str:
        with socket.create_connection(("127.0.0.1", edge["ws"].port), 10) as sock:
            sock.sendall(request.encode("latin-1"))
            answer = b""
            while chunk := sock.recv(4096):
                answer += chunk
            head, _, body = answer.decode().partition("\r\n\r\n")
            assert head.startswith(f"HTTP/1.1 {status}\r\n"), head
            head += "\r\n"
            assert all(f"\r\n{one}\r\n" in head for one in [*lines, *([] if "426" in status else ["Connection: close"])]), head
            assert ("Content-Length" in head) == bool(body) == (not request.startswith("HEAD"))
            return "%s:%d" % sock.getsockname()

    if logged is not None:
        until_logged(edge, logged, attempt)
        return
    # The request is not logged: the next line of the log is about another connection.
    since, address = edge.mark(), attempt()
    with Raw(edge["ws"].port, "ws") as raw:
        raw.connect(me := fresh("next"))
    edge.wait_log(me, since)
    assert edge.service.grep(rf"{address}\b", since) == []


def test_health_inside_tls_and_http_on_it_outside(edge):
    context = ssl.create_default_context(cafile=str(edge.pki.ca))
    with urllib.request.urlopen(f"https://localhost:{edge['wss'].port}/healthz", timeout=10, context=context) as answer:
        assert (answer.status, answer.read()) == (200, b"ok\n")
    for name, say, seen in (("wss", b"GET / HTTP/1.1\r\n\r\n", "plain HTTP"), ("tls", wire.connect("x"), "MQTT alone")):

        def attempt() -> str:
            with Raw(edge[name].port) as raw:
                raw.send_bytes(say)
                try:
                    while raw._read(time.monotonic() + 10):
                        pass
                except Closed:
                    pass
                return raw.address

        until_logged(edge, seen, attempt)


def test_several_paths_are_served(behind):
    for path, status in (("/mqtt", 101), ("/", 101), ("/ws", 404)):
        with Raw(behind["nobody"].port, "ws", path=path) as raw:
            assert raw.upgrade_status == status, path


WRONG = {
    "a header without proxies": ({"proxy_protocol": "required"}, "tcp", r"listeners\[0\].proxy_protocol.*needs trusted_proxies"),
    "proxies that tell nothing": ({"trusted_proxies": ["10.0.0.0/8"]}, "tls", r"listeners\[0\].trusted_proxies.*proxy_protocol"),
    "proxies of QUIC": ({"trusted_proxies": ["10.0.0.0/8"]}, "quic", r"listeners\[0\].trusted_proxies.*tcp, tls, ws and wss"),
    "no network": ({"trusted_proxies": ["10.0.0.0/8", "proxy.example"]}, "ws", r"listeners\[0\].trusted_proxies\[1\].*proxy.example.* is no network"),
    "bits behind the prefix": ({"trusted_proxies": ["10.0.0.1/8"]}, "ws", r"did you mean .*10\.0\.0\.0/8"),
    "another word": ({"proxy_protocol": "on"}, "tcp", r"listeners\[0\].proxy_protocol.*off.*required"),
    "another header": ({"real_ip_header": "X-Real-IP"}, "ws", r"listeners\[0\].real_ip_header.*X-Forwarded-For"),
    "a header without HTTP": ({"real_ip_header": "none"}, "tcp", r"listeners\[0\].real_ip_header.*ws and wss"),
    "pings without WebSocket": ({"ping_interval": "45s"}, "tls", r"listeners\[0\].ping_interval.*ws and wss"),
    "pings too often": ({"ping_interval": "10ms"}, "ws", r"listeners\[0\].ping_interval.*out of range"),
    "no path": ({"path": []}, "ws", r"listeners\[0\].path.*at least one"),
    "the path of health": ({"path": ["/mqtt", "/healthz"]}, "ws", r"listeners\[0\].path.*load balancers"),
}


@pytest.mark.parametrize("what", WRONG)
def test_configurations_that_are_refused(tmp_path, pki, what):
    more, transport, says = WRONG[what]
    file = tmp_path / "tidegate.toml"
    file.write_text(toml(config("embedded:", pki, listeners=[listener(transport, **more)])))
    done = tidegate("check", "--config", file)
    assert done.returncode == 64
    assert re.search(says, done.stdout + done.stderr), done.stdout + done.stderr
