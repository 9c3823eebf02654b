//! Byte transports: listeners and connections over TCP, TLS, WebSocket, secure
//! WebSocket, QUIC and WebTransport, and the dialling side for links to a core.
//!
//! This module knows bytes only. A [`Stream`] carries one or more *streams*, each
//! an ordered byte stream in both directions: stream 0 is the control stream and
//! always there, streams 1 to 15 are further streams of QUIC or WebTransport that
//! the client opened.
//!
//! Each foreign library is named in one place: rustls in `tls.rs` and `tls/`, quinn in
//! `quic.rs` and `quic/`, tungstenite in `ws/`, rcgen in `selfsigned.rs`, proxy-header in
//! `proxy.rs`.

mod detect;
pub mod dial;
mod forwarded;
pub mod limits;
pub mod listen;
mod proxy;
mod quic;
pub mod selfsigned;
mod stream;
mod tcp;
pub mod tls;
mod ws;

use std::borrow::Cow;
use std::fmt;
use std::net::SocketAddr;
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;

use tokio::time::Instant;

pub use detect::{Detected, detect};
pub use limits::{Admit, ConnectionCap, Events, Handshakes, Limits, NoEvents, Permit};
pub use listen::{BindError, Bound, Drain, bind};
pub use proxy::Proxies;
pub use quic::QuicSecret;
pub use stream::Stream;
pub use tls::{ClientCertificate, ClientTls, Configs, Material, ServerTls, TlsError, Validity};

/// What a listener speaks below MQTT.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// MQTT directly over TCP.
    Tcp,
    /// MQTT over TLS.
    Tls,
    /// MQTT over WebSocket (RFC 6455).
    Ws,
    /// MQTT over WebSocket over TLS.
    Wss,
    /// MQTT over QUIC (RFC 9000), ALPN `mqtt`.
    Quic,
    /// MQTT over WebTransport over HTTP/3: connections, never a listener, of
    /// which it is a part ([`ListenSpec::webtransport`]).
    WebTransport,
}

impl Kind {
    /// The name used in configuration, logs and metric labels.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Tls => "tls",
            Self::Ws => "ws",
            Self::Wss => "wss",
            Self::Quic => "quic",
            Self::WebTransport => "webtransport",
        }
    }

    /// Whether a listener of this kind needs a certificate.
    pub const fn needs_tls(self) -> bool {
        matches!(
            self,
            Self::Tls | Self::Wss | Self::Quic | Self::WebTransport
        )
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Kind {
    type Err = UnknownKind;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        [Self::Tcp, Self::Tls, Self::Ws, Self::Wss, Self::Quic]
            .into_iter()
            .find(|kind| kind.as_str() == s)
            .ok_or(UnknownKind)
    }
}

/// The text names no [`Kind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a transport: expected tcp, tls, ws, wss or quic")]
pub struct UnknownKind;

/// What to listen on, and how.
#[derive(Clone, Debug)]
pub struct ListenSpec {
    /// The listener's name in logs and metrics.
    pub name: String,
    /// What it speaks.
    pub transport: Kind,
    /// The address to bind; port 0 takes a free one.
    pub bind: SocketAddr,
    /// The request paths of `ws`, `wss` and WebTransport; others get 404. Unused
    /// elsewhere.
    pub paths: Vec<String>,
    /// Origins that a browser may come from (likewise); empty means any. A
    /// request without an `Origin` header is no browser's and passes.
    pub origins: Vec<String>,
    /// The proxies before it; QUIC has none.
    pub proxies: Proxies,
    /// The certificates; needed by `tls`, `wss` and `quic`.
    pub tls: Option<Arc<ServerTls>>,
    /// `quic`: browsers are served over WebTransport at the same port.
    pub webtransport: bool,
}

/// Which listener a connection came in on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenerInfo {
    /// The listener's name.
    pub name: String,
    /// What it speaks.
    pub kind: Kind,
}

/// What serves a client from the answer to its CONNECT on: it is there for all of
/// a connection's life, so that it should be small. What begins a connection is
/// large, and gone by then.
pub type ConnectionTask = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A connection whose transport handshake is done; no MQTT byte has been read.
#[derive(Debug)]
pub struct Accepted {
    /// The byte stream.
    pub stream: Stream,
    /// The client's address when the connection was accepted: the peer's, or what
    /// a trusted proxy told (then port 0 is one that was not told).
    pub peer: SocketAddr,
    /// The listener it came in on.
    pub listener: Arc<ListenerInfo>,
    /// The instant by which CONNECT must be complete.
    pub deadline: Instant,
    /// The place taken under the connection limit; given back when dropped.
    pub permit: Permit,
}

