//! One QUIC connection as streams: the control stream and the data streams.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use quinn::{
    Connection, ConnectionError, ReadError, RecvStream, SendStream, StoppedError, VarInt,
    WriteError,
};

use crate::transport::limits::Limits;
use crate::transport::listen::{Listener, canonical};
use crate::transport::quic::bidi::{Bidi, Layer};
use crate::transport::quic::webtransport::Session;
use crate::transport::quic::{CONNECTION_WINDOW, STREAMS_MANY, STREAMS_MAX, close_code, code};
use crate::transport::tcp::with_scratch;
use crate::transport::{CloseHow, Closed, Kind, ListenerInfo, OutBuf, Recv, Traffic};

/// A QUIC connection with its control stream.
pub(in crate::transport) struct Quic {
    connection: Connection,
    /// What lies between QUIC's streams and the streams.
    layer: Layer,
    /// Of WebTransport.
    session: Option<Box<Session>>,
    control: Bidi,
    /// Lane n is at n - 1.
    data: Vec<Option<DataStream>>,
    /// Waits for further streams, once they are wanted. Until then flow control
    /// and the stream limit bound what a client can leave there.
    accept: Option<BoxFuture<Result<(SendStream, RecvStream), ConnectionError>>>,
    /// Data streams that are not read, as bits.
    unread: u16,
    /// Waits for unidirectional streams, where they cannot be forbidden.
    strays: Option<BoxFuture<Result<RecvStream, ConnectionError>>>,
    /// Where the next round over the streams begins.
    next: usize,
    closing: Closing,
    /// Not yet as the layer numbers it.
    close_code: u32,
    /// How control ended, while other streams are still read; how often control was passed over since.
    over: Option<(Closed, usize)>,
    /// Lanes that were reset while they were watched.
    watches_left: usize,
    peer: SocketAddr,
    /// The peer's address changed, and nobody has asked yet.
    moved: bool,
    info: Arc<ListenerInfo>,
    limits: Arc<Limits>,
}

/// Passes over the streams that follow the end of control: what came on others before it is not lost.
const LAST_PASSES: usize = 256;

/// The library keeps some hundred bytes of a stream that is reset while it is watched, until the
/// connection ends.
const WATCHES_MAX: usize = 4096;

type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send + Sync>>;

/// A data stream. Its two directions end apart.
struct DataStream {
    stream: Bidi,
    /// The peer's FIN was read; what it waits for is still sent.
    ended: bool,
    /// Resolves when the peer wants nothing more on it (STOP_SENDING).
    stopped: Option<BoxFuture<Result<Option<VarInt>, StoppedError>>>,
    /// The library has been asked, and has not answered.
    watched: bool,
}

impl DataStream {
    fn new(stream: Bidi) -> Self {
        Self {
            stopped: Some(Box::pin(stream.stopped())),
            stream,
            ended: false,
            watched: false,
        }
    }

    fn poll_stopped(&mut self, cx: &mut Context<'_>) -> Poll<VarInt> {
        let Some(stopped) = &mut self.stopped else {
            return Poll::Pending;
        };
        let polled = stopped.as_mut().poll(cx);
        self.watched = polled.is_pending();
        let result = ready!(polled);
        self.stopped = None;
        match result {
            Ok(Some(code)) => Poll::Ready(code),
            // The connection is lost, which the streams say.
            _ => Poll::Pending,
        }
    }
}

enum Closing {
    Open,
    /// Everything is sent, acknowledgements are awaited.
    Flushing(BoxFuture<()>),
    Done,
}

impl std::fmt::Debug for Quic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Quic")
    }
}

impl Drop for Quic {
    fn drop(&mut self) {
        // Does nothing if it is closed already.
        self.connection.close(self.layer.code(self.close_code), b"");
    }
}

impl Quic {
    /// `control` is the first stream that the client opened.
    pub(super) fn new(
        connection: Connection,
        layer: Layer,
        control: Bidi,
        session: Option<Box<Session>>,
        listener: &Listener,
    ) -> Self {
        // The handshake allowed for HTTP/3's.
        let strays = listener.spec.webtransport && layer == Layer::Plain;
        if strays {
            connection.set_max_concurrent_uni_streams(VarInt::from_u32(0));
        }
        Self {
            strays: strays.then(|| accept_uni(connection.clone())),
            peer: canonical(connection.remote_address()),
            connection,
            layer,
            session,
            control,
            data: Vec::new(),
            accept: None,
            unread: 0,
            next: 0,
            closing: Closing::Open,
            close_code: code::NORMAL,
            over: None,
            watches_left: 0,
            moved: false,
            info: Arc::clone(&listener.info),
            limits: Arc::clone(&listener.limits),
        }
    }

