"""One Tidegate before another: links over WebSocket to the broker."""

from __future__ import annotations

import pytest

from harness.names import fresh
from harness.process import wait_until

QUICK = {"backoff_min": "20ms", "backoff_max": "200ms"}


@pytest.mark.parametrize("transport", ["ws", "wss", "tls", "tcp"])
def test_a_broker_behind_each_transport(transport, own_edge, client, pki):
    inner = own_edge("embedded:", (transport,), upstream={"servers": ["embedded:"]}).start()
    port = inner[transport].port
    url = {"ws": "ws://localhost:{}/mqtt", "wss": "wss://localhost:{}/mqtt", "tls": "mqtts://localhost:{}", "tcp": "mqtt://localhost:{}"}[transport].format(port)
    # The inner Tidegate hides messages below the topic of its own probes.
    upstream = {"servers": [url], "probe_topic": "outer/probe"} | QUICK
    if transport in ("wss", "tls"):
        upstream["tls"] = {"ca": str(pki.ca)}
    outer = own_edge(url, upstream=upstream).start()
    line = outer.wait_log(r"The broker was probed")
    assert outer.api("/api/v1/links")["broker"]["source"] == "probed", line
    one, two = client(outer), client(outer)
    topic = fresh()
    one.subscribe((topic, 2), (f"$share/g/{topic}/s", 1))
    for qos in (0, 1, 2):
        two.publish(topic, f"q{qos}", qos=qos)
    assert sorted(m.text for m in one.take(3)) == ["q0", "q1", "q2"]
    big = "x" * 300_000
    two.publish(topic, big, qos=1)
    assert one.next().text == big
    two.publish(f"{topic}/s", "shared")
    assert one.next().text == "shared"
    inner.stop()
    outer.wait_log(r"Link to the broker (ended|is down)")
    assert not one.ended.is_set() and not two.ended.is_set(), "a client was disconnected"


def test_a_wrong_path_is_logged(own_edge):
    inner = own_edge("embedded:", ("ws",), upstream={"servers": ["embedded:"]}).start()
    outer = own_edge("x", upstream={"servers": [f"ws://127.0.0.1:{inner['ws'].port}/nowhere"]} | QUICK).start()
    assert "404" in outer.wait_log(r"No link to the broker is up")