/// What one successful [`Stream::poll_recv`] brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recv {
    /// The stream: 0 is control, 1 to 15 are QUIC data streams.
    pub stream: u8,
    /// How many bytes were appended; 0 only when a stream closed.
    pub bytes: usize,
    /// The peer ended this data stream in order: nothing more comes on it. What
    /// it waits for can still be sent, until [`Stream::finish_stream`]; then its
    /// number may be used again.
    pub finished: bool,
}

/// Bytes on their way out on one stream.
#[derive(Debug, Default)]
pub struct OutBuf {
    /// The bytes; new ones are appended at the end at any time.
    pub buf: Vec<u8>,
    /// How many of them the transport has taken.
    pub at: usize,
}

/// What has gone over a QUIC connection so far, for the question whether the
/// network carries anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Frames that the peer has to acknowledge, those sent again among them.
    pub sent: u64,
    /// Acknowledgements received.
    pub acknowledged: u64,
}

/// A buffer that grew past this many bytes is given back once it is written.
const OUT_KEEP: usize = 16 * 1024;

impl OutBuf {
    /// Whether everything has been taken.
    pub fn is_empty(&self) -> bool {
        self.at >= self.buf.len()
    }

    /// The bytes that still wait.
    pub fn rest(&self) -> &[u8] {
        self.buf.get(self.at..).unwrap_or_default()
    }

    /// Drops what was written, and the allocation if it is large.
    pub(crate) fn reset(&mut self) {
        self.at = 0;
        if self.buf.capacity() > OUT_KEEP {
            self.buf = Vec::new();
        } else {
            self.buf.clear();
        }
    }
}

/// How a connection is ended by us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseHow {
    /// An ordinary end: WebSocket 1000, QUIC application code 0.
    Normal,
    /// The peer broke the protocol: WebSocket 1002 (or the code of the
    /// violation that was found), QUIC application code 1.
    Protocol,
    /// We have no room: WebSocket 1013, QUIC application code 2.
    Overload,
    /// We are shutting down: WebSocket 1001, QUIC application code 0.
    GoingAway,
}

/// Why a connection (or one stream) carries no more bytes. `Display` is the
/// reason for a log line and holds no text chosen by the peer.
#[derive(Debug, thiserror::Error)]
pub enum Closed {
    /// The peer ended the byte stream in order; whether MQTT was finished is
    /// for the caller to judge.
    #[error("closed by the peer")]
    Eof,
    /// The peer or the network broke the connection.
    #[error("connection lost: {0}")]
    Reset(Cow<'static, str>),
    /// The peer broke the rules of the transport.
    #[error("transport rules broken: {reason}")]
    Violation {
        /// Which rule.
        reason: &'static str,
        /// The WebSocket close code that [`Stream::poll_close`] will send
        /// (RFC 6455 section 7.4.1).
        ws_code: u16,
    },
    /// The peer used up what one connection can have of something.
    #[error("{0}")]
    Quota(&'static str),
    /// A WebSocket message is larger than the limit that holds now.
    #[error("message larger than the limit")]
    TooLarge,
    /// Only this data stream is gone, in both directions; the connection goes on.
    /// Its number may be used again.
    #[error("data stream broken off by the peer")]
    StreamReset(u8),
    /// The operating system reported an error.
    #[error("{0}")]
    Io(std::io::Error),
}

impl From<std::io::Error> for Closed {
    fn from(error: std::io::Error) -> Self {
        use std::io::ErrorKind as K;
        match error.kind() {
            // A TLS peer that ends without close_notify reads as this.
            K::UnexpectedEof => Self::Eof,
            K::ConnectionReset => Self::Reset("reset by the peer".into()),
            K::ConnectionAborted => Self::Reset("aborted".into()),
            K::BrokenPipe => Self::Reset("broken pipe".into()),
            K::TimedOut => Self::Reset("timed out".into()),
            _ => Self::Io(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kind_names_round_trip() {
        for kind in [Kind::Tcp, Kind::Tls, Kind::Ws, Kind::Wss, Kind::Quic] {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        // No listener is one.
        assert_eq!("webtransport".parse::<Kind>(), Err(UnknownKind));
        assert_eq!("TCP".parse::<Kind>(), Err(UnknownKind));
    }

    #[test]
    fn small_buffers_are_kept_and_large_ones_given_back() {
        let mut out = OutBuf {
            buf: Vec::with_capacity(1024),
            at: 0,
        };
        out.buf.extend_from_slice(b"abc");
        out.at = 3;
        assert!(out.is_empty());
        out.reset();
        assert_eq!((out.buf.capacity(), out.at), (1024, 0));
        out.buf = vec![0; OUT_KEEP + 1];
        out.reset();
        assert_eq!(out.buf.capacity(), 0);
    }
}
