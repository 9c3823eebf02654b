//! The settings of QUIC: limits on streams and bytes, and the certificates of new handshakes.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use quinn::crypto::HandshakeTokenKey;
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{IdleTimeout, ServerConfig, TransportConfig, VarInt};

use crate::streams::StreamId;
use crate::transport::tls::server::{Configs, ServerTls};

/// Streams that a client may have open, control and data together.
pub(super) const STREAMS_MAX: usize = StreamId::COUNT;
/// Streams that a client may open before it has shown that it uses several: the library keeps an entry
/// for each that is allowed, in tables that double past 14, and announces at least three more.
const STREAMS_AT_FIRST: u32 = 13;
/// The number of open streams at which all [`STREAMS_MAX`] are allowed.
pub(super) const STREAMS_MANY: usize = 3;
/// Flow control: the most bytes that a client may send unread on one stream.
const STREAM_WINDOW_BYTES: u32 = 64 * 1024;
/// The most bytes that an authenticated client may send unread on all streams.
pub(super) const CONNECTION_WINDOW_BYTES: u32 = 128 * 1024;
/// The most bytes that a client may send unread before it is authenticated: a CONNECT, and as much on
/// other streams.
const UNAUTHENTICATED_WINDOW_BYTES: u32 = 32 * 1024;
/// The most bytes that we send unacknowledged on one connection.
const SEND_WINDOW_BYTES: u64 = 128 * 1024;
/// Handshakes that wait for the accept loop.
const INCOMING_MAX: usize = 4096;
/// The most bytes that are kept for one handshake that waits.
const INCOMING_BYTES: u64 = 64 * 1024;
/// The most bytes that are kept for all handshakes that wait.
const INCOMING_TOTAL_BYTES: u64 = 16 * 1024 * 1024;

/// Unidirectional streams that a client may have open: one, which is stopped. A client that may open
/// none would wait for ever. The library's table of streams holds it beside [`STREAMS_AT_FIRST`] and
/// does not double.
const UNI_STREAMS: u32 = 1;
/// Unidirectional streams of HTTP/3: control and QPACK's two (RFC 9114 section 6.2). Only the first is
/// read, up to its SETTINGS.
const HTTP_UNI_STREAMS: u32 = 3;
/// Bytes of datagrams, with the library's overhead for each, that may lie unread. None is ever read;
/// browsers insist that they could be sent.
const DATAGRAM_BYTES: usize = 2048;

/// The configuration with which new handshakes begin: it has the listener's current certificates. The
/// endpoint itself keeps its first settings, such as the keys of its tokens.
#[derive(Clone)]
pub(super) struct CurrentConfig {
    tls: Arc<ServerTls>,
    webtransport: bool,
    made: Arc<Mutex<(Arc<Configs>, Arc<ServerConfig>)>>,
}

impl fmt::Debug for CurrentConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CurrentConfig")
    }
}

impl CurrentConfig {
    /// `idle` is max_idle_timeout (RFC 9000 section 10.1); `token` is the key of address validation
    /// tokens.
    pub(super) fn new(
        tls: &Arc<ServerTls>,
        webtransport: bool,
        idle: Duration,
        token: Arc<dyn HandshakeTokenKey>,
    ) -> io::Result<Self> {
        let now = tls.current();
        let mut config = ServerConfig::with_crypto(crypto(&now, webtransport)?);
        config
            .transport_config(Arc::new(transport_config(idle, webtransport)?))
            .migration(true)
            .max_incoming(INCOMING_MAX)
            .incoming_buffer_size(INCOMING_BYTES)
            .incoming_buffer_size_total(INCOMING_TOTAL_BYTES)
            .token_key(token);
        Ok(Self {
            tls: Arc::clone(tls),
            webtransport,
            made: Arc::new(Mutex::new((now, Arc::new(config)))),
        })
    }

    /// The configuration for a handshake that begins now.
    pub(super) fn get(&self) -> Arc<ServerConfig> {
        let now = self.tls.current();
        let mut made = self.made.lock();
        if !Arc::ptr_eq(&made.0, &now)
            // Fails only with a provider without QUIC's cipher suite, and all have the same provider.
            && let Ok(crypto) = crypto(&now, self.webtransport)
        {
            let mut config = ServerConfig::clone(&made.1);
            config.crypto = crypto;
            *made = (now, Arc::new(config));
        }
        Arc::clone(&made.1)
    }
}

fn crypto(tls: &Configs, webtransport: bool) -> io::Result<Arc<QuicServerConfig>> {
    let tls = match webtransport {
        false => tls.quic(),
        true => tls.quic_and_http3(),
    };
    let crypto = QuicServerConfig::try_from(tls).map_err(io::Error::other)?;
    Ok(Arc::new(crypto))
}

/// The silence after which we send a PING: so much of the idle timeout, in sixths. A client with a Keep
/// Alive of its own, or one that CONNACK gave it, has sent something before.
const PING_AFTER_SIXTHS: u32 = 5;

/// The library's defaults allow a client 10 MB and more; these keep an idle connection near 30 kB.
/// PINGs are rare, because they wake radios.
fn transport_config(idle: Duration, webtransport: bool) -> io::Result<TransportConfig> {
    let mut config = TransportConfig::default();
    let uni_streams = match webtransport {
        false => UNI_STREAMS,
        true => UNI_STREAMS + HTTP_UNI_STREAMS,
    };
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(STREAMS_AT_FIRST))
        .max_concurrent_uni_streams(VarInt::from_u32(uni_streams))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
        .receive_window(VarInt::from_u32(UNAUTHENTICATED_WINDOW_BYTES))
        .send_window(SEND_WINDOW_BYTES)
        .datagram_receive_buffer_size(None)
        .mtu_discovery_config(None)
        // Each connection would keep a send buffer for eleven datagrams, a third of its memory, and
        // seldom fill two.
        .enable_segmentation_offload(false)
        .keep_alive_interval(Some(idle / 6 * PING_AFTER_SIXTHS))
        .max_idle_timeout(Some(IdleTimeout::try_from(idle).map_err(io::Error::other)?));
    if webtransport {
        // The protocol is unknown before the handshake, so every client is allowed what browsers need;
        // nothing is allocated for it.
        config.datagram_receive_buffer_size(Some(DATAGRAM_BYTES));
    }
    Ok(config)
}
