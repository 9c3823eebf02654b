//! One accepted connection, whatever carries it.

use std::net::{Ipv4Addr, SocketAddr};
use std::task::{Context, Poll};

use tokio::io::DuplexStream;
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

use crate::transport::quic::Quic;
use crate::transport::tcp::{self, Closing};
use crate::transport::ws::Ws;
use crate::transport::{ClientCertificate, CloseHow, Closed, Kind, OutBuf, Recv, Traffic};

/// The byte stream of one connection; see the methods. To be polled by one
/// task only.
#[derive(Debug)]
pub struct Stream {
    inner: Inner,
    peer: SocketAddr,
    /// Boxed: few have one, and it is taken at CONNECT.
    client: Option<Box<ClientCertificate>>,
}

/// An end found behind bytes, and how far a close has come.
#[derive(Debug)]
struct Plain<S> {
    io: S,
    ended: Option<Closed>,
    closing: Closing,
}

// What is large is boxed, so that a task that holds a Stream stays small.
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

fn control(received: Result<usize, Closed>) -> Result<Recv, Closed> {
    received.map(|bytes| Recv {
        stream: 0,
        bytes,
        finished: false,
    })
}

impl Stream {
    pub(super) fn tcp(io: TcpStream, peer: SocketAddr) -> Self {
        Self {
            inner: Inner::Tcp(Plain::new(io)),
            peer,
            client: None,
        }
    }

    pub(super) fn tls(io: TlsStream<TcpStream>, peer: SocketAddr) -> Self {
        Self {
            inner: Inner::Tls(Box::new(Plain::new(io))),
            peer,
            client: None,
        }
    }

    pub(super) fn ws(ws: Ws<TcpStream>, peer: SocketAddr) -> Self {
        Self {
            inner: Inner::Ws(Box::new(ws)),
            peer,
            client: None,
        }
    }

    pub(super) fn wss(ws: Ws<TlsStream<TcpStream>>, peer: SocketAddr) -> Self {
        Self {
            inner: Inner::Wss(Box::new(ws)),
            peer,
            client: None,
        }
    }

    pub(super) fn quic(quic: Quic, peer: SocketAddr) -> Self {
        Self {
            inner: Inner::Quic(Box::new(quic)),
            peer,
            client: None,
        }
    }

    /// Says whose it is.
    pub(super) fn of(mut self, client: Option<Box<ClientCertificate>>) -> Self {
        self.client = client;
        self
    }

    /// The client's certificate, if it gave one; it was verified. There is
    /// none any more afterwards.
    pub fn take_certificate(&mut self) -> Option<Box<ClientCertificate>> {
        self.client.take()
    }

    /// An in-memory connection; it says it is TCP from 127.0.0.1:0.
    pub fn pipe(io: DuplexStream) -> Self {
        Self {
            inner: Inner::Pipe(Box::new(Plain::new(io))),
            peer: (Ipv4Addr::LOCALHOST, 0).into(),
            client: None,
        }
    }

    /// Appends received bytes of one stream to `buf`, at most about 64 KiB.
    ///
    /// Cancel safe; while pending it holds no memory and `buf` is untouched.
    /// Bytes that came before an end are always returned before it.
    ///
    /// # Errors
    /// [`Closed::StreamReset`] if the peer broke that stream off (RESET_STREAM or
    /// STOP_SENDING); anything else is the connection's end, and
    /// [`Stream::poll_close`] should follow.
    pub fn poll_recv(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut Vec<u8>,
    ) -> Poll<Result<Recv, Closed>> {
        match &mut self.inner {
            Inner::Tcp(p) => tcp::poll_recv(&mut p.io, cx, buf, &mut p.ended).map(control),
            Inner::Tls(p) => tcp::poll_recv(&mut p.io, cx, buf, &mut p.ended).map(control),
            Inner::Pipe(p) => tcp::poll_recv(&mut p.io, cx, buf, &mut p.ended).map(control),
            Inner::Ws(ws) => ws.poll_recv(cx, buf).map(control),
            Inner::Wss(ws) => ws.poll_recv(cx, buf).map(control),
            Inner::Quic(quic) => quic.poll_recv(cx, buf),
        }
    }

