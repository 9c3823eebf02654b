#!/usr/bin/env python3
"""How long a pair waits while another client's publishes make the broker end its connection: Tidegate, and mosquitto alone.

    cargo build --release --locked --bin tidegate
    TIDEGATE_BIN=$PWD/target/release/tidegate .venv/bin/python benches/refused.py

The client sends five publishes of QoS 0 a second that exceed the broker's packet limit. At mosquitto alone its own
connection ends each time, and it connects again. Tidegate has one publish link, in MQTT 3.1.1. The pair exchanges 100
messages of QoS 1 a second. `scripts/test` makes .venv.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

from lag import pair, shown
from sides import sides

from harness import wire
from harness.raw import Raw

LIMIT = 4000


@contextmanager
def refused(port: int):
    stop = threading.Event()
    sent = [0]

    def work() -> None:
        raw = None
        while not stop.wait(0.2):
            try:
                if raw is None:
                    raw = Raw(port, version=4)
                    raw.connect("refused")
                raw.send(wire.publish("refused", b"x" * (LIMIT + 1000), version=4))
                sent[0] += 1
            except OSError:
                raw = None

    thread = threading.Thread(target=work)
    thread.start()
    yield sent
    stop.set()
    thread.join()


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--seconds", type=float, default=10)
    chosen = arguments.parse_args()
    upstream = {"protocol": "3.1.1", "publish_links": 1}
    with tempfile.TemporaryDirectory() as name, sides(Path(name), f"max_packet_size {LIMIT}\n", upstream=upstream) as (edge, _, alone):
        print("| | pair alone, ms: p50 / p99 / longest | pair beside the refused publishes | refused |\n|---|---|---|---|")
        for what, port in {"tidegate": edge["tcp"].port, "mosquitto": alone.port}.items():
            quiet = pair(port, 3, 0.5)
            with refused(port) as sent:
                beside = pair(port, chosen.seconds, 0)
            print(f"| {what} | {shown(quiet)} | {shown(beside)} | {sent[0]} |", flush=True)


if __name__ == "__main__":
    main()
