#!/usr/bin/env python3
"""Counts the instructions that Tidegate executes for one delivery and for one publish.

    cargo build --release -p tidegate -p tidegate-kit --bin tidegate --bin load
    scripts/instructions.py [--rounds 3] BINARY [BINARY ...]

Each BINARY runs under valgrind's callgrind, with one worker thread, in front of mosquitto. The figure
is the difference of a long and a short run, divided by the messages between them, so that the start
and the connections fall out. Several binaries run in turn, to be compared side by side. A delivery is
one of 50 for each message at QoS 1; a publish is one message at QoS 1 between a pair of clients, its
delivery included. Rounds differ by a few per cent, since batches do: compare medians.
"""
import argparse
import contextlib
import pathlib
import re
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOAD = ROOT / "target" / "release" / "load"
COMMON = ["--qos", "1", "--payload", "64", "--warmup", "0"]
KINDS = {
    # name: load, messages of the short and of the long run, deliveries a message
    "delivery": (["fan-out", "--publishers", "1", "--subscribers", "50", "--ahead", "2"], 200, 2200, 50),
    "publish": (["pairs", "--publishers", "4", "--subscribers", "4", "--ahead", "4"], 400, 8400, 1),
}


def free_ports(count):
    """Different ports, because all are bound at once. Another program can still take one before it is used."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def collected(binary, load, args, messages):
    """All instructions of one run."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        broker, client, admin = free_ports(3)
        (folder / "mosquitto.conf").write_text(
            f"listener {broker} 127.0.0.1\nallow_anonymous true\nmax_queued_messages 0\nset_tcp_nodelay true\n"
        )
        (folder / "tidegate.toml").write_text(
            f"""version = 1
[node]
id = "count"
data_dir = "{folder}/data"
[upstream]
servers = ["mqtt://127.0.0.1:{broker}"]
[[listeners]]
name = "tcp"
transport = "tcp"
bind = "127.0.0.1:{client}"
[admin]
bind = "127.0.0.1:{admin}"
[log]
level = "warn"
"""
        )
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        mosquitto = subprocess.Popen(["mosquitto", "-c", folder / "mosquitto.conf"], **quiet)
        valgrind = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
        log = open(folder / "log", "w")
        tidegate = subprocess.Popen(
            ["env", "TOKIO_WORKER_THREADS=1", *valgrind, binary, "run", "--config", folder / "tidegate.toml"],
            stdout=log,
            stderr=log,
        )
        try:
            ready_by = time.monotonic() + 60
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{admin}/readyz", timeout=5).read()
                    break
                except OSError:
                    if time.monotonic() > ready_by or tidegate.poll() is not None:
                        raise SystemExit((folder / "log").read_text())
                    time.sleep(0.1)
            url = ["--url", f"tcp://127.0.0.1:{client}", "--messages", str(messages)]
            subprocess.run([load, *args, *COMMON, *url], check=True, **quiet)
        finally:
            for process in (tidegate, mosquitto):
                process.terminate()
                process.wait(timeout=60)
            log.close()
        return int(re.search(r"Collected : (\d+)", (folder / "log").read_text())[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binaries", nargs="+", metavar="BINARY")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load", type=pathlib.Path, default=LOAD, help="the load tool")
    options = parser.parse_args()
    for name, (args, low, high, each) in KINDS.items():
        figures = [[] for _ in options.binaries]
        for _ in range(options.rounds):
            for found, binary in zip(figures, options.binaries):
                runs = [collected(binary, options.load, args, messages) for messages in (low, high)]
                found.append((runs[1] - runs[0]) / ((high - low) * each))
        for found, binary in zip(figures, options.binaries):
            rounds = ", ".join(f"{n:.0f}" for n in found)
            print(f"{name}: {statistics.median(found):.0f} ({rounds})  {binary}", flush=True)


main()
