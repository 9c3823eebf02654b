"""A UDP forwarder that can be cut, so that QUIC sees a lost network."""

from __future__ import annotations

import socket

from .loop import call, loop


class UdpCable:
    """127.0.0.1:`port` (UDP) leads to `target`."""

    def __init__(self, target: int):
        self.target = target
        self._plugged = True
        self._back: dict[tuple, socket.socket] = {}
        self._dead: set[tuple] = set()
        self._front: socket.socket | None = None
        self.port = 0
        call(self._open())

    def cut(self) -> None:
        """Silences every present connection for good; new ones from other ports pass."""
        call(self._cut())

    def unplug(self) -> None:
        """Cuts and drops all datagrams of new connections until `plug`: UDP is blocked."""
        self._plugged = False
        self.cut()

    def plug(self) -> None:
        self._plugged = True

    def kill(self) -> None:
        """Closes the port, so that the system answers with port unreachable."""
        call(self._close())

    def revive(self) -> None:
        call(self._open())

    close = kill

    async def _open(self) -> None:
        self._front = _socket()
        self._front.bind(("127.0.0.1", self.port))
        self.port = self._front.getsockname()[1]
        loop().add_reader(self._front, self._forward)

    async def _cut(self) -> None:
        self._dead |= set(self._back)
        for back in self._back.values():
            _drop(back)
        self._back.clear()

    async def _close(self) -> None:
        if self._front is not None:
            _drop(self._front)
            self._front = None
        await self._cut()

    def _forward(self) -> None:
        for data, client in _received(self._front):
            if not self._plugged or client in self._dead:
                continue
            back = self._back.get(client)
            if back is None:
                back = self._back[client] = _socket()
                back.connect(("127.0.0.1", self.target))
                loop().add_reader(back, self._return, back, client)
            _send(back.send, data)

    def _return(self, back: socket.socket, client: tuple) -> None:
        for data, _ in _received(back):
            if self._front is not None:
                _send(self._front.sendto, data, client)


def _socket() -> socket.socket:
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    one.setblocking(False)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    return one


def _drop(one: socket.socket) -> None:
    loop().remove_reader(one)
    one.close()


def _received(one: socket.socket):
    while one.fileno() >= 0:
        try:
            yield one.recvfrom(65536)
        except OSError:
            # No datagram is left, or the far end is gone; its peers must notice that themselves.
            return


def _send(send, *args) -> None:
    try:
        send(*args)
    except OSError:
        pass
