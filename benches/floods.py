#!/usr/bin/env python3
"""How long the others wait while one address floods: Tidegate, and mosquitto alone.

    cargo build --release --locked --bin tidegate
    TIDEGATE_BIN=$PWD/target/release/tidegate .venv/bin/python benches/floods.py

The flood comes from 127.0.0.1 and the others from 127.0.0.2: each connects, sends CONNECT, waits for CONNACK, and is
gone. `scripts/test` makes .venv.
"""

from __future__ import annotations

import resource
import socket
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "interop"))

from harness import wire  # noqa: E402
from harness.edge import BINARY, Edge, listener  # noqa: E402
from harness.mosquitto import Mosquitto  # noqa: E402
from harness.process import run  # noqa: E402
from harness.raw import Raw  # noqa: E402

LOGINS = 50
# `connect_rate_max`, per second.
RATE = 200
PATIENCE = 20


def login(port: int, password: bytes = b"right") -> float:
    """Milliseconds until CONNACK 0; `PATIENCE` seconds where there is none."""
    begun = time.monotonic()
    try:
        with Raw(port, source="127.0.0.2", timeout=PATIENCE) as raw:
            raw.sock.settimeout(PATIENCE)
            assert raw.connect("other", user="alice", password=password).reason == 0
    except Exception:
        return PATIENCE * 1000
    return (time.monotonic() - begun) * 1000


def logins(port: int) -> str:
    # The first one computes the password's hash.
    first = login(port)
    times = []
    end = time.monotonic() + 60
    while len(times) < LOGINS and time.monotonic() < end:
        times.append(login(port))
        # 20 a second stay below the share of one address in `connect_rate_max`.
        time.sleep(0.05)
    shown = (first, statistics.median(times), max(times))
    return " / ".join(f"over {PATIENCE} s" if t >= PATIENCE * 1000 else f"{t:.1f}" for t in shown)


@contextmanager
def nothing(port: int):
    yield


@contextmanager
def opened(port: int, packets: Iterable[bytes]):
    """A socket for each of the packets, until the server takes no more; none waits for an answer."""
    with ExitStack() as sockets:
        for packet in packets:
            try:
                one = sockets.enter_context(socket.create_connection(("127.0.0.1", port), 1))
                one.sendall(packet)
            except OSError:
                break
        yield


def silence(port: int):
    """As many sockets as the limit on connections, and half as many again; they send nothing."""
    return opened(port, [b""] * 1500)


@contextmanager
def repeated(act):
    stop = threading.Event()
    done = threading.Semaphore(0)

    def work() -> None:
        while not stop.is_set():
            try:
                act()
            except Exception:
                pass
            done.release()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    # Until they have used up the reserve of `connect_rate_max`.
    for _ in range(2 * RATE):
        assert done.acquire(timeout=PATIENCE)
    yield
    stop.set()
    for thread in threads:
        thread.join(5)


@contextmanager
def connects(port: int):
    """CONNECTs as fast as 8 threads send them."""

    def act() -> None:
        with socket.create_connection(("127.0.0.1", port), 2) as one:
            one.sendall(wire.connect("flood", user="alice", password=b"right"))
            one.recv(16)

    with repeated(act):
        yield


def guesses(port: int):
    """2,000 CONNECTs with wrong passwords that wait for their answer."""
    return opened(port, (wire.connect(f"guess{n}", user="alice", password=b"wrong%d" % n) for n in range(2000)))


FLOODS = {
    "nothing": nothing,
    "1,500 silent sockets, of 1,000 connections": silence,
    "CONNECTs from 8 threads, of 200 a second": connects,
    "2,000 wrong passwords at once": guesses,
}


def health(admin: int) -> str:
    held = []
    for _ in range(64):
        one = socket.create_connection(("127.0.0.1", admin))
        one.sendall(b"GET /hea")
        held.append(one)
    times = []
    for _ in range(5):
        begun = time.monotonic()
        urllib.request.urlopen(f"http://127.0.0.1:{admin}/healthz", timeout=PATIENCE).read()
        times.append((time.monotonic() - begun) * 1000)
    for one in held:
        one.close()
    return f"{statistics.median(times):.1f} / {max(times):.1f}"


def main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 20_000), hard))
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        users = directory / "users"
        assert run([BINARY, "passwd", users, "alice"], input="right\n").returncode == 0
        theirs = directory / "mosquitto_users"
        assert run(["mosquitto_passwd", "-c", "-b", theirs, "alice", "right"]).returncode == 0
        theirs.chmod(0o644)
        print("| flood from one address | login through Tidegate, ms: first / median / longest | login at mosquitto alone |\n|---|---|---|")
        for what, flood in FLOODS.items():
            broker = Mosquitto(directory / f"b{len(what)}", quiet=True).start()
            alone = Mosquitto(directory / f"a{len(what)}", quiet=True, extra=f"password_file {theirs}\nmax_connections 1000\n", anonymous=False).start()
            limits = {"connections_max": 1000, "connect_rate_max": RATE}
            table = {
                "node": {"id": "floods"},
                "listeners": [listener("tcp")],
                "upstream": {"servers": [broker.url]},
                "auth": {"mode": "file", "file": str(users), "acl": "open"},
                "limits": limits,
                "admin": {"bind": "127.0.0.1:0"},
            }
            edge = Edge(directory / f"e{len(what)}", table).start()
            try:
                found = []
                for port in (edge["tcp"].port, alone.port):
                    with flood(port):
                        found.append(logins(port))
                print(f"| {what} | {found[0]} | {found[1]} |", flush=True)
                if flood is nothing:
                    incomplete = health(edge["admin"].port)
            finally:
                edge.close()
                alone.close()
                broker.close()
        print(f"\n`/healthz` behind 64 incomplete requests, ms: {incomplete}")


if __name__ == "__main__":
    main()
