"""Nobody reads the log, or standard output: Tidegate serves its clients all the same."""

from __future__ import annotations

import os
import re
import resource
import signal
import ssl
import subprocess
import time
import urllib.request
from contextlib import contextmanager

import pytest

from harness import certs, wire
from harness.edge import BINARY, config, listener, toml
from harness.names import fresh
from harness.process import PATIENCE, free_port, wait_until
from harness.raw import Raw


@contextmanager
def sink(kind: str):
    """A file that nobody reads, in one of the ways in which that happens; gives arguments of Popen for it."""
    opened = []
    try:
        if kind == "full":
            opened = [os.open("/dev/full", os.O_WRONLY)]
            yield opened[0]
        elif kind == "closed":
            reading, writing = os.pipe()
            os.close(reading)
            opened = [writing]
            yield writing
        elif kind == "stopped":
            # A reader that has stopped: the pipe is full from the beginning.
            reading, writing = os.pipe()
            opened = [reading, writing]
            os.set_blocking(writing, False)
            try:
                while True:
                    os.write(writing, b"x" * 4096)
            except BlockingIOError:
                os.set_blocking(writing, True)
            yield writing
    finally:
        for one in opened:
            os.close(one)


class Unread:
    """One `tidegate run` on known ports whose streams go where a test wants them."""

    def __init__(self, tmp_path, broker_url: str, pki, **streams):
        self.ports = {"tcp": free_port(), "admin": free_port()}
        table = config(broker_url, pki, drain={"grace": "1s"}, admin={"bind": f"127.0.0.1:{self.ports['admin']}"})
        table["listeners"] = [listener("tcp", bind=f"127.0.0.1:{self.ports['tcp']}")]
        file = tmp_path / "tidegate.toml"
        file.write_text(toml(table))
        argv = ["setpriv", "--pdeathsig", "KILL", str(BINARY), "run", "--config", str(file)]
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | streams
        self.process = subprocess.Popen(argv, cwd=tmp_path, stdin=subprocess.DEVNULL, **streams)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)

    def connect(self) -> Raw:
        def attempt():
            assert self.process.poll() is None, f"tidegate ended with {self.process.returncode}"
            raw = Raw(self.ports["tcp"])
            raw.connect(fresh("id"))
            return raw

        return wait_until("a connection", attempt, 20)

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports['admin']}/metrics", timeout=5 * PATIENCE) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    def healthy(self) -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports['admin']}/healthz", timeout=5 * PATIENCE) as answer:
            return answer.status

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(10 * PATIENCE)


@pytest.mark.parametrize("kind", ["full", "closed", "stopped"])
def test_a_log_that_nobody_reads_stops_nothing(own_broker, pki, tmp_path, kind):
    broker = own_broker()
    with sink(kind) as err, Unread(tmp_path, broker.url, pki, stderr=err) as edge:
        first = edge.connect()
        wait_until("the links", lambda: edge.metric("tidegate_upstream_link_up") >= 2)
        # More lines than a pipe holds.
        for _ in range(300):
            with Raw(edge.ports["tcp"]) as one:
                one.connect(fresh("id"))
        # The broker goes and comes: links write log lines too.
        before = edge.metric("tidegate_upstream_connects_total")
        broker.stop()
        wait_until("the end of the links", lambda: edge.metric("tidegate_upstream_link_up") == 0)
        broker.start()
        wait_until("the links again", lambda: edge.metric("tidegate_upstream_link_up") >= 2, 20)
        assert edge.metric("tidegate_upstream_connects_total") > before
        assert edge.healthy() == 200
        assert edge.metric("tidegate_panics_total") == 0
        if kind != "stopped":
            assert edge.metric("tidegate_log_lines_dropped_total") > 100
        first.close()
        assert edge.stop() == 0


@pytest.mark.parametrize("kind", ["full", "closed", "stopped"])
def test_standard_output_that_nobody_reads_stops_nothing(own_broker, pki, tmp_path, kind):
    with sink(kind) as out, Unread(tmp_path, own_broker().url, pki, stdout=out) as edge:
        edge.connect().close()
        assert edge.stop() == 0


@pytest.mark.parametrize("kind", ["full", "closed", "stopped"])
def test_a_refusal_to_start_has_its_exit_code_whoever_reads_it(tmp_path, kind):
    file = tmp_path / "tidegate.toml"
    file.write_text("version = 9\n")
    for command in (["run", "--config", file], ["check", "--config", file], ["nonsense"]):
        with sink(kind) as err:
            began = time.monotonic()
            ended = subprocess.run([BINARY, *command], stderr=err, stdout=subprocess.DEVNULL, timeout=20 * PATIENCE)
            assert ended.returncode == 64, command
            assert time.monotonic() - began < 10 * PATIENCE


