//! MQTT over QUIC, ALPN `mqtt`: the first stream that the client opens is
//! lane 0, further ones are data lanes. We never open a stream, and no
//! unidirectional one is allowed. There is no standard; this follows what
//! deployed brokers and clients do.

use std::future::Future;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::FutureExt;
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{
    Connection, ConnectionError, Endpoint, EndpointConfig, IdleTimeout, Incoming, ReadError,
    RecvStream, SendStream, ServerConfig, TokioRuntime, TransportConfig, TransportErrorCode,
    VarInt, WriteError,
};
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

use super::limits::{HandshakeError, Limits};
use super::listen::Listener;
use super::tcp::with_scratch;
use super::tls::{ALPN_MQTT, ServerTls};
use super::{CloseHow, Closed, ListenerInfo, OutBuf, Permit, Recv, Stream};

/// Streams that a client may have open, control and data together.
const LANES: usize = 16;
/// Flow control: what a client may send unread, bytes per stream and in all.
const STREAM_WINDOW: u32 = 64 * 1024;
const CONNECTION_WINDOW: u32 = 128 * 1024;
/// What we send unacknowledged, bytes per connection.
const SEND_WINDOW: u64 = 128 * 1024;
/// Handshakes that wait for the accept loop, and the bytes kept for each and
/// for all.
const INCOMING_MAX: usize = 4096;
const INCOMING_BYTES: u64 = 64 * 1024;
const INCOMING_BYTES_ALL: u64 = 16 * 1024 * 1024;
/// The socket's buffers, bytes, as far as the system allows: all clients share
/// them, and bursts are lost past them.
const SOCKET_BUFFER: usize = 4 * 1024 * 1024;

/// Application close codes; those of EMQX, so that clients' logs make sense.
mod code {
    pub(super) const NORMAL: u32 = 0;
    pub(super) const CONTROL_GONE: u32 = 1;
    pub(super) const OVERLOAD: u32 = 2;
}

/// The TLS alert no_application_protocol (RFC 7301 section 3.2).
const ALERT_NO_ALPN: u8 = 120;

/// A bound QUIC socket.
#[derive(Clone, Debug)]
pub(super) struct Server {
    endpoint: Endpoint,
}

impl Server {
    /// Must be called inside a tokio runtime.
    pub(super) fn new(socket: UdpSocket, tls: &ServerTls, limits: &Limits) -> io::Result<Self> {
        for result in [
            socket2::SockRef::from(&socket).set_recv_buffer_size(SOCKET_BUFFER),
            socket2::SockRef::from(&socket).set_send_buffer_size(SOCKET_BUFFER),
        ] {
            if let Err(error) = result {
                tracing::debug!(%error, "UDP socket buffer left as it is");
            }
        }
        let endpoint = Endpoint::new(
            EndpointConfig::default(),
            Some(server_config(tls, limits)?),
            socket,
            Arc::new(TokioRuntime),
        )?;
        Ok(Self { endpoint })
    }

    pub(super) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// Accepts until told to stop; connections then go on.
    pub(super) async fn serve<H, F>(
        self,
        listener: Arc<Listener>,
        handler: H,
        stop: CancellationToken,
    ) where
        H: Fn(super::Accepted) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        while let Some(Some(incoming)) = stop.run_until_cancelled(self.endpoint.accept()).await {
            let Some((incoming, permit, place)) = admit(incoming, &listener) else {
                continue;
            };
            let listener = Arc::clone(&listener);
            let handshake = Box::pin({
                let stop = stop.clone();
                async move {
                    let peer = incoming.remote_address();
                    let deadline = listener.deadline();
                    let connecting = connect(incoming, &listener, place);
                    let result = listener.bounded(deadline, &stop, connecting).await;
                    let stream = result.map(|quic| Stream::quic(quic, peer));
                    listener.finish(stream, peer, deadline, permit)
                }
            });
            let handler = handler.clone();
            tokio::spawn(async move {
                let accepted = handshake.await;
                if let Some(accepted) = accepted {
                    handler(accepted).await;
                }
            });
        }
        // While others drain, newcomers are refused, not left to time out.
        tokio::spawn(async move {
            let refuse = async {
                while let Some(incoming) = self.endpoint.accept().await {
                    incoming.refuse();
                }
            };
            tokio::select! {
                () = refuse => {}
                () = self.endpoint.wait_idle() => {}
            }
            self.endpoint.set_server_config(None);
            while let Some(Some(incoming)) = self.endpoint.accept().now_or_never() {
                incoming.refuse();
            }
        });
    }

    /// Resolves when no connection is left and all closes are sent.
    pub(super) async fn idle(&self) {
        self.endpoint.wait_idle().await;
    }

    pub(super) fn close(&self, how: CloseHow) {
        self.endpoint.close(close_code(how), b"");
    }
}

