//! MQTT over QUIC, ALPN `mqtt`: the first stream that the client opens is
//! stream 0, further ones are data streams. We never open a stream, and no
//! unidirectional one is read: none is allowed, or they are stopped. There is no
//! standard; this follows what deployed brokers and clients do. On the same
//! socket browsers are served over WebTransport, if the listener says so; then
//! the handshake allows all clients what HTTP/3 needs, and datagrams of those
//! that speak MQTT are dropped.

mod bidi;
mod capsules;
mod keys;
mod streams;
mod webtransport;

use std::future::Future;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use parking_lot::Mutex;
use quinn::crypto::rustls::{HandshakeData, QuicServerConfig};
use quinn::{
    Connection, ConnectionError, Endpoint, EndpointConfig, IdleTimeout, Incoming, ServerConfig,
    TokioRuntime, TransportConfig, TransportErrorCode, VarInt,
};
use tokio_util::sync::CancellationToken;

use crate::transport::limits::{CertificateFault, HandshakeError, HandshakePlace, Limits};
use crate::transport::listen::{self, Listener, canonical};
use crate::transport::tls::{ALPN_H3, ALPN_MQTT, Configs, ServerTls, fault_of_alert};
use crate::transport::{ClientCertificate, CloseHow, ListenSpec, Permit, Stream};
use bidi::{Bidi, Layer};
pub use keys::QuicSecret;
pub(super) use streams::Quic;

/// Streams that a client may have open, control and data together.
const STREAMS_MAX: usize = 16;
/// Those that it may open before it has shown that it uses several: the library
/// keeps a place for each that is allowed, in tables that double past 14, and
/// announces no fewer than three more.
const STREAMS_AT_FIRST: u32 = 13;
/// Streams open at which all [`STREAMS_MAX`] are allowed.
const STREAMS_MANY: usize = 3;
/// Flow control: what a client may send unread, bytes per stream and in all.
const STREAM_WINDOW: u32 = 64 * 1024;
const CONNECTION_WINDOW: u32 = 128 * 1024;
/// In all, until the client is known: a CONNECT, and as much on other streams.
const STRANGER_WINDOW: u32 = 32 * 1024;
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

/// At most one stateless reset in this time: after a restart as many clients learn of it in a second
/// as may connect again by default.
const RESET_INTERVAL: Duration = Duration::from_micros(200);

/// Application close codes; those of EMQX, so that clients' logs make sense.
mod code {
    pub(super) const NORMAL: u32 = 0;
    pub(super) const CONTROL_GONE: u32 = 1;
    pub(super) const OVERLOAD: u32 = 2;
    /// Of a stream: MQTT's reason code.
    pub(super) const PROTOCOL_ERROR: u32 = 0x82;
}

/// The TLS alert no_application_protocol (RFC 7301 section 3.2).
const ALERT_NO_ALPN: u8 = 120;

/// A bound QUIC socket.
#[derive(Clone, Debug)]
pub(super) struct Server {
    endpoint: Endpoint,
    current: Current,
}