def test_streams_that_are_closed_at_the_start_stop_nothing(own_broker, pki, tmp_path):
    closed = {"stdout": None, "stderr": None, "preexec_fn": lambda: [os.close(n) for n in (1, 2)]}
    with Unread(tmp_path, own_broker().url, pki, **closed) as edge:
        edge.connect().close()
        assert edge.stop() == 0


def test_a_slow_reader_gets_the_last_lines(own_broker, own_edge):
    """The log is written in a thread of its own, and the end of the process waits for it."""
    edge = own_edge(own_broker().url).start()
    assert edge.stop() == 0
    assert edge.service.lines(stream="err")[-1].count("Drained"), edge.service.text()


def suppressed(lines: list[str]) -> int:
    return sum(int(found[1]) for line in lines if (found := re.search(r"suppressed=(\d+)", line)))


def test_a_storm_of_connects_writes_a_bounded_number_of_lines(own_broker, own_edge):
    edge = own_edge(own_broker().url).start()
    began, count = time.monotonic(), 600
    for _ in range(count):
        with Raw(edge["tcp"].port) as one:
            one.connect(fresh("id"))
    seconds = int(time.monotonic() - began) + 2
    time.sleep(1.1)  # the length of an interval of the limit
    with Raw(edge["tcp"].port) as last:
        last.connect(me := fresh("last"))
        edge.wait_log(f"Client connected.*{me}")
    lines = edge.service.grep("Client connected", stream="err")
    assert len(lines) <= 50 * seconds, (len(lines), seconds)
    assert len(lines) < count, "the machine is too slow for this test"
    assert len(lines) + suppressed(lines) == count + 1
    ended = edge.service.grep("Connection ended", stream="err")
    assert len(ended) <= 50 * seconds


def test_an_absent_broker_is_one_line_for_all_links(own_broker, own_edge):
    broker = own_broker()
    edge = own_edge(broker.url, upstream={"servers": [broker.url], "data_links": 4, "publish_links": 4, "shared_links": 2}).start()
    edge.wait_metric("the links", lambda m: m.sum("tidegate_upstream_link_up") >= 9)
    since = edge.mark()
    broker.stop()
    edge.wait_metric("attempts", lambda m: m.sum("tidegate_upstream_disconnects_total", reason="connect") >= 20)
    down = edge.service.grep(r"WARN.*link to the broker|No link to the broker", since, "err")
    assert len(down) == 1 and "No link to the broker is up" in down[0], down
    ended = edge.service.grep(r"Link to the broker ended", since, "err")
    assert 1 <= len(ended) <= 3, ended


def test_a_low_limit_of_open_files_is_a_warning_only_against_a_configured_number(own_broker, pki, tmp_path):
    for configured, level in ((None, "INFO"), (100_000, "WARN")):
        limits = {"limits": {"connections_max": configured}} if configured else {}
        file = tmp_path / f"{level}.toml"
        file.write_text(toml(config(own_broker().url, pki, ("tcp",), **limits)))
        argv = [str(BINARY), "run", "--config", str(file)]
        with subprocess.Popen(
            argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024)),
        ) as process:
            try:
                while process.stdout.readline() != "ready\n":
                    assert process.poll() is None
                process.send_signal(signal.SIGTERM)
                _, err = process.communicate(timeout=20 * PATIENCE)
            finally:
                process.kill()
        said = [line for line in err.splitlines() if "open-file limit" in line]
        assert len(said) == 1 and level in said[0] and "832 connections" in said[0], err


DENYING = [
    {"who": "*", "allow": ["publish", "subscribe"], "topics": ["own/#"]},
    {"who": "*", "allow": ["publish"], "topics": ["in/#"]},
]


