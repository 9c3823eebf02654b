"""MQTT over WebTransport: MQTT.js in headless Chromium with our module, and aioquic; wss where UDP is blocked."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from harness import wire
from harness.edge import listener
from harness.js import Agent, chromium
from harness.links import Way
from harness.loop import call
from harness.names import fresh
from harness.process import wait_until
from harness.udp_cable import UdpCable
from harness.webtransport import dial

JS = Path(__file__).parent / "js"
# All tests share one browser.
pytestmark = pytest.mark.xdist_group("webtransport")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    agent = Agent("browser", chromium(), str(tmp_path_factory.mktemp("profile")))
    yield agent
    agent.close()


@pytest.fixture
def edge(own_edge, broker, pki):
    """A certificate for QUIC that a page may name by its hash, and one of an authority for other transports."""
    tls = [{"name": "default", "cert": str(pki.cert), "key": str(pki.key)}, {"name": "page"}]
    quic = [
        listener("quic", tls="page", webtransport=True),
        listener("quic", "closed", tls="page", webtransport=True, path="/closed", origins=["https://app.example"]),
        listener("quic", "signed", webtransport=True),
    ]
    return own_edge(broker.url, tls=tls, listeners=[listener("tcp"), listener("wss"), *quic]).start()


@pytest.fixture
def udp(edge):
    cable = UdpCable(edge["quic"].port)
    yield cable
    cable.close()


@pytest.fixture
def wss(edge, way) -> Way:
    return way(edge, "wss")


def page(edge, udp, wss, me, path="/mqtt", **webtransport) -> tuple[str, dict]:
    (printed,) = edge.service.grep(r"^certificate page sha256 ")
    settings = {"url": f"https://127.0.0.1:{udp.port}{path}", "serverCertificateHashes": [printed.split()[-1]], "timeout": 4000} | webtransport
    options = {"clientId": me, "clean": False, "resubscribe": False, "keepalive": 2, "reconnectPeriod": 50, "protocolVersion": 5,
               "properties": {"sessionExpiryInterval": 300}, "webTransport": settings}
    return f"wss://localhost:{wss.port}{wss.path}", options


def test_the_module_passes_its_own_tests(tmp_path):
    """Runs the module's own tests in Node, on a simulated WebTransport."""
    bundle = tmp_path / "test.mjs"
    make = f"import({json.dumps(str(JS / 'bundle.mjs'))}).then(async (b) => require('fs').writeFileSync({json.dumps(str(bundle))}, await b.bundled({json.dumps(str(JS / 'webtransport.test.mjs'))}, 'node')))"
    subprocess.run(["node", "-e", make], check=True, timeout=60)
    done = subprocess.run(["node", "--test", str(bundle)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_one_session_moves_between_webtransport_and_wss(edge, broker, client, browser, udp, wss):
    """A page connects, subscribes, publishes, is cut off, resumes, loses UDP and comes back: its one session loses no message."""
    topic, me = fresh(), fresh("page")
    url, options = page(edge, udp, wss, me, retryAfter=3000)
    at = browser.do("connect", client=me, url=url, options=options)
    assert browser.wait("connect", me)["sessionPresent"] is False
    assert browser.wait("transport", me, since=at)["way"] == "webtransport"
    info = edge.api(f"/api/v1/sessions/{me}")
    assert (info["listener"], info["transport"]) == ("quic", "webtransport")
    assert edge.metrics().sum("tidegate_connections_open", listener="^quic$", transport="^webtransport$") == 1
    assert edge.metrics().sum("tidegate_connections_total", listener="^quic$", transport="^quic$") == 0
    at = browser.do("subscribe", client=me, topic=f"{topic}/in", options={"qos": 2})
    browser.wait("subscribed", me, since=at)
    other = client(edge, "tcp")
    other.subscribe(f"{topic}/out", qos=2)
    large = "☃" * 100_000
    for qos, payload in ((0, "none"), (1, "once or more"), (2, "once"), (1, large)):
        at = browser.do("publish", client=me, topic=f"{topic}/out", payload=payload, options={"qos": qos})
        browser.wait("published", me, since=at)
        got = other.next()
        assert (got.payload.decode(), got.qos) == (payload, qos)
        other.publish(f"{topic}/in", f"{qos} {payload}", qos)
        assert browser.wait("message", me, since=at, qos=qos)["payload"] == f"{qos} {payload}"

    def flap(name: str, break_it, mend=lambda: None) -> dict:
        at, quiet_since = browser.mark(), broker.mark()
        break_it()
        browser.wait("close", me, since=at)
        for n in range(5):
            other.publish(f"{topic}/in", f"{name}-{n}", 1 + n % 2)
        mend()
        assert browser.wait("connect", me, since=at)["sessionPresent"] is True
        for n in range(5):
            browser.wait("message", me, since=at, payload=f"{name}-{n}")
        for qos in (1, 2):
            # Messages with an acknowledgement lost in the cut come again with DUP.
            got = [m["payload"] for m in browser.events("message", me, at) if m["qos"] == qos]
            first = [m for n, m in enumerate(got) if m not in got[:n]]
            assert first == [f"{name}-{n}" for n in range(5) if 1 + n % 2 == qos]
            assert qos == 1 or first == got
        assert broker.connects(quiet_since) == [] and not [l for l in broker.service.lines(quiet_since) if topic in l and "SUBSCRIBE" in l]
        return browser.events("transport", me, at)[-1]

    # The network fails silently and comes back with another address.
    assert flap("silent", udp.cut)["way"] == "webtransport"
    # The relay is gone, and the system reports that at once: the session continues over wss.
    went = flap("killed", udp.kill)
    assert went["way"] == "fallback" and "ms" not in went["why"], went
    wait_until("the API to show it", lambda: edge.api(f"/api/v1/sessions/{me}")["transport"] == "wss")
    # The working transport is remembered...
    udp.revive()
    assert flap("remembered", wss.cut)["why"] == "WebTransport failed a while ago"

    # ...for a while.
    def back() -> bool:
        at = browser.mark()
        wss.cut()
        browser.wait("connect", me, since=at)
        return browser.events("transport", me, at)[-1]["way"] == "webtransport"

    wait_until("WebTransport again", back, 20, 0.5)
    # UDP is blocked silently.
    went = flap("blocked", udp.unplug)
    assert went["way"] == "fallback" and "4000 ms" in went["why"], went
    at = browser.mark()
    other.publish(f"{topic}/in", "last", 2)
    browser.wait("message", me, since=at, payload="last")
    since = edge.mark()
    browser.do("end", client=me)
    browser.wait("ended", me)
    assert "reason=normal " in edge.wait_log(rf"Connection ended.*{me}", since)


def test_refusals_lead_to_wss(edge, client, browser, udp, wss):
    """The client changes to wss after an unknown path, a forbidden origin, or a session that another client takes over."""
    strict = UdpCable(edge["closed"].port)
    try:
        for cable, path, reason, label in (
            (udp, "/other", 'path "/other" is not served', "path"),
            (strict, "/closed", "is not in origins", "origin"),
        ):
            since, me = edge.mark(), fresh("page")
            url, options = page(edge, cable, wss, me, path)
            at = browser.do("connect", client=me, url=url, options=options)
            browser.wait("connect", me)
            assert browser.wait("transport", me, since=at)["way"] == "fallback"
            line = edge.wait_log(rf"Handshake failed.*{reason}", since)
            assert "transport=webtransport" in line and f"reason={label} " in line
            browser.do("end", client=me)
            browser.wait("ended", me)
    finally:
        strict.close()
    me = fresh("page")
    url, options = page(edge, udp, wss, me)
    at = browser.do("connect", client=me, url=url, options=options | {"reconnectPeriod": 0})
    browser.wait("connect", me)
    assert browser.wait("transport", me, since=at)["way"] == "webtransport"
    info = edge.api(f"/api/v1/sessions/{me}")
    assert (info["listener"], info["transport"]) == ("quic", "webtransport")
    # The client sends DISCONNECT, and it arrives; then it connects again, to be taken over.
    since = edge.mark()
    browser.do("end", client=me)
    browser.wait("ended", me)
    line = edge.wait_log(rf"Connection ended.*{me}", since)
    assert 'transport="webtransport"' in line and "reason=normal " in line
    at = browser.do("connect", client=me, url=url, options=options | {"reconnectPeriod": 0})
    assert browser.wait("connect", me, since=at)["sessionPresent"] is True
    client(edge, "tcp", me, clean=False, expiry=300)
    assert browser.wait("disconnect", me, since=at)["reasonCode"] == 0x8E
    browser.wait("close", me, since=at)


def test_aioquic_speaks_webtransport_too(edge):
    """Another HTTP/3 stack: plain requests, refusals, and MQTT over two streams."""
    port, ca, topic = edge["signed"].port, edge.pki.ca, fresh()

    async def refused(method, path, status, **headers):
        one = await dial(port, ca)
        assert (await one.ask(method, path, method == "GET", **headers))[1] == status
        ended = await one.ended
        assert ended.error_code == 0x100, ended

    for args in (("GET", "/mqtt", 404), ("GET", "/", 404), ("CONNECT", "/", 404)):
        call(refused(*args))

    async def session():
        one = await dial(port, ca)
        number, status = await one.ask("CONNECT", "/mqtt", origin="https://anywhere.example")
        assert status == 200
        control, data = one.open(number), one.open(number)
        one.send(data, wire.publish(topic, b"early", 1, 7))
        one.send(control, wire.connect(fresh("id")))
        (connack,) = await one.packets(control, 1)
        assert connack.kind == wire.CONNACK
        (puback,) = await one.packets(data, 1)
        assert (puback.kind, puback.packet_id) == (wire.PUBACK, 7)
        one.send(control, wire.subscribe(1, (topic, 1)))
        (suback,) = await one.packets(control, 1)
        assert suback.kind == wire.SUBACK
        one.send(data, wire.publish(topic, b"from the other stream", 1, 8))
        (puback,) = await one.packets(data, 1)
        assert puback.packet_id == 8
        (message,) = await one.packets(control, 1)
        assert message.payload == b"from the other stream"
        one.send(control, b"\xe0\x00")
        await one.ended

    call(session(), 30)
