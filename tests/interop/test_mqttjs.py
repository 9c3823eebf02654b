"""MQTT.js in Node and in headless Chromium: it flaps with its defaults, and the broker does not notice."""

from __future__ import annotations

import re
import signal

import pytest

from harness.js import Agent, chromium, url
from harness.names import fresh
from harness.process import wait_until

# All tests share one browser and one Node.
pytestmark = pytest.mark.xdist_group("js")


@pytest.fixture(scope="module")
def node():
    agent = Agent("node")
    yield agent
    agent.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    agent = Agent("browser", chromium(), str(tmp_path_factory.mktemp("profile")))
    yield agent
    agent.close()


def options(line, **more) -> dict:
    return {"reconnectPeriod": 50, "connectTimeout": 10_000, "protocolVersion": 5} | ({"caFile": str(line.ca)} if line.transport in ("tls", "wss") else {}) | more


def in_page(line, **more) -> dict:
    return {k: v for k, v in options(line, **more).items() if k != "caFile"}


@pytest.mark.parametrize("version", (4, 5))
@pytest.mark.parametrize("transport", ("tcp", "tls", "ws", "wss"))
def test_defaults_with_clean_true_flap_and_resubscribe(edge, broker, client, way, node, transport, version):
    topic, me = fresh(), fresh("js")
    line = way(edge, transport)
    node.do("connect", client=me, url=url(line), options=options(line, protocolVersion=version))
    assert node.wait("connect", me)["sessionPresent"] is False
    at = node.do("subscribe", client=me, topic=f"{topic}/#", options={"qos": 1})
    node.wait("subscribed", me, since=at)
    pub = client(edge)
    pub.publish(f"{topic}/warm", "warm")
    node.wait("message", me, since=at, payload="warm")
    quiet_since = broker.mark()
    for n in range(5):
        at = node.mark()
        line.cut()
        node.wait("close", me, since=at)
        node.wait("connect", me, since=at)
        # MQTT.js subscribes again by itself and does not report it; it may lose messages published before.
        arrived = publish_until_seen(node, pub, me, f"{topic}/{n}", at)
        assert arrived
    # By the broker's own log, five flaps caused not a single packet.
    assert broker.connects(quiet_since) == []
    assert [l for l in broker.service.lines(quiet_since) if topic in l and re.search(r"SUBSCRIBE", l)] == []
    assert not [l for l in broker.service.lines(quiet_since) if re.search(r"^\S* *" + re.escape(topic), l)]
    node.do("end", client=me)
    node.wait("ended", me)


def publish_until_seen(node, pub, me, topic, at) -> bool:
    count = 0

    def once() -> bool:
        nonlocal count
        pub.publish(topic, f"p{count}")
        count += 1
        return bool([m for m in node.events("message", me, at) if m["topic"] == topic])

    return wait_until(f"a message for {me}", once, 10, 0.05)


@pytest.mark.parametrize("transport", ("tcp", "ws", "wss"))
def test_sessions_resume_in_node(edge, client, way, node, transport):
    topic, me = fresh(), fresh("js")
    line = way(edge, transport)
    session = options(line, clientId=me, clean=False, resubscribe=False, properties={"sessionExpiryInterval": 300})
    node.do("connect", client=me, url=url(line), options=session)
    assert node.wait("connect", me)["sessionPresent"] is False
    at = node.do("subscribe", client=me, topic=topic, options={"qos": 2})
    node.wait("subscribed", me, since=at)
    pub = client(edge)
    at = node.mark()
    line.line.unplug()
    node.wait("close", me, since=at)
    for n in range(10):
        pub.publish(topic, f"m{n}", 1 + n % 2, UserProperty=[("n", f"{n}")])
    line.line.plug()
    assert node.wait("connect", me, since=at)["sessionPresent"] is True
    node.wait("message", me, since=at, payload="m9")
    node.wait("message", me, since=at, payload="m8")
    pub.publish(topic, "end", 1)
    node.wait("message", me, since=at, payload="end")
    got = [m for m in node.events("message", me, at)]
    for qos in (1, 2):
        assert [m["payload"] for m in got if m["qos"] == qos and m["payload"] != "end"] == [f"m{n}" for n in range(10) if 1 + n % 2 == qos]
    assert all(m["userProperties"] == {"n": m["payload"][1:]} for m in got if m["payload"] != "end")
    node.do("end", client=me)
    node.wait("ended", me)


@pytest.mark.parametrize("transport,count", (("tcp", 70), ("tcp", 500), ("wss", 500)))
def test_a_client_may_publish_more_than_the_receive_maximum_at_once(own_broker, own_edge, client, way, node, transport, count):
    broker = own_broker()
    edge = own_edge(broker.url, ("tcp", "wss")).start()
    topic, me = fresh(), fresh("js")
    other = client(edge, "tcp")
    other.subscribe(topic)
    # The session ends with the connection, so that nothing is sent again on another one.
    node.do("connect", client=me, url=url(line := way(edge, transport)), options=options(line, reconnectPeriod=0))
    node.wait("connect", me)
    broker.service.process.send_signal(signal.SIGSTOP)
    at = node.do("burst", client=me, topic=topic, count=count, options={"qos": 1})
    # All that the client wrote has left it before the broker answers anything.
    node.do("publish", client=me, topic=topic, payload="end", options={"qos": 0})
    node.wait("published", me, since=at)
    if count > 256:
        edge.wait_metric("it is left unread", lambda m: m.sum("tidegate_publishes_deferred_total", reason="receive_maximum"))
    broker.service.process.send_signal(signal.SIGCONT)
    assert [other.next().text for _ in range(count + 1)] == [f"{n}" for n in range(count)] + ["end"]
    wait_until("all are acknowledged", lambda: len(node.events("published", me, at)) == count + 1)
    assert not node.events("failed", me, at) and not node.events("close", me, at)
    node.do("end", client=me)
    node.wait("ended", me)