def test_a_denied_publish_or_subscription_names_client_user_topic_and_rule(own_broker, own_edge):
    edge = own_edge(own_broker().url, auth={"mode": "anonymous", "acl": "rules"}, acl=DENYING).start()
    with Raw(edge["tcp"].port) as one:
        one.connect(me := fresh("id"))
        one.send(wire.publish("secret/x", b"x", 1, 7))
        assert one.recv().kind == wire.PUBACK
        assert list(one.subscribe(("in/#", 1))) == [0x87]
        line = edge.wait_log("Denied: publish")
        assert "WARN" in line
        for words in (me, 'user="anonymous"', 'topic="secret/x"', "rule=no rule allows it"):
            assert words in line, line
        line = edge.wait_log("Denied: subscribe")
        for words in (me, 'topic="in/#"', "rule=acl[1]"):
            assert words in line, line
    metrics = edge.metrics()
    assert metrics.sum("tidegate_denied_total", action="publish") == 1
    assert metrics.sum("tidegate_denied_total", action="subscribe") == 1


def test_a_denied_login_is_counted_and_warned_of_at_a_limited_rate(own_broker, own_edge, tmp_path):
    users = tmp_path / "users"
    done = subprocess.run([BINARY, "passwd", users, "alice"], input="right\n", text=True, capture_output=True, timeout=20 * PATIENCE)
    assert done.returncode == 0, done.stderr
    edge = own_edge(own_broker().url, auth={"mode": "file", "file": str(users), "acl": "open"}).start()
    for _ in range(40):
        with Raw(edge["tcp"].port, version=4) as one:
            one.connect("mallory", user="alice", password=b"wrong")
    assert edge.metrics().sum("tidegate_denied_total", action="login") == 40
    lines = edge.service.grep("Connection refused", stream="err")
    assert 1 <= len(lines) < 40
    assert all("WARN" in line and 'user="alice"' in line and 'client_id="mallory"' in line for line in lines), lines


def test_a_second_signal_ends_the_process_at_once(own_broker, own_edge):
    broker = own_broker()
    edge = own_edge(broker.url, drain={"grace": "60s"}).start()
    edge.wait_metric("the links", lambda m: m.sum("tidegate_upstream_link_up") >= 2)
    broker.stop()
    edge.wait_metric("the end of the links", lambda m: m.sum("tidegate_upstream_link_up") == 0)
    with Raw(edge["tcp"].port) as raw:
        raw.connect(fresh("id"))
        # Nobody answers it, so that the drain would take all of its time.
        raw.send(wire.publish("a", b"x", 1, 7))
        edge.wait_metric("the publish", lambda m: m.sum("tidegate_publishes_waiting") == 1)
        edge.service.kill(signal.SIGTERM)
        raw.wait_closed()
        assert edge.service.alive()
        began = time.monotonic()
        assert edge.stop(signal.SIGTERM, timeout=20) == 0
        assert time.monotonic() - began < 3 * PATIENCE


def test_the_process_ends_when_it_says_drained(own_broker, own_edge):
    """Also when it could not tell every client, and while the broker is away."""
    broker = own_broker()
    edge = own_edge(broker.url, ("tcp", "wss", "quic"), drain={"grace": "1s"}).start()
    edge.wait_metric("the links", lambda m: m.sum("tidegate_upstream_link_up") >= 2)
    broker.service.kill(signal.SIGSTOP)
    with Raw(edge["tcp"].port) as raw:
        raw.connect(fresh("id"), expiry=3600)
        raw.send(wire.publish("a", b"x", 1, 7))
        edge.service.kill(signal.SIGTERM)
        edge.wait_log("Drained")
        began = time.monotonic()
        assert edge.service.wait_exit() == 0
        assert time.monotonic() - began < 0.5 * PATIENCE


def test_a_client_that_names_an_address_by_sni_leaves_no_line(own_broker, own_edge):
    edge = own_edge(own_broker().url, ("tls", "wss")).start()
    since = edge.mark()
    for transport in ("tls", "wss"):
        port = edge[transport].port
        done = subprocess.run(
            ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-servername", "127.0.0.1"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20 * PATIENCE,
        )
        assert "BEGIN CERTIFICATE" in done.stdout, done.stderr
    assert edge.stop() == 0
    assert not edge.service.grep("SNI|rustls", since, "err"), edge.service.text(since)


@pytest.mark.parametrize("transport", ["tls", "wss"])
def test_a_client_without_trust_is_named_as_such(own_broker, own_edge, tmp_path, transport):
    edge = own_edge(own_broker().url, (transport,)).start()
    stranger = certs.make(tmp_path / "stranger")
    with pytest.raises(ssl.SSLError):
        Raw(edge[transport].port, transport, ca=stranger.ca)
    line = edge.wait_log("Handshake failed")
    assert "does not trust the certificate" in line and "looks like" not in line, line
    assert edge.metrics().sum("tidegate_handshakes_failed_total", reason="certificate_refused") == 1
