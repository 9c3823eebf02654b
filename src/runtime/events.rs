//! What the transports report, counted.

use std::net::SocketAddr;

use crate::telemetry::{AcceptErrorReason, HandshakeReason, metrics};
use crate::transport::{Events, ListenerInfo};

/// Counts in the process's metrics.
pub(super) struct Counted;

impl Events for Counted {
    fn accept_error(&self, _listener: &ListenerInfo, kind: &'static str) {
        let reason = match kind {
            "fd_limit" => AcceptErrorReason::FileLimit,
            "memory" => AcceptErrorReason::Memory,
            "aborted" => AcceptErrorReason::Aborted,
            _ => AcceptErrorReason::Other,
        };
        metrics().accept_errors[reason].increment(1);
    }

    fn refused(&self, _listener: &ListenerInfo, _reason: &'static str) {
        metrics().handshakes_failed[HandshakeReason::Limit].increment(1);
    }

    fn handshake_failed(&self, _listener: &ListenerInfo, reason: &'static str) {
        let reason = match reason {
            "deadline" => HandshakeReason::Timeout,
            "stopped" | "closed" => HandshakeReason::Closed,
            "proxy_protocol" => HandshakeReason::Proxy,
            "tls" => HandshakeReason::Tls,
            "alpn" => HandshakeReason::Alpn,
            "client_certificate_missing" => HandshakeReason::CertificateMissing,
            "client_certificate_expired" => HandshakeReason::CertificateExpired,
            "client_certificate_revoked" => HandshakeReason::CertificateRevoked,
            "client_certificate_untrusted" => HandshakeReason::CertificateUntrusted,
            "client_certificate_other" => HandshakeReason::CertificateOther,
            "http_403" => HandshakeReason::Origin,
            "http_404" => HandshakeReason::Path,
            "subprotocol" => HandshakeReason::Subprotocol,
            "quic" => HandshakeReason::Quic,
            "webtransport" | "http_501" => HandshakeReason::WebTransport,
            "io" => HandshakeReason::Io,
            _ => HandshakeReason::WebSocket,
        };
        metrics().handshakes_failed[reason].increment(1);
    }

    fn health_checked(&self, _listener: &ListenerInfo) {
        metrics().health_checks.increment(1);
    }

    fn retry_sent(&self, _listener: &ListenerInfo) {
        metrics().quic_retries.increment(1);
    }

    fn migrated(&self, _listener: &ListenerInfo, _from: SocketAddr, _to: SocketAddr) {
        metrics().quic_migrations.increment(1);
    }
}
