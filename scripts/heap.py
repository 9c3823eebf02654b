#!/usr/bin/env python3
"""Measures the live heap of an idle connection on each transport, and of a detached session.

    cargo build --release --features heap-metric --bin tidegate
    cargo build --release -p tidegate-kit --bin load
    scripts/heap.py [--only tcp --only detached] BINARY [BINARY ...]

Each BINARY must be a build with the feature `heap-metric`, which shows `tidegate_heap_bytes`. The
figure is the growth from 500 to 2,500 connections (500 to 20,000 detached sessions) for each: bytes. Unlike resident memory it varies little.
"""
import argparse
import pathlib
import re
import socket
import subprocess
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOAD = ROOT / "target" / "release" / "load"
TRANSPORTS = ["tcp", "ws", "tls", "wss", "quic", "webtransport"]
# With this many detached sessions no shard's table is near the size at which it doubles, so that runs agree.
FEW, MORE, MORE_DETACHED = 500, 2000, 20000


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """A Tidegate on its embedded broker with one listener."""

    def __init__(self, binary, transport, folder):
        self.port, self.admin = free_port(), free_port()
        tls = "" if transport in ("tcp", "ws") else 'tls = "default"\n'
        web = "webtransport = true\n" if transport == "webtransport" else ""
        path = 'path = "/mqtt"\n' if transport in ("ws", "wss") else ""
        config = pathlib.Path(folder) / "tidegate.toml"
        config.write_text(
            f"""version = 1
[node]
id = "heap"
data_dir = "{folder}/data"
[upstream]
servers = ["embedded:"]
[[tls]]
name = "default"
[[listeners]]
name = "one"
transport = "{'quic' if web else transport}"
bind = "127.0.0.1:{self.port}"
{tls}{path}{web}[admin]
bind = "127.0.0.1:{self.admin}"
[limits]
connect_rate_max = 1000000
[log]
level = "warn"
"""
        )
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([binary, "run", "--config", config], **quiet)
        self.wait(lambda: self.metric("tidegate_heap_bytes") > 0)

    def metric(self, name):
        try:
            text = urllib.request.urlopen(f"http://127.0.0.1:{self.admin}/metrics", timeout=5).read().decode()
        except OSError:
            return -1
        return sum(float(v) for v in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.M))

    def wait(self, condition):
        deadline = time.monotonic() + 120
        while not condition():
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise SystemExit("Tidegate does not get there")
            time.sleep(0.2)

    def settled(self):
        """The live heap once it has stopped to change."""
        seen = [-1.0] * 4
        while max(seen) - min(seen) > 4096 or seen[0] < 0:
            time.sleep(0.5)
            seen = seen[1:] + [self.metric("tidegate_heap_bytes")]
        return seen[-1]


def load(options, server, transport, count, prefix, expiry):
    path = "/mqtt" if transport in ("ws", "wss") else ""
    return subprocess.Popen(
        [options.load, "connect", "--url", f"{transport}://127.0.0.1:{server.port}{path}", "--connections", str(count)]
        + ["--base", str(count), "--prefix", prefix, "--expiry", str(expiry), "--seconds", "600", "--keep-alive", "0"]
        + ["--topics", "1"],
        stdout=subprocess.DEVNULL,
    )


def measure(options, binary, transport, detached):
    with tempfile.TemporaryDirectory() as folder:
        server, loads = Server(binary, transport, folder), []
        try:
            heap, more = [], MORE_DETACHED - FEW if detached else MORE
            total = 0
            for count in (FEW, more):
                loads.append(load(options, server, transport, count, f"heap{count}", 3600 if detached else 0))
                total += count
                alive = count if detached else total
                server.wait(lambda: server.metric("tidegate_connections_open") >= alive)
                time.sleep(3)
                if detached:
                    loads[-1].kill()
                    server.wait(lambda: server.metric("tidegate_connections_open") == 0)
                heap.append(server.settled())
            return (heap[1] - heap[0]) / more
        finally:
            for process in [*loads, server.process]:
                process.kill()
                process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binaries", nargs="+", metavar="BINARY")
    parser.add_argument("--load", type=pathlib.Path, default=LOAD, help="the load tool")
    parser.add_argument("--only", action="append", choices=[*TRANSPORTS, "detached"], help="measure this case alone")
    options = parser.parse_args()
    for case in options.only or [*TRANSPORTS, "detached"]:
        detached = case == "detached"
        name, transport = ("detached session, a shared topic", "tcp") if detached else (case, case)
        figures = [f"{measure(options, b, transport, detached):.0f}" for b in options.binaries]
        print(f"{name}: {', '.join(figures)}", flush=True)


main()
