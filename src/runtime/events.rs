//! What the transports report, counted.

use std::net::SocketAddr;

use crate::telemetry::{AcceptErrorReason, HandshakeReason, metrics};
use crate::transport::{Events, Kind, ListenerInfo};

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

    fn handshake_failed(&self, listener: &ListenerInfo, reason: &'static str) {
        let reason = reason_of(listener.kind, reason);
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

/// The label for a failure's name on a listener of this kind.
fn reason_of(listener: Kind, reason: &str) -> HandshakeReason {
    match reason {
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
        // HTTP's other refusals.
        _ if listener == Kind::Quic => HandshakeReason::WebTransport,
        _ => HandshakeReason::WebSocket,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_of_webtransport_are_its_own() {
        for reason in ["http_400", "http_431", "http_501", "webtransport"] {
            let label = reason_of(Kind::Quic, reason);
            assert_eq!(label, HandshakeReason::WebTransport, "{reason}");
        }
        for kind in [Kind::Ws, Kind::Wss] {
            assert_eq!(reason_of(kind, "http_400"), HandshakeReason::WebSocket);
        }
        assert_eq!(reason_of(Kind::Quic, "http_404"), HandshakeReason::Path);
        assert_eq!(reason_of(Kind::Quic, "quic"), HandshakeReason::Quic);
    }
}