impl Server {
    /// Must be called inside a tokio runtime.
    pub(super) fn new(
        socket: UdpSocket,
        tls: &Arc<ServerTls>,
        limits: &Limits,
        spec: &ListenSpec,
    ) -> io::Result<Self> {
        let keys = limits.quic_secret.keys(&spec.name);
        let keys = keys.ok_or_else(|| io::Error::other("the QUIC keys cannot be derived"))?;
        for result in [
            socket2::SockRef::from(&socket).set_recv_buffer_size(SOCKET_BUFFER),
            socket2::SockRef::from(&socket).set_send_buffer_size(SOCKET_BUFFER),
        ] {
            if let Err(error) = result {
                tracing::debug!(%error, "UDP socket buffer left as it is");
            }
        }
        let mut own = EndpointConfig::new(keys.reset);
        let ids = keys.ids;
        own.cid_generator(move || Box::new(ids.clone()))
            .min_reset_interval(RESET_INTERVAL);
        let now = tls.current();
        let mut config = server_config(&now, limits, spec.webtransport)?;
        config.token_key(keys.token);
        let endpoint = Endpoint::new(own, Some(config.clone()), socket, Arc::new(TokioRuntime))?;
        let current = Current {
            tls: Arc::clone(tls),
            webtransport: spec.webtransport,
            made: Arc::new(Mutex::new((now, Arc::new(config)))),
        };
        Ok(Self { endpoint, current })
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
        H: Fn(crate::transport::Accepted) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Option<crate::transport::ConnectionTask>> + Send + 'static,
    {
        while let Some(Some(incoming)) = stop.run_until_cancelled(self.endpoint.accept()).await {
            let Some((incoming, permit, place)) = admit(incoming, &listener) else {
                continue;
            };
            let listener = Arc::clone(&listener);
            let (stop, config) = (stop.clone(), self.current.config());
            let handshake = async move {
                let peer = canonical(incoming.remote_address());
                let deadline = listener.deadline();
                let connecting = Box::pin(connect(incoming, config, &listener, place));
                let result = listener.bounded(deadline, &stop, connecting).await;
                match result {
                    // It may have moved since its first datagram.
                    Ok((quic, client)) => {
                        let peer = quic.remote_address();
                        let stream = Stream::quic(quic, peer).of(client);
                        listener.finish(Ok(stream), peer, deadline, permit)
                    }
                    Err(error) => listener.finish(Err(error), peer, deadline, permit),
                }
            };
            listen::spawn(handshake, handler.clone());
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
        self.endpoint.close(close_code(how).into(), b"");
    }
}

/// Turns away what there is no room for, and asks for proof of the address
/// when many handshakes run: a spoofed source costs no more than one packet.
fn admit(incoming: Incoming, listener: &Listener) -> Option<(Incoming, Permit, HandshakePlace)> {
    let limits = &listener.limits;
    let places = &limits.handshakes.quic;
    // Who has proved it already, with a token of an earlier connection, need not again.
    let proved = incoming.remote_address_validated();
    if places.pressed() && !proved && incoming.may_retry() {
        limits.events.retry_sent(&listener.info);
        // Only fails without may_retry.
        let _ = incoming.retry();
        return None;
    }
    let from = canonical(incoming.remote_address());
    let Some(place) = places.try_place(from) else {
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
    config: Arc<ServerConfig>,
    listener: &Listener,
    place: HandshakePlace,
) -> Result<(Quic, Option<Box<ClientCertificate>>), HandshakeError> {
    let connection = incoming
        .accept_with(config)
        .map_err(handshake_error)?
        .await
        .map_err(handshake_error)?;
    drop(place);
    let client = match listener.tls() {
        Some(tls) => tls.identify_any(connection.peer_identity()),
        None => Ok(None),
    }
    .inspect_err(|_| connection.close(code::CONTROL_GONE.into(), b"client certificate"))?;
    if is_http3(&connection) {
        return Ok((webtransport::accept(connection, listener).await?, client));
    }
    let guard = CloseOnDrop {
        connection: &connection,
        code: code::CONTROL_GONE.into(),
        why: "no control stream",
    };
    let (send, recv) = connection.accept_bi().await.map_err(handshake_error)?;
    std::mem::forget(guard);
    let control = Bidi::new(send, recv, Layer::Plain);
    let quic = Quic::new(connection, Layer::Plain, control, None, listener);
    Ok((quic, client))
}

/// If the deadline drops the future that has it, the client learns why.
struct CloseOnDrop<'a> {
    connection: &'a Connection,
    code: VarInt,
    why: &'static str,
}

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        // Does nothing if it is closed already.
        self.connection.close(self.code, self.why.as_bytes());
    }
}

