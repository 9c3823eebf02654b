//! A byte stream over any transport, driven by one task, and the ways to break it off.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use futures_util::{Sink, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::{self, Message};

use crate::quic::{QuicStream, SessionStream};

/// An open byte stream.
#[derive(Debug)]
pub struct Link {
    io: Io,
    /// ws and wss: a message was handed over and has not been flushed.
    flushing: bool,
}

/// The ways in which a client vanishes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// TCP: RST. QUIC: CONNECTION_CLOSE. The client never sends DISCONNECT or a WebSocket close.
    Reset,
    /// TCP: FIN. QUIC: as `Reset`.
    Close,
    /// The client sends and receives nothing any more; the server has to detect that by itself.
    Silent,
}

/// The socket of a client that went silent; dropping it closes the socket.
#[derive(Debug)]
pub struct Abandoned(#[allow(dead_code, reason = "kept for its drop")] Option<Link>);

#[derive(Debug)]
enum Io {
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
    Ws(Box<WebSocketStream<TcpStream>>),
    Wss(Box<WebSocketStream<TlsStream<TcpStream>>>),
    Quic(Box<QuicStream>),
    WebTransport(Box<SessionStream>),
}

impl Link {
    /// A link over TCP.
    pub fn tcp(stream: TcpStream) -> Self {
        Self::new(Io::Tcp(stream))
    }

    pub(crate) fn tls(stream: TlsStream<TcpStream>) -> Self {
        Self::new(Io::Tls(Box::new(stream)))
    }

    pub(crate) fn ws(socket: WebSocketStream<TcpStream>) -> Self {
        Self::new(Io::Ws(Box::new(socket)))
    }

    pub(crate) fn wss(socket: WebSocketStream<TlsStream<TcpStream>>) -> Self {
        Self::new(Io::Wss(Box::new(socket)))
    }

    pub(crate) fn quic(stream: QuicStream) -> Self {
        Self::new(Io::Quic(Box::new(stream)))
    }

    pub(crate) fn webtransport(stream: SessionStream) -> Self {
        Self::new(Io::WebTransport(Box::new(stream)))
    }

    fn new(io: Io) -> Self {
        Self {
            io,
            flushing: false,
        }
    }

    /// Writes all of `out` and meanwhile reads into `into`. Returns as soon as bytes came or, if
    /// `out` was not empty, as soon as it is written. Cancel safe: unwritten bytes stay in `out`.
    /// Returns the number of bytes read, and false once the peer has ended the stream.
    ///
    /// # Errors
    /// The transport failed.
    pub async fn drive(
        &mut self,
        out: &mut BytesMut,
        into: &mut BytesMut,
    ) -> io::Result<(usize, bool)> {
        let writing = !out.is_empty() || self.flushing;
        poll_fn(|cx| {
            let written = if writing {
                Some(self.poll_write(cx, out)?)
            } else {
                None
            };
            match self.poll_read(cx, into) {
                Poll::Ready(Ok(0)) => Poll::Ready(Ok((0, false))),
                Poll::Ready(Ok(n)) => Poll::Ready(Ok((n, true))),
                Poll::Ready(Err(e)) => Poll::Ready(Err(e)),
                Poll::Pending if written == Some(Poll::Ready(())) => Poll::Ready(Ok((0, true))),
                Poll::Pending => Poll::Pending,
            }
        })
        .await
    }

    /// Reads some bytes; 0 at the end of the stream. Cancel safe.
    ///
    /// # Errors
    /// The transport failed.
    pub async fn recv(&mut self, into: &mut BytesMut) -> io::Result<usize> {
        poll_fn(|cx| self.poll_read(cx, into)).await
    }

    /// Writes all of `out`. Cancel safe as [`drive`](Self::drive).
    ///
    /// # Errors
    /// The transport failed.
    pub async fn flush(&mut self, out: &mut BytesMut) -> io::Result<()> {
        poll_fn(|cx| match self.poll_write(cx, out) {
            Ok(Poll::Ready(())) => Poll::Ready(Ok(())),
            Ok(Poll::Pending) => Poll::Pending,
            Err(e) => Poll::Ready(Err(e)),
        })
        .await
    }

    /// Breaks the link off. A silent cut leaves an open socket; the caller keeps it for as long as
    /// the server must not notice the cut.
    pub fn cut(self, how: Cut) -> Abandoned {
        match (how, &self.io) {
            (Cut::Silent, Io::Quic(quic)) => quic.mute(),
            (Cut::Silent, Io::WebTransport(session)) => session.mute(),
            (Cut::Silent, _) => return Abandoned(Some(self)),
            (_, Io::Quic(quic)) => quic.close(),
            (_, Io::WebTransport(session)) => session.close(),
            (Cut::Reset, _) => self.reset_on_drop(),
            (Cut::Close, _) => {}
        }
        Abandoned(None)
    }

    /// Ends the link in order: a WebSocket close, a TLS close, a FIN.
    pub async fn close(mut self) {
        match &mut self.io {
            Io::Tcp(s) => drop(tokio::io::AsyncWriteExt::shutdown(s).await),
            Io::Tls(s) => drop(tokio::io::AsyncWriteExt::shutdown(s).await),
            Io::Ws(s) => drop(s.close(None).await),
            Io::Wss(s) => drop(s.close(None).await),
            Io::Quic(q) => {
                // The last packet must arrive before CONNECTION_CLOSE overtakes it.
                let _ = q.send.finish();
                let wait = std::time::Duration::from_secs(1);
                let _ = tokio::time::timeout(wait, q.send.stopped()).await;
                q.close();
            }
            Io::WebTransport(s) => {
                let _ = s.send.finish();
                let wait = std::time::Duration::from_secs(1);
                let _ = tokio::time::timeout(wait, s.send.stopped()).await;
                s.close();
            }
        }
    }

    /// Another bidirectional stream of the same QUIC connection or WebTransport session, once the
    /// server allows for one more.
    ///
    /// # Errors
    /// The connection is lost, or has one stream only.
    pub async fn open_stream(&self) -> io::Result<Self> {
        match &self.io {
            Io::Quic(quic) => Ok(Self::quic(quic.open_stream().await?)),
            Io::WebTransport(session) => Ok(Self::webtransport(session.open_stream().await?)),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// FIN on a stream of QUIC or WebTransport.
    ///
    /// # Errors
    /// The stream has ended, or the link is not one of QUIC or WebTransport.
    pub fn finish(&mut self) -> io::Result<()> {
        match &mut self.io {
            Io::Quic(quic) => Ok(quic.send.finish()?),
            Io::WebTransport(session) => session.send.finish().map_err(io::Error::other),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// RESET_STREAM on a stream of QUIC or WebTransport.
    ///
    /// # Errors
    /// As [`finish`](Self::finish).
    pub fn reset(&mut self, code: u32) -> io::Result<()> {
        match &mut self.io {
            Io::Quic(quic) => Ok(quic.send.reset(code.into())?),
            Io::WebTransport(session) => session.send.reset(code).map_err(io::Error::other),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// STOP_SENDING on a stream of QUIC or WebTransport; resolves when the server has answered with
    /// its own, or has received all data sent on the stream.
    pub async fn stop(self, code: u32) {
        match self.io {
            Io::Quic(mut quic) => {
                let _ = quic.recv.stop(code.into());
                let _ = quic.send.stopped().await;
            }
            Io::WebTransport(mut session) => {
                let _ = session.recv.stop(code);
                let _ = session.send.stopped().await;
            }
            _ => {}
        }
    }

    /// The QUIC connection below, if the link uses QUIC.
    pub fn as_quic(&self) -> Option<&QuicStream> {
        match &self.io {
            Io::Quic(quic) => Some(quic),
            _ => None,
        }
    }

    /// How many STREAM frames the link's connection has sent; `None` for a transport other than QUIC,
    /// where a flush sends everything at once.
    pub fn stream_frames_sent(&self) -> Option<u64> {
        let connection = match &self.io {
            Io::Quic(quic) => quic.connection(),
            Io::WebTransport(session) => session.connection(),
            _ => return None,
        };
        Some(connection.stats().frame_tx.stream)
    }

    /// The TCP socket below, if the link uses TCP.
    pub fn as_tcp(&self) -> Option<&TcpStream> {
        match &self.io {
            Io::Tcp(s) => Some(s),
            Io::Tls(s) => Some(s.get_ref().0),
            Io::Ws(s) => Some(s.get_ref()),
            Io::Wss(s) => Some(s.get_ref().get_ref().0),
            Io::Quic(_) | Io::WebTransport(_) => None,
        }
    }

    fn reset_on_drop(&self) {
        if let Some(socket) = self.as_tcp() {
            // Dropping the socket then sends RST and discards unsent bytes.
            let _ = socket.set_zero_linger();
        }
    }

    fn poll_read(&mut self, cx: &mut Context<'_>, into: &mut BytesMut) -> Poll<io::Result<usize>> {
        match &mut self.io {
            Io::Tcp(s) => poll_read(Pin::new(s), cx, into),
            Io::Tls(s) => poll_read(Pin::new(s.as_mut()), cx, into),
            Io::Quic(q) => poll_read(Pin::new(&mut q.recv), cx, into),
            Io::WebTransport(s) => poll_read(Pin::new(&mut s.recv), cx, into),
            Io::Ws(s) => poll_message(s.as_mut(), cx, into),
            Io::Wss(s) => poll_message(s.as_mut(), cx, into),
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, out: &mut BytesMut) -> io::Result<Poll<()>> {
        match &mut self.io {
            Io::Tcp(s) => poll_write(Pin::new(s), cx, out),
            Io::Tls(s) => poll_write(Pin::new(s.as_mut()), cx, out),
            Io::Quic(q) => poll_write(Pin::new(&mut q.send), cx, out),
            Io::WebTransport(s) => poll_write(Pin::new(&mut s.send), cx, out),
            Io::Ws(s) => poll_send(s.as_mut(), cx, out, &mut self.flushing),
            Io::Wss(s) => poll_send(s.as_mut(), cx, out, &mut self.flushing),
        }
    }
}

fn poll_read<S: AsyncRead>(
    stream: Pin<&mut S>,
    cx: &mut Context<'_>,
    into: &mut BytesMut,
) -> Poll<io::Result<usize>> {
    // A small stack buffer instead of a large reserve keeps thousands of idle clients small.
    let mut space = [std::mem::MaybeUninit::uninit(); 16 * 1024];
    let mut buf = ReadBuf::uninit(&mut space);
    ready!(stream.poll_read(cx, &mut buf))?;
    into.extend_from_slice(buf.filled());
    Poll::Ready(Ok(buf.filled().len()))
}

fn poll_write<S: AsyncWrite>(
    mut stream: Pin<&mut S>,
    cx: &mut Context<'_>,
    out: &mut BytesMut,
) -> io::Result<Poll<()>> {
    while !out.is_empty() {
        match stream.as_mut().poll_write(cx, out) {
            Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
            Poll::Ready(Ok(n)) => out.advance(n),
            Poll::Ready(Err(e)) => return Err(e),
            Poll::Pending => return Ok(Poll::Pending),
        }
    }
    match stream.poll_flush(cx) {
        Poll::Ready(done) => done.map(Poll::Ready),
        Poll::Pending => Ok(Poll::Pending),
    }
}

fn poll_message<S>(
    socket: &mut WebSocketStream<S>,
    cx: &mut Context<'_>,
    into: &mut BytesMut,
) -> Poll<io::Result<usize>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut read = 0;
    loop {
        // Everything that has already arrived is taken in one go.
        match Pin::new(&mut *socket).poll_next(cx) {
            Poll::Ready(Some(Ok(Message::Binary(bytes)))) => {
                read += bytes.len();
                into.extend_from_slice(&bytes);
            }
            Poll::Ready(Some(Ok(Message::Ping(_) | Message::Pong(_)))) => {}
            Poll::Ready(Some(Ok(Message::Close(_))) | None) => return Poll::Ready(Ok(read)),
            Poll::Ready(Some(Ok(other))) => {
                return Poll::Ready(Err(io::Error::other(format!("not binary: {other:?}"))));
            }
            Poll::Ready(Some(Err(e))) if read == 0 => return Poll::Ready(Err(io_error(e))),
            Poll::Pending if read == 0 => return Poll::Pending,
            Poll::Ready(Some(Err(_))) | Poll::Pending => return Poll::Ready(Ok(read)),
        }
    }
}

fn poll_send<S>(
    socket: &mut WebSocketStream<S>,
    cx: &mut Context<'_>,
    out: &mut BytesMut,
    flushing: &mut bool,
) -> io::Result<Poll<()>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut socket = Pin::new(socket);
    if !out.is_empty() {
        match socket.as_mut().poll_ready(cx) {
            Poll::Pending => return Ok(Poll::Pending),
            Poll::Ready(ready) => ready.map_err(io_error)?,
        }
        let message = Message::Binary(out.split().freeze());
        socket.as_mut().start_send(message).map_err(io_error)?;
        *flushing = true;
    }
    match socket.poll_flush(cx) {
        Poll::Pending => Ok(Poll::Pending),
        Poll::Ready(done) => {
            *flushing = false;
            done.map_err(io_error)?;
            Ok(Poll::Ready(()))
        }
    }
}

fn io_error(error: tungstenite::Error) -> io::Error {
    match error {
        tungstenite::Error::Io(e) => e,
        tungstenite::Error::ConnectionClosed | tungstenite::Error::AlreadyClosed => {
            io::ErrorKind::UnexpectedEof.into()
        }
        other => io::Error::other(other),
    }
}
