"""Debian's mosquitto as the unmodified broker."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

from .process import Service, free_port, wait_until

# Tidegate's documents recommend this configuration for a mosquitto behind it.
RECOMMENDED = """\
user root
allow_anonymous {anonymous}
persistence true
persistence_location {directory}/
persistent_client_expiration 1h
max_queued_messages 0
max_inflight_messages 65535
set_tcp_nodelay true
log_dest stderr
{log_types}
"""


class Mosquitto:
    """One mosquitto on a loopback port that stays the same over restarts."""

    def __init__(self, directory: Path, *, quiet: bool = False, tls=None, extra: str = "", of_listener: str = "", anonymous: bool = True):
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o755)
        self.port = free_port()
        self.tls_port = free_port() if tls else None
        log_types = "log_type error\nlog_type warning" if quiet else "log_type all"
        config = RECOMMENDED.format(directory=directory, log_types=log_types, anonymous=str(anonymous).lower()) + extra
        config += f"\nlistener {self.port} 127.0.0.1\n{of_listener}"
        if tls:
            config += f"\nlistener {self.tls_port} 127.0.0.1\ncafile {tls.ca}\ncertfile {tls.cert}\nkeyfile {tls.key}\n"
        self.config = directory / "mosquitto.conf"
        self.config.write_text(config)
        self.service: Service | None = None

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    @property
    def tls_url(self) -> str:
        return f"mqtts://127.0.0.1:{self.tls_port}"

    def start(self) -> "Mosquitto":
        self.service = Service("mosquitto", ["mosquitto", "-c", self.config], log=self.directory / "mosquitto.log")
        wait_until("mosquitto takes connections", self._reachable)
        return self

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Stops mosquitto: on SIGTERM it saves its sessions, on SIGKILL it forgets them."""
        self.service.stop(number)

    def forget(self) -> None:
        for file in self.directory.glob("mosquitto.db*"):
            file.unlink()

    def close(self) -> None:
        if self.service:
            self.service.end_quietly()

    def mark(self) -> int:
        return self.service.mark()

    def received(self, kind: str, since: int = 0) -> list[str]:
        """Log lines of the broker about arrived packets of that kind."""
        return self.service.grep(rf"Received {kind} from", since)

    def connects(self, since: int = 0) -> list[str]:
        """Log lines about new connections of clients and links, without probes."""
        return [line for line in self.service.grep(r"New client connected from", since) if "-probe " not in line]

    def _reachable(self) -> bool:
        if not self.service.alive():
            raise AssertionError(f"mosquitto ended at start:\n{self.service.text()}")
        socket.create_connection(("127.0.0.1", self.port), 1).close()
        return True
