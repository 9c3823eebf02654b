//! The limits that hold before a client is known, and the hooks by which the
//! runtime counts what happens here.

mod handshakes;

use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::transport::{Kind, ListenerInfo, QuicSecret};
pub use handshakes::Handshakes;
pub(super) use handshakes::Place as HandshakePlace;

/// The slack that a WebSocket message may have over the largest packet: one
/// message may carry several packets [MQTT-6.0.0-2].
const MESSAGE_SLACK: usize = 64 * 1024;
/// The least limit of a WebSocket message after authentication.
const MESSAGE_MIN: usize = 256 * 1024;

/// Limits shared by all listeners.
#[derive(Clone)]
pub struct Limits {
    /// Places for TLS and QUIC handshakes that run at the same time.
    pub handshakes: Handshakes,
    /// From accept to a complete CONNECT.
    pub accept_deadline: Duration,
    /// Bytes that a WebSocket message may have before
    /// [`Stream::authenticated`](crate::transport::Stream::authenticated).
    pub frame_before_auth: usize,
    /// Bytes of the largest MQTT packet after authentication.
    pub packet_max: usize,
    /// QUIC's max_idle_timeout (RFC 9000 section 10.1).
    pub quic_idle: Duration,
    /// What QUIC's keys come from.
    pub quic_secret: QuicSecret,
    /// Asked for each connection before anything is spent on it.
    pub connections: Arc<dyn Admit>,
    /// Told what happens.
    pub events: Arc<dyn Events>,
}

impl Limits {
    /// Bytes that a WebSocket message may have after authentication.
    pub fn message_max(&self) -> usize {
        self.packet_max
            .saturating_add(MESSAGE_SLACK)
            .max(MESSAGE_MIN)
    }
}

impl std::fmt::Debug for Limits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Limits")
    }
}

impl Default for Limits {
    /// 512 handshakes of each kind, 10 s, 16 KiB, 1 MiB, 15 min, a secret that is none,
    /// 100 000 connections, no events.
    fn default() -> Self {
        Self {
            handshakes: Handshakes::new(512),
            accept_deadline: Duration::from_secs(10),
            frame_before_auth: 16 * 1024,
            packet_max: 1024 * 1024,
            quic_idle: Duration::from_secs(15 * 60),
            quic_secret: QuicSecret::new([0; QuicSecret::LEN]),
            connections: Arc::new(ConnectionCap::new(100_000)),
            events: Arc::new(NoEvents),
        }
    }
}

/// Decides whether one more connection may come in.
pub trait Admit: Send + Sync {
    /// Takes a place, or says that there is none.
    fn admit(&self) -> bool;
    /// Gives a place back.
    fn release(&self);
}

/// A place under an [`Admit`], given back when dropped.
pub struct Permit(Arc<dyn Admit>);

impl Permit {
    /// Takes a place if there is one.
    pub fn take(from: &Arc<dyn Admit>) -> Option<Self> {
        from.admit().then(|| Self(Arc::clone(from)))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.release();
    }
}

impl std::fmt::Debug for Permit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Permit")
    }
}

/// An [`Admit`] by count alone.
#[derive(Debug)]
pub struct ConnectionCap {
    used: AtomicUsize,
    max: usize,
}

impl ConnectionCap {
    /// At most `max` connections at once.
    pub fn new(max: usize) -> Self {
        Self {
            used: AtomicUsize::new(0),
            max,
        }
    }

    /// How many there are now.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }
}

