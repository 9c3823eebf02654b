"""mosquitto_sub and mosquitto_pub, called as a user would type them."""

from __future__ import annotations

import itertools
import signal

import pytest

from harness.names import fresh
from harness.process import Service, run

VERSIONS = ("mqttv31", "mqttv311", "mqttv5")
WIRES = ("tcp", "tls")


def where(edge, transport: str) -> list[str]:
    args = ["-h", "localhost", "-p", str(edge[transport].port)]
    return args + (["--cafile", str(edge.pki.ca)] if transport == "tls" else [])


def pub(edge, transport: str, *args: str):
    done = run(["mosquitto_pub", *where(edge, transport), *args])
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def sub():
    made = []

    def start(edge, transport: str, *args: str, subscribed: bool = True) -> Service:
        one = Service("mosquitto_sub", ["stdbuf", "-oL", "mosquitto_sub", *where(edge, transport), "-d", "-F", "GOT %t %q %r %p", *args])
        made.append(one)
        if subscribed:
            one.wait_line(r"^Subscribed \(mid")
        return one

    yield start
    for one in made:
        one.end_quietly()


@pytest.mark.parametrize("transport,version", list(itertools.product(WIRES, VERSIONS)))
def test_every_qos_arrives_in_both_directions(edge, sub, transport, version):
    topic = fresh()
    one = sub(edge, transport, "-V", version, "-q", "2", "-t", f"{topic}/#", "-C", "6")
    for qos in (0, 1, 2):
        pub(edge, transport, "-V", version, "-q", str(qos), "-t", f"{topic}/{qos}", "-m", f"first {qos}")
        pub(edge, transport, "-V", version, "-q", str(qos), "-t", f"{topic}/{qos}", "-m", f"second {qos}")
    assert one.wait_exit() == 0
    got = [line.removeprefix("GOT ") for line in one.grep("^GOT")]
    for qos in (0, 1, 2):
        assert [g for g in got if g.startswith(f"{topic}/{qos} ")] == [f"{topic}/{qos} {qos} 0 first {qos}", f"{topic}/{qos} {qos} 0 second {qos}"]
    assert len(got) == 6


@pytest.mark.parametrize("transport,version", [("tcp", "mqttv31"), ("tcp", "mqttv311"), ("tls", "mqttv5")])
def test_later_subscribers_get_retained_messages(edge, sub, transport, version):
    topic = fresh()
    pub(edge, transport, "-V", version, "-q", "1", "-r", "-t", f"{topic}/a", "-m", "kept")
    first = sub(edge, transport, "-V", version, "-q", "1", "-t", f"{topic}/#", subscribed=False)
    first.wait_line(rf"^GOT {topic}/a 1 1 kept$")
    # A second client subscribes while the first is still subscribed: the broker sends no replay for a filter it knows.
    second = sub(edge, transport, "-V", version, "-q", "1", "-t", f"{topic}/#", subscribed=False)
    second.wait_line(rf"^GOT {topic}/a 1 1 kept$")
    # Live messages have no RETAIN flag, and neither client saw the other's replay.
    pub(edge, transport, "-V", version, "-q", "1", "-r", "-t", f"{topic}/a", "-m", "new")
    for one in (first, second):
        one.wait_line(rf"^GOT {topic}/a 1 0 new$")
        assert len(one.grep("^GOT")) == 2
    # An empty payload removes the retained message.
    pub(edge, transport, "-V", version, "-q", "1", "-r", "-t", f"{topic}/a", "-n")
    third = sub(edge, transport, "-V", version, "-q", "1", "-t", f"{topic}/#")
    pub(edge, transport, "-V", version, "-q", "1", "-t", f"{topic}/b", "-m", "end")
    third.wait_line(rf"^GOT {topic}/b 1 0 end$")
    assert len(third.grep("^GOT")) == 1


@pytest.mark.parametrize("transport,version", list(itertools.product(WIRES, VERSIONS)))
def test_a_killed_client_leaves_a_will_and_a_disconnecting_one_does_not(edge, sub, transport, version):
    topic = fresh()
    watcher = sub(edge, transport, "-V", version, "-q", "1", "-t", f"{topic}/will/#")

    def with_will(how: str, *args: str) -> Service:
        return sub(edge, transport, "-V", version, "-q", "1", "-t", f"{topic}/other", "--will-topic", f"{topic}/will/{how}", "--will-payload", "gone", "--will-qos", "1", *args)

    # stdbuf execs mosquitto_sub, so the process id is its own.
    killed = with_will("killed")
    killed.kill(signal.SIGKILL)
    killed.wait_exit()
    leaving = with_will("leaving", "-C", "1")
    pub(edge, transport, "-V", version, "-q", "1", "-t", f"{topic}/other", "-m", "you may go")
    assert leaving.wait_exit() == 0
    # Interrupted, mosquitto_sub asks for its will with MQTT 5 (reason 0x04), and not before.
    interrupted = with_will("interrupted")
    interrupted.kill(signal.SIGINT)
    interrupted.wait_exit()
    pub(edge, transport, "-V", version, "-q", "1", "-t", f"{topic}/will/end", "-m", "end")
    watcher.wait_line(rf"^GOT {topic}/will/killed 1 0 gone$")
    if version == "mqttv5":
        watcher.wait_line(rf"^GOT {topic}/will/interrupted 1 0 gone$")
    watcher.wait_line(rf"^GOT {topic}/will/end 1 0 end$")
    assert not watcher.grep("^GOT .*will/leaving")
    assert len(watcher.grep("^GOT")) == (3 if version == "mqttv5" else 2)


@pytest.mark.parametrize("transport,version", [("tcp", "mqttv311"), ("tls", "mqttv5"), ("tcp", "mqttv31")])
def test_a_session_lasts_between_two_runs(edge, sub, transport, version):
    topic, me = fresh(), fresh("id")[-20:]
    keep = ["-V", version, "-i", me, "-c", "-q", "1", "-t", topic] + (["-x", "300"] if version == "mqttv5" else [])
    first = sub(edge, transport, *keep)
    first.kill(signal.SIGKILL)
    first.wait_exit()
    for n in range(5):
        pub(edge, transport, "-q", "1", "-t", topic, "-m", f"m{n}")
    again = sub(edge, transport, *keep, "-C", "5", subscribed=False)
    assert again.wait_exit() == 0
    assert [line.split()[-1] for line in again.grep("^GOT")] == [f"m{n}" for n in range(5)]


def test_a_large_payload_arrives_whole(edge, sub, tmp_path):
    topic = fresh()
    file = tmp_path / "large"
    file.write_text("x" * 900_000)
    one = sub(edge, "tls", "-V", "mqttv5", "-q", "1", "-t", topic, "-C", "1")
    pub(edge, "tcp", "-V", "mqttv5", "-q", "1", "-t", topic, "-f", str(file))
    assert one.wait_exit() == 0
    (got,) = one.grep("^GOT")
    assert got == f"GOT {topic} 1 0 " + "x" * 900_000


def test_wrong_ca_is_refused_by_the_client(edge, tmp_path):
    from harness import certs

    other = certs.make(tmp_path / "other")
    done = run(["mosquitto_pub", "-h", "localhost", "-p", edge["tls"].port, "--cafile", other.ca, "-t", "x", "-m", "y"])
    assert done.returncode != 0
