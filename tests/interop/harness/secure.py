"""TLS and QUIC clients that show the outcome of the handshake: the server's certificate, an alert, a resumption."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionTerminated
from aioquic.tls import SessionTicket
from cryptography import x509

from . import raw as raws
from . import wire
from .loop import call
from .pki import Leaf
from .process import PATIENCE
from .quic_relay import vanish

ALERTS = {42: "bad_certificate", 44: "certificate_revoked", 45: "certificate_expired", 48: "unknown_ca", 116: "certificate_required"}
# OpenSSL's names of these alerts.
REASONS = {
    "SSLV3_ALERT_BAD_CERTIFICATE": "bad_certificate",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "certificate_revoked",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "certificate_expired",
    "TLSV1_ALERT_UNKNOWN_CA": "unknown_ca",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "certificate_required",
}


class Refused(Exception):
    """The server ended the handshake; `alert` is the alert's name, or `None` without an alert."""

    def __init__(self, alert: str | None):
        super().__init__(alert)
        self.alert = alert


def subject(cert: x509.Certificate) -> str:
    return cert.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value


@dataclass
class Visit:
    """A connection that got a CONNACK."""

    connack: wire.Packet
    server: str
    resumed: bool
    ticket: object
    live: object

    def ping(self) -> bool:
        return self.live.ping()

    def close(self) -> None:
        self.live.close()


class Tls:
    """OpenSSL over `tls` or `wss`; one context, so that a session can be resumed."""

    def __init__(self, transport: str, port: int, ca, leaf: Leaf | None = None, version: ssl.TLSVersion | None = None, name: str = "localhost", keys=None):
        self.transport, self.port, self.name = transport, port, name
        self.context = ssl.create_default_context(cafile=str(ca))
        # The test itself checks the name in the certificate.
        self.context.check_hostname = False
        if version:
            self.context.minimum_version = self.context.maximum_version = version
        if leaf:
            self.context.load_cert_chain(leaf.cert, leaf.key)
        if keys:
            self.context.keylog_filename = str(keys)

    def visit(self, client_id: str, ticket=None, **kwargs) -> Visit:
        """Sends CONNECT and PINGREQ; a ticket comes with the first bytes of the answer."""
        link = Link(self, ticket)
        try:
            if link.alert:
                raise raws.Closed  # in place of an answer to the upgrade
            connack = link.connect(client_id, **kwargs)
            if connack.reason == 0:
                assert link.ping()
        except raws.Closed:
            raise Refused(link.alert) from None
        server = subject(x509.load_der_x509_certificate(link.sock.getpeercert(True)))
        return Visit(connack, server, link.sock.session_reused, link.sock.session, link)


class Link(raws.Raw):
    """A `Raw` that records the TLS alert at its end."""

    def __init__(self, to: Tls, session):
        self.alert: str | None = None
        self.to, self.session = to, session
        super().__init__(to.port, to.transport, subprotocol="mqtt")

    def _wrap(self, sock, ca):
        try:
            return self.to.context.wrap_socket(sock, server_hostname=self.to.name, session=self.session)
        except ssl.SSLError as error:
            raise Refused(REASONS.get(error.reason, error.reason)) from None
        except OSError:
            raise Refused(None) from None

    def _lost(self, error: Exception) -> None:
        if isinstance(error, ssl.SSLError):
            self.alert = REASONS.get(error.reason, error.reason)

    def ping(self) -> bool:
        return self.send(wire.PING).recv().kind == wire.PINGRESP


class Quic:
    """A client over `quic`, made with aioquic."""

    def __init__(self, transport: str, port: int, ca, leaf: Leaf | None = None, version=None, name: str = "localhost", keys=None):
        self.port, self.ca, self.leaf, self.name, self.keys = port, ca, leaf, name, keys

    def visit(self, client_id: str, ticket=None, **kwargs) -> Visit:
        return call(self._visit(client_id, ticket, kwargs))

    async def _visit(self, client_id: str, ticket, kwargs) -> Visit:
        configuration = QuicConfiguration(is_client=True, alpn_protocols=["mqtt"], server_name=self.name, idle_timeout=60, session_ticket=ticket)
        configuration.load_verify_locations(str(self.ca))
        if self.name != "localhost":
            # The test itself checks the name in the certificate; aioquic cannot turn off that check alone.
            configuration.verify_mode = ssl.CERT_NONE
        if self.leaf:
            configuration.load_cert_chain(self.leaf.cert, self.leaf.key)
        log = open(self.keys, "a") if self.keys else None
        configuration.secrets_log_file = log
        live = Live(QuicConnection(configuration=configuration, session_ticket_handler=lambda t: live.tickets.append(t)))
        try:
            await asyncio.get_running_loop().create_datagram_endpoint(lambda: live, local_addr=("127.0.0.1", 0))
            live.connect(("127.0.0.1", self.port))
            return await asyncio.wait_for(live.visit(client_id, kwargs), 10 * PATIENCE)
        except BaseException:
            vanish(live)
            raise
        finally:
            if log:
                log.close()


class Live(QuicConnectionProtocol):
    """A QUIC connection with its control stream."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tickets: list[SessionTicket] = []
        self.ended: ConnectionTerminated | None = None

    def quic_event_received(self, event) -> None:
        if isinstance(event, ConnectionTerminated):
            self.ended = event
        super().quic_event_received(event)

    async def visit(self, client_id: str, kwargs) -> Visit:
        try:
            await self.wait_connected()
            self.reader, self.writer = await self.create_stream()
            connack = await self.exchange(wire.connect(client_id, **kwargs))
        except (ConnectionError, AssertionError):
            connack = None
        if connack is None:
            if self.ended is None:
                await self.wait_closed()
            code = self.ended.error_code
            raise Refused(ALERTS.get(code - 0x100, hex(code)) if 0x100 <= code < 0x200 else None)
        if connack.reason == 0:
            assert (await self.exchange(wire.PING)).kind == wire.PINGRESP
        tls = self._quic.tls
        server = subject(tls._peer_certificate) if tls._peer_certificate else ""
        return Visit(connack, server, tls.session_resumed, self.tickets[-1] if self.tickets else None, Handle(self))

    async def exchange(self, packet: bytes) -> wire.Packet | None:
        self.writer.write(packet)
        buffer = bytearray()
        while True:
            chunk = await self.reader.read(65536)
            if not chunk:
                return None
            buffer += chunk
            if packets := wire.split(buffer):
                return packets[0]


class Handle:
    """`Live` from another thread."""

    def __init__(self, live: Live):
        self.live = live

    def ping(self) -> bool:
        return call(self.live.exchange(wire.PING)).kind == wire.PINGRESP

    def close(self) -> None:
        async def close():
            self.live.close()

        call(close())


def way_in(transport: str, *args, **kwargs) -> Tls | Quic:
    return (Quic if transport == "quic" else Tls)(transport, *args, **kwargs)


