"""Hand-made connections over every transport, for input that no client library would send."""

from __future__ import annotations

import base64
import os
import socket
import ssl
import struct
import time

from . import wire
from .process import PATIENCE


class Closed(Exception):
    """The far end closed the connection; `close_code` is the WebSocket close code, if one came."""

    def __init__(self, close_code: int | None = None):
        super().__init__(f"closed {close_code}")
        self.close_code = close_code


class Raw:
    """A byte stream from which MQTT packets are read."""

    def __init__(self, port: int, transport: str = "tcp", *, ca=None, path: str = "/mqtt", version: int = 5, subprotocol: str | None = "mqtt", headers: str = "", timeout: float = 10, source: str | None = None, preamble: bytes = b""):
        """`source`: the local address; `preamble`: bytes to send before TLS or anything else."""
        self.version = version
        self.timeout = timeout * PATIENCE
        self.transport = transport
        self.buffer = bytearray()
        self.frames = bytearray()
        self.packets: list[wire.Packet] = []
        self.sock = socket.create_connection(("127.0.0.1", port), self.timeout, (source, 0) if source else None)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.address = "%s:%d" % self.sock.getsockname()
        self.sock.sendall(preamble)
        self.upgrade = ""
        if transport in ("tls", "wss"):
            self.sock = self._wrap(self.sock, ca)
        if transport in ("ws", "wss"):
            self._upgrade(port, path, subprotocol, headers)

    def send(self, raw: bytes) -> "Raw":
        self.sock.sendall(frame(raw) if self.transport in ("ws", "wss") else raw)
        return self

    def send_bytes(self, raw: bytes) -> "Raw":
        """Sends bytes without WebSocket framing."""
        self.sock.sendall(raw)
        return self

    def recv(self, timeout: float | None = None) -> wire.Packet:
        """The next packet; raises `Closed` at the end of the connection and `TimeoutError` when the packet is late."""
        end = time.monotonic() + (self.timeout if timeout is None else timeout)
        while not self.packets:
            chunk = self._chunk(end)
            self.buffer += chunk
            self.packets += wire.split(self.buffer, self.version)
        return self.packets.pop(0)

    def connect(self, client_id: str, **kwargs) -> wire.Packet:
        self.send(wire.connect(client_id, version=self.version, **kwargs))
        connack = self.recv()
        assert connack.kind == wire.CONNACK, connack
        return connack

    def subscribe(self, *filters: tuple[str, int], packet_id: int = 1) -> bytes:
        self.send(wire.subscribe(packet_id, *filters, version=self.version))
        suback = self.recv()
        assert suback.kind == wire.SUBACK and suback.packet_id == packet_id, suback
        return suback.codes

    def wait_closed(self, timeout: float | None = None) -> tuple[list[wire.Packet], int | None]:
        """Reads to the end of the connection. Returns the packets that came before, and the WebSocket close code."""
        got = []
        while True:
            try:
                got.append(self.recv(timeout))
            except Closed as end:
                return got, end.close_code

    def reset(self) -> None:
        """Closes the connection with an RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        try:
            self.sock.close()
        except OSError:
            pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _wrap(self, sock: socket.socket, ca) -> ssl.SSLSocket:
        context = ssl.create_default_context(cafile=str(ca))
        return context.wrap_socket(sock, server_hostname="localhost")

    def _lost(self, error: Exception) -> None:
        """Takes the error that ended the connection; subclasses record it."""

    def _read(self, end: float) -> bytes:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError("no packet came in time")
        self.sock.settimeout(left)
        try:
            raw = self.sock.recv(65536)
        except (ConnectionError, ssl.SSLError) as error:
            if isinstance(error, ssl.SSLWantReadError):
                return b""
            self._lost(error)
            raise Closed from None
        except socket.timeout:
            raise TimeoutError("no packet came in time") from None
        if not raw:
            raise Closed
        return raw

    def _chunk(self, end: float) -> bytes:
        if self.transport not in ("ws", "wss"):
            return self._read(end)
        while True:
            if (one := take_frame(self.frames)) is not None:
                opcode, payload = one
                if opcode == 8:
                    raise Closed(struct.unpack(">H", payload[:2])[0] if len(payload) >= 2 else 1005)
                if opcode == 9:
                    self.sock.sendall(frame(payload, 10))
                elif opcode in (0, 2):
                    return payload
                continue
            self.frames += self._read(end)

    def _upgrade(self, port: int, path: str, subprotocol: str | None, headers: str) -> None:
        key = base64.b64encode(os.urandom(16)).decode()
        offer = f"Sec-WebSocket-Protocol: {subprotocol}\r\n" if subprotocol else ""
        self.sock.sendall(
            f"GET {path} HTTP/1.1\r\nHost: localhost:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n{offer}{headers}\r\n".encode()
        )
        raw = bytearray()
        end = time.monotonic() + self.timeout
        while b"\r\n\r\n" not in raw:
            try:
                raw += self._read(end)
            except Closed:
                break
        head, _, rest = bytes(raw).partition(b"\r\n\r\n")
        self.upgrade = head.decode(errors="replace")
        self.frames += rest

    @property
    def upgrade_status(self) -> int:
        return int(self.upgrade.split(" ")[1]) if self.upgrade else 0


def frame(payload: bytes, opcode: int = 2, fin: bool = True, masked: bool = True) -> bytes:
    """A client's WebSocket frame."""
    head = bytes([(0x80 if fin else 0) | opcode])
    size = len(payload)
    mark = 0x80 if masked else 0
    if size < 126:
        head += bytes([mark | size])
    elif size < 65536:
        head += bytes([mark | 126]) + struct.pack(">H", size)
    else:
        head += bytes([mark | 127]) + struct.pack(">Q", size)
    if not masked:
        return head + payload
    key = os.urandom(4)
    stretched = (key * (size // 4 + 1))[:size]
    return head + key + (int.from_bytes(payload, "big") ^ int.from_bytes(stretched, "big")).to_bytes(size, "big")


def take_frame(buffer: bytearray) -> tuple[int, bytes] | None:
    """Takes a server's frame off the front of the buffer."""
    if len(buffer) < 2:
        return None
    size, at = buffer[1] & 0x7F, 2
    if size == 126:
        if len(buffer) < 4:
            return None
        size, at = struct.unpack(">H", buffer[2:4])[0], 4
    elif size == 127:
        if len(buffer) < 10:
            return None
        size, at = struct.unpack(">Q", buffer[2:10])[0], 10
    if len(buffer) < at + size:
        return None
    one = buffer[0] & 15, bytes(buffer[at : at + size])
    del buffer[: at + size]
    return one