    /// Hands `out` to the peer on `stream`; ready when all of it is written and
    /// flushed, and then `out` is empty. More may be appended to `out.buf`
    /// between calls; nothing may be removed.
    ///
    /// # Errors
    /// [`Closed::StreamReset`] if only that stream is gone (what of `out` was not taken
    /// is still there); anything else is the connection's end.
    pub fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        stream: u8,
        out: &mut OutBuf,
    ) -> Poll<Result<(), Closed>> {
        if stream != 0 && !matches!(self.inner, Inner::Quic(_)) {
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

    /// Ends the connection so that what was sent before arrives: WebSocket
    /// close frame, TLS close_notify, TCP FIN; QUIC FIN, then CONNECTION_CLOSE
    /// once the peer has all. Waits for the peer's end, so the caller bounds it
    /// with a timeout; to drop the stream then is right.
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

    /// Sends a WebSocket ping, so that proxies between do not cut an idle
    /// connection; the caller has the timer. Nothing happens elsewhere.
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

    /// The client is known: the message limit of WebSocket rises from
    /// `frame_before_auth` to [`Limits::message_max`](crate::transport::Limits::message_max),
    /// and data streams of QUIC are read, and its client may send more unread.
    pub fn authenticated(&mut self) {
        match &mut self.inner {
            Inner::Ws(ws) => ws.authenticated(),
            Inner::Wss(ws) => ws.authenticated(),
            Inner::Quic(quic) => quic.authenticated(),
            Inner::Tcp(_) | Inner::Tls(_) | Inner::Pipe(_) => {}
        }
    }

    /// Aborts one QUIC data stream in both directions (RESET_STREAM and
    /// STOP_SENDING with `code`); the connection goes on. Lane 0 and other
    /// kinds are left alone.
    pub fn reset_stream(&mut self, stream: u8, code: u32) {
        if let Inner::Quic(quic) = &mut self.inner {
            quic.reset_stream(stream, code);
        }
    }

    /// What was sent and acknowledged; of other kinds than QUIC nothing is known.
    pub fn traffic(&self) -> Traffic {
        match &self.inner {
            Inner::Quic(quic) => quic.traffic(),
            _ => Traffic::default(),
        }
    }

    /// Leaves the QUIC data streams that are set in `streams` unread, and reads the
    /// others again from the next [`Stream::poll_recv`] on. Lane 0 and other
    /// kinds are not concerned.
    pub fn pause_streams(&mut self, streams: u16) {
        if let Inner::Quic(quic) = &mut self.inner {
            quic.pause_streams(streams);
        }
    }

    /// Whether it may carry more than stream 0.
    pub fn has_data_streams(&self) -> bool {
        matches!(self.inner, Inner::Quic(_))
    }

    /// Ends our direction of a QUIC data stream whose other one the peer has
    /// ended: to be called once it has all its answers. Others are left alone.
    pub fn finish_stream(&mut self, stream: u8) {
        if let Inner::Quic(quic) = &mut self.inner {
            quic.finish_stream(stream);
        }
    }

    /// The peer's new address, if it changed since this was asked last (RFC
    /// 9000 section 9); noticed when something is read.
    pub fn take_new_peer(&mut self) -> Option<SocketAddr> {
        match &mut self.inner {
            Inner::Quic(quic) => quic.take_new_peer(),
            _ => None,
        }
    }

    /// The peer's address; for QUIC the current one (RFC 9000 section 9).
    pub fn peer_addr(&self) -> SocketAddr {
        match &self.inner {
            Inner::Quic(quic) => quic.remote_address(),
            _ => self.peer,
        }
    }

    /// What carries it.
    pub fn kind(&self) -> Kind {
        match self.inner {
            Inner::Tcp(_) | Inner::Pipe(_) => Kind::Tcp,
            Inner::Tls(_) => Kind::Tls,
            Inner::Ws(_) => Kind::Ws,
            Inner::Wss(_) => Kind::Wss,
            Inner::Quic(ref quic) => quic.kind(),
        }
    }
}
