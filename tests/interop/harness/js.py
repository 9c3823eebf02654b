"""MQTT.js, in Node or in headless Chromium, driven over stdin and stdout of one agent."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from .process import Service

HERE = Path(__file__).resolve().parents[1]


def chromium() -> str:
    for one in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(one):
            return found
    raise AssertionError("no Chromium: scripts/test installs Debian's package `chromium`")


class Agent:
    def __init__(self, *mode: str):
        assert (HERE / "node_modules" / "mqtt").is_dir(), "npm ci has not run in tests/interop: scripts/test does"
        self.service = Service("mqtt.js", ["node", str(HERE / "js" / "agent.mjs"), *mode], stdin=True)
        self.up = json.loads(self.service.wait_line(r'^\{"event":"up".*', 60, stream="out").group(0))

    def do(self, what: str, **more) -> int:
        """Sends a command and returns the place in the output to search from."""
        mark = self.service.mark()
        self.service.send(json.dumps({"do": what} | more))
        return mark

    def wait(self, event: str, client: str, timeout: float = 15, since: int = 0, **having) -> dict:
        prefix = re.escape(json.dumps({"event": event, "client": client}, separators=(",", ":"))[:-1])
        body = "".join(rf"(?=.*{re.escape(json.dumps(k))}:{re.escape(json.dumps(v, ensure_ascii=False))})" for k, v in having.items())
        return json.loads(self.service.wait_line(rf"^{prefix}{body}.*$", timeout, since, "out").group(0))

    def events(self, event: str, client: str, since: int = 0) -> list[dict]:
        every = (json.loads(line) for line in self.service.lines(since, "out") if line.startswith("{"))
        return [e for e in every if e["event"] == event and e.get("client") == client]

    def mark(self) -> int:
        return self.service.mark()

    def close(self) -> None:
        try:
            self.service.process.stdin.close()
            self.service.wait_exit(10)
        except (AssertionError, OSError):
            self.service.end_quietly()


def url(way) -> str:
    scheme = {"tcp": "mqtt", "tls": "mqtts", "ws": "ws", "wss": "wss"}[way.transport]
    return f"{scheme}://localhost:{way.port}{way.path if way.transport in ('ws', 'wss') else ''}"
