"""aioquic as a WebTransport client: one session, its streams, and plain HTTP/3 beside it."""

from __future__ import annotations

import asyncio

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.h3.connection import H3Connection
from aioquic.h3.events import HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionTerminated, StreamDataReceived

from . import wire
from .process import PATIENCE


class Http3(QuicConnectionProtocol):
    """One connection with ALPN `h3`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.http = H3Connection(self._quic, enable_webtransport=True)
        self.answers: dict[int, asyncio.Future] = {}
        self.received: dict[int, asyncio.Queue] = {}
        self.ended: asyncio.Future = self._loop.create_future()

    def quic_event_received(self, event) -> None:
        if isinstance(event, ConnectionTerminated) and not self.ended.done():
            self.ended.set_result(event)
        # aioquic takes bytes on a stream that the client opened for an HTTP answer.
        if isinstance(event, StreamDataReceived) and event.stream_id in self.received:
            return self.received[event.stream_id].put_nowait(event.data)
        for one in self.http.handle_event(event):
            if isinstance(one, HeadersReceived):
                self.answers[one.stream_id].set_result(dict(one.headers))

    async def ask(self, method: str, path: str, end: bool = False, **headers: str) -> tuple[int, int]:
        """Returns the stream and the status."""
        stream = self._quic.get_next_available_stream_id()
        self.answers[stream] = self._loop.create_future()
        protocol = [(b":protocol", b"webtransport")] if method == "CONNECT" else []
        pseudo = [(b":method", method.encode()), (b":scheme", b"https"), (b":authority", b"localhost"), (b":path", path.encode()), *protocol]
        self.http.send_headers(stream, pseudo + [(k.encode(), v.encode()) for k, v in headers.items()], end_stream=end)
        self.transmit()
        answer = await asyncio.wait_for(self.answers[stream], 10 * PATIENCE)
        return stream, int(answer[b":status"])

    def open(self, session: int) -> int:
        """Opens a stream of the session."""
        stream = self.http.create_webtransport_stream(session)
        self.received[stream] = asyncio.Queue()
        return stream

    def send(self, stream: int, data: bytes) -> None:
        self._quic.send_stream_data(stream, data)
        self.transmit()

    async def packets(self, stream: int, count: int) -> list[wire.Packet]:
        buffer, got = bytearray(), []
        while len(got) < count:
            buffer += await asyncio.wait_for(self.received[stream].get(), 10 * PATIENCE)
            got += wire.split(buffer)
        return got


async def dial(port: int, ca) -> Http3:
    # aioquic demands the datagram setting for WebTransport.
    configuration = QuicConfiguration(is_client=True, alpn_protocols=["h3"], server_name="localhost", idle_timeout=60, max_datagram_frame_size=65536)
    configuration.load_verify_locations(str(ca))
    _, protocol = await asyncio.get_running_loop().create_datagram_endpoint(lambda: Http3(QuicConnection(configuration=configuration)), local_addr=("127.0.0.1", 0))
    protocol.connect(("127.0.0.1", port))
    await asyncio.wait_for(protocol.wait_connected(), 10 * PATIENCE)
    return protocol
