"""A path from a client to a listener that can be cut, the same for all five transports."""

from __future__ import annotations

from .cable import Cable
from .edge import Edge
from .quic_relay import QuicRelay


class Way:
    """`port` on 127.0.0.1 leads to the listener of that name."""

    def __init__(self, edge: Edge, transport: str, name: str | None = None):
        self.transport = transport
        self.listening = edge[name or transport]
        self.path = self.listening.path
        self.ca = edge.pki.ca
        quic = transport == "quic"
        self.line = QuicRelay(self.listening.port, self.ca) if quic else Cable(self.listening.port)
        self.port = self.line.port

    def cut(self) -> None:
        self.line.cut()

    def close(self) -> None:
        self.line.close()


class BrokerWay:
    """The broker itself, as a path for paho."""

    def __init__(self, broker):
        self.port, self.transport, self.path, self.ca = broker.port, "tcp", "", None

    def cut(self) -> None: ...

    def close(self) -> None: ...
