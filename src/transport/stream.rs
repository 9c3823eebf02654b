//! One accepted connection over any transport.

use std::net::SocketAddr;
use std::task::{Context, Poll};

use tokio::io::DuplexStream;
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

use crate::config::Transport;
use crate::outbuf::OutBuf;
use crate::streams::{StreamId, StreamSet};
use crate::transport::closed::Closed;
use crate::transport::quic::streams::Quic;
use crate::transport::tcp::{self, Closing};
use crate::transport::tls::clients::ClientCertificate;
use crate::transport::types::{Arrivals, CloseHow, Recv, Traffic};
use crate::transport::ws::Ws;

/// The byte streams of one connection. Only one task may poll it.
#[derive(Debug)]
pub struct Stream {
    inner: Inner,
    /// Boxed, because few clients have one and it is taken at CONNECT.
    client: Option<Box<ClientCertificate>>,
}

/// A connection without framing.
#[derive(Debug)]
struct Plain<S> {
    io: S,
    /// An end that was found behind bytes, for the next read.
    ended: Option<Closed>,
    closing: Closing,
}

// The large variants are boxed, so that a task that holds a Stream stays small.
#[derive(Debug)]
enum Inner {
    Tcp(Plain<TcpStream>),
    Tls(Box<Plain<TlsStream<TcpStream>>>),
    Ws(Box<Ws<TcpStream>>),
    Wss(Box<Ws<TlsStream<TcpStream>>>),
    Quic(Box<Quic>),
    Pipe(Box<Plain<DuplexStream>>),
}

impl<S> Plain<S> {
    fn new(io: S) -> Self {
        Self {
            io,
            ended: None,
            closing: Closing::default(),
        }
    }
}

fn on_control(received: Result<usize, Closed>) -> Result<Recv, Closed> {
    received.map(|bytes| Recv {
        stream: StreamId::CONTROL,
        bytes,
        finished: false,
    })
}

impl Stream {
    pub(super) fn tcp(io: TcpStream) -> Self {
        Self {
            inner: Inner::Tcp(Plain::new(io)),
            client: None,
        }
    }

    pub(super) fn tls(io: TlsStream<TcpStream>) -> Self {
        Self {
            inner: Inner::Tls(Box::new(Plain::new(io))),
            client: None,
        }
    }

    pub(super) fn ws(ws: Ws<TcpStream>) -> Self {
        Self {
            inner: Inner::Ws(Box::new(ws)),
            client: None,
        }
    }

    pub(super) fn wss(ws: Ws<TlsStream<TcpStream>>) -> Self {
        Self {
            inner: Inner::Wss(Box::new(ws)),
            client: None,
        }
    }

    pub(super) fn quic(quic: Quic) -> Self {
        Self {
            inner: Inner::Quic(Box::new(quic)),
            client: None,
        }
    }

    /// Adds the client's verified certificate.
    pub(super) fn with_certificate(mut self, client: Option<Box<ClientCertificate>>) -> Self {
        self.client = client;
        self
    }

    /// Takes the client's verified certificate, if it gave one.
    pub fn take_certificate(&mut self) -> Option<Box<ClientCertificate>> {
        self.client.take()
    }

    /// An in-memory connection, which reports TCP.
    pub fn pipe(io: DuplexStream) -> Self {
        Self {
            inner: Inner::Pipe(Box::new(Plain::new(io))),
            client: None,
        }
    }

    /// Appends received bytes of one stream to `buf`, at most about 64 KiB.
    ///
    /// Cancel safe. While it is pending, it holds no memory and `buf` is unchanged. Bytes that were
    /// received before an end are always returned before it.
    ///
    /// # Errors
    /// [`Closed::StreamReset`] if the peer reset that data stream (RESET_STREAM or STOP_SENDING).
    /// Any other error is the connection's end, and [`Stream::poll_close`] should follow.
    pub fn poll_recv(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut Vec<u8>,
    ) -> Poll<Result<Recv, Closed>> {
        match &mut self.inner {
            Inner::Tcp(p) => tcp::poll_recv(&mut p.io, cx, buf, &mut p.ended).map(on_control),
            Inner::Tls(p) => tcp::poll_recv(&mut p.io, cx, buf, &mut p.ended).map(on_control),
            Inner::Pipe(p) => tcp::poll_recv(&mut p.io, cx, buf, &mut p.ended).map(on_control),
            Inner::Ws(ws) => ws.poll_recv(cx, buf).map(on_control),
            Inner::Wss(ws) => ws.poll_recv(cx, buf).map(on_control),
            Inner::Quic(quic) => quic.poll_recv(cx, buf),
        }
    }

    /// Whether bytes or an end have arrived that [`Stream::poll_recv`], which is pending, did not return
    /// yet.
    pub fn arrivals(&self) -> Arrivals {
        let socket = match &self.inner {
            Inner::Tcp(p) => &p.io,
            Inner::Tls(p) => p.io.get_ref().0,
            Inner::Ws(ws) => ws.io(),
            Inner::Wss(ws) => ws.io().get_ref().0,
            Inner::Pipe(_) => return Arrivals::None,
            // A datagram passes through two tasks of the library before its bytes can be read.
            Inner::Quic(_) => return Arrivals::Unknown,
        };
        match tcp::has_arrivals(socket) {
            true => Arrivals::Some,
            false => Arrivals::None,
        }
    }

