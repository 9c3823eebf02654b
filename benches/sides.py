"""Tidegate in front of a mosquitto, and a mosquitto alone, for the other scripts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "interop"))

from harness.edge import Edge, listener  # noqa: E402
from harness.mosquitto import Mosquitto  # noqa: E402


@contextmanager
def sides(directory: Path, extra: str = "", extra_alone: str = "", **sections: dict) -> Iterator[tuple[Edge, Mosquitto, Mosquitto]]:
    """Tidegate, the broker behind it, and the broker alone. `extra` goes to both brokers, `sections` to Tidegate."""
    broker = Mosquitto(directory / "behind", quiet=True, extra=extra).start()
    alone = Mosquitto(directory / "alone", quiet=True, extra=extra + extra_alone).start()
    table = {
        "node": {"id": "bench"},
        "listeners": [listener("tcp")],
        "auth": {"mode": "anonymous", "acl": "open"},
        "admin": {"bind": "127.0.0.1:0"},
    }
    table |= sections
    table["upstream"] = {"servers": [broker.url]} | sections.get("upstream", {})
    edge = Edge(directory / "edge", table).start()
    try:
        yield edge, broker, alone
    finally:
        edge.close()
        alone.close()
        broker.close()