/// Turns away what there is no room for, and asks for proof of the address
/// when many handshakes run: a spoofed source costs no more than one packet.
fn admit(
    incoming: Incoming,
    listener: &Listener,
) -> Option<(Incoming, Permit, OwnedSemaphorePermit)> {
    let limits = &listener.limits;
    if limits.handshakes.pressed() && incoming.may_retry() {
        limits.events.retry_sent(&listener.info);
        // Only fails without may_retry.
        let _ = incoming.retry();
        return None;
    }
    let Some(place) = limits.handshakes.try_place() else {
        limits.events.refused(&listener.info, "handshakes_max");
        incoming.refuse();
        return None;
    };
    let Some(permit) = listener.admit() else {
        incoming.refuse();
        return None;
    };
    Some((incoming, permit, place))
}

/// The handshake and the wait for the control stream, which costs us nothing
/// and so needs no place.
async fn connect(
    incoming: Incoming,
    listener: &Listener,
    place: OwnedSemaphorePermit,
) -> Result<Quic, HandshakeError> {
    let connection = incoming
        .accept()
        .map_err(handshake_error)?
        .await
        .map_err(handshake_error)?;
    drop(place);
    // If the deadline drops this future, the client learns why.
    let guard = CloseOnDrop(&connection);
    let (send, recv) = connection.accept_bi().await.map_err(handshake_error)?;
    std::mem::forget(guard);
    Ok(Quic::new(connection, Lane { send, recv }, listener))
}

struct CloseOnDrop<'a>(&'a Connection);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        self.0
            .close(code::CONTROL_GONE.into(), b"no control stream");
    }
}

fn server_config(tls: &ServerTls, limits: &Limits) -> io::Result<ServerConfig> {
    let crypto = QuicServerConfig::try_from(Arc::clone(&tls.quic)).map_err(io::Error::other)?;
    let mut config = ServerConfig::with_crypto(Arc::new(crypto));
    config
        .transport_config(Arc::new(transport_config(limits.quic_idle)?))
        .migration(true)
        .max_incoming(INCOMING_MAX)
        .incoming_buffer_size(INCOMING_BYTES)
        .incoming_buffer_size_total(INCOMING_BYTES_ALL);
    Ok(config)
}

/// The library's defaults allow a client 10 MB and more; these keep an idle
/// connection near 30 kB. No keep-alive of ours, it would wake radios.
fn transport_config(idle: Duration) -> io::Result<TransportConfig> {
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(LANES as u32))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW))
        .send_window(SEND_WINDOW)
        .datagram_receive_buffer_size(None)
        .mtu_discovery_config(None)
        .keep_alive_interval(None)
        .max_idle_timeout(Some(IdleTimeout::try_from(idle).map_err(io::Error::other)?));
    Ok(config)
}

#[allow(clippy::needless_pass_by_value)] // for map_err
fn handshake_error(error: ConnectionError) -> HandshakeError {
    match error {
        ConnectionError::TransportError(e)
            if e.code == TransportErrorCode::crypto(ALERT_NO_ALPN) =>
        {
            HandshakeError::Alpn(ALPN_MQTT)
        }
        ConnectionError::TransportError(e) => HandshakeError::Quic(e.to_string()),
        // The peer's words are not for our log; its code is.
        ConnectionError::ApplicationClosed(close) => {
            HandshakeError::Quic(format!("closed by the peer with code {}", close.error_code))
        }
        ConnectionError::ConnectionClosed(close) => {
            HandshakeError::Quic(format!("closed by the peer: {}", close.error_code))
        }
        other => HandshakeError::Quic(other.to_string()),
    }
}

