"""aioquic as an MQTT-over-QUIC client: a local TCP port whose bytes run over a QUIC stream.

Each TCP connection becomes one QUIC connection (ALPN `mqtt`) and its first client
bidirectional stream, so any MQTT client library can be used over QUIC unchanged.
"""

from __future__ import annotations

import asyncio
import socket

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionTerminated, QuicEvent

from .cable import _reset
from .loop import call, loop
from .process import PATIENCE


class Mqtt(QuicConnectionProtocol):
    """Records the end of the connection."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ended: ConnectionTerminated | None = None

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, ConnectionTerminated):
            self.ended = event
        super().quic_event_received(event)


async def dial(port: int, ca, alpn: list[str], local_port: int = 0) -> Mqtt:
    configuration = QuicConfiguration(is_client=True, alpn_protocols=alpn, server_name="localhost", idle_timeout=60)
    configuration.load_verify_locations(str(ca))
    _, protocol = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: Mqtt(QuicConnection(configuration=configuration)), local_addr=("127.0.0.1", local_port)
    )
    protocol.connect(("127.0.0.1", port))
    try:
        await asyncio.wait_for(protocol.wait_connected(), 10 * PATIENCE)
    except BaseException:
        if protocol.ended is not None:
            ended = protocol.ended
            vanish(protocol)
            raise ConnectionError(f"QUIC {ended.error_code:#x}: {ended.reason_phrase}") from None
        vanish(protocol)
        raise
    return protocol


def vanish(protocol: Mqtt) -> None:
    """Sends nothing to the far end any more, not even a CONNECTION_CLOSE."""
    protocol._transport.abort()
    protocol._transport = Nowhere()
    for reader in protocol._stream_readers.values():
        reader.feed_eof()


class Nowhere(asyncio.DatagramTransport):
    """Drops every datagram that is sent."""

    def sendto(self, data, addr=None) -> None:
        pass

    def close(self) -> None:
        pass

    abort = close


class QuicRelay:
    """127.0.0.1:`port` (TCP) leads to a QUIC listener."""

    def __init__(self, target: int, ca, alpn: tuple[str, ...] = ("mqtt",)):
        self.target, self.ca, self.alpn = target, ca, list(alpn)
        self.connections: dict[asyncio.StreamWriter, Mqtt] = {}
        self.last: Mqtt | None = None
        self._server = call(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Cuts abruptly: the UDP sockets close without a packet, and the TCP side is reset."""
        call(self._cut())

    def second_stream(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Opens another client bidirectional stream on the newest connection."""
        return call(self.last.create_stream())

    def rebind(self) -> None:
        """Continues the newest connection from another UDP port, as after a NAT timeout."""
        call(self._rebind())

    def close(self) -> None:
        call(self._close())

    async def _cut(self) -> None:
        for writer, protocol in list(self.connections.items()):
            vanish(protocol)
            _reset(writer)
        self.connections.clear()

    async def _rebind(self) -> None:
        old = self.last._transport
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setblocking(False)
        sock.bind(("127.0.0.1", 0))
        protocol = self.last

        class Forward(asyncio.DatagramProtocol):
            def datagram_received(self, data, addr):
                protocol.datagram_received(data, addr)

        fresh, _ = await loop().create_datagram_endpoint(Forward, sock=sock)
        protocol._transport = fresh
        old.abort()

    async def _close(self) -> None:
        self._server.close()
        await self._cut()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            protocol = await dial(self.target, self.ca, self.alpn)
        except (ConnectionError, asyncio.TimeoutError):
            return _reset(writer)
        self.connections[writer] = protocol
        self.last = protocol
        stream_reader, stream_writer = await protocol.create_stream()
        try:
            await asyncio.gather(_up(reader, stream_writer, protocol), _down(stream_reader, writer))
        finally:
            if self.connections.pop(writer, None) is not None:
                protocol.close()
                protocol.transmit()
            writer.close()


async def _up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, protocol: Mqtt) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
        writer.write_eof()
    except (OSError, AssertionError):
        protocol.close(error_code=0)


async def _down(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        return
    # The control stream has ended: for a TCP client that is the end of the connection.
    if writer.can_write_eof():
        try:
            writer.write_eof()
        except OSError:
            pass
