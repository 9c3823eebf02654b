"""The binary starts, refuses to start, stops, and runs its other commands."""

from __future__ import annotations

import json
import re
import signal
import socket
import ssl
from pathlib import Path

import pytest

from harness import certs, wire
from harness.edge import BINARY, TRANSPORTS, config, listener, read_listening, tidegate, toml
from harness.names import fresh
from harness.process import Service, run, wait_until
from harness.raw import Closed, Raw


def test_sigterm_drains_connections(own_broker, own_edge, client):
    broker = own_broker()
    edge = own_edge(broker.url, TRANSPORTS).start()
    topic = fresh()
    fives = [client(edge, t, fresh("id"), expiry=300) for t in TRANSPORTS]
    fours = [client(edge, t, fresh("id"), version=4) for t in TRANSPORTS]
    away = client(edge, "tcp", fresh("away"), expiry=300)
    away.subscribe(topic)
    away.close()
    for n in range(7):
        fives[0].publish(topic, f"{n}")
    since = edge.mark()
    edge.service.kill(signal.SIGTERM)
    for one in fives:
        assert one.wait_ended() == 0x8B and one.end_by_server
    for one in fours:
        one.wait_ended()
    assert edge.service.wait_exit() == 0
    # In memory mode the log names the sessions that end with the process.
    said = edge.service.text(since, "err")
    assert re.search(r"session", said) and re.search(r"\b7\b", said), said
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", edge["tcp"].port), 1)


def test_sigint_is_a_clean_end_too(own_broker, own_edge):
    edge = own_edge(own_broker().url).start()
    assert edge.stop(signal.SIGINT) == 0


def test_drain_has_a_deadline(own_broker, own_edge, client):
    """A client that neither reads nor closes does not delay the end."""
    edge = own_edge(own_broker().url, drain={"grace": "1s"}).start()
    with Raw(edge["tcp"].port) as raw:
        raw.connect(fresh("id"))
        assert edge.stop(timeout=8) == 0


def test_drain_while_the_broker_is_away(own_broker, own_edge):
    broker = own_broker()
    broker.stop()
    edge = own_edge(broker.url, drain={"grace": "1s"}).start()
    assert edge.stop(timeout=8) == 0


def test_every_bound_address_is_printed(edge):
    lines = edge.service.lines(stream="out")
    assert lines[-1] == "ready"
    said = read_listening(edge.service)
    assert {e.transport for e in said.values()} == {*TRANSPORTS, "http"}
    assert edge["ws"].url.startswith("ws://127.0.0.1:") and edge["ws"].url.endswith("/mqtt")
    assert edge["wss"].url.endswith("/mqtt") and edge["quic"].url.startswith("quic://")


def test_two_listeners_of_one_transport_both_serve(own_broker, own_edge, client, pki):
    names = [listener("ws", "ws-one"), listener("ws", "ws-two", path="/other"), listener("quic", "q-one"), listener("quic", "q-two")]
    edge = own_edge(own_broker().url, listeners=names).start()
    topic = fresh()
    for one in ("ws-one", "ws-two", "q-one", "q-two"):
        me = client(edge, one.replace("-one", "").replace("-two", "").replace("q", "quic"), name=one)
        me.subscribe(topic)
        me.publish(topic, one)
        assert me.next().text == one
        me.close()


