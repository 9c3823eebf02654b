"""A WebSocket client made of bare frames (RFC 6455), for cases that no library sends. It checks the server's frames strictly."""

from __future__ import annotations

import base64
import hashlib
import os
import socket
import struct
import time
from dataclasses import dataclass

from . import wire
from .process import PATIENCE

CONTINUE, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10


@dataclass
class Frame:
    opcode: int
    payload: bytes


def frame(opcode: int, payload: bytes = b"", fin: bool = True, rsv: int = 0, masked: bool = True, length: int | None = None) -> bytes:
    """One frame; `length`, if given, is a false length for its header."""
    size = len(payload) if length is None else length
    head = bytes([(0x80 if fin else 0) | rsv << 4 | opcode])
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
    stretched = (key * (len(payload) // 4 + 1))[: len(payload)]
    return head + key + (int.from_bytes(payload, "big") ^ int.from_bytes(stretched, "big")).to_bytes(len(payload), "big")


def close(code: int | None = 1000, reason: bytes = b"") -> bytes:
    return frame(CLOSE, (struct.pack(">H", code) if code is not None else b"") + reason)


def fragments(payload: bytes, size: int, between: bytes = b"") -> list[bytes]:
    """A binary message in frames of `size` bytes, with other frames in between."""
    parts = [payload[n : n + size] for n in range(0, len(payload), size)] or [b""]
    out = []
    for n, part in enumerate(parts):
        last = n == len(parts) - 1
        out.append(frame(CONTINUE if n else BINARY, part, fin=last) + (b"" if last else between))
    return out


class Broken(AssertionError):
    """The server broke the RFC."""


class Peer:
    """A WebSocket up to and past its end. `events` has the received frames in order, then `None` for the end of TCP."""

    def __init__(self, port: int, headers: str = "", timeout: float = 10):
        self.deadline = time.monotonic() + timeout * PATIENCE
        self.sock = socket.create_connection(("127.0.0.1", port), timeout)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.raw = bytearray()
        self.ended = False
        self.stream = bytearray()
        key = base64.b64encode(os.urandom(16)).decode()
        self.sock.sendall(
            f"GET /mqtt HTTP/1.1\r\nHost: localhost:{port}\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\nSec-WebSocket-Key: {key}\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: mqtt\r\n{headers}\r\n".encode()
        )
        while b"\r\n\r\n" not in self.raw:
            self._read()
        head, _, rest = bytes(self.raw).partition(b"\r\n\r\n")
        self.raw = bytearray(rest)
        lines = head.decode().split("\r\n")
        assert lines[0].startswith("HTTP/1.1 101 "), lines
        self.answer = {name.strip().lower(): value.strip() for name, value in (line.split(":", 1) for line in lines[1:])}
        proof = base64.b64encode(hashlib.sha1((key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest()).decode()
        assert self.answer["sec-websocket-accept"] == proof, self.answer

    def send(self, raw: bytes, chop: int = 0) -> None:
        """Sends in pieces of `chop` bytes, each a write of its own. If the server has closed, `next` reports it."""
        try:
            for n in range(0, len(raw), chop or max(1, len(raw))):
                self.sock.sendall(raw[n : n + chop] if chop else raw)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def next(self) -> Frame | None:
        """The next frame, checked; `None` is the end of the TCP connection, in order or by a reset."""
        while True:
            if (one := self._take()) is not None:
                return one
            if self.ended:
                if self.raw:
                    raise Broken(f"the connection ends inside a frame: {bytes(self.raw)!r}")
                return None
            self._read()

    def shut(self) -> None:
        self.sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.shut()

    def _read(self) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no further frame came in time; so far {bytes(self.raw)!r}")
        self.sock.settimeout(left)
        try:
            chunk = self.sock.recv(65536)
        except socket.timeout:
            raise TimeoutError(f"no further frame came in time; so far {bytes(self.raw)!r}") from None
        except ConnectionResetError:
            chunk = b""
        self.raw += chunk
        self.ended = not chunk

    def _take(self) -> Frame | None:
        raw = self.raw
        if len(raw) < 2:
            return None
        opcode, size, at = raw[0] & 15, raw[1] & 0x7F, 2
        if size >= 126:
            wide = 2 if size == 126 else 8
            if len(raw) < 2 + wide:
                return None
            size, at = int.from_bytes(raw[2 : 2 + wide], "big"), 2 + wide
            if size < (126 if wide == 2 else 65536):
                raise Broken("a length not in its shortest form (section 5.2)")
        if raw[0] & 0x70:
            raise Broken("reserved bits without an extension (section 5.2)")
        if raw[1] & 0x80:
            raise Broken("a masked frame from a server (section 5.1)")
        if opcode not in (CONTINUE, BINARY, CLOSE, PING, PONG):
            raise Broken(f"opcode {opcode} from an MQTT server")
        if opcode >= 8 and (not raw[0] & 0x80 or size > 125):
            raise Broken("a control frame in fragments, or too long (section 5.5)")
        if len(raw) < at + size:
            return None
        payload = bytes(raw[at : at + size])
        del raw[: at + size]
        if opcode == CLOSE and len(payload) == 1:
            raise Broken("half a close code (section 5.5.1)")
        if opcode == CLOSE:
            payload[2:].decode()
        return Frame(opcode, payload)


@dataclass
class Outcome:
    """The outcome of a case."""

    packets: list[wire.Packet]
    pongs: list[bytes]
    close: bytes | None
    """Payload of the close frame; `None` if no close frame came."""

    @property
    def code(self) -> int | None:
        """The close code: 1005 for a close frame without a code, `None` for no close frame."""
        if self.close is None:
            return None
        return struct.unpack(">H", self.close[:2])[0] if self.close else 1005

    @property
    def payloads(self) -> list[bytes]:
        return [p.payload for p in self.packets if p.kind == wire.PUBLISH]


def watch(peer: Peer, until) -> Outcome:
    """Reads until `until(outcome)`, or to the end of the connection; after a close frame only the end may come."""
    outcome, stream = Outcome([], [], None), peer.stream
    while not until(outcome):
        one = peer.next()
        if one is None:
            break
        if outcome.close is not None:
            raise Broken(f"{one} came behind a close frame (section 5.5.1)")
        if one.opcode in (BINARY, CONTINUE):
            stream += one.payload
            outcome.packets += wire.split(stream)
        elif one.opcode == PONG:
            outcome.pongs.append(one.payload)
        elif one.opcode == CLOSE:
            outcome.close = one.payload
    return outcome