    /// What carries the streams.
    pub(in crate::transport) fn kind(&self) -> Kind {
        match self.layer {
            Layer::Plain => Kind::Quic,
            Layer::WebTransport { .. } => Kind::WebTransport,
        }
    }

    pub(in crate::transport) fn remote_address(&self) -> SocketAddr {
        canonical(self.connection.remote_address())
    }

    /// The peer's address, if it changed since this was asked last.
    pub(in crate::transport) fn take_new_peer(&mut self) -> Option<SocketAddr> {
        std::mem::take(&mut self.moved).then_some(self.peer)
    }

    pub(in crate::transport) fn traffic(&self) -> Traffic {
        let stats = self.connection.stats();
        Traffic {
            // Probes of a silent network are these two.
            sent: stats.frame_tx.stream + stats.frame_tx.ping,
            acknowledged: stats.frame_rx.acks,
        }
    }

    pub(in crate::transport) fn authenticated(&mut self) {
        if self.accept.is_none() {
            let window = VarInt::from_u32(CONNECTION_WINDOW);
            self.connection.set_receive_window(window);
            self.accept = Some(accept_bi(self.connection.clone()));
        }
    }

    pub(in crate::transport) fn pause_streams(&mut self, streams: u16) {
        self.unread = streams;
    }

    pub(in crate::transport) fn poll_recv(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut Vec<u8>,
    ) -> Poll<Result<Recv, Closed>> {
        if let Some((closed, _)) = self.over.take_if(|(_, passes)| *passes >= LAST_PASSES) {
            return Poll::Ready(Err(closed));
        }
        if self.watches_left >= WATCHES_MAX {
            let why = "more data streams were reset than one connection can have";
            return Poll::Ready(Err(Closed::Quota(why)));
        }
        self.poll_strays(cx);
        self.poll_accept(cx);
        let streams = self.data.len() + 1;
        let mut end = None;
        for i in 0..streams {
            let index = (self.next + i) % streams;
            if index == 0
                && let Some((_, passes)) = &mut self.over
            {
                *passes += 1;
                continue;
            }
            match self.poll_stream(cx, index, buf) {
                Poll::Ready(Ok(recv)) => {
                    self.next = index + 1;
                    self.note_migration();
                    return Poll::Ready(Ok(recv));
                }
                Poll::Ready(Err(Closed::StreamReset(number))) => {
                    self.next = index + 1;
                    return Poll::Ready(Err(Closed::StreamReset(number)));
                }
                // Bytes that came before the end, on any stream, go first.
                Poll::Ready(Err(closed)) if index == 0 => self.over = Some((closed, 0)),
                // The connection is lost: what control has had of it is still read.
                Poll::Ready(Err(closed)) => {
                    end.get_or_insert(closed);
                }
                Poll::Pending => {}
            }
        }
        if let Some(closed) = self.over.take().map(|(closed, _)| closed).or(end) {
            return Poll::Ready(Err(closed));
        }
        match &mut self.session {
            Some(session) => session.poll_over(cx, self.layer).map(Err),
            None => Poll::Pending,
        }
    }