BASE = """\
version = 1
[node]
id = "edge-1"
[[listeners]]
name = "tcp"
transport = "tcp"
bind = "127.0.0.1:0"
[upstream]
servers = ["mqtt://127.0.0.1:1"]
[auth]
acl = "open"
[admin]
bind = "127.0.0.1:0"
"""
# The fault -> (text, its line, the words that the message must contain).
WRONG = {
    "not TOML": (BASE + "x = = 1\n", 14, ()),
    "unknown key": (BASE + "[limits]\npacket_maxx = 1\n", 15, ("packet_maxx", "packet_max")),
    "unknown section": (BASE + "[limitz]\n", 14, ("limitz",)),
    "wrong type": (BASE + "[limits]\nreceive_max = \"many\"\n", 15, ("receive_max",)),
    "out of range": (BASE + "[limits]\nreceive_max = 0\n", 15, ("receive_max",)),
    "bad size": (BASE + "[limits]\npacket_max = \"1 parsec\"\n", 15, ("packet_max",)),
    "bad duration": (BASE + "[session]\nexpiry_v3 = \"soon\"\n", 15, ("expiry_v3",)),
    "unknown transport": (BASE.replace('transport = "tcp"', 'transport = "smoke"'), 6, ("transport", "smoke")),
    "bad bind": (BASE.replace("127.0.0.1:0", "nowhere", 1), 7, ("bind",)),
    "unknown version": (BASE.replace("version = 1", "version = 9"), 1, ("version",)),
    "other durability": (BASE + "[store]\ndurability = \"tape\"\n", 15, ("durability", "disk")),
    "local ack": (BASE.replace("[auth]", "ack = \"local\"\n[auth]"), 10, ("ack",)),
    "roots": (BASE.replace("[auth]", "roots = [\"fleet/#/x\"]\n[auth]"), 10, ("roots",)),
    "jwt": (BASE.replace("[auth]", "[auth]\nmode = \"jwt\""), 11, ("mode", "jwt")),
    "mtls": (BASE.replace("[auth]", "[auth]\nmode = \"mtls\""), 11, ("mode", "mtls")),
    "delegate": (BASE.replace("[auth]", "[auth]\nmode = \"delegate\""), 11, ("mode", "delegate")),
    "webtransport": (BASE.replace("bind =", "webtransport = true\nbind =", 1), 7, ("webtransport",)),
    "http upstream": (BASE.replace("mqtt://", "http://"), 9, ("servers",)),
    "no certificate off loopback": (BASE.replace('"tcp"\nbind = "127.0.0.1:0"', '"tls"\nbind = "0.0.0.0:0"', 1), None, ("tls",)),
    "rules beside an open acl": (BASE + "[[acl]]\nwho = \"*\"\nallow = [\"publish\"]\ntopics = [\"#\"]\n", None, ("acl",)),
    "no node id with a real broker": (BASE.replace('id = "edge-1"\n', ""), None, ("id",)),
}


@pytest.mark.parametrize("command", ("run", "check"))
@pytest.mark.parametrize("what", WRONG)
def test_configuration_errors_name_the_line(tmp_path, what, command):
    text, line, names = WRONG[what]
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    done = tidegate(command, "--config", file)
    assert done.returncode == 64, (done.returncode, done.stdout, done.stderr)
    assert str(file) in done.stderr, done.stderr
    if line:
        assert re.search(rf"wrong\.toml:{line}\b|line {line}\b", done.stderr), f"line {line} is not named: {done.stderr}"
    for name in names:
        assert name in done.stderr, f"{name} is not named: {done.stderr}"
    assert "panicked" not in done.stderr and done.stdout == ""


def test_inert_values_are_accepted(tmp_path):
    file = tmp_path / "inert.toml"
    file.write_text(BASE.replace("[auth]", 'roots = []\nack = "upstream"\n[auth]').replace("bind =", "webtransport = false\nbind =", 1) + '[store]\ndurability = "memory"\n')
    assert tidegate("check", "--config", file).returncode == 0


def test_a_missing_configuration_exits_with_64(tmp_path):
    done = tidegate("run", "--config", tmp_path / "none.toml")
    assert done.returncode == 64 and "none.toml" in done.stderr


def test_wrong_usage_exits_with_64():
    assert tidegate("run", "--no-such-flag").returncode == 64
    assert tidegate("no-such-command").returncode == 64
    assert tidegate("--help").returncode == 0
    assert tidegate("--version").returncode == 0