    /// Sends `out` on the stream of this number. Ready when all bytes are written and flushed; then
    /// `out` is empty. Between calls, bytes may be appended to `out.buf`, but not removed.
    ///
    /// # Errors
    /// [`Closed::StreamReset`] if only that data stream is gone; the bytes that were not taken are
    /// still in `out`. Any other error is the connection's end.
    pub fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        stream: StreamId,
        out: &mut OutBuf,
    ) -> Poll<Result<(), Closed>> {
        if !stream.is_control() && !matches!(self.inner, Inner::Quic(_)) {
            return Poll::Ready(Err(Closed::StreamReset(stream)));
        }
        match &mut self.inner {
            Inner::Tcp(p) => tcp::poll_send(&mut p.io, cx, out),
            Inner::Tls(p) => tcp::poll_send(&mut p.io, cx, out),
            Inner::Pipe(p) => tcp::poll_send(&mut p.io, cx, out),
            Inner::Ws(ws) => ws.poll_send(cx, out),
            Inner::Wss(ws) => ws.poll_send(cx, out),
            Inner::Quic(quic) => quic.poll_send(cx, stream, out),
        }
    }

    /// Whether the client has closed the WebSocket, and [`poll_send`](Self::poll_send) and
    /// [`poll_close`](Self::poll_close) have yet to complete the frame under way and the answer (RFC 6455 §5.5.1).
    pub fn owes_close(&self) -> bool {
        match &self.inner {
            Inner::Ws(ws) => ws.owes_close(),
            Inner::Wss(ws) => ws.owes_close(),
            _ => false,
        }
    }

    /// Ends the connection so that all bytes that were sent before arrive: WebSocket close frame, TLS
    /// close_notify, TCP FIN; QUIC FIN, then CONNECTION_CLOSE once the peer has everything. It waits
    /// for the peer's end, so the caller bounds it with a timeout and then drops the stream.
    pub fn poll_close(&mut self, cx: &mut Context<'_>, how: CloseHow) -> Poll<()> {
        match &mut self.inner {
            Inner::Tcp(p) => tcp::poll_close(&mut p.io, cx, &mut p.closing),
            Inner::Tls(p) => tcp::poll_close(&mut p.io, cx, &mut p.closing),
            Inner::Pipe(p) => tcp::poll_close(&mut p.io, cx, &mut p.closing),
            Inner::Ws(ws) => ws.poll_close(cx, how),
            Inner::Wss(ws) => ws.poll_close(cx, how),
            Inner::Quic(quic) => quic.poll_close(cx, how),
        }
    }

    /// Sends a WebSocket ping, so that proxies in between do not cut an idle connection. The caller has
    /// the timer. Other transports ignore it.
    ///
    /// # Errors
    /// The connection's end.
    pub fn poll_ping(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Closed>> {
        match &mut self.inner {
            Inner::Ws(ws) => ws.poll_ping(cx),
            Inner::Wss(ws) => ws.poll_ping(cx),
            _ => Poll::Ready(Ok(())),
        }
    }

    /// The client is authenticated: the limit of a WebSocket message rises to
    /// [`Limits::message_max`](crate::transport::Limits::message_max), QUIC's data streams are read,
    /// and a QUIC client may send more unread bytes.
    pub fn authenticated(&mut self) {
        match &mut self.inner {
            Inner::Ws(ws) => ws.authenticated(),
            Inner::Wss(ws) => ws.authenticated(),
            Inner::Quic(quic) => quic.authenticated(),
            Inner::Tcp(_) | Inner::Tls(_) | Inner::Pipe(_) => {}
        }
    }

    /// Aborts one data stream in both directions (RESET_STREAM and STOP_SENDING with `code`). The
    /// connection goes on. The control stream and other transports are left alone.
    pub fn reset_stream(&mut self, stream: StreamId, code: u32) {
        if let Inner::Quic(quic) = &mut self.inner {
            quic.reset_stream(stream, code);
        }
    }

    /// The bytes that were sent and acknowledged. Only QUIC counts them.
    pub fn traffic(&self) -> Traffic {
        match &self.inner {
            Inner::Quic(quic) => quic.traffic(),
            _ => Traffic::default(),
        }
    }

    /// Pauses reading of the data streams in `streams`, and
    /// resumes all others from the next [`Stream::poll_recv`] on. The control stream and other
    /// transports are left alone.
    pub fn pause_streams(&mut self, streams: StreamSet) {
        if let Inner::Quic(quic) = &mut self.inner {
            quic.pause_streams(streams);
        }
    }

    /// Whether the client can open data streams.
    pub fn has_data_streams(&self) -> bool {
        matches!(self.inner, Inner::Quic(_))
    }

    /// Ends our direction of a data stream whose other direction the peer has ended. The caller calls
    /// it once all answers are sent. Other streams are left alone.
    pub fn finish_stream(&mut self, stream: StreamId) {
        if let Inner::Quic(quic) = &mut self.inner {
            quic.finish_stream(stream);
        }
    }

    /// The peer's new address, if it changed since the last call (RFC 9000 section 9). A change is
    /// noticed when something is read.
    pub fn take_new_peer(&mut self) -> Option<SocketAddr> {
        match &mut self.inner {
            Inner::Quic(quic) => quic.take_new_peer(),
            _ => None,
        }
    }

    /// The peer's current address, where it can change within a connection: over QUIC (RFC 9000
    /// section 9).
    pub fn current_peer(&self) -> Option<SocketAddr> {
        match &self.inner {
            Inner::Quic(quic) => Some(quic.remote_address()),
            _ => None,
        }
    }

    /// The transport of this connection.
    pub fn transport(&self) -> Transport {
        match self.inner {
            Inner::Tcp(_) | Inner::Pipe(_) => Transport::Tcp,
            Inner::Tls(_) => Transport::Tls,
            Inner::Ws(_) => Transport::Ws,
            Inner::Wss(_) => Transport::Wss,
            Inner::Quic(ref quic) => quic.transport(),
        }
    }
}
