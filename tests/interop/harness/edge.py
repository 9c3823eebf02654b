"""The real binary, started with a generated configuration."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from .certs import Pki
from .process import PATIENCE, Service, run, wait_until

ROOT = Path(__file__).resolve().parents[3]
BINARY = Path(os.environ.get("TIDEGATE_BIN", ROOT / "target" / "debug" / "tidegate"))
_serial = itertools.count(1)
TRANSPORTS = ("tcp", "tls", "ws", "wss", "quic")
SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? ([0-9.eE+-]+|NaN|[+-]Inf)$")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')


@dataclass
class Listening:
    name: str
    transport: str
    url: str

    @property
    def port(self) -> int:
        return urlsplit(self.url).port

    @property
    def path(self) -> str:
        return urlsplit(self.url).path or "/"


def toml(table: dict) -> str:
    """Writes the part of TOML that a configuration needs."""
    def value(v) -> str:
        if isinstance(v, bool):
            return str(v).lower()
        if isinstance(v, (int, float)):
            return str(v)
        if isinstance(v, (list, tuple)):
            return "[" + ", ".join(value(x) for x in v) + "]"
        return json.dumps(str(v))

    def lines(prefix: str, t: dict):
        for k, v in t.items():
            if not isinstance(v, dict) and not (isinstance(v, list) and v and isinstance(v[0], dict)):
                yield f"{k} = {value(v)}"
        for k, v in t.items():
            name = f"{prefix}{k}"
            if isinstance(v, dict):
                yield f"\n[{name}]"
                yield from lines(f"{name}.", v)
            elif isinstance(v, list) and v and isinstance(v[0], dict):
                for item in v:
                    yield f"\n[[{name}]]"
                    yield from lines(f"{name}.", item)

    return "\n".join(lines("", table)) + "\n"


def listener(transport: str, name: str | None = None, **more) -> dict:
    entry = {"name": name or transport, "transport": transport, "bind": "127.0.0.1:0"}
    if transport in ("ws", "wss"):
        entry["path"] = "/mqtt"
    if transport in ("tls", "wss", "quic"):
        entry["tls"] = "default"
    return entry | more


def config(broker_url: str, pki: Pki, transports=TRANSPORTS, **sections) -> dict:
    """A configuration with every listener; `sections` are merged over it."""
    base = {
        "version": 1,
        # Two processes with one id before the same broker would take each other's links over.
        "node": {"id": f"edge-{os.getpid()}-{next(_serial)}", "data_dir": "data"},
        "tls": [{"name": "default", "cert": str(pki.cert), "key": str(pki.key)}],
        "listeners": [listener(t) for t in transports],
        "upstream": {"servers": [broker_url]},
        "auth": {"mode": "anonymous", "acl": "open"},
        "admin": {"bind": "127.0.0.1:0"},
        "log": {"level": "info"},
    }
    for name, section in sections.items():
        if isinstance(section, dict) and isinstance(base.get(name), dict):
            base[name] = base[name] | section
        else:
            base[name] = section
    return base


class Edge:
    """One `tidegate run`; a restart keeps configuration and directory."""

    def __init__(self, directory: Path, table: dict | str, pki: Pki | None = None):
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.pki = pki
        self.file = directory / "tidegate.toml"
        self.file.write_text(table if isinstance(table, str) else toml(table))
        self.service: Service | None = None
        self.listening: dict[str, Listening] = {}

    def start(self, timeout: float = 20, ready: bool = True, env: dict | None = None) -> "Edge":
        assert BINARY.exists(), f"{BINARY} is not built: cargo build (or set TIDEGATE_BIN)"
        self.service = Service("tidegate", [BINARY, "run", "--config", self.file], cwd=self.directory, env=env, log=self.directory / "tidegate.log")
        if ready:
            self.service.wait_line(r"^ready$", timeout, stream="out")
            self.listening = read_listening(self.service)
        return self

    def __getitem__(self, name: str) -> Listening:
        return self.listening[name]

    def stop(self, number: int = signal.SIGTERM, timeout: float = 20) -> int:
        return self.service.stop(number, timeout)

    def close(self) -> None:
        if self.service:
            self.service.end_quietly()

    def mark(self) -> int:
        return self.service.mark()

    def wait_log(self, pattern: str, since: int = 0, timeout: float = 10) -> str:
        """Waits for the first log line that matches."""
        return self.service.wait_line(pattern, timeout, since, "err").string

    def assert_sane(self, since: int = 0) -> None:
        """Asserts that the process lives and never panicked, whatever the test did."""
        assert self.service.alive(), f"tidegate ended with {self.service.process.returncode}:\n{self.service.text()[-4000:]}"
        assert not (panics := self.service.grep(r"panicked at|thread '.*' panicked", since)), panics

    def http(self, path: str, timeout: float = 5) -> tuple[int, str]:
        url = f"http://127.0.0.1:{self['admin'].port}{path}"
        try:
            with urllib.request.urlopen(url, timeout=timeout * PATIENCE) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def api(self, path: str):
        status, body = self.http(path)
        assert status == 200, f"{path}: {status} {body}"
        return json.loads(body)

    def metrics(self) -> "Metrics":
        status, body = self.http("/metrics")
        assert status == 200, body
        return Metrics(body)

    def wait_metric(self, what: str, check, timeout: float = 10):
        return wait_until(what, lambda: check(self.metrics()), timeout, 0.05)


class Metrics:
    """One scrape."""

    def __init__(self, text: str):
        self.text = text
        self.samples: list[tuple[str, dict, float]] = []
        for line in text.splitlines():
            if line and not line.startswith("#"):
                found = SAMPLE.match(line)
                assert found, f"not a sample: {line!r}"
                self.samples.append((found[1], dict(LABEL.findall(found[2] or "")), float(found[3])))

    def sum(self, name: str, **labels) -> float:
        """The sum over all series of that name with labels that match the given regular expressions."""
        return sum(value for n, have, value in self.samples if n == name and all(re.search(want, have.get(k, "")) for k, want in labels.items()))

    def names(self) -> set[str]:
        return {n for n, _, _ in self.samples}

    def series(self, name: str) -> list[tuple[dict, float]]:
        return [(labels, value) for n, labels, value in self.samples if n == name]


def read_listening(service: Service) -> dict[str, Listening]:
    bound = {}
    for line in service.lines(stream="out"):
        if line.startswith("listening "):
            _, name, transport, url = line.split(" ", 3)
            # A QUIC listener's WebTransport has a line of its own.
            bound["webtransport" if transport == "webtransport" else name] = Listening(name, transport, url)
    return bound


def tidegate(*args, timeout: float = 20, **kwargs):
    """Runs a command of the binary that ends by itself."""
    return run([BINARY, *args], timeout, **kwargs)
