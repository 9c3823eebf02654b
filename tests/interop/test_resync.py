"""After the broker lost a link's session, state that changed meanwhile reaches earlier subscribers."""

from __future__ import annotations

import signal

import pytest

from harness.cable import Cable
from harness.names import fresh
from harness.process import run, wait_until
from test_broker_side import QUICK


@pytest.fixture
def gap(own_broker, own_edge, client):
    """A broker that forgets its sessions while the cable to it is cut, so that messages published by `change` are missed."""
    broker = own_broker()
    cable = Cable(broker.port)

    def begin(**upstream):
        url = f"mqtt://127.0.0.1:{cable.port}"
        return own_edge(url, upstream={"servers": [url]} | QUICK | upstream).start()

    def change(state: dict[str, str]) -> None:
        cable.unplug()
        broker.stop(signal.SIGKILL)
        broker.forget()
        broker.start()
        for topic, value in state.items():
            run(["mosquitto_pub", "-p", str(broker.port), "-q", "1", "-r", "-t", topic, "-m", value])
        cable.plug()

    yield begin, change
    cable.close()


@pytest.mark.parametrize("root", (False, True), ids=("filter", "root"))
def test_changed_retained_messages_come_and_unchanged_ones_do_not(gap, client, root):
    begin, change = gap
    topic = fresh()
    edge = begin(**({"roots": [f"{topic}/#"]} if root else {}))
    one, pub = client(edge), client(edge)
    before = {f"{topic}/s/{name}": "1" for name in "abc"}
    for name, value in before.items():
        pub.publish(name, value, retain=True)
    one.subscribe((f"{topic}/s/+", 1))
    assert {m.topic: m.text for m in one.take(3)} == before
    edge.wait_metric("the fetch is over", lambda m: m.sum("tidegate_retained_fetches_pending") == 0)
    change({f"{topic}/s/a": "1", f"{topic}/s/b": "2", f"{topic}/s/d": "1"})
    missed = one.take(2, 20)
    assert {m.topic: m.text for m in missed} == {f"{topic}/s/b": "2", f"{topic}/s/d": "1"}
    assert not any(m.retain for m in missed)
    assert one.until_own_marker(pub, f"{topic}/s/z") == []
    # A new subscriber gets the broker's present state: c is gone.
    two = client(edge)
    two.subscribe((f"{topic}/s/+", 1))
    now = {m.topic: m.text for m in two.take(3)}
    assert now == {f"{topic}/s/a": "1", f"{topic}/s/b": "2", f"{topic}/s/d": "1"}
    assert two.until_own_marker(pub, f"{topic}/s/z") == []


def test_resync_can_be_turned_off(gap, client):
    begin, change = gap
    topic = fresh()
    edge = begin(retained_resync=False)
    one, pub = client(edge), client(edge)
    one.subscribe((f"{topic}/a", 1), retainHandling=2)
    change({f"{topic}/a": "2"})
    came = []

    def again() -> bool:
        pub.publish(f"{topic}/a", "probe", 0)
        while not one.incoming.empty():
            came.append(one.incoming.get().text)
        return "probe" in came

    wait_until("messages flow again", again, 20, 0.1)
    came += [m.text for m in one.until_own_marker(pub, f"{topic}/a")]
    assert "2" not in came