impl Admit for ConnectionCap {
    fn admit(&self) -> bool {
        self.used
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |used| {
                (used < self.max).then_some(used + 1)
            })
            .is_ok()
    }

    fn release(&self) {
        self.used.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Hooks for metrics. Every method does nothing by default; they are called on
/// the accept path and must not block.
pub trait Events: Send + Sync {
    /// A connection came in and was admitted.
    fn accepted(&self, _listener: &ListenerInfo) {}
    /// `accept` failed; `kind` is `fd_limit`, `memory`, `aborted` or `other`.
    fn accept_error(&self, _listener: &ListenerInfo, _kind: &'static str) {}
    /// A connection was turned away before its handshake; `reason` is
    /// `connections_max` or `handshakes_max`.
    fn refused(&self, _listener: &ListenerInfo, _reason: &'static str) {}
    /// A handshake failed; `reason` is [`HandshakeError::label`].
    fn handshake_failed(&self, _listener: &ListenerInfo, _reason: &'static str) {}
    /// A load balancer asked whether a `ws` or `wss` listener is well.
    fn health_checked(&self, _listener: &ListenerInfo) {}
    /// A QUIC client was asked to prove its address (RFC 9000 section 8.1.2).
    fn retry_sent(&self, _listener: &ListenerInfo) {}
    /// A QUIC client's address changed (RFC 9000 section 9).
    fn migrated(&self, _listener: &ListenerInfo, _from: SocketAddr, _to: SocketAddr) {}
}

/// [`Events`] that nobody wants.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoEvents;

impl Events for NoEvents {}

/// What is wrong with a client's certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CertificateFault {
    /// There is none.
    Missing,
    /// It is past its date, or its date is yet to come.
    Expired,
    /// It is on a revocation list.
    Revoked,
    /// None of the authorities issued it, or no list that is not past its date
    /// says whether it is revoked.
    Untrusted,
    /// It is damaged, or not meant for this.
    Other,
}

/// Why a transport handshake came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// It was not done in time, or the client stayed silent.
    #[error("not done before the deadline")]
    Deadline,
    /// The listener stopped meanwhile.
    #[error("listener stopped")]
    Stopped,
    /// The peer hung up or the network failed.
    #[error("connection lost: {0}")]
    Io(std::io::Error),
    /// TLS failed.
    #[error("TLS: {0}")]
    Tls(String),
    /// The client has no certificate, or not a good one.
    #[error("client certificate: {why}")]
    ClientCertificate {
        /// What is wrong with it.
        fault: CertificateFault,
        /// The same in the library's words.
        why: String,
    },
    /// The client offered no application protocol that is served here (RFC
    /// 7301).
    #[error("no common application protocol (ALPN): \"{0}\" is needed")]
    Alpn(&'static str),
    /// The peer closed without a byte.
    #[error("closed without a byte")]
    Silent,
    /// The PROXY protocol header is missing or wrong.
    #[error("PROXY protocol: {0}")]
    Proxy(&'static str),
    /// The HTTP request was answered with an error status.
    #[error("HTTP {status}: {reason}")]
    Http {
        /// The status sent.
        status: u16,
        /// What was wrong with the request; what the client wrote is escaped.
        reason: Cow<'static, str>,
    },
    /// The request offered no subprotocol that is served; answered with 400.
    #[error("HTTP 400: none of the subprotocols \"mqtt\" and \"mqttv3.1\" offered")]
    Subprotocol,
    /// No failure: a health check was answered.
    #[error("health check")]
    Health,
    /// QUIC failed.
    #[error("QUIC: {0}")]
    Quic(String),
    /// The HTTP/3 part of WebTransport failed.
    #[error("WebTransport: {0}")]
    WebTransport(&'static str),
}

impl HandshakeError {
    /// What was being spoken on a listener of this kind.
    pub(super) const fn on(&self, listener: Kind) -> Kind {
        match (listener, self) {
            (Kind::Quic, Self::Http { .. } | Self::WebTransport(_)) => Kind::WebTransport,
            (kind, _) => kind,
        }
    }

    /// A failure before the first byte: some balancers end a port check with a reset.
    pub(super) fn before_all(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::ConnectionReset => Self::Silent,
            _ => Self::Io(error),
        }
    }

    /// A bounded name for a metric label.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Deadline => "deadline",
            Self::Stopped => "stopped",
            Self::Io(_) => "io",
            Self::Silent => "closed",
            Self::Proxy(_) => "proxy_protocol",
            Self::Subprotocol => "subprotocol",
            Self::Health => "health",
            Self::Tls(_) => "tls",
            Self::ClientCertificate { fault, .. } => match fault {
                CertificateFault::Missing => "client_certificate_missing",
                CertificateFault::Expired => "client_certificate_expired",
                CertificateFault::Revoked => "client_certificate_revoked",
                CertificateFault::Untrusted => "client_certificate_untrusted",
                CertificateFault::Other => "client_certificate_other",
            },
            Self::Alpn(_) => "alpn",
            Self::Http { status, .. } => match status {
                400 => "http_400",
                403 => "http_403",
                404 => "http_404",
                405 => "http_405",
                426 => "http_426",
                431 => "http_431",
                501 => "http_501",
                505 => "http_505",
                _ => "http_other",
            },
            Self::Quic(_) => "quic",
            Self::WebTransport(_) => "webtransport",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connection_cap_holds_at_the_limit() {
        let cap = Arc::new(ConnectionCap::new(2));
        let admit: Arc<dyn Admit> = Arc::clone(&cap) as _;
        let a = Permit::take(&admit).expect("first");
        let _b = Permit::take(&admit).expect("second");
        assert!(Permit::take(&admit).is_none());
        drop(a);
        assert_eq!(cap.used(), 1);
        assert!(Permit::take(&admit).is_some());
    }

    #[test]
    fn message_limit_has_a_floor_and_slack() {
        let mut limits = Limits {
            packet_max: 1000,
            ..Limits::default()
        };
        assert_eq!(limits.message_max(), 256 * 1024);
        limits.packet_max = 1 << 20;
        assert_eq!(limits.message_max(), (1 << 20) + (64 << 10));
        limits.packet_max = usize::MAX;
        assert_eq!(limits.message_max(), usize::MAX);
    }

    #[test]
    fn handshake_errors_have_bounded_labels() {
        let http = |status| HandshakeError::Http {
            status,
            reason: "x".into(),
        };
        for (error, label) in [
            (HandshakeError::Deadline, "deadline"),
            (HandshakeError::Alpn("mqtt"), "alpn"),
            (HandshakeError::Tls("any words".into()), "tls"),
            (HandshakeError::Quic("any words".into()), "quic"),
            (HandshakeError::WebTransport("words"), "webtransport"),
            (http(426), "http_426"),
            (http(599), "http_other"),
        ] {
            assert_eq!(error.label(), label);
        }
    }
}
