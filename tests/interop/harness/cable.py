"""A TCP forwarder that can be cut: both ends see a lost network."""

from __future__ import annotations

import asyncio
import socket
import struct

from .loop import call


class Cable:
    """127.0.0.1:`port` leads to `target`; `cut` resets every connection through it."""

    def __init__(self, target: int, delay: float = 0):
        """`delay`: extra seconds for bytes from the target to the client."""
        self.target = target
        self.delay = delay
        self._plugged = True
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task] = set()
        self._server = call(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Cuts abruptly, with RST to both sides, as when a phone leaves its cell."""
        call(self._cut())

    def unplug(self) -> None:
        """Cuts every connection and refuses new ones until `plug`."""
        self._plugged = False
        self.cut()

    def plug(self) -> None:
        self._plugged = True

    def close(self) -> None:
        call(self._close())

    async def _cut(self) -> None:
        for writer in list(self._writers):
            _reset(writer)

    async def _close(self) -> None:
        self._server.close()
        await self._cut()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._plugged:
            return _reset(writer)
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            return _reset(writer)
        for one in (writer, far_writer):
            one.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pair = {writer, far_writer}
        self._writers |= pair
        try:
            await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer, self.delay))
        finally:
            self._writers -= pair
            for one in pair:
                one.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float = 0) -> None:
    try:
        while data := await reader.read(65536):
            if delay:
                await asyncio.sleep(delay)
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
    except (OSError, RuntimeError):
        writer.transport.abort()


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    if sock is not None:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            pass
    writer.transport.abort()
