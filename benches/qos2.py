#!/usr/bin/env python3
"""How long QoS 2 publishes take, one after the other: Tidegate in front of mosquitto as Debian ships it, and mosquitto alone.

    cargo build --release --locked --bin tidegate
    TIDEGATE_BIN=$PWD/target/release/tidegate .venv/bin/python benches/qos2.py

A publish takes from PUBLISH to PUBCOMP; a delivery takes from PUBLISH to the subscriber's PUBCOMP. This mosquitto has
Nagle's algorithm on. `scripts/test` makes .venv.

Waking a process on another processor takes longer than all the work for a packet. So the processes are bound to
processors: all to one, the broker to another, or the broker and Tidegate to another than the clients. Where the system
places them, the clients and mosquitto often share a processor which Tidegate does not have.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "interop"))

from harness import wire  # noqa: E402
from harness.edge import Edge, listener  # noqa: E402
from harness.process import Service, free_port, wait_until  # noqa: E402
from harness.raw import Raw  # noqa: E402

PUBLISHES = 500
RUNS = 5

# The processors of the clients, of Tidegate and of the broker.
FIRST, SECOND, ANY = {0}, {1}, set(range(os.cpu_count() or 1))
PLACES = {
    "all on one processor": (FIRST, FIRST, FIRST),
    "the broker on another": (FIRST, FIRST, SECOND),
    "the broker and Tidegate on another": (FIRST, SECOND, SECOND),
    "as the system places them": (ANY, ANY, ANY),
}


def publishes(port: int, delivered: bool) -> list[float]:
    """Milliseconds of each publish, or of each delivery."""
    times = []
    with Raw(port, version=4) as raw, Raw(port, version=4) as sub:
        sub.connect("subscriber")
        if delivered:
            sub.subscribe(("qos2", 2))
        raw.connect("publisher")
        for n in range(1, PUBLISHES + 1):
            began = time.monotonic()
            raw.send(wire.publish("qos2", b"x" * 64, 2, packet_id=n, version=4))
            assert raw.recv().kind == wire.PUBREC
            raw.send(wire.ack(wire.PUBREL, n))
            assert raw.recv().kind == wire.PUBCOMP
            if delivered:
                packet = sub.recv()
                sub.send(wire.ack(wire.PUBREC, packet.packet_id))
                assert sub.recv().kind == wire.PUBREL
                sub.send(wire.ack(wire.PUBCOMP, packet.packet_id))
            times.append((time.monotonic() - began) * 1000)
    return times


def bind(pid: int, processors: set[int]) -> None:
    """Binds all threads of a process to these processors."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), processors)


def answers(port: int) -> bool:
    try:
        Raw(port).close()
    except OSError:
        return False
    return True


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        port = free_port()
        (directory / "mosquitto.conf").write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
        broker = Service("mosquitto", ["mosquitto", "-c", directory / "mosquitto.conf"])
        wait_until("mosquitto takes connections", lambda: answers(port))
        table = {
            "node": {"id": "qos2"},
            "listeners": [listener("tcp")],
            "upstream": {"servers": [f"mqtt://127.0.0.1:{port}"]},
            "auth": {"mode": "anonymous", "acl": "open"},
            "admin": {"bind": "127.0.0.1:0"},
        }
        edge = Edge(directory / "edge", table).start()
        try:
            print("| | processors | Tidegate, ms: p50 | mosquitto alone | ratios |\n|---|---|---|---|---|")
            for what in ("publish", "delivery"):
                for place, processors in PLACES.items():
                    for pid, bound in zip((os.getpid(), edge.service.pid, broker.pid), processors, strict=True):
                        bind(pid, bound)
                    runs = [[statistics.median(publishes(p, what == "delivery")) for p in (edge["tcp"].port, port)] for _ in range(RUNS)]
                    ours, theirs = (", ".join(f"{run[side]:.3f}" for run in runs) for side in (0, 1))
                    ratios = ", ".join(f"{mine / other:.2f}" for mine, other in runs)
                    print(f"| {what} | {place} | {ours} | {theirs} | {ratios} |", flush=True)
        finally:
            edge.close()
            broker.end_quietly()


if __name__ == "__main__":
    main()
