"""What one link meets is nobody else's trouble: poison, failover, another of the same name."""

from __future__ import annotations

from harness.names import fresh
from harness.process import wait_until

QUICK = {"backoff_min": "20ms", "backoff_max": "200ms"}


def test_a_publish_that_the_core_closes_the_link_for(own_core, own_edge, client):
    """An MQTT 3.1.1 core cannot announce its largest packet: it closes the connection."""
    core = own_core(extra="max_packet_size 4000\n")
    upstream = {"servers": [core.url], "protocol": "3.1.1", "publish_links": 1} | QUICK
    edge = own_edge(core.url, ("tcp",), upstream=upstream).start()
    bad, good, old, sub = client(edge), client(edge), client(edge, version=4), client(edge)
    topic = fresh()
    sub.subscribe(f"{topic}/#")
    wait_until("the core's record", lambda: edge.service.grep(r"The core was probed"))
    mids = [good.publish(f"{topic}/good", f"before-{n}", wait=False) for n in range(20)]
    poison = [bad.publish(f"{topic}/bad", "x" * 5000, wait=False), old.publish(f"{topic}/old", "y" * 5000, wait=False)]
    mids += [good.publish(f"{topic}/good", f"after-{n}", wait=False) for n in range(20)]
    for mid in mids:
        good.wait_published(mid)
    # MQTT 5 is told; for 3.1.1 an acknowledgement is all there is.
    assert bad.wait_published(poison[0]) == 0x83
    old.wait_published(poison[1])
    got = []
    while len(set(got)) < 40:
        got.append(sub.next().text)
    assert list(dict.fromkeys(got)) == [f"before-{n}" for n in range(20)] + [f"after-{n}" for n in range(20)]
    bad.publish(f"{topic}/bad", "fine")
    assert sub.next().text == "fine"
    assert len(edge.service.grep(r"A publish was taken out")) == 2
    assert edge.metrics().sum("tidegate_messages_dropped_total", reason="quarantined") == 2
    assert edge.metrics().sum("tidegate_upstream_link_disconnects_total", link="d0") == 0
