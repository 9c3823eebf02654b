"""An aioquic client that controls all its streams, for tests that a relay of one stream cannot serve."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionTerminated, HandshakeCompleted, QuicEvent, StopSendingReceived, StreamDataReceived, StreamReset

from . import wire
from .loop import call, loop
from .process import PATIENCE


def configuration(ca, **more) -> QuicConfiguration:
    made = QuicConfiguration(is_client=True, alpn_protocols=["mqtt"], server_name="localhost", idle_timeout=60, **more)
    made.load_verify_locations(str(ca))
    return made


def first_flight(port: int, ca, **more) -> list[bytes]:
    """The datagrams that a client sends before it has heard anything."""
    quic = QuicConnection(configuration=configuration(ca, **more))
    quic.connect(("127.0.0.1", port), now=0)
    return [raw for raw, _ in quic.datagrams_to_send(now=0)]


class Gone(Exception):
    """The stream or the connection has ended; `code` is the application's, `None` for a FIN."""

    def __init__(self, code: int | None):
        super().__init__(f"ended with {code}")
        self.code = code


def write(stream: int, raw: bytes = b"", end: bool = False):
    """A step for `Phone.do`; aioquic opens streams in order, so lower ones are opened with it."""

    def step(quic: QuicConnection) -> None:
        while quic._local_next_stream_id_bidi < stream:
            quic._get_or_create_stream_for_send(quic._local_next_stream_id_bidi)
        quic.send_stream_data(stream, raw, end)

    return step


class _Protocol(QuicConnectionProtocol):
    def __init__(self, quic: QuicConnection, phone: "Phone"):
        super().__init__(quic)
        self.phone = phone

    def quic_event_received(self, event: QuicEvent) -> None:
        phone = self.phone
        with phone.changed:
            if isinstance(event, StreamDataReceived):
                buffer = phone.buffers.setdefault(event.stream_id, bytearray())
                buffer += event.data
                phone.packets.setdefault(event.stream_id, []).extend(wire.split(buffer, phone.version))
                if event.end_stream:
                    phone.ended[event.stream_id] = None
            elif isinstance(event, StreamReset):
                phone.ended[event.stream_id] = event.error_code
            elif isinstance(event, StopSendingReceived):
                phone.stopped[event.stream_id] = event.error_code
            elif isinstance(event, ConnectionTerminated):
                phone.closed = event
            elif isinstance(event, HandshakeCompleted):
                phone.handshake = event
            phone.changed.notify_all()


class Phone:
    """One connection. Stream 0 is control; streams are named by their numbers in QUIC: 0, 4, 8, …"""

    def __init__(self, port: int, ca, *, ticket=None, on_ticket=None, version: int = 5, wait: bool = True, options: dict | None = None):
        self.version = version
        self.changed = threading.Condition()
        self.buffers: dict[int, bytearray] = {}
        self.packets: dict[int, list[wire.Packet]] = {}
        self.ended: dict[int, int | None] = {}
        self.stopped: dict[int, int] = {}
        self.closed: ConnectionTerminated | None = None
        self.handshake: HandshakeCompleted | None = None
        self.quic = QuicConnection(configuration=configuration(ca, session_ticket=ticket, **(options or {})), session_ticket_handler=on_ticket)
        self.protocol: _Protocol = call(self._dial(port, wait))
        if wait:
            self.wait("the handshake", lambda: self.handshake or self.closed)

    async def _dial(self, port: int, transmit: bool) -> _Protocol:
        _, protocol = await asyncio.get_running_loop().create_datagram_endpoint(lambda: _Protocol(self.quic, self), local_addr=("127.0.0.1", 0))
        self.port = protocol._transport.get_extra_info("sockname")[1]
        protocol.connect(("127.0.0.1", port), transmit=transmit)
        return protocol

    def do(self, *steps) -> "Phone":
        """Runs all steps, functions of the QUIC connection, and only then sends."""

        async def run():
            for step in steps:
                step(self.quic)
            self.protocol.transmit()

        call(run())
        return self

    def send(self, stream: int, raw: bytes = b"", end: bool = False) -> "Phone":
        return self.do(write(stream, raw, end))

    def reset(self, stream: int, code: int) -> "Phone":
        return self.do(lambda quic: quic.reset_stream(stream, code))

    def stop(self, stream: int, code: int) -> "Phone":
        return self.do(lambda quic: quic.stop_stream(stream, code))

    def recv(self, stream: int = 0, timeout: float = 10) -> wire.Packet:
        """The next packet of a stream; raises `Gone` if the stream has ended."""

        def ready():
            return self.packets.get(stream) or stream in self.ended or self.closed

        self.wait(f"a packet on stream {stream}", ready, timeout)
        with self.changed:
            if self.packets.get(stream):
                return self.packets[stream].pop(0)
            raise Gone(self.ended[stream] if stream in self.ended else self.closed.error_code)

    def wait(self, what: str, check, timeout: float = 10):
        end = time.monotonic() + timeout * PATIENCE
        with self.changed:
            while not (value := check()):
                left = end - time.monotonic()
                assert left > 0, f"timed out after {timeout} s waiting for {what}; ended {self.ended}, closed {self.closed}, packets {self.packets}"
                self.changed.wait(left)
            return value

    def connect(self, client_id: str, **kwargs) -> wire.Packet:
        self.send(0, wire.connect(client_id, version=self.version, **kwargs))
        connack = self.recv()
        assert connack.kind == wire.CONNACK and connack.reason == 0, connack
        return connack

    def subscribe(self, stream: int, *filters: tuple[str, int], packet_id: int = 1) -> bytes:
        self.send(stream, wire.subscribe(packet_id, *filters, version=self.version))
        suback = self.recv(stream)
        assert (suback.kind, suback.packet_id) == (wire.SUBACK, packet_id), suback
        return suback.codes

    def pinged(self) -> "Phone":
        """Asserts that the server serves the control stream, and so the connection."""
        self.send(0, wire.PING)
        assert self.recv().kind == wire.PINGRESP
        return self

    def move(self, host: str = "127.0.0.1") -> int:
        """Continues from another port, with another connection identifier, as RFC 9000 section 9.5 demands."""
        return call(self._move(True, host))

    def rebind(self) -> int:
        """Continues from another port without noticing it, as behind a NAT."""
        return call(self._move(False))

    async def _move(self, knowing: bool, host: str = "127.0.0.1") -> int:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setblocking(False)
        sock.bind((host, 0))
        protocol, old = self.protocol, self.protocol._transport

        class Forward(asyncio.DatagramProtocol):
            def datagram_received(self, data, addr):
                protocol.datagram_received(data, addr)

        protocol._transport, _ = await loop().create_datagram_endpoint(Forward, sock=sock)
        old.abort()
        if knowing:
            self.quic.change_connection_id()
        self.port = sock.getsockname()[1]
        return self.port

    def vanish(self) -> None:
        """Stops sending, without a CONNECTION_CLOSE."""

        async def run():
            self.protocol._transport.abort()
            if self.protocol._timer is not None:
                self.protocol._timer.cancel()

        call(run())

    def close(self, code: int = 0) -> None:
        async def run():
            self.protocol.close(error_code=code)
            self.protocol.transmit()

        call(run())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.closed is None:
            try:
                self.close()
            except Exception:
                pass
