"""Debian's nginx and HAProxy in front of a Tidegate with usual configurations, and PROXY protocol headers written by hand."""

from __future__ import annotations

import shutil
import socket
import struct
from pathlib import Path

from .process import Service, free_port, wait_until

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"


def line(source: str, port: int, destination: str = "127.0.0.1") -> bytes:
    """A header of version 1."""
    family = "TCP6" if ":" in source else "TCP4"
    return f"PROXY {family} {source} {destination} {port} 1883\r\n".encode()


def binary(source: str = "", port: int = 0, *, command: int = 1, family: int | None = None, tlvs: bytes = b"", body: bytes | None = None) -> bytes:
    """A header of version 2."""
    if body is None:
        kind = socket.AF_INET6 if ":" in source else socket.AF_INET
        ip = socket.inet_pton(kind, source) if source else b""
        body = ip + ip + struct.pack(">HH", port, 1883) if source else b""
        family = family if family is not None else (0 if not source else 0x21 if ":" in source else 0x11)
    return SIGNATURE + bytes([0x20 | command, family or 0]) + struct.pack(">H", len(body) + len(tlvs)) + body + tlvs


def tlv(kind: int, value: bytes) -> bytes:
    return bytes([kind]) + struct.pack(">H", len(value)) + value


class Nginx:
    """An HTTP server that proxies WebSocket at every location. `routes` maps paths to ports."""

    def __init__(self, directory: Path, routes: dict[str, int], read_timeout: str = "60s"):
        directory.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        temporary = "\n".join(f"{kind}_temp_path {directory}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        locations = "\n".join(f"location = {path} {{ proxy_pass http://127.0.0.1:{port}/mqtt; }}" for path, port in routes.items())
        file = directory / "nginx.conf"
        file.write_text(f"""
daemon off;
# One process, so that no worker stays behind when nginx is killed.
master_process off;
pid {directory}/nginx.pid;
error_log stderr info;
events {{ worker_connections 64; }}
http {{
  access_log off;
  {temporary}
  map $http_upgrade $connection_upgrade {{ default upgrade; '' close; }}
  server {{
    listen 127.0.0.1:{self.port};
    proxy_http_version 1.1;
    proxy_set_header Upgrade $http_upgrade;
    proxy_set_header Connection $connection_upgrade;
    proxy_set_header Host $host;
    proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
    proxy_read_timeout {read_timeout};
    {locations}
  }}
}}
""")
        self.service = Service("nginx", [find("nginx"), "-e", "stderr", "-p", directory, "-c", file], log=directory / "nginx.log")
        wait_until("nginx takes connections", lambda: reachable(self.service, self.port))

    def close(self) -> None:
        self.service.end_quietly()


class HaProxy:
    """`ways`: name -> (port of the server, words of its `server` line, more lines of its backend)."""

    def __init__(self, directory: Path, ways: dict[str, tuple[int, str, str]]):
        directory.mkdir(parents=True, exist_ok=True)
        self.ports = {name: free_port() for name in ways}
        parts = ["global\n  maxconn 200\n", "defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 30s\n  timeout server 30s\n  timeout tunnel 30s\n"]
        for name, (target, words, more) in ways.items():
            mode = "mode http" if "http" in more else "mode tcp"
            parts.append(f"frontend f-{name}\n  {mode}\n  bind 127.0.0.1:{self.ports[name]}\n  default_backend b-{name}\n")
            parts.append(f"backend b-{name}\n  {mode}\n  {more}\n  server one 127.0.0.1:{target} {words}\n")
        file = directory / "haproxy.cfg"
        file.write_text("\n".join(parts))
        self.service = Service("haproxy", [find("haproxy"), "-db", "-f", file], log=directory / "haproxy.log")
        for port in self.ports.values():
            wait_until("haproxy takes connections", lambda port=port: reachable(self.service, port))

    def close(self) -> None:
        self.service.end_quietly()


def find(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    assert found, f"no {name}: scripts/test installs Debian's package `{name}`"
    return found


def reachable(service: Service, port: int) -> bool:
    assert service.alive(), f"{service.name} ended at start:\n{service.text()}"
    socket.create_connection(("127.0.0.1", port), 1).close()
    return True