    pub(in crate::transport) fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        number: u8,
        out: &mut OutBuf,
    ) -> Poll<Result<(), Closed>> {
        let stream = if number == 0 {
            Some(&mut self.control)
        } else {
            data_stream_mut(&mut self.data, number)
        };
        let Some(stream) = stream else {
            return Poll::Ready(Err(Closed::StreamReset(number)));
        };
        while !out.is_empty() {
            match ready!(stream.poll_write(cx, out.rest())) {
                Ok(n) => out.at += n,
                Err(WriteError::ConnectionLost(error)) => {
                    return Poll::Ready(Err(lost(&error, self.layer)));
                }
                Err(error) if number != 0 => {
                    let code = match error {
                        WriteError::Stopped(code) => {
                            self.unwatch(number);
                            code
                        }
                        _ => self.layer.code(code::NORMAL),
                    };
                    self.abort(number, code);
                    return Poll::Ready(Err(Closed::StreamReset(number)));
                }
                Err(WriteError::Stopped(code)) => {
                    self.close_code = code::CONTROL_GONE;
                    let code = self.layer.shown(code);
                    let reason = format!("control stream stopped by the peer with {code}");
                    return Poll::Ready(Err(Closed::Reset(reason.into())));
                }
                Err(_) => return Poll::Ready(Err(Closed::Reset("control stream closed".into()))),
            }
        }
        out.reset();
        Poll::Ready(Ok(()))
    }

    pub(in crate::transport) fn reset_stream(&mut self, number: u8, code: u32) {
        self.abort(number, self.layer.code(code));
    }

    /// FIN, where the peer has ended its direction and has all its answers.
    pub(in crate::transport) fn finish_stream(&mut self, number: u8) {
        // What is dropped is finished, and stopped if it was not read to its end.
        self.take(number);
    }

    /// RESET_STREAM and STOP_SENDING with `code` as it is on the wire.
    fn abort(&mut self, number: u8, code: VarInt) {
        if let Some(mut data) = self.take(number) {
            data.stream.abort(code);
            self.watches_left += usize::from(data.watched);
        }
    }

    /// The library has told, to whoever asked.
    fn unwatch(&mut self, number: u8) {
        let at = usize::from(number).checked_sub(1);
        let data = at.and_then(|at| self.data.get_mut(at)?.as_mut());
        if let Some(data) = data {
            data.watched = false;
        }
    }

    fn take(&mut self, number: u8) -> Option<DataStream> {
        let at = usize::from(number).checked_sub(1)?;
        self.data.get_mut(at)?.take()
    }

    pub(in crate::transport) fn poll_close(
        &mut self,
        cx: &mut Context<'_>,
        how: CloseHow,
    ) -> Poll<()> {
        loop {
            match &mut self.closing {
                Closing::Open => {
                    self.close_code = close_code(how);
                    self.closing = Closing::Flushing(self.finish());
                }
                Closing::Flushing(flushed) => {
                    ready!(flushed.as_mut().poll(cx));
                    self.connection.close(self.layer.code(self.close_code), b"");
                    self.closing = Closing::Done;
                }
                Closing::Done => return Poll::Ready(()),
            }
        }
    }

    /// FIN on every stream; resolves when the peer has acknowledged all, or
    /// cannot any more.
    fn finish(&mut self) -> BoxFuture<()> {
        let data = self.data.iter_mut().flatten().map(|data| &mut data.stream);
        let streams = std::iter::once(&mut self.control).chain(data);
        let waits: Vec<_> = streams.map(Bidi::finish).collect();
        let session = self.session.as_mut().map(|s| s.end(self.close_code));
        Box::pin(async move {
            for wait in waits {
                wait.await;
            }
            // Behind the last byte: it ends all streams.
            if let Some(session) = session {
                session.await;
            }
        })
    }

    /// What a client says on a unidirectional stream nobody reads, so it is told.
    fn poll_strays(&mut self, cx: &mut Context<'_>) {
        while let Some(strays) = &mut self.strays
            && let Poll::Ready(accepted) = strays.as_mut().poll(cx)
        {
            self.strays = accepted.ok().map(|mut stray| {
                // Fails only if it has ended.
                let _ = stray.stop(VarInt::from_u32(code::PROTOCOL_ERROR));
                accept_uni(self.connection.clone())
            });
        }
    }

    fn poll_accept(&mut self, cx: &mut Context<'_>) {
        while let Some(accept) = &mut self.accept {
            let Poll::Ready(accepted) = accept.as_mut().poll(cx) else {
                return;
            };
            let Ok((send, recv)) = accepted else {
                // The streams say what happened to the connection.
                self.accept = None;
                return;
            };
            self.accept = Some(accept_bi(self.connection.clone()));
            let opened = Some(DataStream::new(Bidi::new(send, recv, self.layer)));
            if let Some(slot) = self.data.iter_mut().find(|slot| slot.is_none()) {
                *slot = opened;
            } else if self.data.len() < STREAMS_MAX - 1 {
                self.data.push(opened);
            }
            // Else it is dropped, which stops and finishes it; but that cannot
            // be, because the stream limit counts the same streams.
            if self.data.len() + 1 == STREAMS_MANY {
                // A session's own stream is no stream.
                let all = STREAMS_MAX + usize::from(self.session.is_some());
                let all = VarInt::from_u32(all as u32);
                self.connection.set_max_concurrent_bi_streams(all);
            }
        }
    }

    fn poll_stream(
        &mut self,
        cx: &mut Context<'_>,
        index: usize,
        buf: &mut Vec<u8>,
    ) -> Poll<Result<Recv, Closed>> {
        let number = index as u8;
        let stream = match index.checked_sub(1) {
            None => &mut self.control,
            Some(i) => {
                let Some(data) = &mut self.data[i] else {
                    return Poll::Pending;
                };
                if data.ended || self.unread & 1 << index != 0 {
                    return self.poll_stopped(cx, index);
                }
                &mut data.stream
            }
        };
        let read = with_scratch(|scratch| {
            let read = stream.poll_read(cx, scratch);
            if let Poll::Ready(Ok(n)) = read {
                buf.extend_from_slice(&scratch[..n]);
            }
            read
        });
        if read.is_pending() {
            // Behind all that has come.
            return self.poll_stopped(cx, index);
        }
        match ready!(read) {
            Ok(bytes) if bytes > 0 => Poll::Ready(Ok(Recv {
                stream: number,
                bytes,
                finished: false,
            })),
            Err(ReadError::ConnectionLost(error)) => Poll::Ready(Err(lost(&error, self.layer))),
            end if index == 0 => {
                self.close_code = code::CONTROL_GONE;
                Poll::Ready(Err(control_end(end, self.layer)))
            }
            Ok(_) => {
                if let Some(data) = &mut self.data[index - 1] {
                    data.ended = true;
                }
                Poll::Ready(Ok(Recv {
                    stream: number,
                    bytes: 0,
                    finished: true,
                }))
            }
            Err(error) => {
                let code = match error {
                    ReadError::Reset(code) => code,
                    _ => self.layer.code(code::NORMAL),
                };
                self.abort(number, code);
                Poll::Ready(Err(Closed::StreamReset(number)))
            }
        }
    }

    /// A data stream that the peer takes nothing more on is gone.
    fn poll_stopped(&mut self, cx: &mut Context<'_>, index: usize) -> Poll<Result<Recv, Closed>> {
        let data = index.checked_sub(1).and_then(|i| self.data[i].as_mut());
        let Some(data) = data else {
            return Poll::Pending;
        };
        let code = ready!(data.poll_stopped(cx));
        self.abort(index as u8, code);
        Poll::Ready(Err(Closed::StreamReset(index as u8)))
    }

    fn note_migration(&mut self) {
        let now = self.remote_address();
        if now != self.peer {
            let from = std::mem::replace(&mut self.peer, now);
            self.moved = true;
            self.limits.events.migrated(&self.info, from, now);
        }
    }
}