fn lost(error: &ConnectionError) -> Closed {
    match error {
        ConnectionError::ApplicationClosed(close) if close.error_code == VarInt::from_u32(0) => {
            Closed::Eof
        }
        ConnectionError::ApplicationClosed(close) => {
            Closed::Reset(format!("closed by the peer with code {}", close.error_code).into())
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

fn close_code(how: CloseHow) -> VarInt {
    VarInt::from_u32(match how {
        CloseHow::Normal | CloseHow::GoingAway => code::NORMAL,
        CloseHow::Protocol => code::CONTROL_GONE,
        CloseHow::Overload => code::OVERLOAD,
    })
}

/// A QUIC connection with its control stream.
pub(super) struct Quic {
    connection: Connection,
    control: Lane,
    /// Lane n is at n - 1.
    data: Vec<Option<Lane>>,
    /// Waits for further streams, once they are wanted. Until then flow control
    /// and the stream limit bound what a client can leave there.
    accept: Option<BoxFuture<Result<(SendStream, RecvStream), ConnectionError>>>,
    /// Where the next round over the lanes begins.
    next: usize,
    closing: Closing,
    close_code: VarInt,
    peer: SocketAddr,
    info: Arc<ListenerInfo>,
    limits: Arc<Limits>,
}

type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send + Sync>>;

struct Lane {
    send: SendStream,
    recv: RecvStream,
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
        self.connection.close(self.close_code, b"");
    }
}

impl Quic {
    fn new(connection: Connection, control: Lane, listener: &Listener) -> Self {
        Self {
            peer: connection.remote_address(),
            connection,
            control,
            data: Vec::new(),
            accept: None,
            next: 0,
            closing: Closing::Open,
            close_code: VarInt::from_u32(code::NORMAL),
            info: Arc::clone(&listener.info),
            limits: Arc::clone(&listener.limits),
        }
    }

    pub(super) fn remote_address(&self) -> SocketAddr {
        self.connection.remote_address()
    }

    pub(super) fn authenticated(&mut self) {
        if self.accept.is_none() {
            self.accept = Some(accept_bi(self.connection.clone()));
        }
    }

    pub(super) fn poll_recv(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut Vec<u8>,
    ) -> Poll<Result<Recv, Closed>> {
        self.poll_accept(cx);
        let lanes = self.data.len() + 1;
        let mut end = None;
        for i in 0..lanes {
            let lane = (self.next + i) % lanes;
            match self.poll_lane(cx, lane, buf) {
                Poll::Ready(Ok(recv)) => {
                    self.next = lane + 1;
                    self.note_migration();
                    return Poll::Ready(Ok(recv));
                }
                // Bytes that came before the end, on any lane, go first.
                Poll::Ready(Err(closed)) => {
                    end.get_or_insert(closed);
                }
                Poll::Pending => {}
            }
        }
        end.map_or(Poll::Pending, |closed| Poll::Ready(Err(closed)))
    }

    pub(super) fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        lane: u8,
        out: &mut OutBuf,
    ) -> Poll<Result<(), Closed>> {
        let stream = if lane == 0 {
            Some(&mut self.control)
        } else {
            lane_mut(&mut self.data, lane)
        };
        let Some(stream) = stream else {
            return Poll::Ready(Err(Closed::Lane(lane)));
        };
        while !out.is_empty() {
            match ready!(Pin::new(&mut stream.send).poll_write(cx, out.rest())) {
                Ok(n) => out.at += n,
                Err(WriteError::ConnectionLost(error)) => return Poll::Ready(Err(lost(&error))),
                Err(_) if lane != 0 => return Poll::Ready(Err(Closed::Lane(lane))),
                Err(WriteError::Stopped(code)) => {
                    let reason = format!("control stream stopped by the peer with code {code}");
                    return Poll::Ready(Err(Closed::Reset(reason.into())));
                }
                Err(_) => return Poll::Ready(Err(Closed::Reset("control stream closed".into()))),
            }
        }
        out.reset();
        Poll::Ready(Ok(()))
    }

    pub(super) fn reset_lane(&mut self, lane: u8, code: u32) {
        let slot = usize::from(lane)
            .checked_sub(1)
            .and_then(|i| self.data.get_mut(i));
        if let Some(mut lane) = slot.and_then(Option::take) {
            // Both fail only if that direction has ended already.
            let _ = lane.send.reset(code.into());
            let _ = lane.recv.stop(code.into());
        }
    }

    pub(super) fn poll_close(&mut self, cx: &mut Context<'_>, how: CloseHow) -> Poll<()> {
        loop {
            match &mut self.closing {
                Closing::Open => {
                    self.close_code = close_code(how);
                    self.closing = Closing::Flushing(self.finish());
                }
                Closing::Flushing(flushed) => {
                    ready!(flushed.as_mut().poll(cx));
                    self.connection.close(self.close_code, b"");
                    self.closing = Closing::Done;
                }
                Closing::Done => return Poll::Ready(()),
            }
        }
    }

    /// FIN on every lane; resolves when the peer has acknowledged all, or
    /// cannot any more.
    fn finish(&mut self) -> BoxFuture<()> {
        let lanes = std::iter::once(&mut self.control).chain(self.data.iter_mut().flatten());
        let waits: Vec<_> = lanes
            .map(|lane| {
                // Fails only if it is finished or reset already.
                let _ = lane.send.finish();
                lane.send.stopped()
            })
            .collect();
        Box::pin(async move {
            for wait in waits {
                let _ = wait.await;
            }
        })
    }

    fn poll_accept(&mut self, cx: &mut Context<'_>) {
        while let Some(accept) = &mut self.accept {
            let Poll::Ready(accepted) = accept.as_mut().poll(cx) else {
                return;
            };
            let Ok((send, recv)) = accepted else {
                // The lanes say what happened to the connection.
                self.accept = None;
                return;
            };
            self.accept = Some(accept_bi(self.connection.clone()));
            let lane = Some(Lane { send, recv });
            if let Some(slot) = self.data.iter_mut().find(|slot| slot.is_none()) {
                *slot = lane;
            } else if self.data.len() < LANES - 1 {
                self.data.push(lane);
            }
            // Else it is dropped, which stops and finishes it; but that cannot
            // be, because the stream limit counts the same streams.
        }
    }

    fn poll_lane(
        &mut self,
        cx: &mut Context<'_>,
        lane: usize,
        buf: &mut Vec<u8>,
    ) -> Poll<Result<Recv, Closed>> {
        let number = lane as u8;
        let stream = match lane.checked_sub(1) {
            None => &mut self.control,
            Some(i) => match &mut self.data[i] {
                Some(stream) => stream,
                None => return Poll::Pending,
            },
        };
        let read = with_scratch(|scratch| {
            let read = stream.recv.poll_read(cx, scratch);
            if let Poll::Ready(Ok(n)) = read {
                buf.extend_from_slice(&scratch[..n]);
            }
            read
        });
        let end = match ready!(read) {
            Ok(bytes) if bytes > 0 => {
                return Poll::Ready(Ok(Recv {
                    lane: number,
                    bytes,
                    lane_closed: false,
                }));
            }
            Ok(_) => Closed::Eof,
            Err(ReadError::ConnectionLost(error)) => return Poll::Ready(Err(lost(&error))),
            Err(ReadError::Reset(code)) => {
                Closed::Reset(format!("control stream reset by the peer with code {code}").into())
            }
            Err(_) => Closed::Reset("control stream closed".into()),
        };
        if lane == 0 {
            return Poll::Ready(Err(end));
        }
        // Dropping the lane sends our FIN.
        self.data[lane - 1] = None;
        Poll::Ready(Ok(Recv {
            lane: number,
            bytes: 0,
            lane_closed: true,
        }))
    }

    fn note_migration(&mut self) {
        let now = self.connection.remote_address();
        if now != self.peer {
            let from = std::mem::replace(&mut self.peer, now);
            self.limits.events.migrated(&self.info, from, now);
        }
    }
}

fn lane_mut(data: &mut [Option<Lane>], lane: u8) -> Option<&mut Lane> {
    data.get_mut(usize::from(lane).checked_sub(1)?)?.as_mut()
}

fn accept_bi(
    connection: Connection,
) -> BoxFuture<Result<(SendStream, RecvStream), ConnectionError>> {
    Box::pin(async move { connection.accept_bi().await })
}