def test_a_page_in_chromium_resumes_over_wss(edge, broker, client, way, browser):
    """The page connects, subscribes, publishes, is cut off and resumes: every message arrives once, in order."""
    topic, me = fresh(), fresh("page")
    line = way(edge, "wss")
    session = in_page(line, clientId=me, clean=False, resubscribe=False, properties={"sessionExpiryInterval": 300})
    browser.do("connect", client=me, url=url(line), options=session)
    assert browser.wait("connect", me)["sessionPresent"] is False
    at = browser.do("subscribe", client=me, topic=f"{topic}/in", options={"qos": 1})
    browser.wait("subscribed", me, since=at)
    other = client(edge, "tcp")
    other.subscribe(f"{topic}/out")
    at = browser.do("publish", client=me, topic=f"{topic}/out", payload="from the page ☃", options={"qos": 1, "properties": {"contentType": "text/plain"}})
    browser.wait("published", me, since=at)
    got = other.next()
    assert got.payload.decode() == "from the page ☃" and got.props.ContentType == "text/plain"
    for flap in range(3):
        at, quiet_since = browser.mark(), broker.mark()
        line.line.unplug()
        browser.wait("close", me, since=at)
        for n in range(5):
            other.publish(f"{topic}/in", f"{flap}-{n}")
        line.line.plug()
        assert browser.wait("connect", me, since=at)["sessionPresent"] is True
        browser.wait("message", me, since=at, payload=f"{flap}-4")
        # Messages with an acknowledgement lost in the cut come again with DUP.
        got = [m for m in browser.events("message", me, at) if m["payload"].startswith(f"{flap}-")]
        first = [m["payload"] for n, m in enumerate(got) if m["payload"] not in [o["payload"] for o in got[:n]]]
        assert first == [f"{flap}-{n}" for n in range(5)]
        assert all(m["dup"] for n, m in enumerate(got) if m["payload"] in [o["payload"] for o in got[:n]])
        assert broker.connects(quiet_since) == [] and not [l for l in broker.service.lines(quiet_since) if topic in l and "SUBSCRIBE" in l]
    # The browser's own offline mode also blocks new connections.
    at = browser.do("offline", value=True)
    line.cut()
    browser.wait("close", me, since=at)
    other.publish(f"{topic}/in", "while offline")
    browser.do("offline", value=False)
    assert browser.wait("connect", me, since=at)["sessionPresent"] is True
    browser.wait("message", me, since=at, payload="while offline")
    browser.do("end", client=me)
    browser.wait("ended", me)


def test_a_page_with_the_defaults_of_mqttjs_flaps_and_resubscribes(edge, client, way, browser):
    """The defaults are clean: true, a generated client id and MQTT 3.1.1; MQTT.js subscribes again by itself, over ws."""
    topic, me = fresh(), fresh("page")
    line = way(edge, "ws")
    browser.do("connect", client=me, url=url(line), options={"reconnectPeriod": 50})
    browser.wait("connect", me)
    at = browser.do("subscribe", client=me, topic=f"{topic}/#", options={})
    browser.wait("subscribed", me, since=at)
    pub = client(edge)
    for n in range(3):
        at = browser.mark()
        line.cut()
        browser.wait("connect", me, since=at)
        assert publish_until_seen(browser, pub, me, f"{topic}/{n}", at)
    browser.do("end", client=me)
    browser.wait("ended", me)


def test_a_page_learns_the_reason_of_a_refusal(edge, own_edge, broker, way, browser):
    """A page gets a reason code from MQTT, a close code with text from WebSocket, and only 1006 from a refused handshake."""
    line = way(edge, "ws")
    at = browser.do("socket", client="text", url=url(line), send="not MQTT")
    assert browser.wait("open", "text", since=at)["extensions"] == ""
    end = browser.wait("closed", "text", since=at)
    assert (end["code"], end["wasClean"]) == (1003, True) and "binary" in end["reason"]
    at = browser.do("socket", client="garbage", url=url(line), send=[0x30, 0x00])
    assert browser.wait("closed", "garbage", since=at)["code"] == 1002
    at = browser.do("socket", client="path", url=url(line) + "/elsewhere")
    assert browser.wait("closed", "path", since=at)["code"] == 1006
    at = browser.do("socket", client="offer", url=url(line), protocols=["chat"])
    assert browser.wait("closed", "offer", since=at)["code"] == 1006
    strict = own_edge(broker.url, listeners=[{"name": "ws", "transport": "ws", "bind": "127.0.0.1:0", "origins": ["https://app.example"]}, {"name": "locked", "transport": "ws", "bind": "127.0.0.1:0", "auth": "file"}], auth={"file": "/dev/null"}).start()
    at, since = browser.mark(), strict.mark()
    browser.do("socket", client="origin", url=url(way(strict, "ws")))
    assert browser.wait("closed", "origin", since=at)["code"] == 1006
    strict.wait_log(r'HTTP 403: Origin .*"http://127.0.0.1:\d+\\?" is not in origins', since)
    at = browser.do("connect", client="unknown", url=url(way(strict, "ws", "locked")), options={"protocolVersion": 5, "reconnectPeriod": 0, "username": "nobody", "password": "x"})
    assert browser.wait("error", "unknown", since=at)["code"] == 0x86
    browser.wait("close", "unknown", since=at)