@pytest.mark.parametrize("transport", ("tcp", "wss", "quic"))
def test_a_taken_port_is_named(own_broker, tmp_path, pki, transport):
    kind = socket.SOCK_DGRAM if transport == "quic" else socket.SOCK_STREAM
    with socket.socket(socket.AF_INET, kind) as holder:
        holder.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            holder.listen()
        port = holder.getsockname()[1]
        table = config(own_broker().url, pki, (transport,))
        table["listeners"][0]["bind"] = f"127.0.0.1:{port}"
        file = tmp_path / "taken.toml"
        file.write_text(toml(table))
        done = tidegate("run", "--config", file)
        assert done.returncode == 75, (done.returncode, done.stderr)
        assert str(port) in done.stderr, done.stderr


def test_an_open_acl_beyond_loopback_must_be_explicit(tmp_path, pki):
    table = config("mqtt://127.0.0.1:1", pki, ("tcp",), auth={"mode": "anonymous"})
    del table["auth"]["acl"]
    table["listeners"][0]["bind"] = "0.0.0.0:0"
    file = tmp_path / "open.toml"
    file.write_text(toml(table))
    done = tidegate("check", "--config", file)
    assert done.returncode == 64 and "acl" in done.stderr, done.stderr
    table["listeners"][0]["bind"] = "127.0.0.1:0"
    file.write_text(toml(table))
    assert tidegate("check", "--config", file).returncode == 0


def test_check_prints_memory_and_connections(tmp_path, pki):
    file = tmp_path / "good.toml"
    file.write_text(toml(config("mqtt://127.0.0.1:1", pki)))
    done = tidegate("check", "--config", file)
    assert done.returncode == 0, done.stderr
    assert re.search(r"(?i)memory", done.stdout) and re.search(r"(?i)connections", done.stdout), done.stdout


def test_check_warns_about_a_low_open_file_limit(tmp_path, pki):
    file = tmp_path / "good.toml"
    file.write_text(toml(config("mqtt://127.0.0.1:1", pki, limits={"connections_max": 100000})))
    done = run(["bash", "-c", f"ulimit -n 1024 && exec {BINARY} check --config {file}"])
    assert done.returncode == 0, done.stderr
    # The effective cap, the reason and the remedy.
    found = re.search(r"(?m)^\s*(\d+) at once", done.stdout)
    assert found and int(found[1]) < 1024, done.stdout
    assert re.search(r"(?i)open-file limit.*LimitNOFILE", done.stdout + done.stderr), done.stdout + done.stderr


def test_a_low_open_file_limit_lowers_the_cap_and_disturbs_no_client(own_broker, own_edge):
    """The cap is lower, with one warning; a flood of connections does not disturb connected clients."""
    edge = own_edge(own_broker().url, limits={"connections_max": 100000})
    edge.service = Service("tidegate", ["bash", "-c", f"ulimit -n 300 && exec {BINARY} run --config {edge.file}"], cwd=edge.directory)
    edge.service.wait_line("^ready$", 20, stream="out")
    edge.listening = read_listening(edge.service)
    assert len(edge.service.wait_lines(r"WARN.*open-file limit")) == 1
    crowded(edge, 400)


def test_accept_survives_emfile(own_broker, own_edge):
    """EMFILE itself: the limit of a running process is lowered."""
    edge = own_edge(own_broker().url).start()
    with Raw(edge["tcp"].port) as first:
        first.connect(fresh("first"))
    open_files = len(list(Path(f"/proc/{edge.service.pid}/fd").iterdir()))
    assert run(["prlimit", "--pid", edge.service.pid, f"--nofile={open_files + 10}"]).returncode == 0
    crowded(edge, 60)
    edge.wait_metric("it is counted", lambda m: m.sum("tidegate_accept_errors_total", reason="file_limit") > 0)
    assert 1 <= len(edge.service.wait_lines("Accept failed")) <= 20


