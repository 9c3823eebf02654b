"""Other brokers behind Tidegate, each unmodified and with its own defaults."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

from .process import Service, free_port, wait_until

JS = Path(__file__).parent.parent / "js"
RUMQTTD = Path(os.environ.get("TIDEGATE_RUMQTTD", Path(__file__).parents[3] / "target/rumqttd/bin/rumqttd"))
RABBIT = "/usr/lib/rabbitmq/bin/rabbitmq-server"


class Broker:
    """One process on a loopback port."""

    name = ""

    def __init__(self, directory: Path):
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.service: Service | None = None

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def argv(self) -> list:
        raise NotImplementedError

    def env(self) -> dict:
        return {}

    def start(self) -> "Broker":
        self.service = Service(self.name, self.argv(), cwd=self.directory, env=self.env(), log=self.directory / "log")
        wait_until(f"{self.name} takes connections", self._reachable, 60, 0.1)
        return self

    def close(self) -> None:
        if self.service:
            self.service.end_quietly()

    def _reachable(self) -> bool:
        if not self.service.alive():
            raise AssertionError(f"{self.name} ended at start:\n{self.service.text()}")
        socket.create_connection(("127.0.0.1", self.port), 1).close()
        return True


class Aedes(Broker):
    """MQTT 3.1.1 in Node; refuses MQTT 5."""

    name = "aedes"

    def argv(self) -> list:
        return ["node", JS / "aedes.mjs", self.port]


class Rumqttd(Broker):
    """MQTT 5; built by the full tier's setup."""

    name = "rumqttd"

    def __init__(self, directory: Path):
        super().__init__(directory)
        (directory / "rumqttd.toml").write_text(
            f"""id = 0
[router]
id = 0
max_connections = 100
max_outgoing_packet_count = 200
max_segment_size = 104857600
max_segment_count = 10
[v5.1]
name = "v5-1"
listen = "127.0.0.1:{self.port}"
next_connection_delay_ms = 1
[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = 20480
max_inflight_count = 100
"""
        )

    def argv(self) -> list:
        return [RUMQTTD, "-c", "rumqttd.toml", "-q"]


class RabbitMq(Broker):
    """Debian's RabbitMQ with its MQTT plugin: 3.1.1, prefetch 10, no shared subscriptions."""

    name = "rabbitmq"

    def __init__(self, directory: Path):
        super().__init__(directory)
        self.epmd_port = free_port()
        conf = f"listeners.tcp = none\nmqtt.listeners.tcp.1 = 127.0.0.1:{self.port}\nmqtt.allow_anonymous = true\nlog.console = true\nlog.file = false\n"
        (directory / "rabbitmq.conf").write_text(conf)
        (directory / "enabled_plugins").write_text("[rabbitmq_mqtt].\n")

    def argv(self) -> list:
        return [RABBIT]

    def env(self) -> dict:
        d = self.directory
        return {
            "HOME": str(d),
            "ERL_EPMD_PORT": str(self.epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"tidegate{os.getpid()}@localhost",
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_MNESIA_BASE": str(d / "mnesia"),
            "RABBITMQ_LOG_BASE": str(d / "logs"),
            "RABBITMQ_CONFIG_FILE": str(d / "rabbitmq"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(d / "enabled_plugins"),
            "RABBITMQ_PID_FILE": str(d / "pid"),
        }

    def close(self) -> None:
        super().close()
        # RabbitMQ's port mapper outlives the broker; this node has one of its own.
        env = {"ERL_EPMD_PORT": str(self.epmd_port), "ERL_EPMD_ADDRESS": "127.0.0.1", "PATH": os.environ["PATH"], "HOME": str(self.directory)}
        if epmd := shutil.which("epmd"):
            # It refuses to end until it has seen the end of the broker.
            wait_until("the port mapper ends", lambda: Service("epmd", [epmd, "-kill"], env=env).wait_exit() == 0)
