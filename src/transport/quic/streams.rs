//! One QUIC connection with its control stream and its data streams.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use quinn::{
    Connection, ConnectionError, ReadError, RecvStream, SendStream, StoppedError, VarInt,
    WriteError,
};

use crate::config::Transport;
use crate::outbuf::OutBuf;
use crate::streams::{StreamId, StreamSet};
use crate::transport::closed::{Closed, ResetReason};
use crate::transport::events::Events;
use crate::transport::proxy::canonical;
use crate::transport::quic::bidi::{Bidi, Layer};
use crate::transport::quic::close::{CloseCode, UNI_STREAM_STOPPED, lost};
use crate::transport::quic::session::Session;
use crate::transport::quic::settings::{CONNECTION_WINDOW_BYTES, STREAMS_MANY, STREAMS_MAX};
use crate::transport::tcp::with_scratch;
use crate::transport::types::{CloseHow, Recv, Traffic};

/// A QUIC connection with its control stream.
pub(in crate::transport) struct Quic {
    connection: Connection,
    layer: Layer,
    /// Present with WebTransport.
    session: Option<Box<Session>>,
    control: Bidi,
    /// Data stream n is at n - 1.
    data: Vec<Option<DataStream>>,
    /// Waits for further streams, once the client is authenticated. Until then flow control and the
    /// stream limit bound the bytes that can wait.
    accept: Option<BoxFuture<Result<(SendStream, RecvStream), ConnectionError>>>,
    /// The data streams that are not read.
    paused: StreamSet,
    /// Waits for unidirectional streams, to stop them.
    uni_streams: Option<BoxFuture<Option<UniStream>>>,
    /// The stream with which the next round begins; at most the number of streams.
    next: u8,
    closing: Closing,
    close_code: CloseCode,
    /// How the control stream ended while data streams are still read, and how often it has been
    /// skipped since. Boxed, because it is short-lived.
    control_end: Option<Box<(Closed, usize)>>,
    /// How many streams were reset while they were watched.
    watched_resets: u16,
    peer: SocketAddr,
    /// The peer's address changed, and [`Quic::take_new_peer`] has not been called since.
    peer_changed: bool,
    events: Arc<dyn Events>,
}

/// How often a control stream that has ended is skipped, so that bytes which arrived before its end on
/// data streams are read.
const SKIPS_MAX: usize = 256;

/// The library keeps some hundred bytes of a stream that is reset while it is watched, until the
/// connection ends.
const WATCHED_RESETS_MAX: u16 = 4096;

type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send + Sync>>;

/// A data stream. Its directions end independently.
struct DataStream {
    stream: Bidi,
    /// The peer's FIN was read. Answers are still sent.
    finished: bool,
    /// Resolves when the peer reads no more (STOP_SENDING).
    stopped: Option<BoxFuture<Result<Option<VarInt>, StoppedError>>>,
    /// The library was asked for the above and has not answered.
    watched: bool,
}

impl DataStream {
    fn new(stream: Bidi) -> Self {
        Self {
            stopped: Some(Box::pin(stream.stopped())),
            stream,
            finished: false,
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
            // The connection is lost, which reading reports.
            _ => Poll::Pending,
        }
    }
}

enum Closing {
    Open,
    /// Everything is sent, and acknowledgements are awaited.
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
        // Does nothing if the connection is closed already.
        self.connection
            .close(self.layer.code(self.close_code.number()), b"");
    }
}

impl Quic {
    /// `control` is the first stream that the client opened.
    pub(super) fn new(
        connection: Connection,
        layer: Layer,
        control: Bidi,
        session: Option<Box<Session>>,
        events: Arc<dyn Events>,
    ) -> Self {
        Self {
            uni_streams: Some(next_uni(connection.clone(), layer)),
            peer: canonical(connection.remote_address()),
            connection,
            layer,
            session,
            control,
            data: Vec::new(),
            accept: None,
            paused: StreamSet::EMPTY,
            next: 0,
            closing: Closing::Open,
            close_code: CloseCode::Normal,
            control_end: None,
            watched_resets: 0,
            peer_changed: false,
            events,
        }
    }

