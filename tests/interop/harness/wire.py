"""Hand-made MQTT packets, legal and illegal, independent of the project's own codec."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

CONNECT, CONNACK, PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP = 1, 2, 3, 4, 5, 6, 7
SUBSCRIBE, SUBACK, UNSUBSCRIBE, UNSUBACK, PINGREQ, PINGRESP, DISCONNECT, AUTH = 8, 9, 10, 11, 12, 13, 14, 15


def varint(n: int) -> bytes:
    out = bytearray()
    while True:
        n, low = n >> 7, n & 0x7F
        out.append(low | (0x80 if n else 0))
        if not n:
            return bytes(out)


def data(raw: bytes) -> bytes:
    return struct.pack(">H", len(raw)) + raw


def text(s: str) -> bytes:
    return data(s.encode())


def packet(kind: int, body: bytes = b"", flags: int = 0) -> bytes:
    return bytes([kind << 4 | flags]) + varint(len(body)) + body


def properties(raw: bytes = b"") -> bytes:
    return varint(len(raw)) + raw


def connect(client_id: str = "", version: int = 5, clean: bool = True, keep_alive: int = 60, expiry: int | None = None, receive_maximum: int | None = None, props: bytes = b"", name: bytes | None = None, flags: int | None = None, user: str | None = None, password: bytes | None = None, bridge: bool = False, will: tuple[str, bytes] | None = None) -> bytes:
    """`will`: topic and payload, at QoS 1."""
    if flags is None:
        flags = 0x02 if clean else 0
        flags |= 0x0C if will is not None else 0
        flags |= 0x80 if user is not None else 0
        flags |= 0x40 if password is not None else 0
    body = data(name if name is not None else (b"MQIsdp" if version == 3 else b"MQTT")) + bytes([version | (0x80 if bridge else 0), flags]) + struct.pack(">H", keep_alive)
    if version == 5:
        if expiry is not None:
            props += b"\x11" + struct.pack(">I", expiry)
        if receive_maximum is not None:
            props += b"\x21" + struct.pack(">H", receive_maximum)
        body += properties(props)
    body += text(client_id)
    if will is not None:
        body += (properties() if version == 5 else b"") + text(will[0]) + data(will[1])
    if user is not None:
        body += text(user)
    if password is not None:
        body += data(password)
    return packet(CONNECT, body)


def publish(topic: str | bytes, payload: bytes = b"", qos: int = 0, packet_id: int = 0, retain: bool = False, dup: bool = False, version: int = 5, props: bytes = b"") -> bytes:
    body = data(topic if isinstance(topic, bytes) else topic.encode())
    if qos:
        body += struct.pack(">H", packet_id)
    if version == 5:
        body += properties(props)
    return packet(PUBLISH, body + payload, (8 if dup else 0) | qos << 1 | (1 if retain else 0))


def subscribe(packet_id: int, *filters: tuple[str, int], version: int = 5, props: bytes = b"") -> bytes:
    body = struct.pack(">H", packet_id) + (properties(props) if version == 5 else b"")
    return packet(SUBSCRIBE, body + b"".join(text(f) + bytes([options]) for f, options in filters), 2)


def unsubscribe(packet_id: int, *filters: str) -> bytes:
    return packet(UNSUBSCRIBE, struct.pack(">H", packet_id) + properties() + b"".join(map(text, filters)), 2)


def ack(kind: int, packet_id: int) -> bytes:
    return packet(kind, struct.pack(">H", packet_id), 2 if kind == PUBREL else 0)


PING = packet(PINGREQ)
BYE = packet(DISCONNECT)


@dataclass
class Packet:
    kind: int
    flags: int
    body: bytes = field(repr=False)
    version: int = 5

    @property
    def reason(self) -> int:
        """The reason code of CONNACK, DISCONNECT and the acknowledgements."""
        if self.kind == CONNACK:
            return self.body[1]
        if self.kind in (DISCONNECT, AUTH):
            return self.body[0] if self.body else 0
        return self.body[2] if len(self.body) > 2 else 0

    @property
    def session_present(self) -> bool:
        return bool(self.body[0] & 1)

    @property
    def packet_id(self) -> int:
        at = 0
        if self.kind == PUBLISH:
            at = 2 + struct.unpack(">H", self.body[:2])[0]
        return struct.unpack(">H", self.body[at : at + 2])[0]

    @property
    def qos(self) -> int:
        return self.flags >> 1 & 3

    @property
    def dup(self) -> bool:
        return bool(self.flags & 8)

    @property
    def topic(self) -> str:
        return self.body[2 : 2 + struct.unpack(">H", self.body[:2])[0]].decode()

    @property
    def payload(self) -> bytes:
        at = 2 + struct.unpack(">H", self.body[:2])[0] + (2 if self.qos else 0)
        if self.version == 5:
            size, at = read_varint(self.body, at)
            at += size
        return self.body[at:]

    @property
    def codes(self) -> bytes:
        """The codes of SUBACK and UNSUBACK."""
        at = 2
        if self.version == 5:
            size, at = read_varint(self.body, at)
            at += size
        return self.body[at:]


def read_varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (raw[at] & 0x7F) << shift
        shift += 7
        at += 1
        if not raw[at - 1] & 0x80:
            return value, at


def split(buffer: bytearray, version: int = 5) -> list[Packet]:
    """Takes all complete packets off the front of a buffer."""
    found = []
    while True:
        at, size, shift = 1, 0, 0
        while True:
            if at >= len(buffer):
                return found
            size |= (buffer[at] & 0x7F) << shift
            shift += 7
            at += 1
            if not buffer[at - 1] & 0x80:
                break
        if len(buffer) < at + size:
            return found
        found.append(Packet(buffer[0] >> 4, buffer[0] & 15, bytes(buffer[at : at + size]), version))
        del buffer[: at + size]