fn data_stream_mut(data: &mut [Option<DataStream>], number: u8) -> Option<&mut Bidi> {
    let slot = data.get_mut(usize::from(number).checked_sub(1)?)?;
    slot.as_mut().map(|data| &mut data.stream)
}

fn control_end(end: Result<usize, ReadError>, layer: Layer) -> Closed {
    match end {
        Ok(_) => Closed::Eof,
        Err(ReadError::Reset(code)) => {
            let code = layer.shown(code);
            Closed::Reset(format!("control stream reset by the peer with {code}").into())
        }
        Err(_) => Closed::Reset("control stream closed".into()),
    }
}

fn accept_bi(
    connection: Connection,
) -> BoxFuture<Result<(SendStream, RecvStream), ConnectionError>> {
    Box::pin(async move { connection.accept_bi().await })
}

fn accept_uni(connection: Connection) -> BoxFuture<Result<RecvStream, ConnectionError>> {
    Box::pin(async move { connection.accept_uni().await })
}

pub(super) fn lost(error: &ConnectionError, layer: Layer) -> Closed {
    match error {
        ConnectionError::ApplicationClosed(close) if layer.is_normal(close.error_code) => {
            Closed::Eof
        }
        ConnectionError::ApplicationClosed(close) => {
            let code = layer.shown(close.error_code);
            Closed::Reset(format!("closed by the peer with {code}").into())
        }
        ConnectionError::ConnectionClosed(close) => {
            Closed::Reset(format!("closed by the peer: {}", close.error_code).into())
        }
        ConnectionError::TimedOut => Closed::Reset("idle timeout".into()),
        ConnectionError::Reset => Closed::Reset("stateless reset".into()),
        ConnectionError::LocallyClosed => Closed::Reset("closed locally".into()),
        other => Closed::Reset(other.to_string().into()),
    }
}