    pub(in crate::transport) fn transport(&self) -> Transport {
        match self.layer {
            Layer::Plain => Transport::Quic,
            Layer::WebTransport { .. } => Transport::WebTransport,
        }
    }

    pub(in crate::transport) fn remote_address(&self) -> SocketAddr {
        canonical(self.connection.remote_address())
    }

    /// The peer's new address, if it changed since the last call.
    pub(in crate::transport) fn take_new_peer(&mut self) -> Option<SocketAddr> {
        std::mem::take(&mut self.peer_changed).then_some(self.peer)
    }

    pub(in crate::transport) fn traffic(&self) -> Traffic {
        let stats = self.connection.stats();
        Traffic {
            // A silent network is probed with these two.
            sent: stats.frame_tx.stream + stats.frame_tx.ping,
            acknowledged: stats.frame_rx.acks,
        }
    }

    pub(in crate::transport) fn authenticated(&mut self) {
        if self.accept.is_none() {
            let window = VarInt::from_u32(CONNECTION_WINDOW_BYTES);
            self.connection.set_receive_window(window);
            self.accept = Some(accept_bi(self.connection.clone()));
        }
    }

    pub(in crate::transport) fn pause_streams(&mut self, streams: StreamSet) {
        self.paused = streams;
    }

    pub(in crate::transport) fn poll_recv(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut Vec<u8>,
    ) -> Poll<Result<Recv, Closed>> {
        let skipped_out = |end: &mut Box<(Closed, usize)>| end.1 >= SKIPS_MAX;
        if let Some(end) = self.control_end.take_if(skipped_out) {
            return Poll::Ready(Err(end.0));
        }
        if self.watched_resets >= WATCHED_RESETS_MAX {
            return Poll::Ready(Err(Closed::TooManyResets));
        }
        self.poll_uni_streams(cx);
        self.poll_accept(cx);
        let streams = self.data.len() + 1;
        let mut end = None;
        for i in 0..streams {
            let index = (usize::from(self.next) + i) % streams;
            if index == 0
                && let Some(end) = &mut self.control_end
            {
                end.1 += 1;
                continue;
            }
            match self.poll_stream(cx, index, buf) {
                Poll::Ready(Ok(recv)) => {
                    self.next = index as u8 + 1;
                    self.note_migration();
                    return Poll::Ready(Ok(recv));
                }
                Poll::Ready(Err(Closed::StreamReset(number))) => {
                    self.next = index as u8 + 1;
                    return Poll::Ready(Err(Closed::StreamReset(number)));
                }
                // Bytes that arrived before the end, on any stream, are returned first.
                Poll::Ready(Err(closed)) if index == 0 => {
                    self.control_end = Some(Box::new((closed, 0)));
                }
                // The connection is lost; the bytes of the control stream are still read.
                Poll::Ready(Err(closed)) => {
                    end.get_or_insert(closed);
                }
                Poll::Pending => {}
            }
        }
        let control_end = self.control_end.take().map(|end| end.0);
        if let Some(closed) = control_end.or(end) {
            return Poll::Ready(Err(closed));
        }
        match &mut self.session {
            Some(session) => session.poll_end(cx, self.layer).map(Err),
            None => Poll::Pending,
        }
    }