def crowded(edge, count: int) -> None:
    """More connections come than can be accepted; a connected client does not notice, and later there is room."""
    with Raw(edge["tcp"].port) as old:
        old.connect(fresh("old"))
        many = []
        try:
            for _ in range(count):
                try:
                    many.append(socket.create_connection(("127.0.0.1", edge["tcp"].port), 1))
                except OSError:
                    break
            for _ in range(5):
                old.send(wire.PING)
                assert old.recv().kind == wire.PINGRESP
        finally:
            for one in many:
                one.close()

        def room() -> bool:
            try:
                with Raw(edge["tcp"].port, timeout=2) as raw:
                    return raw.connect(fresh("new")).reason == 0
            except (Closed, TimeoutError, OSError):
                return False

        wait_until("new connections are accepted again", room, 15, 0.1)
        old.send(wire.PING)
        assert old.recv().kind == wire.PINGRESP
    edge.assert_sane()


def test_certs_makes_files_that_run_and_clients_accept(tmp_path, own_broker, own_edge, client):
    done = tidegate("certs", "--out", tmp_path / "certs")
    assert done.returncode == 0, done.stderr
    made = certs.Pki(*(tmp_path / "certs" / f for f in ("ca.pem", "edge.pem", "edge.key")))
    assert all(f.exists() for f in (made.ca, made.cert, made.key))
    assert made.key.stat().st_mode & 0o077 == 0, "the key is readable by others"
    assert run(["openssl", "verify", "-CAfile", made.ca, made.cert]).returncode == 0
    edge = own_edge(own_broker().url, ("tls", "wss", "quic"), tls=[{"name": "default", "cert": str(made.cert), "key": str(made.key)}])
    edge.pki = made
    edge.start()
    topic = fresh()
    for transport in ("tls", "wss", "quic"):
        one = client(edge, transport)
        one.subscribe(topic)
        one.publish(topic, transport)
        assert one.next().text == transport
        one.close()
    # Existing files are not overwritten silently.
    before = made.cert.read_bytes()
    again = tidegate("certs", "--out", tmp_path / "certs")
    assert again.returncode != 0 or made.cert.read_bytes() == before, "overwritten"


# These tests use the default ports.
@pytest.mark.xdist_group("defaults")
def test_the_first_run_needs_no_configuration(tmp_path):
    """The first run: embedded broker, loopback, a throw-away certificate, addresses and the next commands to type."""
    service = Service("tidegate", [BINARY, "run"], cwd=tmp_path)
    try:
        service.wait_line("^ready$", 30, stream="out")
        said = read_listening(service)
        assert {e.transport for e in said.values()} >= set(TRANSPORTS)
        assert all("127.0.0.1" in e.url or "localhost" in e.url or "[::1]" in e.url for e in said.values())
        # The next commands to type follow "ready".
        for command in ("mosquitto_sub", r"mqtt\.connect", "quic"):
            service.wait_line(command, stream="out")
        tcp = next(e for e in said.values() if e.transport == "tcp")
        topic = fresh()
        sub = Service("mosquitto_sub", ["stdbuf", "-oL", "mosquitto_sub", "-p", str(tcp.port), "-t", topic, "-q", "1", "-d", "-C", "1"])
        sub.wait_line(r"^Subscribed \(mid")
        assert run(["mosquitto_pub", "-p", str(tcp.port), "-t", topic, "-q", "1", "-m", "hello"]).returncode == 0
        assert sub.wait_exit() == 0
        assert "hello" in sub.lines(stream="out")
        # A second process finds the default ports taken, by the first or by the test: it chooses free ones
        # and says so.
        taken = [hold(port) for port in (1883, 8083) if port not in {e.port for e in said.values()}]
        second = Service("tidegate", [BINARY, "run"], cwd=tmp_path)
        try:
            second.wait_line("^ready$", 30, stream="out")
            theirs = read_listening(second)
            assert {e.port for e in theirs.values()}.isdisjoint({e.port for e in said.values()})
            second.wait_line(r"(?i)taken|in use")
        finally:
            assert second.stop() == 0
            for one in taken:
                one.close()
    finally:
        assert service.stop() == 0


