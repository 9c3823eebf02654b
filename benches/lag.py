#!/usr/bin/env python3
"""How long a pair waits while four clients flood 200 detached sessions: Tidegate, and mosquitto alone.

    cargo build --release --locked --bin tidegate
    TIDEGATE_BIN=$PWD/target/release/tidegate .venv/bin/python benches/lag.py

Each flooder keeps 1,000 publishes of QoS 1 unacknowledged. The pair exchanges 100 messages of QoS 1 a second.
`scripts/test` makes .venv.
"""

from __future__ import annotations

import argparse
import multiprocessing
import struct
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from sides import sides

from harness import wire
from harness.raw import Raw

UNACKNOWLEDGED = 1000
AT_ONCE = 100
PAUSE = 0.01


def sessions(port: int, count: int) -> None:
    """Sessions that are kept, subscribe to the flood, and have no connection."""
    for n in range(count):
        with Raw(port, version=4) as raw:
            raw.connect(f"asleep{n}", clean=False)
            raw.subscribe(("flood/#", 1))
            raw.send(wire.BYE)


def flood(port: int, number: int, stop, acknowledged) -> None:
    """Publishes as fast as the acknowledgements come."""
    with Raw(port, version=4) as raw:
        raw.connect(f"flooder{number}")
        ids = range(1, UNACKNOWLEDGED + 1)
        packets = [wire.publish(f"flood/{number}", b"x" * 64, 1, packet_id=n, version=4) for n in ids]
        blobs = [b"".join(packets[at : at + AT_ONCE]) for at in range(0, UNACKNOWLEDGED, AT_ONCE)]
        for blob in blobs:
            raw.sock.sendall(blob)
        got = sent = 0
        while not stop.is_set():
            # A PUBACK of 3.1.1 has four bytes. They come in the order of the publishes.
            got += len(raw.sock.recv(65536))
            while got >= 4 * AT_ONCE:
                got -= 4 * AT_ONCE
                raw.sock.sendall(blobs[sent % len(blobs)])
                sent += 1
        acknowledged[number] = sent * AT_ONCE


@contextmanager
def flooded(port: int, clients: int):
    stop = multiprocessing.Event()
    acknowledged = multiprocessing.Array("l", max(clients, 1))
    began = time.monotonic()
    all_of_them = [multiprocessing.Process(target=flood, args=(port, n, stop, acknowledged), daemon=True) for n in range(clients)]
    for one in all_of_them:
        one.start()
    rate: list[float] = []
    yield rate
    stop.set()
    for one in all_of_them:
        one.join(20)
    rate.append(sum(acknowledged) / (time.monotonic() - began))


def pair(port: int, seconds: float, settle: float) -> list[float]:
    """Milliseconds from PUBLISH to its copy, for each message after `settle` seconds."""
    times: list[float] = []
    total = int((seconds + settle) / PAUSE)
    with Raw(port, version=4, timeout=60) as sub, Raw(port, version=4, timeout=60) as pub:
        sub.connect("subscriber")
        sub.subscribe(("pair", 1))
        pub.connect("publisher")

        def receive() -> None:
            for _ in range(total):
                packet = sub.recv()
                sent = struct.unpack(">d", packet.payload)[0]
                times.append((time.monotonic() - sent) * 1000)
                sub.send(wire.ack(wire.PUBACK, packet.packet_id))

        receiver = threading.Thread(target=receive)
        receiver.start()
        began = time.monotonic()
        for n in range(total):
            time.sleep(max(0.0, began + n * PAUSE - time.monotonic()))
            pub.send(wire.publish("pair", struct.pack(">d", time.monotonic()), 1, packet_id=n % 60000 + 1, version=4))
        receiver.join()
    return times[int(settle / PAUSE) :]


def shown(times: list[float]) -> str:
    ordered = sorted(times)
    at = [ordered[int(len(ordered) * part)] for part in (0.5, 0.99)] + [ordered[-1]]
    return " / ".join(f"{t:.1f}" for t in at)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--seconds", type=float, default=10)
    arguments.add_argument("--settle", type=float, default=2)
    arguments.add_argument("--sessions", type=int, default=200)
    arguments.add_argument("--flooders", type=int, default=4)
    arguments.add_argument("--only", choices=("tidegate", "mosquitto"))
    chosen = arguments.parse_args()
    # Tidegate keeps 1,000 messages for each session, as mosquitto does by default.
    with tempfile.TemporaryDirectory() as name, sides(Path(name), extra_alone="max_queued_messages 1000\n") as (edge, _, alone):
        ports = {"tidegate": edge["tcp"].port, "mosquitto": alone.port}
        print("| | pair alone, ms: p50 / p99 / longest | pair beside the flood | flood, publishes a second |\n|---|---|---|---|")
        for what, port in ports.items():
            if chosen.only not in (None, what):
                continue
            sessions(port, chosen.sessions)
            quiet = pair(port, 3, 0.5)
            with flooded(port, chosen.flooders) as rate:
                beside = pair(port, chosen.seconds, chosen.settle)
            print(f"| {what} | {shown(quiet)} | {shown(beside)} | {rate[0]:.0f} |", flush=True)


if __name__ == "__main__":
    main()
