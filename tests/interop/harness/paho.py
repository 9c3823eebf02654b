"""paho-mqtt with events to wait for, over any transport."""

from __future__ import annotations

import itertools
import queue
import ssl
import threading
import time
from dataclasses import dataclass

import paho.mqtt.client as mqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from .links import Way
from .process import PATIENCE

VERSIONS = {3: mqtt.MQTTv31, 4: mqtt.MQTTv311, 5: mqtt.MQTTv5}
_serial = itertools.count(1)


def props(kind: int, **values) -> Properties:
    made = Properties(kind)
    for name, value in values.items():
        setattr(made, name, value)
    return made


def publish_props(**values) -> Properties:
    return props(PacketTypes.PUBLISH, **values)


@dataclass
class Message:
    topic: str
    payload: bytes
    qos: int
    retain: bool
    dup: bool
    props: Properties | None

    @property
    def text(self) -> str:
        return self.payload.decode()


class Paho:
    """One client. It never reconnects by itself; the test decides when."""

    def __init__(self, way: Way, client_id: str = "", *, version: int = 5, clean: bool = True, expiry: int | None = None, keepalive: int = 60,
                 receive_maximum: int | None = None, alias_maximum: int | None = None, packet_maximum: int | None = None,
                 user: str | None = None, password: str | None = None, will: dict | None = None, manual_ack: bool = False, bridge: bool = False, connect: bool = True):
        self.way, self.version, self.clean, self.keepalive = way, version, clean, keepalive
        self.incoming: queue.Queue[Message] = queue.Queue()
        self.connected = threading.Event()
        self.ended = threading.Event()
        self.connack_flags = self.connack_reason = self.connack_props = None
        self.end_reason: int | None = None
        self.end_by_server = False
        self._acks: dict[tuple[str, int], object] = {}
        self._acked = threading.Condition()
        own = {"clean_session": clean} if version < 5 else {}
        self.client = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2, client_id=client_id, protocol=VERSIONS[version],
            transport="websockets" if way.transport in ("ws", "wss") else "tcp", reconnect_on_failure=False, manual_ack=manual_ack, **own,
        )
        if way.transport in ("tls", "wss"):
            self.client.tls_set(ca_certs=str(way.ca), tls_version=ssl.PROTOCOL_TLS_CLIENT)
        if way.transport in ("ws", "wss"):
            self.client.ws_set_options(path=way.path)
        if user is not None:
            self.client.username_pw_set(user, password)
        if will:
            self.client.will_set(**will)
        if bridge:
            self.client.enable_bridge_mode()
        # paho ignores the server's Receive Maximum; 20 is below mosquitto's and Tidegate's.
        self.client.max_inflight_messages_set(20)
        self.client.max_queued_messages_set(0)
        self.client.on_connect = self._on_connect
        self.client.on_disconnect = self._on_disconnect
        self.client.on_message = self._on_message
        self.client.on_publish = lambda c, u, mid, reason, p: self._ack("publish", mid, reason)
        self.client.on_subscribe = lambda c, u, mid, reasons, p: self._ack("subscribe", mid, reasons)
        self.client.on_unsubscribe = lambda c, u, mid, reasons, p: self._ack("unsubscribe", mid, reasons)
        wanted = {"SessionExpiryInterval": expiry, "ReceiveMaximum": receive_maximum, "TopicAliasMaximum": alias_maximum, "MaximumPacketSize": packet_maximum}
        self.connect_props = props(PacketTypes.CONNECT, **{k: v for k, v in wanted.items() if v is not None}) if version == 5 else None
        if connect:
            self.connect()

    def connect(self, *, expect: int | None = 0) -> "Paho":
        own = {"clean_start": self.clean, "properties": self.connect_props} if self.version == 5 else {}
        self.client.connect("127.0.0.1" if self.way.transport not in ("tls", "wss") else "localhost", self.way.port, self.keepalive, **own)
        self.client.loop_start()
        assert self.connected.wait(10 * PATIENCE), f"no CONNACK over {self.way.transport}; ended: {self.ended.is_set()} {self.end_reason}"
        if expect is not None:
            assert self.connack_reason == expect, f"CONNACK {self.connack_reason:#x}"
        return self

    def reconnect(self, way: Way | None = None, **kwargs) -> "Paho":
        """Connects the same client again, with its unfinished exchanges, over another path if one is given."""
        self.abandon()
        self.way = way or self.way
        self.clean = False
        self.connected.clear()
        self.ended.clear()
        return self.connect(**kwargs)

    @property
    def session_present(self) -> bool:
        return bool(self.connack_flags.session_present)

    def subscribe(self, *filters: str | tuple[str, int], qos: int = 1, expect: list[int] | None | str = "as asked", identifier: int | None = None, **options) -> list[int]:
        """`filters`: names, or (name, qos); `options` as of SubscribeOptions; `expect`: None for any answer."""
        pairs = [(f, qos) if isinstance(f, str) else f for f in filters]
        if self.version == 5:
            wanted = [(f, SubscribeOptions(qos=q, **options)) for f, q in pairs]
            extra = props(PacketTypes.SUBSCRIBE, SubscriptionIdentifier=identifier) if identifier else None
            code, mid = self.client.subscribe(wanted, properties=extra)
        else:
            code, mid = self.client.subscribe(pairs)
        assert code == mqtt.MQTT_ERR_SUCCESS, mqtt.error_string(code)
        got = [r.value for r in self._wait_ack("subscribe", mid)]
        if expect is not None:
            assert got == ([q for _, q in pairs] if expect == "as asked" else expect), f"SUBACK {got}"
        return got

    def unsubscribe(self, name: str):
        _, mid = self.client.unsubscribe(name)
        return self._wait_ack("unsubscribe", mid)

    def publish(self, topic: str, payload="", qos: int = 1, retain: bool = False, expect: int = 0, wait: bool = True, **properties) -> int:
        extra = publish_props(**properties) if properties else None
        info = self.client.publish(topic, payload, qos, retain, extra)
        assert info.rc == mqtt.MQTT_ERR_SUCCESS, mqtt.error_string(info.rc)
        if not wait:
            return info.mid
        got = self._wait_ack("publish", info.mid)
        if self.version == 5 and qos:
            # 0x10: No matching subscribers. That is a success.
            assert got.value == expect or (expect == 0 and got.value == 0x10), f"PUBACK {got}"
        return info.mid

    def wait_published(self, mid: int, timeout: float = 10):
        return self._wait_ack("publish", mid, timeout)

    def next(self, timeout: float = 10) -> Message:
        try:
            return self.incoming.get(timeout=timeout * PATIENCE)
        except queue.Empty:
            raise AssertionError(f"no message in {timeout} s; connection ended: {self.ended.is_set()} {self.end_reason}") from None

    def take(self, count: int, timeout: float = 10) -> list[Message]:
        return [self.next(timeout) for _ in range(count)]

    def until(self, payload: str, timeout: float = 10) -> list[Message]:
        """All messages before the one with that payload. That one is consumed, too."""
        got = []
        while (message := self.next(timeout)).payload != payload.encode():
            got.append(message)
        return got

    def until_marker(self, publisher: "Paho", topic: str, qos: int = 1) -> list[Message]:
        """Publishes a marker and returns the messages before it; no earlier message can follow."""
        marker = f"marker-{next(_serial)}"
        publisher.publish(topic, marker, qos)
        return self.until(marker)

    def until_own_marker(self, publisher: "Paho", topic: str, qos: int = 1) -> list[Message]:
        """As `until_marker`, without the markers of other clients."""
        return [m for m in self.until_marker(publisher, topic, qos) if not m.payload.startswith(b"marker-")]

    def wait_ended(self, timeout: float = 10) -> int:
        assert self.ended.wait(timeout * PATIENCE), f"still connected after {timeout} s"
        return self.end_reason

    def close(self, **kwargs) -> None:
        """Sends a normal DISCONNECT."""
        if self.connected.is_set() and not self.ended.is_set():
            self.client.disconnect(**kwargs)
            self.ended.wait(5)
        self.client.loop_stop()

    def abandon(self) -> None:
        """Stops the client after a cut, without a further packet."""
        self.ended.wait(10)
        self.client.loop_stop()

    def _on_connect(self, client, userdata, flags, reason, properties) -> None:
        self.connack_flags, self.connack_reason, self.connack_props = flags, reason.value, properties
        self.connected.set()

    def _on_disconnect(self, client, userdata, flags, reason, properties) -> None:
        self.end_reason, self.end_by_server = reason.value, flags.is_disconnect_packet_from_server
        self.ended.set()

    def _on_message(self, client, userdata, m: mqtt.MQTTMessage) -> None:
        self.incoming.put(Message(m.topic, m.payload, m.qos, m.retain, m.dup, getattr(m, "properties", None)))

    def _ack(self, kind: str, mid: int, value) -> None:
        with self._acked:
            self._acks[kind, mid] = value
            self._acked.notify_all()

    def _wait_ack(self, kind: str, mid: int, timeout: float = 15):
        end = time.monotonic() + timeout * PATIENCE
        with self._acked:
            while (kind, mid) not in self._acks:
                left = end - time.monotonic()
                assert left > 0 and not self.ended.is_set(), f"no answer to {kind} {mid}; connection ended: {self.ended.is_set()} {self.end_reason}"
                self._acked.wait(min(left, 0.2))
            return self._acks.pop((kind, mid))