    pub(in crate::transport) fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        number: StreamId,
        out: &mut OutBuf,
    ) -> Poll<Result<(), Closed>> {
        let stream = if number.is_control() {
            Some(&mut self.control)
        } else {
            data_stream_mut(&mut self.data, number)
        };
        let Some(stream) = stream else {
            return Poll::Ready(Err(Closed::StreamReset(number)));
        };
        while !out.is_empty() {
            match ready!(stream.poll_write(cx, out.rest())) {
                Ok(n) => out.advance(n),
                Err(WriteError::ConnectionLost(error)) => {
                    return Poll::Ready(Err(lost(&error, self.layer)));
                }
                Err(error) if !number.is_control() => {
                    let code = match error {
                        WriteError::Stopped(code) => {
                            self.unwatch(number);
                            code
                        }
                        _ => self.layer.code(CloseCode::Normal.number()),
                    };
                    self.abort(number, code);
                    return Poll::Ready(Err(Closed::StreamReset(number)));
                }
                Err(WriteError::Stopped(code)) => {
                    self.close_code = CloseCode::ControlGone;
                    let code = self.layer.peer_code(code);
                    let reason = ResetReason::ControlStreamStopped(code);
                    return Poll::Ready(Err(Closed::Reset(reason)));
                }
                Err(_) => {
                    return Poll::Ready(Err(Closed::Reset(ResetReason::ControlStreamClosed)));
                }
            }
        }
        out.reset();
        Poll::Ready(Ok(()))
    }

    pub(in crate::transport) fn reset_stream(&mut self, number: StreamId, code: u32) {
        self.abort(number, self.layer.code(code));
    }

    /// Sends FIN on a stream whose other direction the peer has ended.
    pub(in crate::transport) fn finish_stream(&mut self, number: StreamId) {
        // Dropping it finishes it, and stops it if it was not read to its end.
        self.take(number);
    }

    /// Sends RESET_STREAM and STOP_SENDING with `code`, which is the code on the wire.
    fn abort(&mut self, number: StreamId, code: VarInt) {
        if let Some(mut data) = self.take(number) {
            data.stream.abort(code);
            self.watched_resets += u16::from(data.watched);
        }
    }

    /// The library has answered the question whether the peer reads this stream.
    fn unwatch(&mut self, number: StreamId) {
        let at = number.index().checked_sub(1);
        let data = at.and_then(|at| self.data.get_mut(at)?.as_mut());
        if let Some(data) = data {
            data.watched = false;
        }
    }

    fn take(&mut self, number: StreamId) -> Option<DataStream> {
        let at = number.index().checked_sub(1)?;
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
                    self.close_code = how.into();
                    self.closing = Closing::Flushing(self.finish());
                }
                Closing::Flushing(flushed) => {
                    ready!(flushed.as_mut().poll(cx));
                    let code = self.layer.code(self.close_code.number());
                    self.connection.close(code, b"");
                    self.closing = Closing::Done;
                }
                Closing::Done => return Poll::Ready(()),
            }
        }
    }

    /// Sends FIN on every stream; resolves when the peer has acknowledged everything, or no longer
    /// can.
    fn finish(&mut self) -> BoxFuture<()> {
        let data = self.data.iter_mut().flatten().map(|data| &mut data.stream);
        let streams = std::iter::once(&mut self.control).chain(data);
        let waits: Vec<_> = streams.map(Bidi::finish).collect();
        let session = self.session.as_mut().map(|s| s.end(self.close_code));
        Box::pin(async move {
            for wait in waits {
                wait.await;
            }
            // The end of the session ends all streams, so it follows their last byte.
            if let Some(session) = session {
                session.await;
            }
        })
    }

    /// Stops unidirectional streams, since their bytes are never read. Those of HTTP/3 are kept.
    fn poll_uni_streams(&mut self, cx: &mut Context<'_>) {
        while let Some(next) = &mut self.uni_streams
            && let Poll::Ready(found) = next.as_mut().poll(cx)
        {
            self.uni_streams = found.map(|stream| {
                match (stream, &mut self.session) {
                    (UniStream::Http(stream), Some(session)) => session.keep(stream),
                    (UniStream::Http(mut stream) | UniStream::Foreign(mut stream), _) => {
                        // Fails only if the stream has ended.
                        let _ = stream.stop(self.layer.code(UNI_STREAM_STOPPED));
                        self.events.uni_stream_stopped(self.peer);
                    }
                }
                next_uni(self.connection.clone(), self.layer)
            });
        }
    }

    fn poll_accept(&mut self, cx: &mut Context<'_>) {
        while let Some(accept) = &mut self.accept {
            let Poll::Ready(accepted) = accept.as_mut().poll(cx) else {
                return;
            };
            let Ok((send, recv)) = accepted else {
                // The connection is lost, which reading reports.
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
            // There is always room, because the stream limit counts the same streams. Otherwise
            // dropping the stream would stop and finish it.
            if self.data.len() + 1 == STREAMS_MANY {
                // The stream of a session's request counts as well.
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
        let number = StreamId::from_index(index);
        let stream = match index.checked_sub(1) {
            None => &mut self.control,
            Some(i) => {
                let Some(data) = &mut self.data[i] else {
                    return Poll::Pending;
                };
                if data.finished || self.paused.contains(number) {
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
            // All bytes that have arrived are read.
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
                self.close_code = CloseCode::ControlGone;
                Poll::Ready(Err(control_end(end, self.layer)))
            }
            Ok(_) => {
                if let Some(data) = &mut self.data[index - 1] {
                    data.finished = true;
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
                    _ => self.layer.code(CloseCode::Normal.number()),
                };
                self.abort(number, code);
                Poll::Ready(Err(Closed::StreamReset(number)))
            }
        }
    }

    /// A data stream that the peer no longer reads is gone.
    fn poll_stopped(&mut self, cx: &mut Context<'_>, index: usize) -> Poll<Result<Recv, Closed>> {
        let data = index.checked_sub(1).and_then(|i| self.data[i].as_mut());
        let Some(data) = data else {
            return Poll::Pending;
        };
        let code = ready!(data.poll_stopped(cx));
        let number = StreamId::from_index(index);
        self.abort(number, code);
        Poll::Ready(Err(Closed::StreamReset(number)))
    }

    fn note_migration(&mut self) {
        let now = self.remote_address();
        if now != self.peer {
            let from = std::mem::replace(&mut self.peer, now);
            self.peer_changed = true;
            self.events.migrated(from, now);
        }
    }
}

fn data_stream_mut(data: &mut [Option<DataStream>], number: StreamId) -> Option<&mut Bidi> {
    let slot = data.get_mut(number.index().checked_sub(1)?)?;
    slot.as_mut().map(|data| &mut data.stream)
}

fn control_end(end: Result<usize, ReadError>, layer: Layer) -> Closed {
    match end {
        Ok(_) => Closed::Eof,
        Err(ReadError::Reset(code)) => {
            Closed::Reset(ResetReason::ControlStreamReset(layer.peer_code(code)))
        }
        Err(_) => Closed::Reset(ResetReason::ControlStreamClosed),
    }
}

fn accept_bi(
    connection: Connection,
) -> BoxFuture<Result<(SendStream, RecvStream), ConnectionError>> {
    Box::pin(async move { connection.accept_bi().await })
}

/// A unidirectional stream of the client.
enum UniStream {
    /// A stream of HTTP/3's own, whose end would be an error.
    Http(RecvStream),
    /// Any other.
    Foreign(RecvStream),
}

/// The next unidirectional stream. `None`: the connection is lost. Every connection has this future, so
/// it is small until a stream arrives.
fn next_uni(connection: Connection, layer: Layer) -> BoxFuture<Option<UniStream>> {
    match layer {
        Layer::Plain => Box::pin(async move {
            let stream = connection.accept_uni().await;
            stream.ok().map(UniStream::Foreign)
        }),
        Layer::WebTransport { .. } => Box::pin(async move {
            let stream = connection.accept_uni().await.ok()?;
            Some(Box::pin(with_type(stream)).await)
        }),
    }
}

/// Reads the type of a unidirectional stream of HTTP/3.
async fn with_type(mut stream: RecvStream) -> UniStream {
    // 0x54 as a variable-length integer: a stream of a WebTransport session.
    let mut kind = [0; 2];
    let foreign = match stream.read_exact(&mut kind[..1]).await {
        Ok(()) if kind[0] == 0x40 => {
            stream.read_exact(&mut kind[1..]).await.is_ok() && kind[1] == 0x54
        }
        _ => false,
    };
    match foreign {
        true => UniStream::Foreign(stream),
        false => UniStream::Http(stream),
    }
}