def hold(port: int) -> socket.socket:
    """Takes a port as soon as its owner has released it."""
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

    def free() -> bool:
        try:
            one.bind(("127.0.0.1", port))
            one.listen()
            return True
        except OSError:
            return False

    wait_until(f"port {port} is ours", free, 60, 0.1)
    return one


# These tests use the default ports.
@pytest.mark.xdist_group("defaults")
def test_a_line_that_is_printed_can_be_typed(tmp_path):
    """The mosquitto_sub line of the first run works unchanged."""
    service = Service("tidegate", [BINARY, "run"], cwd=tmp_path)
    try:
        service.wait_line("^ready$", 30, stream="out")
        tcp = next(e for e in read_listening(service).values() if e.transport == "tcp")
        command = service.wait_line(r"\b(mosquitto_sub -[^`]*)", stream="out")[1].strip()
        topic = re.search(r"-t '?\"?([^'\" ]+)", command)[1].replace("/#", "/x").replace("#", "x").replace("+", "x")
        sub = Service("mosquitto_sub", ["bash", "-c", f"exec stdbuf -oL {command} -d -C 1"], cwd=tmp_path)
        try:
            sub.wait_line(r"^Subscribed \(mid")
            assert run(["mosquitto_pub", "-p", str(tcp.port), "-t", topic, "-q", "1", "-m", "typed"]).returncode == 0
            assert sub.wait_exit() == 0
            assert "typed" in sub.text()
        finally:
            sub.end_quietly()
    finally:
        assert service.stop() == 0


def test_logs_can_be_json(own_broker, own_edge):
    edge = own_edge(own_broker().url, log={"level": "info", "format": "json"}).start()
    me = fresh("id")
    with Raw(edge["tcp"].port) as raw:
        raw.connect(me)
    edge.wait_log(me)
    edge.stop()
    for line in edge.service.lines(stream="err"):
        json.loads(line)


def test_client_strings_are_escaped_in_logs(own_broker, own_edge):
    edge = own_edge(own_broker().url).start()
    with Raw(edge["tcp"].port) as raw:
        raw.connect("evil\n\x1b[31mFAKE LINE " + "x" * 3000)
    with Raw(edge["tcp"].port) as raw:
        raw.connect("witness")
    edge.wait_log("witness")
    for line in edge.service.lines(stream="err"):
        assert not line.startswith("FAKE") and "\x1b[31mFAKE" not in line and len(line) < 2000, line[:200]


def test_each_event_logs_one_line(edge, client, way):
    me = fresh("id")
    line = way(edge, "ws")
    since = edge.mark()
    one = client(edge, client_id=me, via=line, expiry=300)
    line.cut()
    one.abandon()
    two = client(edge, "tcp", me, clean=False, expiry=300)
    three = client(edge, "wss", me, clean=False, expiry=300)
    three.close()
    two.abandon()
    # The last line, and all lines before it.
    edge.wait_log(rf'Connection ended.*{me}.*listener="wss"', since)
    lines = edge.service.grep(me, since, "err")
    assert 5 <= len(lines) <= 12, "\n".join(lines)
    assert any(re.search("(?i)resum", l) for l in lines) and any(re.search("(?i)take", l) for l in lines), "\n".join(lines)
    assert all("127.0.0.1:" in l for l in lines), "\n".join(lines)


def test_the_certificate_is_checked_by_clients(edge):
    context = ssl.create_default_context(cafile=str(edge.pki.ca))
    for name in ("tls", "wss"):
        with socket.create_connection(("127.0.0.1", edge[name].port)) as raw, context.wrap_socket(raw, server_hostname="localhost") as tls:
            assert tls.version() in ("TLSv1.2", "TLSv1.3")
        with socket.create_connection(("127.0.0.1", edge[name].port)) as raw, pytest.raises(ssl.SSLCertVerificationError):
            context.wrap_socket(raw, server_hostname="elsewhere.example")
