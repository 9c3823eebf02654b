#!/usr/bin/env python3
"""What a message costs for one client with many overlapping filters of 100 levels: Tidegate, and mosquitto alone.

    cargo build --release --locked --bin tidegate
    TIDEGATE_BIN=$PWD/target/release/tidegate .venv/bin/python benches/copies.py

The broker sends Tidegate a copy of each message for each filter. The client gets a message once from Tidegate, and a copy for
each filter from mosquitto. The figures are milliseconds of processor time for a message, ten messages in turn;
`cargo bench --bench overlaps` measures the router's part without a broker. `scripts/test` makes .venv.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from sides import sides

from harness import wire
from harness.raw import Raw

LEVELS = 100
MESSAGES = 10


def filter_no(number: int) -> str:
    """A filter that matches the topic, another one for each number."""
    return "/".join("+" if at < 20 and number >> at & 1 else "a" for at in range(LEVELS))


def used_ms(pid: int) -> float:
    """Processor time of a process: user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * 1000 / os.sysconf("SC_CLK_TCK")


def measure(port: int, pids: list[int], filters: int) -> list[float]:
    with Raw(port, version=4, timeout=60) as sub, Raw(port, version=4, timeout=60) as pub:
        sub.connect("subscriber")
        for at in range(0, filters, 50):
            sub.subscribe(*((filter_no(n), 1) for n in range(at, min(at + 50, filters))), packet_id=at + 1)
        pub.connect("publisher")
        began = [used_ms(pid) for pid in pids]
        for n in range(1, MESSAGES + 1):
            pub.send(wire.publish("/".join(["a"] * LEVELS), b"%d" % n, 1, packet_id=n, version=4))
            while (packet := sub.recv()).payload != b"%d" % n:
                sub.send(wire.ack(wire.PUBACK, packet.packet_id))
            sub.send(wire.ack(wire.PUBACK, packet.packet_id))
            assert pub.recv().kind == wire.PUBACK
        # The answer to PINGREQ follows the copies of the last message.
        sub.send(wire.PING)
        while (packet := sub.recv()).kind != wire.PINGRESP:
            sub.send(wire.ack(wire.PUBACK, packet.packet_id))
        return [(used_ms(pid) - before) / MESSAGES for pid, before in zip(pids, began, strict=True)]


def main() -> None:
    print("| filters | Tidegate | the broker behind it | mosquitto alone |\n|---|---|---|---|")
    for filters in (250, 500, 1000):
        with tempfile.TemporaryDirectory() as name, sides(Path(name), limits={"topic_levels_max": LEVELS}) as (edge, broker, alone):
            ours, behind = measure(edge["tcp"].port, [edge.service.pid, broker.service.pid], filters)
            (theirs,) = measure(alone.port, [alone.service.pid], filters)
            print(f"| {filters} | {ours:.0f} | {behind:.0f} | {theirs:.0f} |", flush=True)


if __name__ == "__main__":
    main()