fn is_http3(connection: &Connection) -> bool {
    connection
        .handshake_data()
        .and_then(|data| data.downcast::<HandshakeData>().ok())
        .and_then(|data| data.protocol)
        .is_some_and(|alpn| alpn == ALPN_H3.as_bytes())
}

fn server_config(tls: &Configs, limits: &Limits, webtransport: bool) -> io::Result<ServerConfig> {
    let mut transport = transport_config(limits.quic_idle)?;
    if webtransport {
        // Before the handshake nobody knows what will be spoken, so all are
        // allowed what browsers need; nothing is allocated for it.
        transport
            .max_concurrent_uni_streams(VarInt::from_u32(webtransport::UNI_STREAMS))
            .datagram_receive_buffer_size(Some(webtransport::DATAGRAM_BYTES));
    }
    let mut config = ServerConfig::with_crypto(crypto(tls, webtransport)?);
    config
        .transport_config(Arc::new(transport))
        .migration(true)
        .max_incoming(INCOMING_MAX)
        .incoming_buffer_size(INCOMING_BYTES)
        .incoming_buffer_size_total(INCOMING_BYTES_ALL);
    Ok(config)
}

fn crypto(tls: &Configs, webtransport: bool) -> io::Result<Arc<QuicServerConfig>> {
    let tls = match webtransport {
        false => tls.quic(),
        true => tls.quic_and_http3(),
    };
    let crypto = QuicServerConfig::try_from(tls).map_err(io::Error::other)?;
    Ok(Arc::new(crypto))
}

/// What a handshake begins with: the certificates of the listener as they are
/// then. The endpoint itself keeps what it has from the start, such as the keys
/// of its tokens.
#[derive(Clone)]
struct Current {
    tls: Arc<ServerTls>,
    webtransport: bool,
    made: Arc<Mutex<(Arc<Configs>, Arc<ServerConfig>)>>,
}

impl Current {
    fn config(&self) -> Arc<ServerConfig> {
        let now = self.tls.current();
        let mut made = self.made.lock();
        if !Arc::ptr_eq(&made.0, &now)
            // Only a provider without QUIC's suite fails, and all have the same one.
            && let Ok(crypto) = crypto(&now, self.webtransport)
        {
            let mut config = ServerConfig::clone(&made.1);
            config.crypto = crypto;
            *made = (now, Arc::new(config));
        }
        Arc::clone(&made.1)
    }
}

impl std::fmt::Debug for Current {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Current")
    }
}

/// The library's defaults allow a client 10 MB and more; these keep an idle
/// connection near 30 kB. No keep-alive of ours, it would wake radios.
fn transport_config(idle: Duration) -> io::Result<TransportConfig> {
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(STREAMS_AT_FIRST))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(STRANGER_WINDOW))
        .send_window(SEND_WINDOW)
        .datagram_receive_buffer_size(None)
        .mtu_discovery_config(None)
        // With it each connection keeps a send buffer for eleven datagrams for
        // all its life, a third of its memory, and seldom fills two.
        .enable_segmentation_offload(false)
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
        ConnectionError::TransportError(e) => match certificate_fault(e.code) {
            Some(fault) => HandshakeError::ClientCertificate {
                fault,
                why: e.reason,
            },
            None => HandshakeError::Quic(e.to_string()),
        },
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

/// What is wrong with the client's certificate, if that is what the alert says
/// that ended the handshake: of the alerts that a server sends, these have no
/// other reason.
fn certificate_fault(code: TransportErrorCode) -> Option<CertificateFault> {
    (0..=u8::MAX)
        .find(|alert| code == TransportErrorCode::crypto(*alert))
        .and_then(fault_of_alert)
}

fn close_code(how: CloseHow) -> u32 {
    match how {
        CloseHow::Normal | CloseHow::GoingAway => code::NORMAL,
        CloseHow::Protocol => code::CONTROL_GONE,
        CloseHow::Overload => code::OVERLOAD,
    }
}
